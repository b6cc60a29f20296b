"""SOURCE words to raw documents: which files a word stands for, and each file as a stream of documents.

Every reader is a generator that holds one document at a time. Compression is told from a file's first
bytes, not its name. The surprise: each byte is checked to be UTF-8 as it streams, so a bad byte is reported
with its offset (in the decompressed stream), and a stream that breaks off is an error, never a shorter
corpus.
"""

from __future__ import annotations

import bz2
import codecs
import difflib
import functools
import glob
import gzip
import hashlib
import io
import lzma
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa

from data_prep import clean, hub, python_docs, tables, wikipedia
from earlybert.config import EarlyBertError

Progress = Callable[[int], None]
"""Called with the bytes read so far of a file (compressed bytes, where it is compressed)."""


@dataclass(frozen=True)
class Raw:
    """A document as its source has it: `dropped` says why it is none (a redirect), before any text is
    looked at."""

    id: str
    text: str
    dropped: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """One SOURCE word of the command line."""

    kind: str
    pattern: str

    @property
    def word(self) -> str:
        """The word as it was typed."""
        return f"{self.kind}:{self.pattern}" if self.pattern else self.kind

    @property
    def name(self) -> str:
        """The source's name in shards and statistics: both forms of Wikipedia are "wikipedia"."""
        return _KINDS[self.kind].name

    def documents(self, path: Path, *, progress: Progress) -> Iterator[Raw]:
        """Stream the raw documents of one of the source's files, always in the same order."""
        return _KINDS[self.kind].read(path, progress)

    def clean(self, raw: Raw) -> str:
        """Turn a raw document's text into plain prose; empty where nothing is left."""
        return _KINDS[self.kind].clean(raw)


@dataclass(frozen=True)
class _Kind:
    name: str
    read: Callable[[Path, Progress], Iterator[Raw]]
    clean: Callable[[Raw], str]
    usage: str


def parse(word: str) -> Source:
    """Read one SOURCE word; raises EarlyBertError for an unknown kind or a missing path."""
    kind, _, pattern = word.partition(":")
    if kind not in _KINDS:
        near = difflib.get_close_matches(kind, _KINDS, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise EarlyBertError(
            f"source {word!r}: unknown kind {kind!r}; {hint}supported: "
            + ", ".join(known.usage for known in _KINDS.values())
        )
    if bool(pattern) != (kind != "python-docs"):
        raise EarlyBertError(f"source {word!r}: write it as {_KINDS[kind].usage}")
    return Source(kind=kind, pattern=pattern)


def files(source: Source) -> list[Path]:
    """List a source's files in a fixed order.

    Raises EarlyBertError where nothing matches, a match is not readable, or all files are empty.
    """
    if source.kind == "python-docs":
        return [python_docs.standard_library()]
    if source.kind == "books":
        found = _book_files(Path(source.pattern), source.word)
    elif source.kind == "hf":
        found = hub.files(source.pattern, word=source.word)
    else:
        found = sorted(Path(p) for p in glob.glob(source.pattern, recursive=True) if Path(p).is_file())
        if not found:
            raise EarlyBertError(
                f"source {source.word!r}: no file matches; check the path, and quote the pattern"
            )
    for path in found:
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise EarlyBertError(
                f"source {source.word!r}: {path}: {error.strerror}; make it readable"
            ) from error
    if not any(path.stat().st_size for path in found):
        raise EarlyBertError(
            f"source {source.word!r} is empty: {len(found)} files of 0 bytes; give one with text"
        )
    return found


def size_of(path: Path) -> int:
    """Bytes that a reader of this file will report as progress."""
    return sum(p.stat().st_size for p in python_docs.modules(path)) if path.is_dir() else path.stat().st_size


def identity(path: Path) -> str:
    """Hash what tells one version of a file from another: name, size, and the first and last MiB."""
    if path.is_dir():
        return f"python-{'.'.join(map(str, sys.version_info[:3]))}-{size_of(path)}"
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name}\0{size}\0".encode())
    with open(path, "rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()


def chunks(path: Path, *, progress: Progress | None = None, text: bool = True) -> Iterator[bytes]:
    """Stream a file's decompressed bytes.

    Raises EarlyBertError naming the file where compression breaks off or, with `text`, at the offset of the
    first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")() if text else None
    offset = 0
    with open(path, "rb") as file:
        stream, form = _decompressed(file)
        while True:
            try:
                chunk = stream.read(1 << 20)
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise EarlyBertError(
                    f"{path}: the {form} stream breaks after {offset} bytes of content ({error}); "
                    "the file is truncated or damaged, get it again"
                ) from error
            if decoder is not None:
                _check_utf8(decoder, chunk, offset=offset, what=str(path))
            if not chunk:
                return
            offset += len(chunk)
            if progress is not None:
                progress(file.tell())
            yield chunk


def lines(path: Path, *, progress: Progress | None = None) -> Iterator[str]:
    """Stream a text file's lines without their ends, decompressed and checked."""
    rest = b""
    first = True
    for chunk in chunks(path, progress=progress):
        if first:
            chunk, first = chunk.removeprefix(codecs.BOM_UTF8), False
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode("utf-8")
    if rest:
        yield rest.removesuffix(b"\r").decode("utf-8")


_TEXT_DOCUMENT_CHARACTERS = 1 << 20
"""A text file is one document, but one longer than this is cut at the next blank line."""


def _read_text(path: Path, progress: Progress) -> Iterator[Raw]:
    held: list[str] = []
    length = part = 0
    for line in lines(path, progress=progress):
        held.append(line)
        length += len(line) + 1
        if length >= _TEXT_DOCUMENT_CHARACTERS and (
            not line.strip() or length >= 4 * _TEXT_DOCUMENT_CHARACTERS
        ):
            yield Raw(id=f"{path.name}#{part}", text="\n".join(held))
            held, length, part = [], 0, part + 1
    if held:
        yield Raw(id=f"{path.name}#{part}" if part else path.name, text="\n".join(held))


def _read_jsonl(path: Path, progress: Progress) -> Iterator[Raw]:
    for number, line in enumerate(lines(path, progress=progress), start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise EarlyBertError(
                f"{path}, line {number}: not JSON ({error}); write one object a line"
            ) from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            have = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
            raise EarlyBertError(
                f"{path}, line {number}: no text; each line needs an object with a string field 'text' "
                f"(found: {have})"
            )
        yield Raw(id=str(row.get("id", f"{path.name}:{number}")), text=text)


_DOC_START = re.compile(r'<doc id="([^"]*)"(?:[^>]* title="(.*)")?[^>]*>\s*$')


def _read_wikiextractor(path: Path, progress: Progress) -> Iterator[Raw]:
    held: list[str] | None = None
    id = title = ""
    for number, line in enumerate(lines(path, progress=progress), start=1):
        start = _DOC_START.match(line) if line.startswith("<doc ") else None
        if start:
            if held is not None:
                raise EarlyBertError(
                    f"{path}, line {number}: a <doc> inside <doc id={id!r}>; extract the file again"
                )
            held, id, title = [], start[1], start[2] or ""
        elif line.rstrip() == "</doc>" and held is not None:
            while held and held[0].strip() in ("", title):  # the title stands above the text
                del held[0]
            yield Raw(id=id, text="\n".join(held))
            held = None
        elif held is not None:
            held.append(line)
        elif line.strip():
            raise EarlyBertError(
                f"{path}, line {number}: text outside a <doc ...> block; give WikiExtractor's output, "
                "or use text:GLOB for plain text"
            )
    if held is not None:
        raise EarlyBertError(f"{path}: <doc id={id!r}> has no </doc>; the file is truncated, get it again")


def _read_parquet(path: Path, progress: Progress) -> Iterator[Raw]:
    for id, text in tables.documents(path, progress=progress):
        yield Raw(id=id, text=text)


def _read_hub(path: Path, progress: Progress) -> Iterator[Raw]:
    """By content: a file from the cache has no suffix."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start == tables.MAGIC:
        return _read_parquet(path, progress)
    first = next((line for line in lines(path) if line.strip()), "")
    return (_read_jsonl if first.startswith("{") else _read_text)(path, progress)


def _read_wikipedia(path: Path, progress: Progress) -> Iterator[Raw]:
    for page in wikipedia.pages(chunks(path, progress=progress), path=path):
        dropped = "other namespace" if page.namespace != 0 else "redirect" if page.redirect else None
        yield Raw(
            id=page.id,
            text="" if dropped else page.text,
            dropped=dropped,
            details={"dropped_prefixes": page.dropped_prefixes},
        )


_BOOK_SUFFIXES = frozenset({".txt", ".md", ".markdown", ".text"})
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_ARCHIVES = (*_TAR_SUFFIXES, ".zip")


def _book_files(path: Path, word: str) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _is_book(p.name))
        if not found:
            raise EarlyBertError(
                f"source {word!r}: the folder holds no book; books are files named "
                f"{', '.join(sorted(_BOOK_SUFFIXES))}"
            )
        return found
    if not path.exists():
        raise EarlyBertError(f"source {word!r}: no such folder or archive; check the path")
    if not path.name.lower().endswith(_ARCHIVES):
        raise EarlyBertError(
            f"source {word!r}: neither a folder nor an archive ({', '.join(_ARCHIVES)}); give one, or use "
            "text:GLOB"
        )
    return [path]


def _is_book(name: str) -> bool:
    stem = name.lower()
    for compressed in (".gz", ".xz", ".bz2"):
        stem = stem.removesuffix(compressed)
    return Path(stem).suffix in _BOOK_SUFFIXES and not name.startswith(".")


def _read_books(path: Path, progress: Progress) -> Iterator[Raw]:
    if path.name.lower().endswith(".zip"):
        yield from _read_zip(path, progress)
        return
    if not path.name.lower().endswith(_TAR_SUFFIXES):
        yield Raw(id=path.name, text="\n".join(lines(path, progress=progress)))
        return
    stream = _ChunkFile(chunks(path, progress=progress, text=False))
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    yield from _member(path, member.name, file.read)
    except tarfile.TarError as error:
        raise EarlyBertError(f"{path}: not a whole tar file ({error}); get it again") from error


def _read_zip(path: Path, progress: Progress) -> Iterator[Raw]:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield from _member(path, entry.filename, functools.partial(archive.read, entry))
                progress(entry.header_offset + entry.compress_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise EarlyBertError(f"{path}: not a whole, open zip file ({error}); get it again") from error


def _member(path: Path, member: str, read: Callable[[], bytes]) -> Iterator[Raw]:
    """The book that a member of an archive is; its content is read only where it is one."""
    name = Path(member).name
    if name.startswith("."):
        return
    if not _is_book(name):
        yield Raw(id=name, text="", dropped="not a book file")
        return
    data = read()
    decoder = codecs.getincrementaldecoder("utf-8")()
    _check_utf8(decoder, data, offset=0, what=f"{path}: {member}")
    _check_utf8(decoder, b"", offset=len(data), what=f"{path}: {member}")
    yield Raw(id=name, text=data.decode("utf-8-sig"))


class _ChunkFile(io.RawIOBase, IO[bytes]):  # type: ignore[misc]
    """Chunks as the readable file that tarfile's stream mode wants."""

    def __init__(self, source: Iterable[bytes]) -> None:
        super().__init__()
        self._source = iter(source)
        self._held = b""

    def read(self, size: int = -1) -> bytes:
        parts, length = [self._held], len(self._held)
        while length < size and (chunk := next(self._source, b"")):
            parts.append(chunk)
            length += len(chunk)
        data = b"".join(parts)
        self._held = data[size:]
        return data[:size]


def _decompressed(file: IO[bytes]) -> tuple[IO[bytes], str]:
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(file), "bz2"
    if magic.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(file), "xz"
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file), "gz"  # type: ignore[return-value]
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"), "zst"
    return file, "plain"


def _check_utf8(decoder: codecs.IncrementalDecoder, chunk: bytes, *, offset: int, what: str) -> None:
    pending = len(decoder.getstate()[0])
    try:
        decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        at = offset - pending + error.start
        raise EarlyBertError(
            f"{what}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {at} ({error.reason}); "
            "convert the file to UTF-8"
        ) from error


def _read_python_docs(root: Path, progress: Progress) -> Iterator[Raw]:
    for id, text in python_docs.documents(root, progress=progress):
        yield Raw(id=id, text=text or "", dropped="not parsable" if text is None else None)


_KINDS = {
    "python-docs": _Kind("python-docs", _read_python_docs, lambda raw: raw.text, "python-docs"),
    "text": _Kind("text", _read_text, lambda raw: clean.plain_text(raw.text), "text:GLOB"),
    "jsonl": _Kind("jsonl", _read_jsonl, lambda raw: clean.plain_text(raw.text), "jsonl:GLOB"),
    "parquet": _Kind("parquet", _read_parquet, lambda raw: clean.plain_text(raw.text), "parquet:GLOB"),
    "hf": _Kind("hub", _read_hub, lambda raw: clean.plain_text(raw.text), "hf:NAME[,CONFIG]"),
    "books": _Kind("books", _read_books, lambda raw: clean.book(raw.text), "books:DIR-or-ARCHIVE"),
    "wikiextractor": _Kind(
        "wikipedia", _read_wikiextractor, lambda raw: clean.leftovers(raw.text), "wikiextractor:GLOB"
    ),
    "wikipedia": _Kind(
        "wikipedia",
        _read_wikipedia,
        lambda raw: wikipedia.plain(raw.text, dropped_prefixes=raw.details.get("dropped_prefixes")),
        "wikipedia:GLOB",
    ),
}
