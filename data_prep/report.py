"""What a person sees of a preparation: a bar while it works, and lines about what came of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from earlybert.shards import Manifest


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
