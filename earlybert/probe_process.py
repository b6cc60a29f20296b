"""What a probe's process does before it becomes the command that it is given; run as a file of its own.

    python earlybert/probe_process.py PARENT CORES COMMAND...

It takes the lowest priority and the last CORES of its cores (threads that wait for each other while the run
has the cores take twenty times as long as one), is the first to go where memory ends, and is killed when the
process PARENT dies, however that comes about. Not done between fork and exec in the run's own process, whose
threads may hold locks there.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def end_with(parent: int, number: int) -> None:
    """Get the signal `number` when the process `parent`, which has started this one, dies. On Linux alone."""
    if (prctl := getattr(ctypes.CDLL(None), "prctl", None)) is not None:
        prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it died before it could be named
            os._exit(1)


def main() -> None:
    parent, cores, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    end_with(parent, signal.SIGKILL)
    os.nice(19)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
