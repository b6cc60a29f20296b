"""Files as streams of bytes and lines: decompressed, and checked while they stream.

Compression is told from a file's first bytes, not its name. The surprise: each byte of a text is checked to
be UTF-8 as it streams (UTF-16 with its byte order mark is converted), so a bad byte is reported with its
offset in the decompressed stream, and a stream that breaks off is an error, never a shorter corpus.
"""

from __future__ import annotations

import bz2
import codecs
import functools
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

from earlybert.config import EarlyBertError

Progress = Callable[[int], None]
"""Called with the bytes read so far of a file (compressed bytes, where it is compressed)."""

_CHUNK = 1 << 20
_LONGEST_LINE = 1 << 26
"""Bytes; a line is held in memory, and no document is this long."""


def identity(path: Path) -> str:
    """Hash what tells one version of a file from another: name, size, and the first and last MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name}\0{size}\0".encode())
    with open(path, "rb") as file:
        digest.update(file.read(_CHUNK))
        file.seek(max(0, size - _CHUNK))
        digest.update(file.read())
    return digest.hexdigest()


def is_plain(path: Path) -> bool:
    """Whether a file is uncompressed text of single bytes."""
    with open(path, "rb") as file:
        start = file.read(6)
    return _form(start) == "plain" and not start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def chunks(
    path: Path, *, progress: Progress | None = None, text: bool = True, check: bool = True
) -> Iterator[bytes]:
    """Stream a file's decompressed bytes, of a `text` as UTF-8 without a byte order mark.

    Raises EarlyBertError naming the file where compression breaks off, and for a `text` at the offset of the
    first byte that is not UTF-8; without `check`, bad bytes are the caller's matter.
    """
    with open(path, "rb") as file:
        yield from _chunks(file, str(path), progress=progress, text=text, check=check)


def _chunks(
    file: IO[bytes], what: str, *, progress: Progress | None = None, text: bool = True, check: bool = True
) -> Iterator[bytes]:
    decoded = _Text(what, check=check) if text else None
    offset = 0
    read, form = _decompressed(file)
    while True:
        try:
            chunk = read(_CHUNK)
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise EarlyBertError(
                f"{what}: the {form} stream breaks after {offset} bytes of content ({error}); "
                "the file is truncated or damaged, get it again"
            ) from error
        ended = not chunk
        if decoded is not None:
            chunk = decoded.next(chunk)
        offset += len(chunk)
        if progress is not None:
            progress(file.tell())
        if chunk:
            yield chunk
        if ended:
            return


class _Text:
    """Turn the chunks of a text into UTF-8, each whole or refused."""

    def __init__(self, what: str, *, check: bool) -> None:
        self._what = what
        self._check = check
        self._offset = 0
        self._decoder: codecs.IncrementalDecoder | None = None
        self._is_utf8 = True

    def next(self, chunk: bytes) -> bytes:
        """The chunk as UTF-8; the empty one ends the text."""
        if self._decoder is None:
            chunk = self._begin(chunk)
        if self._is_utf8 and not self._check:
            return chunk
        assert self._decoder is not None
        pending = len(self._decoder.getstate()[0])
        try:
            decoded = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            at = self._offset - pending + error.start
            name = "UTF-8" if self._is_utf8 else "UTF-16"
            raise EarlyBertError(
                f"{self._what}: not {name}: byte 0x{error.object[error.start]:02x} at offset {at} "
                f"({error.reason}); convert the file to UTF-8"
            ) from error
        self._offset += len(chunk)
        return chunk if self._is_utf8 else decoded.encode("utf-8")

    def _begin(self, chunk: bytes) -> bytes:
        start = chunk[:4]
        for mark, name in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
            if start.startswith(mark):
                self._is_utf8 = False
                self._decoder = codecs.getincrementaldecoder(name)()
                self._offset = len(mark)
                return chunk[len(mark) :]
        if len(start) == 4 and (start[::2] == b"\0\0") != (start[1::2] == b"\0\0"):
            raise EarlyBertError(
                f"{self._what}: UTF-16 without a byte order mark, at offset 0; convert the file to UTF-8"
            )
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        without = chunk.removeprefix(codecs.BOM_UTF8)
        self._offset = len(chunk) - len(without)
        return without


def text_of(data: bytes, *, what: str) -> str:
    """Read a whole text as `lines` reads a file, decompressed and checked; `what` names it in messages."""
    return "\n".join(_lines(_chunks(io.BytesIO(data), what), what))


def lines(path: Path, *, progress: Progress | None = None) -> Iterator[str]:
    """Stream a text file's lines without their ends, decompressed and checked.

    Raises EarlyBertError also for a line too long to be one.
    """
    return _lines(chunks(path, progress=progress), str(path))


def _lines(source: Iterable[bytes], what: str) -> Iterator[str]:
    held: list[bytes] = []
    length = number = 0
    for chunk in source:
        first, *others = chunk.split(b"\n")
        held.append(first)
        length += len(first)
        if length > _LONGEST_LINE:
            raise EarlyBertError(
                f"{what}, line {number + 1}: longer than {_LONGEST_LINE:,} bytes; is it text? Break its lines"
            )
        if others:
            others.insert(0, b"".join(held))
            held = [others.pop()]
            length = len(held[0])
            number += len(others)
            for line in others:
                yield line.removesuffix(b"\r").decode("utf-8")
    if length:
        yield b"".join(held).removesuffix(b"\r").decode("utf-8")


class ChunkFile(io.RawIOBase, IO[bytes]):  # type: ignore[misc]
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


def _form(start: bytes) -> str:
    for magic, form in (
        (b"BZh", "bz2"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"\x1f\x8b", "gz"),
        (b"\x28\xb5\x2f\xfd", "zst"),
    ):
        if start.startswith(magic):
            return form
    return "plain"


def _decompressed(file: IO[bytes]) -> tuple[Callable[[int], bytes], str]:
    """(what reads at most so many bytes of the content, the form)."""
    form = _form(file.read(6))
    file.seek(0)
    if form == "bz2":
        return _Members(file, bz2.BZ2Decompressor).read, form
    if form == "xz":
        return _Members(file, functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)).read, form
    if form == "gz":
        return gzip.GzipFile(fileobj=file).read, form
    if form == "zst":
        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd").read, form
    return file.read, form


_COMPRESSED = 1 << 15
"""Bytes read at a time; what is left of them is copied at the end of each member."""


class _Members:
    """The members of a bz2 or xz file one after the other.

    `bz2.BZ2File` and `lzma.LZMAFile` take a member whose first bytes are damaged for the end of the file.
    Here what follows a member is another one, or zeros that fill the file up.
    """

    def __init__(
        self, file: IO[bytes], new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]
    ) -> None:
        self._file = file
        self._new = new
        self._member = new()

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        parts: list[bytes] = []
        while size and (part := self._next(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _next(self, size: int) -> bytes:
        content = b""
        while not content:
            data = b""
            if self._member.eof:
                data = self._member.unused_data.lstrip(b"\0")
                while not data:
                    if not (data := self._file.read(_COMPRESSED)):
                        return b""
                    data = data.lstrip(b"\0")
                self._member = self._new()
            elif self._member.needs_input and not (data := self._file.read(_COMPRESSED)):
                raise EOFError("it ends within a member")
            content = self._member.decompress(data, size)
        return content
