"""A Slurm of one node with its own keys, ports and folders: `with Slurm(folder) as slurm:
slurm.run("sinfo")`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from earlybert.lifecycle import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIG = """ClusterName=one
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
NodeName={host} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    if os.geteuid() != 0:
        return "needs root to start slurmd"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else None


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        values = {"host": socket.gethostname(), "controller": free_port(), "daemon": free_port()}
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, **values))
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        munge = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid",
                 "log-file": "munged.log", "seed-file": "seed"}  # fmt: skip
        options = [f"--{key}={self.folder / value}" for key, value in munge.items()]
        try:
            self._start("munged", "--foreground", "--force", *options)
            while not (self.folder / "munge.socket").exists():
                time.sleep(0.05)
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D")
            deadline = time.monotonic() + 30
            while "idle" not in self.run("sinfo"):
                ended = any(daemon.poll() is not None for daemon in self._daemons)
                if ended or time.monotonic() > deadline:
                    raise RuntimeError("\n".join(p.read_text() for p in self.folder.glob("*.log")))
                time.sleep(0.2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait()

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What a Slurm command says."""
        own = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **environment}
        done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def _start(self, *command: str) -> None:
        own = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        with open(self.folder / f"{command[0]}.out", "wb") as log:
            self._daemons.append(subprocess.Popen(command, env=own, stdout=log, stderr=log))
