"""Clean text to sentences, by sentencex; a newline is always a boundary.

The surprise: the split is per line, which keeps headings and list items apart from the paragraph below and
keeps sentencex in its fast range.
"""

from __future__ import annotations

import re

import sentencex

from earlybert.config import EarlyBertError

_LANGUAGE = re.compile(r"[a-z]{2,3}")
_LOOKED_AT = 2000


def split(text: str, *, language: str = "en") -> list[str]:
    """Split cleaned text into sentences in order, none of them empty, no text lost but white space."""
    sentences: list[str] = []
    for line in text.split("\n"):
        if line:
            sentences.extend(s for s in map(str.strip, sentencex.segment(language, line)) if s)
    return sentences


def check_language(language: str) -> None:
    """Raise EarlyBertError unless `language` looks like an ISO 639 code (sentencex falls back by itself)."""
    if not _LANGUAGE.fullmatch(language):
        raise EarlyBertError(f"--language {language!r}: give an ISO 639 code such as en, it or de")


def language_of(text: str) -> str:
    """ISO 639-1 code of the language that a text seems to be in, by its first `_LOOKED_AT` characters."""
    import py3langid  # its model is loaded with the first text, where one is asked for at all

    return py3langid.classify(text[:_LOOKED_AT])[0]
