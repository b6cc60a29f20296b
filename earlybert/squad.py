"""SQuAD 1.1 and 2.0: windows of contexts, answers from logits, and the official scores.

A context longer than the model becomes several windows that overlap. The surprise: answers are cut out of the
context's own text by the tokenizer's offsets, so nothing has to be put together from word pieces again.

W windows, T tokens.
"""

from __future__ import annotations

import collections
import itertools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from earlybert.config import EarlyBertError
from earlybert.squad_files import Question

_QUESTION_TOKENS = 64
"""A longer question loses its end, as in BERT's own code."""
_AT_A_TIME = 1000
"""Questions given to the tokenizer: what it says takes 20 times the memory of what is kept."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Windows:
    """What the model reads: a question and a part of its context each."""

    input_ids: tuple[np.ndarray, ...]
    """int32, at most T: [CLS] question [SEP] part of the context [SEP]."""
    token_type_ids: tuple[np.ndarray, ...]
    """int8."""
    questions: tuple[int, ...]
    """Which question each window belongs to."""
    offsets: tuple[np.ndarray, ...]
    """int32 [tokens, 2], the characters of the context that each token covers, from the first up to the
    second; -1 for tokens that are not the context's."""
    starts: np.ndarray
    """int64 [W], the token where the first answer begins; 0 ([CLS]) where it is not whole in the window."""
    ends: np.ndarray
    """int64 [W], its last token."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Candidate:
    """A text that may be the answer; "" is none."""

    text: str
    logit: float
    """Of its beginning and its end together."""
    probability: float
    """Among the candidates of its question."""


@dataclass(frozen=True)
class Answered:
    """What the model says to a question."""

    candidates: tuple[Candidate, ...]
    """Best first; with `impossible` the empty one is among them."""
    null_odds: float | None
    """Logit of no answer less that of the best one; None in SQuAD 1.1."""

    def best(self, *, threshold: float = 0.0) -> str:
        """The answer; "" where the odds of none are above `threshold`."""
        if self.null_odds is not None and self.null_odds > threshold:
            return ""
        return next((candidate.text for candidate in self.candidates if candidate.text), "")


def check_room(*, length: int, stride: int) -> None:
    """Raise EarlyBertError where windows of `length` tokens have no room for new ones beside a question."""
    longest = length - _QUESTION_TOKENS - 3
    if longest < 1:
        raise EarlyBertError(
            f"windows of {length} tokens have no room for a context beside a question of "
            f"{_QUESTION_TOKENS}; use a sequence_length of at least {_QUESTION_TOKENS + 4}"
        )
    if not 0 <= stride < longest:
        raise EarlyBertError(
            f"windows of {length} tokens that overlap by {stride} leave no room beside a question of "
            f"{_QUESTION_TOKENS}; use a longer sequence_length, or a stride below {longest}"
        )


def windows(questions: Sequence[Question], tokenizer: Any, *, length: int, stride: int) -> Windows:
    """Cut questions and contexts into windows of `length` tokens whose contexts overlap by `stride` tokens.

    `tokenizer` is a fast tokenizer of transformers. Raises EarlyBertError where a window would have no room.
    """
    check_room(length=length, stride=stride)
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    owners: list[int] = []
    for first in range(0, len(questions), _AT_A_TIME):
        asked = questions[first : first + _AT_A_TIME]
        told = tokenizer(
            _shortened([question.text for question in asked], tokenizer),
            [question.context for question in asked],
            truncation="only_second", max_length=length, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
            return_attention_mask=False,
        )  # fmt: skip
        owners += [first + owner for owner in told["overflow_to_sample_mapping"]]
        ids += arrays(told["input_ids"], np.int32)
        types += arrays(told["token_type_ids"], np.int8)
        for window, pairs in enumerate(told["offset_mapping"]):
            context = np.array([side == 1 for side in told.sequence_ids(window)])
            offsets.append(np.where(context[:, None], np.array(pairs, dtype=np.int32), np.int32(-1)))
    bounds = [_tokens_of(questions[owner], own) for owner, own in zip(owners, offsets, strict=True)]
    return Windows(
        tuple(ids),
        tuple(types),
        tuple(owners),
        tuple(offsets),
        np.array([first for first, _ in bounds], dtype=np.int64),
        np.array([last for _, last in bounds], dtype=np.int64),
    )


def arrays(lists: Sequence[Sequence[int]], dtype: type[np.integer]) -> list[np.ndarray]:
    """Lists of any lengths as views of one array: a few bytes a number, where Python's own take 36."""
    if not lists:
        return []
    flat = np.fromiter(itertools.chain.from_iterable(lists), dtype=dtype)
    return np.split(flat, np.cumsum([len(numbers) for numbers in lists])[:-1])


def answers(
    questions: Sequence[Question],
    cut: Windows,
    starts: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
    *,
    impossible: bool,
    n_best: int = 20,
    longest: int = 30,
) -> list[Answered]:
    """Turn logits into answers, one a question.

    `starts`, `ends`: a window's logits [T] each. `impossible`: questions may have none (SQuAD 2.0), which is
    what [CLS] stands for. Answers of more than `longest` tokens are not considered.
    """
    spans: list[list[tuple[float, str]]] = [[] for _ in questions]
    nulls = [float("inf")] * len(questions)
    for window, owner in enumerate(cut.questions):
        own = cut.offsets[window]
        start, end = (np.asarray(x[window], dtype=np.float64)[: len(own)] for x in (starts, ends))
        nulls[owner] = min(nulls[owner], float(start[0] + end[0]))
        context = questions[owner].context
        inside = (own[:, 0] >= 0) & (own[:, 1] > own[:, 0])
        firsts, lasts = (np.argsort(-np.where(inside, x, -np.inf))[:n_best] for x in (start, end))
        for first in firsts[inside[firsts]].tolist():
            for last in lasts[inside[lasts]].tolist():
                if first <= last < first + longest:
                    text = context[own[first, 0] : own[last, 1]]
                    spans[owner].append((float(start[first] + end[last]), text))
    return [
        _answered(found, null if impossible else None, n_best=n_best)
        for found, null in zip(spans, nulls, strict=True)
    ]


def evaluate(
    questions: Sequence[Question], predictions: Mapping[str, str], *, impossible: bool
) -> dict[str, float]:
    """SQuAD's official exact match and F1, in percent, of {question id: answer}, "" for none.

    `impossible`: as SQuAD 2.0's script counts, which passes by answers of nothing but articles and
    punctuation; 1.1's asks for one of nothing too then, and gives it no F1. Where some questions have no
    answer, also the scores of each kind. Raises EarlyBertError for a question without a prediction.
    """
    same, overlap = {}, {}
    for question in questions:
        if question.id not in predictions:
            raise EarlyBertError(f"question {question.id}: no answer was given; give one to each, or ''")
        told = predictions[question.id]
        right = _right(question) if impossible else question.answers
        same[question.id] = max((exact(told, answer) for answer in right), default=0.0)
        shared = [f1(told, answer) for answer in right if impossible or normalized(answer)]
        overlap[question.id] = max(shared, default=0.0)
    kinds = {"": [question.id for question in questions]}
    if any(not question.answers for question in questions):
        kinds["answerable "] = [question.id for question in questions if question.answers]
        kinds["unanswerable "] = [question.id for question in questions if not question.answers]
    return {
        f"{kind}{name}": 100.0 * sum(values[id] for id in ids) / len(ids)
        for kind, ids in kinds.items()
        for name, values in (("exact", same), ("f1", overlap))
        if ids
    }


def best_threshold(
    questions: Sequence[Question], answered: Sequence[Answered], measure: Callable[[str, str], float]
) -> tuple[float, float]:
    """(threshold of the null odds with the best score, that score in percent), as SQuAD 2.0's own script
    finds it. `measure`: `f1` or `exact`."""
    total, gains = 0.0, []
    for question, told in zip(questions, answered, strict=True):
        assert told.null_odds is not None
        text = told.best(threshold=float("inf"))
        if question.answers:
            gain = max(measure(text, answer) for answer in _right(question))
        else:
            total += 1  # right as long as the threshold is below the odds
            gain = -float(bool(text))
        gains.append((told.null_odds, gain))
    gains.sort()
    best, where = total, gains[0][0] - 1.0
    for place, (odds, gain) in enumerate(gains, start=1):
        total += gain
        if total > best and (place == len(gains) or gains[place][0] > odds):
            best, where = total, odds
    return where, 100.0 * best / len(gains)


def exact(told: str, right: str) -> float:
    """1 where two answers are the same but for case, punctuation and articles."""
    return float(normalized(told) == normalized(right))


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and spare spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1(told: str, right: str) -> float:
    """Overlap of the words of two answers; of two empty ones 1."""
    ours, theirs = normalized(told).split(), normalized(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2.0 * common / (len(ours) + len(theirs))


# --- inside ------------------------------------------------------------------------------------------------


def _right(question: Question) -> list[str]:
    """What SQuAD 2.0 counts as right: "" where nothing is left of any answer."""
    return [answer for answer in question.answers if normalized(answer)] or [""]


def _answered(spans: list[tuple[float, str]], null: float | None, *, n_best: int) -> Answered:
    best: dict[str, float] = {}
    for logit, text in sorted(spans, key=lambda span: -span[0]):
        if text not in best and len(best) < n_best:
            best[text] = logit
    top = next(iter(best.values()), 0.0)  # where no span fits: odds that JSON can hold
    odds = None
    if null is not None:
        best[""], odds = null, null - top
    if not best:
        best[""] = 0.0
    logits = np.array(list(best.values()))
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    told = [
        Candidate(text, logit, float(share))
        for (text, logit), share in zip(best.items(), shares, strict=True)
    ]
    return Answered(tuple(sorted(told, key=lambda c: -c.logit)), odds)


def _shortened(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Each question's first tokens, as text."""
    told = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
    )["offset_mapping"]
    return [
        text if len(own) <= _QUESTION_TOKENS else text[: own[_QUESTION_TOKENS - 1][1]]
        for text, own in zip(texts, told, strict=True)
    ]


def _tokens_of(question: Question, offsets: np.ndarray) -> tuple[int, int]:
    """First and last token of the first answer, (0, 0) where the window does not hold all of it."""
    if not question.answers:
        return 0, 0
    answer = question.answers[0]  # white space around it belongs to no token
    begin = question.starts[0] + len(answer) - len(answer.lstrip())
    end = question.starts[0] + len(answer.rstrip())
    inside = np.flatnonzero((offsets[:, 0] >= 0) & (offsets[:, 1] > begin) & (offsets[:, 0] < end))
    if not len(inside):
        return 0, 0
    first, last = int(inside[0]), int(inside[-1])
    return (first, last) if offsets[first, 0] <= begin and offsets[last, 1] >= end else (0, 0)
