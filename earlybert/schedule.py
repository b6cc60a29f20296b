"""Phases: how many steps, which sequence length and batch, and the learning rate at each step, as pure
functions.

`schedule.at(step)` is all there is: nothing here remembers a position, so a resume cannot get it wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from earlybert.config import SettingsError


@dataclass(frozen=True)
class PhaseSettings:
    """One `[[phases]]` table: a stretch of training with its own length, batch and learning-rate curve."""

    steps: int
    """Optimizer steps."""
    sequence_length: int
    """Tokens a sequence, [CLS] and [SEP] among them."""
    batch: int
    """Sequences an optimizer step, over all ranks and accumulation steps."""
    micro_batch: int
    """Sequences a rank works on at a time."""
    learning_rate: float
    """Peak learning rate."""
    warmup: float = 0.1
    """Share of the phase's steps over which the rate rises linearly from 0."""
    decay: Literal["linear", "polynomial", "constant", "stable"] = "linear"
    """Shape of the fall after the warm-up; "polynomial" is (1 - t) ** power; "stable" keeps the peak, then
    falls as 1 - sqrt(t) in the phase's last `decay_share`."""
    decay_share: float = 0.2
    """Share of the phase's steps in which a "stable" rate falls."""
    power: float = 0.5
    """Exponent of the polynomial decay (0.5 in the LAMB recipe of docs/method.md section 3)."""
    end_learning_rate: float = 0.0
    """Rate towards which the decay falls; it would be reached one step after the phase's last."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.batch % self.micro_batch:
            lower = self.batch // self.micro_batch * self.micro_batch
            near = f"{lower} or {lower + self.micro_batch}" if lower else f"{self.micro_batch}"
            fits = max(m for m in range(1, self.micro_batch + 1) if self.batch % m == 0)
            raise SettingsError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; use batch {near}, "
                f"or micro_batch {fits}"
            )
        if self.sequence_length < 8:
            raise SettingsError(f"sequence_length = {self.sequence_length}: must be at least 8")
        if self.learning_rate <= 0 or self.end_learning_rate < 0:
            raise SettingsError(
                f"learning_rate = {self.learning_rate}, end_learning_rate = {self.end_learning_rate}: "
                "need learning_rate > 0 and end_learning_rate >= 0"
            )
        if not 0 <= self.warmup < 1:
            raise SettingsError(f"warmup = {self.warmup}: a share of the phase's steps, in [0, 1)")
        if self.power <= 0:
            raise SettingsError(f"power = {self.power}: must be positive, or the rate would not fall")
        # 1 - 0.8 is a little less than 0.2.
        if self.decay == "stable" and not 0 < self.decay_share <= 1 - self.warmup + 1e-9:
            raise SettingsError(
                f"decay_share = {self.decay_share}: a share of the phase's steps, above 0 and, beside a "
                f"warmup of {self.warmup}, at most {1 - self.warmup:g}"
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step, over all ranks."""
        return self.batch // self.micro_batch

    def accumulation(self, *, world_size: int) -> int:
        """Micro-batches a rank adds up before an optimizer step.

        Where they do not divide by the ranks, the last round of some ranks is idle (its loss weighs nothing).
        Raises SettingsError where a rank would never have any.
        """
        if world_size > self.micro_batches:
            raise SettingsError(
                f"batch {self.batch} in micro-batches of {self.micro_batch} gives {self.micro_batches} of "
                f"them, too few for {world_size} ranks; use at most {self.micro_batches} ranks, or a smaller "
                "phases.micro_batch"
            )
        return -(-self.micro_batches // world_size)

    def idle_share(self, *, world_size: int) -> float:
        """Share of all ranks' rounds that is idle."""
        return 1 - self.micro_batches / (self.accumulation(world_size=world_size) * world_size)

    def rate(self, step: int) -> float:
        """Learning rate of the phase's `step`-th optimizer step, counted from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        if self.decay == "constant":
            return self.learning_rate
        if self.decay == "stable":
            falling = max(1, round(self.decay_share * self.steps))
            shape = 1 - max(0.0, 1 - (self.steps - step) / falling) ** 0.5
        else:
            left = 1 - (step - rising) / max(1, self.steps - rising)
            shape = left if self.decay == "linear" else left**self.power
        return self.end_learning_rate + (self.learning_rate - self.end_learning_rate) * shape


@dataclass(frozen=True)
class At:
    """Where an optimizer step stands."""

    phase: int
    """Index of the phase."""
    step_in_phase: int
    settings: PhaseSettings
    learning_rate: float
    samples_before: int
    """Sequences of this length consumed before this step, in this phase and in earlier ones of the same
    length."""


def total_steps(phases: tuple[PhaseSettings, ...]) -> int:
    return sum(phase.steps for phase in phases)


def mean_length(phases: tuple[PhaseSettings, ...]) -> float:
    """Sequence length, weighted by the tokens that are trained at it."""
    tokens = [phase.steps * phase.batch * phase.sequence_length for phase in phases]
    return sum(t * phase.sequence_length for t, phase in zip(tokens, phases, strict=True)) / sum(tokens)


def at(step: int, *, phases: tuple[PhaseSettings, ...]) -> At:
    """Where optimizer step `step` (counted from 0) stands in the phases; IndexError past the end."""
    first = 0
    for index, phase in enumerate(phases):
        if step < first + phase.steps:
            inside = step - first
            earlier = sum(
                p.steps * p.batch for p in phases[:index] if p.sequence_length == phase.sequence_length
            )
            return At(index, inside, phase, phase.rate(inside), earlier + inside * phase.batch)
        first += phase.steps
    raise IndexError(f"step {step} lies past the last of {first}")
