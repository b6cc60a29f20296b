"""Claims about turning sentences into ids."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep import tokens, vocab
from data_prep.tokens import Tokens
from texts import prose

ALPHABET = "abcdeABÉéİßΣσ中文01.,()\"'-–’“_/  \t\u00a0\u0338\u0301\u200d[]#😀ﬁ"
SENTENCES = [
    "A cabbage, a bead (abc) and 'decade'.",
    "Éa – “bad” face's 10.01!",
    "[MASK] is a word, [UNK] too.",
]


LETTERS = {
    "uncased": vocab.Letters(),
    "cased": vocab.Letters(cased=True),
    "uncased with accents": vocab.Letters(accents=True),
    "cased without accents": vocab.Letters(cased=True, accents=False),
}


@pytest.fixture(scope="module", params=list(LETTERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    letters = LETTERS[request.param]
    path = tmp_path_factory.mktemp("tokenizer")
    text = [*SENTENCES * 3, ALPHABET, ALPHABET, *(prose(i) for i in range(20))]
    learnt = vocab.learn([text], vocab_size=192, letters=letters)
    vocab.save(learnt, path, letters)
    return path


def expected(folder: Path, sentences: list[str]) -> list[list[int]]:
    tokenizer = vocab.load(folder)
    tokenizer.encode_special_tokens = True
    return [e.ids for e in tokenizer.encode_batch(sentences, add_special_tokens=False)]


def found(encoder: Tokens, sentences: list[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(sentences)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if sentences else []


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_ids_are_those_of_tokenizers_for_any_text(folder: Path, data: st.DataObject) -> None:
    anything = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=40)
    likely = st.text(st.sampled_from(ALPHABET), max_size=60)
    sentences = data.draw(st.lists(st.one_of(likely, anything, st.sampled_from(SENTENCES)), max_size=6))
    encoder = Tokens(folder)
    assert encoder.by_word
    for _ in range(2):  # as learnt and as remembered
        assert found(encoder, sentences) == expected(folder, sentences)


@pytest.mark.parametrize("added", [None, "bad face"], ids=["by word", "whole"])
def test_no_text_gives_the_id_of_a_special_token(added: str | None, folder: Path, tmp_path: Path) -> None:
    tokenizer = vocab.load(folder)
    if added is not None:
        tokenizer.add_tokens([added])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = Tokens(tmp_path)
    assert encoder.by_word == (added is None)
    ids, lengths = encoder.encode(["A bad [MASK], [CLS] and[SEP].", "[PAD]"])
    assert lengths.min() > 0 and {1}.issuperset(ids[ids < 5].tolist()), "[UNK] alone: of letters it has not"


def test_what_is_remembered_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_REMEMBERED", 50)
    encoder = Tokens(folder)
    for i in range(40):
        sentences = [f"word{i} other{i} abc{i}, {j}" for j in range(5)]
        assert found(encoder, sentences) == expected(folder, sentences)
        assert len(encoder._known) < 70


def test_a_tokenizer_of_another_kind_encodes_whole_sentences(tmp_path: Path) -> None:
    other = Tokenizer(models.WordLevel({"[UNK]": 0, "a b": 1, "c": 2}, unk_token="[UNK]"))
    other.pre_tokenizer = pre_tokenizers.Split(", ", "removed")
    other.save(str(tmp_path / "tokenizer.json"))
    encoder = Tokens(tmp_path)
    assert not encoder.by_word
    assert found(encoder, ["a b, c", "c, d"]) == [[1, 2], [2, 0]]


@pytest.mark.parametrize("added", ["bad face", "covid-19", "node.js", "c/a"])
def test_added_tokens_with_a_space_or_mark_are_kept_whole(added: str, folder: Path, tmp_path: Path) -> None:
    changed = vocab.load(folder)
    changed.add_tokens([added])
    changed.save(str(tmp_path / "tokenizer.json"))
    encoder = Tokens(tmp_path)
    assert not encoder.by_word
    (ids,) = found(encoder, [f"a {added}, a"])
    assert [ids] == expected(tmp_path, [f"a {added}, a"]) and changed.token_to_id(added) in ids


def test_added_tokens_of_one_word_leave_the_way_by_word(folder: Path, tmp_path: Path) -> None:
    changed = vocab.load(folder)
    changed.add_tokens(["c++", "abba"])
    changed.save(str(tmp_path / "tokenizer.json"))
    encoder = Tokens(tmp_path)
    sentences = ["a c++-abba (c++) a", "abba's"]
    assert encoder.by_word and found(encoder, sentences) == expected(tmp_path, sentences)
