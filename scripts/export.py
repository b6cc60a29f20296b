"""Export a run, or one of its checkpoints, for others to load.

    python scripts/export.py runs/NAME --to DIR --form compact|dense

compact has the true shapes and loads with trust_remote_code; dense loads in stock Hugging Face BERT.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder, or a step-NNNNNNN folder of its checkpoints")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--form", choices=("compact", "dense"), required=True)
    arguments = parser.parse_args()

    from earlybert.export import export, read_run

    difference = export(read_run(arguments.run), to=arguments.to, form=arguments.form)
    told = f"loaded again; largest difference of logits {difference:.3g}"
    print(f"{arguments.to}: {arguments.form} export, {told}")
    return 0


if __name__ == "__main__":
    from earlybert.config import run_command

    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that last a moment only hide what is said
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here touches a device: DeepSpeed need not look
    run_command(main)
