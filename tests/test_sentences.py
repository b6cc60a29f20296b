"""Claims about splitting prose into sentences."""

import pytest

from data_prep import sentences
from earlybert.config import EarlyBertError


def test_abbreviations_do_not_end_a_sentence() -> None:
    text = "Mr. Smith met Dr. Jones at 5 p.m. on Monday. They spoke. It cost $3.50!"
    assert sentences.split(text) == [
        "Mr. Smith met Dr. Jones at 5 p.m. on Monday.",
        "They spoke.",
        "It cost $3.50!",
    ]


def test_a_newline_is_always_a_boundary() -> None:
    assert sentences.split("A heading\nthe text below\n\nand more") == [
        "A heading",
        "the text below",
        "and more",
    ]


def test_no_word_is_lost() -> None:
    text = 'He said: "Go." She went (slowly). "Why?" he asked... U.S. Navy ships, e.g. carriers, left.\nEnd'
    assert " ".join(sentences.split(text)).split() == text.split()


def test_empty_text_has_no_sentence() -> None:
    assert sentences.split("") == []


def test_a_language_that_is_no_code_is_refused() -> None:
    with pytest.raises(EarlyBertError, match=r"--language 'English'.*ISO 639"):
        sentences.check_language("English")
