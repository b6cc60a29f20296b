"""What stands in for scripts/finetune.py: looks at its checkpoint and writes its results.

The score is the step plus the seed. Beside the tasks' folder: a task that the file `fails` names ends with an
error, and where there is a file `slow` it takes ten minutes.
"""

import json
import sys
import time
import tomllib
from pathlib import Path


def main() -> int:
    settings = tomllib.loads(Path(sys.argv[2]).read_text())
    assert sys.argv[1] == "glue"
    model, beside = Path(settings["model"]), Path(settings["data"]).parent
    fails = beside / "fails"
    if (beside / "slow").exists():
        time.sleep(600)
    manifest = json.loads((model / "manifest.json").read_text())
    for name, stated in manifest["files"].items():
        assert (model / name).stat().st_size == stated["bytes"]
    for task in settings["tasks"]:
        if fails.exists() and task in fails.read_text().split():
            print(f"error: {task} is not to be had", file=sys.stderr)
            return 2
        for seed in settings["seeds"]:
            folder = Path(settings["runs"]) / settings["name"] / task / f"seed-{seed}"
            folder.mkdir(parents=True)
            score = manifest["step"] + seed
            told = {
                "seed": seed,
                "score": score,
                "scores": {"dev": {"score": score}},
                "seconds": {"train": 1.0},
            }
            (folder / "result.json").write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
