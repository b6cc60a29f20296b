"""Text to plain prose: pure functions from a string to lines, where a line is a paragraph, a heading or a
list item.

The surprise: hard-wrapped text (e-books, docstrings) is joined again, because a newline is a boundary for the
sentence splitter. A block of lines counts as hard-wrapped where all of its lines but the last are of similar,
terminal-like width.
"""

from __future__ import annotations

import html
import re
import unicodedata

_DROPPED = (
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # control characters
    "\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ufffd"  # what cannot be seen
    "\ud800-\udfff"  # halves of pairs, from escapes in source code; no encoding takes them
)
_BREAKS = "\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_ODD_SPACES = "\t\x0b\x1f\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
_ODD = re.compile(f"[{_DROPPED}{_BREAKS}{_ODD_SPACES}]+")
_IS_DROPPED, _IS_BREAK = re.compile(f"[{_DROPPED}]"), re.compile(f"[{_BREAKS}]")
_BLANK_LINES = re.compile(r"\n{3,}")

_WRAPPED_MINIMUM, _WRAPPED_MAXIMUM = 40, 100

_TAGS = (
    "a|abbr|b|big|blockquote|br|center|cite|code|dd|del|dfn|div|dl|dt|em|font|gallery|h[1-6]|hr|i|imagemap|"
    "img|"
    "includeonly|ins|kbd|li|math|nobr|noinclude|nowiki|ol|onlyinclude|p|poem|pre|q|ref|references|s|samp|"
    "section|"
    "small|source|span|strike|strong|sub|sup|syntaxhighlight|table|tbody|td|th|thead|timeline|tr|tt|u|ul|"
    "var|wbr"
)
TAG = re.compile(rf"</?(?:{_TAGS})\b[^<>]*/?>", re.IGNORECASE)
_BREAK_TAG = re.compile(r"<(?:br|hr|p|li|dd|dt|tr)\b[^<>]*>", re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_REFERENCE = re.compile(
    r"<ref\b[^<>]*/>|<ref\b[^<>]*>(?:(?!<ref\b).)*?</ref\s*>|<ref\b[^<>\n]*>?[^\n]*",
    re.DOTALL | re.IGNORECASE,
)
_INNER_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_INNER_TABLE = re.compile(r"^\{\|(?:(?!^\{\|).)*?^\|\}", re.DOTALL | re.MULTILINE)
_TABLE_LINE = re.compile(r"^(?:\{\||\|\}|\|-|[|!]).*$", re.MULTILINE)
_WIKILINK = re.compile(r"\[\[(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]")
_QUOTES = re.compile(r"'{2,}")
_MAGIC_WORD = re.compile(r"__[A-Z]{4,}__")
_EDITORIAL = re.compile(
    r" ?\[\s*\[?(?:update|citation needed|clarification needed|who\?|when\?|which\?|by whom\?)\]?\s*\]",
    re.IGNORECASE,
)
_STRAY = re.compile(r"\{\{|\}\}|\[\[|\]\]")

_BRACKETS = re.compile(r"[(\[][^()\[\]\n]*[)\]]")
_AFTER_OPENING = re.compile(r"([(\[])[\s,;:]+")
_EDGE = " ,;:"
_NOTHING = frozenset("()[] ,;:/\u2013-")
_BEFORE_MARK = re.compile(r" +([,.;:!?])(?!\S)")
_DOUBLED_MARK = re.compile(r"([,;:])(?:\s*[,;])+")

_GUTENBERG_START = re.compile(
    r"^.*\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*$|^\*END\*? ?THE SMALL PRINT.*$",
    re.IGNORECASE | re.M,
)
_GUTENBERG_END = re.compile(
    r"^.*\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|^\s*End of (?:the |this )?Project Gutenberg|"
    r"^\s*\*?\*?\*? ?START: FULL LICENSE",
    re.IGNORECASE | re.MULTILINE,
)
_PRODUCED_BY = re.compile(
    r"\A\s*(?:E-text prepared|Produced|Transcribed) by [^\n]*(?:\n[^\n]+)*\n", re.IGNORECASE
)

_HEADING = re.compile(r"^ {0,3}#{1,6} *(.*?) *#*$")
_FRONT_MATTER = re.compile(
    r"^ {0,3}#{1,6} *(?:Title|Author|Year|Translator|Editor|Publisher|Language) *:", re.I
)
_RULE = re.compile(r"^ *(?:(?:[-*_=~+] *){3,}|[-*_]+)$")
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]+)\]\((?:[^()]|\([^)]*\))*\)")
_FOOTNOTE = re.compile(r"\[\^?\d{1,4}\]|\[\^[^\]\s]+\]:?")
_STRONG = re.compile(r"(\*{1,3})(?=\S)(.+?)(?<=\S)\1")
_EMPHASIS = re.compile(r"(?<![\w_])_{1,3}(?=\S)(.+?)(?<=\S)_{1,3}(?![\w_])")
_QUOTE_OR_ITEM = re.compile(r"^ *(?:> ?)+|^ *[*+-] +(?=\S)")
_ESCAPED = re.compile(r"\\([\\`*_{}\[\]()#+.!>-])")


def prose(text: str) -> str:
    """Normalise any text: NFC, one kind of space and newline, nothing invisible, no line without a letter
    or digit."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _single_spaces(_ODD.sub(_even, text))
    lines = []
    for line in map(str.strip, text.split("\n")):
        if not line.isascii():  # composition does not reach over a newline
            line = unicodedata.normalize("NFC", line)
        lines.append(line if any(map(str.isalnum, line)) else "")
    text = "\n".join(lines).strip()
    return _BLANK_LINES.sub("\n\n", text) if "\n\n\n" in text else text


def _even(odd: re.Match[str]) -> str:
    found = _IS_DROPPED.sub("", odd[0])
    return "\n" if _IS_BREAK.search(found) else " " if found else ""


def _single_spaces(text: str) -> str:
    while "  " in text:
        text = text.replace("  ", " ")
    return text


def unwrap(text: str) -> str:
    """Join the lines of hard-wrapped paragraphs; blocks of short or of long lines stay as they are."""
    blocks = []
    for block in re.split(r"\n[^\S\n]*\n", text):
        lines = [line.strip() for line in block.split("\n") if line.strip()]
        body, last = lines[:-1], lines[-1:]
        wrapped = all(_WRAPPED_MINIMUM <= len(line) <= _WRAPPED_MAXIMUM for line in body)
        if body and wrapped and len(last[0]) <= _WRAPPED_MAXIMUM:
            blocks.append(" ".join(lines))
        elif lines:
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def plain_text(text: str) -> str:
    """Clean a text file: hard wraps joined, then `prose`."""
    return prose(unwrap(text.replace("\r\n", "\n").replace("\r", "\n")))


def leftovers(text: str) -> str:
    """Remove the markup that a wikitext extractor left behind: tags, references, templates, links,
    entities."""
    if "<" in text:
        text = _COMMENT.sub("", text)
        text = _REFERENCE.sub("", text)
        text = TAG.sub("", _BREAK_TAG.sub("\n", text))
    if "{" in text:
        text = _without(_INNER_TEMPLATE, text)
        text = _without(_INNER_TABLE, text)
    if "[" in text:
        text = _EDITORIAL.sub("", text)
        text = _WIKILINK.sub(r"\1", text)
    text = _STRAY.sub("", _MAGIC_WORD.sub("", _QUOTES.sub("", text)))
    if "|" in text or "!" in text:
        text = _TABLE_LINE.sub("", text)
    return tidy(prose(html.unescape(text)))


def tidy(text: str) -> str:
    """Mend the punctuation around what was removed: empty brackets, spaces before commas, doubled commas."""
    text = _DOUBLED_MARK.sub(r"\1", text)
    text = _AFTER_OPENING.sub(r"\1", text)
    text = text.replace(", )", ")").replace("; )", ")").replace(" )", ")")
    text = _BRACKETS.sub(_mended, text)
    return _single_spaces(_BEFORE_MARK.sub(r"\1", text))


def _mended(group: re.Match[str]) -> str:
    found = group[0]
    if found[-2] in _EDGE or found[1] in _EDGE:
        found = found[0] + found[1:-1].strip(_EDGE) + found[-1]
    return "" if _NOTHING.issuperset(found) else found


def book(text: str) -> str:
    """Clean an e-book: Project Gutenberg's header and licence, Markdown marks and hard wraps removed."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return prose(unwrap(markdown(without_licence(text))))


def without_licence(text: str) -> str:
    """Cut what Project Gutenberg puts before and after a book."""
    head = text[:40_000]
    starts = list(_GUTENBERG_START.finditer(head))
    if starts:
        text = text[starts[-1].end() :]
        text = _PRODUCED_BY.sub("", text)
    tail = max(0, len(text) - 60_000)
    end = _GUTENBERG_END.search(text, tail)
    return text[: end.start()] if end else text


def markdown(text: str) -> str:
    """Turn Markdown into plain lines: headings without marks, no front matter, rules, images or emphasis."""
    lines = []
    for line in text.split("\n"):
        if _RULE.match(line) or _FRONT_MATTER.match(line):
            lines.append("")
        elif heading := _HEADING.match(line):
            lines.extend(["", heading[1], ""])
        else:
            lines.append(_QUOTE_OR_ITEM.sub("", line))
    text = "\n".join(lines)
    if "](" in text:
        text = _LINK.sub(r"\1", _IMAGE.sub("", text))
    if "[" in text:
        text = _FOOTNOTE.sub("", text)
    if "*" in text:
        text = _STRONG.sub(r"\2", text)
    if "_" in text:
        text = _EMPHASIS.sub(r"\1", text)
    return _ESCAPED.sub(r"\1", text)


_DEEPEST = 20
"""Pairs within pairs that are removed; what an extractor leaves behind is seldom nested at all."""


def _without(pattern: re.Pattern[str], text: str) -> str:
    """Remove nested pairs from the inside out."""
    for _ in range(_DEEPEST):
        text, count = pattern.subn("", text)
        if not count:
            break
    return text
