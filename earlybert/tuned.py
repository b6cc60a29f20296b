"""What a fine-tuning folder holds already, and whether it is of the settings of now.

A folder has a recipe a task, so a task with a recipe of its own can be added to what is done. The surprise:
rows that changed are refused beside a finished seed only; a run in progress starts anew with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from earlybert import checkpoint, dist
from earlybert.config import EarlyBertError, read_json, write_atomically
from earlybert.recipes import Finetuning, Recipe, defaults
from earlybert.tasks import Task

_RECIPE = "recipe.json"
"""In the folder of a seed, from its start on."""


def begin(folder: Path, recipe: Recipe) -> None:
    """Note by which recipe a seed is tuned."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _RECIPE, json.dumps(recipe.deciding, indent=1) + "\n")


def check(settings: Finetuning, *, precision: str) -> None:
    """Raise EarlyBertError, on every rank, where seeds of the experiment's tasks, asked for or not, were
    tuned by another recipe or in another precision. Collective."""

    def check_all() -> None:
        for recipe in map(settings.of, settings.tasks):
            check_task(settings.folder / recipe.task, recipe, precision=precision)

    dist.check_on_rank_0(check_all)


def check_task(folder: Path, recipe: Recipe, *, precision: str) -> None:
    """Raise EarlyBertError where a seed in the folder of a task was tuned by another recipe, or is being, or
    was tuned in another precision: a mean over both says nothing."""
    now = recipe.deciding
    for seed in sorted(folder.glob("seed-*")):
        done = seed / "result.json"
        if done.exists() and (other := read_json(done).get("precision", precision)) != precision:
            raise EarlyBertError(
                f"{seed} is tuned in {other}, not {precision}; give it a DeepSpeed JSON of that again, "
                "remove the folder to tune it anew, or choose another folder for the runs"
            )
        if (told := _recipe(seed)) is None:
            continue
        # A setting that a run from before does not name came later, with that run's behaviour as default.
        before = {**defaults(recipe.task), **told}
        if other := [name for name in now if before[name] != now[name]]:
            values = ", ".join(f"{name} = {before[name]}, not {now[name]}" for name in other)
            raise EarlyBertError(
                f"{seed} is tuned with {values}; give it that again, remove the folder to tune it anew, or "
                "choose another folder for the runs"
            )


def check_rows(folder: Path, task: Task, *, data: str) -> None:
    """Raise EarlyBertError, on every rank, where a finished seed in the `folder` of a task, asked for or not,
    was tuned or judged on other rows than those of `task`, from `data`. Collective."""
    rows = (("rows", task.train.sha256, "tuned on"), ("judged", task.judged, "judged by"))

    def check_all() -> None:
        for path in sorted(folder.glob("seed-*/result.json")):
            told = read_json(path)
            for name, now, done in rows:
                if told.get(name, now) != now:
                    raise EarlyBertError(
                        f"{path.parent} was {done} other rows than those of {data} now; remove the folder to "
                        "tune it again, or choose another name="
                    )

    dist.check_on_rank_0(check_all)


def _recipe(seed: Path) -> dict[str, Any] | None:
    """Of what is done in a seed's folder; None where there is nothing that another one could spoil."""
    if (seed / "result.json").exists():
        return read_json(seed / "result.json").get("recipe", {})
    begun = checkpoint.names(seed / "checkpoints") and (seed / _RECIPE).exists()
    return read_json(seed / _RECIPE) if begun else None
