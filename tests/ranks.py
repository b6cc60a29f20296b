"""Run functions and scripts in N real processes that form a gloo group: `run("module:worker", ranks=2, ...)`.

A fresh process for each rank and each call: DeepSpeed leaves process-wide marks. The processes are forked
from one server that has imported the heavy packages and done nothing else (Python's forkserver), which saves
each of them some seconds. Each rank's return value (pickled) comes back in the order of ranks; an exception
on any rank fails the test with its traceback; a hang ends at the timeout.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from earlybert.lifecycle import free_port

_LAUNCHED: list[Rank] = []
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "earlybert.trainer",
        "earlybert.pretrained",
        "data_prep.build",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    ]
)


class Rank:
    """A process of a launch, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, target: str, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
        _start_server()
        self._process = _CONTEXT.Process(target=_rank, args=(target, list(arguments), environment, str(log)))
        self._process.start()
        _LAUNCHED.append(self)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def kill_the_rest() -> None:
    """Kill what still runs of all that was launched: after a test that failed, nothing may wait for it."""
    for rank in _LAUNCHED:
        if rank.poll() is None:
            rank.kill()
            rank.wait(timeout=20)
    _LAUNCHED.clear()


def launch(
    target: str, arguments: Sequence[str], *, ranks: int, logs: Path, **environment: str
) -> list[Rank]:
    """Start `target` (a script, or `module:function` taking strings) on every rank of a new group.

    Rank r's output is appended to `logs`/log-r.txt.
    """
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(min(ranks, len(os.sched_getaffinity(0)))),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.path.dirname(__file__) + os.pathsep + os.environ.get("PYTHONPATH", ""),
        **environment,
    }
    started = []
    for rank in range(ranks):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(Rank(target, arguments, own, logs / f"log-{rank}.txt"))
    return started


def run(function: str, *, ranks: int, timeout_seconds: float = 240, **arguments: Any) -> list[Any]:
    """Call `module:function(**arguments)` on every rank and return what each returned."""
    with tempfile.TemporaryDirectory() as folder:
        box = Path(folder)
        (box / "arguments").write_bytes(pickle.dumps((function, arguments)))
        processes = launch("ranks:_call", [folder], ranks=ranks, logs=box)
        deadline = time.monotonic() + timeout_seconds
        try:
            while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
                if any(p.poll() not in (None, 0) for p in processes):
                    time.sleep(2)  # the others may be about to fail of it too
                    break
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        results = []
        for rank, process in enumerate(processes):
            result = box / f"result-{rank}"
            if process.returncode != 0 or not result.exists():
                log_text = (box / f"log-{rank}.txt").read_text(errors="replace")[-6000:]
                raise AssertionError(
                    f"rank {rank} of {function} ended with {process.returncode}:\n{log_text}"
                )
            results.append(pickle.loads(result.read_bytes()))
        return results


def _start_server() -> None:
    """Start the server with the surroundings of a rank: some are read when packages are imported."""
    own = {
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "OMP_NUM_THREADS": "1",
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _rank(target: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """One process: its own surroundings and log, then the script or function, then a real exit status."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    gc.freeze()  # what was imported lives on: the engine's own collections need not look at it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        module, colon, name = target.partition(":")
        if colon:
            getattr(importlib.import_module(module), name)(*arguments)
        else:
            sys.argv = [target, *arguments]
            sys.path.insert(0, os.path.dirname(target))
            runpy.run_path(target, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _call(folder: str) -> None:
    box = Path(folder)
    function, arguments = pickle.loads((box / "arguments").read_bytes())
    module, name = function.split(":")
    from earlybert import dist
    from earlybert.lifecycle import end_ranks, start_ranks

    start_ranks()
    result = getattr(importlib.import_module(module), name)(**arguments)
    (box / f"result-{os.environ['RANK']}").write_bytes(pickle.dumps(result))
    dist.barrier()  # a rank that is done early must not look dead to the others
    end_ranks()
