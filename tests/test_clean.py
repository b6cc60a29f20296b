"""Claims about turning raw text into plain prose."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import clean


@given(st.text())
def test_prose_is_normalised_and_stays_so(text: str) -> None:
    once = clean.prose(text)
    assert clean.prose(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == once.strip()
    assert "\n\n\n" not in once and "  " not in once
    once.encode("utf-8")


def test_prose_keeps_every_word_and_drops_what_cannot_be_seen() -> None:
    text = "\ufeffSoft\u00adware\u00a0is\u2003soft.\r\nSecond\x00 line.\r\n***\r\nThird."
    assert clean.prose(text) == "Software is soft.\nSecond line.\n\nThird."


def test_lone_surrogates_are_dropped() -> None:
    assert clean.prose("a\ud800b") == "ab"


def test_hard_wraps_are_joined_and_verse_is_not() -> None:
    prose = "This is a line of about sixty characters, as e-books have\nthem, and this is the rest of it."
    verse = "Tyger Tyger, burning bright,\nIn the forests of the night;"
    assert clean.unwrap(f"{prose}\n\n{verse}") == f"{prose.replace(chr(10), ' ')}\n\n{verse}"


def test_long_lines_are_paragraphs_and_stay_apart() -> None:
    lines = ["word " * 40 + "end.", "other " * 40 + "end."]
    assert clean.plain_text("\n".join(lines)) == "\n".join(lines)


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("It stands.<ref name=a>Smith, p. 3</ref> Still.", "It stands. Still."),
        ("It stands.<ref name=a /> Still.", "It stands. Still."),
        ("One<br>two &amp; three", "One\ntwo & three"),
        ("if a < b and b > c", "if a < b and b > c"),
        ("the [[Moon|satellite]] and [[Mars]]", "the satellite and Mars"),
        ("left {{cite web|a={{b}}}} over", "left over"),
        ("Rome (; , ) fell", "Rome fell"),
        ("Rome ( ; Latin: ''Roma'') fell , then rose", "Rome (Latin: Roma) fell, then rose"),
        ("| cell || cell\ntext", "text"),
        ("__NOTOC__ text }}", "text"),
        ("as of 2014[ [update]], it [sic] stood [citation needed].", "as of 2014, it [sic] stood."),
        ('<span style="a">x</span> <poem>y</poem>', "x y"),
    ],
)
def test_leftover_markup_goes_and_the_words_stay(raw: str, plain: str) -> None:
    assert clean.leftovers(raw) == plain


def test_gutenberg_header_and_licence_are_cut() -> None:
    text = (
        "The Project Gutenberg eBook of Emma\n\nThis eBook is for the use of anyone.\n\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\nProduced by A Volunteer\n\n"
        "CHAPTER I\n\nEmma Woodhouse, handsome, clever, and rich.\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\nSection 1. General Terms of Use"
    )
    assert clean.book(text) == "CHAPTER I\n\nEmma Woodhouse, handsome, clever, and rich."


def test_a_book_without_licence_is_whole() -> None:
    assert clean.without_licence("All of it.\n\nThe end.") == "All of it.\n\nThe end."


def test_markdown_leaves_words_only() -> None:
    text = (
        "# Title: Emma\n\n## Author: Jane Austen\n\n-------\n\n### Chapter *One* ###\n\n"
        "She was _very_ **clever**[^1], see [the map](http://x.y/z_(a)) ![img](a.png).\n\n* * *\n\n"
        "> A quoted line.\n\nsnake_case_name stays\\*.\n\n* One\n  - Two\n    + Three -1 - 2"
    )
    assert clean.book(text) == (
        "Chapter One\n\nShe was very clever, see the map .\n\nA quoted line.\n\nsnake_case_name stays*.\n\n"
        "One\nTwo\nThree -1 - 2"
    )
