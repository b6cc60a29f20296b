"""Who is behind: each rank says how far it is, and when nothing moves any more, the others say whose fault it
is.

A rank that is killed closes its connections, and the others' collectives fail at once with a message about a
socket. A rank that hangs, or whose host loses its power, fails nothing for ten minutes (the collectives' time
limit), and no message says which it was. So each rank counts its marks ("step 57: data") and a thread of it
puts the count into a small store on rank 0's host every few seconds; ranks are in lockstep, so the one with
the smallest count is what the others wait for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from torch.distributed import TCPStore

from earlybert import dist
from earlybert.config import EarlyBertError

LOST = 75
"""Exit status where another rank died or hung: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
_PUBLISHED_EVERY = 1.0
_ANSWERS_WITHIN = 5.0
_WAITS, _SILENT = 60.0, 30.0
"""After waiting so long a rank asks who has been silent for so long: a dead host need not cost `seconds`."""
_ALARM = "the run stood still"
"""Why a rank left that was not at fault: the others' silence."""
_DONE = "it stopped"
"""Why a rank left that came to its end."""


class RankLost(EarlyBertError):
    """Another rank of the run is gone or does not move."""

    exit_code = LOST


@dataclass(frozen=True)
class Report:
    """What a rank last said of itself."""

    rank: int
    host: str
    marks: int
    """Marks it has made since the start."""
    mark: str
    age: float
    """Seconds since the last one, when it was published."""
    published: int
    """How often it has been."""
    left: str
    """Why it ended, where it could say so; empty while it runs."""


class Watch:
    """A rank's marks, their publication, and the alarm; nothing where there is one rank. Collective.

    `seconds` without a mark on any rank, or with a rank that does not answer, end the process with status
    `LOST`; where this rank is behind itself, its threads' stacks go to `folder`/hang-rank-N.txt.
    """

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.seconds, self._folder = seconds, folder
        self._marks, self._mark, self._since = 0, "the start", time.monotonic()
        self._published, self._left = 0, ""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._store: TCPStore | None = None
        if dist.world_size() > 1:
            self._store = _shared_store()
            self._publish()
            dist.barrier()  # every rank's report is there before anyone reads
            self._thread = threading.Thread(target=self._guard, name="watch", daemon=True)
            self._thread.start()

    def mark(self, what: str) -> None:
        """This rank is about to do `what`; all ranks mark the same things in the same order."""
        self._marks, self._mark, self._since = self._marks + 1, what, time.monotonic()

    def leave(self, why: str) -> None:
        """Say that this rank ends, and stop watching. Idempotent."""
        if self._store is None or self._ended.is_set():
            return
        self._left = why
        with contextlib.suppress(RuntimeError):  # the store may be gone with rank 0
            self._publish()
        self._ended.set()
        self._thread.join()

    def lost(self) -> str | None:
        """After a collective failed: which ranks are gone, in words; None where all answer. Takes seconds."""
        if self._store is None:
            return None
        try:
            before = self._reports()
            time.sleep(_ANSWERS_WITHIN)
            gone = [now for then, now in zip(before, self._reports(), strict=True) if _silent(then, now)]
        except RuntimeError:
            return "rank 0, which holds the ranks' store, is gone"
        return "; ".join(f"{_name(report)} is gone{_last(report)}" for report in gone) or None

    # --- the thread ---

    def _guard(self) -> None:
        while not self._ended.wait(_PUBLISHED_EVERY):
            try:
                self._publish()
                waited = time.monotonic() - self._since
                if waited > self.seconds:
                    self._alarm(_ANSWERS_WITHIN)
                elif waited > _WAITS:
                    self._alarm(_SILENT)
            except RuntimeError:
                if time.monotonic() - self._since > self.seconds:
                    self._end(
                        f"rank 0, which holds the ranks' store, does not answer; {self._hint()}", own=False
                    )

    def _alarm(self, seconds: float) -> None:
        """End the process where a rank is silent for `seconds` or the run stands still; slow is allowed."""
        marks, before, until = self._marks, self._reports(), time.monotonic() + seconds
        while time.monotonic() < until:  # this rank answers meanwhile
            if self._ended.wait(_PUBLISHED_EVERY):
                return
            self._publish()
        # A rank that came to its end is not behind: rank 0 may have a report to write yet.
        pairs = zip(before, self._reports(), strict=True)
        silent, now = [], []
        for then, report in pairs:
            if report.left == _DONE:
                continue
            now.append(report)
            if _silent(then, report):
                silent.append(report)
        if self._marks != marks:
            return
        if not silent and any(report.age < self.seconds for report in now):
            return
        least = min(report.marks for report in now)
        behind = silent or [report for report in now if report.marks == least]
        own = any(report.rank == dist.rank() for report in behind)
        told = [
            f"{_name(r)} does not answer{_last(r)}"
            if r in silent
            else f"{_name(r)} has been at {r.mark!r} for {r.age:.0f} s"
            for r in behind
        ]
        first = min({report.rank for report in now} - {report.rank for report in behind}, default=0)
        text = f"the run stands still: {'; '.join(told)}; {self._hint()}"
        heard = {r.rank for r in now} - {r.rank for r in silent} - {dist.rank()}
        self._end(text if own or dist.rank() == first else None, own=own, heard=heard)

    def _hint(self) -> str:
        return (
            f"nothing has moved for {time.monotonic() - self._since:.0f} s, so this start ends; end what is "
            "left of it, then start the same command again: it goes on from the newest checkpoint"
        )

    def _end(self, text: str | None, *, own: bool, heard: Collection[int] = ()) -> NoReturn:
        """`heard`: the ranks that are about to end in the same way."""
        if text is not None:
            print(f"error: {text}", file=sys.stderr, flush=True)
        if own:
            with (
                contextlib.suppress(OSError),
                open(self._folder / f"hang-rank-{dist.rank()}.txt", "w") as file,
            ):
                faulthandler.dump_traceback(file, all_threads=True)
        self._left = _ALARM
        with contextlib.suppress(RuntimeError):
            self._publish()
            # Rank 0's store goes with it: the others may be about to ask it.
            until = time.monotonic() + 2 * _ANSWERS_WITHIN
            while dist.rank() == 0 and time.monotonic() < until:
                if all(report.left for report in self._reports() if report.rank in heard):
                    break
                time.sleep(0.2)
        os._exit(LOST)  # the main thread is inside something that does not return

    # --- the store ---

    def _publish(self) -> None:
        assert self._store is not None
        with self._lock:
            self._published += 1
            report = Report(
                dist.rank(), socket.gethostname(), self._marks, self._mark, time.monotonic() - self._since,
                self._published, self._left,
            )  # fmt: skip
            self._store.set(f"rank {dist.rank()}", json.dumps(vars(report)))

    def _reports(self) -> list[Report]:
        assert self._store is not None
        with self._lock:
            return [
                Report(**json.loads(self._store.get(f"rank {rank}"))) for rank in range(dist.world_size())
            ]


@contextlib.contextmanager
def explained(watch: Watch) -> Iterator[None]:
    """Around a run: say why this rank ends, and turn what it raises into what the user can mend.

    Raises RankLost where another rank is gone, EarlyBertError for a file that cannot be read or written.
    """
    why = ""
    try:
        yield
        why = _DONE
    except RuntimeError as error:
        # What a collective says when another rank is gone is a matter of sockets: say which rank.
        if (lost := watch.lost()) is None:
            why = str(error)
            raise
        raise RankLost(f"{lost}; the same command goes on from the newest checkpoint") from error
    except EarlyBertError as error:
        why = str(error)
        raise
    except OSError as error:  # a run folder that cannot be written, a file that is gone
        why = str(error)
        if isinstance(error, BrokenPipeError):
            raise
        raise EarlyBertError(
            f"{error}; mend that, then start the same command again: it goes on from the newest checkpoint"
        ) from error
    except BaseException as error:  # a bug, or an interrupt
        why = f"{type(error).__name__}: {error}"
        raise
    finally:
        watch.leave(why)


def _shared_store() -> TCPStore:
    """A store on rank 0's host. Not the process group's own: its client is not for two threads."""
    host, ranks, limit = os.environ["MASTER_ADDR"], dist.world_size(), timedelta(seconds=60)
    if dist.rank() == 0:
        store = TCPStore(host, 0, ranks, is_master=True, timeout=limit, wait_for_workers=False)
        dist.from_rank_0(store.port)
    else:
        port = dist.from_rank_0(0)
        store = TCPStore(host, port, ranks, is_master=False, timeout=limit, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=_ANSWERS_WITHIN))
    return store


def _silent(before: Report, now: Report) -> bool:
    return now.left != _ALARM and (bool(now.left) or now.published == before.published)


def _name(report: Report) -> str:
    return f"rank {report.rank} on {report.host}"


def _last(report: Report) -> str:
    return f" (it ended: {report.left})" if report.left else f" (last seen at {report.mark!r})"
