"""What the search costs a step and what the ticket saves: the same command without a ticket, while it
searches, and after a draw at its third step, in turn; beside the FLOPs that the shapes promise."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import train

_KINDS = {
    "dense": "enabled = false",
    "search": "minimum_step = {last}\nlatest_step = {last}",
    "shrunken": "every = 1\nminimum_step = 3\nlatest_step = 3",
}
"""Settings of the ticket; a search that draws in the last step, which is not timed."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    try:
        job = train.prepare(arguments, folder)
        last = train.last_step(job)
        seconds: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        ticket: dict[str, Any] = {}
        for _ in range(arguments.rounds):
            for kind, settings in _KINDS.items():
                job["ticket"] = settings.format(last=last)
                rate = train.run_program("ours", job)["tokens_per_second"]
                seconds[kind].append(job["batch"] * job["length"] / rate)
                print(f"{kind}: {seconds[kind][-1]:.4f} s a step", file=sys.stderr, flush=True)
                if kind == "shrunken":
                    ticket = json.loads((folder / "runs" / "bench" / "ticket.json").read_text())
        widths = [list(map(len, ticket[part])) for part in ("heads", "neurons")]
        dense, small = (train.flops_per_token(job["shape"], job["length"], widths=w) for w in (None, widths))
        medians = {kind: statistics.median(found) for kind, found in seconds.items()}
        return {
            **job, **train.about(), "folder": None, "ticket": None, "seconds": medians, "all": seconds,
            "flops_ratio": small / dense, "search_ratio": medians["search"] / medians["dense"],
            "ticket_ratio": medians["shrunken"] / medians["dense"],
        }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell(figures: dict[str, Any]) -> None:
    print(
        f"{figures['shape']}, {figures['length']} tokens, global batch {figures['batch']}, bf16, "
        f"{figures['ranks']} ranks; {figures['machine']}\n"
    )
    print("| step | seconds (least to most) | of dense | promised by FLOPs |")
    print("|---|---|---|---|")
    ratios = {"dense": (1.0, 1.0), "search": (figures["search_ratio"], 1.0)}
    ratios["shrunken"] = (figures["ticket_ratio"], figures["flops_ratio"])
    for kind, (ratio, promised) in ratios.items():
        found = figures["all"][kind]
        print(
            f"| {kind} | {figures['seconds'][kind]:.4f} ({min(found):.4f} to {max(found):.4f}) | {ratio:.3f} "
            f"| {promised:.3f} |"
        )
    reached = figures["flops_ratio"] / figures["ticket_ratio"]
    print(
        f"\nthe search costs {figures['search_ratio'] - 1:.1%} of a step; the ticket's step reaches "
        f"{reached:.1%} of the speed-up that its FLOPs promise"
    )
