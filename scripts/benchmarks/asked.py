"""What a folder of results answers: the same command goes on there, another question is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from earlybert.config import EarlyBertError, read_json, write_atomically

_SHORT = 300
"""Characters of a value that fits into a message."""


def same(asked: dict[str, Any], folder: Path) -> None:
    """Raise EarlyBertError where a folder's results are of another question than `asked` (JSON types)."""
    path = folder / "asked.json"
    if not path.exists() and any(folder.glob("*/done")):
        raise EarlyBertError(f"{folder} does not say which question its results answer; choose another --out")
    if path.exists() and (before := read_json(path)) != asked:
        other = [name for name in sorted({*asked, *before}) if before.get(name) != asked.get(name)]
        told = ", ".join(_told(name, before.get(name)) for name in other)
        raise EarlyBertError(f"{folder} holds results with another {told}; choose another --out")
    write_atomically(path, json.dumps(asked) + "\n")


def _told(name: str, value: Any) -> str:
    return f"{name} ({value})" if len(str(value)) <= _SHORT else name
