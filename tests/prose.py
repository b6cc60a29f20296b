"""The prose of real Wikipedia pages, drafted by the parser and corrected by hand from reading the pages; kept
with next to none of their words.

Prose is wikitext with its marks left out and now and then a word put in; `prose/pages.json` holds, for each
page, how many characters of the wikitext to keep and to skip, and what to put in.

    python tests/prose.py write FOLDER    from files DUMP.ID.txt of hand-written prose
    python tests/prose.py read FOLDER     the other way, to read or to mend them
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep import streams, wikipedia

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikipedia"
RECIPES = Path(__file__).parent / "prose" / "pages.json"
Recipe = list[int | str]
"""A number keeps so many characters, a negative one skips them, a text is put in."""


def recipes() -> dict[str, dict[str, Recipe]]:
    """Of each dump's file name: page id -> recipe."""
    return json.loads(RECIPES.read_text())


def articles(dump: str, ids: set[str]) -> Iterator[wikipedia.Page]:
    """The pages of a shared dump with these ids."""
    path = SHARED / dump
    chunks = ((chunk, True) for chunk in streams.chunks(path, check=False))
    for page in wikipedia.pages(chunks, path=path):
        if page.id in ids:
            yield page


def follow(recipe: Recipe, wikitext: str) -> str:
    """The prose that a recipe makes of a page's wikitext."""
    out, at = [], 0
    for step in recipe:
        if isinstance(step, str):
            out.append(step)
        elif step < 0:
            at -= step
        else:
            out.append(wikitext[at : at + step])
            at += step
    return "".join(out)


def recipe_of(prose: str, wikitext: str) -> Recipe:
    """A recipe for this prose, found word by word."""
    ours, theirs = re.findall(r"\w+|\W", prose), re.findall(r"\w+|\W", wikitext)
    recipe: Recipe = []
    matcher = difflib.SequenceMatcher(None, theirs, ours, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        length = sum(map(len, theirs[a:b]))
        if kind == "equal":
            recipe.append(length)
        else:
            recipe += [-length] if length else []
            recipe += ["".join(ours[c:d])] if d > c else []
    return recipe


def share_right(expected: str, found: str) -> float:
    """Share of characters that are the same and in order, of the longer of the two texts."""
    matcher = difflib.SequenceMatcher(
        None, re.findall(r"\w+|\W", expected), re.findall(r"\w+|\W", found), False
    )
    same = sum(
        sum(map(len, matcher.a[block.a : block.a + block.size])) for block in matcher.get_matching_blocks()
    )
    return same / max(len(expected), len(found), 1)


def main(verb: str, folder: Path) -> None:
    if verb == "read":
        for dump, pages in recipes().items():
            for page in articles(dump, set(pages)):
                (folder / f"{dump}.{page.id}.txt").write_text(follow(pages[page.id], page.text) + "\n")
        return
    found: dict[str, dict[str, Recipe]] = {}
    for path in sorted(folder.glob("*.txt")):
        dump, _, id = path.name.removesuffix(".txt").rpartition(".")
        found.setdefault(dump, {})[id] = []
    for dump, pages in found.items():
        for page in articles(dump, set(pages)):
            prose = (folder / f"{dump}.{page.id}.txt").read_text().removesuffix("\n")
            pages[page.id] = recipe_of(prose, page.text)
            assert follow(pages[page.id], page.text) == prose
    RECIPES.parent.mkdir(exist_ok=True)
    RECIPES.write_text(
        json.dumps(found, ensure_ascii=False, separators=(",", ":")).replace("},", "},\n") + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
