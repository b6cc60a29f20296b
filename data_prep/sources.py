"""SOURCE words to raw documents: which files a word stands for, and each file as a stream of documents.

Every reader is a generator that holds one document at a time.
"""

from __future__ import annotations

import difflib
import glob
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from data_prep import books, bzip2, clean, hub, python_docs, streams, tables, wikipedia, wikitext
from data_prep.raw import Raw
from data_prep.streams import Progress
from earlybert.config import EarlyBertError

Part = tuple[int, int]
"""(which, of how many)"""

Place = Path | hub.Stream
"""What documents are read from."""


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

    def documents(self, place: Place, *, progress: Progress) -> Iterator[Raw]:
        """Stream the raw documents of one of the source's files, always in the same order."""
        return self.part(place, (0, 1), progress=progress)

    def can_split(self, place: Place) -> bool:
        """Whether `part` reads a part of this file without reading all of it."""
        if isinstance(place, hub.Stream):
            return True
        return self.kind == "wikipedia" and (_is_bzip2(place) or streams.is_plain(place))

    def part(self, place: Place, part: Part, *, progress: Progress) -> Iterator[Raw]:
        """Stream the documents of a part of a file that can be split (each is in one part), or the whole."""
        if isinstance(place, hub.Stream):
            return (Raw(id=id, text=text) for id, text in place.documents(part, progress))
        if part[1] > 1:
            return _read_wikipedia(place, progress, part)
        return _KINDS[self.kind].read(place, progress)

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


def files(source: Source) -> Sequence[Place]:
    """List a source's files in a fixed order.

    Raises EarlyBertError where nothing matches, a match is not readable, or all files are empty.
    """
    if source.kind == "python-docs":
        return [python_docs.standard_library()]
    if source.kind == "hf-stream":
        return [hub.Stream.open(source.pattern, word=source.word)]
    if source.kind == "books":
        found = books.files(Path(source.pattern), source.word)
    elif source.kind == "hf":
        found = hub.files(source.pattern, word=source.word)
    else:
        matches = set(map(Path, glob.glob(source.pattern, recursive=True)))  # **/** gives a file twice
        found = sorted(path for path in matches if path.is_file())
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


def size_of(path: Place) -> int:
    """Bytes that a reader of this file will report as progress; 0 where that is not known."""
    if isinstance(path, hub.Stream):
        return 0
    return sum(p.stat().st_size for p in python_docs.modules(path)) if path.is_dir() else path.stat().st_size


def version(path: Place) -> tuple[int, ...]:
    """What changes when a file is written to, on this machine; empty for one that is gone."""
    if isinstance(path, hub.Stream):
        return (0,)
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_size, found.st_mtime_ns, found.st_ino) if path.is_file() else (1,)


def identity(path: Place) -> str:
    """Hash what tells one version of a file from another: name, size, and the first and last MiB."""
    if isinstance(path, hub.Stream):
        return path.identity
    if path.is_dir():
        return f"python-{'.'.join(map(str, sys.version_info[:3]))}-{size_of(path)}"
    return streams.identity(path)


_TEXT_DOCUMENT_CHARACTERS = 1 << 20
"""A text file is one document, but one longer than this is cut at the next blank line."""


def _read_text(path: Path, progress: Progress) -> Iterator[Raw]:
    held: list[str] = []
    length = part = 0
    for line in streams.lines(path, progress=progress):
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
    for number, line in enumerate(streams.lines(path, progress=progress), start=1):
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
        id = row.get("id")
        yield Raw(id=f"{path.name}:{number}" if id is None else str(id), text=text)


_DOC_START = re.compile(r'<doc id="([^"]*)"(?:[^>]* title="(.*)")?[^>]*>\s*$')


def _read_wikiextractor(path: Path, progress: Progress) -> Iterator[Raw]:
    held: list[str] | None = None
    id = title = ""
    for number, line in enumerate(streams.lines(path, progress=progress), start=1):
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
    first = next((line for line in streams.lines(path) if line.strip()), "")
    return (_read_jsonl if first.startswith("{") else _read_text)(path, progress)


def _is_bzip2(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(bzip2.MAGIC)) == bzip2.MAGIC


def _read_wikipedia(path: Path, progress: Progress, part: Part = (0, 1)) -> Iterator[Raw]:
    if part[1] == 1:
        chunks: wikipedia.Chunks = ((chunk, True) for chunk in _export(path, progress))
    else:
        chunks = _part_of_export(path, part, progress)
    start = wikipedia.head(_export(path), path=path) if part[0] else None
    found = wikipedia.pages(chunks, path=path, head=start)
    for page in found:
        details = {"dropped_prefixes": page.dropped_prefixes, "title": page.title, "stub": page.stub}
        yield Raw(id=page.id, text=page.text, dropped=page.dropped, details=details)


def _export(path: Path, progress: Progress | None = None) -> Iterator[bytes]:
    return streams.chunks(path, progress=progress, check=False)  # a bad byte breaks its page only


def _part_of_export(path: Path, part: Part, progress: Progress) -> Iterator[tuple[bytes, bool]]:
    """(content, whether pages that begin in it are the part's) from the part's first byte to the file's
    last."""
    size = path.stat().st_size
    start, stop = (size * place // part[1] for place in (part[0], part[0] + 1))
    if _is_bzip2(path):
        for content, at, mine in bzip2.blocks(path, start, stop):
            progress(min(at, stop) - start)
            yield content, mine
        return
    with open(path, "rb") as file:
        file.seek(start)
        at = start
        while chunk := file.read(min(1 << 20, stop - at) if at < stop else 1 << 20):
            yield chunk, at < stop
            at += len(chunk)
            progress(min(at, stop) - start)


def _read_python_docs(root: Path, progress: Progress) -> Iterator[Raw]:
    for id, text in python_docs.documents(root, progress=progress):
        yield Raw(id=id, text=text or "", dropped="not parsable" if text is None else None)


_KINDS = {
    "python-docs": _Kind("python-docs", _read_python_docs, lambda raw: raw.text, "python-docs"),
    "text": _Kind("text", _read_text, lambda raw: clean.plain_text(raw.text), "text:GLOB"),
    "jsonl": _Kind("jsonl", _read_jsonl, lambda raw: clean.plain_text(raw.text), "jsonl:GLOB"),
    "parquet": _Kind("parquet", _read_parquet, lambda raw: clean.plain_text(raw.text), "parquet:GLOB"),
    "hf": _Kind("hub", _read_hub, lambda raw: clean.plain_text(raw.text), "hf:NAME[,CONFIG]"),
    "hf-stream": _Kind("hub", _read_hub, lambda raw: clean.plain_text(raw.text), "hf-stream:NAME[,CONFIG]"),
    "books": _Kind("books", books.documents, lambda raw: clean.book(raw.text), "books:DIR-or-ARCHIVE"),
    "wikiextractor": _Kind(
        "wikipedia", _read_wikiextractor, lambda raw: clean.leftovers(raw.text), "wikiextractor:GLOB"
    ),
    "wikipedia": _Kind(
        "wikipedia",
        _read_wikipedia,
        lambda raw: wikitext.plain(
            raw.text,
            dropped_prefixes=raw.details.get("dropped_prefixes", wikitext.DROPPED_PREFIXES),
            title=raw.details.get("title"),
        ),
        "wikipedia:GLOB",
    ),
}
