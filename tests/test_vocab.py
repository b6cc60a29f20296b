"""Claims about the WordPiece vocabulary."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import vocab
from earlybert.config import EarlyBertError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "vocab" / "bert-base-uncased-vocab.txt"

SYLLABLES = ["ba", "ke", "lo", "mi", "nu", "ra", "si", "to", "vé", "zu"]


def sentences(count: int = 400) -> list[list[str]]:
    """Text with many distinct words, as pseudo-random as a hash."""
    made = []
    for i in range(count):
        digits = hashlib.sha256(str(i % 97).encode()).hexdigest()
        words = ["".join(SYLLABLES[int(d, 16) % 10] for d in digits[k : k + 3]) for k in range(0, 30, 3)]
        made.append([" ".join(words).capitalize() + f", nº {i % 50}."])
    return made


def test_special_tokens_are_ids_0_to_4_and_the_size_is_a_multiple_of_64() -> None:
    tokenizer = vocab.learn(sentences(), vocab_size=300)
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert tokenizer.get_vocab_size() == 320
    assert [tokenizer.id_to_token(i) for i in (300, 319)] == ["[unused0]", "[unused19]"]


def test_a_new_process_learns_the_same_ids() -> None:
    """`tokenizers` seeds its hash maps anew in each process; the order of ids must not show it."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]; import test_vocab as t; from data_prep import vocab; "
        "print(vocab.learn(t.sentences(), vocab_size=320).to_str())"
    )
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", program, str(here), str(here.parent)]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(other) == json.loads(vocab.learn(sentences(), vocab_size=320).to_str())


def test_the_order_of_the_text_does_not_matter() -> None:
    one = vocab.learn(sentences(), vocab_size=320)
    other = vocab.learn(sentences()[::-1], vocab_size=320)
    assert one.to_str() == other.to_str()


def test_lower_case_is_the_default_and_cased_keeps_case_and_accents() -> None:
    lower = vocab.learn(sentences(), vocab_size=320)
    cased = vocab.learn(sentences(), vocab_size=320, letters=vocab.Letters(cased=True))
    assert "é" not in lower.get_vocab() and "B" not in lower.get_vocab()
    assert "é" in cased.get_vocab() and "B" in cased.get_vocab()
    assert lower.encode("Vékelo").tokens == lower.encode("vekelo").tokens


def test_accents_and_case_are_chosen_apart() -> None:
    kept = vocab.learn(sentences(), vocab_size=320, letters=vocab.Letters(accents=True))
    assert "é" in kept.get_vocab() and "B" not in kept.get_vocab()
    assert kept.encode("Vékelo").tokens == kept.encode("vékelo").tokens != kept.encode("vekelo").tokens
    stripped = vocab.learn(sentences(), vocab_size=320, letters=vocab.Letters(cased=True, accents=False))
    assert "é" not in stripped.get_vocab() and "B" in stripped.get_vocab()


@pytest.mark.parametrize("reserved", [0, 1, 64, 100])
def test_reserved_pieces_are_there_and_the_size_is_a_multiple_of_64(reserved: int) -> None:
    known = vocab.learn(sentences(), vocab_size=320, reserved=reserved).get_vocab()
    unused = [piece for piece in known if piece.startswith("[unused")]
    assert reserved <= len(unused) < reserved + 64 and len(known) % 64 == 0
    assert known["[unused0]" if unused else "[MASK]"] == (320 if unused else 4)


@pytest.mark.parametrize(
    "letters",
    [vocab.Letters(), vocab.Letters(accents=True), vocab.Letters(cased=True, accents=False)],
    ids=str,
)
def test_auto_tokenizer_opens_the_folder_with_the_same_letters(
    letters: vocab.Letters, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = vocab.learn(sentences(), vocab_size=320, letters=letters)
    vocab.save(tokenizer, tmp_path, letters)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = "Vékelo Babele, ÉÈ vekelo."
    assert opened(text)["input_ids"] == tokenizer.encode(text).ids


def test_auto_tokenizer_opens_the_folder_as_a_fast_bert_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = vocab.learn(sentences(), vocab_size=320)
    vocab.save(tokenizer, tmp_path)
    opened = AutoTokenizer.from_pretrained(str(tmp_path))
    assert opened.is_fast and opened.vocab_size == 320
    assert (opened.pad_token_id, opened.unk_token_id, opened.mask_token_id) == (0, 1, 4)
    for text in ("Bakelo mi, nura!", "Vé ZU\tunknown 日本", "[MASK] ba"):
        assert opened(text)["input_ids"] == tokenizer.encode(text).ids
    pair = opened("bakelo", "mi")
    assert pair["token_type_ids"] == tokenizer.encode("bakelo", "mi").type_ids
    assert vocab.load(tmp_path).to_str() == tokenizer.to_str()


def test_too_little_text_names_the_size_and_a_smaller_one() -> None:
    with pytest.raises(
        EarlyBertError, match=r"too little text for --vocab-size 8192: it gives only .* use --vocab-size"
    ):
        vocab.learn(sentences(), vocab_size=8192)


@pytest.mark.parametrize("size", [0, -5, 100, 1 << 30])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(EarlyBertError, match=f"--vocab-size {size}: choose from"):
        vocab.check_size(size)


def test_a_given_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    given, taken = tmp_path / "given", tmp_path / "taken"
    vocab.save(vocab.learn(sentences(), vocab_size=320), given)
    vocab.take(given, taken, vocab.Letters())
    assert {p.name for p in taken.iterdir()} == {p.name for p in given.iterdir()}
    assert (taken / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    assert vocab.identity(given) == vocab.identity(taken)


@pytest.mark.parametrize("letters", [vocab.Letters(cased=True), vocab.Letters(accents=False)], ids=str)
def test_letters_are_chosen_for_a_bare_vocabulary_and_refused_for_a_whole_tokenizer(
    letters: vocab.Letters, tmp_path: Path
) -> None:
    vocab.save(vocab.learn(sentences(), vocab_size=320), tmp_path)
    with pytest.raises(EarlyBertError, match=r"its tokenizer\.json says .*leave --cased and --accents out"):
        vocab.identity(tmp_path, letters)
    for bare in (tmp_path / "vocab.txt", tmp_path):
        if bare == tmp_path:
            (tmp_path / "tokenizer.json").unlink()
        assert vocab.identity(bare, letters) == vocab.identity(bare)
        vocab.take(bare, tmp_path / "taken", letters)
        config = json.loads((tmp_path / "taken" / "tokenizer_config.json").read_text())
        assert config["do_lower_case"] != letters.cased


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end"])
def test_a_piece_that_some_call_the_end_of_a_line_keeps_the_ids_after_it(
    end: str, last: str, tmp_path: Path
) -> None:
    pieces = [*vocab.SPECIAL_TOKENS, "a", "\u2028", "b", "\x85", "\x1c", "c"]
    text = end.join(pieces) + (end if last == "end" else "")
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    vocab.take(tmp_path, tmp_path / "taken", vocab.Letters())
    taken = vocab.load(tmp_path / "taken")
    assert [taken.id_to_token(i) for i in range(taken.get_vocab_size())] == pieces
    assert vocab._read_vocabulary(tmp_path / "taken" / "vocab.txt") == taken.get_vocab()


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EarlyBertError, match=r"no tokenizer\.json or vocab\.txt"):
        vocab.identity(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nword\n")
    with pytest.raises(EarlyBertError, match=r"has no \[MASK\]"):
        vocab.identity(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EarlyBertError, match="not a readable tokenizer"):
        vocab.identity(tmp_path)


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared BERT vocabulary is not on this machine")
def test_berts_own_vocabulary_gives_berts_own_ids(tmp_path: Path) -> None:
    vocab.take(SHARED, tmp_path, vocab.Letters())
    tokenizer = vocab.load(tmp_path)
    assert tokenizer.get_vocab_size() == 30522
    assert tokenizer.encode("Hello world").ids == [101, 7592, 2088, 102]
