"""The queue of probes: what it keeps, drops and leaves out, and what a probe's process may see."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from earlybert import probe_process, probes
from earlybert.config import SettingsError, parse
from earlybert.experiment import EvaluateSettings, Experiment
from earlybert.monitor import Monitor
from earlybert.probes import Probes, recorded
from earlybert.run import Signals


@pytest.fixture
def experiment(tmp_path):
    values = {
        "name": "run", "runs": str(tmp_path), "deepspeed": "ds.json",
        "model": {"layers": 1, "hidden": 8, "heads": 1}, "data": {"corpus": "c"},
        "phases": [{"steps": 22, "sequence_length": 16, "batch": 2, "micro_batch": 2, "learning_rate": 1e-3}],
        "ticket": {"enabled": False}, "checkpoint": {"every": 2},
        "evaluate": {"tasks": ["rte", "cola"], "tasks_every": 4},
    }  # fmt: skip
    return parse(Experiment, values, where="here")


@pytest.fixture
def queue(experiment, tmp_path, monkeypatch):
    """Probes of a run without a checkpoint, whose processes sleep until they are ended."""
    script = tmp_path / "sleep.py"
    script.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(probes, "_FINETUNE", script)
    monitor = Monitor(experiment.folder, resume_step=None)
    queue = Probes(experiment)
    queue.begin(monitor, found=None)
    yield queue
    queue.close()
    monitor.close()


class Found:
    """A checkpoint from which a run goes on."""

    def __init__(self, folder, step):
        self.folder, self.manifest = folder, self
        self.step = step


def publish(experiment, step):
    folder = experiment.folder / "checkpoints" / f"step-{step:07d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"step": step}))
    (folder / "rank-0.safetensors").write_bytes(b"weights")
    return folder


def said(experiment):
    return (experiment.folder / "log.txt").read_text()


def test_chosen_checkpoints_outlive_retention_and_wait_their_turn(queue, experiment):
    for step in (2, 4, 6, 8):
        folder = publish(experiment, step)
        queue.take(folder)
        shutil.rmtree(folder)
    assert queue.left == [4, 8]
    kept = experiment.folder / "probes"
    assert (kept / "step-0000008" / "rank-0.safetensors").read_bytes() == b"weights"
    assert sorted(path.name for path in kept.iterdir()) == ["step-0000004", "step-0000008"]


def test_where_many_wait_one_is_left_out_but_never_the_last(queue, experiment):
    for step in (4, 8, 12, 16, 20, 22):
        queue.take(publish(experiment, step))
    assert queue.left == [4, 8, 12, 16, 22]
    assert "no probe of step 20: those of steps 4, 8, 12, 16 are not done; raise" in said(experiment)


def test_a_file_system_without_hard_links_gets_copies(queue, experiment, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    queue.take(publish(experiment, 4))
    copied = experiment.folder / "probes" / "step-0000004" / "rank-0.safetensors"
    assert copied.read_bytes() == b"weights" and copied.stat().st_nlink == 1


def test_a_full_disk_costs_the_probe_and_not_the_run(queue, experiment, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copy", full)
    queue.take(publish(experiment, 4))
    assert queue.left == [] and "no probe of step 4: its checkpoint could not be kept" in said(experiment)


def test_a_start_drops_what_it_will_do_again_and_goes_on_with_the_rest(queue, experiment):
    for step in (4, 8, 12):
        queue.take(publish(experiment, step))
    queue.close()
    assert "the probes of steps 4, 8, 12 are left: the same command goes on" in said(experiment)
    done = [{"step": 4, "task": task, "score": 50.0} for task in ("rte", "cola")]
    past = {"step": 12, "task": "rte", "score": 50.0}
    lines = [json.dumps(line) + "\n" for line in (*done, past)]
    (experiment.folder / "probes.jsonl").write_text("".join(lines) + '{"step": 12, "ta')
    queue.begin(queue._monitor, found=Found(experiment.folder / "checkpoints" / "step-0000008", 8))
    assert recorded(experiment.folder) == done and queue.left == [8]
    assert [path.name for path in (experiment.folder / "probes").iterdir()] == ["step-0000008"]


def test_the_wait_at_the_end_is_ended_by_a_stop_and_by_the_last_probe(queue, experiment):
    class Claim:
        asked = True

        def stop_asked(self):
            return self.asked

    claim, signals = Claim(), Signals()
    assert queue.settle(claim, signals), "nothing is left"
    queue.take(publish(experiment, 4))
    assert not queue.settle(claim, signals) and queue.left == [4]
    assert "waiting for the probes of steps 4" in said(experiment)
    claim.asked = False
    queue._running[1].kill()
    assert queue.settle(claim, signals) and queue.left == []
    lines = recorded(experiment.folder)
    assert [line["error"] for line in lines] == ["exit status -9: it said nothing"] * 2


def test_a_probe_that_a_signal_to_the_whole_job_has_stopped_is_left_to_the_next_start(queue, experiment):
    probes._FINETUNE.write_text("raise SystemExit(143)")
    queue.take(publish(experiment, 4))
    queue._running[1].wait(timeout=60)
    queue.look()
    assert recorded(experiment.folder) == [] and queue.left == []
    assert "the probe of step 4 was stopped; the next start makes up for it" in said(experiment)
    queue.begin(queue._monitor, found=Found(experiment.folder / "checkpoints" / "step-0000004", 4))
    assert queue.left == [4]


def test_a_checkpoint_whose_start_died_before_it_was_kept_is_probed_by_the_next(queue, experiment):
    queue.begin(queue._monitor, found=Found(publish(experiment, 8), 8))
    assert queue.left == [8]
    queue.begin(queue._monitor, found=None)
    assert queue.left == [], "the run begins anew, after a roll-back say"


def test_a_probe_sees_nothing_of_its_runs_launch_and_only_its_device():
    told = {
        "RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "SLURM_NTASKS": "8",
        "TORCHELASTIC_RUN_ID": "x", "EARLYBERT_FAULTS": "kill@step.data", "DS_ACCELERATOR": "cuda",
        "CUDA_VISIBLE_DEVICES": "0,1", "PATH": "/bin", "HF_HOME": "/h",
    }  # fmt: skip
    own = {"PATH": "/bin", "HF_HOME": "/h"}
    cpu = {**own, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    assert probes.surroundings(told, device="cpu") == cpu
    assert probes.surroundings(told, device="7") == {**own, "CUDA_VISIBLE_DEVICES": "7"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tasks": ["rtee"]}, "tasks: 'rtee' is not a task of GLUE; choose among cola, sst2"),
        ({"tasks": ["squad"]}, "tasks: 'squad' is not a task of GLUE"),
        ({"tasks": ["rte", "rte"]}, "name each once"),
        ({"tasks_every": 0}, "tasks_every = 0: must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_named(values, says):
    with pytest.raises(SettingsError, match=says):
        parse(EvaluateSettings, values, where="here")


def test_what_would_make_each_probe_fail_is_said_before_the_run(experiment, tmp_path, monkeypatch):
    def changed(**changes):
        return replace(experiment, evaluate=replace(experiment.evaluate, **changes))

    monkeypatch.setattr(probes.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match='tasks_device = "7": no GPU is here'):
        probes._check(changed(tasks_device="7"), tokenizer=tmp_path)
    (tmp_path / "ds.json").write_text(
        json.dumps({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}})
    )
    (tmp_path / "tune.toml").write_text('name = "n"\nmodel = "m"\ndeepspeed = "ds.json"\n')
    own = changed(tasks_experiment=str(tmp_path / "tune.toml"))
    with pytest.raises(SettingsError, match="its DeepSpeed JSON enables fp16, which is for GPUs"):
        probes._check(own, tokenizer=tmp_path)
    (tmp_path / "ds.json").write_text("{}")
    short = replace(own, model=replace(own.model, positions=64))
    with pytest.raises(
        SettingsError, match="rte has sequence_length = 128, model.positions is 64; set recipe"
    ):
        probes._check(short, tokenizer=tmp_path)


def test_a_probe_is_of_the_lowest_priority_and_has_one_core_beside_ranks_on_the_cpu(
    queue, experiment, monkeypatch
):
    monkeypatch.setattr(probes.torch.cuda, "is_available", lambda: False)
    queue.take(publish(experiment, 4))
    process = psutil.Process(queue._running[1].pid)
    for _ in range(200):
        if process.nice() == 19 and "sleep.py" in " ".join(process.cmdline()):
            break
        time.sleep(0.05)
    assert process.nice() == 19 and len(process.cpu_affinity()) == 1


def test_a_probe_dies_with_a_run_that_is_killed(tmp_path):
    (tmp_path / "run.py").write_text(
        "import os, subprocess, sys, time\n"
        "python, program = sys.argv[1:3]\n"
        "probe = [python, '-c', 'import time; time.sleep(600)']\n"
        "command = [python, program, str(os.getpid()), '1', *probe]\n"
        "print(subprocess.Popen(command, start_new_session=True).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, tmp_path / "run.py", sys.executable, probe_process.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        try:
            probe = psutil.Process(int(run.stdout.readline()))
            deadline = time.monotonic() + 60
            # Nothing, or the run's own words, before it is what it becomes.
            while not (words := probe.cmdline()) or "sleep(600)" not in words[-1] or str(run.pid) in words:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            run.kill()
    probe.wait(timeout=30)
    assert not probe.is_running()
