"""scripts/pretrain.py whose probes are `short_probe.py`: a second each instead of a real one's imports."""

import runpy
import sys
from pathlib import Path

from earlybert import probes

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    probes._FINETUNE = HERE / "short_probe.py"
    script = HERE.parent.parent / "scripts" / "pretrain.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
