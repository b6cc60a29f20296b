"""Fine-tuning: each task and each seed a run of its own, on the engine that pretrains, with or without a
ticket. What is done stays, and the same command does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from earlybert import dist, mechanics, pretrained, run, stock, tasks, tuned
from earlybert.config import read_json
from earlybert.origin import Origin
from earlybert.recipes import Finetuning
from earlybert.tuning import Tuning
from earlybert.watch import Watch, explained


def tune(settings: Finetuning, mechanics_values: dict[str, Any], *, where: str) -> bool:
    """Run all tasks and seeds of an experiment that are not done; False where a signal stopped it.
    Collective.

    Raises EarlyBertError for whatever the user can mend, as early as it can be known.
    """
    run.check_alike(settings, mechanics_values)
    precision = mechanics.precision_of(mechanics_values)
    run.check_cores(precision=precision)
    origin = Origin.read(settings.model)
    if settings.keep_models == "dense":
        stock.refuse_unlike_stock(origin.config)
    for recipe in map(settings.of, settings.tasks):
        origin.check(recipe)
        tasks.check(recipe, data=settings.data)
    run.check_same({"the model": origin.fingerprint})
    claim = run.claim(settings, corpus=origin.fingerprint, where=where, origin=("model", settings.model))
    watch = Watch(claim.folder, seconds=settings.hang_seconds)
    try:
        with explained(watch), run.Signals() as signals:
            tuned.check(settings, precision=precision)
            if dist.rank() == 0:
                run.describe(settings, mechanics_values, corpus=origin.fingerprint)
            for name in settings.tasks:
                recipe = settings.of(name)
                folders = {seed: claim.folder / name / f"seed-{seed}" for seed in settings.seeds}
                done = dist.from_rank_0({seed for seed, f in folders.items() if (f / "result.json").exists()})
                _tell_done(name, {seed: folders[seed] for seed in sorted(done)}, form=settings.keep_models)
                if done == folders.keys():
                    continue
                watch.mark(f"reading {name}")
                task = tasks.load(recipe, data=settings.data, tokenizer=origin.tokenizer)
                run.check_same(
                    {f"the rows of {name}": task.train.sha256, f"those to judge {name}": task.judged}
                )
                tuned.check_rows(claim.folder / name, task, data=settings.data)
                for seed, folder in folders.items():
                    if seed in done:
                        continue
                    tuning = Tuning(
                        settings, mechanics_values, recipe=recipe, task=task, origin=origin, seed=seed,
                        folder=folder, watch=watch, signals=signals, claim=claim,
                    )  # fmt: skip
                    try:
                        if not tuning.run():
                            return False
                    finally:
                        tuning.close()
    finally:
        claim.release()
    return True


def _tell_done(task: str, folders: Mapping[int, Path], *, form: str) -> None:
    """Say which seeds are not tuned again, on rank 0; `form`: in which their models are asked for."""
    for seed, folder in folders.items() if dist.rank() == 0 else ():
        lost = form not in ("none", pretrained.form_of(folder / "model"))
        again = f"; its model was not kept in the {form} form: remove {folder} to tune it again"
        score = read_json(folder / "result.json").get("score", math.nan)
        print(f"{task}, seed {seed}: done before, {score:.2f}{again if lost else ''}", flush=True)
