"""Megatron's .bin/.idx: what DeepSpeed's own reader finds in them, and the way back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from corpora import random_documents, write_corpus
from data_prep import megatron
from earlybert.config import EarlyBertError
from earlybert.shards import Corpus

DOCUMENTS = random_documents(40, longest=80)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", DOCUMENTS)


@pytest.fixture
def tokenizer(corpus, tmp_path):
    """A real one with the ids of the corpus."""
    (tmp_path / "tokenizer").mkdir()
    values = json.loads((corpus.tokenizer_folder / "tokenizer.json").read_text())["model"]["vocab"]
    Tokenizer(WordPiece(values, unk_token="[UNK]")).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tmp_path / "tokenizer"


@pytest.fixture
def prefix(corpus, tmp_path):
    assert megatron.write(corpus, tmp_path / "m" / "data")[0] == 40
    return tmp_path / "m" / "data"


def test_deepspeeds_own_reader_finds_every_sentence_and_document(corpus, prefix):
    from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDataset

    dataset = MMapIndexedDataset(str(prefix), skip_warmup=True)
    place = 0
    for index, (tokens, starts) in enumerate(DOCUMENTS):
        assert dataset.doc_idx[index] == place
        for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            assert np.array_equal(dataset[place], tokens[begin:end])
            place += 1
    assert len(dataset) == place == dataset.doc_idx[-1]


def test_what_deepspeeds_builder_writes_becomes_a_corpus(tokenizer, tmp_path):
    import torch
    from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder

    builder = MMapIndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for tokens, starts in DOCUMENTS:
        for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            builder.add_item(torch.from_numpy(tokens[begin:end].astype(np.int32)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    back(tmp_path / "theirs", tokenizer, tmp_path / "out")


def test_there_and_back_is_the_same_corpus(tokenizer, prefix, tmp_path):
    back(prefix, tokenizer, tmp_path / "out")


def back(prefix, tokenizer, out):
    megatron.read(prefix, tokenizer=tokenizer, out=out, shards=3)
    again = Corpus.open(out, verify="checksum")
    assert len(again) == len(DOCUMENTS)
    for index, (tokens, starts) in enumerate(DOCUMENTS):
        found, places = again.document(index)
        assert np.array_equal(found, tokens) and places.tolist() == starts


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: cut(p, ".idx", 30), "idx has .* bytes, its header says"),
        (lambda p: cut(p, ".idx", 10**9), "idx: missing or empty"),
        (lambda p: cut(p, ".bin", 1), "bin has .* bytes, no multiple of an id's 4; it is truncated"),
        (lambda p: cut(p, ".bin", 400), "does not fit .*get both again"),
        (lambda p: put(p, ".idx", 0, b"X"), "not a Megatron index of version 1"),
        (
            lambda p: put(p, ".idx", 17, b"\x08"),
            "ids of type 8, which Megatron and",
        ),
        (lambda p: put(p, ".bin", 3, b"\x7f"), "the tokenizer has 500; give the tokenizer"),
        (lambda p: p.with_name("data.bin").unlink(), "bin: missing or empty"),
    ],
)
def test_files_that_do_not_hold_together_are_refused(tokenizer, prefix, tmp_path, damage, says):
    damage(prefix)
    with pytest.raises(EarlyBertError, match=says):
        megatron.read(prefix, tokenizer=tokenizer, out=tmp_path / "out", shards=2)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_folder_that_holds_something_is_not_written_over(corpus, tokenizer, prefix, tmp_path):
    shutil.copytree(corpus.folder, tmp_path / "out")
    with pytest.raises(EarlyBertError, match="exists and is not an empty folder"):
        megatron.read(prefix, tokenizer=tokenizer, out=tmp_path / "out", shards=2)


def test_places_where_nothing_can_be_written_are_refused(corpus, tokenizer, prefix, tmp_path):
    (tmp_path / "file").touch()
    for out, says in (("file", "exists and is not an empty folder"), ("file/x", "x cannot be made: .*--out")):
        with pytest.raises(EarlyBertError, match=says):
            megatron.read(prefix, tokenizer=tokenizer, out=tmp_path / out, shards=2)
    for folder in (".", ".."):
        with pytest.raises(EarlyBertError, match="is a folder; give the files' prefix, such as"):
            megatron.write(corpus, Path(folder))
    assert (tmp_path / "file").is_file()


def cut(prefix, suffix, count):
    path = prefix.with_name(prefix.name + suffix)
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - count)])


def put(prefix, suffix, at, value):
    path = prefix.with_name(prefix.name + suffix)
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)
