"""What goes wrong under a run: it ends in words, and the same command then equals the unbroken run."""

import signal

import pytest
from test_pretrain import Folder, told, wait_for_step

from earlybert.faults import VARIABLE
from earlybert.watch import LOST

SHORT = ["phases.0.steps=10", "phases.1.steps=2", "hang_seconds=4"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A folder with an unbroken run."""
    folder = Folder(tmp_path_factory.mktemp("faults"), stage=2, precision="bf16")
    assert folder.run("name=unbroken", *SHORT) == [0, 0], folder.log()
    return folder


def assert_goes_on(folder, name):
    assert folder.run(f"name={name}", *SHORT) == [0, 0], folder.log()
    assert told(folder.metrics(name)) == told(folder.metrics("unbroken"))


def test_a_rank_that_hangs_is_named_with_what_it_was_at_and_its_stack_is_kept(unbroken):
    codes = unbroken.run("name=hangs", *SHORT, **{VARIABLE: "hang@step.data#11:1"})
    assert codes == [LOST, LOST], unbroken.log()
    assert "the run stands still: rank 1 on " in unbroken.log()
    assert "has been at 'step 6: data' for" in unbroken.log()
    stack = unbroken.path / "runs" / "hangs" / "hang-rank-1.txt"
    assert "faults.py" in stack.read_text() and not stack.with_name("hang-rank-0.txt").exists()
    assert_goes_on(unbroken, "hangs")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_named_by_the_other(unbroken, victim):
    codes = unbroken.run(f"name=killed-{victim}", *SHORT, **{VARIABLE: f"kill@step.data#11:{victim}"})
    other = 1 - victim
    assert (codes[victim], codes[other]) == (-signal.SIGKILL, LOST), unbroken.log()
    said = (unbroken.path / f"log-{other}.txt").read_text()
    assert f"error: rank {victim}" in said and "is gone" in said and "Traceback" not in said
    assert_goes_on(unbroken, f"killed-{victim}")


def test_a_rank_that_was_stopped_does_not_answer(unbroken):
    processes = unbroken.start("name=stopped", *SHORT, "phases.0.steps=5000", "phases.0.warmup=0.0002")
    wait_for_step(unbroken, "stopped", 4, lambda: all(p.poll() is None for p in processes))
    processes[1].send_signal(signal.SIGSTOP)
    assert processes[0].wait(timeout=60) == LOST
    assert "rank 1 on " in unbroken.log() and "does not answer" in unbroken.log()
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait(timeout=20)


def test_a_rank_that_ends_with_an_error_is_named_with_it(unbroken):
    codes = unbroken.run("name=fails", *SHORT, **{VARIABLE: "fail@draw.build:1"})
    assert codes == [LOST, 1], unbroken.log()
    assert "rank 1 on " in unbroken.log() and "it ended: a fault armed at draw.build" in unbroken.log()
    assert_goes_on(unbroken, "fails")


def test_an_armed_fault_that_does_not_exist_is_refused(unbroken):
    assert unbroken.run("name=typo", *SHORT, ranks=1, **{VARIABLE: "kill@step.dta"}) == [2]
    assert "'kill@step.dta' is not ACTION@POINT" in unbroken.log()
