"""Fine-tuning runs side by side, in the paper's layout: a run a row, a task a column, mean and spread of the
seeds.

Times are those of training, the search among them; a run's share is taken over the tasks and seeds that it
has in common with the first one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlybert import glue
from earlybert.config import EarlyBertError, read_json
from earlybert.recipes import SQUADS, deciding, defaults

_ORDER = (*glue.TASKS, *SQUADS)
_ALIKE = {
    "rows": "training rows", "judged": "rows to judge by", "origin": "model", "precision": "precision",
    "recipe": "recipe",
}  # fmt: skip
"""{what seeds of a task must have in common for a mean over them: in words}."""
_MACHINE = ("ranks", "precision", "device")
"""What times must have in common to be compared."""
_PLACED = {"dev_matched": "-m", "dev_mismatched": "-mm"}
"""Splits of a task that has several, behind its title."""


@dataclass(frozen=True)
class Run:
    """What is done of a fine-tuning run."""

    name: str
    results: dict[tuple[str, int], dict[str, Any]]
    """{(task, seed): its result.json}."""

    @property
    def tasks(self) -> list[str]:
        return sorted({task for task, _ in self.results}, key=_ORDER.index)

    def scores(self, task: str) -> list[float]:
        """Of each seed, in percent."""
        return [found["score"] for (own, _), found in sorted(self.results.items()) if own == task]

    def metrics(self, task: str) -> dict[tuple[str, str], list[float]]:
        """{(split, metric): of each seed, in percent}, without the mean over them."""
        told: dict[tuple[str, str], list[float]] = {}
        for (own, _), found in sorted(self.results.items()):
            for column, value in measured(found).items() if own == task else ():
                told.setdefault(column, []).append(value)
        return told

    def seconds(self, keys: Sequence[tuple[str, int]]) -> float:
        """Training time of some tasks and seeds."""
        return sum(sum(self.results[key]["seconds"].values()) for key in keys)

    def share(self, first: Run) -> float | None:
        """Training time over that of another run; None where they have nothing in common, or were not
        trained by as many processes on the same device in the same precision."""
        common = [key for key in self.results if key in first.results]
        for key in common:
            own, other = self.results[key], first.results[key]
            if any(own.get(name) != other.get(name) for name in _MACHINE):
                return None
        return self.seconds(common) / first.seconds(common) if common else None


def measured(result: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """{(split, metric): percent} of a result: what is a metric, neither their mean nor a threshold."""
    return {
        (split, name): value
        for split, found in result.get("scores", {}).items()
        for name, value in found.items()
        if name != "score" and "threshold" not in name
    }


def collect(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; raises EarlyBertError for one without a result, for one that holds several runs, and
    where seeds of a task are not alike."""
    runs = []
    for folder in folders:
        found: dict[tuple[str, int], dict[str, Any]] = {}
        places: dict[tuple[str, int], Path] = {}
        for path in sorted(folder.glob("**/seed-*/result.json")):
            told = _read(path)
            key = told["task"], told["seed"]
            if key in found:
                raise EarlyBertError(
                    f"{folder} holds several runs: {places[key]} and {path.parent} are the same task and "
                    "seed; give each run's own folder"
                )
            found[key], places[key] = told, path.parent
        if not found:
            raise EarlyBertError(f"{folder}: no task is done there; give run folders of scripts/finetune.py")
        _check_alike(found, places)
        runs.append(Run(folder.resolve().name, found))
    return runs


def _read(path: Path) -> dict[str, Any]:
    told = read_json(path)
    if told.get("task") not in _ORDER or not {"seed", "score", "seconds", "parameters"} <= told.keys():
        raise EarlyBertError(
            f"{path} is no result of scripts/finetune.py; remove its folder and tune it again"
        )
    return told


def _check_alike(found: dict[tuple[str, int], dict[str, Any]], places: dict[tuple[str, int], Path]) -> None:
    """Raise EarlyBertError where two seeds of a task say of themselves that they are of different things."""
    first: dict[tuple[str, str], tuple[str, Path]] = {}
    for (task, seed), told in found.items():
        for name, words in _ALIKE.items():
            if told.get(name) is None:
                continue  # an older program said less
            # A setting that an older program did not know was at what is its default now.
            own = deciding(task, {**defaults(task), **told[name]}) if name == "recipe" else told[name]
            value = json.dumps(own, sort_keys=True)
            before, place = first.setdefault((task, name), (value, places[task, seed]))
            if before != value:
                raise EarlyBertError(
                    f"{place} and {places[task, seed]} do not have the same {words}: a mean over both says "
                    "nothing; remove one and tune it again"
                )


def table(runs: Sequence[Run], *, each_metric: bool = False) -> str:
    """Markdown: mean score of each task with the standard deviation over seeds, their mean, and the time.

    `each_metric`: a column for each metric of each task, where otherwise a task has its score, their mean. A
    cell of fewer seeds than the fullest one of its column says so.
    """
    tasks = sorted({task for run in runs for task in run.tasks}, key=_ORDER.index)
    columns = [column for task in tasks for column in (_columns(runs, task) if each_metric else [(task,)])]
    lines = [
        f"| run | {' | '.join(_heading(*column) for column in columns)} | mean | parameters | training time "
        "| of the first's |",
        f"|---|{'---|' * len(columns)}---|---|---|---|",
    ]
    numbers = [
        [run.metrics(task).get((split[0], split[1]), []) if split else run.scores(task) for run in runs]
        for task, *split in columns
    ]
    for place, run in enumerate(runs):
        cells = [_cell(column[place], of=max(map(len, column))) for column in numbers]
        means = [statistics.fmean(run.scores(task)) for task in tasks if run.scores(task)]
        mean = f"{statistics.fmean(means):.2f}" if len(means) == len(tasks) else ""
        parameters = max(found["parameters"] for found in run.results.values())
        seconds, share = run.seconds(list(run.results)), run.share(runs[0])
        lines.append(
            f"| {run.name} | {' | '.join(cells)} | {mean} | {parameters:,} | {seconds:,.0f} s | "
            f"{'' if share is None else f'{share:.2f}'} |"
        )
    return "\n".join(lines)


def _columns(runs: Sequence[Run], task: str) -> list[tuple[str, ...]]:
    """(task, split, metric) of all that the runs have of a task, in their order."""
    found = {column: None for run in runs for column in run.metrics(task)}
    return [(task, *column) for column in found]


def _heading(task: str, split: str = "", metric: str = "") -> str:
    return f"{title(task)}{_PLACED.get(split, '')} {metric}".strip()


def picture(runs: Sequence[Run], to: Path) -> None:
    """The table as bars: a group a task, a bar a run, the spread of its seeds as a line on it."""
    from matplotlib.figure import Figure

    tasks = sorted({task for run in runs for task in run.tasks}, key=_ORDER.index)
    figure = Figure(figsize=(max(4.0, 1.1 * len(tasks) + 1.5), 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        own = [task for task in tasks if run.scores(task)]
        places = [tasks.index(task) + (number - (len(runs) - 1) / 2) * width for task in own]
        means = [statistics.fmean(run.scores(task)) for task in own]
        spreads = [statistics.stdev(s) if len(s := run.scores(task)) > 1 else 0.0 for task in own]
        share = run.share(runs[0])
        label = run.name if share is None else f"{run.name} ({share:.2f} of the time)"
        axes.bar(places, means, width, yerr=spreads, capsize=2, label=label)
    axes.set_xticks(range(len(tasks)), [title(task) for task in tasks])
    axes.set_ylabel("score, %")
    axes.legend(fontsize="small")
    try:
        figure.savefig(to, dpi=120)
    except (OSError, ValueError) as error:
        raise EarlyBertError(f"{to}: the picture cannot be written ({error})") from error


def _cell(scores: Sequence[float], *, of: int) -> str:
    if not scores:
        return ""
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    fewer = f" ({len(scores)} of {of} seeds)" if len(scores) < of else ""
    return f"{statistics.fmean(scores):.2f}{spread}{fewer}"


def title(task: str) -> str:
    """A task's name in tables."""
    squads = {"squad": "SQuAD", "squad2": "SQuAD 2.0"}
    return squads.get(task) or glue.TASKS[task].folder
