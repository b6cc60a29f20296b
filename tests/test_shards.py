"""The corpus on disk: what was written is what is read, and what was damaged is named."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlybert.config import EarlyBertError
from earlybert.shards import (
    MANIFEST,
    Corpus,
    Manifest,
    ShardInfo,
    ShardWriter,
    file_sha256,
    read_manifest,
    shard_name,
    token_type_for,
    tokenizer_sha256,
    write_manifest,
)

Documents = list[tuple[list[int], list[int]]]


def _manifest(folder: Path, infos: list[ShardInfo], *, token_dtype: str = "uint16") -> Manifest:
    return Manifest(
        tokenizer_sha256=tokenizer_sha256(folder / "tokenizer"),
        vocab_size=1000,
        token_dtype=token_dtype,  # type: ignore[arg-type]
        documents=sum(info.documents for info in infos),
        sentences=sum(info.sentences for info in infos),
        tokens=sum(info.tokens for info in infos),
        shards=tuple(infos),
        fingerprint="f" * 64,
        settings={"sources": ["text:*.txt"]},
        sources={"text": {"documents": 3, "tokens": 9}},
        statistics={"dropped": {"empty": 1}},
    )


def _write(folder: Path, shards: list[Documents], *, token_dtype: str = "uint16") -> Manifest:
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    infos = []
    for index, documents in enumerate(shards):
        path = folder / shard_name(index, of=len(shards))
        with ShardWriter(path, token_dtype=token_dtype) as writer:  # type: ignore[arg-type]
            for number, (tokens, starts) in enumerate(documents):
                writer.add(tokens, starts, "text", f"{index}/{number}")
        infos.append(writer.close())
    manifest = _manifest(folder, infos, token_dtype=token_dtype)
    write_manifest(folder, manifest)
    return manifest


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    tokens = draw(st.lists(st.integers(0, 65535), min_size=1, max_size=30))
    inner = draw(st.sets(st.integers(1, len(tokens)), max_size=5))
    return tokens, [0, *sorted(start for start in inner if start < len(tokens))]


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    shards = [
        [(rng.integers(0, 1000, 20 + number).tolist(), [0, 5, 11]) for number in range(8)] for _ in range(3)
    ]
    _write(tmp_path, shards)
    return tmp_path


@given(shards=st.lists(st.lists(documents(), max_size=6), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_documents_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, shards: list[Documents]
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    _write(folder, shards)
    corpus = Corpus.open(folder, verify="checksum")
    written = [document for shard in shards for document in shard]
    assert len(corpus) == len(written)
    assert corpus.document_lengths.tolist() == [len(tokens) for tokens, _ in written]
    for index, (tokens, starts) in enumerate(written):
        found, found_starts = corpus.document(index)
        assert found.tolist() == tokens and found_starts.tolist() == starts


def test_many_batches_of_rows_come_back_in_order(tmp_path: Path) -> None:
    written = [([number % 1000, number // 1000], [0]) for number in range(2500)]
    _write(tmp_path, [written])
    corpus = Corpus.open(tmp_path)
    for index in (0, 999, 1000, 1999, 2000, 2499):
        assert corpus.document(index)[0].tolist() == written[index][0]
        assert corpus.origin(index) == ("text", f"0/{index}")


def test_a_document_is_a_view_that_cannot_be_written(corpus_folder: Path) -> None:
    tokens, starts = Corpus.open(corpus_folder).document(3)
    assert not tokens.flags.owndata and not tokens.flags.writeable
    assert tokens.dtype == np.uint16 and starts.dtype == np.uint32


def test_a_pickled_corpus_reads_the_same_documents(corpus_folder: Path) -> None:
    corpus = Corpus.open(corpus_folder)
    again = pickle.loads(pickle.dumps(corpus))
    assert all(np.array_equal(corpus.document(i)[0], again.document(i)[0]) for i in range(len(corpus)))


def test_datasets_opens_a_shard(corpus_folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    opened = datasets.Dataset.from_file(str(corpus_folder / shard_name(1, of=3)))
    corpus = Corpus.open(corpus_folder)
    assert opened.column_names == ["tokens", "sentence_starts", "source", "id"]
    assert opened[2]["tokens"] == corpus.document(8 + 2)[0].tolist()
    assert opened[2]["id"] == "1/2"


def test_a_vocabulary_past_16_bits_is_stored_in_32(tmp_path: Path) -> None:
    assert token_type_for(65536) == "uint16" and token_type_for(65537) == "uint32"
    _write(tmp_path, [[([70000, 3], [0])]], token_dtype="uint32")
    assert Corpus.open(tmp_path).document(0)[0].tolist() == [70000, 3]


def test_the_manifest_comes_back_as_it_was_written(corpus_folder: Path) -> None:
    manifest = read_manifest(corpus_folder)
    write_manifest(corpus_folder, manifest)
    assert read_manifest(corpus_folder) == manifest
    shard = manifest.shards[0]
    assert shard.sha256 == file_sha256(corpus_folder / shard.name)
    assert (shard.documents, shard.sentences) == (8, 24)


@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
@settings(max_examples=15, deadline=None)
def test_a_flipped_bit_in_a_shard_is_named(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    _write(folder, [[([1, 2, 3], [0])], [([4, 5, 6, 7], [0, 2])]])
    path = folder / shard_name(1, of=2)
    damaged = bytearray(path.read_bytes())
    damaged[place % len(damaged)] ^= 1 << bit
    path.write_bytes(damaged)
    with pytest.raises(EarlyBertError, match=r"shard-00001-of-00002.*sha256.*manifest says.*prepare"):
        Corpus.open(folder, verify="checksum")


def test_a_truncated_shard_is_named_without_hashing(corpus_folder: Path) -> None:
    path = corpus_folder / shard_name(2, of=3)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EarlyBertError, match=r"shard-00002-of-00003.*bytes, the manifest says"):
        Corpus.open(corpus_folder)


def test_a_missing_shard_is_named(corpus_folder: Path) -> None:
    (corpus_folder / shard_name(0, of=3)).unlink()
    with pytest.raises(EarlyBertError, match=r"shard-00000-of-00003.*missing"):
        Corpus.open(corpus_folder)


def test_a_shard_that_is_no_arrow_stream_is_named(corpus_folder: Path) -> None:
    path = corpus_folder / shard_name(0, of=3)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(EarlyBertError, match=r"shard-00000-of-00003.*not a readable Arrow stream"):
        Corpus.open(corpus_folder)


def test_another_tokenizer_beside_the_shards_is_named(corpus_folder: Path) -> None:
    (corpus_folder / "tokenizer" / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(EarlyBertError, match=r"tokenizer has sha256 .* put that tokenizer back"):
        Corpus.open(corpus_folder)


def test_a_folder_without_a_manifest_is_not_a_corpus(corpus_folder: Path) -> None:
    (corpus_folder / MANIFEST).unlink()
    with pytest.raises(EarlyBertError, match=r"not a finished corpus.*prepare"):
        Corpus.open(corpus_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99, this program reads 1"),
        ({"shards": [{"name": "x"}]}, "not a corpus manifest"),
        ({"surprise": 1}, "not a corpus manifest"),
        ({"documents": 25}, "holds 24 documents .* manifest says 25"),
        ({"token_dtype": "uint32"}, "does not hold the uint32 tokens"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(corpus_folder: Path, change: dict, message: str) -> None:
    values = json.loads((corpus_folder / MANIFEST).read_text())
    (corpus_folder / MANIFEST).write_text(json.dumps(values | change))
    with pytest.raises(EarlyBertError, match=message):
        Corpus.open(corpus_folder)


def test_a_manifest_cut_short_is_refused(corpus_folder: Path) -> None:
    (corpus_folder / MANIFEST).write_text('{"version": 1, "sha')
    with pytest.raises(EarlyBertError, match=r"manifest\.json: not valid JSON"):
        read_manifest(corpus_folder)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="stop"),
        ShardWriter(tmp_path / "a.arrow", token_dtype="uint16") as writer,
    ):
        writer.add([1, 2], [0], "text", "1")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    writer = ShardWriter(path, token_dtype="uint16")
    writer.add([1, 2], [0], "text", "1")
    assert not path.exists()
    info = writer.close()
    assert path.stat().st_size == info.bytes and info == writer.close()
    with pa.memory_map(str(path)) as mapped:
        assert pa.ipc.open_stream(mapped).read_all().num_rows == 1


@pytest.mark.parametrize(
    ("tokens", "starts", "message"),
    [
        ([], [], "no tokens"),
        ([1, 2], [1], "ascend from 0"),
        ([1, 2, 3], [0, 2, 1], "ascend from 0"),
        ([1, 2, 3], [0, 3], "stay below its 3 tokens"),
        ([1, 65536], [0], "token id 65536 does not fit uint16"),
    ],
)
def test_a_malformed_document_is_refused(
    tmp_path: Path, tokens: list[int], starts: list[int], message: str
) -> None:
    writer = ShardWriter(tmp_path / "a.arrow", token_dtype="uint16")
    with pytest.raises(EarlyBertError, match=message):
        writer.add(tokens, starts, "text", "doc 7")
    writer.close()


def test_a_shard_may_hold_no_documents(tmp_path: Path) -> None:
    manifest = _write(tmp_path, [[], [([1], [0])]])
    assert manifest.shards[0].documents == 0
    corpus = Corpus.open(tmp_path)
    assert len(corpus) == 1 and corpus.document(0)[0].tolist() == [1]
    with pytest.raises(IndexError):
        corpus.document(1)


def test_shard_infos_go_to_json_and_back(corpus_folder: Path) -> None:
    info = read_manifest(corpus_folder).shards[0]
    assert ShardInfo(**json.loads(json.dumps(dataclasses.asdict(info)))) == info
