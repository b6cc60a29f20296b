"""Two hosts that are really two to the network, and a real Slurm: started, killed, started again."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import hosts
import pytest
from test_pretrain import EXPERIMENT, PRETRAIN, ROOT, Folder, told

import slurm
from earlybert.watch import LOST

SCRIPTS = Path(sys.executable).parent
STEPS = ["phases.0.steps=40", "hang_seconds=20", "data.workers=1"]
ENVIRONMENT = "DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n"
FIRST_STEP_SECONDS = 30
IMPORT_SECONDS = 3  # that both hosts need for PyTorch and DeepSpeed on a machine at which the 30 were set

pytestmark = pytest.mark.multinode
on_two_hosts = pytest.mark.skipif(hosts.missing("pdsh") is not None, reason=str(hosts.missing("pdsh")))
under_slurm = pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))


class Cluster:
    """Two hosts over one folder with an experiment, and an unbroken run of both."""

    def __init__(self, folder: Path, network: hosts.Hosts) -> None:
        self.path, self.network = folder, network
        self.runs = Folder(folder, stage=2, precision="bf16")
        (folder / ".deepspeed_env").write_text(ENVIRONMENT)

    def deepspeed(self, name: str, *names: str) -> tuple[object, Path]:
        """Start through pdsh from host-a on the named hosts."""
        hostfile, log = self.path / f"hostfile-{len(names)}", self.path / f"{name}.txt"
        hostfile.write_text("".join(f"{host} slots=1\n" for host in names))
        command = [str(SCRIPTS / "deepspeed"), "--hostfile", str(hostfile), "--force_multi"]
        command += ["--master_addr", "host-a", str(PRETRAIN), "e.toml", f"name={name}", *STEPS]
        path = f"{SCRIPTS}:{os.environ['PATH']}"
        with open(log, "ab") as file:
            process = self.network.start("host-a", command, log=file, DS_ACCELERATOR="cpu", PATH=path)
        return process, log

    def run_with_torchrun(self, name: str) -> None:
        """Without ssh: one command on each host, to the end."""
        command = [str(SCRIPTS / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1"]
        command += ["--master_addr", "host-a", "--master_port", "29517", "--node_rank"]
        rest = [str(PRETRAIN), "e.toml", f"name={name}", *STEPS]
        environment = dict(line.split("=") for line in ENVIRONMENT.split())
        with open(self.path / f"{name}.txt", "ab") as log:
            nodes = [
                self.network.start(host, [*command, str(rank), *rest], log=log, **environment)
                for rank, host in enumerate(self.network.names)
            ]
        self.torchrun = [node.wait(timeout=120) for node in nodes]

    def wait_for_step(self, name: str, step: int, process) -> float:
        """Seconds until a step of a run is logged."""
        began = time.monotonic()
        while not any(line["step"] >= step for line in self.runs.metrics(name)):
            assert process.poll() is None and time.monotonic() < began + 120, self.said(name)
            time.sleep(0.05)
        return time.monotonic() - began

    def slowness(self) -> float:
        """How much longer than IMPORT_SECONDS both hosts need, now; 1 where they are as fast."""
        began = time.monotonic()
        with open(self.path / "imports.txt", "ab") as log:
            command = [sys.executable, "-c", "import deepspeed, transformers"]
            starts = [
                self.network.start(host, command, log=log, DS_ACCELERATOR="cpu")
                for host in self.network.names
            ]
        assert [host.wait(timeout=120) for host in starts] == [0, 0]
        return max(1.0, (time.monotonic() - began) / IMPORT_SECONDS)

    def said(self, name: str) -> str:
        return (self.path / f"{name}.txt").read_text(errors="replace")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    with hosts.Hosts(folder, "host-a", "host-b") as network:
        made = Cluster(folder, network)
        made.run_with_torchrun("unbroken")
        yield made


@pytest.fixture(scope="module")
def interrupted(cluster):
    """A run on both hosts, one of which lost its power after the draw; kept as it lies there."""
    slowness = cluster.slowness()
    process, _ = cluster.deepspeed("two", "host-a", "host-b")
    seconds = cluster.wait_for_step("two", 1, process)
    assert seconds < FIRST_STEP_SECONDS * slowness, cluster.said("two")
    print(f"first step on two hosts after {seconds:.1f} s, {slowness:.1f} times the usual imports")
    cluster.wait_for_step("two", 12, process)  # the ticket is drawn at step 6
    assert cluster.network.kill("host-b") >= 1
    assert process.wait(timeout=90) != 0
    cluster.network.kill("host-a")
    shutil.copytree(cluster.path / "runs" / "two", cluster.path / "kept")
    return cluster


@on_two_hosts
def test_two_hosts_train_through_pdsh_lose_one_and_go_on_to_the_same_end(interrupted):
    said = interrupted.said("two")
    assert "rank 1 on host-b is gone" in said and "the same command goes on" in said, said
    process, _ = interrupted.deepspeed("two", "host-a", "host-b")
    assert process.wait(timeout=120) == 0, interrupted.said("two")
    assert "from runs/two/checkpoints" in interrupted.said("two").replace(f"{interrupted.path}/", "")
    assert told(interrupted.runs.metrics("two")) == told(interrupted.runs.metrics("unbroken"))
    print(interrupted.said("two"))


@on_two_hosts
def test_a_node_that_is_missing_at_the_restart_is_done_without(interrupted):
    shutil.copytree(interrupted.path / "kept", interrupted.path / "runs" / "alone")
    process, _ = interrupted.deepspeed("alone", "host-a")
    assert process.wait(timeout=120) == 0, interrupted.said("alone")
    assert "saved by 2 ranks at ZeRO-2: the same samples and masks go on" in interrupted.said("alone")
    lines = [interrupted.runs.metrics(name) for name in ("alone", "unbroken")]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert lines[0][-1]["eval_loss"] == pytest.approx(lines[1][-1]["eval_loss"], rel=2e-3), "in bf16"


@on_two_hosts
def test_torchrun_starts_the_same_command_on_two_nodes(cluster):
    assert cluster.torchrun == [0, 0], cluster.said("unbroken")
    assert [line["step"] for line in cluster.runs.metrics("unbroken")] == list(range(45))


@under_slurm
def test_a_slurm_job_is_preempted_goes_back_into_the_queue_and_ends_like_an_unbroken_run(tmp_path):
    folder = Folder(tmp_path, stage=2, precision="bf16")
    words = ["phases.0.steps=60", "data.workers=1"]
    assert folder.run("name=unbroken", *words) == [0, 0], folder.log()
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "slurm").mkdir()
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "job.txt"
    small = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
    script = str(ROOT / "scripts" / "slurm" / "pretrain.sbatch")
    with slurm.Slurm(tmp_path / "slurm") as cluster:
        said = cluster.run(
            "sbatch", *small, "--output", str(log), script, "e.toml", "name=job", *words,
            cwd=tmp_path, **environment,
        )  # fmt: skip
        job = said.split()[-1]
        wait(lambda: any(line["step"] >= 8 for line in folder.metrics("job")), log)
        cluster.run("scancel", "--signal=USR1", "--batch", job)  # as before the time limit
        wait(lambda: "Restarts=1" in cluster.run("scontrol", "show", "job", job), log)
        assert "stopped after a checkpoint; back into the queue" in log.read_text()
        wait(lambda: "JobState=PENDING" in cluster.run("scontrol", "show", "job", job), log)
        # Put back, a job waits two minutes; within a second of its end it would be refused as revoked.
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
        wait(lambda: "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", job), log)
    assert "start 2 of job" in log.read_text() and "2 ranks" in log.read_text()
    assert told(folder.metrics("job")) == told(folder.metrics("unbroken"))


def wait(done, log: Path) -> None:
    deadline = time.monotonic() + 90
    while not done():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)


assert EXPERIMENT["ticket"]["latest_step"] == 6 and LOST == 75, "what the steps above count on"
