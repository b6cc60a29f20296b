"""Imported by the server that loaders' workers are forked from, and by nothing else.

A rank must not fork its workers itself: torch's gloo threads take part in Python, and a fork at the wrong
moment leaves the child waiting for a lock for ever, and the rank for the child. So one server a rank, which
has no such threads, forks them (Python's forkserver); it imports the heavy packages once.
"""

import signal

import earlybert.loader  # noqa: F401 - so that a worker need not

# A launcher signals every process of a job; the rank stops at a step boundary and still needs its workers
# until then. The server ends when its rank does.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
