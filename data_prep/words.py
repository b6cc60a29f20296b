"""What a word is: what white space parts; of scripts that are written without spaces, each character.

Chinese, Japanese, Thai, Lao, Khmer and Burmese have no sign of where a word ends, so a page of them would be
a handful of words. The surprise: text without a character of theirs is counted by `str.split`, where a dash
that stands alone is a word; beside such characters only what holds a letter or digit is one.
"""

from __future__ import annotations

import re

_WITHOUT_SPACES = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3000-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # kana, and signs of East Asia
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # ideographs
)
_ANY = re.compile(f"[{_WITHOUT_SPACES}]")
_LETTER = re.compile(rf"(?=\w)[{_WITHOUT_SPACES}]")
_SPACED = re.compile(rf"[^\W{_WITHOUT_SPACES}][^\s{_WITHOUT_SPACES}]*")
_WORD = re.compile(r"\w+")
_WORD_OR_CHARACTER = re.compile(rf"(?=\w)[{_WITHOUT_SPACES}]|[^\W{_WITHOUT_SPACES}]+")


def count_words(text: str) -> int:
    """Count the words of a text: by white space, and letters of scripts without spaces one by one."""
    if not _is_without_spaces(text):
        return len(text.split())
    return len(_LETTER.findall(text)) + len(_SPACED.findall(text))


def find_words(text: str) -> list[str]:
    """Find the words of a text without their signs, the letters of scripts without spaces one by one."""
    return (_WORD_OR_CHARACTER if _is_without_spaces(text) else _WORD).findall(text)


def _is_without_spaces(text: str) -> bool:
    return not text.isascii() and _ANY.search(text) is not None
