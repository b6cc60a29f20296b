"""Sentences to token ids, exactly as `tokenizers` gives them and several times as fast.

BERT's normalizer and pre-tokenizer look at nothing across a space, so a sentence's ids are those of its
space-separated words one after the other, and natural text repeats its words: each is encoded once and then
looked up. A tokenizer of another kind, for which that is not so, encodes whole sentences.

The surprise: a text that speaks of "[SEP]" is cut like any other, where a tokenizer by itself gives the id of
the special token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep import vocab

_REMEMBERED = 100_000
"""Words; they take about 25 MB."""


_END = "\n"
"""Stands between sentences; there is none in them."""

_PUNCTUATION = ".,()\"';:-/?!\u2013\u2019\u201c\u201d"
"""Marks that are a token each for BERT's pre-tokenizer; set apart, they leave fewer different words."""


class Tokens:
    """The tokenizer of a folder; what it has seen it remembers."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = vocab.load(folder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a text that says "[MASK]" masks nothing
        self.unknown = self._tokenizer.token_to_id("[UNK]")
        self.by_word = _is_by_word(folder)
        self._known: dict[str, Sequence[int]] = {}

    def encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all sentences one after the other, int64; how many each has, int64 [sentences])."""
        if not self.by_word:
            found = [e.ids for e in self._tokenizer.encode_batch_fast(sentences, add_special_tokens=False)]
            lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
            return np.fromiter(chain.from_iterable(found), dtype=np.int64), lengths
        text = f" {_END} ".join([*sentences, ""])
        for mark in _PUNCTUATION:
            text = text.replace(mark, f" {mark} ")
        words = text.split(" ")
        self._learn(words)
        ids = np.fromiter(chain.from_iterable(map(self._known.__getitem__, words)), dtype=np.int64)
        ends = np.flatnonzero(ids == -1)
        assert len(ends) == len(sentences), "a sentence of several lines"
        return ids[ids != -1], np.diff(ends, prepend=-1) - 1

    def _learn(self, words: list[str]) -> None:
        here = set(words)
        if len(self._known) > _REMEMBERED:  # frequent words are among those of any batch
            self._known = {word: ids for word, ids in self._known.items() if word in here}
        new = list(here.difference(self._known, (_END,)))
        self._known[_END] = (-1,)
        for word, encoding in zip(
            new, self._tokenizer.encode_batch_fast(new, add_special_tokens=False), strict=True
        ):
            self._known[word] = tuple(encoding.ids)  # the garbage collector does not follow those


def _is_by_word(folder: Path) -> bool:
    """Whether the tokenizer treats what spaces part each by itself, as BERT's do."""
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))

    def kind(part: str) -> str | None:
        return (description.get(part) or {}).get("type")

    normal = kind("normalizer") in ("BertNormalizer", "Lowercase", None)
    parted = {" ", *_PUNCTUATION}
    whole = any(not parted.isdisjoint(token["content"]) for token in description.get("added_tokens") or ())
    return normal and kind("pre_tokenizer") == "BertPreTokenizer" and not whole
