"""Ops are compiled by one process at a time, and one killed while it compiles holds up nobody."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import deepspeed
import pytest
import torch

import ranks
import tiny
from earlybert import lifecycle, ops
from earlybert.config import EarlyBertError
from earlybert.lifecycle import free_port
from ranks import launch


def join() -> None:
    """A rank that starts, which loads the first op, and ends."""
    lifecycle.start_ranks()
    lifecycle.end_ranks()


def linger(told: str) -> None:
    """A rank that works and is killed at it."""
    lifecycle.start_ranks()
    total = torch.ones(3)
    deepspeed.comm.inference_all_reduce(total)  # through the shared buffers
    Path(told).with_suffix(f".{os.environ['RANK']}").write_text(str(total.tolist()))
    time.sleep(600)


def hold(name: str, told: str) -> None:
    """A process that compiles for ever."""
    ops.folder().mkdir(parents=True, exist_ok=True)
    with ops._alone(ops.folder() / f"{name}.lock", name):
        Path(told).touch()
        time.sleep(600)


def loads_a_compiler(stage):
    """Whether training, a draw among it, loads torch's compiler, which nothing of it calls."""
    engine = tiny.engine(stage, "bf16", tiny.settings())
    tiny.train(engine, range(6))
    assert engine.ticket is not None
    return "torch._inductor.compile_fx" in sys.modules


def muon_kernel(calls):
    """What DeepSpeed's own kernel gives at first call, and how often torch.compile was asked for it."""
    ops.leave_muon_uncompiled()
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5

    asked, real = [], torch.compile
    assert compiler.compile() is real  # the usual one for whoever comes later
    torch.compile = lambda function: (asked.append(function.__name__), real(function, backend="eager"))[1]
    torch.manual_seed(0)
    matrix = torch.randn(6, 4)
    found = [zeropower_via_newtonschulz5(matrix, 5).float() for _ in range(calls)]
    return asked, torch.linalg.svdvals(found[-1]).tolist()


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A folder of the test's with the ops as an earlier run built them."""
    assert [rank.wait(timeout=240) for rank in launch("test_ops:join", [], ranks=2, logs=tmp_path)] == [0, 0]
    usual = ops.folder()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    shutil.copytree(usual, ops.folder())  # its times too: nothing is compiled again
    return ops.folder()


def start(tmp_path):
    return launch(
        "test_ops:join", [], ranks=2, logs=tmp_path, TORCH_EXTENSIONS_DIR=os.environ["TORCH_EXTENSIONS_DIR"]
    )


def test_the_mark_that_a_killed_build_left_holds_up_no_later_start(built, tmp_path):
    marks = [path / "lock" for path in built.iterdir() if path.is_dir()]
    assert marks, "no op was built"
    for mark in marks:
        mark.touch()
    assert [rank.wait(timeout=60) for rank in start(tmp_path)] == [0, 0]


def test_a_start_waits_for_a_process_that_compiles_says_so_and_goes_on_when_that_one_dies(built, tmp_path):
    name = next(path.name for path in built.iterdir() if path.is_dir() and "comm" in path.name)
    told, extensions = tmp_path / "told", os.environ["TORCH_EXTENSIONS_DIR"]
    (tmp_path / "holder").mkdir()
    [holder] = launch(
        "test_ops:hold", [name, str(told)], ranks=1, logs=tmp_path / "holder", TORCH_EXTENSIONS_DIR=extensions
    )
    while not told.exists():
        assert holder.poll() is None
        time.sleep(0.05)
    ranks = start(tmp_path)
    deadline = time.monotonic() + 60
    while "another process compiles" not in (tmp_path / "log-0.txt").read_text():
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.1)
    holder.send_signal(signal.SIGKILL)
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]


def test_a_killed_rank_leaves_no_shared_memory_behind(tmp_path):
    port, shared = str(free_port()), Path("/dev/shm")
    before = set(shared.iterdir())
    for rank in range(2):  # of an earlier run, killed while it started, on the same port
        stale = shared / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_{rank}"
        stale.write_bytes(b"\x01" * 1000)
    told = tmp_path / "told"
    ranks = launch("test_ops:linger", [str(told)], ranks=2, logs=tmp_path, MASTER_PORT=port, LOCAL_SIZE="2")
    for number in range(2):
        while not told.with_suffix(f".{number}").exists():
            assert all(rank.poll() is None for rank in ranks), (tmp_path / "log-0.txt").read_text()
            time.sleep(0.05)
        assert told.with_suffix(f".{number}").read_text() in ("", "[2.0, 2.0, 2.0]")
    for rank in ranks:
        rank.kill()
        rank.wait(timeout=20)
    assert {path for path in shared.iterdir() if "deepspeed" in path.name} <= before


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))

    class Builder:
        name = "fused_adam"

    with pytest.raises(EarlyBertError, match=r"file.*'fused_adam' cannot be built.*TORCH_EXTENSIONS_DIR"):
        ops._guarded(Builder())


def test_every_build_is_made_by_the_installations_own_ninja(tmp_path, monkeypatch):
    found = []

    class Builder:
        name = "an_op"

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(ops, "_unguarded", lambda builder, verbose: found.append(shutil.which("ninja")))
    ops._guarded(Builder())
    assert found == [str(Path(sys.executable).parent / "ninja")]
    assert os.environ["PATH"] == "/usr/bin"


def test_hosts_with_other_processors_do_not_share_a_build(monkeypatch):
    here = ops.folder()
    monkeypatch.setattr(ops, "_instructions", lambda: 7)
    assert ops.folder() != here and ops.folder().parent == here.parent


def test_two_installations_do_not_compile_over_each_other(monkeypatch):
    here = ops.folder()
    monkeypatch.setattr(deepspeed, "__file__", "/elsewhere/deepspeed/__init__.py")
    assert ops.folder() != here and ops.folder().parent == here.parent


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_trains_loads_no_compiler(stage):
    assert ranks.run("test_ops:loads_a_compiler", ranks=2, stage=stage) == [False, False]


def test_muons_kernels_are_compiled_once_when_they_are_called():
    [(asked, singular_values)] = ranks.run("test_ops:muon_kernel", ranks=1, calls=2)
    assert asked == ["zeropower_via_newtonschulz5"]
    assert all(0.6 < value < 1.3 for value in singular_values)  # what five iterations promise
