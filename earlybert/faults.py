"""Failpoints: named places where a test, or `scripts/torture.py`, makes a run die, hang or fail to write.

Armed by the environment variable EARLYBERT_FAULTS alone, such as `kill@save.shard#2:1, full@save.shard`:
ACTION@POINT, then #N for the N-th time that the process comes by (1 unless given) and :R for rank R alone.
Actions: `kill` (SIGKILL to itself), `hang` (sleep for ever), `full` (no space left on the device), `fail` (an
error that nobody foresaw) and `spoil` (the caller breaks its own numbers). Unarmed, a point costs a look-up.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass

from earlybert import dist
from earlybert.config import SettingsError

VARIABLE = "EARLYBERT_FAULTS"
POINTS = (
    "step.data", "step.loss", "step.update", "draw.read", "draw.tear_down", "draw.build", "draw.initialize",
    "save.snapshot", "save.shard", "save.manifest", "save.rename", "save.latest", "save.retention",
)  # fmt: skip
"""Every point there is, in the order in which a run first comes by."""
ACTIONS = ("kill", "hang", "full", "fail", "spoil")
_FAULT = re.compile(r"(\w+)@([\w.]+)(?:#(\d+))?(?::(\d+))?")
_passed: Counter[str] = Counter()


@dataclass(frozen=True)
class Fault:
    action: str
    point: str
    occurrence: int
    rank: int | None


def point(name: str) -> bool:
    """Do here what is armed for this place, time and rank; True where the caller shall spoil its numbers."""
    text = os.environ.get(VARIABLE)
    if not text:
        return False
    assert name in POINTS, name
    _passed[name] += 1
    spoil = False
    for fault in parse(text):
        if fault.point == name and fault.occurrence == _passed[name] and fault.rank in (None, dist.rank()):
            spoil |= _act(fault)
    return spoil


@functools.lru_cache
def parse(text: str) -> tuple[Fault, ...]:
    """Read EARLYBERT_FAULTS; raises SettingsError for what it cannot mean."""
    faults = []
    for word in text.replace(",", " ").split():
        found = _FAULT.fullmatch(word)
        if found is None or found[1] not in ACTIONS or found[2] not in POINTS:
            raise SettingsError(
                f"{VARIABLE}: {word!r} is not ACTION@POINT[#TIME][:RANK]; actions: {', '.join(ACTIONS)}; "
                f"points: {', '.join(POINTS)}"
            )
        faults.append(
            Fault(found[1], found[2], int(found[3] or 1), None if found[4] is None else int(found[4]))
        )
    return tuple(faults)


def _act(fault: Fault) -> bool:
    where = f"armed at {fault.point} by {VARIABLE}"
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "hang":
        while True:
            time.sleep(3600)
    elif fault.action == "full":
        raise OSError(errno.ENOSPC, f"No space left on device ({where})")
    elif fault.action == "fail":
        raise RuntimeError(f"a fault {where}")
    return fault.action == "spoil"
