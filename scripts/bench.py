"""Measure on this machine; every figure beside its baseline, as a table and as JSON.

    python scripts/bench.py draw|save [--shape mini|base|large] [--stage 0-3] [--ranks 2] [--json FILE]
    python scripts/bench.py train|ticket [--shape mini|base|large] [--length 128] [--batch 32] [--json FILE]
    python scripts/bench.py step [--shape base] [--kind dense|search|shrunken] [--compile] [--profile FILE]
    python scripts/bench.py saving EXPERIMENT [key=value ...] --out DIR [--minutes 120] [--json FILE]
    python scripts/bench.py recipes EXPERIMENT... --out DIR [--seconds 600] [--json FILE]
    python scripts/bench.py downstream MODEL --data GLUE --out DIR [--task rte] [--dropout 0] [--json FILE]
    python scripts/bench.py transfer --row 'NAME: MODEL [key=value ...]'... --glue DIR --squad DIR --out DIR
    python scripts/bench.py data DUMP EXTRACT... [--json FILE]
    python scripts/bench.py latency [--export DIR --export DIR | --shape base] [--json FILE]

draw: the pause of a draw with its parts, beside one checkpoint save of the same run, and the memory of a
rank. save: how long a checkpoint keeps training waiting, in the background and not, beside DeepSpeed's own
save (which makes nothing durable and hashes nothing). The model has the shape's true widths, random weights
and tokens; batches are tiny, since neither depends on them.

train: tokens/s of the whole training program, beside stock BERT under Hugging Face's Trainer (pip install
accelerate), under its DeepSpeed integration, and in a plain DeepSpeed loop. ticket: a step of the search and
of the shrunken model beside a dense one, and beside what the FLOPs promise.

step: one such step taken apart, into forward pass, backward pass and update, beside the device's own matrix
product, and in torch's profile.

saving: how soon the ticket, a random ticket, the ticket's shape from scratch and LayerDrop reach the dense
run's final held-out loss: whole runs, each arm with its own best learning rate and several seeds, in slices
of --minutes (the same command goes on).

recipes: held-out loss of several experiments after the same training time, each schedule stretched to it.

downstream: a folder of stock BERT fine-tuned on tasks of GLUE by scripts/finetune.py and by Hugging Face's
Trainer (pip install accelerate), with the same seeds, rows, order and rates: scores with their spread, and
without dropout the difference of every step's loss.

transfer: models, each a row, fine-tuned on the same tasks with the same seeds, --jobs programs at a time, in
slices of --minutes: the paper's table.

data: a Wikipedia dump to prose beside wikiextractor and mwparserfromhell (pip install both), prose to shards
beside tokenizers' own encode_batch, the loader beside transformers' collator, and the memory of a
preparation beside that of one of ten times the text.

latency: milliseconds of the encoder of exports, or of a shape and of its ticket with random weights, in
PyTorch and, where it is installed (pip install onnx onnxscript onnxruntime), in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES = ("mini", "base", "large")
_COUNTS = (
    "ranks", "rounds", "steps", "batch", "length", "document", "copies", "megabytes", "seeds", "samples",
    "evaluations", "threads", "jobs",
)  # fmt: skip
"""Options of which there is at least one."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("draw", help="the pause of a draw and a rank's memory")
    draw.add_argument("--moments", choices=("reset", "keep"), default="reset")
    save = commands.add_parser("save", help="how long a checkpoint keeps training waiting")
    save.add_argument("--rounds", type=int, default=3, help="of each kind, in turn")
    for command in (draw, save):
        command.add_argument("--shape", choices=SHAPES, default="base")
        command.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=3)
        command.add_argument("--ranks", type=int, default=2)
    data = commands.add_parser("data", help="MB/s from dump to prose to shards, and tokens/s of the loader")
    data.add_argument("dump", type=Path, help="a pages-articles dump, .xml.bz2")
    data.add_argument("extract", type=Path, nargs="+", help="files of WikiExtractor's: the other parts' text")
    data.add_argument("--rounds", type=int, default=3, help="of each kind, in turn")
    data.add_argument("--copies", type=int, default=10, help="of the dump's pages, in one file")
    data.add_argument("--megabytes", type=int, default=30, help="of text to tokenize")
    data.add_argument("--wikiextractor", type=Path, help="a folder with another version of wikiextractor")
    data.add_argument("--only", choices=("prose", "tokens", "loader", "memory"), action="append")
    train = commands.add_parser("train", help="tokens/s beside Hugging Face's Trainer and plain DeepSpeed")
    train.add_argument(
        "--kind", action="append",
        help="ours, trainer, trainer-ranks, trainer-deepspeed, deepspeed (these five if nothing is said), "
        "ours-compiled, ours-boundaries, ours-compiled-boundaries",
    )  # fmt: skip
    train.add_argument(
        "--set",
        dest="override",
        action="append",
        default=[],
        metavar="key=value",
        help="settings of ours, such as model.attention_dropout=0",
    )
    train.add_argument("--document", type=int, help="mean tokens of a document; 4 rows if not given")
    ticket = commands.add_parser("ticket", help="what the search costs a step, and what the ticket saves")
    apart = commands.add_parser("step", help="one step, taken apart")
    apart.add_argument("--kind", choices=("dense", "search", "shrunken"), default="dense")
    apart.add_argument("--document", type=int, help="mean tokens of a document, where rows hold several")
    apart.add_argument("--profile", type=Path, metavar="FILE", help="write torch's profile of a step here")
    for command in (ticket, apart):
        command.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2)
        command.add_argument("--compile", action="store_true", help="by torch.compile, as model.compile does")
        command.add_argument("--dropout", type=float, default=0.1)
        command.add_argument("--head-ratio", type=float, default=1 / 3, help="of each layer's heads that go")
        command.add_argument("--neuron-ratio", type=float, default=0.3, help="of all neurons that go")
    for command in (train, ticket, apart):
        command.add_argument("--shape", choices=SHAPES, default="mini")
        command.add_argument("--length", type=int, default=128, help="tokens a row")
        command.add_argument(
            "--batch", type=int, default=32, help="rows of an optimizer step, over all ranks"
        )
        command.add_argument("--steps", type=int, default=20, help="that are timed, a multiple of 5")
        command.add_argument("--ranks", type=int, default=2)
        command.add_argument("--rounds", type=int, default=3, help="of each program, in turn")
    saving = commands.add_parser("saving", help="time to the dense run's final held-out loss")
    saving.add_argument("experiment", type=Path, help="an experiment file with a ticket")
    saving.add_argument("override", nargs="*", metavar="key=value", help="settings to change, in all arms")
    saving.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; what is done there is kept"
    )
    saving.add_argument("--minutes", type=float, default=120, help="then stop; the same command goes on")
    saving.add_argument(
        "--rates", type=_numbers, default="5e-4,1e-3,2e-3", help="learning rates, for the seed 1"
    )
    saving.add_argument("--seeds", type=int, default=3)
    saving.add_argument(
        "--share", type=float, default=1.0, help="steps of the other arms over those of the dense one"
    )
    saving.add_argument("--arm", action="append", help="dense, ticket, random, scratch, layerdrop")
    saving.add_argument("--also", action="append", help="a variant of the ticket: 'NAME: key=value ...'")
    saving.add_argument("--ranks", type=int, default=2)
    saving.add_argument("--plot", type=Path, help="draw the loss over time here, once all is done")
    recipes = commands.add_parser("recipes", help="held-out loss of recipes after the same training time")
    recipes.add_argument("experiment", type=Path, nargs="+", help="experiment files, the baseline first")
    recipes.add_argument("--out", type=Path, required=True, help="folder of the runs; what is done is kept")
    recipes.add_argument("--seconds", type=float, default=600, help="of training, each")
    recipes.add_argument("--minutes", type=float, default=120, help="then stop; the same command goes on")
    recipes.add_argument("--seeds", type=int, default=1)
    recipes.add_argument("--samples", type=int, default=1024, help="held-out rows of an evaluation")
    recipes.add_argument("--evaluations", type=int, default=12, help="of a run")
    recipes.add_argument("--set", dest="override", action="append", default=[], metavar="key=value")
    recipes.add_argument("--ranks", type=int, default=2)
    recipes.add_argument("--plot", type=Path, help="draw the loss over time here")
    latency = commands.add_parser("latency", help="milliseconds of compact beside dense")
    latency.add_argument(
        "--export", type=Path, action="append", metavar="DIR", help="an export; the baseline first"
    )
    latency.add_argument("--shape", choices=SHAPES, default="base", help="where no export is given")
    latency.add_argument("--head-ratio", type=float, help="of the shape's heads that go; as in a ticket")
    latency.add_argument("--neuron-ratio", type=float, help="of the shape's neurons that go")
    latency.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows at a time")
    latency.add_argument("--length", type=int, nargs="+", default=[128, 512], help="tokens a row")
    latency.add_argument("--rounds", type=int, default=50, help="of each model, in turn")
    latency.add_argument(
        "--seconds", type=float, default=30, help="then fewer rounds, but five, of each size"
    )
    latency.add_argument("--runtime", action="append", choices=("pytorch", "onnxruntime"))
    latency.add_argument("--threads", type=int, help="of a CPU; PyTorch's own choice if not given")
    downstream = commands.add_parser("downstream", help="fine-tuning beside Hugging Face's Trainer")
    downstream.add_argument("model", type=Path, help="folder of a stock BERT, such as a dense export")
    downstream.add_argument("--data", type=Path, required=True, help="folder of GLUE's files")
    downstream.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; what is done there is kept"
    )
    downstream.add_argument("--task", action="append", help="such as rte; all that are there if not given")
    downstream.add_argument("--seeds", type=int, default=3)
    downstream.add_argument("--dropout", type=float, help="in place of the model's own")
    downstream.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    downstream.add_argument(
        "--set", dest="override", action="append", default=[], metavar="key=value",
        help="settings of the fine-tuning, such as recipe.epochs=1.0",
    )  # fmt: skip
    transfer = commands.add_parser("transfer", help="pretrained models fine-tuned on the same tasks")
    transfer.add_argument(
        "--row", action="append", required=True, metavar="'NAME: MODEL [key=value ...]'",
        help="a model and settings of its fine-tuning, such as ticket.enabled=true; the baseline first",
    )  # fmt: skip
    transfer.add_argument("--glue", type=Path, metavar="DIR", help="folder of GLUE's files")
    transfer.add_argument("--squad", type=Path, metavar="DIR", help="folder of SQuAD's files")
    transfer.add_argument("--task", action="append", help="such as rte; all that are there if not given")
    transfer.add_argument("--seeds", type=int, default=3)
    transfer.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; what is done there is kept"
    )
    transfer.add_argument("--jobs", type=int, default=1, help="programs at a time, on shares of the cores")
    transfer.add_argument("--minutes", type=float, default=120, help="then stop; the same command goes on")
    transfer.add_argument(
        "--set", dest="override", action="append", default=[], metavar="key=value",
        help="settings of all rows, such as recipe.epochs=1.0",
    )  # fmt: skip
    transfer.add_argument("--plot", type=Path, help="draw the scores here")
    whole = (draw, save, data, train, ticket, apart, saving, recipes, downstream, transfer, latency)
    for command in whole:
        command.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    _check(arguments)
    if arguments.command in ("data", "train", "saving", "recipes", "downstream", "transfer", "latency"):
        bench = importlib.import_module(f"benchmarks.{arguments.command}")
        figures = bench.measure(arguments)
        bench.tell(figures, *([arguments.plot] if "plot" in arguments else []))
        _keep(figures, arguments.json)
        return 0
    return _rank(arguments) if "EARLYBERT_BENCH" in os.environ else _start(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Raise EarlyBertError for what is better known before hours are measured."""
    from earlybert.config import EarlyBertError

    for option in ("json", "plot"):
        path = getattr(arguments, option, None)
        if path is not None and not path.absolute().parent.is_dir():
            raise EarlyBertError(f"--{option} {path}: {path.absolute().parent} is no folder; make it first")
    for option in _COUNTS:
        given = getattr(arguments, option, None)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise EarlyBertError(f"--{option} {number}: give a number from 1")


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _keep(figures: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def _start(arguments: argparse.Namespace) -> int:
    """Start the ranks; rank 0 prints."""
    from benchmarks.ranks import start

    processes = start([sys.executable, *sys.argv], ranks=arguments.ranks, EARLYBERT_BENCH="rank")
    return max(abs(process.wait()) for process in processes)


def _rank(arguments: argparse.Namespace) -> int:
    from earlybert.config import settled_imports

    with settled_imports():
        from benchmarks.engines import about

        from earlybert import dist
        from earlybert.lifecycle import end_ranks, start_ranks

        command = importlib.import_module(f"benchmarks.{arguments.command}")
    start_ranks()
    folder = dist.from_rank_0(Path(tempfile.mkdtemp()) if dist.rank() == 0 else None)
    assert folder is not None
    figures = {**about(arguments), **command.measure(arguments, folder)}
    if dist.rank() == 0:
        command.tell(figures)
        _keep(figures, arguments.json)
        shutil.rmtree(folder, ignore_errors=True)
    end_ranks()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from earlybert.config import run_command

    run_command(main)
