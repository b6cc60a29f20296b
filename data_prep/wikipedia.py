"""Wikipedia dumps: pages from the XML stream in constant memory, and wikitext to plain prose.

The parser of wikitext is mwparserfromhell; what to keep is decided here. References and comments go before
the parse (half of an article's markup, and the slowest to parse); tables, files, categories and most
templates go after it; templates that carry words of the sentence (`convert`, `lang`, `nowrap`, ...) are
expanded. Sections that only list (References, External links, ...) are dropped, and so is a heading with
nothing under it.
"""

from __future__ import annotations

import html
import re
import xml.parsers.expat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import clean
from earlybert.config import EarlyBertError

MEDIA, FILE, CATEGORY = -2, 6, 14


@dataclass(frozen=True)
class Page:
    """One page of a dump; of several revisions, the last."""

    id: str
    title: str
    namespace: int
    redirect: bool
    text: str
    dropped_prefixes: frozenset[str]
    """Names, in lower case, of the wiki's own namespaces whose links show no text: media, files,
    categories."""


def pages(chunks: Iterable[bytes], *, path: Path) -> Iterator[Page]:
    """Stream the pages of a pages-articles XML, any export version.

    Raises EarlyBertError for XML that breaks off, is malformed or is not a MediaWiki export.
    """
    reader = _Reader(path)
    parser = xml.parsers.expat.ParserCreate()
    parser.buffer_text = True
    parser.buffer_size = 1 << 20
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.characters
    try:
        for chunk in chunks:
            parser.Parse(chunk, False)
            yield from reader.take()
        parser.Parse(b"", True)
    except xml.parsers.expat.ExpatError as error:
        reason = xml.parsers.expat.errors.messages[error.code]
        raise EarlyBertError(
            f"{path}: the XML breaks at byte {parser.ErrorByteIndex} (line {error.lineno}): {reason}; "
            "the file is truncated or damaged, get it again"
        ) from error
    yield from reader.take()


class _Reader:
    """Expat's handlers: they fill one page at a time and queue it when it closes."""

    _WANTED = frozenset({"title", "ns", "id", "text", "namespace"})

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done: list[Page] = []
        self._open: list[str] = []
        self._text: list[str] | None = None
        self._page: dict[str, Any] = {}
        self._namespace_key = 0
        self._dropped = set(_DROPPED_PREFIXES)

    def take(self) -> list[Page]:
        done, self._done = self._done, []
        return done

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._open and name != "mediawiki":
            raise EarlyBertError(
                f"{self._path}: its root element is <{name}>, not <mediawiki>; give a pages-articles dump"
            )
        self._open.append(name)
        if name == "page":
            self._page = {"redirect": False}
        elif name == "redirect":
            self._page["redirect"] = True
        elif name == "namespace":
            self._namespace_key = int(attributes.get("key", 0))
        self._text = [] if name in self._WANTED else None

    def characters(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def end(self, name: str) -> None:
        self._open.pop()
        text, self._text = "".join(self._text or ()), None
        parent = self._open[-1] if self._open else ""
        if name == "page":
            self._close_page()
        elif name == "namespace" and self._namespace_key in (MEDIA, FILE, CATEGORY):
            self._dropped.add(text.lower())
        elif (parent == "page" and name in ("title", "ns", "id")) or (
            parent == "revision" and name == "text"
        ):
            self._page[name] = text

    def _close_page(self) -> None:
        page = self._page
        text, title = page.get("text", ""), page.get("title", "")
        number = page.get("ns", "0").strip()
        self._done.append(
            Page(
                id=page.get("id", "").strip(),
                title=title,
                namespace=int(number) if number.lstrip("-").isdigit() else 0,
                redirect=page["redirect"] or bool(_REDIRECT.match(text)),
                text=text,
                dropped_prefixes=frozenset(self._dropped),
            )
        )
        self._page = {}


def plain(wikitext: str, *, dropped_prefixes: frozenset[str] | None = None) -> str:
    """Turn an article's wikitext into plain prose, a paragraph, heading or list item a line."""
    import mwparserfromhell

    text = _COMMENT.sub("", wikitext.replace(_HEADING_MARK, "").replace(_ITEM_MARK, ""))
    text = _REFERENCE.sub("", text)
    text = _EXTENSION.sub("", text)
    out: list[str] = []
    _Walk(out, dropped_prefixes or _DROPPED_PREFIXES).code(mwparserfromhell.parse(text))
    text = _join_list_items("".join(out))
    return _sections(clean.leftovers(text).split("\n"))


_DROPPED_PREFIXES = frozenset({"file", "image", "category", "media"})
_REDIRECT = re.compile(r"\s*#\s*(?:REDIRECT|RINVIA|WEITERLEITUNG|REDIRECTION|REDIRECCIÓN)\b", re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(r"<ref\b[^<>]*/>|<ref\b[^<>]*>(?:(?!<ref\b).)*?</ref\s*>", re.DOTALL | re.IGNORECASE)
_EXTENSION = re.compile(
    r"<(gallery|math|timeline|imagemap|score|hiero|syntaxhighlight|source|graph|chem|ce|mapframe|templatestyles)"
    r"\b(?:[^<>]*/>|[^<>]*>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_INTERLANGUAGE = re.compile(r"(?:[a-z]{2,3}|simple|[a-z]{2,3}-[a-z-]{2,12})")


def _words(text: str, *, separator: str = " ") -> frozenset[str]:
    return frozenset(text.split(separator))


_DROPPED_TAGS = _words(
    "table ref references gallery math timeline imagemap score hiero syntaxhighlight source graph chem ce "
    "style script includeonly categorytree inputbox mapframe maplink templatestyles pre hr"
)
_LINE_TAGS = _words("br p div li dd dt tr blockquote poem center ul ol dl")
_HEADING_MARK, _ITEM_MARK = "\ue000", "\ue001"  # private use: stands for nothing in an article's text
_MARKED = re.compile(f"^{_HEADING_MARK}([1-6])(.*)$")
_ITEM_WORDS = 6
"""A list item of fewer words is a bare list (names, links), not prose."""

_LISTING_SECTIONS = _words(
    "references|notes|external links|further reading|see also|bibliography|sources|footnotes|citations|"
    "gallery|notes and references|references and notes|works cited|publications|discography|filmography|"
    "note|bibliografia|collegamenti esterni|altri progetti|voci correlate|riferimenti|discografia|"
    "filmografia|einzelnachweise|weblinks|literatur|siehe auch|références|notes et références|liens externes|"
    "voir aussi|bibliographie|referencias|enlaces externos|véase también|bibliografía",
    separator="|",
)

_FIRST = _words(
    "nowrap nobr small smaller big bigger large larger abbr abbrlink smallcaps sc smallcaps2 nihongo "
    "nihongo2 nihongo3 linktext ill illm quote blockquote cquote bquote quotation sic keypress key mvar math "
    "var em strong tooltip unicode transliteration hover angbr noitalic nobold italics formatnum "
    "script/hebrew script/arabic polytonic vanchor maiuscoletto formatonumero"
)
_SECOND = _words("lang langue lingua script rtl-lang font color colour resize")
_LAST = frozenset({"transl", "tlit", "translit", "wikt-lang", "zh", "hiero"})
_LITERAL = {
    "ndash": "\u2013", "en dash": "\u2013", "mdash": "\u2014", "em dash": "\u2014", "snd": " \u2013 ",
    "spaced ndash": " \u2013 ", "spnd": " \u2013 ", "spaced en dash": " \u2013 ", "spaced mdash": " \u2014 ",
    "'": "'", "'s": "'s", "nbsp": " ", "!": "|", "=": "=", "dot": "\u00b7", "middot": "\u00b7",
    "bull": "\u2022", "times": "\u00d7", "sup2": "\u00b2", "pound sign": "\u00a3", "gbp": "\u00a3",
    "euro": "\u20ac", "okina": "\u02bb", "ad": "AD", "bc": "BC", "ce": "CE", "bce": "BCE", "a.c.": "a.C.",
    "d.c.": "d.C.",
}  # fmt: skip
_RANGE_WORDS = _words("to - \u2013 and or by x \u00d7 to(-) and(-) +/- \u00b1")


class _Walk:
    """Visit a parsed page's nodes and append the text that a reader would see."""

    def __init__(self, out: list[str], dropped_prefixes: frozenset[str]) -> None:
        self._out = out
        self._dropped = dropped_prefixes

    def code(self, code: Any) -> None:
        for node in code.nodes:
            getattr(self, f"_{type(node).__name__.lower()}", self._nothing)(node)

    def _nothing(self, node: Any) -> None:
        """Comments and template arguments have no text of their own."""

    def _text(self, node: Any) -> None:
        self._out.append(node.value)

    def _htmlentity(self, node: Any) -> None:
        self._out.append(html.unescape(str(node)))

    def _heading(self, node: Any) -> None:
        title = _inline(node.title, self._dropped)
        self._out.append(f"\n{_HEADING_MARK}{node.level}{title}\n")

    def _externallink(self, node: Any) -> None:
        if node.title is not None:
            self.code(node.title)

    def _wikilink(self, node: Any) -> None:
        title = str(node.title).strip()
        prefix, colon, rest = title.partition(":")
        space = prefix.strip().lower()
        if colon and space in self._dropped:
            return
        if colon and rest and _INTERLANGUAGE.fullmatch(prefix) and node.text is None:
            return
        if node.text is not None:
            self.code(node.text)
        else:
            self._out.append(title.lstrip(":"))

    def _tag(self, node: Any) -> None:
        name = str(node.tag).strip().lower()
        if name in _DROPPED_TAGS or "display:none" in str(node).partition(">")[0].replace(" ", "").lower():
            return
        if name == "li" and node.wiki_markup:
            self._out.append(_ITEM_MARK)
        elif name in _LINE_TAGS and not node.wiki_markup:
            self._out.append("\n")
        if node.contents is not None:
            self.code(node.contents)
            if name in _LINE_TAGS and not node.wiki_markup:
                self._out.append("\n")

    def _template(self, node: Any) -> None:
        name = re.sub(r"[\s_]+", " ", str(node.name)).strip().lower()
        if name in _LITERAL:
            self._out.append(_LITERAL[name])
            return
        if name.startswith("formatnum:"):
            self._out.append(name.partition(":")[2])
            return
        values = [p.value for p in node.params if not p.showkey]
        named = [p for p in node.params if p.showkey]
        values += [p.value for p in named if str(p.name).strip() in ("1", "2", "text", "quote")]
        if not values:
            return
        if name in ("convert", "cvt"):
            self._out.append(_converted([str(value).strip() for value in values]))
        elif name in ("frac", "fraction", "sfrac"):
            self._out.append("/".join(str(value).strip() for value in values))
        elif name in ("as of", "since"):
            self._out.append(f"{name[0].upper()}{name[1:]} {str(values[0]).strip()}")
        elif name in ("circa", "c.", "ca."):
            self._out.append(f"c. {str(values[0]).strip()}")
        elif name == "val":
            unit = next((str(p.value).strip() for p in node.params if str(p.name).strip() in ("u", "ul")), "")
            self._out.append(f"{str(values[0]).strip()} {unit}".strip())
        elif name in _FIRST or (name.startswith("lang-") and len(name) <= 12):
            self.code(values[0])
        elif name in _SECOND and len(values) >= 2:
            self.code(values[1])
        elif name in _LAST:
            self.code(values[-1])


def _inline(code: Any, dropped_prefixes: frozenset[str]) -> str:
    out: list[str] = []
    _Walk(out, dropped_prefixes).code(code)
    return " ".join("".join(out).split())


def _converted(values: list[str]) -> str:
    """Show `{{convert|5|to|10|km|mi}}` as "5 to 10 km": the amounts and the unit that they were given in."""
    shown = values[:1]
    at = 1
    while at + 1 < len(values) and values[at] in _RANGE_WORDS:
        shown += values[at : at + 2]
        at += 2
    return " ".join([*shown, *values[at : at + 1]])


def _join_list_items(text: str) -> str:
    """Drop list items too short to be prose and the marks of those that stay."""
    lines = []
    for line in text.split("\n"):
        if _ITEM_MARK in line:
            line = line.replace(_ITEM_MARK, " ")
            if len(line.split()) < _ITEM_WORDS:
                continue
        lines.append(line)
    return "\n".join(lines)


def _sections(lines: list[str]) -> str:
    """Drop listing sections with all below them, and headings with no text before the next of their rank."""
    kept: list[str] = []
    waiting: list[tuple[int, str]] = []
    skipped_level: int | None = None
    for line in lines:
        if heading := _MARKED.match(line):
            level, title = int(heading[1]), heading[2].strip()
            if skipped_level is not None and level > skipped_level:
                continue
            skipped_level = level if title.lower() in _LISTING_SECTIONS else None
            waiting = [(rank, text) for rank, text in waiting if rank < level]
            if skipped_level is None and title:
                waiting.append((level, title))
        elif line and skipped_level is None:
            kept += [text for _, text in waiting]
            waiting = []
            kept.append(line)
    return "\n".join(kept)
