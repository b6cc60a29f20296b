"""Small texts, and corpora built of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from data_prep.build import BuildSettings
from data_prep.executors import Where

NOUNS = [
    "river",
    "mountain",
    "village",
    "captain",
    "letter",
    "garden",
    "winter",
    "market",
    "engine",
    "forest",
]
VERBS = ["crosses", "remembers", "follows", "measures", "carries", "describes", "builds", "watches", "leaves"]


def prose(seed: int, *, sentences: int = 12) -> str:
    """Sentences as pseudo-random as a hash; no two documents alike."""
    made = []
    for i in range(sentences):
        d = hashlib.sha256(f"{seed} {i}".encode()).digest()
        made.append(
            f"The {NOUNS[d[0] % 10]} {VERBS[d[1] % 9]} Mr. {NOUNS[d[2] % 10].title()} in {d[3]}{d[4]}."
        )
    return " ".join(made)


def write_texts(folder: Path) -> Path:
    """Twelve documents and two that are none, a file each."""
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(prose(i))
    (folder / "98.txt").write_text("Too short.")
    (folder / "99.txt").write_text("*** --- ***\n")
    return folder


def settings(texts: Path, **changes: Any) -> BuildSettings:
    values: dict[str, Any] = {"sources": (f"text:{texts}/*.txt",), "vocab_size": 192, "tasks": 3}
    where = Where(workers=changes.pop("workers", 1))
    return BuildSettings(**(values | {"where": where} | changes))


def quiet(line: str) -> None:
    """Tell nobody."""


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
