"""Books: a text or Markdown file each, compressed or not, in a folder or in a tar or zip archive."""

from __future__ import annotations

import functools
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep import streams
from data_prep.raw import Raw
from earlybert.config import EarlyBertError

_BOOK_SUFFIXES = frozenset({".txt", ".md", ".markdown", ".text"})
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.zst")
_ARCHIVES = (*_TAR_SUFFIXES, ".zip")


def files(path: Path, word: str) -> list[Path]:
    """The files of a folder that are books, or the archive; `word` names the source in messages."""
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
    for compressed in (".gz", ".xz", ".bz2", ".zst"):
        stem = stem.removesuffix(compressed)
    return Path(stem).suffix in _BOOK_SUFFIXES and not name.startswith(".")


def documents(path: Path, progress: streams.Progress) -> Iterator[Raw]:
    """Stream the books of a file or archive, in its order."""
    if path.name.lower().endswith(".zip"):
        yield from _read_zip(path, progress)
        return
    if not path.name.lower().endswith(_TAR_SUFFIXES):
        yield Raw(id=path.name, text="\n".join(streams.lines(path, progress=progress)))
        return
    stream = streams.ChunkFile(streams.chunks(path, progress=progress, text=False))
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    yield from _member(path, member.name, file.read)
    except tarfile.TarError as error:
        raise EarlyBertError(f"{path}: not a whole tar file ({error}); get it again") from error


def _read_zip(path: Path, progress: streams.Progress) -> Iterator[Raw]:
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
    yield Raw(id=name, text=streams.text_of(read(), what=f"{path}: {member}"))
