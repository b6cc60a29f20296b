"""Checkpoints fine-tuned on tasks of GLUE while the run goes on: `evaluate.tasks`.

A chosen checkpoint is linked into `runs/NAME/probes/step-NNNNNNN/` before retention may remove it, and
`scripts/finetune.py` tunes it there in a process of its own, one at a time. The surprise: that folder is the
queue. It goes when its scores stand in `probes.jsonl`, so whatever was not finished is there for the next
start. Nothing here is collective but `check` and `settle`, and nothing that happens to a probe ends the run.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from earlybert import dist, mechanics, probe_process, recipes, schedule, tasks
from earlybert.checkpoint import Checkpoint, names
from earlybert.config import (
    EarlyBertError,
    SettingsError,
    as_dict,
    read_json_lines,
    to_toml,
    write_atomically,
)
from earlybert.experiment import EvaluateSettings, Experiment
from earlybert.lifecycle import end_ranks
from earlybert.monitor import Monitor, cut_metrics
from earlybert.recipes import DEFAULTS, Finetuning, RecipeSettings
from earlybert.run import STOPPED, Claim, Signals

_FINETUNE = Path(__file__).resolve().parent.parent / "scripts" / "finetune.py"
_MOST_WAITING = 3
"""Checkpoints whose disk space is held for later; more are left out."""
_PATIENCE = 5.0
"""Seconds for a probe to save where it is, when the run stops."""
_TUNED, _PARTIAL = "tuned", ".partial-"
_OF_THE_RUN = (
    "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "CROSS_", "TORCHELASTIC_", "SLURM_",
    "OMPI_", "PMI", "EARLYBERT_",
)  # fmt: skip
"""Variables that begin so tell a process its place in a launch, or are meant for the run's ranks."""


def recorded(run: Path) -> list[dict[str, Any]]:
    """What `probes.jsonl` of a run folder says: step and task, and score or error; none where it is not
    there."""
    return read_json_lines(run / "probes.jsonl")


def check(experiment: Experiment, *, tokenizer: Path) -> None:
    """Raise EarlyBertError on every rank for what would make each probe fail. Collective.

    `tokenizer`: the corpus' folder of it. Rank 0 reads the tasks' files: the probes run on its machine.
    """
    if experiment.evaluate.tasks:
        dist.check_on_rank_0(functools.partial(_check, experiment, tokenizer=tokenizer))


def _check(experiment: Experiment, *, tokenizer: Path) -> None:
    settings, positions = experiment.evaluate, experiment.model.positions
    tuning, values = _tuning(settings, positions=positions)
    if settings.tasks_device != "cpu" and not torch.cuda.is_available():
        raise SettingsError(
            f'evaluate.tasks_device = "{settings.tasks_device}": no GPU is here; leave it at "cpu"'
        )
    if settings.tasks_device == "cpu" and mechanics.precision_of(values) == "fp16":
        raise SettingsError(
            f"evaluate.tasks_experiment = {settings.tasks_experiment}: its DeepSpeed JSON enables fp16, "
            "which is for GPUs; use one with bf16 or fp32, or set evaluate.tasks_device"
        )
    if not _FINETUNE.is_file():
        raise EarlyBertError(f"{_FINETUNE} is not there, which evaluate.tasks needs; run from a checkout")
    for recipe in map(tuning.of, settings.tasks):
        if recipe.sequence_length > positions:
            raise SettingsError(
                f"evaluate.tasks: {recipe.task} has sequence_length = {recipe.sequence_length}, "
                f"model.positions is {positions}; set recipe.sequence_length in {settings.tasks_experiment} "
                "to at most that"
            )
        try:
            tasks.check(recipe, data=settings.tasks_data)
        except EarlyBertError as error:
            raise EarlyBertError(f"evaluate.tasks_data: {error}") from error
    tasks.tokenizer(tokenizer, of="evaluate.tasks")


def _tuning(settings: EvaluateSettings, *, positions: int) -> tuple[Finetuning, dict[str, Any]]:
    """The fine-tuning experiment of a probe, without its model, and its DeepSpeed settings."""
    if settings.tasks_experiment is None:
        length = min(DEFAULTS[""]["sequence_length"], positions)
        told = Finetuning(
            name=_TUNED, model="", deepspeed="", data=settings.tasks_data, tasks=settings.tasks, seeds=(1,),
            recipe=RecipeSettings(sequence_length=length),
        )  # fmt: skip
        return told, {"zero_optimization": {"stage": 0}}
    words = [f"tasks={json.dumps(settings.tasks)}", f"data={json.dumps(settings.tasks_data)}"]
    told, values = recipes.load(settings.tasks_experiment, words, kind="glue")
    return replace(told, name=_TUNED, keep_models="none"), values


class Probes:
    """The probes of a run; on other ranks than 0, and without `evaluate.tasks`, nothing."""

    def __init__(self, experiment: Experiment) -> None:
        self._settings, self._run = experiment.evaluate, experiment.folder
        self._every = self._settings.tasks_every or experiment.checkpoint.every
        self._last = schedule.total_steps(experiment.phases)
        self._active = bool(self._settings.tasks) and dist.rank() == 0
        if self._active:
            self._tuning, self._mechanics = _tuning(self._settings, positions=experiment.model.positions)
        self._folder = self._run / "probes"
        self._monitor: Monitor | None = None
        self._waiting: list[int] = []
        """Steps whose checkpoints are linked and not begun."""
        self._running: tuple[int, subprocess.Popen[bytes]] | None = None

    @property
    def left(self) -> list[int]:
        """Steps whose probes are not done."""
        return [*([] if self._running is None else [self._running[0]]), *self._waiting]

    def begin(self, monitor: Monitor | None, *, found: Checkpoint | None) -> None:
        """Drop what lies past the checkpoint from which the run goes on, and begin what an earlier start has
        left."""
        if not self._active:
            return
        self._monitor = monitor
        step = 0 if found is None else found.manifest.step
        cut_metrics(self._run / "probes.jsonl", last_step=None if found is None else step)
        self._folder.mkdir(exist_ok=True)
        for partial in self._folder.glob(_PARTIAL + "*"):
            shutil.rmtree(partial, ignore_errors=True)
        self._waiting = []
        for name in reversed(names(self._folder)):
            own = _step(name)
            if own <= step and self._missing(own):
                if self._running is None or self._running[0] != own:
                    self._waiting.append(own)
                continue
            if self._running is not None and self._running[0] == own:
                self._end()
            shutil.rmtree(self._folder / name, ignore_errors=True)
        if found is not None:  # its start may have died before it was linked
            self.take(found.folder)
        self._next()

    def take(self, checkpoint: Path) -> None:
        """Keep a checkpoint that was just published, where it is to be probed, and begin as soon as no other
        runs."""
        step = _step(checkpoint.name)
        if not self._active or (step % self._every and step != self._last):
            return
        if step in self.left or not self._missing(step):
            return
        if len(self._waiting) >= _MOST_WAITING and step != self._last:
            self._say(
                f"no probe of step {step:,}: those of steps {_listed(self.left)} are not done; raise "
                "evaluate.tasks_every"
            )
            return
        try:
            self._link(checkpoint)
        except OSError as error:  # a probe less; the run goes on
            self._say(f"no probe of step {step:,}: its checkpoint could not be kept for it: {error}")
            return
        self._waiting.append(step)
        self._next()

    def look(self) -> None:
        """Record a probe that has ended, and begin the next one."""
        if self._running is None or (code := self._running[1].poll()) is None:
            return
        step, self._running = self._running[0], None
        if code == STOPPED:  # a signal to all processes of a job reached it too
            self._say(f"the probe of step {step:,} was stopped; the next start makes up for it")
            return
        try:
            self._record(step, code)
        except OSError as error:  # a full disk; its folder stays
            self._say(f"the scores of the probe of step {step:,} could not be written: {error}")
        self._next()

    def settle(self, claim: Claim, signals: Signals) -> bool:
        """At the run's end: wait for the probes that are left; False where a signal or the file `stop` ended
        that.

        All ranks leave the process group first, so none but rank 0 has to wait. Collective.
        """
        if not self._settings.tasks:
            return True
        end_ranks()
        if self.left:
            stop = self._run / "stop"
            self._say(f"waiting for the probes of steps {_listed(self.left)} (touch {stop} leaves them)")
        with signals:
            while self._running is not None:
                if claim.stop_asked() or signals.asked:
                    return False
                time.sleep(0.1)
                self.look()
        return True

    def close(self) -> None:
        """End the probe that runs and say what is left."""
        left = self.left
        self._end()
        if left:
            self._say(f"the probes of steps {_listed(left)} are left: the same command goes on with them")
        self._waiting = []

    # --- a probe ---

    def _link(self, checkpoint: Path) -> None:
        """Keep a checkpoint's files under a name of the probe's."""
        hidden = self._folder / (_PARTIAL + checkpoint.name)
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        for path in checkpoint.iterdir():
            try:
                os.link(path, hidden / path.name)
            except OSError:  # some file systems have no hard links
                shutil.copy(path, hidden / path.name)
        os.rename(hidden, self._folder / checkpoint.name)

    def _next(self) -> None:
        while self._waiting and self._running is None:
            step = self._waiting.pop(0)
            try:
                self._running = step, self._started(step)
            except OSError as error:
                self._say(f"the probe of step {step:,} could not be started: {error}")

    def _started(self, step: int) -> subprocess.Popen[bytes]:
        folder = self._place(step)
        tuning = replace(
            self._tuning, runs=str(folder), model=str(folder), deepspeed=str(folder / "deepspeed.json"),
            tasks=tuple(self._missing(step)),
        )  # fmt: skip
        experiment, text = folder / "finetune.toml", to_toml(as_dict(tuning))
        values = json.dumps(self._mechanics, indent=2) + "\n"
        for path, own in ((experiment, text), (folder / "deepspeed.json", values)):
            if path.exists() and path.read_text(encoding="utf-8") != own:
                shutil.rmtree(folder / _TUNED, ignore_errors=True)  # begun by other settings
            write_atomically(path, own)
        # Where ranks compute on the CPU themselves, they have all of it.
        cores = max(1, len(os.sched_getaffinity(0)) // 2) if torch.cuda.is_available() else 1
        beside = [sys.executable, str(probe_process.__file__), str(os.getpid()), str(cores)]
        command = [sys.executable, str(_FINETUNE), "glue", str(experiment)]
        with open(folder / "log.txt", "ab") as log:
            return subprocess.Popen(
                [*beside, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=surroundings(os.environ, device=self._settings.tasks_device), start_new_session=True,
            )  # fmt: skip

    def _record(self, step: int, code: int) -> None:
        folder = self._place(step)
        lines: list[dict[str, Any]] = []
        for task in self._missing(step):
            paths = [folder / _TUNED / task / f"seed-{seed}" / "result.json" for seed in self._tuning.seeds]
            if all(path.exists() for path in paths):
                results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
                lines.append(
                    {
                        "step": step, "task": task,
                        "score": statistics.fmean(result["score"] for result in results),
                        "seeds": {str(result["seed"]): result["scores"] for result in results},
                        "seconds": sum(sum(result["seconds"].values()) for result in results),
                    }
                )  # fmt: skip
            else:
                lines.append({"step": step, "task": task, "error": _reason(folder / "log.txt", code)})
        scores = {line["task"]: line["score"] for line in lines if "score" in line}
        failed = [line for line in lines if "error" in line]
        # TensorBoard first: what stands in probes.jsonl is not told again.
        for task, score in scores.items():
            if self._monitor is not None:
                self._monitor.point(f"probe/{task}", score, step=step)
        with open(self._run / "probes.jsonl", "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        if scores:
            told = ", ".join(f"{task} {score:.2f}" for task, score in scores.items())
            self._say(f"probe of step {step:,}: {told}")
        if failed:
            kept = self._folder / f"failed-{folder.name}.txt"
            shutil.copy(folder / "log.txt", kept)
            names_of = ", ".join(line["task"] for line in failed)
            self._say(f"the probe of step {step:,} on {names_of} failed: {failed[0]['error']} ({kept})")
        shutil.rmtree(folder, ignore_errors=True)

    def _end(self) -> None:
        if self._running is None:
            return
        process, self._running = self._running[1], None
        process.terminate()
        try:
            process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _missing(self, step: int) -> list[str]:
        """Tasks of which nothing is recorded for a step."""
        there = {line["task"] for line in recorded(self._run) if line["step"] == step}
        return [task for task in self._settings.tasks if task not in there]

    def _place(self, step: int) -> Path:
        return self._folder / f"step-{step:07d}"

    def _say(self, text: str) -> None:
        if self._monitor is not None:
            self._monitor.say(text)


def surroundings(environment: Mapping[str, str], *, device: str) -> dict[str, str]:
    """A probe's environment: the run's without its place in a launch, and with the `device` it may see."""
    own = {name: value for name, value in environment.items() if not name.startswith(_OF_THE_RUN)}
    own.pop("DS_ACCELERATOR", None)
    if device == "cpu":
        return {**own, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**own, "CUDA_VISIBLE_DEVICES": device}


def _reason(log: Path, code: int) -> str:
    """Why a probe failed: its own message, else its last line, else how it ended."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = (own or lines or ["it said nothing"])[-1]
    return f"exit status {code}: {said}"


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _listed(steps: list[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps)
