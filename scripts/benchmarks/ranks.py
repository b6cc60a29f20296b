"""A program started once a rank, on this machine, and the time that it gets."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from earlybert.probe_process import end_with

_OF_A_LAUNCH = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class Slice:
    """The time of a comparison that goes on in slices: `over` after so many minutes, or as soon as SIGTERM or
    SIGINT asks for an end while it is entered. What runs then is asked to save; a second signal ends this
    program at once."""

    def __init__(self, minutes: float) -> None:
        from earlybert.run import STOPPED, Signals

        self._stopped = STOPPED
        self._end = time.monotonic() + 60 * minutes
        self._signals = Signals(once=True)

    def __enter__(self) -> Slice:
        self._signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._signals.__exit__(*error)

    @property
    def over(self) -> bool:
        return self._signals.asked or time.monotonic() >= self._end

    def ended(self, code: int) -> bool:
        """Whether a program's exit status says that it stopped since this is over: after a checkpoint, or by
        the signal itself, before it listened or as one of a group that got it."""
        return code == self._stopped or (self.over and code in (-signal.SIGTERM, -signal.SIGINT, 130))


def start(
    command: Sequence[str], *, ranks: int, log: IO[Any] | None = None, **environment: str
) -> list[subprocess.Popen]:
    """Start `command` on each rank of a new group, the cores shared out evenly; its output goes to `log`.

    One rank gets no rank at all: some programs take a RANK for a launch of several. What a terminal sends
    reaches this program alone, which asks them to stop; where it ends before them, killed or not, they get
    SIGTERM.
    """
    from earlybert.lifecycle import free_port

    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    alone = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCH}
    shared = {**alone, "OMP_NUM_THREADS": str(threads), **environment}
    if ranks > 1:
        shared |= {
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        }  # fmt: skip
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(
            subprocess.Popen(
                command, env={**shared, **own}, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=functools.partial(end_with, os.getpid(), signal.SIGTERM),
            )
        )  # fmt: skip
    return processes


def why(code: int, log: Path) -> str:
    """What a program that ended with `code` says in its log of what the user can mend, or where to look."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{said[-1]} ({log})" if code == 2 and said else f"see {log}: status {code}"
