"""Claims about what a word is, in scripts with spaces and without."""

import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import tables
from data_prep.build import BuildSettings, build
from data_prep.words import count_words, find_words

SCRIPTS = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "THAI",
           "LAO", "KHMER", "MYANMAR")  # fmt: skip


@given(st.text(st.characters(max_codepoint=0xDFF) | st.sampled_from("–—“”’…€ḩ가나")))
def test_text_of_scripts_with_spaces_is_counted_and_found_as_before(text: str) -> None:
    assert count_words(text) == len(text.split())
    assert find_words(text) == re.findall(r"\w+", text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("吾輩は猫である。", "吾 輩 は 猫 で あ る"),
        ("「東京」は2020年の 大都市 (capital city) 。", "東 京 は 2020 年 の 大 都 市 capital city"),
        ("ﾊﾝｶｸ、々〆 𠮷野家", "ﾊ ﾝ ｶ ｸ 々 〆 𠮷 野 家"),
        ("ภาษา ไทย", "ภ า ษ า ไ ท ย"),
        ("ລາວ ខ្មែរ မြန်မာ", "ລ າ ວ ខ ម រ မ န မ"),
        ("한국어 문장 and 漢", "한국어 문장 and 漢"),
        ("Ein Wort – 字", "Ein Wort 字"),
    ],
)
def test_letters_of_scripts_without_spaces_are_words_one_by_one(text: str, found: str) -> None:
    assert find_words(text) == found.split()
    assert count_words(text) == len(found.split())


def test_every_letter_of_those_scripts_is_known() -> None:
    for letter in filter(str.isalnum, map(chr, range(sys.maxunicode + 1))):
        if unicodedata.name(letter, "").startswith(SCRIPTS):
            assert find_words(letter * 3) == [letter] * 3, hex(ord(letter))


def japanese(seed: int, *, sentences: int = 80) -> list[str]:
    """Sentences without a space, as different as their numbers."""
    kana = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほ"
    made = []
    for i in range(sentences):
        n = (seed * 1009 + i * 7919 + 1) ** 3
        made.append("これは" + "".join(kana[n // 31**k % len(kana)] for k in range(12)) + "の話である。")
    return made


def test_japanese_texts_are_kept_and_their_near_duplicates_found(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("".join(japanese(i)))
    changed = japanese(3)
    changed[40:42] = japanese(50)[:2]
    (tmp_path / "copy.txt").write_text("".join(changed))
    settings = BuildSettings(sources=(f"text:{tmp_path}/*.txt",), vocab_size=128, tasks=2, language="ja")
    manifest = build(settings, tmp_path / "out", tell=lambda line: None)
    (row,) = manifest.statistics["sources"]
    assert manifest.documents == 8 and row["dropped"] == {"near duplicate": 1}
    assert row["words"] == 8 * 80 * 20


def test_rows_that_are_japanese_documents_stay_apart(tmp_path: Path) -> None:
    rows = ["".join(japanese(i, sentences=5)) for i in range(20)]
    assert [
        text for _, text in tables.whole(iter([(str(i), text) for i, text in enumerate(rows)]), "a")
    ] == rows
