"""Every bad input of data preparation ends with one line that says what and where, exit code 2, no corpus and
bounded memory and time; a bad page of a dump costs that page only.

A case is a name, what lies at the path SOURCE, the words of the command, and what its last line must say
(or, where the command is to succeed, what its report must say).
"""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

import ranks
from data_prep.build import BuildSettings, build
from texts import prose

SCRIPT = str(Path(__file__).with_name("prepare_limited.py"))
SECONDS = 90
TEXT = "\n\n".join(prose(i) for i in range(300))

Make = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    make: Make
    words: str
    says: str
    fails: bool = True
    surroundings: dict[str, str] = dataclasses.field(default_factory=dict)


def data(content: bytes | str) -> Make:
    """A file of this content."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(raw)


def folder(**files: bytes) -> Make:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("__", ".")).write_bytes(content)

    return make


def cut(content: bytes, share: float = 0.6) -> bytes:
    return content[: int(len(content) * share)]


def flipped(content: bytes, place: float = 0.5) -> bytes:
    at = int(len(content) * place)
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def page(title: str, text: str, *, id: int = 1) -> str:
    return f"<page><title>{title}</title><ns>0</ns><id>{id}</id><revision><text>{text}</text></revision></page>\n"


def dump(*pages: str, end: str = "</mediawiki>") -> bytes:
    good = "".join(page(f"Good {i}", prose(i), id=100 + i) for i in range(40))
    return f"<mediawiki><siteinfo></siteinfo>{good}{''.join(pages)}{end}".encode()


def parquet(**columns: pa.Array) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, write_page_checksum=True)
    return sink.getvalue()


def tar(**members: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def zipped(**members: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return sink.getvalue()


def zstandard(content: bytes) -> bytes:
    """A frame with its checksum, as the program zstd writes it (and pyarrow does not); RFC 8878."""
    frame = bytearray(pa.Codec("zstd").compress(content).to_pybytes())
    frame[4] |= 4
    return bytes(frame) + (xxhash.xxh64_intdigest(content) & 0xFFFFFFFF).to_bytes(4, "little")


def named(name: str, content: bytes) -> Make:
    """A file of this name in a folder at SOURCE."""

    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_bytes(content)

    return make


def sparse(size: int) -> Make:
    """A file of so many NUL bytes that takes no room."""

    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(size)

    return make


STRINGS = pa.array([prose(i) for i in range(200)])
MANY_LINES = "\n".join(json.dumps({"text": prose(i)}) for i in range(30))
NOT_STRINGS = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0\6\0\0\0"), pa.py_buffer(b"abc\xff\xfe\xfd")]
)
INVALID_PAGE = page("Bad", "MARK").encode()
COMPRESSED = {
    "bz2": bz2.compress(TEXT.encode()),
    "gz": gzip.compress(TEXT.encode()),
    "xz": lzma.compress(TEXT.encode()),
    "zst": zstandard(TEXT.encode()),
}
BIG_DUMP = bz2.compress(dump(*(page(f"T{i}", prose(i) * 30, id=i) for i in range(300))), 1)

CASES = [
    # --- compressed files
    *(
        Case(f"truncated {form}", data(cut(content)), "text:{source}", rf"source: the {form} stream breaks after \d+ bytes")
        for form, content in COMPRESSED.items()
    ),
    *(
        Case(f"bit-flipped {form}", data(flipped(content)), "text:{source}", rf"source: (the {form} stream breaks after \d+|not UTF-8: byte .* offset \d+)")
        for form, content in COMPRESSED.items()
    ),
    Case("gz of nothing", data(gzip.compress(b"")), "text:{source}", "'text:.*source' is empty"),
    Case("gz bomb of one line", data(gzip.compress(b"a" * (300 << 20), 1)), "text:{source}", "source, line 1: longer than"),
    Case("compressed twice", data(gzip.compress(COMPRESSED["gz"])), "text:{source}", "source: not UTF-8: byte 0x8b at offset 1"),
    # --- text
    Case("empty file", data(b""), "text:{source}", "is empty: 1 files of 0 bytes"),
    Case("no file", lambda path: None, "text:{source}", "no file matches"),
    Case("a folder", folder(), "text:{source}", "no file matches"),
    Case("a pipe", lambda path: os.mkfifo(path), "text:{source}", "no file matches"),
    Case("latin-1", data(TEXT.encode() + b"na\xefve"), "text:{source}", rf"source: not UTF-8: byte 0xef at offset {len(TEXT) + 2} "),
    Case("mixed encodings", data(b"caf\xc3\xa9 " * 99 + b"caf\xe9 "), "text:{source}", "byte 0xe9 at offset 597"),
    Case("lone surrogates", data(b"ab\xed\xa0\x80"), "text:{source}", "byte 0xed at offset 2"),
    Case("utf-16 without mark", data(TEXT.encode("utf-16-le")), "text:{source}", "source: UTF-16 without a byte order mark, at offset 0"),
    Case("half a utf-16 character", data(TEXT.encode("utf-16") + b"a"), "text:{source}", r"not UTF-16: byte 0x61 at offset \d+"),
    Case("a billion NUL bytes in a line", sparse(1 << 30), "text:{source}", "source, line 1: longer than 67,108,864 bytes"),
    Case("NUL bytes between words", data(TEXT.replace(" ", "\0 ")), "text:{source} text:{source}2", "no file matches"),
    Case("only short", data("Hello.\n"), "text:{source}", "is empty: .*fewer than 15 words.*--min-words"),
    Case("too little text", data(prose(1)), "text:{source} --deduplicate none --vocab-size 8192", "too little text for --vocab-size 8192"),
    Case("only duplicates", data((json.dumps({"text": prose(1)}) + "\n") * 50), "jsonl:{source}", "of 50 only 1 is left when short ones and near duplicates are dropped"),
    Case("another language only", data(TEXT), "text:{source} --language it --only-language", "is empty: .*in en, not it"),
    Case("a source that grows", data(TEXT), "text:{source}", "source changed while it was read", surroundings={"WRITTEN_TO": "{source}"}),
    # --- JSON lines
    Case("not JSON", data(MANY_LINES + "\n{text: 1}\n"), "jsonl:{source}", "source, line 31: not JSON"),
    Case("JSON that breaks off", data(MANY_LINES[:-9]), "jsonl:{source}", "source, line 30: not JSON"),
    Case("no text field", data(MANY_LINES + '\n{"txt": 1}'), "jsonl:{source}", r"line 31: no text; .*\(found: txt\)"),
    Case("text is a number", data('{"text": 1}'), "jsonl:{source}", "line 1: no text"),
    Case("a JSON list", data('["text"]'), "jsonl:{source}", r"line 1: no text; .*\(found: list\)"),
    Case("an escaped surrogate", data('{"text": "a\\ud800"}'), "jsonl:{source}", "line 1: not JSON"),
    Case("JSON of 100,000 levels", data("[" * 100_000), "jsonl:{source}", "line 1: not JSON"),
    # --- Parquet
    Case("truncated parquet", data(cut(parquet(text=STRINGS))), "parquet:{source}", "source: not a whole Parquet file"),
    Case("bit-flipped parquet", data(flipped(parquet(text=STRINGS), 0.3)), "parquet:{source}", "source(, row group 0: cannot be read after row|: not)"),
    Case("bit-flipped footer", data(flipped(parquet(text=STRINGS), 0.9999)), "parquet:{source}", "source: not a whole Parquet file"),
    Case("no column of text", data(parquet(body=STRINGS)), "parquet:{source}", r'source: no column "text" of strings \(columns: body\)'),
    Case("a column of numbers", data(parquet(text=pa.array([1, 2]))), "parquet:{source}", 'no column "text" of strings'),
    Case("no rows", data(parquet(text=pa.array([], pa.string()))), "parquet:{source}", "is empty"),
    Case("text is no parquet", data(TEXT), "parquet:{source}", "source: not a whole Parquet file"),
    Case("bad UTF-8 in parquet", data(parquet(text=NOT_STRINGS)), "parquet:{source}", "source, row group 0: cannot be read after row 0"),
    # --- dumps
    Case("truncated dump", data(cut(dump())), "wikipedia:{source}", r"source: the XML breaks off in or after page 2\d, [\d,]+ bytes"),
    Case("dump without its end", data(dump(end="")), "wikipedia:{source}", "the XML breaks off in or after page 40, .* no </mediawiki>"),
    Case("truncated dump in parts", data(cut(dump())), "wikipedia:{source} --tasks 3", "the XML breaks off in or after page"),
    Case("truncated bz2 dump in parts", data(cut(BIG_DUMP)), "wikipedia:{source} --tasks 3", r"source: the bz2 stream breaks off in the block at byte [\d,]+ of"),
    Case("bit-flipped bz2 dump in parts", data(flipped(BIG_DUMP)), "wikipedia:{source} --tasks 3", r"source: the bz2 (block|stream).* at byte [\d,]+"),
    Case("entity bomb", data(b'<!DOCTYPE m [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>' + dump(page("B", "&b;" * 999))), "wikipedia:{source}", "source: declares a document type"),
    Case("external entity", data(b'<!DOCTYPE m SYSTEM "file:///etc/passwd">' + dump()), "wikipedia:{source}", "source: declares a document type"),
    Case("a feed", data(b"<rss><page></page></rss>"), "wikipedia:{source}", "root element is <rss>, not <mediawiki>"),
    Case("a web page", data(b"<!DOCTYPE html><html>404</html>"), "wikipedia:{source}", "declares a document type"),
    Case("no XML", data(TEXT), "wikipedia:{source}", r"source: not XML at byte 0 \(line 1\)"),
    Case("broken siteinfo", data(b"<mediawiki><siteinfo></x><page></page></mediawiki>"), "wikipedia:{source}", r"not XML at byte \d+"),
    Case("no pages", data(b"<mediawiki></mediawiki>"), "wikipedia:{source}", "is empty"),
    Case("no page in much XML", data(b"<mediawiki>" + b"<x/>" * 2_000_000), "wikipedia:{source}", r"no <page> in its first [\d,]+ bytes"),
    Case("a utf-16 dump without mark", data(dump().decode().encode("utf-16-be")), "wikipedia:{source}", "UTF-16 without a byte order mark, at offset 0"),
    Case("a page of 80 MB without end", data(dump("<page><title>Endless</title>", " " * (80 << 20), end="")), "wikipedia:{source}", "the XML breaks off in or after page 41"),
    Case("a broken page", data(dump(page("Bad", "a < b"))), "wikipedia:{source}", r"dropped 1: broken page \(such as 'Bad'\)", fails=False),
    Case("a page of 80 MB", data(dump(page("Endless", "x " * (40 << 20)))), "wikipedia:{source}", r"dropped 1: broken page \(such as 'Endless'\)", fails=False),
    Case("a page with bad UTF-8", data(dump(INVALID_PAGE.decode()).replace(b"MARK", b"\xff\xfe")), "wikipedia:{source}", "dropped 1: broken page", fails=False),
    Case("a page with an unknown entity", data(dump(page("Bad", "&bomb;"))), "wikipedia:{source}", "dropped 1: broken page", fails=False),
    Case("a page of NUL bytes", data(dump(page("Bad", "\0" * 99))), "wikipedia:{source}", "dropped 1: broken page", fails=False),
    Case("100,000 nested templates", data(dump(page("Deep", "{{a|" * 100_000 + "}}" * 100_000), page("Half", "{{a|" * 100_000))), "wikipedia:{source}", "kept 4", fails=False),
    Case("100,000 open links and tables", data(dump(page("Deep", "[[a|" * 100_000 + "\n{|" * 100_000 + prose(1)))), "wikipedia:{source}", "kept 4", fails=False),
    # --- WikiExtractor, books, hub
    Case("a doc without end", data('<doc id="1" title="A">\ntext'), "wikiextractor:{source}", "source: <doc id='1'> has no </doc>"),
    Case("a doc in a doc", data('<doc id="1">\n<doc id="2">\n</doc>\n'), "wikiextractor:{source}", "source, line 2: a <doc> inside <doc id='1'>"),
    Case("text outside a doc", data("Hello.\n"), "wikiextractor:{source}", "source, line 1: text outside a <doc"),
    Case("a folder without books", folder(x__pdf=b"%PDF"), "books:{source}", "the folder holds no book"),
    Case("a truncated tar", named("b.tar", cut(tar(a__txt=TEXT.encode()))), "books:{source}/b.tar", r"b\.tar: not a whole tar file"),
    Case("a truncated tar.gz", named("b.tar.gz", cut(gzip.compress(tar(a__txt=TEXT.encode())))), "books:{source}/b.tar.gz", r"b\.tar\.gz: the gz stream breaks after \d+ bytes"),
    Case("a truncated zip", named("b.zip", cut(zipped(a__txt=TEXT.encode()))), "books:{source}/b.zip", r"b\.zip: not a whole, open zip file"),
    Case("a bit-flipped zip", named("b.zip", flipped(zipped(a__txt=TEXT.encode()))), "books:{source}/b.zip", r"b\.zip: not a whole, open zip file"),
    Case("a latin-1 book in a tar", named("b.tar", tar(a__txt=b"caf\xe9")), "books:{source}/b.tar", r"b\.tar: a\.txt: not UTF-8: byte 0xe9 at offset 3"),
    Case("a picture as books", data(b"\x89PNG"), "books:{source}", "neither a folder nor an archive"),
    Case("an empty hub folder", folder(), "hf:{source}", "source 'hf:.*source': "),
    # --- settings and places
    Case("an unknown kind", data(TEXT), "warc:{source}", "unknown kind 'warc'"),
    Case("a source twice", data(TEXT), "text:{source} text:{source}", "given twice"),
    Case("no tokenizer there", data(TEXT), "text:{source} --tokenizer {source}2", "no tokenizer.json or vocab.txt there"),
    Case("a text as tokenizer", folder(tokenizer__json=b"{}"), "text:{source}/tokenizer.json --tokenizer {source}", "tokenizer.json is not a readable tokenizer"),
    Case("a vocabulary without [MASK]", folder(vocab__txt=b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n", a__txt=TEXT.encode()), "text:{source}/a.txt --tokenizer {source}", r"the vocabulary has no \[MASK\]"),
    Case("a piece twice", folder(vocab__txt=b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", a__txt=TEXT.encode()), "text:{source}/a.txt --tokenizer {source}", "vocab.txt, line 7: 'a' stands in line 6 too"),
    Case("output is a file", data(TEXT), "text:{source} --out {source}", "source is a file; choose another --out"),
    Case("output under a file", data(TEXT), "text:{source} --out {source}/x", "--out .*source/x: Not a directory"),
    Case("output in a foreign folder", folder(a__txt=TEXT.encode()), "text:{source}/a.txt --out {source}", "holds 'a.txt', which is no part of a corpus"),
    Case("a broken manifest there", folder(manifest__json=b'{"version": 1'), "text:" + __file__ + " --out {source}", "manifest.json: not valid JSON"),
]  # fmt: skip


def test_there_are_at_least_sixty_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


def prepare(tmp_path: Path, words: list[str], **surroundings: str) -> tuple[int, str]:
    """Exit code and all that was said."""
    started = time.monotonic()
    (process,) = ranks.launch(SCRIPT, words, ranks=1, logs=tmp_path, **surroundings)
    code = process.wait(timeout=SECONDS)
    assert time.monotonic() - started < SECONDS
    return code, (tmp_path / "log-0.txt").read_text().replace("\r", "\n")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_line_and_leaves_nothing(case: Case, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    case.make(source)
    words = [word.format(source=source) for word in case.words.split(" ")]
    for option, value in (("--out", str(out)), ("--vocab-size", "192"), ("--tasks", "1"), ("--workers", "1")):
        if option not in words and not (option == "--vocab-size" and "--tokenizer" in words):
            words += [option, value]
    before = sorted(path.name for path in source.iterdir()) if source.is_dir() else None
    surroundings = {name: value.format(source=source) for name, value in case.surroundings.items()}
    code, said = prepare(tmp_path, words, **surroundings)
    assert "Traceback" not in said, said
    if not case.fails:
        assert code == 0 and re.search(case.says, said), said
        return
    assert code == 2, said
    last = said.strip().split("\n")[-1]
    assert last.startswith("error: ") and re.search(case.says, last), said
    assert not out.exists()
    if before is not None:
        assert sorted(path.name for path in source.iterdir()) == before


@pytest.fixture
def small_disk(tmp_path: Path):  # type: ignore[no-untyped-def]
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    workers: str, small_disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(prose(i) for i in range(3000)))
    (tmp_path / "texts" / "b.txt").write_text(TEXT)
    words = [f"text:{tmp_path}/texts/*", "--out", str(small_disk / "out"), "--vocab-size", "192"]
    words += ["--tasks", "2", "--workers", workers, "--deduplicate", "none"]
    code, said = prepare(tmp_path, words)
    assert code == 2 and "Traceback" not in said, said
    assert "No space left on device" in said.strip().split("\n")[-1], said
    assert not (small_disk / "out" / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    (tmp_path / "log-0.txt").unlink()
    code, said = prepare(tmp_path, words)
    assert code == 0, said


def test_an_output_that_cannot_be_written_is_one_line(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, said = prepare(tmp_path, [f"text:{tmp_path}/a.txt", "--out", str(small_disk / "out")])
    last = said.strip().split("\n")[-1]
    assert code == 2 and re.search("--out .*out: Read-only file system", last), said


@pytest.mark.thorough
def test_two_shards_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    for name, size in (("a", 192), ("b", 256)):
        (tmp_path / f"{name}.txt").write_text(TEXT)
        settings = BuildSettings(
            sources=(f"text:{tmp_path}/{name}.txt",), vocab_size=size, tasks=2, deduplicate="none"
        )
        build(settings, tmp_path / name, tell=lambda line: None)
    shard = "shard-00000-of-00002.arrow"
    (tmp_path / "a" / shard).write_bytes((tmp_path / "b" / shard).read_bytes())
    show = str(Path(SCRIPT).parent.parent / "scripts" / "show.py")
    (process,) = ranks.launch(show, [str(tmp_path / "a"), "--verify"], ranks=1, logs=tmp_path)
    assert process.wait(timeout=SECONDS) == 2
    said = (tmp_path / "log-0.txt").read_text()
    assert re.search(rf"error: shard .*{shard} has \d+ bytes, the manifest says \d+", said), said
