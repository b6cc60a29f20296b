"""DeepSpeed's compiled ops: built by one process at a time, and after a build that was killed built again.

The surprise: torch guards the build of an extension by a file that only the process that made it removes. A
process killed while it compiles leaves the file behind, and from then on every start on that machine waits
for it without a word and without end. Here the kernel guards a build, by a lock that dies with its holder,
and a file found under that lock is known to be a dead process'.

And every ZeRO engine imports DeepSpeed's Muon, whose kernels torch.compile would take at once: they are left
to their first call.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime import compiler
from torch.utils import cpp_extension

from earlybert.config import EarlyBertError

_FOLDER = "TORCH_EXTENSIONS_DIR"
_SAY_AFTER_SECONDS = 5.0
_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


def folder() -> Path:
    """Where ops are built: in `TORCH_EXTENSIONS_DIR` or torch's own cache, in a folder of this package's.

    Its name tells what a build depends on. The processor's instructions are among it, so hosts that share a
    home do not run each other's code, and so is where the packages are installed: two environments in turn
    would compile everything anew at each start.
    """
    root = os.environ.get(_FOLDER) or cpp_extension.get_default_build_root()
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    versions = f"{python}-torch{torch.__version__}-deepspeed{deepspeed.__version__}"
    return Path(root) / "earlybert" / f"{versions}-{platform.machine()}-{_instructions():08x}-{_places():08x}"


def guard_builds() -> None:
    """Let every op that DeepSpeed compiles in this process be compiled under the kernel's lock."""
    if OpBuilder.jit_load is not _guarded:
        OpBuilder.jit_load = _guarded


def leave_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon so that a kernel of it is compiled when it is first called.

    A ZeRO engine imports it to learn that its optimizer is another one; to decorate its kernels then loads
    the whole of torch's compiler, two seconds and 40 MiB of every rank.
    """
    if _MUON in sys.modules:
        return
    usual, compiler.compile = compiler.compile, lambda: _compiled_when_called
    try:
        importlib.import_module(_MUON)
    finally:
        compiler.compile = usual


def _compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call


_unguarded = OpBuilder.jit_load


def _guarded(builder: Any, verbose: bool = True) -> Any:
    home = folder()
    try:
        (home / builder.name).mkdir(parents=True, exist_ok=True)
        with (
            _alone(home / f"{builder.name}.lock", builder.name),
            _environment(_FOLDER, str(home)),
            _environment("PATH", _own_programs_first()),
        ):
            (home / builder.name / "lock").unlink(missing_ok=True)
            return _unguarded(builder, verbose)
    except OSError as error:
        raise EarlyBertError(
            f"{home}: DeepSpeed's op {builder.name!r} cannot be built there: {error.strerror or error}; "
            f"set {_FOLDER} to a folder that can be written"
        ) from error


@contextlib.contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """Hold the lock on a file; the kernel drops it however this process ends."""
    with open(path, "a+", encoding="utf-8") as file:
        began, said = time.monotonic(), False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said and time.monotonic() - began > _SAY_AFTER_SECONDS:
                    said = True
                    print(f"another process compiles {name} in {path.parent}: waiting", file=sys.stderr)
                time.sleep(0.05)
        yield


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _own_programs_first() -> str:
    """PATH with this installation's ninja before any other: two versions of it each take what the other has
    built for stale, so a start here and a start with the environment activated would compile in turn."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


def _places() -> int:
    """A number that tells one installation of the packages from another: their paths are part of a build."""
    return zlib.crc32(f"{deepspeed.__file__} {torch.__file__}".encode())


def _instructions() -> int:
    """A number that tells processors with other instructions apart; 0 where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    told = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return zlib.crc32(" ".join(sorted(told[0].split())).encode()) if told else 0
