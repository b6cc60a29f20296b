"""Bad numbers: a loss that is not finite, or a spike, is seen before the update and on all ranks alike.

`judge` looks at the mean loss of a step, which the ranks have just summed, so all of them come to the same
verdict without another message. `suspects` then gives each sample of the step to the model alone and names
those whose own loss is bad.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from earlybert import dist
from earlybert.config import SettingsError
from earlybert.data import PackedSamples
from earlybert.loader import MicroBatch

_LEAST_SPREAD = 0.01
"""Of the mean: a plateau's standard deviation may be next to nothing."""
_NAMED = 5
_LOOKED_INTO = 4
"""Micro-batches of a bad step whose samples are tried one by one."""


@dataclass(frozen=True)
class GuardSettings:
    """What happens where a step's numbers are bad (the `[guard]` table)."""

    action: Literal["skip", "roll_back", "stop"] = "skip"
    """Give up the step's update and go on; go back to the newest checkpoint and past the batches since; or
    end the run."""
    spike: float = 0.0
    """A loss so many standard deviations above the mean of the last `window` is a spike, such as 10; 0 looks
    for none. To skip helps against bad batches; where an update before has spoiled the weights, going on or
    rolling back does (LOG.md)."""
    window: int = 100
    """Optimizer steps, all of them good; until there are so many nothing counts as a spike."""
    limit: int = 5
    """Bad steps in a row, or roll-backs to one checkpoint, after which the run ends."""

    def __post_init__(self) -> None:
        if self.spike < 0:
            raise SettingsError(f"spike = {self.spike}: must not be negative; 0 turns it off")
        for name, least in (("window", 2), ("limit", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} = {getattr(self, name)}: must be at least {least}")


def judge(loss: float, recent: Sequence[float], *, settings: GuardSettings) -> str | None:
    """What is bad about a step's mean loss, in words; None where nothing is. `recent`: good losses before."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if settings.spike and len(recent) >= settings.window:
        window = recent[-settings.window :]
        mean = statistics.fmean(window)
        spread = max(statistics.pstdev(window), _LEAST_SPREAD * abs(mean))
        if loss > mean + settings.spike * spread:
            return (
                f"the loss {loss:.3f} is {(loss - mean) / spread:.1f} standard deviations above "
                f"{mean:.3f}, the mean of the last {settings.window} steps"
            )
    return None


def suspects(
    engine: Any,
    batches: Sequence[MicroBatch],
    samples: PackedSamples,
    *,
    first: int,
    micro_batches: int,
    worst: float,
    mark: Callable[[str], None] = lambda what: None,
) -> str:
    """Which samples of a step are bad by themselves, in words. Collective.

    `batches`: this rank's micro-batches; `first`: position of the step's first sample since the start of the
    run; `worst`: a finite own loss above this is bad too; `mark` is told where the search stands. Whole
    micro-batches go first; of those that are bad, or of the worst one, each sample goes through the model
    alone, without dropout.
    """
    own: list[tuple[int, float]] = []
    training = engine.module.training
    engine.eval()
    with torch.no_grad():
        suspected, every = _suspected(engine, batches, worst=worst, mark=mark)
        for micro in suspected:
            batch, number = batches[micro], micro * dist.world_size() + dist.rank()
            rows = len(batch["input_ids"])
            for row in range(rows):
                mark(f"a bad step, sample {row + 1} of {rows} of micro-batch {micro + 1} alone")
                alone = {key: value[row : row + 1].to(engine.device) for key, value in batch.items()}
                loss = float(engine(**alone).loss)
                if number < micro_batches:
                    own.append((first + number * rows + row, loss))
    engine.train(training)
    everyone = sorted(pair for part in dist.gather_objects(own) for pair in part)
    bad = [(place, loss) for place, loss in everyone if not math.isfinite(loss) or loss > worst]
    if not bad:
        return "no sample of the step is bad by itself"
    if every and len(bad) == len(everyone):
        return f"all {len(bad)} samples that were tried alone are bad: it is the weights, not the data"
    ids, epochs = samples.ids(np.array([place for place, _ in bad]))
    named = [
        f"sample {sample} of epoch {epoch} (documents {', '.join(map(str, samples.documents_of(sample)))}), "
        f"loss {loss:.3f}"
        for sample, epoch, (_, loss) in zip(ids.tolist(), epochs.tolist(), bad, strict=True)
    ]
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    where = f"at sequence length {samples.sequence_length}"
    return f"bad by themselves {where}: {'; '.join(named[:_NAMED])}{more}"


def _suspected(
    engine: Any, batches: Sequence[MicroBatch], *, worst: float, mark: Callable[[str], None]
) -> tuple[list[int], bool]:
    """Which micro-batches are looked into, the worst of those that are bad, and whether all are. The same on
    all ranks: at ZeRO-3 each forward pass is all ranks'. Collective."""
    own = []
    for micro, batch in enumerate(batches):
        mark(f"a bad step, micro-batch {micro + 1} of {len(batches)} again")
        whole = {key: value.to(engine.device) for key, value in batch.items()}
        own.append(float(engine(**whole).loss))
    most = [max(losses, key=_badness) for losses in zip(*dist.gather_objects(own), strict=True)]
    bad = sum(not math.isfinite(loss) or loss > worst for loss in most)
    order = sorted(range(len(most)), key=lambda micro: -_badness(most[micro]))
    return sorted(order[: min(max(1, bad), _LOOKED_INTO)]), bad == len(most)


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def plain_norm(inner: Any) -> float | None:
    """The gradients' norm where DeepSpeed steps a bare optimizer (ZeRO-0, fp32) and looks at none.

    Not finite, the gradients are dropped, as DeepSpeed does at every other stage and precision: the step
    is skipped and counted.
    """
    if hasattr(inner.optimizer, "optimizer"):
        return None
    gradients = [p.grad for p in inner.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not math.isfinite(norm):
        inner.module.zero_grad(set_to_none=True)
        inner.skipped_steps += 1
    return norm
