"""What runs the tasks of a pipeline: processes of this machine, a Ray cluster, or Slurm.

Tasks, completion markers, logs and statistics are datatrove's own, and so are the launchers for Ray and
Slurm. Those two need the work folder on a file system that all their machines share; an error of a task
comes back as a file in it.

The surprise: `LocalExecutor.run` replaces the pool of `LocalPipelineExecutor`, which waits for ever for a
worker that the kernel killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor

from earlybert.config import EarlyBertError, SettingsError, write_atomically

Kind = Literal["local", "ray", "slurm"]
_ROOT = Path(__file__).resolve().parent.parent
_POLL_SECONDS = 2.0


class TaskError(EarlyBertError):
    """A task that failed for a reason outside the sources; what was finished stays, the same command goes
    on."""


def totals(folder: Path, *, tasks: int) -> dict[str, int]:
    """Add up the counts that every task's steps have saved under an executor's folder."""
    result: dict[str, int] = {}
    for rank in range(tasks):
        for step in json.loads((folder / "stats" / f"{rank:05d}.json").read_text()):
            for label, value in step["stats"].items():
                total = value["total"] if isinstance(value, dict) else value
                result[label] = result.get(label, 0) + int(total)
    return result


class LocalExecutor(LocalPipelineExecutor):
    """LocalPipelineExecutor with processes that may die, and errors that stay one message."""

    def run(self) -> None:
        """Run the tasks that have no completion marker.

        Raises EarlyBertError as a task raised it, and TaskError for anything else, naming the task's log.
        """
        ranks = self.get_incomplete_ranks()
        if self.workers == 1 or len(ranks) <= 1:
            for rank in ranks:
                deepcopy(self).run_task(rank)
        else:
            self._run_in_processes(ranks)

    def run_task(self, rank: int) -> None:
        """Run one task; datatrove's log goes to the task's file only."""
        from loguru import logger

        try:
            with contextlib.redirect_stderr(_Nowhere()):
                self._run_for_rank(rank, 1)
        except EarlyBertError:
            raise
        except Exception as error:
            log = Path(self.logging_dir.path) / "logs" / f"task_{rank:05d}.log"
            raise TaskError(
                f"task {rank} failed: {type(error).__name__}: {error}; its log is {log}, and the same "
                "command goes on from the finished tasks"
            ) from error
        finally:
            logger.remove()

    def _run_in_processes(self, ranks: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        taken = context.Value("l", 0)
        failures = context.SimpleQueue()
        workers = [
            context.Process(target=_work, args=(self, ranks, taken, failures), daemon=True)
            for _ in range(min(self.workers, len(ranks)))
        ]
        try:
            for worker in workers:
                worker.start()
            alive: dict[Any, Any] = {worker.sentinel: worker for worker in workers}
            while alive:
                for sentinel in multiprocessing.connection.wait(list(alive)):
                    worker = alive.pop(sentinel)
                    worker.join()
                    if not failures.empty():
                        kind, message = failures.get()
                        raise kind(message)
                    if worker.exitcode:
                        raise TaskError(
                            f"a worker process ended with code {worker.exitcode} (-9 is often: out of "
                            "memory); use fewer --workers; the same command goes on from the finished tasks"
                        )
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
                    worker.join()


def _work(executor: LocalExecutor, ranks: list[int], taken: Any, failures: Any) -> None:
    """Take tasks until none is left (the body of a worker process)."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    while True:
        with taken.get_lock():
            place = taken.value
            taken.value += 1
        if place >= len(ranks):
            return
        try:
            deepcopy(executor).run_task(ranks[place])  # a step's statistics belong to one task
        except EarlyBertError as error:
            failures.put((type(error), str(error)))
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def _end_with_parent() -> None:
    """Leave no worker behind a killed command: it would write into the work folder of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Nowhere(io.TextIOBase):
    """A stderr that forgets."""

    def write(self, text: str) -> int:
        return len(text)


class _Reporting:
    """Leaves word of what went wrong for the process that started the tasks."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)  # type: ignore[misc]
        except Exception as error:
            ours = isinstance(error, EarlyBertError)
            told = str(error) if ours else f"{type(error).__name__}: {error}"
            folder = Path(self.logging_dir.path) / _ERRORS  # type: ignore[attr-defined]
            folder.mkdir(exist_ok=True)
            write_atomically(folder / f"{rank:05d}.json", json.dumps({"ours": ours, "told": told}))
            raise


_ERRORS = "errors"


class _RayExecutor(_Reporting, RayPipelineExecutor):
    pass


class _SlurmExecutor(_Reporting, SlurmPipelineExecutor):
    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Without a partition where none is named: the cluster has a default one."""
        arguments = super().get_sbatch_args(max_array)
        return {key: value for key, value in arguments.items() if key != "partition" or value}

    def launch_merge_stats(self) -> None:
        """Nothing: `totals` reads the tasks' own statistics."""


@dataclass(frozen=True)
class Where:
    """What the tasks run on; none of it shapes the result."""

    kind: Kind = "local"
    workers: int | None = None
    """Tasks at a time; as many as there are cores and tasks where not given (all, on a cluster)."""
    memory: float = 2.0
    """GB that a task asks of a cluster."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Options of `sbatch`, such as partition and time."""

    def __post_init__(self) -> None:
        if self.kind not in ("local", "ray", "slurm"):
            raise SettingsError(f"--executor {self.kind}: choose local, ray or slurm")
        if self.workers is not None and self.workers < 1:
            raise SettingsError(f"--workers {self.workers}: at least 1")
        if not 0 < self.memory < math.inf:
            raise SettingsError(f"--memory {self.memory}: give a number of GB above 0")
        if self.sbatch and self.kind != "slurm":
            raise SettingsError("--sbatch is for --executor slurm; leave it out")
        if self.kind == "slurm" and shutil.which("sbatch") is None:
            raise SettingsError("--executor slurm: no program sbatch here; start it on a host of the cluster")

    def run(self, pipeline: list[Any], *, tasks: int, folder: Path, small: bool = False) -> dict[str, int]:
        """Run the tasks that are not done, and return the counts of all; `small` ones in this process.

        Raises EarlyBertError as a task raised it, and TaskError for anything else, naming the task's log.
        """
        if self.kind == "local" or small:
            workers = 1 if small else self.workers or min(tasks, len(os.sched_getaffinity(0)))
            LocalExecutor(pipeline=pipeline, tasks=tasks, workers=workers, logging_dir=str(folder)).run()
        else:
            self._run_on_cluster(pipeline, tasks, folder.absolute())
        return totals(folder, tasks=tasks)

    def _run_on_cluster(self, pipeline: list[Any], tasks: int, folder: Path) -> None:
        shutil.rmtree(folder / _ERRORS, ignore_errors=True)
        common: dict[str, Any] = {
            "pipeline": pipeline,
            "tasks": tasks,
            "workers": self.workers or -1,
            "mem_per_cpu_gb": self.memory,
            "logging_dir": str(folder),
        }
        with _silent():
            if self.kind == "ray":
                _start_ray()
                _RayExecutor(**common).run()
            else:
                self._run_on_slurm(common, folder)
        executor = LocalExecutor(pipeline=pipeline, tasks=tasks, logging_dir=str(folder))
        if missing := executor.get_incomplete_ranks():
            _raise_error(folder, missing)

    def _run_on_slurm(self, common: dict[str, Any], folder: Path) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), "$PATH"])
        memory = common.pop("mem_per_cpu_gb")
        executor = _SlurmExecutor(
            **common,
            time=self.sbatch.get("time", "24:00:00"),
            partition=self.sbatch.get("partition", ""),
            qos=self.sbatch.get("qos", ""),
            job_name=f"earlybert-{folder.name}",
            env_command=f'export PATH="{path}" PYTHONPATH="{_ROOT}"',
            sbatch_args={"mem-per-cpu": f"{round(memory * 1024)}M"} | self.sbatch,
            with_srun=False,
        )
        try:
            executor.run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise EarlyBertError(
                f"--executor slurm: sbatch refused the job ({error}); its script is "
                f"{folder / 'launch_script.slurm'}, and --sbatch KEY=VALUE changes its options"
            ) from error
        if executor.job_id in (None, -1):
            return
        try:
            while executor.get_incomplete_ranks() and _is_queued(str(executor.job_id)):
                time.sleep(_POLL_SECONDS)
        except BaseException:
            subprocess.run(["scancel", str(executor.job_id)], check=False)
            raise


def _start_ray() -> None:
    try:
        import ray
    except ImportError as error:
        raise SettingsError("--executor ray: ray is not installed; pip install 'earlybert[ray]'") from error
    if not ray.is_initialized():
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(_ROOT)}},
        )


def _is_queued(job: str) -> bool:
    """Whether any task of a Slurm job waits or runs."""
    done = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
    return bool(done.stdout.strip())


def _raise_error(folder: Path, missing: list[int]) -> None:
    for path in sorted((folder / _ERRORS).glob("*.json")):
        error = json.loads(path.read_text())
        if error["ours"]:
            raise EarlyBertError(error["told"])
        raise TaskError(
            f"task {int(path.stem)} failed: {error['told']}; its log is "
            f"{folder / 'logs' / f'task_{path.stem}.log'}, and the same command goes on from the finished "
            "tasks"
        )
    raise TaskError(
        f"{len(missing)} tasks did not finish, the first is task {missing[0]}; the logs are in {folder}, and "
        "the same command goes on from the finished tasks"
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep datatrove's log off the terminal; the tasks' own logs are files."""
    from loguru import logger

    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")
