"""Fine-tune on GLUE and SQuAD, each task and seed a run of its own; the same command again goes on.

    deepspeed --num_accelerators 2 scripts/finetune.py glue|squad EXPERIMENT.toml [key=value ...]
    python scripts/finetune.py table RUN... [--each-metric] [--to FILE.md] [--picture FILE.png]

Experiments are those of scripts/experiments/finetune.
Overrides are dotted: model=runs/bert_mini recipe.learning_rate=1e-4 'tasks=["rte", "mrpc"]'. Without a
launcher it runs as one process. table: mean and spread of the runs' scores by task, with their time and what
it saves.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="finetune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for kind, tasks in (("glue", "the nine tasks of GLUE"), ("squad", "SQuAD 1.1 and 2.0")):
        command = commands.add_parser(kind, help=f"fine-tune on {tasks}")
        command.add_argument("experiment", help="fine-tuning experiment (TOML)")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    table = commands.add_parser("table", help="scores of runs side by side")
    table.add_argument("run", nargs="+", type=Path, help="run folders, the baseline first")
    table.add_argument("--each-metric", action="store_true", help="a column a metric, not a task")
    table.add_argument("--to", type=Path, help="write the table here too")
    table.add_argument("--picture", type=Path, help="draw it here")
    # The launcher adds this one; the rank is taken from the environment.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.command == "table":
        from earlybert import scores
        from earlybert.config import EarlyBertError

        found = scores.collect(arguments.run)
        print(text := scores.table(found, each_metric=arguments.each_metric))
        if arguments.to is not None:
            try:
                arguments.to.write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise EarlyBertError(f"--to {arguments.to}: {error.strerror or error}") from error
        if arguments.picture is not None:
            scores.picture(found, arguments.picture)
        return 0

    from earlybert import recipes  # after the arguments: --help and mistakes do not wait for torch
    from earlybert.config import settled_imports

    settings, mechanics = recipes.load(arguments.experiment, arguments.overrides, kind=arguments.command)

    with settled_imports():
        from earlybert.finetune import tune
        from earlybert.lifecycle import end_ranks, start_ranks
        from earlybert.run import STOPPED

    start_ranks()
    try:
        done = tune(settings, mechanics, where=arguments.experiment)
    finally:
        end_ranks()
    return 0 if done else STOPPED


if __name__ == "__main__":
    # The virtual environment's own ninja must be found even where the environment is not activated.
    # A store or socket of a rank that is gone is told with C++ frames; the run itself says which rank it was.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    from earlybert.config import run_command

    run_command(main)
