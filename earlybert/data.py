"""From a corpus to micro-batches: samples by number, each rank's share of them, and the exact position.

A sample is a pure function of (corpus, settings, seed, epoch, sample id) and the order of an epoch is a
keyed permutation, so global batch k holds the same rows with the same masks on any number of ranks, and the
loader's whole state is a `Position`. The surprise: a global batch may cross from one epoch into the next;
nothing is dropped at the seam and no row comes twice in an epoch.

Shapes: B rows of a micro-batch, T sequence length, P positions to guess a row.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from earlybert.config import EarlyBertError, SettingsError
from earlybert.masking import IGNORED, Vocabulary, mask, predictions_a_row, read_vocabulary, words_a_row
from earlybert.order import key_of, permute, scramble, words
from earlybert.packing import Pairs, Pieces
from earlybert.shards import Corpus

Objective = Literal["mlm", "mlm+nsp", "mlm+sop"]
Split = Literal["train", "held_out"]
MicroBatch = dict[str, torch.Tensor]

_RECIPE = 1  # part of every fingerprint: raise it when packing, order or masking give other samples
_PREFETCHED = 4  # micro-batches a worker


@dataclass(frozen=True)
class DataSettings:
    """What the model reads and what it must guess."""

    corpus: str
    """The corpus folder, as scripts/prepare.py wrote it."""
    objective: Objective = "mlm"
    """Masked tokens alone, or with next-sentence (BERT) or sentence-order (ALBERT) prediction."""
    mask_probability: float = 0.15
    """The share of a row's tokens to guess."""
    whole_word: bool = False
    """Mask all wordpieces of a word or none."""
    held_out: float = 0.005
    """The share of documents that is never trained on, chosen by a hash of their index; at least one."""
    workers: int = 1
    """Processes a rank that prepare micro-batches ahead; 0 prepares them in the training process."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability < 1:
            raise SettingsError(
                f"mask_probability = {self.mask_probability}: choose between 0 and 1, such as 0.15"
            )
        if not 0 < self.held_out < 1:
            raise SettingsError(f"held_out = {self.held_out}: choose a share between 0 and 1, such as 0.005")
        if self.workers < 0:
            raise SettingsError(f"workers = {self.workers}: choose 0 or more")


@dataclass(frozen=True)
class Position:
    """Where in the data a run is: `dataclasses.asdict` turns it into JSON, its keywords bring it back."""

    epoch: int
    consumed: int
    """Samples of this epoch that all ranks together have taken."""
    fingerprint: str
    """`PackedSamples.fingerprint` of the data that the position counts in."""


class PackedSamples:
    """The samples of one split at one sequence length, made on demand and by number.

    `packing` says what a row holds. The held-out split ignores `seed`: its rows and masks are the same in
    every run, so that held-out losses compare.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        settings: DataSettings,
        sequence_length: int,
        seed: int,
        split: Split = "train",
    ) -> None:
        if sequence_length < 8:
            raise SettingsError(f"sequence_length = {sequence_length}: choose at least 8")
        if not 0 <= seed < 1 << 63:
            raise SettingsError(f"seed = {seed}: choose a whole number from 0 to 2**63 - 1")
        self.corpus, self.settings, self.split = corpus, settings, split
        self.sequence_length = sequence_length
        self.seed = seed if split == "train" else 0
        self.vocabulary = read_vocabulary(corpus.tokenizer_folder)
        self.predictions = predictions_a_row(sequence_length, probability=settings.mask_probability)
        """P, the width of `masked_positions`."""
        documents = split_documents(corpus, settings=settings, split=split)
        self._packing = _packing(corpus, settings.objective, documents, sequence_length, self.vocabulary)
        self._count = len(self._packing)
        if not self._count:
            larger = " or a larger held_out" if split == "held_out" else ""
            raise EarlyBertError(
                f"the {split} split of {corpus.folder} has {len(documents)} documents with "
                f"{int(corpus.document_lengths[documents].sum())} tokens, too few for one sample of "
                f"{sequence_length} tokens with objective {settings.objective!r}; use a larger corpus, a "
                f"shorter sequence length{larger}"
            )
        self.fingerprint = self._fingerprint()
        """sha256 of all that decides what sample i of epoch e holds, and of the order."""

    def __len__(self) -> int:
        return self._count

    def ids(self, consumed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (sample ids, epochs) of positions counted from the start of the run."""
        epochs, positions = np.divmod(np.asarray(consumed, dtype=np.int64), self._count)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            key = key_of("order", self.split, self.seed, epoch)
            ids[here] = permute(positions[here], length=self._count, key=key)
        return ids, epochs

    def documents_of(self, sample: int) -> list[int]:
        """Indices in the corpus of the documents that a sample is made of."""
        return self._packing.documents_of(sample)

    def rows(self, ids: np.ndarray, *, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Make the samples `ids` as they are in `epochs`: arrays of int64, one row a sample.

        input_ids [B,T], masked_positions [B,P], masked_labels [B,P] (-100 in free slots); pair objectives add
        token_type_ids [B,T], attention_mask [B,T] and next_sentence_label [B].
        """
        B, T = len(ids), self.sequence_length
        tokens_BT = np.full((B, T), self.vocabulary.pad, dtype=np.int64)
        words_BW = np.empty((B, words_a_row(T, predictions=self.predictions)), dtype=np.uint64)
        pairs: dict[str, np.ndarray] = {}
        if isinstance(self._packing, Pairs):
            pairs["token_type_ids"] = np.zeros((B, T), dtype=np.int64)
            pairs["next_sentence_label"] = np.empty(B, dtype=np.int64)
        for row, (sample, epoch) in enumerate(zip(ids.tolist(), epochs.tolist(), strict=True)):
            words_BW[row] = self._words("mask", words_BW.shape[1], epoch=epoch, sample=sample)
            if isinstance(self._packing, Pairs):
                chance = self._words("pair", 4, epoch=epoch, sample=sample).tolist()
                label = self._packing.fill(
                    tokens_BT[row], pairs["token_type_ids"][row], sample, chance=chance
                )
                pairs["next_sentence_label"][row] = label
            else:
                self._packing.fill(tokens_BT[row], sample)
        input_ids_BT, positions_BP, labels_BP = mask(
            tokens_BT,
            self.vocabulary,
            words_BW=words_BW,
            probability=self.settings.mask_probability,
            predictions=self.predictions,
            whole_word=self.settings.whole_word,
        )
        if isinstance(self._packing, Pairs):
            pairs["attention_mask"] = (tokens_BT != self.vocabulary.pad).astype(np.int64)
        return {
            "input_ids": input_ids_BT,
            "masked_positions": positions_BP,
            "masked_labels": labels_BP,
            **pairs,
        }

    def position(self, consumed: int) -> Position:
        """Turn samples consumed since the start of the run into a position."""
        return Position(consumed // self._count, consumed % self._count, self.fingerprint)

    def consumed(self, position: Position) -> int:
        """Turn a position into samples consumed since the start; raises EarlyBertError if of other data."""
        if position.fingerprint != self.fingerprint:
            raise EarlyBertError(
                f"the position in the data was counted with fingerprint {position.fingerprint[:12]}, "
                f"{self.corpus.folder} with these settings has {self.fingerprint[:12]}; restore the corpus, "
                "seed, sequence length, objective, mask and held_out settings of the run, or start a new run"
            )
        return position.epoch * self._count + position.consumed

    def _words(self, purpose: str, count: int, *, epoch: int, sample: int) -> np.ndarray:
        return words(count, seed=self.seed, purpose=f"{self.split} {purpose}", epoch=epoch, sample=sample)

    def _fingerprint(self) -> str:
        manifest, settings = self.corpus.manifest, self.settings
        decides = {
            "recipe": _RECIPE,
            "corpus": manifest.content,
            "split": self.split,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "objective": settings.objective,
            "mask_probability": settings.mask_probability,
            "whole_word": settings.whole_word,
            "held_out": settings.held_out,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode("utf-8")).hexdigest()


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
        # The loader draws its base seed from a generator: its own, or dropout's stream would move by one.
        batches: DataLoader[Any] = DataLoader(
            slices,
            sampler=_Numbers(),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=_PREFETCHED if workers else None,
            worker_init_fn=functools.partial(_begin_worker, os.getpid()),
            multiprocessing_context="forkserver" if workers else None,  # loader_server says why
            generator=torch.Generator(),
        )
        self._batches: Iterator[MicroBatch] | None = iter(batches)
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
        return batch

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


def split_documents(corpus: Corpus, *, settings: DataSettings, split: Split) -> np.ndarray:
    """Return the documents of a split, ascending.

    Both splits have at least one, and at least two where B comes from another document.
    """
    count = len(corpus)
    least = 2 if settings.objective == "mlm+nsp" else 1
    if count < 2 * least:
        raise EarlyBertError(
            f"{corpus.folder} has {count} documents, objective {settings.objective!r} with a held-out split "
            f"needs {2 * least}; prepare a larger corpus"
        )
    held = min(max(round(count * settings.held_out), least), count - least)
    hashes = scramble(np.arange(count, dtype=np.uint64), key=key_of("held out"))
    chosen = np.zeros(count, dtype=bool)
    chosen[np.argpartition(hashes, held - 1)[:held]] = True
    return np.flatnonzero(chosen if split == "held_out" else ~chosen)


def check_vocabulary(corpus: Corpus, *, vocab_size: int, tokenizer_sha256: str | None = None) -> None:
    """Raise EarlyBertError if the model has too few rows for the corpus, or another tokenizer."""
    manifest = corpus.manifest
    if vocab_size < manifest.vocab_size:
        raise EarlyBertError(
            f"the model has vocab_size {vocab_size}, {corpus.folder} was written with {manifest.vocab_size} "
            f"tokens; set it to {manifest.vocab_size} or more, or prepare the corpus with the model's "
            "tokenizer"
        )
    if tokenizer_sha256 is not None and tokenizer_sha256 != manifest.tokenizer_sha256:
        raise EarlyBertError(
            f"the model's tokenizer has sha256 {tokenizer_sha256[:12]}, {corpus.folder} was written with "
            f"{manifest.tokenizer_sha256[:12]}; prepare the corpus with the model's tokenizer"
        )


def _packing(
    corpus: Corpus, objective: Objective, documents: np.ndarray, sequence_length: int, vocabulary: Vocabulary
) -> Pieces | Pairs:
    if objective == "mlm":
        return Pieces(corpus, documents=documents, sequence_length=sequence_length, vocabulary=vocabulary)
    return Pairs(
        corpus,
        documents=documents,
        sequence_length=sequence_length,
        vocabulary=vocabulary,
        task="nsp" if objective == "mlm+nsp" else "sop",
    )


class _MicroBatches(Dataset[MicroBatch]):
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

    def __getitem__(self, index: int) -> MicroBatch:
        batch, m = divmod(index, self._accumulation)
        number = m * self._world_size + self._rank
        if number >= self._micro_batches:
            number -= self._world_size
        first = self._start + (batch * self._micro_batches + number) * self._micro_batch
        ids, epochs = self._samples.ids(np.arange(first, first + self._micro_batch))
        return _tensors(self._samples.rows(ids, epochs=epochs))


class _Numbers:
    """0, 1, 2, ... for a DataLoader that never ends."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def _tensors(rows: dict[str, np.ndarray]) -> MicroBatch:
    return {name: torch.from_numpy(array) for name, array in rows.items()}


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
