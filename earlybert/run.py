"""The run folder: what stands in it before the first step, and the refusal of a folder that holds something
else or is in use.

`experiment.toml`, `deepspeed.json` and `environment.json` say what ran. A start is refused where the folder
belongs to another experiment or another corpus; settings that only watch a run (logging, evaluation,
checkpoints) may change. Rank 0 holds a lock on the folder for as long as its process lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from earlybert import dist, mechanics
from earlybert.config import EarlyBertError, SettingsError, as_dict, to_toml, write_atomically

log = logging.getLogger(__name__)

STOPPED = 143
"""Exit status of a run that SIGTERM or SIGINT ended after a checkpoint: the same command goes on."""
_LOCK = ".lock"
_STOP = "stop"
_LOOKS = 80
"""At a folder that another machine has made, half a second apart: NFS may keep what it knew for 30 s."""
_PLACES = frozenset(
    {"runs", "deepspeed", "data", "data.corpus", "model", "evaluate.tasks_data", "evaluate.tasks_experiment"}
)
"""Settings that are paths, which may differ from machine to machine."""


class Claim:
    """A run folder that this run alone writes, until `release` or the end of rank 0's process."""

    def __init__(self, folder: Path, lock: IO[str] | None) -> None:
        self.folder = folder
        self._lock = lock

    def stop_asked(self) -> bool:
        """True where the file `stop` lies in the folder; asked on rank 0, it goes away. Others: False."""
        if self._lock is None:
            return False
        with contextlib.suppress(FileNotFoundError):
            (self.folder / _STOP).unlink()
            return True
        return False

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()


class Described(Protocol):
    """An experiment, of pretraining or of fine-tuning."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def fingerprint(self) -> str: ...


class Signals:
    """While it is entered, SIGTERM and SIGINT ask for a checkpoint and a stop: `asked` becomes true.

    `once`: the first one alone, a second one does what it did before.
    """

    def __init__(self, *, once: bool = False) -> None:
        self.asked = False
        self._once = once
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        def ask(_number: int, _frame: Any) -> None:
            self.asked = True
            if self._once:
                self.__exit__()

        self._before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def check_alike(settings: Any, mechanics_values: Mapping[str, Any]) -> None:
    """Raise EarlyBertError, on every rank, where ranks were started with different settings: each reads its
    own files and words. Paths may differ. Collective."""
    told = dict(mechanics.leaves({**as_dict(settings), "deepspeed.json": dict(mechanics_values)}))
    check_same({path: value for path, value in told.items() if path not in _PLACES})


def check_same(told: Mapping[str, Any]) -> None:
    """Raise EarlyBertError, on every rank, where a rank has another value than rank 0. Collective."""
    everyone = dist.gather_objects((socket.gethostname(), dict(told)))
    _, first = everyone[0]
    for rank, (host, own) in enumerate(everyone):
        for name in (*first, *own):
            if own.get(name) != first.get(name):
                raise EarlyBertError(
                    f"rank {rank} on {host} has {name} = {own.get(name)!r}, rank 0 has {first.get(name)!r}; "
                    "start all ranks with the same experiment, words, DeepSpeed JSON and data"
                )


def claim(
    experiment: Described, *, corpus: str, where: str, origin: tuple[str, str] = ("corpus", "this one")
) -> Claim:
    """Make or re-enter the run folder and lock it on rank 0. Collective.

    `corpus`: hash of what is trained on, or of the model that is tuned, which `origin` names for messages
    (its kind and its place); `where`: the experiment file's name. Raises EarlyBertError on every rank where
    the folder holds another experiment, another corpus or something that is not a run, where another process
    writes it, or where a rank does not see it. Nothing in it is changed: `describe` does that.
    """
    lock: IO[str] | None = None
    problem: str | None = None
    holder = _holder()
    if dist.rank() == 0:
        try:
            problem = _problem(experiment, corpus=corpus, where=where, origin=origin)
            if problem is None:
                lock, problem = _lock(experiment.folder, holder)
        except OSError as error:  # the others wait to hear of it
            problem = f"the run folder cannot be used ({error}); set runs= to a folder that can be written"
    problem, holder = dist.from_rank_0((problem, holder))
    if problem is None:
        blind = None if dist.rank() == 0 else _blind(experiment.folder, holder)
        problem = next((told for told in dist.gather_objects(blind) if told is not None), None)
    if problem is not None:
        if lock is not None:
            lock.close()
            _leave(experiment.folder)
        raise EarlyBertError(problem)
    return Claim(experiment.folder, lock)


def describe(
    experiment: Described, mechanics: dict[str, Any], *, corpus: str, tokenizer: str | None = None
) -> None:
    """Write what runs into the run folder; on rank 0, when nothing can be refused any more.

    `corpus`, `tokenizer`: checksums of what is trained on.
    """
    folder = experiment.folder
    environment = {
        "experiment": experiment.fingerprint,
        "corpus": corpus,
        "tokenizer": tokenizer,
        "command": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "world_size": dist.world_size(),
        "device": device(),
    }
    # First: a folder without it is not taken for a run.
    write_atomically(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    write_atomically(folder / "experiment.toml", to_toml(as_dict(experiment)))
    write_atomically(folder / "deepspeed.json", json.dumps(mechanics, indent=2) + "\n")


def device() -> str:
    """What this process computes on, in words."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def check_cores(*, precision: str) -> None:
    """Raise SettingsError where CPU processes outnumber their cores; give each its share of threads, and say
    where the cores have no instructions for the precision. Collective."""
    own = (socket.gethostname(), os.sched_getaffinity(0))
    ranks = dist.gather_objects(own)
    if torch.cuda.is_available():
        # An optimizer that is offloaded runs here, on all cores for every rank if nobody says otherwise.
        if "OMP_NUM_THREADS" not in os.environ:
            beside = sum(host == own[0] and bool(own[1] & cores) for host, cores in ranks)
            torch.set_num_threads(max(1, len(own[1]) // beside))
        return
    torch.set_num_threads(threads([cores for host, cores in ranks if host == own[0]], own[1]))
    if precision == "bf16" and fast_precision() != "bf16" and dist.rank() == 0:
        log.warning(
            "bf16 products are emulated on this processor, which makes them several times slower than fp32; "
            "use deepspeed=ds_configs/zero2_fp32.json here"
        )


def fast_precision() -> str:
    """bf16, or fp32 on a processor that has no instructions for the other."""
    fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"


def threads(bound: Sequence[set[int]], own: set[int]) -> int:
    """Threads for a process bound to the cores `own`, one of those on its machine with the cores `bound`."""
    union = set[int]().union(*bound)
    if len(bound) > len(union):
        raise SettingsError(
            f"{len(bound)} processes on {len(union)} CPU cores would wait for each other; start at most "
            f"{len(union)} (deepspeed --num_accelerators {len(union)})"
        )
    return max(1, len(own) // sum(bool(own & cores) for cores in bound))


def _holder() -> str:
    """This process, as others find it in the lock."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S.%f}"


def _blind(folder: Path, holder: str) -> str | None:
    """Why this rank cannot use the folder that rank 0, the `holder`, has locked; None where it sees it."""
    for attempt in range(_LOOKS):
        if attempt:
            time.sleep(0.5)  # what was made elsewhere just now may take a shared folder a moment
        with contextlib.suppress(OSError):
            if (folder / _LOCK).read_text(encoding="utf-8") == holder:
                return None
    return (
        f"rank {dist.rank()} on {socket.gethostname()} does not see the run folder {folder.resolve()} that "
        f"{holder} has; checkpoints need one folder for all machines: set runs= to a shared one"
    )


def _leave(folder: Path) -> None:
    """Remove a folder where nothing but the lock is."""
    if [path.name for path in folder.iterdir()] == [_LOCK]:
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink()
            folder.rmdir()


def _lock(folder: Path, holder: str) -> tuple[IO[str] | None, str | None]:
    """The open lock of a folder, with the `holder` written into it, or why it cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / _LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as the lock is held
    try:
        # Not flock: a worker process that outlives a killed rank would hold on to it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        other = file.read().strip() or "another process"
        file.close()
        return None, f"{folder} is being written by {other}; stop that run first, or choose another name="
    file.truncate(0)
    file.write(holder)
    file.flush()
    os.fsync(file.fileno())  # NFS sends it when the file is closed otherwise, which is at the end of the run
    return file, None


def _problem(experiment: Described, *, corpus: str, where: str, origin: tuple[str, str]) -> str | None:
    folder, (what, place) = experiment.folder, origin
    stamp = folder / "environment.json"
    if not stamp.exists():
        if folder.exists() and (not folder.is_dir() or any(path.name != _LOCK for path in folder.iterdir())):
            return f"{folder} exists and is not a run folder; choose another name or remove it"
        return None
    try:
        stated = json.loads(stamp.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{stamp} cannot be read ({error}); restore it or choose another name"
    if not isinstance(stated, dict):
        return f"{stamp} holds no JSON object; restore it or choose another name"
    if stated.get("experiment") != experiment.fingerprint:
        return (
            f"{folder} holds another experiment than {where} with these overrides (compare its "
            f"experiment.toml); give this one another name, such as name={experiment.name}-2"
        )
    if stated.get("corpus") != corpus:
        return (
            f"{folder} was trained on another {what} than {place}; restore that {what} or give this run "
            f"another name, such as name={experiment.name}-2"
        )
    return None


def _git_commit() -> str | None:
    """The commit of this program's own checkout, or None where it is not one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
