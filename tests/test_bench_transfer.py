"""`bench.py transfer`: models side by side on the same tasks, several programs at a time, in slices."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import psutil
import pytest
from test_bench_downstream import SCRIPTS, write_rte

import letters
from earlybert import scores
from earlybert.config import EarlyBertError
from ranks import launch


@pytest.fixture
def transfer(monkeypatch):
    """The benchmark, and the programs that it starts, forked from the tests' server."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import transfer

    started = []

    def start(command, *, ranks, log, **environment):
        started.append(command)
        path = Path(log.name)
        (logs := path.with_suffix("")).mkdir()
        path.unlink()
        path.symlink_to(logs / "log-0.txt")
        return launch("test_bench_downstream:alone", command[1:], ranks=ranks, logs=logs, **environment)

    monkeypatch.setattr(transfer, "start", start)
    return transfer, started


def arguments(path, **changes):
    values = {
        "row": [
            f"dense: {path / 'bert'}", f"ticket: {path / 'bert'} ticket.enabled=true ticket.kind=magnitude",
        ],
        "glue": path / "data", "squad": None, "task": None, "seeds": 2, "out": path / "out", "jobs": 2,
        "minutes": 4.0,
        "override": [
            "recipe.epochs=1.0", "recipe.batch=16", "recipe.sequence_length=64", "deepspeed=deepspeed.json",
            "ticket.minimum_neurons=1", "ticket.neuron_multiple=1",
        ],
    }  # fmt: skip
    return Namespace(**{**values, **changes})


def test_every_row_task_and_seed_is_done_once_and_stands_in_the_table(
    transfer, tmp_path, monkeypatch, capsys
):
    bench, started = transfer
    letters.stock_bert(tmp_path / "bert", hidden_size=32, initializer_range=0.15)
    write_rte(tmp_path / "data" / "RTE")
    monkeypatch.chdir(tmp_path)
    Path("deepspeed.json").write_text('{"zero_optimization": {"stage": 1}}')
    late = bench.measure(arguments(tmp_path, minutes=0.0))
    assert not started and late["rows"] == {}, "no time, no work"
    bench.tell(late)
    assert "nothing is done yet" in capsys.readouterr().out
    figures = bench.measure(arguments(tmp_path))
    assert len(started) == 4
    for row in ("dense", "ticket"):
        assert [(r["task"], r["seed"]) for r in figures["rows"][row]] == [("rte", 1), ("rte", 2)]
    dense, ticket = (figures["rows"][row][0]["parameters"] for row in ("dense", "ticket"))
    assert ticket < dense
    assert bench.measure(arguments(tmp_path)) == figures and len(started) == 4
    own = arguments(tmp_path).override
    added = [*own, 'recipes=[{task="cola", epochs=2.0}]']
    assert bench.measure(arguments(tmp_path, override=added))["rows"] == figures["rows"], "not this task's"
    with pytest.raises(
        EarlyBertError, match="dense holds results with another settings .*choose another --out"
    ):
        bench.measure(arguments(tmp_path, override=[*own, "search_epochs=0.5"]))
    with pytest.raises(EarlyBertError, match=r"rte-1/rte/seed-1 is tuned with epochs = 1.0, not 2.0;"):
        bench.measure(arguments(tmp_path, override=[*own, "recipe.epochs=2.0"]))
    for row in ("dense", "ticket"):
        (tmp_path / "out" / row / "rte-1").rename(tmp_path / f"{row}-rte-1")
    with pytest.raises(EarlyBertError, match=r"rte-2/rte/seed-2 is tuned with"):  # the table has it too
        bench.measure(arguments(tmp_path, seeds=1, override=[*own, "recipe.epochs=2.0"]))
    for row in ("dense", "ticket"):
        (tmp_path / f"{row}-rte-1").rename(tmp_path / "out" / row / "rte-1")
    assert len(started) == 4
    bench.tell(figures, tmp_path / "scores.png")
    told = capsys.readouterr().out
    table = scores.table(scores.collect([tmp_path / "out" / row for row in ("dense", "ticket")]))
    assert table in told and "| ticket | " in table
    assert (tmp_path / "scores.png").stat().st_size > 1000


def test_a_program_that_fails_says_why_and_the_rest_can_go_on(transfer, tmp_path):
    bench, started = transfer
    write_rte(tmp_path / "data" / "RTE")
    with pytest.raises(EarlyBertError, match=r"nowhere.*logs/dense-rte-1.txt"):
        bench.measure(arguments(tmp_path, row=[f"dense: {tmp_path / 'nowhere'}"], override=[], jobs=1))
    assert len(started) == 1, "seed 2 would fail alike"


def test_programs_that_the_time_ends_while_they_start_are_no_failures(transfer, tmp_path, monkeypatch):
    bench, _ = transfer
    write_rte(tmp_path / "data" / "RTE")
    begun = []

    def start(command, *, ranks, log, **environment):
        begun.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return begun[-1:]

    monkeypatch.setattr(bench, "start", start)
    assert bench.measure(arguments(tmp_path, minutes=0.5 / 60, override=[]))["rows"] == {}
    assert [process.returncode for process in begun] == [-signal.SIGTERM] * 2, "two of four, as many as jobs"


def test_programs_that_a_signal_to_all_ends_are_no_failures(transfer, tmp_path, monkeypatch):
    bench, _ = transfer
    write_rte(tmp_path / "data" / "RTE")
    begun = []

    def start(command, *, ranks, log, **environment):
        program = (
            "import os, signal; os.kill(os.getppid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)"
        )
        begun.append(subprocess.Popen([sys.executable, "-c", program]))
        return begun[-1:]

    monkeypatch.setattr(bench, "start", start)
    assert bench.measure(arguments(tmp_path, jobs=1, override=[]))["rows"] == {}
    assert [process.returncode for process in begun] == [-signal.SIGINT]


def test_a_signal_ends_the_slice_and_programs_end_with_the_one_that_started_them(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    time_given = importlib.import_module("benchmarks.ranks").Slice(10.0)
    handled = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in handled]
    with time_given:
        assert not time_given.over and [signal.getsignal(number) for number in handled] != before
        assert time_given.ended(143) and not time_given.ended(-signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert time_given.over
        assert all(map(time_given.ended, (143, -signal.SIGTERM, -signal.SIGINT, 130)))
        assert not time_given.ended(1) and not time_given.ended(0)
        assert [signal.getsignal(number) for number in handled] == before, "a second one ends this program"
    program = (
        f"import sys, time; sys.path.insert(0, {str(SCRIPTS)!r}); from benchmarks.ranks import start; "
        "print(*[p.pid for p in start([sys.executable, '-c', 'import time; time.sleep(600)'], ranks=2)], "
        "flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}  # without it DeepSpeed says something first
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as starter:
        try:
            started = [psutil.Process(int(word)) for word in starter.stdout.readline().split()]
        finally:
            starter.kill()
    late = time.monotonic() + 20
    while any(map(_alive, started)):
        assert time.monotonic() < late
        time.sleep(0.05)
    assert len(started) == 2


def _alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"row": ["dense"]}, "--row 'dense': give 'NAME: MODEL"),
        ({"row": ["dense: ticket.enabled=true"]}, "give 'NAME: MODEL"),
        ({"row": ["a: m", "b: m", "a: n"]}, "--row a: given twice"),
        ({"task": ["squad"]}, "where the files are is not said; give --squad DIR"),
        ({"glue": None}, "no task to fine-tune on; give --glue DIR, --squad DIR or both"),
        ({"task": ["rte"], "glue": None}, "give --glue DIR"),
    ],
)
def test_a_mistake_is_named(transfer, tmp_path, changes, says):
    bench, started = transfer
    with pytest.raises(EarlyBertError, match=says):
        bench.measure(arguments(tmp_path, **changes))
    assert not started
