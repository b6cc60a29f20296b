"""What a tuned model says to the rows that it is judged by, on all ranks.

A signal is heard between two batches: with tens of thousands of rows an evaluation takes longer than a
scheduler waits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from earlybert import dist
from earlybert.engine import Engine
from earlybert.tasks import Logits, Rows, Task


class Interrupted(Exception):
    """A rank was asked to stop; raised on all of them in the same place."""


def logits(
    engine: Engine,
    task: Task,
    rows: Rows,
    *,
    batch: int,
    pad: int,
    asked: Callable[[], bool],
    mark: Callable[[], None],
) -> list[Logits]:
    """What the model says to each row, on every rank. Collective.

    `batch`: rows of a forward pass; `asked`: whether this rank is to stop; `mark` is called before each
    batch. Raises Interrupted.
    """
    ranks, own = dist.world_size(), []
    # Rows of like lengths go together, and each rank gets as many batches as the others.
    order = sorted(range(len(rows)), key=lambda row: len(rows.input_ids[row]))
    batches = [order[first : first + batch] for first in range(0, len(order), batch)]
    engine.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(batches), ranks):
                mark()
                stop = torch.tensor([float(asked())], device=dist.collective_device())
                if dist.sum_over_ranks(stop).item():
                    raise Interrupted
                mine = batches[first + dist.rank()] if first + dist.rank() < len(batches) else []
                given = rows.collate(mine or order[:1], pad=pad, targets=False)
                output = engine(**moved(given, engine.device))
                if mine:
                    own += list(zip(mine, task.logits(output, given["attention_mask"]), strict=True))
    finally:
        engine.train()
    told = dict(pair for pairs in dist.gather_objects(own) for pair in pairs)
    return [told[row] for row in range(len(rows))]


def moved(batch: dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """A batch on `device`."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
