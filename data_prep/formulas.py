"""Formulas in running text: LaTeX by its symbols, in one line, by pylatexenc."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

_LONGEST_FORMULA = 1000
"""Characters; one longer is set apart from the text and read by nobody as prose."""

_SPACING = re.compile(r"\s+")


@functools.lru_cache(maxsize=1 << 12)
def formula(latex: str) -> str:
    """Write a LaTeX formula by its symbols in one line; empty for one that cannot be read or is very long."""
    if len(latex) > _LONGEST_FORMULA:
        return ""
    try:
        text = _latex().latex_to_text(_FRACTION.sub(r"\\frac", latex))
    except (Exception, RecursionError):  # its parser raises many kinds
        return ""
    return _SPACING.sub(" ", _RELATION.sub(r" \1 ", text)).strip()


_RELATION = re.compile(" ?([=<>≤≥≠≈≡∼→←↔⇒⇐⇔∈∉⊂⊆]) ?")
_FRACTION = re.compile(r"\\[tdc]frac\b")
_OF_ONE = re.compile(r"[\w.]*")


@functools.lru_cache(maxsize=1)
def _latex() -> Any:
    from pylatexenc import latex2text

    logging.getLogger("pylatexenc").setLevel(logging.CRITICAL)  # bad formulas are no news
    known = latex2text.get_default_latex_context_db()
    macros = [latex2text.MacroTextSpec(name, simplify_repl=shown) for name, shown in _MORE_MACROS.items()]
    known.add_context_category("missing there", prepend=True, macros=macros)
    return latex2text.LatexNodes2Text(math_mode="text", keep_comments=True, latex_context=known)


def _over(node: Any, l2tobj: Any) -> str:
    """Write a fraction, with brackets around what is more than a word."""
    parts = [l2tobj.nodelist_to_text([n]).strip() for n in node.nodeargd.argnlist if n is not None]
    return "/".join(part if _OF_ONE.fullmatch(part) else f"({part})" for part in parts)


_MORE_MACROS: dict[str, Any] = {
    "frac": _over, "neg": "¬", "lvert": "|", "rvert": "|", "lVert": "‖", "rVert": "‖", "implies": "⇒", 
    "iff": "⇔", "land": "∧", "lor": "∨", "dotsc": "…", "dotsb": "…", "dots": "…",
}  # fmt: skip
