"""What a fine-tuning folder holds already, and whether it is of the settings of now.

A folder has a recipe a task, so a task with a recipe of its own can be added to what is done. The surprise:
rows that changed are refused beside a finished seed only; a run in progress starts anew with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from earlybert import checkpoint, dist
from earlybert.config import EarlyBertError, read_json
from earlybert.recipes import Finetuning, Recipe
from earlybert.tasks import Task


def identity(settings: Finetuning, recipe: Recipe, *, seed: int) -> str:
    """sha256 of what decides the course of one run, but for its model and rows."""
    told = f"{settings.fingerprint} {sorted(recipe.deciding.items())} {seed}"
    return hashlib.sha256(told.encode()).hexdigest()


def check_recipe(settings: Finetuning, recipe: Recipe, folders: Mapping[int, Path]) -> None:
    """Raise EarlyBertError, on every rank, where runs of a task in {seed: its folder} have another recipe.
    Collective."""
    problem = None
    if dist.rank() == 0:
        for seed, folder in folders.items():
            problem = problem or (
                other_recipe(folder, recipe)
                if (folder / "result.json").exists()
                else _begun_otherwise(folder, recipe, identity(settings, recipe, seed=seed))
            )
    problem = dist.from_rank_0(problem)
    if problem is not None:
        raise EarlyBertError(problem)


def other_recipe(folder: Path, recipe: Recipe) -> str | None:
    """What is wrong where a finished run was tuned by another recipe: a mean over both says nothing."""
    before, now = read_json(folder / "result.json")["recipe"], recipe.deciding
    other = ", ".join(
        f"{name} = {before.get(name)}, not {now[name]}" for name in now if before.get(name) != now[name]
    )
    return f"{folder} was tuned with {other}; {_remedy('that')}" if other else None


def check_rows(folder: Path, task: Task, *, data: str) -> None:
    """Raise EarlyBertError where a finished run was tuned on other rows than those of `task`, from `data`."""
    if read_json(folder / "result.json").get("rows", task.train.sha256) != task.train.sha256:
        raise EarlyBertError(
            f"{folder} was tuned on other rows than those of {data} now; remove the folder to tune it "
            "again, or choose another name="
        )


def _begun_otherwise(folder: Path, recipe: Recipe, own: str) -> str | None:
    """What is wrong where a run in progress has another recipe."""
    for name in checkpoint.names(folder / "checkpoints"):
        try:
            manifest = checkpoint.read_manifest(folder / "checkpoints" / name)
        except EarlyBertError:
            continue  # it is named where the run looks for the one to go on from
        if manifest.experiment != own:
            return f"{folder} was begun with another recipe of {recipe.task}; {_remedy('the former')}"
    return None


def _remedy(which: str) -> str:
    return f"give it {which} again, remove the folder to tune it anew, or choose another folder"
