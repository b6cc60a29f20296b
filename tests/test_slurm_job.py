"""The job of scripts/slurm against a pretended Slurm: what goes back into the queue, and what ends."""

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "slurm" / "pretrain.sbatch"
WAITING = 'trap "exit 143" USR1; echo $$ > srun.pid; for _ in {1..1000}; do sleep 0.02; done'
PROGRAMS = {
    "scancel": "kill -USR1 $(cat srun.pid)",
    "scontrol": """[ "$1" = requeue ] && echo "$@" >> asked
[ -e preempted ] || exit 1
echo " PreemptTime=$(cat preempted) Preempt\"""",
}


class Job:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").touch()
        (folder / "preempted").write_text("None")

    def start(self, srun: str, **environment: str) -> subprocess.Popen[str]:
        for name, text in {**PROGRAMS, "srun": srun}.items():
            (self.folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (self.folder / name).chmod(0o755)
        own = {
            **os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "here", **environment,
        }  # fmt: skip
        command = ["bash", str(SCRIPT), "e.toml"]
        return subprocess.Popen(command, cwd=self.folder, env=own, stdout=subprocess.PIPE, text=True)

    def run(self, srun: str, **environment: str) -> tuple[int, str]:
        """Exit status and what it said."""
        job = self.start(srun, **environment)
        said, _ = job.communicate(timeout=30)
        return job.returncode, said

    @property
    def requeued(self) -> bool:
        return (self.folder / "asked").exists()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_run_that_its_stop_file_ends_is_not_put_back(job: Job) -> None:
    code, said = job.run("exit 143")
    assert code == 143 and not job.requeued
    assert "the run was stopped, not preempted; the same submission goes on from its checkpoint" in said


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_run_that_slurm_ends_through_the_script_is_put_back(job: Job, signal: str) -> None:
    started = job.start(WAITING)
    while not (job.folder / "srun.pid").exists():
        time.sleep(0.02)
    subprocess.run(["kill", f"-{signal}", str(started.pid)], check=True)
    said, _ = started.communicate(timeout=30)
    assert job.requeued and "stopped after a checkpoint; back into the queue" in said


def test_a_run_whose_tasks_alone_were_told_of_a_preemption_is_put_back(job: Job) -> None:
    _, said = job.run("echo 2026-01-02T03:04:05 > preempted; exit 143")
    assert job.requeued and "stopped after a checkpoint; back into the queue" in said


def test_where_slurm_does_not_say_whether_it_was_a_preemption_the_run_is_put_back(job: Job) -> None:
    job.run("rm preempted; exit 143")
    assert job.requeued


def test_a_run_that_was_preempted_once_still_ends_by_its_stop_file(job: Job) -> None:
    (job.folder / "preempted").write_text("2026-01-02T03:04:05")
    code, _ = job.run("exit 143", SLURM_RESTART_COUNT="1")
    assert code == 143 and not job.requeued


@pytest.mark.parametrize(("code", "back"), [(0, False), (2, False), (1, False), (75, True), (137, True)])
def test_a_lost_rank_is_put_back_and_a_mistake_is_not(job: Job, code: int, back: bool) -> None:
    found, _ = job.run(f"exit {code}")
    assert (found == 0 if back else found == code) and job.requeued == back


def test_the_fiftieth_restart_is_the_last(job: Job) -> None:
    code, said = job.run("exit 75", SLURM_RESTART_COUNT="49")
    assert code == 75 and not job.requeued and "lost a rank for the 50th time; not started again" in said
