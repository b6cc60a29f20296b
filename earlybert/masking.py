"""Which tokens the model must guess: an exact number of positions a row, replaced 80/10/10.

The rule is BERT's (Devlin et al. 2019, section 3.1 and appendix A.1): of the chosen positions 80% become
[MASK], 10% a random token, 10% stay. The surprise: the number of positions is exact rather than expected,
so every full row asks for the same number of predictions and the shapes that reach the model never change.

Shapes: B rows, T sequence length, P positions to guess in a full row, V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from earlybert.config import EarlyBertError, read_json

IGNORED = -100
"""The label of a padded slot; PyTorch's cross entropy skips it."""

_NAMES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_MASK_BELOW = np.uint64(8 * (1 << 64) // 10)
_RANDOM_BELOW = np.uint64(9 * (1 << 64) // 10)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What packing and masking need to know of a tokenizer."""

    size: int
    pad: int
    cls: int
    sep: int
    mask: int
    is_special_V: np.ndarray
    """Tokens that are never masked and never a random replacement."""
    continues_V: np.ndarray
    """Wordpieces that continue a word ("##...")."""
    replacements: np.ndarray
    """The ids that a random replacement is drawn from."""


def read_vocabulary(folder: str | os.PathLike[str]) -> Vocabulary:
    """Read a Hugging Face tokenizer folder; raises EarlyBertError if a token that BERT needs is missing."""
    path = Path(folder) / "tokenizer.json"
    tokenizer = read_json(path)
    try:
        ids = dict(tokenizer["model"]["vocab"])
        prefix = tokenizer["model"].get("continuing_subword_prefix") or "##"
        added = {token["content"]: token for token in tokenizer.get("added_tokens") or []}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EarlyBertError(
            f"{path} has no WordPiece vocabulary; give the tokenizer of a BERT-style model"
        ) from error
    ids.update({content: token["id"] for content, token in added.items()})
    names = _special_names(Path(folder) / "tokenizer_config.json")
    missing = [name for role, name in names.items() if role != "unk" and name not in ids]
    if missing:
        raise EarlyBertError(
            f"{path} has no token {missing[0]!r}; train the vocabulary with BERT's special tokens"
        )
    size = max(ids.values()) + 1
    special, continues = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    marked = {content for content, token in added.items() if token.get("special")}
    special[[ids[name] for name in marked | set(names.values()) if name in ids]] = True
    continues[[id for token, id in ids.items() if token.startswith(prefix) and token != prefix]] = True
    if special.all():
        raise EarlyBertError(f"{path} holds nothing but special tokens; train a vocabulary on your text")
    return Vocabulary(
        size=size,
        pad=ids[names["pad"]],
        cls=ids[names["cls"]],
        sep=ids[names["sep"]],
        mask=ids[names["mask"]],
        is_special_V=special,
        continues_V=continues & ~special,
        replacements=np.flatnonzero(~special).astype(np.int64),
    )


def predictions_a_row(sequence_length: int, *, probability: float) -> int:
    """Count the positions to guess in a full row: P = max(1, round(probability * (T - 2)))."""
    return max(1, round(probability * (sequence_length - 2)))


def words_a_row(sequence_length: int, *, predictions: int) -> int:
    """Count the random words that `mask` takes for one row."""
    return sequence_length + 2 * predictions


def mask(
    tokens_BT: np.ndarray,
    vocabulary: Vocabulary,
    *,
    words_BW: np.ndarray,
    probability: float,
    predictions: int,
    whole_word: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose and replace the positions to guess; returns (input_ids_BT, positions_BP, labels_BP).

    A row of n tokens, its [CLS] and last [SEP] not counted and padding neither, asks for max(1,
    round(probability * n)) positions, or all that may be masked where those are fewer. With `whole_word`
    words are taken whole, in random order, passing over those that no longer fit: the number is a bound
    that only a row of nothing but long words misses. Positions ascend; free slots have position 0 and label
    -100. `tokens_BT` is left as it is.
    """
    B, T = tokens_BT.shape
    eligible_BT = ~vocabulary.is_special_V[tokens_BT]
    content_B = (tokens_BT != vocabulary.pad).sum(axis=1) - 2
    wanted_B = np.maximum(1, np.rint(probability * content_B)).astype(np.int64)
    count_B = np.minimum(np.minimum(wanted_B, predictions), eligible_BT.sum(axis=1))
    keys_BT = np.where(eligible_BT, words_BW[:, :T], np.uint64(0xFFFFFFFFFFFFFFFF))
    if whole_word:
        continues_BT = vocabulary.continues_V[tokens_BT]
        rows = zip(keys_BT, eligible_BT, continues_BT, count_B.tolist(), strict=True)
        chosen_BT = np.stack([_whole_words(k, e, c, count=n) for k, e, c, n in rows])
    else:
        last_B = np.sort(keys_BT, axis=1)[np.arange(B), np.maximum(count_B, 1) - 1]
        chosen_BT = eligible_BT & (keys_BT <= last_B[:, None]) & (count_B > 0)[:, None]

    row, column = np.nonzero(chosen_BT)
    taken_B = chosen_BT.sum(axis=1)
    slot = np.arange(row.size) - np.repeat(np.cumsum(taken_B) - taken_B, taken_B)
    positions_BP = np.zeros((B, predictions), dtype=np.int64)
    labels_BP = np.full((B, predictions), IGNORED, dtype=np.int64)
    positions_BP[row, slot] = column
    labels_BP[row, slot] = original = tokens_BT[row, column].astype(np.int64)

    decision, choice = words_BW[row, T + slot], words_BW[row, T + predictions + slot]
    random = vocabulary.replacements[choice % np.uint64(vocabulary.replacements.size)]
    replaced = np.where(decision < _RANDOM_BELOW, random, original)
    input_ids_BT = tokens_BT.astype(np.int64)
    input_ids_BT[row, column] = np.where(decision < _MASK_BELOW, vocabulary.mask, replaced)
    return input_ids_BT, positions_BP, labels_BP


def _whole_words(
    keys_T: np.ndarray, eligible_T: np.ndarray, continues_T: np.ndarray, *, count: int
) -> np.ndarray:
    """Choose words of one row whose pieces add up to `count` or, where nothing else fits, a little less."""
    follows = np.zeros_like(eligible_T)
    follows[1:] = continues_T[1:] & eligible_T[:-1]
    first = np.flatnonzero(eligible_T & ~follows)
    word_T = np.cumsum(eligible_T & ~follows) - 1
    pieces = np.bincount(word_T[eligible_T], minlength=first.size)
    order = np.argsort(keys_T[first], kind="stable")
    used = np.cumsum(pieces[order])
    whole = int(np.searchsorted(used, count, side="right"))
    taken = np.zeros(first.size, dtype=bool)
    taken[order[:whole]] = True
    room = count - (int(used[whole - 1]) if whole else 0)
    for word in order[whole:].tolist():
        if room == 0:
            break
        if pieces[word] <= room:
            taken[word] = True
            room -= int(pieces[word])
    return eligible_T & taken[word_T] if first.size else eligible_T


def _special_names(path: Path) -> dict[str, str]:
    names = dict(_NAMES)
    if path.is_file():
        settings = read_json(path)
        for role in names:
            token = settings.get(f"{role}_token")
            name = token.get("content") if isinstance(token, dict) else token
            if isinstance(name, str):
                names[role] = name
    return names
