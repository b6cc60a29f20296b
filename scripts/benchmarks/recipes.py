"""Recipes at equal wall-clock: each schedule is stretched until its training takes the same time, then all
are trained to their ends and evaluated on the same held-out rows, masked alike.

A short trial of every recipe tells how long a step of each of its phases takes; trials and runs stay in the
folder, and what is done there is not done again. Time is that of training, as in `saving`. Tickets are off:
this compares recipes for a dense model.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.asked import same
from benchmarks.ranks import Slice
from benchmarks.saving import curve, finished, plot
from earlybert.config import EarlyBertError, override, read_json_lines, read_toml

_TRIAL = 20
"""Steps of each phase in a trial; the first half warms up."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from earlybert.experiment import load

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {
        "seconds": arguments.seconds, "machine": machine.device(), "ranks": arguments.ranks,
        "versions": machine.versions("torch", "deepspeed", "transformers"), "recipes": {}, "curves": {},
    }  # fmt: skip
    seeds = range(1, arguments.seeds + 1)
    stems = [path.stem for path in arguments.experiment]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise EarlyBertError(f"two experiments are called {twice[0]}; give their files different names")
    for path in arguments.experiment:
        load(path, arguments.override)  # what is wrong with it is told before it is on record
    for path in arguments.experiment:
        folder = out / f"asked-{path.stem}"
        folder.mkdir(exist_ok=True)
        asked = {"seconds": arguments.seconds, "samples": arguments.samples, "ranks": arguments.ranks,
                 "evaluations": arguments.evaluations}  # fmt: skip
        same({"experiment": override(read_toml(path), arguments.override), **asked}, folder)
    with Slice(arguments.minutes) as time_given:
        for seed, path in itertools.product(seeds, arguments.experiment):
            words = _words(path, arguments, time_given)
            if words is None:
                break
            name = f"{path.stem}-{seed}"
            finished(name, [*words, f"seed={seed}"], out=out, ranks=arguments.ranks, time_given=time_given)
    for path in arguments.experiment:
        names = [f"{path.stem}-{seed}" for seed in seeds]
        curves = [curve(out / name) for name in names if (out / name / "done").exists()]
        if not curves:
            continue
        told["recipes"][path.stem] = {
            "steps": curves[0].steps[-1], "seconds": [c.seconds[-1] for c in curves],
            "final_loss": [c.final for c in curves], "tokens": _tokens(out / names[0]),
        }  # fmt: skip
        told["curves"][path.stem] = [c.told() for c in curves]
    return told


def tell(told: dict[str, Any], path: Path | None = None) -> None:
    """Print the table, and draw the curves into `path`."""
    print(f"{told['seconds']:,.0f} s of training each; {told['ranks']} ranks; {told['machine']}\n")
    print("| recipe | steps | tokens | training time s | held-out loss at its end (each seed) |")
    print("|---|---|---|---|---|")
    for name, row in told["recipes"].items():
        losses = ", ".join(f"{loss:.4f}" for loss in row["final_loss"])
        seconds = statistics.median(row["seconds"])
        print(f"| {name} | {row['steps']:,} | {row['tokens']:,} | {seconds:,.0f} | {losses} |")
    if path is not None and told["curves"]:
        plot(told, path)


def stretched(steps: list[int], step_seconds: list[float], *, seconds: float) -> list[int]:
    """Steps of each phase, in their old proportion, that take `seconds` in all; at least one each.

    >>> stretched([100, 300], [0.1, 0.2], seconds=140)
    [200, 600]
    """
    factor = seconds / sum(n * each for n, each in zip(steps, step_seconds, strict=True))
    return [max(1, round(factor * n)) for n in steps]


def _words(path: Path, arguments: argparse.Namespace, time_given: Slice) -> list[str] | None:
    """The experiment with its stretched schedule; None where the time is up before its trial has ended."""
    from earlybert.experiment import load

    shared = [
        "ticket.enabled=false", "evaluate.objective=mlm", "evaluate.mask_probability=0.15",
        f"evaluate.samples={arguments.samples}", f"runs={arguments.out}", *arguments.override,
    ]  # fmt: skip
    phases = load(path, shared)[0].phases
    trial = [f"phases.{number}.steps={_TRIAL}" for number in range(len(phases))]
    rare = [f"evaluate.every={10**6}", f"log_every={_TRIAL // 2}"]
    name = f"trial-{path.stem}"
    words = [str(path), *shared, *trial, *rare]
    if not finished(name, words, out=arguments.out, ranks=arguments.ranks, time_given=time_given):
        return None
    lines = read_json_lines(arguments.out / name / "metrics.jsonl")
    took: dict[int, float] = {}  # the later line of a phase is the warm one
    for line in lines:
        if "step_seconds" in line:
            took[line["phase"]] = line["step_seconds"]
    steps = stretched(
        [phase.steps for phase in phases], [took[n] for n in range(len(phases))], seconds=arguments.seconds
    )
    every = max(1, sum(steps) // arguments.evaluations)
    schedule = [f"phases.{number}.steps={count}" for number, count in enumerate(steps)]
    return [str(path), *shared, *schedule, f"evaluate.every={every}"]


def _tokens(run: Path) -> int:
    """Trained on, padding among them."""
    from earlybert.experiment import load

    experiment, _ = load(run / "experiment.toml", [])
    return sum(phase.steps * phase.batch * phase.sequence_length for phase in experiment.phases)
