"""Fine-tuning runs side by side, in the paper's layout: a run a row, a task a column, mean and spread of the
seeds.

Times are those of training, the search among them; a run's share is taken over the tasks and seeds that it
has in common with the first one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlybert import glue
from earlybert.config import EarlyBertError
from earlybert.recipes import SQUADS

_ORDER = (*glue.TASKS, *SQUADS)


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

    def seconds(self, keys: Sequence[tuple[str, int]]) -> float:
        """Training time of some tasks and seeds."""
        return sum(sum(self.results[key]["seconds"].values()) for key in keys)

    def share(self, first: Run) -> float | None:
        """Training time over that of another run; None where they have nothing in common."""
        common = [key for key in self.results if key in first.results]
        return self.seconds(common) / first.seconds(common) if common else None


def collect(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; raises EarlyBertError for one without a result."""
    runs = []
    for folder in folders:
        found = {}
        for path in sorted(folder.glob("**/seed-*/result.json")):
            told = json.loads(path.read_text(encoding="utf-8"))
            found[told["task"], told["seed"]] = told
        if not found:
            raise EarlyBertError(f"{folder}: no task is done there; give run folders of scripts/finetune.py")
        runs.append(Run(folder.resolve().name, found))
    return runs


def table(runs: Sequence[Run]) -> str:
    """Markdown: mean score of each task with the standard deviation over seeds, their mean, and the time."""
    tasks = sorted({task for run in runs for task in run.tasks}, key=_ORDER.index)
    lines = [
        f"| run | {' | '.join(map(_title, tasks))} | mean | parameters | training time | of the first's |",
        f"|---|{'---|' * len(tasks)}---|---|---|---|",
    ]
    for run in runs:
        cells = [_cell(run.scores(task)) for task in tasks]
        means = [statistics.fmean(run.scores(task)) for task in tasks if run.scores(task)]
        mean = f"{statistics.fmean(means):.2f}" if len(means) == len(tasks) else ""
        parameters = max(found["parameters"] for found in run.results.values())
        seconds, share = run.seconds(list(run.results)), run.share(runs[0])
        lines.append(
            f"| {run.name} | {' | '.join(cells)} | {mean} | {parameters:,} | {seconds:,.0f} s | "
            f"{'' if share is None else f'{share:.2f}'} |"
        )
    return "\n".join(lines)


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
    axes.set_xticks(range(len(tasks)), [_title(task) for task in tasks])
    axes.set_ylabel("score, %")
    axes.legend(fontsize="small")
    figure.savefig(to, dpi=120)


def _cell(scores: Sequence[float]) -> str:
    if not scores:
        return ""
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.2f}{spread}"


def _title(task: str) -> str:
    squads = {"squad": "SQuAD", "squad2": "SQuAD 2.0"}
    return squads.get(task) or glue.TASKS[task].folder
