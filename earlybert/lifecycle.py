"""Around a DeepSpeed engine's life: the ranks start, its config is checked, it is torn down.

The surprise: `DeepSpeedEngine.destroy()` leaves closures, hooks and class-level stacks behind that keep the
model alive; `tear_down` removes each.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import random
import socket
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pydantic
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

from earlybert import dist, mechanics, ops
from earlybert.config import EarlyBertError, SettingsError

log = logging.getLogger(__name__)

_OUTPUT_MARK = "_backward_hook_managers"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""malloc.h"""
_MANY_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Numbers of tasks as Slurm, Open MPI and MPICH give them; none of them sets RANK."""


def start_ranks() -> None:
    """Join the process group of the launcher (deepspeed, torchrun, srun), or make one of a single process.
    Collective."""
    _keep_freed_memory()
    ops.guard_builds()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        os.environ.update(_ranks_of_slurm())
    if "RANK" not in os.environ:
        for many in _MANY_TASKS:
            if int(os.environ.get(many) or 1) > 1:
                raise EarlyBertError(
                    f"{many} = {os.environ[many]}, but RANK is not set: each task would train by itself. "
                    "Start with the deepspeed launcher, torchrun or srun, or set RANK, LOCAL_RANK, "
                    "WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each task"
                )
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's to mend, and said once a process and collective.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    # Before any collective: NCCL takes the process' current device, which is the first one on every rank.
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    _forget_shared_buffer()  # a killed run's, whose flags this run's ranks would believe
    deepspeed.init_distributed(verbose=False)
    dist.barrier()
    _forget_shared_buffer()  # every rank has it open now: without a name it goes with the last of them


def _ranks_of_slurm() -> dict[str, str]:
    """What a launcher would set, from the variables that srun gives every task of a step."""
    task = os.environ
    # Where Slurm binds a GPU to each task (--gpus-per-task), a task sees no other, and its own as the first.
    alone = torch.cuda.is_available() and torch.cuda.device_count() == 1
    job, step = int(task["SLURM_JOB_ID"]), int(task["SLURM_STEP_ID"])
    return {
        "RANK": task["SLURM_PROCID"],
        "LOCAL_RANK": "0" if alone else task["SLURM_LOCALID"],
        "WORLD_SIZE": task["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": task.get("MASTER_ADDR") or _first_host(task["SLURM_STEP_NODELIST"]),
        # The same on all tasks, and another one for jobs and steps that share a node.
        "MASTER_PORT": task.get("MASTER_PORT", str(20_000 + (job * 7 + step) % 20_000)),
    }


def _first_host(nodes: str) -> str:
    try:
        told = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise EarlyBertError(
            f"scontrol does not tell the first of the nodes {nodes} ({error}); set MASTER_ADDR to it"
        ) from error
    return told.stdout.split()[0]


def end_ranks() -> None:
    """Leave the process group. Without this a gloo thread may still run at exit, which aborts the process.

    Call it on every way out. While an error is under way NCCL's group is left to the end of the process: it
    would wait here for collectives that the other ranks are still in, and the error would not be told.
    """
    if not torch.distributed.is_initialized():
        return
    if sys.exc_info()[0] is None or torch.distributed.get_backend() != "nccl":
        torch.distributed.destroy_process_group()


def _forget_shared_buffer() -> None:
    """Remove the name of the buffer through which DeepSpeed's CPU collectives reach this rank.

    DeepSpeed removes it at a clean end only: every killed rank would leave 66 MiB of memory behind, and a
    later run on the same port would open them.
    """
    # As DeepSpeed spells it where they are not set.
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    rank = os.environ["RANK"]
    buffer = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}")
    with contextlib.suppress(OSError):
        buffer.unlink()


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks: a CPU step frees and asks for the same large tensors again and again.

    By default each goes back to the system and comes as new pages (LOG.md has the times). Those that are too
    large to be kept come as huge pages: PyTorch asks for them where this stands in the environment before its
    first tensor. Other C libraries have no mallopt, or ignore it.
    """
    if torch.cuda.is_available():
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_TRIM_THRESHOLD, 2**30), (_M_MMAP_THRESHOLD, 2**25)):
            mallopt(ctypes.c_int(parameter), ctypes.c_int(value))


def free_port() -> int:
    """A port that nothing has at any of this machine's addresses.

    Below those that systems give to outgoing connections (32,768 and up on Linux): such a one may be taken
    by any program before it is listened at, and by one at another address than was tried.
    """
    for port in random.SystemRandom().sample(range(20_000, 30_000), 1_000):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise EarlyBertError("1,000 ports between 20000 and 29999 are all taken; set MASTER_PORT to a free one")


KNOWN_OPTIMIZERS = {
    "Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "Lamb", "SGD", "FusedLion", "DeepSpeedCPULion",
}  # fmt: skip
"""Optimizers that keep some of `state.POWERS` for each element, or nothing. Not Adagrad: ZeRO-1 and 2 rebuild
it with one group in 0.19.8 and lose the others' masters."""


def check_optimizer(optimizer: Any, *, where: str) -> None:
    """Raise SettingsError for an optimizer whose state the draw could not cut."""
    kind = type(getattr(optimizer, "optimizer", optimizer))
    if not any(base.__name__ in KNOWN_OPTIMIZERS for base in kind.__mro__):
        raise SettingsError(
            f"{where}: what the optimizer {kind.__name__} keeps for each element is not known, so a draw "
            f"could not cut it; use one of {', '.join(sorted(KNOWN_OPTIMIZERS))}, or add it to "
            "earlybert.state.POWERS and earlybert.lifecycle.KNOWN_OPTIMIZERS"
        )


def check_config(values: Mapping[str, Any], *, where: str) -> None:
    """Let DeepSpeed's own checks see a complete config (batch sizes filled in); raises SettingsError with its
    words, and for a precision that this device does not compute in."""
    precision, device = mechanics.precision_of(values), get_accelerator()
    if precision == "fp16" and not device.is_fp16_supported():
        raise SettingsError(
            f"{where}: fp16 is enabled, but this {device.device_name()} does not compute in it; use a "
            "DeepSpeed JSON with bf16, or with neither for fp32"
        )
    try:
        DeepSpeedConfig(mechanics.close_traps(values))
    except (pydantic.ValidationError, AssertionError, ValueError, DeepSpeedConfigError) as error:
        raise SettingsError(f"{where}: DeepSpeed refuses it: {error}") from error


def empty_module(build: Callable[[], torch.nn.Module], *, config: Mapping[str, Any]) -> torch.nn.Module:
    """What `build` returns, without its values: parameters are zeros, under ZeRO-3 sharded one by one.

    For a state to be seeded into. No time goes into initial values, and under ZeRO-3 no rank ever holds more
    than one whole parameter of it. Buffers keep their values. Collective under ZeRO-3.
    """
    with torch.random.fork_rng(devices=[]), _parameters_on_meta():
        module = build()
    sharded, kind, device = mechanics.stage_of(config) == 3, torch.float32, None
    if sharded:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mechanics.precision_of(config), kind)
        partition = deepspeed.zero.Init(config_dict_or_path=mechanics.close_traps(config), dtype=kind)
        device = partition.local_device
    made: dict[int, torch.nn.Parameter] = {}  # tied parameters stay one
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    value = torch.zeros(parameter.shape, dtype=kind, device=device)
                    real = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
                    if sharded:
                        partition._convert_to_deepspeed_param(real)
                        real.partition()  # type: ignore[attr-defined] # DeepSpeed's
                    made[id(parameter)] = real
                owner._parameters[name] = made[id(parameter)]
        if sharded:  # DeepSpeed takes a sharded module for one that lies on the device already
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = None if buffer is None else buffer.to(device)
    return module


def compile_module(inner: Any, options: Mapping[str, Any]) -> None:
    """Compile an engine's module, `options` as for DeepSpeed's `compile`.

    Where the module names its `regions`, each is compiled by itself, and those alike share their code: a
    model costs the compiler one layer instead of all, of whatever widths.
    """
    regions = getattr(inner.module, "regions", None)
    if regions is None:
        inner.compile(**options)
        return
    # Process-wide, as all of Dynamo's settings: without them each width of a layer is compiled anew, and past
    # the eighth not at all.
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    deepspeed.utils.nvtx.enable_nvtx = False  # its marks would break the graphs
    backend = options.get("backend") or get_accelerator().get_compile_backend()
    found = regions()
    for kind in {type(region) for region in found}:
        _mark_widths([region for region in found if type(region) is kind])
    for region in found:
        region.compile(**{**options.get("compile_kwargs", {}), "backend": backend})
    inner._is_compiled = True


def as_written(inner: Any) -> contextlib.AbstractContextManager[Any]:
    """Keep what is not training from the compiler, in a `with` around the call: its shapes would make the
    training step's dynamic, and how a step rounds would depend on what was evaluated before it."""
    if not inner.is_compiled or inner.module.training:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _mark_widths(regions: Sequence[torch.nn.Module]) -> None:
    """Tell the compiler which sizes differ between regions of one kind.

    Left to itself it finds out at the second region, and the first one's code, of fixed sizes, rounds
    otherwise: then what a layer computes would depend on what was compiled before it.
    """
    for alike in zip(*(region.parameters() for region in regions), strict=True):
        for dim, sizes in enumerate(zip(*(parameter.shape for parameter in alike), strict=True)):
            if len(set(sizes)) > 1:
                for parameter in alike:
                    torch._dynamo.maybe_mark_dynamic(parameter, dim)


def compile_seconds() -> float:
    """Time that torch.compile has taken since it was last reset, backward passes among it."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported where nothing was compiled
    return 0.0 if dynamo is None else dynamo.calculate_time_spent().get("total_wall_time", 0.0)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register meanwhile have shapes and no values."""
    register = torch.nn.Module.register_parameter

    def without_values(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    torch.nn.Module.register_parameter = without_values  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def tear_down(inner: Any) -> None:
    """`destroy()` and what it forgets in 0.19.8; tests/test_engine.py shows that nothing stays alive."""
    parameters = list(inner.module.parameters())
    for hook in (inner.module_forward_pre_hook, inner.module_forward_post_hook):
        if hook is not None:
            hook.remove()
    inner.destroy()
    marks = ("_z3_optimizer", "_zero_optimizer", "_hp_mapping", "load_hp_checkpoint_state")
    methods = tuple(f"{verb}_full_hp_{what}" for verb in ("get", "set") for what in ("param", "grad"))
    for parameter in parameters:
        for mark in (*marks, *methods):
            parameter.__dict__.pop(mark, None)
    writer = getattr(getattr(inner.monitor, "tb_monitor", None), "summary_writer", None)
    if writer is not None:
        writer.close()
    parameter_offload.FWD_MODULE_STACK.clear()
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    cached = vars(coordinator).get("_PartitionedParameterCoordinator__params_to_release")
    for cell in getattr(cached, "__closure__", None) or ():
        clear = getattr(cell.cell_contents, "cache_clear", None)
        if clear is not None:
            clear()


class OutputMarks:
    """The closures over an engine that DeepSpeed hangs on outputs, which may outlive it."""

    def __init__(self) -> None:
        self._marked: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def note(self, output: Any) -> None:
        """Remember the marked tensors of an output, as long as they live."""
        for tensor in _tensors(output):
            if hasattr(tensor, _OUTPUT_MARK):
                self._marked[id(tensor)] = tensor

    def remove(self) -> None:
        for tensor in list(self._marked.values()):
            tensor.__dict__.pop(_OUTPUT_MARK, None)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def warn_of_survivors(torn_down: Mapping[str, weakref.ref[Any]]) -> None:
    """Collect garbage, give a GPU's memory back, and say what of an engine is still referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    alive = [what for what, reference in torn_down.items() if reference() is not None]
    if alive:
        log.warning(
            "the old %s is still referenced after its tear-down and keeps its memory; "
            "drop outputs, losses and module references before the draw",
            " and ".join(alive),
        )


class Clock:
    """The parts of a pause, by name, in seconds."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
