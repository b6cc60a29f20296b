"""One task with one seed: trained, judged, stopped anywhere and gone on with.

Order and dropout are keyed by (seed, step), so a resumed run repeats the interrupted one, and the dense run,
the ticket and the baselines see the same rows in the same order. The surprise: with a ticket that rewinds,
the steps of the search come on top: after the draw the small model gets every epoch anew, which is what the
paper compares, and the time of both is counted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from earlybert import checkpoint, dist, judging, mechanics, pretrained, run, tuned
from earlybert.account import parameter_count
from earlybert.config import EarlyBertError, write_atomically
from earlybert.downstream import EarlyBertForQuestionAnswering
from earlybert.engine import Engine, initialize
from earlybert.lifecycle import check_config, empty_module
from earlybert.monitor import Monitor, duration
from earlybert.order import key_of, permute
from earlybert.origin import Origin
from earlybert.progress import EarlyBird, Progress
from earlybert.recipes import Finetuning, Recipe
from earlybert.tasks import Task
from earlybert.ticket import TicketSettings
from earlybert.watch import Watch

_LOOKS = 20
"""At the coefficients, in a search."""


@dataclass(frozen=True)
class Plan:
    """Which rows a step trains on, and at what rate: a pure function of the step."""

    recipe: Recipe
    rows: int
    search: int
    """Steps up to the draw; 0 where nothing is drawn."""
    rewinds: bool
    """True where the epochs begin anew after the draw."""
    seed: int

    def __post_init__(self) -> None:
        if self.search and self.total <= self.search:
            raise EarlyBertError(
                f"{self.recipe.task}: {self.rows:,} rows give {self.total} steps of {self.recipe.batch}, and "
                f"the ticket would be drawn after step {self.search}: nothing would train it; raise "
                "recipe.epochs, or set ticket.start=rewind"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.recipe.batch)

    @property
    def training(self) -> int:
        """Steps of the epochs alone."""
        return max(1, round(self.recipe.epochs * self.steps_per_epoch))

    @property
    def total(self) -> int:
        return self.training + (self.search if self.rewinds else 0)

    def learning_rate(self, step: int) -> float:
        return self.recipe.curve(steps=self.training).rate(self._own(step))

    def batch(self, step: int) -> np.ndarray:
        """Numbers of the rows of a step; the last step of an epoch may have fewer."""
        epoch, place = divmod(self._own(step), self.steps_per_epoch)
        first = place * self.recipe.batch
        places = np.arange(first, min(first + self.recipe.batch, self.rows))
        return permute(places, length=self.rows, key=key_of("tune", self.seed, epoch))

    def ends_epoch(self, step: int) -> bool:
        """True where an epoch ends with this step, or the run."""
        return step + 1 == self.total or (self._own(step) + 1) % self.steps_per_epoch == 0

    def _own(self, step: int) -> int:
        """Steps since the epochs began."""
        return step - self.search if self.rewinds and step >= self.search else step


@dataclass
class _Memory:
    """What must be remembered across a resume."""

    seconds: dict[str, float] = field(default_factory=lambda: {"search": 0.0, "train": 0.0})
    """Time in training steps, before the draw and after it, the draw in the first."""
    loss: float = 0.0
    steps: int = 0
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{step: {split: {metric: percent}}}."""
    grad_norm: float | None = None
    """Of the last line, for the line of an evaluation that was stopped."""


class Tuning:
    """One task with one seed."""

    def __init__(
        self,
        settings: Finetuning,
        mechanics_values: dict[str, Any],
        *,
        recipe: Recipe,
        task: Task,
        origin: Origin,
        seed: int,
        folder: Path,
        watch: Watch,
        signals: run.Signals,
        claim: run.Claim,
    ) -> None:
        self.settings, self.recipe, self.task, self.origin = settings, recipe, task, origin
        self.seed, self.folder, self.watch, self.claim = seed, folder, watch, claim
        self.signals = signals
        self.stop = False
        ranks = dist.world_size()
        self.micro_batch = recipe.micro_batch or -(-recipe.batch // ranks)
        self.accumulation = -(-recipe.batch // (self.micro_batch * ranks))
        self.mechanics = mechanics.complete(
            mechanics_values, micro_batch=self.micro_batch, accumulation=self.accumulation,
            clipping=settings.optimizer.clipping,
        )  # fmt: skip
        check_config(self.mechanics, where=settings.deepspeed)
        per_epoch = -(-len(task.train) // recipe.batch)
        self.ticket = _ticket(settings, steps_per_epoch=per_epoch)
        self.plan = Plan(
            recipe, len(task.train), self.ticket.latest_step if self.ticket.enabled else 0,
            self.ticket.start == "rewind", seed,
        )  # fmt: skip
        self.monitor: Monitor | None = None
        self.engine: Engine | None = None

    def run(self) -> bool:
        """Train and judge; False where a signal stopped it. Collective."""
        engine = self._open()
        self._say(
            f"{self.recipe.task}, seed {self.seed}: {len(self.task.train):,} rows, {self.plan.total:,} steps "
            f"of {self.recipe.batch}, {parameter_count(engine.module):,} parameters; from step {self.step:,}"
        )
        # A signal may have stopped the evaluation after this step: then it comes first.
        stopped = self.step > 0 and not self._record(engine, again=True)
        while not stopped and self.step < self.plan.total:
            drawn, stopped = self._train_step(engine)
            if drawn:
                _skip_padding(engine, recipe=self.recipe)  # its module is another one
                self._say(
                    f"drew the ticket at {engine.ticket}; pause {sum(engine.draw_seconds.values()):.2f} s"
                )
                if dist.rank() == 0 and engine.ticket is not None:
                    engine.ticket.save(self.folder / "ticket.json")
            stopped |= not self._record(engine)
            due = self.step < self.plan.total and self.step % self.settings.checkpoint_every == 0
            if stopped or due:
                self.saver.begin(engine, step=self.step, trainer=asdict(self.memory))
                self.saver.commit()
                if stopped:
                    self.saver.check(step=self.step)
        if stopped:
            before = ", before its evaluation" if self._owed() else ""
            self._say(f"stopped at step {self.step:,}{before}; the same command goes on from here")
            return False
        self._finish(engine)
        return True

    def _asked(self) -> bool:
        """Whether this rank is asked to stop, or was before."""
        self.stop |= self.claim.stop_asked() or self.signals.asked
        return self.stop

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        if self.monitor is not None:
            self.monitor.close()

    # --- start ---

    def _open(self) -> Engine:
        """The engine, from the pretrained model or from the newest checkpoint. Collective."""
        deciding = sorted(self.recipe.deciding.items())
        of = (
            hashlib.sha256(f"{self.settings.fingerprint} {deciding} {self.seed}".encode()).hexdigest(),
            hashlib.sha256(f"{self.origin.fingerprint} {self.task.train.sha256}".encode()).hexdigest(),
        )
        folder = self.folder / "checkpoints"
        found = checkpoint.newest_good(folder, of=of)
        stage, precision = mechanics.stage_of(self.mechanics), mechanics.precision_of(self.mechanics)
        self.saver = checkpoint.Saver(
            folder, experiment=of[0], corpus=of[1], stage=stage, precision=precision, keep=1,
            good=[] if found is None else [found.folder.name],
        )  # fmt: skip
        kind = self.task.model_class
        if found is None:
            searched = self.ticket.enabled and self.ticket.searches
            model = self.origin.model(
                kind, self.task.model_settings, coefficients="train" if searched else "none", seed=self.seed
            )
            progress, restored = Progress(), None
            if dist.rank() == 0:
                tuned.begin(self.folder, self.recipe)
            self.step, self.memory = 0, _Memory()
        else:
            checkpoint.same_precision(found.manifest, precision=precision)
            shape = kind.config_class.from_dict(found.manifest.model)
            model = empty_module(lambda: kind(shape), config=self.mechanics)
            progress = Progress.from_json(found.manifest.progress, where=str(found.folder))
            restored = checkpoint.read(found)
            self.step, self.memory = found.manifest.step, _Memory(**found.manifest.trainer)
        optimizer = self.settings.optimizer
        self.engine = initialize(
            model=model, config=self.mechanics, early_bird=EarlyBird(self.ticket, seed=self.seed),
            optimizer=optimizer.build, weight_decay=optimizer.weight_decay, progress=progress,
            restored=restored,
        )  # fmt: skip
        if found is not None:
            checkpoint.verify(self.engine, found)
        _skip_padding(self.engine, recipe=self.recipe)
        if dist.rank() == 0:  # the line of an evaluation that is owed may be there, of a start that died then
            last = None if found is None else self.step - self._owed()
            self.monitor = Monitor(self.folder, resume_step=last)
        return self.engine

    def _owed(self) -> bool:
        """True where an epoch ends with the last step, and it was not judged yet."""
        return self.plan.ends_epoch(self.step - 1) and str(self.step) not in self.memory.scores

    # --- a step ---

    def _train_step(self, engine: Engine) -> tuple[bool, bool]:
        """One optimizer step; whether it drew, and whether any rank was asked to stop. Collective."""
        began, draws = time.perf_counter(), len(engine.progress.tickets)
        engine.learning_rate = self.plan.learning_rate(self.step)
        rows = self.plan.batch(self.step).tolist()
        ranks, sums = dist.world_size(), torch.zeros(2, dtype=torch.float64, device=engine.device)
        for micro in range(self.accumulation):
            self.watch.mark(f"{self.recipe.task}, step {self.step + 1}: micro-batch {micro + 1}")
            number = micro * ranks + dist.rank()
            own = rows[number * self.micro_batch : (number + 1) * self.micro_batch]
            # Ranks go in step: one without rows of its own computes one that weighs nothing.
            batch = self.task.train.collate(own or rows[:1], pad=self.origin.pad)
            torch.manual_seed(key_of("dropout", self.seed, self.step, number) >> 1)
            loss = engine(**judging.moved(batch, engine.device)).loss
            sums[0] += loss.detach().double() * len(own)
            if micro == self.accumulation - 1:
                sums[1] = float(self._asked())
                numbers = dist.begin_sum(sums.to(dist.collective_device()))  # beside the backward pass
            # DeepSpeed takes the mean over all rounds of all ranks; wanted is the mean over the rows.
            engine.backward(loss * (len(own) * self.accumulation * ranks / len(rows)))
            del loss  # it holds the engine, which a draw must be able to free
            if micro < self.accumulation - 1:
                engine.step()
        total, stop = numbers()
        mean = total / len(rows)
        if not math.isfinite(mean):
            raise EarlyBertError(
                f"{self.recipe.task}, seed {self.seed}: the loss of step {self.step + 1} is {mean}; start "
                "again under another name= with a lower recipe.learning_rate, or in bf16 instead of fp16"
            )
        self.watch.mark(f"{self.recipe.task}, step {self.step + 1}: update")
        engine.step()
        self.step += 1
        self.memory.loss += mean
        self.memory.steps += 1
        searching = self.step <= self.plan.search
        self.memory.seconds["search" if searching else "train"] += time.perf_counter() - began
        return len(engine.progress.tickets) > draws, stop > 0

    # --- what is told ---

    def _record(self, engine: Engine, *, again: bool = False) -> bool:
        """Judge the model where an epoch ends, and close the line where one is due; with `again`, where a
        start finds that a signal has stopped that. False where one stops it now. Collective."""
        judged = self._owed()
        if not judged and (again or self.step % self.settings.log_every):
            return True
        if not again:
            self.memory.grad_norm = engine.grad_norm
        values: dict[str, Any] = {
            "step": self.step, "loss": self.memory.loss / max(1, self.memory.steps),
            "lr": self.plan.learning_rate(self.step - 1), "grad_norm": self.memory.grad_norm,
            "parameters": parameter_count(engine.module), "seconds": sum(self.memory.seconds.values()),
        }  # fmt: skip
        scores: dict[str, dict[str, float]] = {}
        if judged:
            try:
                scores = self._judge(engine, last=self.step == self.plan.total)
            except judging.Interrupted:
                return False
            self.memory.scores[str(self.step)] = scores
        for split, found in scores.items():
            values |= {f"{split}/{name}": value for name, value in found.items()}
        self.memory.loss, self.memory.steps = 0.0, 0
        if self.monitor is not None:
            self.monitor.record(values)
            left = (self.plan.total - self.step) * values["seconds"] / self.step
            told = "  ".join(f"{split} {found['score']:.2f}" for split, found in scores.items())
            self._say(
                f"step {self.step:>7,}/{self.plan.total:,}  loss {values['loss']:.3f}  lr {values['lr']:.1e}"
                f"  eta {duration(left)}  {told}".rstrip()
            )
        return True

    def _judge(self, engine: Engine, *, last: bool) -> dict[str, dict[str, float]]:
        """The metrics of each split that has labels; the `last` time all answers are written. Collective."""
        scores = {}
        for split, rows in {**self.task.evaluations, **(self.task.answers if last else {})}.items():
            mark = functools.partial(self.watch.mark, f"{self.recipe.task}, {split} after step {self.step}")
            logits = judging.logits(
                engine, self.task, rows, batch=4 * self.micro_batch, pad=self.origin.pad, asked=self._asked,
                mark=mark,
            )  # fmt: skip
            to = self.folder if last else None
            scores[split] = dist.from_rank_0(
                self.task.judge(split, logits, to=to) if dist.rank() == 0 else {}
            )
        return {split: found for split, found in scores.items() if found}

    def _finish(self, engine: Engine) -> None:
        """Write the result, and let the checkpoints go. Collective."""
        scores = self.memory.scores[str(self.plan.total)]
        config, ticket = engine.module.config, engine.ticket
        result = {
            "task": self.recipe.task,
            "seed": self.seed,
            "score": statistics.fmean(found["score"] for found in scores.values()),
            "scores": scores,
            "seconds": self.memory.seconds,
            "steps": {"search": self.plan.total - self.plan.training, "train": self.plan.training},
            "parameters": parameter_count(engine.module),
            "heads_per_layer": config.heads_per_layer,
            "neurons_per_layer": config.neurons_per_layer,
            "ticket": self.ticket.kind if ticket is not None else None,
            "recipe": asdict(self.recipe),
            "rows": self.task.train.sha256,
            "judged": self.task.judged,
            "origin": self.origin.fingerprint,
            "device": run.device(),
            "model": self.settings.model,
            "pretraining": self.origin.facts,
            "ranks": dist.world_size(),
            "precision": mechanics.precision_of(self.mechanics),
        }
        if (form := self.settings.keep_models) != "none":
            pretrained.save(engine, self.folder / "model", form=form, result=result)
            if dist.rank() == 0:
                self.origin.tokenizer.save_pretrained(self.folder / "model")
        if dist.rank() == 0:
            write_atomically(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        seconds = self.memory.seconds
        self._say(
            f"{self.recipe.task}, seed {self.seed}: {result['score']:.2f} after {seconds['search']:.0f} + "
            f"{seconds['train']:.0f} s of search and training"
        )

    def _say(self, text: str) -> None:
        if self.monitor is not None:
            self.monitor.say(text)


def _ticket(settings: Finetuning, *, steps_per_epoch: int) -> TicketSettings:
    """The ticket's settings in steps of this task: a search draws when its part of the epoch is over, a
    baseline after its first step."""
    ticket = settings.ticket
    if not ticket.enabled:
        return ticket
    last = max(1, round(settings.search_epochs * steps_per_epoch)) if ticket.searches else 1
    return replace(ticket, minimum_step=last, latest_step=last, every=max(1, last // _LOOKS))


def _skip_padding(engine: Engine, *, recipe: Recipe) -> None:
    """Leave padding out of the products, of which it is half and more.

    Of an answer's only where the recipe says so: in stock BERT its loss is over all tokens, padding among
    them. On CPUs only: a GPU would be waited for, to count the real tokens, and it was not measured there.
    """
    ignores = True
    if isinstance(engine.module, EarlyBertForQuestionAnswering):
        engine.module.ignores_padding = ignores = recipe.ignore_padding
    engine.module.bert.skips_padding = ignores and engine.device.type == "cpu"
