"""Documents that are there twice, within a source, over sources and over tasks, by datatrove's MinHash steps.

"near" gives each document 14 x 8 minimal hashes of its runs of five words; two documents of which one of the
14 groups agrees are taken for duplicates (at a similarity of 0.8 in 92 % of cases, at 0.5 in 5 %). "exact"
does the same with one hash of the whole text. One document of each cluster stays.

What datatrove hashes in Python a word at a time is done here for whole documents in numpy, in pieces, so a
book of a million words takes no more memory than an article.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from data_prep.report import Examples
from data_prep.words import count_words, find_words

Kind = Literal["near", "exact", "none"]
_PRIME = np.uint64((1 << 61) - 1)
_PIECE = 4096
"""Runs of words hashed at a time."""


def config(kind: Kind) -> MinhashConfig:
    """How many hashes a document has, and in how many groups."""
    groups, each = (14, 8) if kind == "near" else (1, 1)
    hashes = HashConfig(precision=64, hash_fc="sha1")  # ours are used instead, see `_hash`
    return MinhashConfig(n_grams=5, num_buckets=groups, hashes_per_bucket=each, hash_config=hashes)


class Signature(MinhashDedupSignature):
    """The minimal hashes of each document of a task."""

    def __init__(self, folder: Path, *, kind: Kind) -> None:
        super().__init__(str(folder), config(kind), language=_NoTokenizer())
        self.kind = kind

    def get_shingles(self, text: str) -> np.ndarray:
        """Hashes of the runs of words, uint64 [runs, 1]; of the whole where it is shorter than a run."""
        words = find_words(text.lower())
        run = self.config.n_grams
        if self.kind == "exact" or len(words) < run:
            return (
                np.array([[_hash(" ".join(words))]], dtype=np.uint64)
                if words
                else np.empty((0, 1), np.uint64)
            )
        hashes = np.fromiter(map(_hash, words), dtype=np.uint64, count=len(words))
        mixed = np.zeros(len(words) - run + 1, dtype=np.uint64)
        for place in range(run):  # a polynomial modulo 2**64
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + len(mixed)]
        mixed ^= mixed >> np.uint64(29)
        return (mixed % _PRIME).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Minimal value of each of the permutations, in groups."""
        a, b = self.parameters
        least = np.full((1, self.num_hashes), _PRIME, dtype=np.uint64)
        for start in range(0, len(shingles), _PIECE):
            permuted = (shingles[start : start + _PIECE] * a + b) % _PRIME
            least = np.minimum(least, permuted.min(axis=0, keepdims=True))
        return [part.tolist() for part in np.split(least[0], self.config.num_buckets)]


class Unique(PipelineStep):
    """Let through what is no duplicate of a document that stays."""

    name, type = "unique", "4 - filter"

    def __init__(self, folder: Path, *, kind: Kind, examples: Path) -> None:
        super().__init__()
        self.folder, self.kind, self.examples = folder, kind, examples

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        gone = removed(self.folder, rank)
        reason = "near duplicate" if self.kind == "near" else "exact duplicate"
        examples = Examples(self.examples / f"unique-{rank:05d}.json")
        for place, document in enumerate(data):
            index, text = document.metadata["source"], document.text
            if place in gone:
                self.stat_update(f"{index}|dropped|{reason}")
                examples.add(f"{index}|dropped|{reason}", document.id)
                continue
            self.stat_update(f"{index}|words", value=count_words(text))
            self.stat_update(f"{index}|characters", value=len(text))
            yield document
        examples.write()


def buckets(signatures: Path, pairs: Path, *, kind: Kind) -> MinhashDedupBuckets:
    """The step that finds pairs, a task a group of hashes."""
    return MinhashDedupBuckets(str(signatures), str(pairs), config=config(kind))


def cluster(pairs: Path, clusters: Path, *, kind: Kind) -> MinhashDedupCluster:
    """The step that joins pairs to clusters and says which documents go; one task."""
    return MinhashDedupCluster(str(pairs), str(clusters), config=config(kind), save_cluster_id=True)


def removed(clusters: Path, rank: int) -> set[int]:
    """Places of a task's documents that go."""
    path = clusters / f"{rank:06d}.remove"
    return set(np.fromfile(path, dtype="<u4").tolist()) if path.exists() else set()


def examples(clusters: Path, *, tasks: int, count: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((task, place) that goes, (task, place) that stays) of the first clusters."""
    stays: dict[int, tuple[int, int]] = {}
    goes: dict[int, tuple[int, int]] = {}
    for rank in range(tasks):
        path = clusters / f"{rank:06d}.clusters"
        gone = removed(clusters, rank)
        for place, number in struct.iter_unpack("<II", path.read_bytes()) if path.exists() else ():
            (goes if place in gone else stays).setdefault(number, (rank, place))
    both = sorted(goes.keys() & stays.keys())
    return [(goes[number], stays[number]) for number in both[:count]]


class _NoTokenizer(WordTokenizer):
    """datatrove wants one; `Signature` finds its words itself."""

    def word_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


@functools.lru_cache(maxsize=1 << 16)
def _hash(word: str) -> int:
    """64 bits of a word, the same on every machine."""
    return int.from_bytes(
        hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )
