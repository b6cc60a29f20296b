"""The paper's claim, measured: how soon do ticket and baselines reach the dense run's final held-out loss?

Whole runs of the real command, one folder each, in slices: what is done is not done again, and a run that
the time limit stops goes on from its checkpoint in the next slice. First every arm tries each learning rate
with the first seed, then its best one goes on with the other seeds.

- dense: no ticket;  ticket: the experiment as it stands
- random: the ticket's shape, any units, drawn at the ticket's step
- scratch: the ticket's shape from the first step on
- layerdrop: whole layers, as many as come nearest to the ticket's FLOPs
- and any variant of the ticket by its overrides (--also 'reset: ticket.moments=reset')

Time is that of training: steps (which wait for the loader), looks and draws; evaluations and checkpoints, the
same for all, are left out, and so is the time that torch.compile takes, which does not grow with a run and is
told beside it.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.asked import same
from benchmarks.ranks import Slice, start, why
from earlybert.config import EarlyBertError, override, read_json, read_json_lines, read_toml

_PRETRAIN = Path(__file__).resolve().parent.parent / "pretrain.py"
ARMS = ("dense", "ticket", "random", "scratch", "layerdrop")


@dataclass(frozen=True)
class Run:
    """One training run of the comparison."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.rate:g}-{self.seed}"


@dataclass(frozen=True)
class Curve:
    """Held-out loss over training time."""

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    compiling: float = 0.0
    """Seconds of torch.compile, which are not among the others."""

    @property
    def final(self) -> float:
        return self.losses[-1]

    def told(self) -> dict[str, Any]:
        """JSON types, times to a tenth of a second."""
        seconds = [round(when, 1) for when in self.seconds]
        return {"steps": self.steps, "seconds": seconds, "losses": self.losses}

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """(seconds, steps) until the held-out loss is first at most `loss`, on a straight line between two
        evaluations; None where it never is."""
        for place, here in enumerate(self.losses):
            if here <= loss:
                if place == 0:
                    return self.seconds[0], self.steps[0]
                share = (self.losses[place - 1] - loss) / (self.losses[place - 1] - here)
                axes = self.seconds, self.steps
                seconds, steps = (x[place - 1] + share * (x[place] - x[place - 1]) for x in axes)
                return seconds, steps
        return None

    def at(self, seconds: float) -> float:
        """Held-out loss after so much training time (the last one, for a run that is shorter)."""
        before = [loss for when, loss in zip(self.seconds, self.losses, strict=True) if when <= seconds]
        return before[-1]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    arguments.variants = dict(_variant(text) for text in arguments.also or [])
    names = (*ARMS, *arguments.variants)
    for arm in arguments.arm or []:
        if arm not in names:
            raise EarlyBertError(f"--arm {arm}: choose among {', '.join(names)}")
    arguments.arm = [arm for arm in ARMS if arguments.arm is None or arm in arguments.arm]
    arguments.arm += arguments.variants
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(1, arguments.seeds + 1)
    grid = [Run(arm, rate, 1) for arm in arguments.arm for rate in arguments.rates]
    _check(grid, arguments)
    same(
        {
            "experiment": override(read_toml(arguments.experiment), arguments.override),
            "share": arguments.share, "ranks": arguments.ranks,
        },
        out,
    )  # fmt: skip
    with Slice(arguments.minutes) as time_given:
        if all(_finish(run, arguments, time_given) for run in grid):
            winners = [
                replace(best(arm, arguments), seed=seed) for seed in seeds[1:] for arm in arguments.arm
            ]
            for run in winners:
                if not _finish(run, arguments, time_given):
                    break
    return figures(arguments)


def _check(grid: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Raise EarlyBertError where a run would be refused after hours of others."""
    from earlybert.experiment import load

    load(arguments.experiment, arguments.override)
    refused: dict[str, EarlyBertError] = {}
    for run in grid:
        if run.arm in ("random", "scratch"):  # their words come from a ticket that is not drawn yet
            continue
        try:
            load(arguments.experiment, _words(run, arguments))
        except EarlyBertError as error:
            refused.setdefault(run.arm, error)
    for arm, why_not in refused.items():
        if arm in arguments.variants:
            raise EarlyBertError(f"{why_not}; leave its --also {arm!r} out, or change its words") from why_not
        rest = [f"--arm {other}" for other in arguments.arm if other in ARMS and other not in refused]
        if arm in ("dense", "ticket") or not rest:  # the others stand or fall with these
            raise why_not
        raise EarlyBertError(f"{why_not}; leave {arm} out: {' '.join(rest)}") from why_not


def best(arm: str, arguments: argparse.Namespace) -> Run:
    """The arm's run of seed 1 whose final held-out loss is least; raises EarlyBertError for none."""
    done = [run for rate in arguments.rates if _done(run := Run(arm, rate, 1), arguments.out)]
    if not done:
        raise EarlyBertError(
            f"{arguments.out} holds no run of {arm} at a rate of --rates that is done, which others follow; "
            f"add --arm {arm}"
        )
    return min(done, key=lambda run: curve(arguments.out / run.name).final)


def figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is known so far; JSON types."""
    out: Path = arguments.out
    told: dict[str, Any] = {
        "experiment": str(arguments.experiment), "overrides": arguments.override,
        "variants": {name: " ".join(words) for name, words in arguments.variants.items()},
        "machine": machine.device(), "versions": machine.versions("torch", "deepspeed", "transformers"),
        "ranks": arguments.ranks, "share": arguments.share, "grid": {}, "arms": {}, "curves": {},
    }  # fmt: skip
    for arm in arguments.arm:
        done = [run for rate in arguments.rates if _done(run := Run(arm, rate, 1), out)]
        told["grid"][arm] = {f"{run.rate:g}": curve(out / run.name).final for run in done}
    if any(len(told["grid"][arm]) < len(arguments.rates) for arm in arguments.arm):
        return told
    winners = {
        arm: [
            curve(out / run.name)
            for seed in range(1, arguments.seeds + 1)
            if _done(run := replace(best(arm, arguments), seed=seed), out)
        ]
        for arm in arguments.arm
    }
    for arm, curves in winners.items():
        told["curves"][arm] = [c.told() for c in curves]
        pairs = list(zip(winners.get("dense", []), curves, strict=False))
        reached = [(dense, own.reaches(dense.final)) for dense, own in pairs]
        shares = [None if at is None else at[0] / dense.seconds[-1] for dense, at in reached]
        steps = [None if at is None else at[1] / dense.steps[-1] for dense, at in reached]
        told["arms"][arm] = {
            "learning_rate": best(arm, arguments).rate,
            "final_loss": [c.final for c in curves],
            "seconds": [c.seconds[-1] for c in curves],
            "compile_seconds": [c.compiling for c in curves],
            "share_of_time_to_dense_loss": shares,
            "share_of_steps_to_dense_loss": steps,
            "loss_at_equal_time": [own.at(dense.seconds[-1]) for dense, own in pairs],
            "steps": [c.steps[-1] for c in curves],
        }
    return told


def tell(told: dict[str, Any], path: Path | None = None) -> None:
    """Print the tables, and draw the curves into `path`."""
    print(f"{told['experiment']}, {told['ranks']} ranks; {told['machine']}\n")
    rates = sorted({rate for row in told["grid"].values() for rate in row}, key=float)
    print("Final held-out loss, seed 1, by learning rate\n")
    print(f"| arm | {' | '.join(rates)} |\n|---|{'---|' * len(rates)}")
    for arm, row in told["grid"].items():
        print(f"| {arm} | {' | '.join(f'{row[r]:.4f}' if r in row else '' for r in rates)} |")
    if not told["arms"]:
        return
    print(
        "\n| arm | learning rate | steps | training time s | held-out loss at its end | time to the dense "
        "run's loss over the dense run's | of that: steps | a step's time | loss at the dense run's time |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for arm, row in told["arms"].items():
        times, paces = row["share_of_time_to_dense_loss"], row["share_of_steps_to_dense_loss"]
        shares, steps = ([s for s in told if s is not None] for told in (times, paces))
        a_step = [time / pace for time, pace in zip(shares, steps, strict=True)]
        missed = len(times) - len(shares)
        reached = _spread(shares, "{:.3f}") + (f", {missed} never" if missed else "")
        print(
            f"| {arm} | {row['learning_rate']:g} | {row['steps'][0]:,} "
            f"| {_spread(row['seconds'], '{:,.0f}')} | {_spread(row['final_loss'], '{:.4f}')} | {reached} | "
            f"{_spread(steps, '{:.3f}')} | {_spread(a_step, '{:.3f}')} | "
            f"{_spread(row['loss_at_equal_time'], '{:.4f}')} |"
        )
    if path is not None:
        plot(told, path)


def plot(told: dict[str, Any], path: Path) -> None:
    """Held-out loss over training time, and a step's time over the steps, a line an arm (the seed with the
    middle loss at its end)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    losses, steps = figure.subplots(1, 2, width_ratios=[3, 2])
    for arm, curves in told["curves"].items():
        middle = sorted(curves, key=lambda c: c["losses"][-1])[len(curves) // 2]
        losses.plot(middle["seconds"], middle["losses"], label=arm)
        passed = list(pairwise(zip(middle["seconds"], middle["steps"], strict=True)))
        paces = [(after[0] - before[0]) / (after[1] - before[1]) for before, after in passed]
        steps.stairs(paces, middle["steps"], baseline=None)
    early = max(
        c["losses"][min(1, len(c["losses"]) - 1)] for curves in told["curves"].values() for c in curves
    )
    losses.set(xlabel="training time, s", ylabel="held-out masked-LM loss", ylim=(None, early))
    steps.set(xlabel="step", ylabel="seconds a step", ylim=(0, None))
    for axes in (losses, steps):
        axes.grid(alpha=0.3)
    losses.legend()
    figure.savefig(path, dpi=120)


def curve(folder: Path) -> Curve:
    """A run's held-out losses over its training time, from its metrics."""
    steps, seconds, losses, total, compiling, last = [], [], [], 0.0, 0.0, 0
    for line in read_json_lines(folder / "metrics.jsonl"):
        compiled = line.get("compile_seconds", 0.0)
        compiling += compiled
        total += line.get("step_seconds", 0.0) * (line["step"] - last) - compiled
        last = line["step"]
        if "eval_loss" in line:
            steps.append(last)
            seconds.append(total)
            losses.append(line["eval_loss"])
    return Curve(tuple(steps), tuple(seconds), tuple(losses), compiling)


# --- one run -----------------------------------------------------------------------------------------------


def _done(run: Run, out: Path) -> bool:
    return (out / run.name / "done").exists()


def _finish(run: Run, arguments: argparse.Namespace, time_given: Slice) -> bool:
    """Take a run to its end; False where the time is up before."""
    if _done(run, arguments.out):  # then the files that its words come from may be gone
        return True
    words = [str(arguments.experiment), *_words(run, arguments)]
    return finished(run.name, words, out=arguments.out, ranks=arguments.ranks, time_given=time_given)


def finished(name: str, words: Sequence[str], *, out: Path, ranks: int, time_given: Slice) -> bool:
    """Take the run of `words` to its end in `out`/`name`; False where the time is up before.

    A run that has ended once is left alone, one that was stopped goes on. Raises EarlyBertError with its own
    words where it fails.
    """
    if (out / name / "done").exists():
        return True
    if time_given.over:
        return False
    began = time.monotonic()
    codes = _launch([*words, f"name={name}"], ranks=ranks, time_given=time_given, log=out / f"{name}.log")
    if set(codes) == {0}:
        (out / name / "done").touch()
        held = curve(out / name)
        print(
            f"{name}: {held.final:.4f} after {held.steps[-1]:,} steps, {held.seconds[-1]:,.0f} s "
            f"({time.monotonic() - began:,.0f} s with evaluations, saves and its start)",
            file=sys.stderr,
            flush=True,
        )
        return True
    if all(map(time_given.ended, codes)):
        return False
    code = 2 if 2 in codes else max(codes, key=abs)  # the rank that knows why says so with 2
    raise EarlyBertError(f"{name}: {why(code, out / f'{name}.log')}")


def _words(run: Run, arguments: argparse.Namespace) -> list[str]:
    """The overrides of one run."""
    from earlybert.experiment import load

    settings, _ = load(arguments.experiment, arguments.override)
    words = [f"runs={arguments.out}", f"seed={run.seed}", *arguments.override]
    words += [f"phases.{number}.learning_rate={run.rate:g}" for number in range(len(settings.phases))]
    if run.arm == "dense":
        return [*words, "ticket.enabled=false"]
    for number, phase in enumerate(settings.phases):
        words.append(f"phases.{number}.steps={round(arguments.share * phase.steps)}")
    if run.arm == "ticket" or run.arm in arguments.variants:
        return words + arguments.variants.get(run.arm, [])
    if run.arm == "layerdrop":
        layers = settings.model.layers
        gone = max(1, round(settings.ticket.neuron_ratio * layers))
        return [*words, "ticket.kind=layerdrop", f"ticket.layer_ratio={gone / layers}"]
    ticket = read_json(_drawn(run, arguments) / "ticket.json")
    heads, neurons = ([len(layer) for layer in ticket[family]] for family in ("heads", "neurons"))
    if run.arm == "scratch":
        shape = [f"model.heads_per_layer={heads}", f"model.neurons_per_layer={neurons}"]
        return [*words, "ticket.enabled=false", *shape]
    shape = [f"ticket.heads_per_layer={heads}", f"ticket.neurons_per_layer={neurons}"]
    at = [f"ticket.minimum_step={ticket['step']}", f"ticket.latest_step={ticket['step']}"]
    return [*words, "ticket.kind=random", *shape, *at]


def _drawn(run: Run, arguments: argparse.Namespace) -> Path:
    """The folder of the ticket whose shape this run gets: of its own rate, else of the ticket's best, which
    is the only one that later seeds have. Raises EarlyBertError as `best` does."""
    own = replace(run, arm="ticket")
    if not _done(own, arguments.out):
        own = replace(best("ticket", arguments), seed=run.seed)
    return arguments.out / own.name


def _variant(text: str) -> tuple[str, list[str]]:
    """(name, overrides) of `NAME: key=value ...`."""
    from earlybert.config import SettingsError

    name, colon, words = text.partition(":")
    if not colon or not words.split() or not name.strip() or name.strip() in ARMS:
        raise SettingsError(
            f"--also {text!r}: give NAME: key=value ..., the name not one of {', '.join(ARMS)}"
        )
    return name.strip(), words.split()


def _launch(words: Sequence[str], *, ranks: int, time_given: Slice, log: Path) -> list[int]:
    """Start the ranks, ask them to stop when the time is up, and return their exit codes."""
    with open(log, "a") as told:
        processes = start([sys.executable, str(_PRETRAIN), *words], ranks=ranks, log=told)
        asked = False
        while any(process.poll() is None for process in processes):
            if not asked and time_given.over:
                asked = True
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
    return [process.wait() for process in processes]


def _spread(values: Sequence[float], form: str) -> str:
    """Median, and the least and most of several."""
    if not values:
        return ""
    middle = form.format(statistics.median(values))
    return (
        middle if len(values) == 1 else f"{middle} ({form.format(min(values))} to {form.format(max(values))})"
    )
