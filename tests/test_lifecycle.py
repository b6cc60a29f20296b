"""The ranks start under any launcher, and end so that no communication thread outlives the interpreter."""

import contextlib
import gc
import importlib
import os
import random
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers

import ranks
from earlybert import dist, lifecycle
from earlybert.config import EarlyBertError, SettingsError, settled_imports


def leave():
    before = dist.active()
    lifecycle.end_ranks()
    lifecycle.end_ranks()
    return before, dist.active()


def settle():
    """Objects that a collection goes through before and after, and whether it frees a model in a cycle."""
    gc.unfreeze()  # which the tests' own processes are
    before = len(gc.get_objects())
    with settled_imports():
        collects = gc.isenabled()
    with contextlib.suppress(ImportError), settled_imports():
        importlib.import_module("not_there")
    model = torch.nn.Linear(2, 2)
    model.itself = [model]
    told = weakref.ref(model)
    del model
    gc.collect()
    return before, len(gc.get_objects()), told() is None and gc.isenabled() and not collects


def test_after_the_end_there_is_no_process_group():
    assert ranks.run("test_lifecycle:leave", ranks=2) == [(True, False)] * 2


def test_without_a_launcher_there_is_one_rank_and_the_process_ends_cleanly():
    program = "from earlybert import dist, lifecycle; lifecycle.start_ranks(); " + (
        "print(dist.active(), dist.rank(), dist.world_size()); lifecycle.end_ranks()"
    )
    assert _alone(program).splitlines()[-1] == "True 0 1"


def _alone(program):
    """What a process prints that no launcher has started."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "THP_MEM_ALLOC_ENABLE")
    environment = {k: v for k, v in os.environ.items() if k not in names} | {"DS_ACCELERATOR": "cpu"}
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + environment["PATH"]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _huge_pages_when_asked():
    """Whether the kernel gives them to those who ask, and at once."""
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    with contextlib.suppress(OSError):
        chosen = [(folder / name).read_text().split("[")[1].split("]")[0] for name in ("enabled", "defrag")]
        return chosen[0] == "madvise" and chosen[1] in ("always", "madvise", "defer+madvise")
    return False


@pytest.mark.skipif(not _huge_pages_when_asked(), reason="this system gives no huge pages, or always does")
def test_large_tensors_come_as_huge_pages():
    program = (
        "import resource, torch; from earlybert import lifecycle; lifecycle.start_ranks(); "
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt; before = faults(); "
        "torch.ones(2**26); print(faults() - before); lifecycle.end_ranks()"
    )
    assert int(_alone(program).splitlines()[-1]) < 2**26 * 4 / 4096 / 4


@pytest.mark.parametrize("tasks", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_do_not_know_their_rank_are_refused(monkeypatch, tasks):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(tasks, "2")
    with pytest.raises(EarlyBertError, match=f"{tasks} = 2, but RANK is not set"):
        lifecycle.start_ranks()


def test_each_rank_takes_its_own_device_before_the_first_collective(monkeypatch):
    done = []

    class Accelerator:
        def set_device(self, index):
            done.append(("device", index))

    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(lifecycle, "get_accelerator", Accelerator)
    monkeypatch.setattr(lifecycle.deepspeed, "init_distributed", lambda **_: done.append("group"))
    lifecycle.start_ranks()
    assert done == [("device", 1), "group"]


@pytest.mark.parametrize(("gpus", "local"), [(1, "0"), (4, "1")])
def test_a_task_of_slurm_that_sees_one_gpu_alone_takes_it(monkeypatch, gpus, local):
    told = {"PROCID": "5", "LOCALID": "1", "STEP_NUM_TASKS": "8", "JOB_ID": "3", "STEP_ID": "0",
            "STEP_NODELIST": "no-such-node-[1-2"}  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(lifecycle.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lifecycle.torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(EarlyBertError, match="scontrol does not tell .* set MASTER_ADDR"):
        lifecycle._ranks_of_slurm()
    monkeypatch.setenv("MASTER_ADDR", "there")
    found = lifecycle._ranks_of_slurm()
    assert (found["RANK"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("5", local, "there")


@pytest.mark.parametrize(("backend", "left"), [("nccl", []), ("gloo", ["left"])])
def test_a_rank_that_fails_does_not_wait_in_nccl_for_the_others(monkeypatch, backend, left):
    done, group = [], lifecycle.torch.distributed
    monkeypatch.setattr(group, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "get_backend", lambda: backend)
    monkeypatch.setattr(group, "destroy_process_group", lambda: done.append("left"))
    with pytest.raises(RuntimeError):
        try:
            raise RuntimeError
        finally:
            lifecycle.end_ranks()
    assert done == left
    lifecycle.end_ranks()
    assert done == [*left, "left"]


def test_under_zero_3_buffers_go_to_the_device_with_the_parameters(monkeypatch):
    """DeepSpeed moves no module whose parameters are sharded; "meta" stands for a device."""

    class Partition:
        local_device = torch.device("meta")

        def __init__(self, **_):
            pass

        def _convert_to_deepspeed_param(self, parameter):
            parameter.partition = lambda: None

    monkeypatch.setattr(lifecycle.deepspeed.zero, "Init", Partition)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    values = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    module = lifecycle.empty_module(lambda: transformers.BertModel(config), config=values)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {b.device.type for b in module.buffers()} == {"meta"}


@pytest.mark.parametrize(
    "zero", [{"stage": 7}, {"stage": 2, "no_such_key": 1}, {"stage": 2, "reduce_bucket_size": "much"}]
)
def test_what_deepspeed_refuses_is_said_with_the_files_name(zero):
    values = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
    }
    with pytest.raises(SettingsError, match=r"ds\.json: DeepSpeed refuses it"):
        lifecycle.check_config(values, where="ds.json")


def test_a_precision_that_the_device_does_not_have_is_refused_with_what_to_use(monkeypatch):
    values = {
        "zero_optimization": {"stage": 1}, "fp16": {"enabled": True}, "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    device = type(lifecycle.get_accelerator())
    monkeypatch.setattr(device, "is_fp16_supported", lambda self: True)
    lifecycle.check_config(values, where="ds.json")
    monkeypatch.setattr(device, "is_fp16_supported", lambda self: False)
    with pytest.raises(SettingsError, match=r"ds\.json: fp16 is enabled, but this cpu does not"):
        lifecycle.check_config(values, where="ds.json")


def test_an_optimizer_whose_state_is_not_known_is_refused_before_it_has_any():
    lifecycle.check_optimizer(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]), where="ds.json")
    with pytest.raises(SettingsError, match=r"ds\.json: what the optimizer RMSprop keeps .*could not cut it"):
        lifecycle.check_optimizer(torch.optim.RMSprop([torch.zeros(1, requires_grad=True)]), where="ds.json")


def test_what_was_imported_is_left_out_of_collections_and_a_later_cycle_is_not():
    [(before, after, freed)] = ranks.run("test_lifecycle:settle", ranks=1)
    assert before > 100_000 and after < before / 100 and freed


def test_a_free_port_is_free_at_every_address_and_none_that_connections_are_given(monkeypatch):
    assert all(20_000 <= lifecycle.free_port() < 30_000 for _ in range(20))
    with contextlib.closing(socket.socket()) as other:
        other.bind(("127.0.0.2", 0))
        taken = other.getsockname()[1]
        monkeypatch.setattr(
            random.SystemRandom, "sample", lambda self, ports, k: [taken, *range(20_100, 20_200)]
        )
        assert lifecycle.free_port() != taken
        monkeypatch.setattr(random.SystemRandom, "sample", lambda self, ports, k: [taken])
        with pytest.raises(EarlyBertError, match="set MASTER_PORT"):
            lifecycle.free_port()
