"""A run that was broken, held against the unbroken one."""

from __future__ import annotations

import json
from pathlib import Path

TIMES = ("tokens_per_second", "step_seconds", "loader_seconds", "draw_seconds", "compile_seconds")


def differences(whole: Path, broken: Path) -> list[str]:
    """What of a run differs from the unbroken one: metrics without times, the last checkpoint, the ticket."""
    from earlybert import checkpoint

    found = []
    lines = [_metrics(run) for run in (whole, broken)]
    if lines[0] != lines[1]:
        pairs = zip(*lines, strict=False)
        first = next((a["step"] for a, b in pairs if a != b), min(len(lines[0]), len(lines[1])))
        found.append(
            f"metrics.jsonl differs from step {first} on ({len(lines[0])} and {len(lines[1])} lines)"
        )
    if [_read(run / "ticket.json") for run in (whole, broken)].count(_read(whole / "ticket.json")) != 2:
        found.append("ticket.json differs")
    names = [_last(run) for run in (whole, broken)]
    if None in names or names[0].name != names[1].name:  # type: ignore[union-attr]
        return [*found, f"the last checkpoints are {names}"]
    ours, theirs = (checkpoint.read_manifest(path) for path in names if path is not None)
    if ours.files != theirs.files:
        found.append("the files of the last checkpoint differ")
    for key in ("state", "progress", "logits"):
        if getattr(ours, key) != getattr(theirs, key):
            found.append(f"{key} in the last manifest differs")
    half = [path.name for path in (broken / "checkpoints").glob(".partial-*")]
    if half:
        found.append(f"left behind: {half}")
    for path in (broken / "checkpoints").glob("step-*"):
        if wrong := checkpoint.flaws(path, checkpoint.read_manifest(path)):
            found.append(f"{path.name}, a good name: {wrong}")
    return found


def _metrics(run: Path) -> list[dict[str, object]]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def _last(run: Path) -> Path | None:
    return max((run / "checkpoints").glob("step-*"), default=None)


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
