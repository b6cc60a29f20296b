"""The pretraining run: one loop over optimizer steps, from an empty folder or from the newest good
checkpoint.

Everything random is keyed by (seed, step, micro-batch of the global batch) or by (seed, epoch, sample), and
the data position is a pure function of the step, so a resumed run repeats the interrupted one to the last
bit. What the ranks must agree on (stop, broken numbers) travels in the one reduction a step that also sums
the loss.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from earlybert import checkpoint, dist, faults, guard, mechanics, report, run, schedule, targets
from earlybert.adapters import enable_checkpointing
from earlybert.config import EarlyBertError
from earlybert.data import (
    Loader,
    MicroBatch,
    PackedSamples,
    check_vocabulary,
    held_out_batches,
    prepare_workers,
)
from earlybert.engine import EarlyBird, Engine, ParameterGroups, Progress, initialize
from earlybert.experiment import Experiment
from earlybert.lifecycle import check_config, empty_module
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining, seeded_model
from earlybert.monitor import Monitor, duration, progress_line
from earlybert.optim import Lamb
from earlybert.schedule import At
from earlybert.shards import Corpus, tokenizer_sha256
from earlybert.watch import RankLost, Watch

STOPPED = 143
"""Exit status of a run that SIGTERM or SIGINT ended after a checkpoint: the same command goes on."""


@dataclass
class _Sums:
    """Sums since the last progress line; stored in checkpoints, so that a line may span a resume."""

    loss: float = 0.0
    correct: float = 0.0
    counted: float = 0.0
    micro_batches: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Memory:
    """What the trainer itself must remember across a resume; everything else follows from the step."""

    sums: _Sums = field(default_factory=_Sums)
    trained_seconds: float = 0.0
    """Time in training steps and draws, evaluations and saves not counted."""
    eval_losses: dict[str, float] = field(default_factory=dict)
    """{step: held-out loss}."""
    recent: list[float] = field(default_factory=list)
    """Good losses of the last steps of this phase and shape, for the guard."""
    bad_steps: int = 0
    """In a row, up to now."""
    passed: dict[str, int] = field(default_factory=dict)
    """{sequence length: samples that roll-backs have passed by}."""


class _GoBack(Exception):
    """A step's numbers are bad and the run goes back to a checkpoint."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    stopped: bool
    """True where a signal ended it before its last step."""
    eval_losses: dict[int, float]
    """{step: held-out loss}."""


def train(experiment: Experiment, mechanics_values: dict[str, Any], *, where: str) -> Result:
    """Run an experiment to its end, or until SIGTERM or SIGINT. Collective.

    `mechanics_values` is the DeepSpeed JSON, `where` the experiment file's name for messages. Raises
    EarlyBertError for whatever the user can mend, before the first step wherever it can be known by then.
    """
    trainer = _Trainer(experiment, mechanics_values, where=where)
    why = "it stopped"
    try:
        return trainer.run()
    except RuntimeError as error:
        # What a collective says when another rank is gone is a matter of sockets: say which rank.
        if (lost := trainer.watch.lost()) is None:
            why = str(error)
            raise
        raise RankLost(f"{lost}; the same command goes on from the newest checkpoint") from error
    except EarlyBertError as error:
        why = str(error)
        raise
    finally:
        trainer.watch.leave(why)
        trainer.close()


class _Trainer:
    def __init__(self, experiment: Experiment, mechanics_values: dict[str, Any], *, where: str) -> None:
        self.experiment, self.mechanics = experiment, mechanics_values
        self.stage = mechanics.stage_of(mechanics_values)
        self.precision = mechanics.precision_of(mechanics_values)
        self.total = schedule.total_steps(experiment.phases)
        self.monitor: Monitor | None = None
        self.memory = _Memory()
        self.stop_requested = False
        self.warming = 1.0
        if experiment.data.workers:
            prepare_workers()
        run.check_cores()
        for phase in range(len(experiment.phases)):
            check_config(self._deepspeed_config(phase), where=experiment.deepspeed)
        self.corpus = Corpus.open(experiment.data.corpus, verify="size")
        self._check_shards()
        vocabulary = self.corpus.manifest.vocab_size
        check_vocabulary(
            self.corpus,
            vocab_size=vocabulary,
            tokenizer_sha256=tokenizer_sha256(self.corpus.tokenizer_folder),
        )
        self.samples = {
            (split, length): PackedSamples(
                self.corpus,
                settings=experiment.data,
                sequence_length=length,
                seed=experiment.seed,
                split=split,
            )
            for split in ("train", "held_out")
            for length in sorted({phase.sequence_length for phase in experiment.phases})
        }
        if experiment.ticket.enabled:
            targets.check(experiment.ticket, dense=experiment.dense_widths, work=self._work())
        corpus = self.corpus.manifest.content
        self.claim = run.claim(experiment, corpus=corpus, where=where)
        self.folder = self.claim.folder
        checkpoints = self.folder / "checkpoints"
        self._find()
        self.saver = checkpoint.Saver(
            checkpoints,
            experiment=experiment.fingerprint,
            corpus=corpus,
            stage=self.stage,
            precision=self.precision,
            keep=experiment.checkpoint.keep,
            good=[] if self.found is None else [self.found.folder.name],
        )
        if dist.rank() == 0:
            run.describe(experiment, mechanics_values, corpus=corpus)
        self.rolled_back: list[int] = []
        """Steps to which this start has gone back, as long as it is the same one."""
        self.engine = self._start_engine()
        self.watch = Watch(self.folder, seconds=experiment.hang_seconds)

    def run(self) -> Result:
        self._begin()
        stopped = False
        with self._signals():
            while self.step < self.total and not stopped:
                at = self._at(self.step)
                if at.phase != self.phase:
                    self._change_phase(at)
                try:
                    with contextlib.closing(self._loader(at)) as batches:
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

    def _find(self) -> None:
        """The newest good checkpoint and what follows from it: step and phase. Collective."""
        self.found = checkpoint.newest_good(
            self.folder / "checkpoints", of=(self.experiment.fingerprint, self.corpus.manifest.content)
        )
        if self.found is not None:
            checkpoint.same_precision(self.found.manifest, precision=self.precision)
        self.step = 0 if self.found is None else self.found.manifest.step
        self.phase = self._at(self.step).phase

    def _begin(self) -> None:
        """Open the run's records where the step is, and evaluate what was not trained yet. Collective."""
        if dist.rank() == 0:
            self.monitor = Monitor(self.folder, resume_step=None if self.found is None else self.step)
            self._write_ticket()
        self._announce()
        if self.found is None:
            eval_loss = self._evaluate()
            if self.monitor is not None:
                self.monitor.record({"step": 0, "phase": 0, "eval_loss": eval_loss})

    def close(self) -> None:
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
            if drawn:
                self.memory.recent = []
                self._tell_draw()
            evaluate = drawn or self.step == self.total or self.step % settings.evaluate.every == 0
            eval_loss = self._evaluate() if evaluate else None
            if evaluate or end or self.step % settings.log_every == 0:
                self._log(at, eval_loss=eval_loss)
            last = stop or self.step == self.total
            if last or drawn or self.step % settings.checkpoint.every == 0:
                self._save(wait=last)
            if drawn or self.step == self.total:
                self._report()
            if stop and self.step < self.total:
                return True
        return False

    def _train_step(self, batches: Iterator[MicroBatch], at: At) -> bool:
        """Take one optimizer step; return True where any rank was asked to stop. Collective.

        Raises _GoBack where its numbers are bad and the settings say so, before any update.
        """
        began = time.perf_counter()
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
            batch = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
            taken.append(batch)
            number = micro * ranks + dist.rank()
            torch.manual_seed(_key(self.experiment.seed, self.step, number))
            self.watch.mark(f"step {self.step + 1}: micro-batch {micro + 1} of {accumulation}")
            output = engine(**batch)
            loss = output.loss * math.nan if faults.point("step.loss") else output.loss
            # DeepSpeed takes the mean over all rounds of all ranks, idle ones among them.
            weight = accumulation * ranks / micros if number < micros else 0.0
            engine.backward(loss if weight == 1 else loss * weight)
            if number < micros:
                sums[:3] += torch.stack(
                    [loss.detach().double(), output.correct.double(), output.counted.double()]
                )
            del output, loss  # they refer to the engine, which a draw in `step` must be able to free
            if micro < accumulation - 1:
                engine.step()
        self.stop_requested |= self.claim.stop_asked()
        sums[3] = float(self.stop_requested)
        sums[4] = float(self.saver.writing)
        total, correct, counted, stop, writing = dist.sum_over_ranks(
            sums.to(dist.collective_device())
        ).tolist()
        self.watch.mark(f"step {self.step + 1}: update")
        faults.point("step.update")
        memory, line = self.memory, self.memory.sums
        bad = self._update(total / micros, taken, at)
        self.step += 1
        if self.saver.pending and not writing:
            self.saver.commit()
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
            if engine.skipped_steps == skipped or self.precision == "fp16":
                return None
            bad = f"the loss is {loss:.3f}, its gradient is not finite"
        else:
            bad += "; " + guard.suspects(
                engine,
                taken,
                self.samples["train", at.settings.sequence_length],
                first=self._first_sample(at),
                micro_batches=at.settings.micro_batches,
                worst=loss if math.isfinite(loss) else math.inf,
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
        bad = self.step
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
        self.engine = self._start_engine()
        for step in range(self.step, bad + 1):
            phase = self._at(step).settings
            key = str(phase.sequence_length)
            self.memory.passed[key] = self.memory.passed.get(key, 0) + phase.batch
        if self.monitor is not None:
            self.monitor.close()
        self._begin()
        self._say(
            f"{why}; gone back to step {self.step}, past the batches of steps {self.step + 1} to {bad + 1}"
        )

    def _change_phase(self, at: At) -> None:
        self.phase = at.phase
        self.memory.recent = []  # another length, another loss
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
        samples = self.samples["held_out", phase.sequence_length]
        batches = held_out_batches(
            samples,
            micro_batch=phase.micro_batch,
            rank=dist.rank(),
            world_size=dist.world_size(),
            limit=self.experiment.evaluate.samples,
        )
        engine, device = self.engine, self._device()
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        engine.eval()
        with torch.no_grad():
            for batch in batches:
                self.watch.mark(f"evaluation after step {self.step}")
                batch.pop("next_sentence_label", None)  # the held-out loss is the masked-LM loss
                output = engine(**{key: value.to(device) for key, value in batch.items()})
                counted = output.counted.double()
                loss = torch.where(counted > 0, output.loss.double() * counted, 0.0)
                sums += torch.stack([loss, counted])
        engine.train()
        total, counted = dist.sum_over_ranks(sums.to(dist.collective_device())).tolist()
        eval_loss = total / max(1.0, counted)
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
        if wait and self.saver.failed is not None:
            raise EarlyBertError(
                f"the checkpoint of step {self.step} could not be saved ({self.saver.failed}); make room, "
                "then start the same command again: it goes on from the checkpoint before"
            )

    # --- start ---

    def _start_engine(self) -> Engine:
        """The dense model from its seed, or the shape and state of the checkpoint."""
        settings, found = self.experiment, self.found
        self.memory = _Memory()
        if found is None:
            dense = settings.model.config(
                vocab_size=self.corpus.manifest.vocab_size,
                next_sentence=settings.data.objective != "mlm",
                coefficients="train" if settings.ticket.enabled and settings.ticket.searches else "none",
            )
            model: torch.nn.Module = seeded_model(dense, seed=settings.seed)
            progress, restored = Progress(), None
        else:
            # The true shape stands in the manifest.
            shape = EarlyBertConfig.from_dict(found.manifest.model)
            model = empty_module(
                lambda: EarlyBertForPreTraining(shape), config=self._deepspeed_config(self.phase)
            )
            progress = Progress.from_json(found.manifest.progress, where=str(found.folder))
            restored = checkpoint.read(found)
        if settings.model.checkpointing:
            enable_checkpointing(model)
        engine = initialize(
            model=model,
            config=self._deepspeed_config(self.phase),
            early_bird=EarlyBird(settings=settings.ticket, seed=settings.seed, work=self._work()),
            optimizer=self._optimizer,
            weight_decay=settings.optimizer.weight_decay,
            progress=progress,
            restored=restored,
        )
        if found is not None:
            checkpoint.verify(engine, found)
            stored = copy.deepcopy(found.manifest.trainer)
            self.memory = _Memory(**{**stored, "sums": _Sums(**stored["sums"])})
        return engine

    def _work(self) -> targets.Work:
        return targets.bert_work(
            hidden=self.experiment.model.hidden,
            heads=self.experiment.model.heads,
            vocabulary=self.corpus.manifest.vocab_size,
            sequence_length=schedule.mean_length(self.experiment.phases),
            predicted=self.experiment.data.mask_probability,
        )

    def _check_shards(self) -> None:
        """Raise EarlyBertError on every rank where a shard's checksum is off; the ranks share the hashing."""
        own = self.corpus.flaws(only=slice(dist.rank(), None, dist.world_size()))
        wrong = [flaw for flaws in dist.gather_objects(own) for flaw in flaws]
        if wrong:
            raise EarlyBertError("; ".join(wrong))

    def _deepspeed_config(self, phase: int) -> dict[str, Any]:
        settings = self.experiment.phases[phase]
        return mechanics.complete(
            self.mechanics,
            micro_batch=settings.micro_batch,
            accumulation=settings.accumulation(world_size=dist.world_size()),
            clipping=self.experiment.optimizer.clipping,
        )

    def _optimizer(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """Both correct their bias as a function of the step count, so a resume is exact."""
        settings = self.experiment.optimizer
        betas, eps = (settings.betas[0], settings.betas[1]), settings.epsilon
        if settings.name == "lamb":
            return Lamb(groups, lr=0.0, betas=betas, eps=eps, trust=(settings.trust[0], settings.trust[1]))
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def _loader(self, at: At) -> Loader:
        samples = self.samples["train", at.settings.sequence_length]
        return Loader(
            samples,
            micro_batch=at.settings.micro_batch,
            micro_batches=at.settings.micro_batches,
            accumulation=at.settings.accumulation(world_size=dist.world_size()),
            rank=dist.rank(),
            world_size=dist.world_size(),
            position=samples.position(self._first_sample(at)),
            workers=self.experiment.data.workers,
            pin_memory=torch.cuda.is_available(),
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While training, SIGTERM and SIGINT ask for a checkpoint and a stop at the next step."""

        def request(number: int, _frame: Any) -> None:
            self.stop_requested = True

        before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- what is shown ---

    def _log(self, at: At, *, eval_loss: float | None) -> None:
        """Close the open line: the mean over all ranks and micro-batches since the last one."""
        sums, self.memory.sums = self.memory.sums, _Sums()
        if self.monitor is None:
            return
        engine = self.engine
        distances = engine.progress.search.distances if engine.searching else ()
        tickets = engine.progress.tickets
        if tickets and tickets[-1].step == self.step:
            distances = tickets[-1].distances
        far_heads, far_neurons = distances[-1][1:] if distances else (None, None)
        config = engine.module.config
        values = {
            "step": self.step,
            "phase": self.phase,
            "loss": sums.loss / sums.micro_batches if sums.micro_batches else None,
            "mlm_accuracy": sums.correct / max(1.0, sums.counted),
            "lr": at.learning_rate * self.warming,
            "grad_norm": engine.grad_norm,
            "tokens_per_second": sums.tokens / sums.seconds,
            "step_seconds": sums.seconds / sums.steps,
            "mask_distance_heads": far_heads,
            "mask_distance_neurons": far_neurons,
            "heads_kept": sum(config.heads_per_layer),
            "neurons_kept": sum(config.neurons_per_layer),
            "parameters": _parameter_count(engine.module),
            "skipped_steps": engine.skipped_steps,
        }
        if self.precision == "fp16":
            values["loss_scale"] = engine.optimizer.loss_scale
        if eval_loss is not None:
            values["eval_loss"] = eval_loss
        if tickets and tickets[-1].step == self.step:
            values["draw_seconds"] = engine.draw_seconds
        self.monitor.record(values)
        left = (self.total - self.step) * sums.seconds / sums.steps
        self.monitor.say(progress_line(values, total_steps=self.total, eta_seconds=left))

    def _announce(self) -> None:
        config = self.engine.module.config
        shape = (
            f"{_parameter_count(self.engine.module):,} parameters, {sum(config.heads_per_layer)} heads, "
            f"{sum(config.neurons_per_layer):,} neurons in {config.num_hidden_layers} layers"
        )
        start = "from its seed" if self.found is None else f"from {self.found.folder}"
        self._say(
            f"{self.experiment.name}: {shape}; {dist.world_size()} ranks, ZeRO-{self.stage}, "
            f"{self.precision}; step {self.step:,} of {self.total:,}, {start}"
        )
        if self.found is not None:
            then = self.found.manifest
            if (then.world_size, then.stage) != (dist.world_size(), self.stage):
                self._say(
                    f"saved by {then.world_size} ranks at ZeRO-{then.stage}: the same samples and masks go "
                    "on, sums are rounded in another order"
                )
        idle = self.experiment.phases[self.phase].idle_share(world_size=dist.world_size())
        if idle:
            micros = self.experiment.phases[self.phase].micro_batches
            self._say(
                f"{micros} micro-batches a step on {dist.world_size()} ranks leave {idle:.0%} of the ranks' "
                "time idle; a phases.micro_batch or a number of ranks that divides would not"
            )

    def _tell_draw(self) -> None:
        ticket, seconds = self.engine.ticket, self.engine.draw_seconds
        assert ticket is not None
        parts = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        work, dense = self._work(), self.experiment.dense_widths
        small = [len(heads) for heads in ticket.heads], [len(neurons) for neurons in ticket.neurons]
        share = work.of(*small) / work.of(dense.heads, dense.neurons)
        self._say(
            f"the small model's step has {share:.3f} of the dense one's FLOPs (encoder matrices, scores, "
            "masked-LM head)"
        )
        self._say(f"drew the ticket at {ticket}; pause {sum(seconds.values()):.2f} s ({parts})")
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


def _parameter_count(module: torch.nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def _key(*numbers: int) -> int:
    """A 63-bit seed from a tuple of numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
