"""Wikipedia dumps: the articles of a pages-articles XML, in constant memory, from the whole file or from a
part of it.

The stream is cut at <page> and </page>, and each page is parsed by itself: a broken page costs that page
only, and any place of the file is a place to begin. What a wiki calls its namespaces is read from the dump's
own <siteinfo>. Dropped are pages of other namespaces, redirects, disambiguation pages, and stubs: what the
wiki's editors mark as such and has fewer than `STUB_WORDS` words.
"""

from __future__ import annotations

import re
import xml.parsers.expat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import templates
from data_prep.wikitext import CATEGORY, DROPPED_PREFIXES, FILE, MEDIA
from earlybert.config import EarlyBertError

STUB_WORDS = 100
_LONGEST_PAGE = 1 << 26
"""Bytes; MediaWiki ends a page at 2 MiB of text, and a history holds many revisions."""
_LONGEST_HEAD = 1 << 22
"""Bytes before the first page."""

Chunks = Iterable[tuple[bytes, bool]]
"""Pieces of the XML, and whether the pages that begin in them are asked for; those come first."""


@dataclass(frozen=True)
class Page:
    """One page of a dump; of several revisions, the last."""

    id: str
    title: str
    text: str
    dropped: str | None = None
    """Why it is no article: "redirect", "broken page", ..."""
    stub: bool = False
    dropped_prefixes: frozenset[str] = field(default=DROPPED_PREFIXES)
    """Names, in lower case, of the wiki's own namespaces whose links show no text: media, files,
    categories."""


def pages(chunks: Chunks, *, path: Path, head: bytes | None = None) -> Iterator[Page]:
    """Stream the pages of a MediaWiki export, versions 0.8 to 0.11, that begin in the pieces asked for.

    `head` is what stands before the first page, for pieces that do not begin at the file's start. Raises
    EarlyBertError for a file that is no export or that breaks off.
    """
    prefixes = None if head is None else _dropped_prefixes(head, path)
    for before, page in _cut(chunks, path, whole=head is None):
        if prefixes is None:
            prefixes = _dropped_prefixes(before, path)
        yield _page(page, prefixes)


def head(chunks: Iterable[bytes], *, path: Path) -> bytes:
    """What stands before the first page."""
    held = b""
    for chunk in chunks:
        held += chunk
        if (at := held.find(_OPEN)) >= 0:
            return held[:at]
        if len(held) > _LONGEST_HEAD:
            break
    return _refuse_without_pages(held, path)


_OPEN, _CLOSE, _END = b"<page>", b"</page>", b"</mediawiki>"


class _Stream:
    """What is read of the chunks and not yet used; places are counted from the first of it."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = iter(chunks)
        self._held = b""
        self._used = 0
        self.base = 0
        """Bytes used before."""
        self.limit = 0
        """Bytes in all of the chunks that are asked for, as far as they are read."""
        self.asked, self.ended = False, False

    def find(self, mark: bytes, *, at: int = 0, within: int) -> int | None:
        """Where the mark is from `at` on; None where it is not among the next bytes `within` or at all."""
        looked = at
        while (place := self._held.find(mark, self._used + looked)) < 0:
            looked = max(at, len(self) - len(mark) + 1)
            if len(self) - at > within or not self._read():
                return None
        return place - self._used

    def __len__(self) -> int:
        return len(self._held) - self._used

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(len(self))
        return self._held[self._used + start : self._used + stop]

    def drop(self, count: int) -> None:
        self._used += count
        self.base += count

    def drop_all_but_its_end(self) -> None:
        self.drop(max(0, len(self) - len(_END) + 1))

    def _read(self) -> bool:
        chunk, self.asked = next(self._chunks, (b"", self.asked))
        self._held, self._used = self._held[self._used :] + chunk, 0
        if self.asked:
            self.limit = self.base + len(self)
        self.ended = not chunk
        return bool(chunk)


def _cut(chunks: Chunks, path: Path, *, whole: bool) -> Iterator[tuple[bytes, bytes]]:
    """(what stands before it, page) of each page that begins in the chunks asked for."""
    stream = _Stream(chunks)
    number = 0
    while True:
        start = stream.find(_OPEN, within=_LONGEST_HEAD)
        if start is None and stream.ended:
            break
        if start is None:
            if whole and not number:
                _refuse_without_pages(stream[:], path)
            stream.drop_all_but_its_end()
            continue
        if stream.base + start >= stream.limit:
            return
        number += 1
        end = stream.find(_CLOSE, at=start, within=_LONGEST_PAGE)
        if end is not None:
            end += len(_CLOSE)
            yield stream[:start], stream[start:end]
            stream.drop(end)
            continue
        yield stream[:start], stream[start : start + 1000]  # half of a page is a broken page
        while end is None and not stream.ended:
            stream.drop_all_but_its_end()
            end = stream.find(_CLOSE, within=_LONGEST_PAGE)
        if end is None:
            break
        stream.drop(end + len(_CLOSE))
    if whole and not number:
        _refuse_without_pages(stream[:], path)
    elif stream.asked and stream.find(_END, within=len(stream)) is None:
        raise EarlyBertError(
            f"{path}: the XML breaks off in or after page {number:,}, {stream.base + len(stream):,} bytes "
            "into its content: no </mediawiki>; the file is truncated, get it again"
        )


def _refuse_without_pages(start: bytes, path: Path) -> bytes:
    """Raise EarlyBertError saying what a file is whose first bytes hold no page, unless it is an export of
    none."""
    _dropped_prefixes(start, path)
    if _END in start:
        return start
    raise EarlyBertError(
        f"{path}: no <page> in its first {len(start):,} bytes; give a whole pages-articles dump"
    )


class _Head:
    """What expat finds in <siteinfo>."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._root: str | None = None
        self._key = ""
        self._text: list[str] | None = None
        self.dropped = set(DROPPED_PREFIXES)

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if self._root is None and name != "mediawiki":
            raise EarlyBertError(
                f"{self._path}: its root element is <{name}>, not <mediawiki>; give a pages-articles dump"
            )
        self._root = name
        if name == "namespace":
            self._key, self._text = attributes.get("key", "").strip(), []

    def characters(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def end(self, name: str) -> None:
        if name == "namespace" and self._text is not None:
            if self._key in (str(MEDIA), str(FILE), str(CATEGORY)):
                self.dropped.add("".join(self._text).lower())
            self._text = None

    def refuse_declarations(self, *_: Any) -> None:
        raise EarlyBertError(
            f"{self._path}: declares a document type, which no MediaWiki export does; give a pages-articles "
            "dump"
        )


def _dropped_prefixes(start: bytes, path: Path) -> frozenset[str]:
    reader = _Head(path)
    parser = xml.parsers.expat.ParserCreate("utf-8")
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.characters
    parser.StartDoctypeDeclHandler = reader.refuse_declarations
    try:
        parser.Parse(start, False)
    except xml.parsers.expat.ExpatError as error:
        reason = xml.parsers.expat.errors.messages[error.code]
        raise EarlyBertError(
            f"{path}: not XML at byte {parser.ErrorByteIndex} (line {error.lineno}): {reason}; give a "
            "pages-articles dump"
        ) from error
    return frozenset(reader.dropped)


class _Fields:
    """What expat finds in a <page>."""

    _WANTED = frozenset({("page", "title"), ("page", "ns"), ("page", "id"), ("revision", "text")})

    def __init__(self) -> None:
        self._open: list[str] = []
        self._text: list[str] | None = None
        self.found: dict[str, str] = {}

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._text = [] if self._open and (self._open[-1], name) in self._WANTED else None
        self._open.append(name)
        if name == "redirect":
            self.found["redirect"] = attributes.get("title", "")

    def characters(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def end(self, name: str) -> None:
        self._open.pop()
        if self._text is not None:
            self.found[name] = "".join(self._text)
            self._text = None


_TITLE = re.compile(rb"<title>([^<]{1,255})</title>")
_REDIRECT = re.compile(r"\s*#\s*(?:REDIRECT|RINVIA|WEITERLEITUNG|REDIRECTION|REDIRECCIÓN)\b", re.IGNORECASE)


def _page(data: bytes, prefixes: frozenset[str]) -> Page:
    fields = _Fields()
    parser = xml.parsers.expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler = fields.start
    parser.EndElementHandler = fields.end
    parser.CharacterDataHandler = fields.characters
    try:
        parser.Parse(data, True)
    except xml.parsers.expat.ExpatError:
        seen = _TITLE.search(data)
        name = seen[1].decode("utf-8", "replace") if seen else "untitled"
        return Page(id=name, title=name, text="", dropped="broken page")
    found = fields.found
    text = found.get("text", "")
    title, id = found.get("title", ""), found.get("id", "").strip()
    stub = False
    dropped = None
    if found.get("ns", "0").strip() != "0":
        dropped = "other namespace"
    elif "redirect" in found or _REDIRECT.match(text):
        dropped = "redirect"
    else:
        names = templates.names(text)
        stub = templates.is_stub(names)
        if templates.is_disambiguation(names) or "__DISAMBIG__" in text:
            dropped = "disambiguation page"
    return Page(id, title, "" if dropped else text, dropped=dropped, stub=stub, dropped_prefixes=prefixes)
