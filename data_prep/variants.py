"""Wikitext in several variants of one language (Chinese, Serbian, ...): `-{zh-hans:...; zh-hant:...}-`.

A page is written in any of the variants and converted for its reader. The surprise: a hyphen before or after
a template gives the same two characters (`Franco-{{lang|...}}`), so only pairs are read as such marks.
"""

from __future__ import annotations

import re

_MARK = re.compile(r"-\{(?!\{)|\}\}|\}-")
"""`}}` goes first, as in MediaWiki: in `{{a}}-` is no mark, in `-{zh:{{a}}}-` the last two characters are."""

_LONGEST = 2000
"""Characters; a pair around more is no conversion, or one of a whole page that is shown as it is."""

_CODE = r"(?:zh|sr|sh|kk|ku|uz|tg|gan|crh|iu|shi|ban|wuu|tly|mni)(?:-[a-z]{2,8})*+"
_VARIANT = re.compile(rf"(?:\A|;)\s*+{_CODE}\s*+:")
_FLAG = rf"\s*+(?:[A-Z+-]|{_CODE})\s*+"
_FLAGS = re.compile(rf"((?:{_FLAG};)*+{_FLAG})\|")
_NOT_SHOWN = frozenset("HTND-")
"""Flags of rules that change other places than their own, and of what describes them."""


def chosen(text: str) -> str:
    """Show the first variant of each `-{...}-`; what stands alone of the marks stays as it is."""
    out: list[str] = []
    opened: list[tuple[int, int]] = []  # place in `out`, characters before it
    done = length = 0
    for mark in _MARK.finditer(text):
        closes = mark[0] == "}-"
        if mark[0] == "}}" or (closes and not opened):
            continue
        if before := text[done : mark.start()]:
            out.append(before)
            length += len(before)
        done = mark.end()
        if not closes:
            opened.append((len(out), length))
            out.append("-{")
            length += 2
            continue
        place, start = opened.pop()
        out[place] = ""
        if length - start > _LONGEST:
            continue
        shown = _shown("".join(out[place:]))
        del out[place:]
        if shown:
            out.append(shown)
        length = start + len(shown)
    out.append(text[done:])
    return "".join(out)


def _shown(rule: str) -> str:
    flags = _FLAGS.match(rule)
    if flags is not None:
        if not _NOT_SHOWN.isdisjoint(flag.strip() for flag in flags[1].split(";")):
            return ""
        rule = rule[flags.end() :]
    if _VARIANT.match(rule) is None:
        return rule
    return next(filter(None, map(str.strip, _VARIANT.split(rule))), "")
