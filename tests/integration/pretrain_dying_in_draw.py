"""scripts/pretrain.py, but rank 1 is killed in the middle of the draw: the old engine is gone, the new one
not there."""

import os
import runpy
import signal
from pathlib import Path

from earlybert.engine import Engine

build = Engine._build


def die_instead(self, config):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return build(self, config)


Engine._build = die_instead  # type: ignore[method-assign]
runpy.run_path(str(Path(__file__).parent.parent.parent / "scripts" / "pretrain.py"), run_name="__main__")
