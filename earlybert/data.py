"""From a corpus to samples by number, and which of them stands at a position of the run.

A sample is a pure function of (corpus, settings, seed, epoch, sample id) and the order of an epoch is a
keyed permutation. The surprise: a global batch may cross from one epoch into the next; nothing is dropped at
the seam and no row comes twice in an epoch.

Shapes: B rows, T sequence length, P positions to guess a row.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from earlybert import mixing
from earlybert.config import EarlyBertError, SettingsError
from earlybert.masking import Vocabulary, mask, predictions_a_row, read_vocabulary, words_a_row
from earlybert.mixing import Mixture
from earlybert.order import key_of, permute, scramble, words
from earlybert.packing import Pairs, Pieces
from earlybert.shards import Corpus

Objective = Literal["mlm", "mlm+nsp", "mlm+sop"]
Split = Literal["train", "held_out"]

_RECIPE = 1  # part of every fingerprint: raise it when packing, order or masking give other samples


@dataclass(frozen=True)
class DataSettings:
    """What the model reads and what it must guess."""

    corpus: str
    """The corpus folder, as scripts/prepare.py wrote it."""
    objective: Objective = "mlm"
    """Masked tokens alone, or with next-sentence (BERT) or sentence-order (ALBERT) prediction."""
    mask_probability: float = 0.15
    """The share of a row's tokens to guess."""
    boundaries: bool = False
    """Objective "mlm": tokens attend within their document only, and positions begin anew with each."""
    whole_word: bool = False
    """Mask all wordpieces of a word or none."""
    held_out: float = 0.005
    """The share of documents that is never trained on, chosen by a hash of their index; at least two."""
    weights: dict[str, float] | None = None
    """Of each source of the corpus, in proportion to which its samples are trained on (0: never), such as
    `{ wikipedia = 3, books = 1 }`; by default every document comes once an epoch."""
    workers: int = 1
    """Processes a rank that prepare micro-batches ahead; 0 prepares them in the training process."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability < 1:
            raise SettingsError(
                f"mask_probability = {self.mask_probability}: choose between 0 and 1, such as 0.15"
            )
        if self.boundaries and self.objective != "mlm":
            raise SettingsError(
                f'boundaries = true needs objective = "mlm", a row of whole documents; a pair of objective = '
                f"{self.objective!r} is one context"
            )
        if not 0 < self.held_out < 1:
            raise SettingsError(f"held_out = {self.held_out}: choose a share between 0 and 1, such as 0.005")
        if self.workers < 0:
            raise SettingsError(f"workers = {self.workers}: choose 0 or more")
        for name, weight in (self.weights or {}).items():
            if not 0 <= weight < math.inf:
                raise SettingsError(f"weights.{name} = {weight}: choose 0 or more")
        if self.weights is not None and not any(self.weights.values()):
            raise SettingsError("weights are all 0; give at least one source a weight")


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
        self._packings = [
            self._pack(documents, source) for source, documents in self._documents_by_source().items()
        ]
        counts = list(map(len, self._packings))
        self._count = sum(counts)
        self._mixture: Mixture | None = None
        if self._weights is not None:
            self._mixture = Mixture(
                dict(zip(self._weights, counts, strict=True)), self._weights, key=(split, self.seed)
            )
        self.fingerprint = self._fingerprint()
        """sha256 of all that decides what sample i of epoch e holds, and of the order."""

    def __len__(self) -> int:
        return self._count

    def ids(self, consumed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (sample ids, epochs) of positions counted from the start of the run; with weights, each
        source has epochs of its own."""
        if self._mixture is not None:
            return self._mixture.ids(consumed)
        epochs, positions = np.divmod(np.asarray(consumed, dtype=np.int64), self._count)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            key = key_of("order", self.split, self.seed, epoch)
            ids[here] = permute(positions[here], length=self._count, key=key)
        return ids, epochs

    def documents_of(self, sample: int) -> list[int]:
        """Indices in the corpus of the documents that a sample is made of."""
        packing, number = self._packing_of(sample)
        return packing.documents_of(number)

    def rows(self, ids: np.ndarray, *, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Make the samples `ids` as they are in `epochs`: arrays of int64, one row a sample.

        input_ids [B,T], masked_positions [B,P], masked_labels [B,P] (-100 in free slots); pair objectives add
        token_type_ids [B,T], attention_mask [B,T] and next_sentence_label [B]; `boundaries` adds segments
        [B,T] (the document of each token, counted in its row) and position_ids [B,T].
        """
        B, T = len(ids), self.sequence_length
        tokens_BT = np.full((B, T), self.vocabulary.pad, dtype=np.int64)
        words_BW = np.empty((B, words_a_row(T, predictions=self.predictions)), dtype=np.uint64)
        pairs: dict[str, np.ndarray] = {}
        paired = self.settings.objective != "mlm"
        if paired:
            pairs["token_type_ids"] = np.zeros((B, T), dtype=np.int64)
            pairs["next_sentence_label"] = np.empty(B, dtype=np.int64)
        for row, (sample, epoch) in enumerate(zip(ids.tolist(), epochs.tolist(), strict=True)):
            words_BW[row] = self._words("mask", words_BW.shape[1], epoch=epoch, sample=sample)
            packing, number = self._packing_of(sample)
            if isinstance(packing, Pairs):
                chance = self._words("pair", 4, epoch=epoch, sample=sample).tolist()
                label = packing.fill(tokens_BT[row], pairs["token_type_ids"][row], number, chance=chance)
                pairs["next_sentence_label"][row] = label
            else:
                packing.fill(tokens_BT[row], number)
        input_ids_BT, positions_BP, labels_BP = mask(
            tokens_BT,
            self.vocabulary,
            words_BW=words_BW,
            probability=self.settings.mask_probability,
            predictions=self.predictions,
            whole_word=self.settings.whole_word,
        )
        if paired:
            pairs["attention_mask"] = (tokens_BT != self.vocabulary.pad).astype(np.int64)
        if self.settings.boundaries:
            pairs["segments"], pairs["position_ids"] = _segments(tokens_BT, sep=self.vocabulary.sep)
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

    @property
    def _weights(self) -> dict[str, float] | None:
        """Of the sources that are trained on; None where all documents are taken alike."""
        weights = self.settings.weights if self.split == "train" else None
        return None if weights is None else {name: w for name, w in sorted(weights.items()) if w}

    def _documents_by_source(self) -> dict[str | None, np.ndarray]:
        documents = split_documents(self.corpus, settings=self.settings, split=self.split)
        if self.settings.weights is not None:
            mixing.check(self.settings.weights, sources=self.corpus.sources)
        if self._weights is None:
            return {None: documents}
        source_of = self.corpus.document_sources[documents]
        return {name: documents[source_of == self.corpus.sources.index(name)] for name in self._weights}

    def _pack(self, documents: np.ndarray, source: str | None) -> Pieces | Pairs:
        corpus, objective = self.corpus, self.settings.objective
        packing = _packing(corpus, objective, documents, self.sequence_length, self.vocabulary)
        if not len(packing):
            larger = " or a larger held_out" if self.split == "held_out" else ""
            whose = f"source {source!r} in the" if source else "the"
            raise EarlyBertError(
                f"{whose} {self.split} split of {corpus.folder} has {len(documents)} documents with "
                f"{int(corpus.document_lengths[documents].sum())} tokens, too few for one sample of "
                f"{self.sequence_length} tokens with objective {objective!r}; use a larger corpus, a "
                f"shorter sequence length{larger}"
            )
        return packing

    def _packing_of(self, sample: int) -> tuple[Pieces | Pairs, int]:
        """The packing that a sample belongs to, and the sample's number in it."""
        if self._mixture is None:
            return self._packings[0], sample
        source, number = self._mixture.source_of(sample)
        return self._packings[source], number

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
        if settings.boundaries:
            decides["boundaries"] = True
        if self._weights is not None:
            decides["weights"] = self._weights
        count = len(self.corpus)
        if settings.objective != "mlm+nsp" and count >= 4:
            before, now = (_held(count, settings.held_out, least=least) for least in (1, 2))
            if before != now:  # a split of such a corpus could have one document before
                decides["least"] = 2
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode("utf-8")).hexdigest()


def split_documents(corpus: Corpus, *, settings: DataSettings, split: Split) -> np.ndarray:
    """Return the documents of a split, ascending.

    Both splits have at least two, since B may come from another document and rows may be evaluated under
    another objective than that of training; of fewer than four documents one.
    """
    count = len(corpus)
    least = 1 if count < 4 and settings.objective != "mlm+nsp" else 2
    if count < 2 * least:
        raise EarlyBertError(
            f"{corpus.folder} has {count} documents, objective {settings.objective!r} with a held-out split "
            f"needs {2 * least}; prepare a larger corpus"
        )
    held = _held(count, settings.held_out, least=least)
    hashes = scramble(np.arange(count, dtype=np.uint64), key=key_of("held out"))
    chosen = np.zeros(count, dtype=bool)
    chosen[np.argpartition(hashes, held - 1)[:held]] = True
    return np.flatnonzero(chosen if split == "held_out" else ~chosen)


def _held(count: int, share: float, *, least: int) -> int:
    """Documents that are held out, where each split has `least` of them."""
    return min(max(round(count * share), least), count - least)


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


def _segments(tokens_BT: np.ndarray, *, sep: int) -> tuple[np.ndarray, np.ndarray]:
    """(document of each token, its position there); a [SEP] ends a document and belongs to it."""
    ends_BT = tokens_BT == sep
    segments_BT = ends_BT.cumsum(axis=1) - ends_BT
    places_T = np.arange(tokens_BT.shape[1])
    first_BT = np.diff(segments_BT, axis=1, prepend=0) > 0
    return segments_BT, places_T - np.maximum.accumulate(np.where(first_BT, places_T, 0), axis=1)


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
