"""What a person sees of a preparation: a bar while it works, and lines about what came of it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from earlybert.config import write_atomically
from earlybert.shards import Manifest

EXAMPLES = 3
"""Ids of dropped documents that are kept for each reason."""


class Examples:
    """The first few documents that a task drops for each reason, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, list[str]] = {}

    def add(self, label: str, id: str) -> None:
        if len(held := self._held.setdefault(label, [])) < EXAMPLES:
            held.append(id)

    def write(self) -> None:
        write_atomically(self._path, json.dumps(self._held))


def report(manifest: Manifest) -> Iterator[str]:
    """Say in lines what went into a corpus, what was dropped and why, and what came out."""
    for row in manifest.statistics.get("sources", []):
        yield (
            f"{row['source']}: {row['files']:,} files ({megabytes(row['bytes'])}), "
            f"{row['documents_read']:,} documents"
        )
        for reason, count in row["dropped"].items():
            examples = ", ".join(map(repr, row.get("examples", {}).get(reason, [])))
            yield f"  dropped {count:,}: {reason}" + (f" (such as {examples})" if examples else "")
        yield (
            f"  kept {row['documents']:,} documents, {row['sentences']:,} sentences, {row['words']:,} words, "
            f"{row['tokens']:,} tokens ({row['unknown_tokens'] / max(1, row['tokens']):.3%} unknown)"
        )
    size = sum(shard.bytes for shard in manifest.shards)
    yield (
        f"in all {manifest.documents:,} documents, {manifest.sentences:,} sentences, {manifest.tokens:,} "
        f"tokens in {len(manifest.shards)} shards ({megabytes(size)}), vocabulary {manifest.vocab_size:,}"
    )


def histogram(lengths: np.ndarray, *, width: int = 40) -> Iterator[str]:
    """Say in lines how many documents have how many tokens; `lengths` int64 [documents]."""
    bins = np.log2(np.maximum(lengths, 1)).astype(np.int64)
    counts = np.bincount(bins)
    first = int(bins.min()) if len(bins) else 0
    most = max(1, int(counts.max(initial=0)))
    for power in range(first, len(counts)):
        bar = "#" * -(-width * int(counts[power]) // most)
        tokens = int(lengths[bins == power].sum())
        share = tokens / max(1, int(lengths.sum()))
        yield (f"  {1 << power:>11,} tokens and more: {int(counts[power]):>11,} {bar:<{width}} {share:6.1%}")


def fertility(manifest: Manifest) -> str:
    """How many WordPieces the vocabulary makes of a word, in all and of each source."""
    rows = manifest.statistics.get("sources", [])

    def of(chosen: list[dict[str, Any]]) -> str:
        words, tokens = (sum(row[key] for row in chosen) for key in ("words", "tokens"))
        return f"{tokens / max(1, words):.3f}"

    names = sorted({row["name"] for row in rows})
    each = ", ".join(f"{name} {of([row for row in rows if row['name'] == name])}" for name in names)
    unknown = sum(row["unknown_tokens"] for row in rows) / max(1, manifest.tokens)
    return f"WordPieces a word: {of(rows)} ({each}); unknown: {unknown:.4%} of the tokens"


@contextlib.contextmanager
def progress_bar(folder: Path, *, prefix: str, stage: str, total: int, unit: str) -> Iterator[None]:
    """Show how far all tasks are, from the small files that they leave in `folder`."""
    from tqdm import tqdm

    stop = threading.Event()
    with tqdm(total=total, desc=stage, unit=unit, unit_scale=True, mininterval=1.0) as bar:

        def look() -> None:
            done = 0
            for path in folder.glob(f"{prefix}-*"):
                with contextlib.suppress(OSError, ValueError):  # being rewritten: the next look will see it
                    done += int(path.read_text())
            bar.update(min(total, max(bar.n, done)) - bar.n)

        def watch() -> None:
            while not stop.wait(0.5):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            look()


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
