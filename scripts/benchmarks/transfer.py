"""Pretrained models fine-tuned on the same tasks: scores with their spread over the seeds, and the time.

Each model, task and seed is a program of its own, scripts/finetune.py, as many at a time as --jobs says, in
slices: what is done in the folder stays, and a program that the time limit stops goes on from its checkpoint
in the next slice. The first seed of everything comes before the second. `scripts/finetune.py table` reads
the same folders.

Times are those of training in `result.json`; with several jobs at a time they share the device.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.asked import same
from benchmarks.downstream import there
from benchmarks.ranks import Slice, start, why
from earlybert import mechanics, recipes, scores, tuned
from earlybert.config import EarlyBertError, read_json
from earlybert.recipes import SQUADS

_SCRIPTS = Path(__file__).resolve().parent.parent
_KEPT = (
    "task", "seed", "score", "scores", "parameters", "seconds", "recipe", "ranks", "precision", "device",
)  # fmt: skip
"""Of a result.json."""


@dataclass(frozen=True)
class Job:
    """One fine-tuning: a row of the table, a task, a seed."""

    row: str
    words: tuple[str, ...]
    task: str
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / self.row / f"{self.task}-{self.seed}"

    @property
    def done(self) -> bool:
        return (self.folder / self.task / f"seed-{self.seed}" / "result.json").exists()

    @property
    def kind(self) -> str:
        return "squad" if self.task in SQUADS else "glue"

    @property
    def experiment(self) -> Path:
        return _SCRIPTS / "experiments" / "finetune" / f"{self.kind}.toml"

    def overrides(self) -> list[str]:
        """All that the command says beside the experiment, but for the data."""
        return [
            f"runs={self.folder.parent}", f"name={self.folder.name}", f'tasks=["{self.task}"]',
            f"seeds=[{self.seed}]", *self.words,
        ]  # fmt: skip

    def command(self, *, glue: Path | None, squad: Path | None) -> list[str]:
        data = {"glue": glue, "squad": squad}[self.kind]
        return [
            sys.executable, str(_SCRIPTS / "finetune.py"), self.kind, str(self.experiment), f"data={data}",
            *self.overrides(),
        ]  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    out: Path = arguments.out
    told_rows = [_row(text) for text in arguments.row]
    rows = dict(told_rows)
    if len(rows) < len(told_rows):
        names = [name for name, _ in told_rows]
        twice = next(name for name in names if names.count(name) > 1)
        raise EarlyBertError(f"--row {twice}: given twice; each row needs a name of its own")
    tasks = arguments.task or _there(arguments.glue, arguments.squad)
    if not tasks:
        raise EarlyBertError("no task to fine-tune on; give --glue DIR, --squad DIR or both")
    for kind, given in (("glue", arguments.glue), ("squad", arguments.squad)):
        if given is None and any((task in SQUADS) == (kind == "squad") for task in tasks):
            raise EarlyBertError(
                f"--task {' '.join(tasks)}: where the files are is not said; give --{kind} DIR"
            )
    jobs = [
        Job(name, (*words, *arguments.override), task, seed, out)
        for seed in range(1, arguments.seeds + 1)
        for task in tasks
        for name, words in rows.items()
    ]
    _check(jobs)
    for name, words in rows.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        told = [word for word in (*words, *arguments.override) if not word.startswith("recipe")]
        same({"settings": told}, out / name)
    with Slice(arguments.minutes) as time_given:
        _work(jobs, arguments, time_given)
    return figures(arguments, list(rows))


def _check(jobs: Sequence[Job]) -> None:
    """Raise EarlyBertError for wrong settings, and where seeds of the rows' tasks, asked for or not since the
    table has them all, were tuned by another recipe than that of now."""
    for job in {(job.row, job.task): job for job in jobs}.values():
        settings, values = recipes.load(job.experiment, job.overrides(), kind=job.kind)
        precision = mechanics.precision_of(values)
        for folder in sorted(job.folder.parent.glob(f"{job.task}-*")):
            tuned.check_task(folder / job.task, settings.of(job.task), precision=precision)


def figures(arguments: argparse.Namespace, rows: Sequence[str]) -> dict[str, Any]:
    """What is known so far; JSON types."""
    told: dict[str, Any] = {
        "machine": machine.device(), "versions": machine.versions("torch", "deepspeed", "transformers"),
        "jobs": arguments.jobs, "asked": arguments.row, "set": arguments.override, "rows": {},
    }  # fmt: skip
    for row in rows:
        if any((folder := arguments.out / row).glob("**/result.json")):
            (run,) = scores.collect([folder])
            told["rows"][row] = [{name: r.get(name) for name in _KEPT} for r in run.results.values()]
    return told


def tell(told: dict[str, Any], plot: Path | None = None) -> None:
    """Print the table, and draw it into `plot`."""
    runs = [
        scores.Run(row, {(found["task"], found["seed"]): found for found in results})
        for row, results in told["rows"].items()
    ]
    print(f"{told['jobs']} at a time; {told['machine']}\n")
    print(scores.table(runs) if runs else "nothing is done yet; the same command goes on")
    if plot is not None and runs:
        scores.picture(runs, plot)


def _row(text: str) -> tuple[str, list[str]]:
    """(name, overrides) of `NAME: MODEL [key=value ...]`."""
    name, _, rest = text.partition(":")
    model, *words = rest.split() or [""]
    if not name.strip() or "/" in name or not model or "=" in model:
        raise EarlyBertError(
            f"--row {text!r}: give 'NAME: MODEL [key=value ...]', such as 'dense: runs/dense'"
        )
    return name.strip(), [f"model={model}", *words]


def _there(glue: Path | None, squad: Path | None) -> list[str]:
    """Tasks whose files are there."""
    return [*(there(glue) if glue is not None else ()), *(SQUADS[:1] if squad is not None else ())]


# --- several at a time ---------------------------------------------------------------------------------


def _work(jobs: Sequence[Job], arguments: argparse.Namespace, time_given: Slice) -> None:
    """Take the jobs to their ends, or as far as the time goes. Raises EarlyBertError with a program's own
    words where one fails; the others are then asked to stop first."""
    places = list(_places(arguments.jobs))
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    waiting = [job for job in jobs if not job.done]
    failed: list[str] = []
    asked = False
    while waiting or running:
        late = bool(failed) or time_given.over
        while waiting and not late and len(running) < len(places):
            place = next(number for number in range(len(places)) if number not in running)
            job = waiting.pop(0)
            running[place] = job, _begin(job, arguments, cores=places[place])
        if late and not asked:
            asked = True
            waiting.clear()
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)  # it saves, and the same command goes on
        time.sleep(0.2)
        for place, (job, process) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[place]
            if code == 0:
                told = read_json(job.folder / job.task / f"seed-{job.seed}" / "result.json")
                spent = sum(told["seconds"].values())
                print(f"{job.row}, {job.task}, seed {job.seed}: {told['score']:.2f}, {spent:,.0f} s",
                      file=sys.stderr, flush=True)  # fmt: skip
            elif not time_given.ended(code) and not (asked and code == -signal.SIGTERM):  # another failed
                failed.append(why(code, _log(job)))
    if failed:
        raise EarlyBertError("; ".join(failed))


def _begin(job: Job, arguments: argparse.Namespace, *, cores: set[int]) -> subprocess.Popen:
    path = _log(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = job.command(glue=arguments.glue, squad=arguments.squad)
    with open(path, "a", encoding="utf-8") as log:
        told = {"OMP_NUM_THREADS": str(len(cores)), "TOKENIZERS_PARALLELISM": "false"}
        (process,) = start(command, ranks=1, log=log, **told)
    os.sched_setaffinity(process.pid, cores)
    return process


def _places(jobs: int) -> Iterator[set[int]]:
    """The cores of each of several programs that run at a time."""
    cores = sorted(os.sched_getaffinity(0))
    for number in range(jobs):
        yield set(cores[number * len(cores) // jobs : (number + 1) * len(cores) // jobs]) or set(cores)


def _log(job: Job) -> Path:
    return job.out / "logs" / f"{job.row}-{job.task}-{job.seed}.txt"
