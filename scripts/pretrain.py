"""Pretrain from an experiment file; the same command again resumes.

    deepspeed --num_accelerators 2 scripts/pretrain.py scripts/experiments/quickstart.toml [key=value ...]

Overrides are dotted: model.layers=4 ticket.every=20 phases.0.steps=500. Without a launcher it runs as one
process.
"""

from __future__ import annotations

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="experiment file (TOML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    # The launcher adds this one; the rank is taken from the environment.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    from earlybert import experiment  # after the arguments: --help and mistakes do not wait for torch
    from earlybert.config import settled_imports

    settings, mechanics = experiment.load(arguments.experiment, arguments.overrides)

    with settled_imports():
        from earlybert.lifecycle import end_ranks, start_ranks
        from earlybert.run import STOPPED
        from earlybert.trainer import train

    start_ranks()
    try:
        result = train(settings, mechanics, where=arguments.experiment)
    finally:
        end_ranks()
    return STOPPED if result.stopped else 0


if __name__ == "__main__":
    # The virtual environment's own ninja must be found even where the environment is not activated.
    # A store or socket of a rank that is gone is told with C++ frames; the run itself says which rank it was.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    from earlybert.config import run_command

    run_command(main)
