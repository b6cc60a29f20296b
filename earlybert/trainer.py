"""The pretraining run: one loop over optimizer steps, from an empty folder or from the newest good
checkpoint.

Everything random is keyed by (seed, step, micro-batch of the global batch) or by (seed, epoch, sample), and
the data position is a pure function of the step, so a resumed run repeats the interrupted one to the last
bit. What the ranks must agree on (stop, broken numbers) travels in the one reduction a step that also sums
the loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from earlybert import account, checkpoint, dist, faults, guard, report, run, schedule
from earlybert.account import Memory, Sums
from earlybert.assembly import Assembly
from earlybert.config import EarlyBertError
from earlybert.experiment import Experiment
from earlybert.lifecycle import compile_seconds
from earlybert.loader import MicroBatch
from earlybert.monitor import Monitor, duration, progress_line
from earlybert.probes import Probes
from earlybert.schedule import At
from earlybert.watch import Watch, explained


class _GoBack(Exception):
    """A step's numbers are bad and the run goes back to a checkpoint."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    stopped: bool
    """True where a signal ended it before its last step, or before its last probe."""
    eval_losses: dict[int, float]
    """{step: held-out loss}."""


def train(experiment: Experiment, mechanics_values: dict[str, Any], *, where: str) -> Result:
    """Run an experiment to its end, or until SIGTERM or SIGINT. Collective.

    `mechanics_values` is the DeepSpeed JSON, `where` the experiment file's name for messages. Raises
    EarlyBertError for whatever the user can mend, before the first step wherever it can be known by then.
    """
    trainer = _Trainer(experiment, mechanics_values, where=where)
    try:
        with explained(trainer.watch):
            result = trainer.run()
        if not result.stopped and not trainer.probes.settle(trainer.claim, trainer.signals):
            result = replace(result, stopped=True)
        return result
    finally:
        trainer.close()


class _Trainer:
    def __init__(self, experiment: Experiment, mechanics_values: dict[str, Any], *, where: str) -> None:
        self.experiment = experiment
        self.parts = Assembly(experiment, mechanics_values)
        self.total = schedule.total_steps(experiment.phases)
        self.monitor: Monitor | None = None
        self.memory = Memory()
        self.signals = run.Signals()
        self.stop_requested = False
        self.warming = 1.0
        corpus = self.parts.corpus.manifest.content
        origin = ("corpus", experiment.data.corpus)
        self.claim = run.claim(experiment, corpus=corpus, where=where, origin=origin)
        self.folder = self.claim.folder
        self.watch = Watch(self.folder, seconds=experiment.hang_seconds)
        self.probes = Probes(experiment)

    def run(self) -> Result:
        self._start()
        self._begin()
        stopped = False
        with self.signals:
            while self.step < self.total and not stopped:
                at = self._at(self.step)
                if at.phase != self.phase:
                    self._change_phase(at)
                try:
                    with contextlib.closing(self.parts.loader(at, first=self._first_sample(at))) as batches:
                        stopped = self._train_phase(batches)
                except _GoBack as bad:
                    why = str(bad)
                else:
                    continue
                self._roll_back(why)  # not in the except clause, whose traceback holds the old engine
        if stopped:
            self._say(f"stopped at step {self.step:,} after a checkpoint; the same command goes on from here")
        else:
            self._say(f"done: {self.total:,} steps, {duration(self.memory.trained_seconds)} of training")
        return Result(self.step, stopped, {int(k): v for k, v in self.memory.eval_losses.items()})

    def _start(self) -> None:
        """Where the run stands, and its engine there. Collective."""
        self._find()
        self.saver = checkpoint.Saver(
            self.folder / "checkpoints",
            experiment=self.experiment.fingerprint,
            corpus=self.parts.corpus.manifest.content,
            stage=self.parts.stage,
            precision=self.parts.precision,
            keep=self.experiment.checkpoint.keep,
            good=[] if self.found is None else [self.found.folder.name],
            published=self.probes.take,
        )
        if dist.rank() == 0:
            manifest = self.parts.corpus.manifest
            run.describe(
                self.experiment, self.parts.mechanics, corpus=manifest.content,
                tokenizer=manifest.tokenizer_sha256,
            )  # fmt: skip
        self.rolled_back: list[int] = []
        """Steps to which this start has gone back, as long as it is the same one."""
        self._open()

    def _find(self) -> None:
        """The newest good checkpoint and what follows from it: step and phase. Collective."""
        self.found = checkpoint.newest_good(
            self.folder / "checkpoints", of=(self.experiment.fingerprint, self.parts.corpus.manifest.content)
        )
        if self.found is not None:
            checkpoint.same_precision(self.found.manifest, precision=self.parts.precision)
        self.step = 0 if self.found is None else self.found.manifest.step
        self.phase = self._at(self.step).phase

    def _open(self) -> None:
        """The engine and the memory of where the run stands. Collective."""
        self.watch.mark("the engine's start")
        self.engine = self.parts.engine(self.found, phase=self.phase)
        self.memory = Memory() if self.found is None else Memory.stored(self.found.manifest.trainer)

    def _begin(self) -> None:
        """Open the run's records where the step is, and evaluate what was not trained yet. Collective."""
        if dist.rank() == 0:
            self.monitor = Monitor(self.folder, resume_step=None if self.found is None else self.step)
            self._write_ticket()
        self.probes.begin(self.monitor, found=self.found)
        layout = f"ZeRO-{self.parts.stage}, {self.parts.precision}"
        for line in account.announcement(
            self.experiment, self.engine, found=self.found, step=self.step, total=self.total,
            phase=self.phase, layout=layout,
        ):  # fmt: skip
            self._say(line)
        if self.found is None:
            eval_loss = self._evaluate()
            if self.monitor is not None:
                self.monitor.record({"step": 0, "phase": 0, "eval_loss": eval_loss})

    def close(self) -> None:
        self.probes.close()
        if self.monitor is not None:
            self.monitor.close()
        self.claim.release()

    # --- the loop ---

    def _train_phase(self, batches: Iterator[MicroBatch]) -> bool:
        """Train to the end of the current phase; return True where a signal stopped it."""
        settings = self.experiment
        while self.step < self.total:
            at = self._at(self.step)
            if at.phase != self.phase:
                return False
            draws = len(self.engine.progress.tickets)
            stop = self._train_step(batches, at)
            drawn = len(self.engine.progress.tickets) > draws
            end = at.step_in_phase + 1 == at.settings.steps
            if drawn or end:
                self.memory.recent = []  # a model or a length of other losses; before a save, for a resume
            if drawn:
                self._tell_draw()
            evaluate = drawn or self.step == self.total or self.step % settings.evaluate.every == 0
            eval_loss = self._evaluate() if evaluate else None
            if evaluate or end or self.step % settings.log_every == 0:
                self._log(at, eval_loss=eval_loss)
            last = stop or self.step == self.total
            if last or drawn or self.step % settings.checkpoint.every == 0:
                self._save(wait=last)
            if drawn or self.step == self.total:
                self.watch.mark("the report")
                self._report()
            if stop and self.step < self.total:
                return True
        return False

    def _train_step(self, batches: Iterator[MicroBatch], at: At) -> bool:
        """Take one optimizer step; return True where any rank was asked to stop. Collective.

        Raises _GoBack where its numbers are bad and the settings say so, before any update.
        """
        began, compiled, waited = time.perf_counter(), compile_seconds(), 0.0
        engine, device = self.engine, self._device()
        engine.learning_rate = at.learning_rate
        self.warming = engine.warming
        accumulation = at.settings.accumulation(world_size=dist.world_size())
        ranks, micros = dist.world_size(), at.settings.micro_batches
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        taken: list[MicroBatch] = []
        for micro in range(accumulation):
            self.watch.mark(f"step {self.step + 1}: data")
            faults.point("step.data")
            asked = time.perf_counter()
            given = next(batches)
            waited += time.perf_counter() - asked
            batch = {key: value.to(device, non_blocking=True) for key, value in given.items()}
            taken.append(batch)
            number = micro * ranks + dist.rank()
            torch.manual_seed(_key(self.experiment.seed, self.step, number))
            self.watch.mark(f"step {self.step + 1}: micro-batch {micro + 1} of {accumulation}")
            output = engine(**batch)
            loss = output.loss * math.nan if faults.point("step.loss") else output.loss
            # DeepSpeed takes the mean over all rounds of all ranks, idle ones among them.
            weight = accumulation * ranks / micros if number < micros else 0.0
            if number < micros:
                sums[:3] += torch.stack(
                    [loss.detach().double(), output.correct.double(), output.counted.double()]
                )
            if micro == accumulation - 1:
                self.stop_requested |= self.claim.stop_asked() or self.signals.asked
                sums[3] = float(self.stop_requested)
                sums[4] = float(self.saver.writing)
                # Here, not after the backward pass, at whose end a GPU would idle until the update comes.
                numbers = dist.begin_sum(sums.to(dist.collective_device()))
            engine.backward(loss if weight == 1 else loss * weight)
            del output, loss  # they refer to the engine, which a draw in `step` must be able to free
            if micro < accumulation - 1:
                engine.step()
        total, correct, counted, stop, writing = numbers()
        self.watch.mark(f"step {self.step + 1}: update")
        faults.point("step.update")
        memory, line = self.memory, self.memory.sums
        bad = self._update(total / micros, taken, at)
        self.step += 1
        if self.saver.pending and not writing:
            self.saver.commit()
        self.probes.look()
        seconds = time.perf_counter() - began
        if bad is None:
            memory.recent = [*memory.recent[1 - self.experiment.guard.window :], total / micros]
            memory.bad_steps = 0
            line.loss += total
            line.correct += correct
            line.counted += counted
            line.micro_batches += micros
        line.steps += 1
        line.tokens += at.settings.batch * at.settings.sequence_length
        line.seconds += seconds
        line.waiting += waited
        spent = compile_seconds()  # a draw sets the clock back to 0
        line.compiling += spent - compiled if spent >= compiled else spent
        memory.trained_seconds += seconds
        return stop > 0

    def _update(self, loss: float, taken: Sequence[MicroBatch], at: At) -> str | None:
        """Update the weights, or do not where the step's numbers are bad: then say what is. Collective."""
        engine, settings = self.engine, self.experiment.guard
        bad = guard.judge(loss, self.memory.recent, settings=settings)
        if bad is None:
            skipped = engine.skipped_steps
            engine.step()
            # In fp16 that is the loss scaler's daily work, and it has a limit of its own.
            if engine.skipped_steps == skipped or self.parts.precision == "fp16":
                return None
            bad = f"the loss is {loss:.3f}, its gradient is not finite"
        else:
            bad += "; " + guard.suspects(
                engine,
                taken,
                self.parts.samples["train", at.settings.sequence_length],
                first=self._first_sample(at),
                micro_batches=at.settings.micro_batches,
                worst=loss if math.isfinite(loss) else math.inf,
                mark=self.watch.mark,
            )
            if settings.action == "skip":
                engine.skip()
        bad = f"step {self.step + 1} (learning rate {at.learning_rate:.3g}): {bad}"
        self.memory.bad_steps += 1
        if settings.action == "stop" or self.memory.bad_steps > settings.limit:
            if self.saver.pending:
                self.saver.commit()
            many = "" if settings.action == "stop" else f"{self.memory.bad_steps} bad steps in a row, now "
            raise EarlyBertError(
                f"{many}{bad}. It was not taken and nothing was saved after it. Start again under another "
                "name= with a lower phases.learning_rate or a longer warmup, or with guard.action=roll_back; "
                "a sample that is bad by itself is bad data: show.py CORPUS --document N shows it"
            )
        if settings.action == "roll_back":
            raise _GoBack(bad)
        self._say(f"{bad}; its update was skipped")
        return bad

    def _roll_back(self, why: str) -> None:
        """Go on from the newest good checkpoint, past all batches that were trained on since. Collective."""
        bad, passed = self.step, dict(self.memory.passed)
        if self.saver.pending:
            self.saver.commit()
        self.engine.close()
        self._find()
        self.rolled_back = [step for step in self.rolled_back if step == self.step] + [self.step]
        if len(self.rolled_back) > self.experiment.guard.limit:
            raise EarlyBertError(
                f"{why}; the run went back to step {self.step} {self.experiment.guard.limit} times without "
                "getting past it. Start again under another name= with a lower phases.learning_rate or a "
                "longer warmup"
            )
        self._open()
        for step in range(self.step, bad + 1):
            phase = self._at(step).settings
            key = str(phase.sequence_length)
            passed[key] = passed.get(key, 0) + phase.batch
        self.memory.passed = passed
        if self.monitor is not None:
            self.monitor.close()
        self._begin()
        self._say(
            f"{why}; gone back to step {self.step}, past the batches of steps {self.step + 1} to {bad + 1}"
        )

    def _change_phase(self, at: At) -> None:
        self.phase = at.phase
        self.engine.reopen(
            micro_batch=at.settings.micro_batch,
            accumulation=at.settings.accumulation(world_size=dist.world_size()),
        )
        self._say(
            f"phase {at.phase + 1}: {at.settings.steps:,} steps of {at.settings.batch:,} sequences of "
            f"{at.settings.sequence_length} tokens, learning rate {at.settings.learning_rate:g}"
        )

    def _evaluate(self) -> float:
        """Held-out loss, the mean over all masked positions of all ranks. Collective."""
        phase = self.experiment.phases[self.phase]  # at its last step the schedule already names the next
        eval_loss = account.held_out_loss(
            self.engine,
            self.parts.samples["held_out", phase.sequence_length],
            micro_batch=phase.micro_batch,
            limit=self.experiment.evaluate.samples,
            mark=lambda: self.watch.mark(f"evaluation after step {self.step}"),
        )
        self.memory.eval_losses[str(self.step)] = eval_loss
        self._say(f"step {self.step:>7,}/{self.total:,}  held-out loss {eval_loss:.4f}")
        return eval_loss

    def _save(self, *, wait: bool) -> None:
        """Begin a checkpoint; with `wait`, or where the settings say so, until it is on disk. Collective."""
        self.watch.mark(f"checkpoint of step {self.step}")
        self.saver.begin(self.engine, step=self.step, trainer=asdict(self.memory))
        if wait or not self.experiment.checkpoint.background:
            self.watch.mark(f"writing the checkpoint of step {self.step}")
            self.saver.commit()
        if wait:
            self.saver.check(step=self.step)

    # --- what is shown ---

    def _log(self, at: At, *, eval_loss: float | None) -> None:
        """Close the open line."""
        sums, self.memory.sums = self.memory.sums, Sums()
        if self.monitor is not None:
            rate = at.learning_rate * self.warming
            values = account.metrics(
                self.engine, sums, step=self.step, phase=self.phase, rate=rate, eval_loss=eval_loss
            )
            self.monitor.record(values)
            left = (self.total - self.step) * values["step_seconds"]
            self.monitor.say(progress_line(values, total_steps=self.total, eta_seconds=left))

    def _tell_draw(self) -> None:
        for line in account.draw_told(self.experiment, self.engine, self.parts.work()):
            self._say(line)
        if self.monitor is not None:
            self._write_ticket()

    def _report(self) -> None:
        """Write the page and the heat map of the search, where there was one."""
        ticket = self.engine.ticket
        searched = self.engine.progress.search.steps if ticket is None else ticket.search
        if self.monitor is None or not searched:
            return
        folder = report.write(self.folder)
        self.monitor.picture("search/masks", (folder / "masks.png").read_bytes(), step=self.step)

    def _write_ticket(self) -> None:
        """Write ticket.json, or remove one that a run before this resume had drawn later than here. Rank 0
        only."""
        path = self.folder / "ticket.json"
        if self.engine.ticket is not None:
            self.engine.ticket.save(path)
        else:
            path.unlink(missing_ok=True)

    def _say(self, text: str) -> None:
        if self.monitor is not None:
            self.monitor.say(text)

    # --- small things ---

    def _first_sample(self, at: At) -> int:
        """Position of a step's first sample since the start of the run."""
        return at.samples_before + self.memory.passed.get(str(at.settings.sequence_length), 0)

    def _at(self, step: int) -> At:
        return schedule.at(min(step, self.total - 1), phases=self.experiment.phases)

    def _device(self) -> torch.device:
        return torch.device(self.engine.device)


def _key(*numbers: int) -> int:
    """A 63-bit seed from a tuple of numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
