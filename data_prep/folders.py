"""The folder that a corpus is prepared in: nothing of anyone else's, one command at a time, one corpus."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from earlybert.config import EarlyBertError
from earlybert.shards import MANIFEST, TOKENIZER

_LOCK = ".preparing"


def differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    """Say in what the settings of the corpus that is there differ from those that are asked for."""
    keys = [key for key in asked if there.get(key) != asked[key]]
    plain = [
        f"{key} {there.get(key)} there, {asked[key]} asked"
        for key in keys
        if key not in ("sources", "tokenizer")
    ]
    return "; ".join(
        plain + [f"another {key.rstrip('s')}" for key in keys if key in ("sources", "tokenizer")]
    )


def refuse_foreign(folder: Path) -> None:
    """Raise EarlyBertError where `folder` holds anything that this program did not write."""
    if folder.exists() and not folder.is_dir():
        raise EarlyBertError(f"{folder} is a file; choose another --out")
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        ours = (
            path.name in (MANIFEST, TOKENIZER, _LOCK)
            or path.name.startswith(".work-")
            or path.match("shard-*.arrow")
        )
        if not ours:
            raise EarlyBertError(
                f"{folder} holds {path.name!r}, which is no part of a corpus; choose another --out"
            )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the lock goes with the process."""
    path = folder / _LOCK
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EarlyBertError(f"{folder} is being prepared by another process; wait for it") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
