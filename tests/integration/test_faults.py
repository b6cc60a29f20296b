"""What goes wrong under a run: it ends in words, and the same command then equals the unbroken run."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_pretrain import Folder, told, wait_for_step

import tiny
from earlybert import checkpoint
from earlybert.data import DataSettings, PackedSamples
from earlybert.faults import VARIABLE
from earlybert.shards import Corpus
from earlybert.watch import LOST

SHORT = ["phases.0.steps=10", "phases.1.steps=2", "hang_seconds=8"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A folder with an unbroken run."""
    folder = Folder(tmp_path_factory.mktemp("faults"), stage=2, precision="bf16")
    assert folder.run("name=unbroken", *SHORT) == [0, 0], folder.log()
    return folder


def assert_goes_on(folder, name):
    assert folder.run(f"name={name}", *SHORT) == [0, 0], folder.log()
    assert told(folder.metrics(name)) == told(folder.metrics("unbroken"))


@pytest.mark.thorough
def test_a_rank_that_hangs_is_named_with_what_it_was_at_and_its_stack_is_kept(unbroken):
    soon = [*SHORT, "hang_seconds=5"]
    codes = unbroken.run("name=hangs", *soon, **{VARIABLE: "hang@step.data#11:1"})
    assert codes == [LOST, LOST], unbroken.log()
    assert "the run stands still: rank 1 on " in unbroken.log()
    assert "has been at 'step 6: data' for" in unbroken.log()
    stack = unbroken.path / "runs" / "hangs" / "hang-rank-1.txt"
    assert "faults.py" in stack.read_text() and not stack.with_name("hang-rank-0.txt").exists()
    assert_goes_on(unbroken, "hangs")


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_a_rank_that_is_killed_is_named_by_the_other(unbroken, victim):
    codes = unbroken.run(f"name=killed-{victim}", *SHORT, **{VARIABLE: f"kill@step.data#11:{victim}"})
    other = 1 - victim
    assert (codes[victim], codes[other]) == (-signal.SIGKILL, LOST), unbroken.log()
    said = (unbroken.path / f"log-{other}.txt").read_text()
    assert f"error: rank {victim}" in said and "is gone" in said and "Traceback" not in said
    assert_goes_on(unbroken, f"killed-{victim}")


@pytest.mark.thorough
def test_a_rank_that_was_stopped_does_not_answer(unbroken):
    processes = unbroken.start(
        "name=stopped", *SHORT, "hang_seconds=5", "phases.0.steps=5000", "phases.0.warmup=0.0002"
    )
    wait_for_step(unbroken, "stopped", 4, lambda: all(p.poll() is None for p in processes))
    processes[1].send_signal(signal.SIGSTOP)
    assert processes[0].wait(timeout=60) == LOST
    assert "rank 1 on " in unbroken.log() and "does not answer" in unbroken.log()
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait(timeout=20)


@pytest.mark.thorough
def test_a_rank_that_ends_with_an_error_is_named_with_it(unbroken):
    codes = unbroken.run("name=fails", *SHORT, **{VARIABLE: "fail@draw.build:1"})
    assert codes == [LOST, 1], unbroken.log()
    assert "rank 1 on " in unbroken.log() and "it ended: a fault armed at draw.build" in unbroken.log()
    assert_goes_on(unbroken, "fails")


def test_an_armed_fault_that_does_not_exist_is_refused(unbroken):
    assert unbroken.run("name=typo", *SHORT, ranks=1, **{VARIABLE: "kill@step.dta"}) == [2]
    assert "'kill@step.dta' is not ACTION@POINT" in unbroken.log()


POISONED = Path(__file__).parent / "pretrain_with_poison.py"
GUARDED = [*SHORT, "guard.spike=10", "guard.window=3", "checkpoint.every=4"]


def poison(folder, factor, *, steps=(5,)):
    """The environment of a run whose samples at the third place of these batches are bad, and what names the
    first of them."""
    corpus = Corpus.open(str(folder.path / "corpus"))
    settings = DataSettings(corpus=str(corpus.folder), held_out=0.1)
    samples = PackedSamples(corpus, settings=settings, sequence_length=16, seed=3)
    ids, epochs = samples.ids(np.array([(step - 1) * 8 + 2 for step in steps]))
    rows = samples.rows(ids, epochs=epochs)["input_ids"].tolist()
    documents = ", ".join(map(str, samples.documents_of(int(ids[0]))))
    name = f"sample {ids[0]} of epoch {epochs[0]} (documents {documents})"
    return {"POISON_ROWS": json.dumps(rows), "POISON_FACTOR": factor}, name


def test_a_sample_that_makes_the_loss_nan_is_named_and_its_step_skipped(unbroken):
    environment, name = poison(unbroken, "nan")
    codes = unbroken.run("name=not-a-number", *GUARDED, script=POISONED, **environment)
    assert codes == [0, 0], unbroken.log()
    assert f"bad by themselves at sequence length 16: {name}, loss nan" in unbroken.log()
    assert "the loss is nan" in unbroken.log() and "its update was skipped" in unbroken.log()
    lines = {line["step"]: line for line in unbroken.metrics("not-a-number")}
    assert lines[4]["loss"] == {m["step"]: m for m in unbroken.metrics("unbroken")}[4]["loss"]
    assert lines[5]["loss"] is None and lines[5]["skipped_steps"] == 1 and lines[12]["skipped_steps"] == 1


@pytest.mark.thorough
def test_a_spike_can_send_the_run_back_past_its_batch_and_a_kill_changes_nothing(tmp_path):
    folder = Folder(tmp_path, stage=3, precision="fp32")
    environment, name = poison(folder, "40", steps=(5, 6))
    words = [*GUARDED, "guard.action=roll_back"]
    assert folder.run("name=back", *words, script=POISONED, **environment) == [0, 0], folder.log()
    said = folder.log()
    assert "standard deviations above" in said and f"bad by themselves at sequence length 16: {name}" in said
    assert "gone back to step 4, past the batches of steps 5 to 5" in said
    lines = folder.metrics("back")
    assert [line["step"] for line in lines] == list(range(13)) and lines[-1]["skipped_steps"] == 0
    found = checkpoint.newest_good(folder.path / "runs" / "back" / "checkpoints")
    assert said.count("gone back to step 4") == 2, "the next batch was bad as well"
    assert found is not None and found.manifest.trainer["passed"] == {"16": 16}

    environment[VARIABLE] = "kill@step.data#15"  # after it went back twice, before the next checkpoint
    assert folder.run("name=twice", *words, script=POISONED, **environment) == [-signal.SIGKILL] * 2
    del environment[VARIABLE]
    assert folder.run("name=twice", *words, script=POISONED, **environment) == [0, 0], folder.log()
    assert told(folder.metrics("twice")) == told(lines)


def test_bad_numbers_can_end_the_run_and_always_do_when_there_are_too_many(unbroken):
    environment, name = poison(unbroken, "inf")
    codes = unbroken.run("name=stops", *GUARDED, "guard.action=stop", script=POISONED, **environment)
    assert codes == [2, 2], unbroken.log()
    assert name in unbroken.log() and "It was not taken and nothing was saved after it" in unbroken.log()
    names = checkpoint.names(unbroken.path / "runs" / "stops" / "checkpoints")
    assert names == ["step-0000004"], "the one before it"
    spoiled = ",".join(f"spoil@step.loss#{time}:0" for time in (9, 11, 13))
    codes = unbroken.run("name=many", *GUARDED, "guard.limit=2", **{VARIABLE: spoiled})
    assert codes == [2, 2] and "3 bad steps in a row, now step 7" in unbroken.log()
    assert "no sample of the step is bad by itself" in unbroken.log()


@pytest.fixture
def small_disk(unbroken):
    """A file system of 500 kB where a run's checkpoints go; `grow` gives it more."""
    folder = unbroken.path / "runs" / "full" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield lambda: subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_disk_that_is_really_full_loses_nothing(unbroken, small_disk):
    """A checkpoint takes 400 kB: the first fits, the next do not until there is room."""
    run = unbroken.path / "runs" / "full"
    environment = unbroken.path / "runs" / "unbroken" / "environment.json"
    shutil.copy(environment, run)  # so that the folder counts as a run's
    words = [*SHORT, "checkpoint.every=3", "checkpoint.keep=1"]
    assert unbroken.run("name=full", *words) == [2, 2], unbroken.log()
    said = unbroken.log()
    assert "step-0000006 was not saved: rank " in said and "No space left on device" in said
    assert "the checkpoint of step 12 could not be saved" in said and "make room" in said
    assert checkpoint.names(run / "checkpoints") == ["step-0000003"], "the good one is there, and no half one"
    small_disk()
    assert unbroken.run("name=full", *words) == [0, 0], unbroken.log()
    assert told(unbroken.metrics("full")) == told(unbroken.metrics("unbroken"))


def test_a_run_folder_that_cannot_be_written_is_said_in_one_line(unbroken):
    codes = unbroken.run("name=unwritable", *SHORT, **{VARIABLE: "full@step.data#9:0"})
    assert codes == [2, LOST], unbroken.log()
    assert "No space left on device" in unbroken.log() and "mend that, then start" in unbroken.log()
    assert_goes_on(unbroken, "unwritable")


@pytest.mark.skipif(not tiny.FP16, reason="no fp16 on this processor")
def test_fp16_overflows_are_skipped_and_counted_and_the_scaler_lives_through_a_kill(tmp_path):
    folder = Folder(tmp_path, stage=1, precision="bf16")
    mechanics = {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True, "initial_scale_power": 24}}
    (tmp_path / "ds.json").write_text(json.dumps(mechanics))
    words = [*SHORT, "checkpoint.every=2"]
    assert folder.run("name=whole", *words) == [0, 0], folder.log()
    lines = folder.metrics("whole")[1:]
    assert lines[0]["loss_scale"] > lines[-1]["loss_scale"] or lines[-1]["skipped_steps"] >= 1
    assert lines[-1]["skipped_steps"] >= 1 and all(line["loss"] is not None for line in lines)
    assert folder.run("name=cut", *words, **{VARIABLE: "kill@step.data#7"}) == [-signal.SIGKILL] * 2
    assert folder.run("name=cut", *words) == [0, 0], folder.log()
    assert told(folder.metrics("cut")) == told(folder.metrics("whole"))
