"""Claims about SOURCE words and the files behind them."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import python_docs, sources
from earlybert.config import EarlyBertError

BOOKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "books" / "books.tar.xz"
EXTRACT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikipedia" / "extract-en-2015"


def read(word: str) -> list[sources.Raw]:
    source = sources.parse(word)
    return [
        raw for path in sources.files(source) for raw in source.documents(path, progress=lambda done: None)
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("feather:x/*.feather", "unknown kind 'feather'; supported: python-docs, text:GLOB"),
        ("txt:a", "unknown kind 'txt'; did you mean text"),
        ("notes.txt", r"unknown kind 'notes\.txt'"),
        ("text:", "write it as text:GLOB"),
        ("python-docs:3", "write it as python-docs"),
    ],
)
def test_a_word_that_is_no_source_is_refused(word: str, message: str) -> None:
    with pytest.raises(EarlyBertError, match=message):
        sources.parse(word)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "wikipedia", "wikiextractor"])
def test_a_pattern_without_a_match_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(EarlyBertError, match="no file matches"):
        sources.files(sources.parse(f"{kind}:{tmp_path}/*.none"))


def test_a_file_that_a_pattern_matches_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("c.txt", "a/b/d.txt"):
        (tmp_path / name).write_text(name)
    assert [raw.text for raw in read(f"text:{tmp_path}/**/**/*.txt")] == ["a/b/d.txt", "c.txt"]


@pytest.mark.parametrize("kind", ["jsonl:{}/train.jsonl", "hf:{}", "hf-stream:{}"])
def test_rows_whose_id_is_null_have_ids_of_their_own(kind: str, tmp_path: Path) -> None:
    rows = [{"id": None, "text": text} for text in ARTICLES[:3]]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ids = [raw.id for raw in read(kind.format(tmp_path))]
    assert len(set(ids)) == 3 and "None" not in ids


def test_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(EarlyBertError, match="is empty: 1 files of 0 bytes"):
        sources.files(sources.parse(f"text:{tmp_path}/*"))


COMPRESSIONS = {
    "bz2": bz2.compress, "gz": gzip.compress, "xz": lzma.compress, "zst": pa.Codec("zstd").compress,
}  # fmt: skip


@pytest.mark.parametrize("form", COMPRESSIONS)
def test_compression_is_told_from_the_content(form: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(COMPRESSIONS[form]("Ein süßer Text.".encode()))
    assert [raw.text for raw in read(f"text:{tmp_path}/a")] == ["Ein süßer Text."]


@pytest.mark.parametrize("form", COMPRESSIONS)
def test_a_truncated_stream_is_refused_by_name(form: str, tmp_path: Path) -> None:
    data = "".join(f"line {i} {i * i}\n" for i in range(20_000)).encode()
    (tmp_path / "a.txt").write_bytes(COMPRESSIONS[form](data)[:-400])
    with pytest.raises(
        EarlyBertError, match=rf"a\.txt: the {form} stream breaks after \d+ bytes .*truncated"
    ):
        read(f"text:{tmp_path}/a.txt")


def test_a_damaged_stream_is_refused(tmp_path: Path) -> None:
    data = bytearray(bz2.compress(b"some text " * 10_000))
    data[20] ^= 0xFF
    (tmp_path / "a.bz2").write_bytes(data)
    with pytest.raises(EarlyBertError, match="bz2 stream breaks"):
        read(f"text:{tmp_path}/a.bz2")


@pytest.mark.parametrize("before", ["", "é" * 10, "x" * ((1 << 20) - 1) + "é" + "y" * 50])
def test_a_byte_that_is_not_utf8_is_named_with_its_offset(before: str, tmp_path: Path) -> None:
    start = before.encode()
    (tmp_path / "a.txt").write_bytes(start + b"\xff rest\n")
    with pytest.raises(EarlyBertError, match=rf"a\.txt: not UTF-8: byte 0xff at offset {len(start)} "):
        read(f"text:{tmp_path}/a.txt")


def test_a_character_cut_at_the_end_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text é".encode()[:-1])
    with pytest.raises(EarlyBertError, match="byte 0xc3 at offset 5 "):
        read(f"text:{tmp_path}/a.txt")


def test_a_text_file_is_a_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.")
    (tmp_path / "a.txt").write_text("Three.\n")
    assert [(raw.id, raw.text) for raw in read(f"text:{tmp_path}/*")] == [
        ("a.txt", "Three."),
        ("b.txt", "One.\nTwo."),
    ]


def test_a_huge_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    paragraph = "word " * 2000 + "\n\n"
    (tmp_path / "a.txt").write_text(paragraph * 300)
    found = read(f"text:{tmp_path}/a.txt")
    assert len(found) == 3 and len({raw.id for raw in found}) == 3
    assert sum(raw.text.count("word") for raw in found) == 600_000


def test_jsonl_needs_a_text_in_every_line_and_names_the_line(tmp_path: Path) -> None:
    rows = [{"text": "One.", "id": 5}, {"text": "Two."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [(raw.id, raw.text) for raw in read(f"jsonl:{tmp_path}/a.jsonl")] == [
        ("5", "One."),
        ("a.jsonl:2", "Two."),
    ]
    for line, message in (
        ('{"title": "x"}', r"a\.jsonl, line 2: no text; .*found: title"),
        ('{"text": 3}', "line 2: no text"),
        ("[1]", "line 2: no text"),
        ('{"text": "x"', "line 2: not JSON"),
    ):
        (tmp_path / "a.jsonl").write_text('{"text": "One."}\n' + line + "\n")
        with pytest.raises(EarlyBertError, match=message):
            read(f"jsonl:{tmp_path}/a.jsonl")


DOCS = (
    '<doc id="12" url="http://x?curid=12" title="Moon">\nMoon\n\nThe Moon is &lt;big&gt;.\n</doc>\n'
    '<doc id="13" url="u" title="A &quot;b&quot;">\nText.\n</doc>\n'
)


def test_wikiextractor_blocks_are_documents_without_their_title_line(tmp_path: Path) -> None:
    (tmp_path / "wiki_00").write_text(DOCS)
    found = read(f"wikiextractor:{tmp_path}/*")
    assert [(raw.id, raw.text) for raw in found] == [("12", "The Moon is &lt;big&gt;."), ("13", "Text.")]
    assert sources.parse("wikiextractor:x").clean(found[0]) == "The Moon is <big>."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DOCS[:-8], "<doc id='13'> has no </doc>"),
        ("Text.\n" + DOCS, "line 1: text outside a <doc"),
        (DOCS.replace("</doc>\n", "", 1), "line 5: a <doc> inside <doc id='12'>"),
    ],
)
def test_broken_wikiextractor_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "wiki_00").write_text(text)
    with pytest.raises(EarlyBertError, match=message):
        read(f"wikiextractor:{tmp_path}/*")


def _tar(path: Path, members: dict[str, bytes], mode: str) -> None:
    if mode == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in members.items():
                zipped.writestr(name, content)
        return
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


FORMS = [("b.tar", "w"), ("b.tar.gz", "w:gz"), ("b.tar.xz", "w:xz"), ("b.zip", "zip")]


@pytest.mark.parametrize(("name", "mode"), FORMS)
def test_an_archive_and_a_folder_of_the_same_books_read_the_same(
    name: str, mode: str, tmp_path: Path
) -> None:
    books = {"A - One.txt": b"# One\n\nText.", "B - Two.md": "Zwei süße.".encode()}
    _tar(tmp_path / name, {f"books/{k}": v for k, v in books.items()}, mode)
    folder = tmp_path / "books"
    folder.mkdir()
    for key, data in books.items():
        (folder / key).write_bytes(data)
    assert read(f"books:{tmp_path / name}") == read(f"books:{folder}")
    assert [raw.id for raw in read(f"books:{folder}")] == list(books)


@pytest.mark.parametrize("mode", ["w", "w:gz", "zip", None])
def test_compressed_books_are_read_from_a_folder_and_an_archive(mode: str | None, tmp_path: Path) -> None:
    texts = {form: f"Ein süßes Buch,\nals {form}." for form in COMPRESSIONS}
    books = {f"{form}.txt.{form}": bytes(COMPRESSIONS[form](text.encode())) for form, text in texts.items()}
    place = tmp_path / {None: "books", "zip": "b.zip"}.get(mode, "b.tar")
    if mode is None:
        place.mkdir()
        for name, content in books.items():
            (place / name).write_bytes(content)
    else:
        _tar(place, books, mode)
    assert [raw.text for raw in read(f"books:{place}")] == list(texts.values())


def test_a_book_in_an_archive_whose_compression_breaks_off_is_refused_by_name(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", {"b.txt.gz": gzip.compress(b"Text. " * 999)[:-9]}, "w")
    with pytest.raises(EarlyBertError, match=r"a\.tar: b\.txt\.gz: the gz stream breaks after \d+ bytes"):
        read(f"books:{tmp_path}/a.tar")


def test_bad_books_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EarlyBertError, match="no such folder or archive"):
        sources.files(sources.parse(f"books:{tmp_path}/none"))
    with pytest.raises(EarlyBertError, match="holds no book"):
        sources.files(sources.parse(f"books:{tmp_path}"))
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    with pytest.raises(EarlyBertError, match="neither a folder nor an archive"):
        sources.files(sources.parse(f"books:{tmp_path}/a.rar"))
    _tar(tmp_path / "a.tar", {"a.txt": b"fine", "b.txt": b"abc\xe9def"}, "w")
    with pytest.raises(EarlyBertError, match=r"a\.tar: b\.txt: not UTF-8: byte 0xe9 at offset 3 "):
        read(f"books:{tmp_path}/a.tar")
    _tar(tmp_path / "c.tar", {"a.txt": b"x" * 50_000}, "w")
    (tmp_path / "c.tar").write_bytes((tmp_path / "c.tar").read_bytes()[:20_000])
    with pytest.raises(EarlyBertError, match=r"c\.tar: not a whole tar file"):
        read(f"books:{tmp_path}/c.tar")
    _tar(tmp_path / "d.zip", {"a.txt": b"fine " * 9999, "b.txt": b"abc\xe9def"}, "zip")
    with pytest.raises(EarlyBertError, match=r"d\.zip: b\.txt: not UTF-8: byte 0xe9 at offset 3 "):
        read(f"books:{tmp_path}/d.zip")
    content = bytearray((tmp_path / "d.zip").read_bytes())
    (tmp_path / "cut.zip").write_bytes(content[:-30])
    content[60] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(content)
    for name in ("cut", "flipped"):
        with pytest.raises(EarlyBertError, match=rf"{name}\.zip: not a whole, open zip file"):
            read(f"books:{tmp_path}/{name}.zip")
    (tmp_path / "d.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(EarlyBertError, match=r"d\.tar: not a whole tar file"):
        read(f"books:{tmp_path}/d.tar")


def test_a_file_that_is_no_book_is_counted_as_dropped(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", {"cover.jpg": b"\xff\xd8", "a.txt": b"Text."}, "w")
    assert [raw.dropped for raw in read(f"books:{tmp_path}/a.tar")] == ["not a book file", None]


def test_identity_changes_with_content_and_not_with_place(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    one, other = tmp_path / "x" / "a.txt", tmp_path / "y" / "a.txt"
    assert sources.identity(one) == sources.identity(other)
    other.write_text("else")
    assert sources.identity(one) != sources.identity(other)


def test_python_docs_is_prose_without_repeats_or_code(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(
        "topics = {'if': 'The if statement chooses between suites.'}\n"
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text('"""Tests are no part of this corpus at all."""')
    (tmp_path / "bad.py").write_text("print 'old'")
    (tmp_path / "a.py").write_text(
        '"""Open the file and read all of it.\n\n    >>> open(x)\n    1\n\n    a = b[c] + d(e)\n"""\n'
        'def f():\n    """Open the file and read all of it."""\n'
    )
    found = dict(python_docs.documents(tmp_path, progress=lambda done: None))
    assert found == {
        "a.py": "Open the file and read all of it.",
        "bad.py": None,
        "topic:if": "The if statement chooses between suites.",
    }


@pytest.mark.thorough
def test_this_python_carries_over_a_million_characters_of_prose() -> None:
    assert sum(len(raw.text) for raw in read("python-docs")) > 1_000_000


@pytest.mark.skipif(not BOOKS.is_file(), reason="the shared books are not on this machine")
def test_the_real_books_open_clean() -> None:
    source = sources.parse(f"books:{BOOKS}")
    stream = source.documents(BOOKS, progress=lambda done: None)
    for _ in range(4):
        raw = next(stream)
        text = source.clean(raw)
        assert len(text) > 0.95 * len(raw.text) and "# Title" not in text and "\n#" not in text


@pytest.mark.skipif(not EXTRACT.is_dir(), reason="the shared Wikipedia extract is not on this machine")
def test_the_real_extract_opens_clean() -> None:
    source = sources.parse(f"wikiextractor:{EXTRACT}/AA*")
    stream = source.documents(sources.files(source)[0], progress=lambda done: None)
    first = next(stream)
    assert first.id == "12" and first.text.startswith("Anarchism is a political philosophy")
    text = "\n".join([source.clean(first)] + [source.clean(next(stream)) for _ in range(100)])
    for mark in ("<ref", "<br", "</dl", "{{", "[[", "&amp;"):
        assert mark not in text


ARTICLES = [
    f"Article {i}.\n\nIt has {'many ' * 50}words in its second paragraph, number {i}." for i in range(50)
]
SENTENCES = [f"the {i} th sentence of some book , in lower case ." for i in range(6000)]


def write_table(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=20)
    return path


def test_a_parquet_file_of_articles_gives_a_document_a_row(tmp_path: Path) -> None:
    ids = [str(100 + i) for i in range(50)]
    write_table(tmp_path / "a.parquet", id=ids, url=ids, title=ids, text=ARTICLES)
    found = read(f"parquet:{tmp_path}/*.parquet")
    assert [raw.id for raw in found] == ids and [raw.text for raw in found] == ARTICLES


def test_rows_that_are_sentences_are_put_together_in_their_order(tmp_path: Path) -> None:
    """BookCorpus as on the hub: one column, a sentence a row."""
    write_table(tmp_path / "books.parquet", text=SENTENCES)
    found = read(f"parquet:{tmp_path}/books.parquet")
    assert 1 < len(found) < 10 and all(len(raw.text) > 50_000 for raw in found[:-1])
    assert "\n".join(raw.text for raw in found).split("\n") == SENTENCES
    assert [raw.id for raw in found][:2] == ["books.parquet#0", "books.parquet#1"]


def test_a_parquet_file_without_text_or_not_whole_is_refused_by_name(tmp_path: Path) -> None:
    write_table(tmp_path / "columns.parquet", title=["a"], body=["b"])
    with pytest.raises(EarlyBertError, match=r'columns\.parquet: no column "text" .*columns: body, title'):
        read(f"parquet:{tmp_path}/columns.parquet")
    write_table(tmp_path / "numbers.parquet", text=[1, 2])
    with pytest.raises(EarlyBertError, match=r"numbers\.parquet: no column"):
        read(f"parquet:{tmp_path}/numbers.parquet")
    whole = write_table(tmp_path / "whole.parquet", text=ARTICLES).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    with pytest.raises(EarlyBertError, match=r"cut\.parquet: not a whole Parquet file"):
        read(f"parquet:{tmp_path}/cut.parquet")
    flipped = bytearray(whole)
    flipped[40] ^= 0xFF
    (tmp_path / "flipped.parquet").write_bytes(flipped)
    with pytest.raises(EarlyBertError, match=r"flipped\.parquet, row group 0: cannot be read after row 0"):
        read(f"parquet:{tmp_path}/flipped.parquet")


def test_a_folder_laid_out_like_a_hub_corpus_is_read_by_its_configuration(tmp_path: Path) -> None:
    """wikimedia/wikipedia's layout: a README that names configurations, a folder of Parquet files each."""
    configurations = ["20231101.en", "20231101.it"]
    listed = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*\n"
        for name in configurations
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for name in configurations:
        for part in range(2):
            texts = [f"{name} {text}" for text in ARTICLES[25 * part : 25 * part + 25]]
            ids = [f"{name} {25 * part + i}" for i in range(25)]
            write_table(tmp_path / name / f"train-0000{part}-of-00002.parquet", id=ids, text=texts)
    found = read(f"hf:{tmp_path},20231101.it")
    assert [raw.id for raw in found] == [f"20231101.it {i}" for i in range(50)]
    assert found[3].text == f"20231101.it {ARTICLES[3]}"
    with pytest.raises(EarlyBertError, match=r"20231101\.xx.*check the name and its configuration"):
        read(f"hf:{tmp_path},20231101.xx")


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_a_streamed_corpus_has_the_same_documents_each_in_one_part(parts: int, tmp_path: Path) -> None:
    for part in range(3):
        texts = ARTICLES[10 * part : 10 * part + 10]
        ids = [f"{10 * part + i}" for i in range(10)]
        write_table(tmp_path / "data" / f"train-0000{part}-of-00003.parquet", id=ids, text=texts)
    stored = [(raw.id, raw.text) for raw in read(f"hf:{tmp_path}")]
    source = sources.parse(f"hf-stream:{tmp_path}")
    (place,) = sources.files(source)
    assert source.can_split(place)
    found = [
        [(raw.id, raw.text) for raw in source.part(place, (r, parts), progress=lambda done: None)]
        for r in range(parts)
    ]
    assert all(found) and sorted(chain.from_iterable(found)) == sorted(stored)
    before = sources.identity(place)
    write_table(tmp_path / "data" / "train-00002-of-00003.parquet", id=["1"], text=["Another."])
    assert sources.identity(sources.files(source)[0]) != before


def test_a_streamed_corpus_of_sentences_is_put_together_and_one_without_text_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "a" / "train.parquet", text=[f"sentence number {i} ." for i in range(50)])
    (document,) = read(f"hf-stream:{tmp_path}/a")
    assert document.text.split("\n")[7] == "sentence number 7 ."
    write_table(tmp_path / "b" / "train.parquet", body=["x"])
    with pytest.raises(EarlyBertError, match=r'hf-stream:.*, row 0: no column "text" .*\(columns: body\)'):
        read(f"hf-stream:{tmp_path}/b")


def test_a_folder_of_json_lines_is_read_as_a_hub_corpus(tmp_path: Path) -> None:
    rows = [{"id": i, "text": text} for i, text in enumerate(ARTICLES[:9])]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [raw.text for raw in read(f"hf:{tmp_path}")] == ARTICLES[:9]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("train.csv", "id,text\n1,One.\n2,Two.\n", "read by the reader 'csv' of datasets"),
        ("train.tsv", "id\ttext\n1\tOne.\n2\tTwo.\n", "read by the reader 'csv' of datasets"),
        (
            "train.json",
            '\n[{"text": "One."}, {"text": "Two."}]',
            "called JSON, but does not begin with an object",
        ),
    ],
)
def test_rows_that_only_datasets_can_read_are_streamed_and_refused_else(
    name: str, content: str, what: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(EarlyBertError, match=rf"source 'hf:.*': {name} is {what}; .*as hf-stream:"):
        read(f"hf:{tmp_path}")
    (document,) = read(f"hf-stream:{tmp_path}")
    assert document.text == "One.\nTwo."


def test_a_hub_that_cannot_be_reached_or_a_folder_without_data_is_said(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(EarlyBertError, match=r"source 'hf:.*check the name"):
        read(f"hf:{tmp_path}/nothing")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for kind in ("hf", "hf-stream"):
        with pytest.raises(EarlyBertError, match=rf"source '{kind}:nobody/nothing'.*as parquet:GLOB"):
            read(f"{kind}:nobody/nothing")
