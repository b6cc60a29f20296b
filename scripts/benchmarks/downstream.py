"""The same stock BERT fine-tuned twice: by `scripts/finetune.py` and by Hugging Face's Trainer.

Both see the same rows in the same order, padded alike, under the same learning rates, weight decay and
clipping, and their heads begin with the same values. Dropout is drawn by each in its own way: without it
(--dropout 0) the losses of every step are held against each other, with it only the scores. One process and
one device each, in turn; what is done in the folder stays, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.asked import same
from benchmarks.ranks import start, why
from earlybert import glue, recipes
from earlybert.config import EarlyBertError, override, read_json, to_toml, write_atomically

_SCRIPTS = Path(__file__).resolve().parent.parent
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
Figures = dict[str, Any]


def measure(arguments: argparse.Namespace) -> Figures:
    if machine.version("accelerate") is None:
        raise EarlyBertError(
            "accelerate is not installed, which Trainer needs: pip install --constraint constraints.txt "
            "accelerate"
        )
    out: Path = arguments.out
    names = arguments.task or there(arguments.data)
    experiment = _experiment(arguments, names)
    dropout = [read_json(out / "model" / "config.json")[name] for name in _DROPOUTS]
    tasks: dict[str, Figures] = {}
    for name in names:
        words = [f'tasks=["{name}"]']
        _finished([_SCRIPTS / "finetune.py", "glue", experiment, *words], out / f"ours-{name}.txt")
        own = _SCRIPTS / "benchmarks" / "tuned_by_trainer.py"
        _finished([own, experiment, name, out / "trainer" / name], out / f"trainer-{name}.txt")
        tasks[name] = _compared(out, name, seeds=range(1, arguments.seeds + 1), exact=not any(dropout))
        print(f"measured: {name}", file=sys.stderr, flush=True)
    return {
        "machine": machine.device(),
        "versions": machine.versions("torch", "deepspeed", "transformers", "accelerate"),
        "model": str(arguments.model), "precision": arguments.precision, "seeds": arguments.seeds,
        "dropout": dropout, "tasks": tasks,
    }  # fmt: skip


def tell(figures: Figures) -> None:
    """Print the table."""
    exact = not any(figures["dropout"])
    print(
        f"{figures['model']}, {figures['precision']}, dropout {figures['dropout'][0]:g} and "
        f"{figures['dropout'][1]:g} of attention; {figures['seeds']} seeds; {figures['machine']}\n"
    )
    last = "largest difference of a step's loss" if exact else "means within the spread"
    print(f"| task | ours | Trainer | seconds, ours | seconds, Trainer | {last} |\n|---|---|---|---|---|---|")
    for name, row in figures["tasks"].items():
        ours, theirs = row["ours"], row["trainer"]
        told = f"{row['loss_difference']:.1e}" if exact else "yes" if row["within_spread"] else "no"
        seconds = [f"{statistics.fmean(side['seconds']):,.1f}" for side in (ours, theirs)]
        print(
            f"| {glue.TASKS[name].folder} | {_spread(ours['scores'])} | {_spread(theirs['scores'])} | "
            f"{' | '.join(seconds)} | {told} |"
        )


def _spread(scores: list[float]) -> str:
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.2f}{spread}"


def there(data: Path) -> list[str]:
    """Tasks that have a folder."""
    names = [
        name for name, task in glue.TASKS.items() if (data / task.folder).is_dir() or (data / name).is_dir()
    ]
    if not names:
        raise EarlyBertError(f"{data}: no task of GLUE is there; give a folder with CoLA/train.tsv and so on")
    return names


def _experiment(arguments: argparse.Namespace, names: list[str]) -> Path:
    """Write the model, the DeepSpeed JSON and the fine-tuning experiment into the folder; its file."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    asked: Figures = {
        "model": str(arguments.model.resolve()), "data": str(arguments.data.resolve()),
        "dropout": arguments.dropout, "precision": arguments.precision, "set": arguments.override,
    }  # fmt: skip
    config = _stock_config(arguments.model)
    same(asked, out)
    _model(arguments.model, out / "model", config, dropout=arguments.dropout)
    values: Figures = {"zero_optimization": {"stage": 0}}
    if arguments.precision != "fp32":
        values[arguments.precision] = {"enabled": True}
    write_atomically(out / "deepspeed.json", json.dumps(values) + "\n")
    told = {
        "name": "ours", "runs": str(out), "model": str(out / "model"), "data": str(arguments.data),
        "deepspeed": str(out / "deepspeed.json"), "tasks": names, "log_every": 1,
        "seeds": list(range(1, arguments.seeds + 1)),
    }  # fmt: skip
    path = out / "experiment.toml"
    write_atomically(path, to_toml(override(told, arguments.override)))
    settings, _ = recipes.load(path, kind="glue")
    if settings.ticket.enabled or settings.optimizer.name != "adamw":
        raise EarlyBertError("Trainer knows neither tickets nor LAMB: leave ticket and optimizer.name out")
    return path


def _stock_config(source: Path) -> Figures:
    """The configuration of a stock BERT's folder; raises EarlyBertError for another one."""
    if not (source / "config.json").is_file():
        raise EarlyBertError(
            f"{source}: no config.json is there; give the folder of a stock BERT, such as what "
            "scripts/export.py --form dense writes"
        )
    config = read_json(source / "config.json")
    if config.get("model_type") != "bert":
        raise EarlyBertError(
            f"{source} is a {config.get('model_type')}, and Trainer's side is stock BERT; give a BERT's "
            "folder, such as what scripts/export.py --form dense writes"
        )
    return config


def _model(source: Path, to: Path, config: Figures, *, dropout: float | None) -> None:
    """A folder with the files of a stock BERT, and dropout as asked for."""
    if dropout is not None:
        config |= dict.fromkeys(_DROPOUTS, dropout)
    to.mkdir(exist_ok=True)
    for path in source.iterdir():
        link = to / path.name
        if path.is_file() and path.name != "config.json" and not link.exists():
            os.symlink(path.resolve(), link)
    # Defaults of transformers, which a config need not spell out.
    config = {**dict.fromkeys(_DROPOUTS, 0.1), **config}
    write_atomically(to / "config.json", json.dumps(config, indent=1) + "\n")


def _finished(command: list[Any], path: Path) -> None:
    """Run a program to its end; EarlyBertError with its own words where it says what to mend."""
    with open(path, "a+", encoding="utf-8") as log:
        (process,) = start([sys.executable, *map(str, command)], ranks=1, log=log, **_one_device())
        code = process.wait()
    if code:
        raise EarlyBertError(why(code, path))


def _one_device() -> dict[str, str]:
    """Of several GPUs Trainer would take all."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {"CUDA_VISIBLE_DEVICES": first, "TOKENIZERS_PARALLELISM": "false"}


def _compared(out: Path, name: str, *, seeds: range, exact: bool) -> Figures:
    """Both sides' figures; with `exact`, where nothing is random, the largest difference of a step's loss."""
    ours = [read_json(out / "ours" / name / f"seed-{seed}" / "result.json") for seed in seeds]
    theirs = [read_json(out / "trainer" / name / f"seed-{seed}.json") for seed in seeds]
    differences = []
    for seed, told in zip(seeds, theirs, strict=True):
        path = out / "ours" / name / f"seed-{seed}" / "metrics.jsonl"
        losses = [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]
        differences.append(max(abs(a - b) for a, b in zip(losses, told["losses"], strict=True)))
    scores = [[told["score"] for told in side] for side in (ours, theirs)]
    spread = max(statistics.stdev(side) if len(side) > 1 else 0.0 for side in scores)
    return {
        "ours": {"scores": scores[0], "seconds": [sum(told["seconds"].values()) for told in ours]},
        "trainer": {"scores": scores[1], "seconds": [told["seconds"] for told in theirs]},
        "loss_difference": max(differences) if exact else None, "spread": spread,
        "within_spread": abs(statistics.fmean(scores[0]) - statistics.fmean(scores[1])) <= spread,
    }  # fmt: skip
