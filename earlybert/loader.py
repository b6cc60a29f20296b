"""Micro-batches of samples: each rank's share of them, made ahead by workers, and the exact position.

Global batch k holds the same rows with the same masks on any number of ranks, and the loader's whole state
is a `Position`.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from earlybert.data import PackedSamples, Position
from earlybert.masking import IGNORED

MicroBatch = dict[str, torch.Tensor]
Rows = dict[str, np.ndarray]

_PREFETCHED = 4  # micro-batches a worker


class Loader:
    """This rank's micro-batches, without end, from a position on.

    With G = micro_batch * micro_batches, global batch k is the samples at positions [k * G, (k + 1) * G) and
    its micro-batch m of rank r the slice number m * world_size + r of them. The union over ranks and
    micro-batches depends on G alone, and `position` counts what was handed out, never what a worker has
    prefetched. `micro_batches`: of the global batch; None means accumulation * world_size. Where it is less,
    the slices past it are handed out as copies of the rank's slice before, to be given no weight. Call
    `close`.
    """

    def __init__(
        self,
        samples: PackedSamples,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        micro_batches: int | None = None,
        position: Position | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.samples = samples
        self._accumulation = accumulation
        micro_batches = micro_batches or accumulation * world_size
        self._global_batch = micro_batch * micro_batches
        self._start = 0 if position is None else samples.consumed(position)
        self._handed = 0
        slices = _MicroBatches(
            samples,
            start=self._start,
            micro_batch=micro_batch,
            micro_batches=micro_batches,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
        )
        # Small arrays come through a worker's pipe in a quarter of the time of tensors, each of which is a
        # file of shared memory to hand over and to map; but only tensors are pinned by the loader's thread.
        self._arrays = not pin_memory
        # The loader draws its base seed from a generator: its own, or dropout's stream would move by one.
        batches: DataLoader[Any] = DataLoader(
            slices,
            sampler=_Numbers(),
            batch_size=None,
            collate_fn=_as_they_are if self._arrays else None,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=_PREFETCHED if workers else None,
            worker_init_fn=functools.partial(_begin_worker, os.getpid()),
            multiprocessing_context="forkserver" if workers else None,  # loader_server says why
            generator=torch.Generator(),
        )
        self._batches: Iterator[Any] | None = iter(batches)
        atexit.register(self.close)

    @property
    def position(self) -> Position:
        """The position behind the last global batch that was handed out whole."""
        return self.samples.position(self._start + self._handed // self._accumulation * self._global_batch)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> MicroBatch:
        assert self._batches is not None, "the loader was closed"
        batch = next(self._batches)
        self._handed += 1
        return _tensors(batch) if self._arrays else batch

    def close(self) -> None:
        """Stop the workers; calling again does nothing."""
        self._batches = None  # the last reference: the iterator stops and joins its workers
        atexit.unregister(self.close)


def prepare_workers() -> None:
    """Start the server that workers come from, so that it is ready when the first loader wants some."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["earlybert.loader_server"])
    forkserver.ensure_running()


def held_out_batches(
    samples: PackedSamples, *, micro_batch: int, rank: int, world_size: int, limit: int | None = None
) -> Iterator[MicroBatch]:
    """Yield this rank's share of the first `limit` held-out samples, in a fixed order with fixed masks.

    Every rank gets the same number of micro-batches of the same shape: where the samples do not fill the
    last ones, rows with nothing but -100 as labels (also as next_sentence_label) stand in, so a sum over
    ranks counts each sample once.
    """
    count = len(samples) if limit is None else min(limit, len(samples))
    share = micro_batch * world_size
    for start in range(rank * micro_batch, -(-count // share) * share, share):
        places = np.arange(start, start + micro_batch)
        absent = places >= count
        ids, epochs = samples.ids(np.where(absent, 0, places))
        rows = samples.rows(ids, epochs=epochs)
        rows["masked_labels"][absent] = IGNORED
        rows["masked_positions"][absent] = 0
        if "next_sentence_label" in rows:
            rows["next_sentence_label"][absent] = IGNORED
        yield _tensors(rows)


class _MicroBatches(Dataset[Rows]):
    """Micro-batch number i of one rank, counted from the loader's start."""

    def __init__(
        self,
        samples: PackedSamples,
        *,
        start: int,
        micro_batch: int,
        micro_batches: int,
        accumulation: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._samples, self._start, self._micro_batch = samples, start, micro_batch
        self._micro_batches = micro_batches
        self._accumulation, self._rank, self._world_size = accumulation, rank, world_size

    def __getitem__(self, index: int) -> Rows:
        batch, m = divmod(index, self._accumulation)
        number = m * self._world_size + self._rank
        if number >= self._micro_batches:
            number -= self._world_size
        first = self._start + (batch * self._micro_batches + number) * self._micro_batch
        ids, epochs = self._samples.ids(np.arange(first, first + self._micro_batch))
        return self._samples.rows(ids, epochs=epochs)


class _Numbers:
    """0, 1, 2, ... for a DataLoader that never ends."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def _tensors(rows: Rows) -> MicroBatch:
    return {name: torch.from_numpy(array) for name, array in rows.items()}


def _as_they_are(rows: Any) -> Any:
    return rows


def _begin_worker(owner: int, _worker: int) -> None:
    """A worker lives exactly as long as its rank needs it; `owner` is the rank's process."""
    # A scheduler signals every process of a job. The training process stops at a step boundary and then
    # closes its workers; workers that died at once would break the step that it is finishing.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        life = os.pidfd_open(owner)
    except ProcessLookupError:
        os._exit(0)
    say = sys.excepthook

    def unless_gone(*error: Any) -> None:
        """A killed rank breaks the worker's pipes: nothing to report."""
        if not select.select([life], [], [], 1.0)[0]:
            say(*error)

    sys.excepthook = unless_gone
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()


def _end_with(life: int) -> None:
    """Leave when the rank is gone, killed or not: the server stays as long as a worker does."""
    select.select([life], [], [])
    os._exit(0)
