"""Wikitext to plain prose, the way a reader sees the page, in one pass over its marks.

A stack of open links, templates and tables is filled from a stream of marks, so the time is linear in the
text however deep they nest. Shown: sections, paragraphs, list items, the labels of links, and templates that
carry words of a sentence (`data_prep.templates`); a formula is shown by its symbols in one line. Not shown:
references, tables, files, galleries, all other templates, bare addresses, and sections that only refer
elsewhere (References, See also, ...).

The surprise: text that must not be read as marks (`<nowiki>`, a template's `{{!}}`) travels as characters of
Unicode's private use, which stand for nothing in an article.
"""

from __future__ import annotations

import functools
import html
import re

from data_prep import clean, templates, variants
from data_prep.formulas import formula

MEDIA, FILE, CATEGORY = -2, 6, 14
DROPPED_PREFIXES = frozenset({"file", "image", "category", "media"})
"""Namespaces whose links show no text, by their names in every wiki, in lower case; a wiki's own names are in
its dumps."""

_HEADING_MARK, _BREAK = "\ue000", "\ue001"
_PRIVATE = re.compile("[\ue000-\ue020]")
_LITERAL = {ord(mark): 0xE002 + i for i, mark in enumerate("[]{}|'<>=*#:;&_!-\n")}
_UNLITERAL = {stand_in: chr(mark) for mark, stand_in in _LITERAL.items()}
_LITERALS = re.compile("[\ue002-\ue020]")


def plain(
    wikitext: str, *, dropped_prefixes: frozenset[str] = DROPPED_PREFIXES, title: str | None = None
) -> str:
    """Turn an article's wikitext into plain prose: a paragraph, heading or list item a line."""
    text = _PRIVATE.sub("", wikitext)
    if "<" in text:
        text = _without_extensions(text)
    if "{{{" in text:
        text = _ARGUMENT.sub(r"\1", text)
    if "-{" in text:
        text = variants.chosen(text)
    text = _Marks(dropped_prefixes, title).read(text)
    if "//" in text or "mailto:" in text:
        text = _URL.sub("", _EXTERNAL.sub(_label, text))
    if "''" in text:
        text = _without_quotes(text)
    if "<" in text:
        text = clean.TAG.sub("", _BLOCK_TAG.sub(_BREAK, _SCRIPT.sub(_raised, text)))
    if "__" in text:
        text = _SWITCH.sub("", text)
    text = "\n".join(_lines(text))
    text = _LITERALS.sub(_unliteral, text)
    return _sections(clean.tidy(clean.prose(html.unescape(text))).split("\n"))


def _unliteral(match: re.Match[str]) -> str:
    return _UNLITERAL[ord(match[0])]


_ARGUMENT = re.compile(r"\{\{\{[^{}|]*(?:\|([^{}]*))?\}\}\}")
_URL = re.compile(r"(?:https?|ftp)://[^\s<>\[\]|\"]*[^\s<>\[\]|\".,;:!?)]")
_EXTERNAL = re.compile(
    r"\[(?:(?:[a-z]{3,6}:)?//[^\s\[\]]*+|mailto:[^\s\[\]]*+)[^\S\n]*+([^\[\]\n]*+)\]", re.IGNORECASE
)
_SWITCH = re.compile(r"__[^\W\d_]{3,}__")
_BLOCK_TAG = re.compile(
    r"</?(?:p|div|li|dd|dt|tr|blockquote|poem|center|ul|ol|dl|h[1-6]|hr|br|onlyinclude)\b[^<>]*>",
    re.IGNORECASE,
)


_SCRIPT = re.compile(r"<(su[pb])>([0-9+\u2212\u2013-]{1,8})</\1>", re.IGNORECASE)
_LOWER = str.maketrans("0123456789+-\u2212\u2013", "₀₁₂₃₄₅₆₇₈₉₊₋₋₋")


def _raised(match: re.Match[str]) -> str:
    return match[2].translate(templates.RAISED if match[1].lower() == "sup" else _LOWER)


_QUOTES = re.compile(r"''+")
_FOUR = re.compile(r"(?<!')'(?='''(?!'))")
_AFTER_A_LETTER = re.compile(r"(?<![^\W\d_])([^\W\d_])'''(?!')")


def _without_quotes(text: str) -> str:
    """Drop the marks of italics and bold, but not the apostrophe of "l'''Italia''": as MediaWiki, where a
    line has an odd number of both, the bold after a single letter is an apostrophe and italics."""
    if "'''" not in text:
        return _QUOTES.sub("", text)
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if "''" not in line:
            continue
        if "'''" in line:
            line = _FOUR.sub("\ue007", line)
            runs = [len(run) for run in _QUOTES.findall(line)]
            if sum(n in (3, 5) for n in runs) % 2 and sum(n in (2, 5) for n in runs) % 2:
                line = _AFTER_A_LETTER.sub("\\1\ue007", line, count=1)
        lines[i] = _QUOTES.sub("", line)
    return "\n".join(lines)


def _label(match: re.Match[str]) -> str:
    return match[1]


# --- tags whose content is no wikitext, or is not shown -----------------------------------------------------

_EXTENSION = re.compile(
    r"<(?:!--|(nowiki|ref|references|gallery|math|chem|ce|timeline|imagemap|score|hiero|syntaxhighlight|"
    r"source|graph|mapframe|maplink|templatestyles|templatedata|categorytree|inputbox|includeonly|table|"
    r"pre|style|script|span|div)\b([^<>]*)>)",
    re.IGNORECASE,
)


_INNER_REFERENCE = re.compile(r"<ref\b", re.IGNORECASE)


def _without_extensions(text: str) -> str:
    """Drop comments and tags whose content is not shown; keep nowiki and the lines of poems; write formulas
    out."""
    if "<poem" in text:
        text = _verse(text)
    out: list[str] = []
    done = at = 0
    never_closed: set[str] = set()
    while opening := _EXTENSION.search(text, at):
        start, at = opening.span()
        name = (opening[1] or "!--").lower()
        attributes = opening[2] or ""
        if name in ("span", "div") and "none" not in attributes:
            continue
        shown = ""
        if not attributes.endswith("/"):
            close = -1 if name in never_closed else _closing(text, name, at)
            if close < 0:
                never_closed.add(name)
                if name not in ("!--", "ref"):
                    continue  # a tag alone: the text after it is shown
                end = len(text) if name == "!--" else _end_of_line(text, at)
                content = ""
            else:
                if name == "ref" and (inner := _INNER_REFERENCE.search(text, at, close)):
                    close = end = min(inner.start(), _end_of_line(text, at))  # this one was not closed
                else:
                    end = close + 3 if name == "!--" else text.find(">", close) + 1 or len(text)
                content = text[at:close]
            at = end
            if name == "nowiki":
                shown = content.translate(_LITERAL)
            elif name in ("math", "ce", "chem"):
                shown = formula(content).translate(_LITERAL)
        out.append(text[done:start])
        out.append(shown)
        done = at
    out.append(text[done:])
    return "".join(out)


_POEM = re.compile(r"(</?poem\b[^<>]*>)", re.IGNORECASE)


def _verse(text: str) -> str:
    """Make every line of a poem one of the prose."""
    parts = _POEM.split(text)
    closed = max((i for i, part in enumerate(parts) if i % 2 and part.startswith("</")), default=0)
    inside = False
    for i, part in enumerate(parts):
        if i % 2:
            inside = not part.startswith("</")
            parts[i] = _BREAK
        elif inside and i < closed:
            parts[i] = part.replace("\n", _BREAK)
    return "".join(parts)


def _closing(text: str, name: str, at: int) -> int:
    if name == "!--":
        return text.find("-->", at)
    found = _closing_tag(name).search(text, at)
    return -1 if found is None else found.start()


@functools.cache
def _closing_tag(name: str) -> re.Pattern[str]:
    return re.compile(f"</{name}", re.IGNORECASE)


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return end if end >= 0 else len(text)


# --- links, templates and tables ----------------------------------------------------------------------------

_MARK = re.compile(
    r"\[\[([^\[\]{}|\n]*)(?:\|([^\[\]{}|\n]*))?\]\]"  # a link with nothing inside
    r"|\[\[|\]\]|\{\{|\}\}|\n[^\S\n]*[:*#;]*[^\S\n]*\{\||\n[^\S\n]*\|\}(?!\})"
)
_INTERLANGUAGE = re.compile(r"(?:[a-z]{2,3}|simple|[a-z]{2,3}-[a-z-]{2,12})\Z")
"""Prefixes of links to the same page in other languages."""


_MEDIA_FILE = re.compile(
    r"\.(?:jpe?g|png|svg|gif|tiff?|webp|xcf|og[gva]|opus|web[mp]|flac|wav|mp3|midi?|pdf|djvu?|stl)\s*\Z", re.I
)
"""Ends of the names of files, whose namespace may go by an alias that is not in the dump."""


class _Marks:
    """Read links, templates and tables from the inside out."""

    def __init__(self, dropped_prefixes: frozenset[str], title: str | None) -> None:
        self._dropped = dropped_prefixes
        self._title = title

    def read(self, text: str) -> str:
        text = "\n" + text
        parts: list[str] = []
        stack: list[tuple[str, list[str]]] = []
        open_now = {"[[": 0, "{{": 0, "{|": 0}
        at = 0
        for mark in _MARK.finditer(text):
            start = mark.start()
            if start > at:
                parts.append(text[at:start])
            at = mark.end()
            target = mark[1]
            if target is not None:
                parts.append(self._link(target, mark[2]))
                continue
            kind = text[at - 2 : at]
            if kind in open_now:
                stack.append((kind, parts))
                parts = []
                open_now[kind] += 1
                continue
            opened = {"]]": "[[", "}}": "{{", "|}": "{|"}[kind]
            if not open_now[opened]:
                if opened == "{|":
                    parts.append("\n")
                continue
            while True:
                innermost, outer = stack.pop()
                open_now[innermost] -= 1
                inside = "".join(parts)
                parts = outer
                if innermost == opened:
                    break
                if innermost != "{|":
                    parts.append(inside)  # never closed: its text is all that can be shown of it
            if opened == "[[":
                target, bar, label = inside.partition("|")
                parts.append(self._link(target, label if bar else None))
            elif opened == "{{":
                shown = self._template(inside)
                if not shown and text[at : at + 1].isalnum() and parts and parts[-1][-1:].isalnum():
                    shown = " "  # there was a note between two words
                parts.append(shown)
            else:
                parts.append("\n")
        parts.append(text[at:])
        while stack:
            kind, outer = stack.pop()
            outer.append("\n" if kind == "{|" else "".join(parts))
            parts = outer
        return "".join(parts)

    def _link(self, target: str, label: str | None) -> str:
        if ":" in target:
            prefix, _, rest = target.partition(":")
            space = prefix.strip()
            to_another_language = label is None and rest and _INTERLANGUAGE.match(prefix)
            if not space:
                target = rest
            elif to_another_language or space.lower() in self._dropped or _MEDIA_FILE.search(rest):
                return ""
        if label is None:
            return target
        return label or target.strip()

    def _template(self, inside: str) -> str:
        name, _, arguments = inside.partition("|")
        return templates.shown(name, arguments, title=self._title).replace("|", "\ue006")


# --- lines and sections -------------------------------------------------------------------------------------

_HEADING = re.compile(r"(={1,6})(.*?)\1\s*$")
_SPECIAL = frozenset("=*#:;| -\ue001")


def _lines(text: str) -> list[str]:
    """Join the lines of a paragraph; drop the marks of headings (one stands for them), items and rules."""
    done: list[str] = []
    paragraph: list[str] = []
    for line in text.split("\n"):
        first = line[:1]
        if first and first not in _SPECIAL:
            paragraph.append(line)
            continue
        if paragraph:
            done.append(" ".join(paragraph))
            paragraph = []
        if first == "=" and (heading := _HEADING.match(line)):
            done.append(f"{_HEADING_MARK}{len(heading[1])}{heading[2].strip()}")
        elif first == "|":
            continue  # of a table that was never opened
        elif first == "-":
            done.append(line.lstrip("-") if line.startswith("----") else line)
        elif first:
            done.append(line.lstrip("*#:; "))
    if paragraph:
        done.append(" ".join(paragraph))
    return "\n".join(done).replace(_BREAK, "\n").split("\n")


_MARKED = re.compile(f"{_HEADING_MARK} ?([1-6])(.*)")
_REFERRING_SECTIONS = templates.words(
    "references|notes|external links|external link|further reading|see also|bibliography|sources|"
    "footnotes|citations|gallery|notes and references|references and notes|works cited|references cited|"
    "note|bibliografia|collegamenti esterni|altri progetti|voci correlate|riferimenti|galleria|"
    "galleria d'immagini|galleria fotografica|einzelnachweise|weblinks|literatur|siehe auch|quellen|"
    "anmerkungen|références|notes et références|liens externes|voir aussi|bibliographie|annexes|"
    "referencias|enlaces externos|véase también|bibliografía|notas|referências|ligações externas|"
    "ver também|zie ook|externe links|bronnen|przypisy|linki zewnętrzne|bibliografia|примечания|ссылки|"
    "литература|см. также|脚注|関連項目|外部リンク|参考文献|参见|外部链接",
    separator="|",
)


def _sections(lines: list[str]) -> str:
    """Drop referring sections with all below them, and headings with no text before the next of their
    rank."""
    kept: list[str] = []
    waiting: list[tuple[int, str]] = []
    skipped_level: int | None = None
    for line in lines:
        if line.startswith(_HEADING_MARK) and (heading := _MARKED.match(line)):
            level, title = int(heading[1]), heading[2].strip()
            if skipped_level is not None and level > skipped_level:
                continue
            skipped_level = level if title.lower().rstrip(":") in _REFERRING_SECTIONS else None
            waiting = [(rank, text) for rank, text in waiting if rank < level]
            if skipped_level is None and title:
                waiting.append((level, title))
        elif line and skipped_level is None:
            kept += [text for _, text in waiting]
            waiting = []
            kept.append(line)
    return "\n".join(kept)
