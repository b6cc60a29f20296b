"""Run a module-level function in N real processes that form a gloo group: `run("test_engine:worker", ranks=2,
...)`.

A fresh process for each rank and each call: DeepSpeed leaves process-wide marks. Each rank's return value
(pickled) comes back in the order of ranks; an exception on any rank fails the test with its traceback; a hang
ends at the timeout.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from earlybert.lifecycle import free_port


def run(function: str, *, ranks: int, timeout_seconds: float = 240, **arguments: Any) -> list[Any]:
    """Call `module:function(**arguments)` on every rank and return what each returned."""
    with tempfile.TemporaryDirectory() as folder:
        box = Path(folder)
        (box / "arguments").write_bytes(pickle.dumps((function, arguments)))
        environment = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(min(ranks, len(os.sched_getaffinity(0)))),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
            "OMP_NUM_THREADS": "1",
            "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
            "PYTHONPATH": os.path.dirname(__file__) + os.pathsep + os.environ.get("PYTHONPATH", ""),
        }
        processes = []
        for rank in range(ranks):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(box / f"log-{rank}", "wb") as log:
                command = [sys.executable, __file__, folder]
                processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + timeout_seconds
        try:
            while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
                if any(p.poll() not in (None, 0) for p in processes):
                    time.sleep(2)  # the others may be about to fail of it too
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        results = []
        for rank, process in enumerate(processes):
            result = box / f"result-{rank}"
            if process.returncode != 0 or not result.exists():
                log_text = (box / f"log-{rank}").read_text(errors="replace")[-6000:]
                raise AssertionError(
                    f"rank {rank} of {function} ended with {process.returncode}:\n{log_text}"
                )
            results.append(pickle.loads(result.read_bytes()))
        return results


def _main() -> None:
    box = Path(sys.argv[1])
    function, arguments = pickle.loads((box / "arguments").read_bytes())
    module, name = function.split(":")
    from earlybert.lifecycle import end_ranks, start_ranks

    start_ranks()
    result = getattr(importlib.import_module(module), name)(**arguments)
    (box / f"result-{os.environ['RANK']}").write_bytes(pickle.dumps(result))
    from earlybert import dist

    dist.barrier()  # a rank that is done early must not look dead to the others
    end_ranks()


if __name__ == "__main__":
    try:
        _main()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
