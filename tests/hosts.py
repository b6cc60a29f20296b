"""Several hosts on one machine: a network namespace, a name and an sshd each, on a bridge of their own.

    with Hosts(folder, "host-a", "host-b") as hosts:
        hosts.start("host-a", ["deepspeed", ...])

All hosts see the same files. `ip netns exec` lays /etc/netns/NAME over /etc, which gives each its own
/etc/hosts and /etc/ssh. Needs root, iproute2 and openssh; `missing()` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, Any

SSH_CONFIG = """Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SSHD_CONFIG = """Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
UseDNS no
PidFile none
"""


def missing(*programs: str) -> str | None:
    """Why hosts cannot be made here, or None; `programs` are asked for besides."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    absent = [name for name in ("ip", "sshd", "ssh", "ssh-keygen", *programs) if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: iproute2, openssh-server, pdsh)"
    probe = subprocess.run(["ip", "netns", "add", "earlybert-probe"], capture_output=True, text=True)
    if probe.returncode:
        return f"cannot make a network namespace: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "earlybert-probe"], check=True)
    return None


class Hosts:
    """Hosts by name, 10.83.0.11 and up."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self.names = folder, names
        self._mark = f"eb{os.getpid() % 100000}"
        self._sshd: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self.kill(name)
        for process in self._sshd:
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / self._space(name), ignore_errors=True)
        subprocess.run(["ip", "link", "del", self._mark], capture_output=True)

    def start(
        self, name: str, command: list[str], *, log: IO[Any], **environment: str
    ) -> subprocess.Popen[bytes]:
        """Run a command on a host."""
        own = {**os.environ, **environment}
        return subprocess.Popen(
            self._on(name, command), stdout=log, stderr=log, env=own, cwd=self.folder, start_new_session=True
        )

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to every process of a host but its sshd, as if it had lost its power; how many."""
        done = subprocess.run(["ip", "netns", "pids", self._space(name)], capture_output=True, text=True)
        killed = 0
        for pid in map(int, done.stdout.split()):
            with contextlib.suppress(OSError):
                if b"sshd" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                    os.kill(pid, number)
                    killed += 1
        return killed

    def _space(self, name: str) -> str:
        return f"{self._mark}-{name}"

    def _on(self, name: str, command: list[str]) -> list[str]:
        # A core each, as machines have their own: their processes would wait for each other otherwise.
        cores = sorted(os.sched_getaffinity(0))
        own = ["taskset", "-c", str(cores[self.names.index(name) % len(cores)])]
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
        return ["ip", "netns", "exec", self._space(name), *own, *named, *command]

    def _make(self) -> None:
        _run("ip", "link", "add", self._mark, "type", "bridge")
        _run("ip", "addr", "add", "10.83.0.1/24", "dev", self._mark)
        _run("ip", "link", "set", self._mark, "up")
        for key in ("key", "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        os.makedirs("/run/sshd", exist_ok=True)
        addresses = {name: f"10.83.0.{11 + number}" for number, name in enumerate(self.names)}
        table = "127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for name, a in addresses.items())
        for number, name in enumerate(self.names):
            space, outer = self._space(name), f"{self._mark}v{number}"
            etc = Path("/etc/netns") / space
            (etc / "ssh").mkdir(parents=True)
            (etc / "hosts").write_text(table)
            (etc / "resolv.conf").write_text("")
            (etc / "ssh" / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
            (etc / "ssh" / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", outer, "master", self._mark)
            _run("ip", "link", "set", outer, "up")
            _run("ip", "-n", space, "addr", "add", f"{addresses[name]}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _run("ip", "-n", space, "link", "set", device, "up")
            log = open(self.folder / f"sshd-{name}.log", "wb")  # noqa: SIM115 - sshd's, for its life
            self._sshd.append(subprocess.Popen(self._on(name, ["/usr/sbin/sshd", "-D", "-e"]), stderr=log))
        for name in self.names:
            self._wait_for_ssh(name)

    def _wait_for_ssh(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while subprocess.run(self._on(self.names[0], ["ssh", name, "true"]), capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"sshd of {name} does not answer: {self._log_of(name)}")
            time.sleep(0.1)

    def _log_of(self, name: str) -> str:
        return (self.folder / f"sshd-{name}.log").read_text(errors="replace")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
