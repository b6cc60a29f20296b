"""From documents to framed rows: sample number i as token ids, before any mask.

Two packings with the same interface: `Pieces` for masked tokens alone, `Pairs` where the model also
compares two runs of sentences. The surprise: neither keeps a table of samples; a number is turned into a
place by arithmetic on the cumulative lengths of the documents, so a corpus of any size costs eight bytes a
document.

Shapes: T sequence length.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from earlybert.masking import Vocabulary
from earlybert.shards import Corpus


class Pieces:
    """The documents one after the other, a [SEP] behind each, cut into pieces of T - 2: [CLS] piece [SEP].

    The last incomplete piece is dropped.
    """

    def __init__(
        self, corpus: Corpus, *, documents: np.ndarray, sequence_length: int, vocabulary: Vocabulary
    ) -> None:
        self.documents = documents
        self._corpus, self._vocabulary = corpus, vocabulary
        self._room = sequence_length - 2
        self._ends = np.cumsum(corpus.document_lengths[documents] + 1)

    def __len__(self) -> int:
        return int(self._ends[-1]) // self._room if len(self._ends) else 0

    def documents_of(self, sample: int) -> list[int]:
        """Indices in the corpus of the documents that a sample takes tokens from."""
        first, _ = _place(self._ends, sample * self._room)
        last, _ = _place(self._ends, (sample + 1) * self._room - 1)
        return self.documents[first : last + 1].tolist()

    def fill(self, tokens_T: np.ndarray, sample: int) -> None:
        """Write sample number `sample` into a row."""
        at, offset = _place(self._ends, sample * self._room)
        tokens_T[0], tokens_T[-1] = self._vocabulary.cls, self._vocabulary.sep
        filled, end = 1, self._room + 1
        while filled < end:
            tokens, _ = self._corpus.document(int(self.documents[at]))
            part = tokens[offset : offset + end - filled]
            tokens_T[filled : filled + len(part)] = part
            filled += len(part)
            if filled < end:
                tokens_T[filled] = self._vocabulary.sep
                filled, at, offset = filled + 1, at + 1, 0


class Pairs:
    """Runs of whole sentences of one document, split at a sentence into A and B: [CLS] A [SEP] B [SEP].

    In every second row, by chance, B comes from another document ("nsp") or A and B change places ("sop"):
    label 1. Documents of one token are left out. A sentence that leaves a run longer than T - 3 loses its
    end.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        documents: np.ndarray,
        sequence_length: int,
        vocabulary: Vocabulary,
        task: Literal["nsp", "sop"],
    ) -> None:
        lengths = corpus.document_lengths[documents]
        self.documents = documents[lengths > 1]
        self._corpus, self._vocabulary, self._task = corpus, vocabulary, task
        self._room = sequence_length - 3
        self._ends = np.cumsum(-(-lengths[lengths > 1] // self._room))

    def __len__(self) -> int:
        enough = len(self.documents) >= (2 if self._task == "nsp" else 1)
        return int(self._ends[-1]) if enough else 0

    def documents_of(self, sample: int) -> list[int]:
        """Index in the corpus of the document that A comes from (which B's is, chance decides)."""
        return [int(self.documents[_place(self._ends, sample)[0]])]

    def fill(self, tokens_T: np.ndarray, types_T: np.ndarray, sample: int, *, chance: list[int]) -> int:
        """Write sample number `sample` into a row and its token types; returns the label.

        `chance` is four random words: whether, where to split, which other document, where in it. The row
        comes in filled with [PAD] and zeros.
        """
        first, second, label = self._pair(sample, chance)
        middle, end = len(first) + 1, len(first) + len(second) + 2
        tokens_T[0] = self._vocabulary.cls
        tokens_T[1:middle] = first
        tokens_T[middle] = tokens_T[end] = self._vocabulary.sep
        tokens_T[middle + 1 : end] = second
        types_T[middle + 1 : end + 1] = 1
        return label

    def _pair(self, sample: int, chance: list[int]) -> tuple[np.ndarray, np.ndarray, int]:
        at, window = _place(self._ends, sample)
        tokens, starts, begin, end = self._run(at, window)
        inner = starts[starts.searchsorted(begin, side="right") : starts.searchsorted(end)]
        cut = int(inner[chance[1] % len(inner)]) if len(inner) else (begin + end) // 2
        first, second = tokens[begin:cut], tokens[cut:end]
        label = chance[0] & 1
        if not label:
            return first, second, 0
        if self._task == "sop":
            return second, first, 1
        other = chance[2] % (len(self.documents) - 1)
        other += other >= at
        windows = int(self._ends[other]) - (int(self._ends[other - 1]) if other else 0)
        tokens, starts, begin, _ = self._run(other, chance[3] % windows)
        end = min(begin + self._room - len(first), len(tokens))
        if end < len(tokens):  # end with a sentence, as a true B does, where one ends in reach
            last = int(starts[starts.searchsorted(end, side="right") - 1])
            end = last if last > begin else end
        return first, tokens[begin:end], 1

    def _run(self, at: int, window: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Return a document's tokens and sentence starts, and where run number `window` begins and ends.

        The document is cut into equal windows of at most T - 3; each bound moves on to the first sentence
        that starts in its window, and stays where none does. The runs of a document are disjoint and leave
        nothing between them.
        """
        tokens, starts = self._corpus.document(int(self.documents[at]))
        length = len(tokens)
        windows = -(-length // self._room)

        def bound(number: int) -> int:
            if number == windows:
                return length
            low, high = number * length // windows, (number + 1) * length // windows
            following = int(starts.searchsorted(low))
            start = int(starts[following]) if following < len(starts) else high
            return start if start < high else low

        begin, end = bound(window), bound(window + 1)
        if end - begin < 2:  # one token cannot be split in two: take the window as it lies
            begin, end = window * length // windows, (window + 1) * length // windows
        return tokens, starts, begin, min(end, begin + self._room)


def _place(ends: np.ndarray, number: int) -> tuple[int, int]:
    """Find the entry of a cumulative scale that `number` falls in, and the offset in it."""
    at = int(ends.searchsorted(number, side="right"))
    return at, number - (int(ends[at - 1]) if at else 0)
