"""The WordPiece vocabulary: learnt from sentences, saved as a Hugging Face tokenizer folder, or taken from
one.

The same sentences in the same order give the same ids in every process. `tokenizers` alone does not promise
that: it numbers the continuations (`##e`) in the order of a hash map that is seeded anew in each process,
and breaks ties in the alphabet by it. So the alphabet is counted here and handed over, together with its
continuations.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from earlybert.config import EarlyBertError, write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Their ids are their places: [PAD] is 0, [MASK] is 4."""

PADDED_TO = 64
"""A learnt vocabulary is filled up to a multiple of this, for the matrix shapes of the output layer."""

_SMALLEST = 128
_SMALLEST_ALPHABET = 100
_LARGEST = 1 << 20
_UNTRAINED_LENGTH = 512
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def check_size(vocab_size: int) -> None:
    """Raise EarlyBertError for a vocabulary size that no corpus can have."""
    if not _SMALLEST <= vocab_size <= _LARGEST:
        raise EarlyBertError(
            f"--vocab-size {vocab_size}: choose from {_SMALLEST} to {_LARGEST:,}, such as 30522"
        )


@dataclass(frozen=True)
class Letters:
    """What the tokenizer makes of upper case and of accents."""

    cased: bool = False
    """Keep upper case."""
    accents: bool | None = None
    """Keep accents; where nothing is said, with upper case only."""


def learn(
    batches: Iterable[list[str]], *, vocab_size: int, letters: Letters = Letters(), reserved: int = 0
) -> Tokenizer:
    """Learn a WordPiece vocabulary of `vocab_size`; add at least `reserved` pieces `[unused0]`, ..., up to a
    multiple of 64.

    `batches` are lists of sentences, read twice: give something that can be iterated again. Raises
    EarlyBertError where the text has too few distinct words for the size.
    """
    from tokenizers import trainers

    check_size(vocab_size)
    blank = _tokenizer(dict.fromkeys(SPECIAL_TOKENS, 0), letters)
    alphabet = _alphabet(batches, letters, at_most=max(_SMALLEST_ALPHABET, vocab_size // 16))
    continuations = [f"##{character}" for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *continuations],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    blank.train_from_iterator(iter(batches), trainer=trainer)
    pieces = sorted((place, piece) for piece, place in blank.get_vocab().items())
    if len(pieces) < vocab_size:
        enough = len(pieces) * 3 // 4
        raise EarlyBertError(
            f"the corpus has too little text for --vocab-size {vocab_size}: it gives only {len(pieces)} "
            "WordPieces; "
            + (f"use --vocab-size {enough} or less, or add text" if enough >= _SMALLEST else "add text")
        )
    ordered = [piece for _, piece in pieces]
    unused = reserved + -(len(ordered) + reserved) % PADDED_TO
    ordered += [f"[unused{i}]" for i in range(unused)]
    return _tokenizer({piece: i for i, piece in enumerate(ordered)}, letters)


def save(tokenizer: Tokenizer, folder: Path, letters: Letters = Letters()) -> None:
    """Write a folder that `AutoTokenizer.from_pretrained` opens as a fast BERT tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": not letters.cased,
        "strip_accents": None if letters.accents is None else not letters.accents,
        "tokenize_chinese_chars": True,
        "model_max_length": _UNTRAINED_LENGTH,
        "clean_up_tokenization_spaces": False,
        **names,
    }
    write_atomically(folder / "vocab.txt", "".join(f"{piece}\n" for piece, _ in vocabulary))
    write_atomically(folder / "special_tokens_map.json", _json(names))
    write_atomically(folder / "tokenizer_config.json", _json(config))
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")


def identity(given: Path, letters: Letters = Letters()) -> str:
    """Hash an existing tokenizer.

    Raises EarlyBertError where it is none, lacks a special token of BERT, or says itself what `letters` are.
    """
    path = _find(given)
    if path.name == "tokenizer.json" and letters != Letters():
        raise EarlyBertError(
            f"--tokenizer {given}: its tokenizer.json says what becomes of upper case and accents; leave "
            "--cased and --accents out, or give a vocab.txt"
        )
    known = load(given).get_vocab() if path.name == "tokenizer.json" else _read_vocabulary(path)
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    if missing:
        raise EarlyBertError(
            f"--tokenizer {given}: the vocabulary has no {', '.join(missing)}; give a BERT tokenizer, or "
            "learn one by --vocab-size"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def take(given: Path, folder: Path, letters: Letters) -> None:
    """Copy an existing tokenizer: a Hugging Face folder, or one with (or a file that is) a vocab.txt."""
    path = _find(given)
    if path.name != "tokenizer.json":
        save(_tokenizer(_read_vocabulary(path), letters), folder, letters)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (given / name).is_file():
            shutil.copyfile(given / name, folder / name)


def _find(given: Path) -> Path:
    for path in (given / "tokenizer.json", given / "vocab.txt", given):
        if path.is_file():
            return path
    raise EarlyBertError(
        f"--tokenizer {given}: no tokenizer.json or vocab.txt there; give the folder of a fast Hugging Face "
        "tokenizer"
    )


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        # Not splitlines(), which also ends a line within a piece: at U+2028, U+0085 and the like.
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise EarlyBertError(
            f"--tokenizer {path}: not UTF-8 ({error}); give a WordPiece vocabulary"
        ) from error
    known: dict[str, int] = {}
    for i, piece in enumerate(pieces):
        if known.setdefault(piece, i) != i:
            raise EarlyBertError(
                f"--tokenizer {path}, line {i + 1}: {piece!r} stands in line {known[piece] + 1} too; give a "
                "vocabulary of different pieces"
            )
    return known


def load(folder: Path) -> Tokenizer:
    """Open a folder's `tokenizer.json`; raises EarlyBertError where it is missing or malformed."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise EarlyBertError(f"{path} is not a readable tokenizer ({error}); give another folder") from error


def _tokenizer(vocabulary: dict[str, int], letters: Letters) -> Tokenizer:
    """Build BERT's tokenizer around a vocabulary, with its [CLS] ... [SEP] frame."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = _normalizer(letters)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    if len(set(vocabulary.values())) == len(vocabulary):  # not the blank one that is about to be trained
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _normalizer(letters: Letters):  # type: ignore[no-untyped-def]  # the class is not exported with a type
    from tokenizers import normalizers

    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True,
        strip_accents=None if letters.accents is None else not letters.accents,
        lowercase=not letters.cased,
    )


def _alphabet(batches: Iterable[list[str]], letters: Letters, *, at_most: int) -> list[str]:
    """Count the characters of the normalised text; keep the most frequent, ties by code point, then sort."""
    raw = np.zeros(0x110000, dtype=np.int64)
    for text in _joined(batches):
        codes = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)
        raw += np.bincount(codes, minlength=len(raw))
    normalizer = _normalizer(letters)
    counts: Counter[str] = Counter()
    for code in np.flatnonzero(raw).tolist():
        for character in normalizer.normalize_str(chr(code)):
            if not character.isspace():
                counts[character] += int(raw[code])
    frequent = sorted(((-n, c) for c, n in counts.items() if n >= 2))[:at_most]
    return sorted(c for _, c in frequent)


def _joined(batches: Iterable[list[str]]) -> Iterator[str]:
    """Join batches into texts of some MiB, so that the count's fixed cost is paid seldom."""
    held: list[str] = []
    length = 0
    for batch in batches:
        held.extend(batch)
        length += sum(map(len, batch))
        if length > 1 << 22:
            yield "\n".join(held)
            held, length = [], 0
    yield "\n".join(held)


def _json(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
