"""Pull plugs: run an experiment under kills, hangs, full disks and damaged checkpoints, and compare it with
the unbroken run to the last bit.

    python scripts/torture.py [--kills 60] [--seed 0] [--ranks 2] [--stage 0-3] [--out DIR] [--report FILE]

A tiny EarlyBERT (search, draw, two phases, evaluations, background saves) is trained once without a fault.
Then runs of it meet one fault after the other, the same command being started again each time, until they
finish; their metrics, ticket and last checkpoint must equal the unbroken run's, and what was wrong must have
been named in words. A fault counts where it was met (a run may be over before). Prints a table; exit status
1 where anything differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from breaking import damage
from breaking.comparison import differences

ROOT = Path(__file__).resolve().parent.parent
LOST = 75
STEPS, DRAWN = 30, 12
EXPERIMENT = f"""
deepspeed = "deepspeed.json"
seed = 5
log_every = 2
hang_seconds = 8
model = {{ layers = 2, hidden = 32, heads = 4, neurons = 48, positions = 32 }}
data = {{ corpus = "corpus", held_out = 0.1 }}
ticket = {{ every = 3, minimum_step = 12, latest_step = {DRAWN}, neuron_multiple = 1, minimum_neurons = 1 }}
evaluate = {{ every = 7, samples = 8 }}
checkpoint = {{ every = 3, keep = 3 }}
[[phases]]
steps = 22
sequence_length = 16
batch = 8
micro_batch = 2
learning_rate = 3e-3
[[phases]]
steps = {STEPS - 22}
sequence_length = 32
batch = 4
micro_batch = 2
learning_rate = 1e-3
"""


@dataclass
class Fault:
    """One thing that goes wrong, and what the run must say of it."""

    kind: str
    armed: str = ""
    """EARLYBERT_FAULTS of this start."""
    act: Callable[[Start], bool] | None = None
    """Done to a running start; whether it still ran."""
    damage: damage.Damage | None = None
    """Done to the checkpoints between two starts."""
    says: str = ""
    """What this start says when it meets the fault."""
    codes: tuple[int, ...] = ()
    """How a rank may end, besides with 0, LOST, 143 and by SIGKILL."""


@dataclass
class Tally:
    """What came of one kind of fault."""

    times: int = 0
    problems: list[str] = field(default_factory=list)


class Start:
    """One start of the command: `ranks` processes with a common log."""

    def __init__(self, folder: Path, name: str, *, ranks: int, armed: str = "") -> None:
        from earlybert.lifecycle import free_port

        self.folder, self.run = folder, folder / "runs" / name
        self.log_path = folder / f"{name}.log"
        self._begin = self.log_path.stat().st_size if self.log_path.exists() else 0
        shared = {
            **os.environ,
            "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "EARLYBERT_FAULTS": armed,
            "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), "experiment.toml", f"name={name}"]
        self.processes = []
        with open(self.log_path, "ab") as log:
            for rank in range(ranks):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.processes.append(subprocess.Popen(command, cwd=folder, env=own, stdout=log, stderr=log))

    def alive(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes; where a rank has ended badly the others get a minute, as a launcher would give them."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            if any(process.poll() for process in self.processes):
                deadline = min(deadline, time.monotonic() + 60)
                break
            time.sleep(0.05)
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        return [process.wait() for process in self.processes]

    def said(self) -> str:
        with open(self.log_path, "rb") as log:
            log.seek(self._begin)
            return log.read().decode(errors="replace")

    def wait_for_step(self, step: int) -> None:
        """Until this start has told of a step not before `step`; 0 does not wait."""
        while (
            step
            and self.alive()
            and not any(int(n) >= step for n in re.findall(r"\nstep +(\d+)/", self.said()))
        ):
            time.sleep(0.005)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="torture.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="faults in all")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="chooses faults and moments")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="ZeRO stage")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the runs there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table there as Markdown")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.out or Path(temporary)).resolve()
        prepare(folder, stage=arguments.stage, precision=arguments.precision)
        began = time.perf_counter()
        tallies, starts = torture(folder, arguments)
        seconds = time.perf_counter() - began
    problems = [problem for tally in tallies.values() for problem in tally.problems]
    total = sum(tally.times for tally in tallies.values())
    summary = (
        f"{total} faults in {starts} starts, {seconds:.0f} s, seed {arguments.seed}, {arguments.ranks} "
        f"ranks, ZeRO-{arguments.stage}, {arguments.precision}: {len(problems)} differences"
    )
    print("\n".join([table(tallies), "", summary, *problems]))
    if arguments.report:
        command = f"python scripts/torture.py {' '.join(sys.argv[1:])}"
        text = f"# Plugs pulled\n\nWritten by `{command}`.\n\n{summary}.\n\n{table(tallies)}\n"
        arguments.report.write_text(text)
    return 1 if problems else 0


def prepare(folder: Path, *, stage: int, precision: str) -> None:
    """The corpus, the experiment, the unbroken run, and a checkpoint of another experiment."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = f"text:{ROOT}/docs/*.md"
    command = [sys.executable, str(ROOT / "scripts" / "prepare.py"), texts, "--out", "corpus", "--vocab-size"]
    subprocess.run([*command, "600", "--tasks", "2"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    mechanics: dict[str, object] = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}}
    if precision != "fp32":
        mechanics[precision] = {"enabled": True}
    (folder / "deepspeed.json").write_text(json.dumps(mechanics))
    (folder / "experiment.toml").write_text('name = "unbroken"\n' + EXPERIMENT)


def torture(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Tally], int]:
    """Run after run, each under several faults, until there were enough."""
    chance = random.Random(arguments.seed)
    ranks = arguments.ranks
    began = time.perf_counter()
    whole = Start(folder, "unbroken", ranks=ranks)
    if whole.wait() != [0] * ranks:
        raise SystemExit(f"the unbroken run failed:\n{whole.said()}")
    length = time.perf_counter() - began
    foreign = folder / "foreign"
    newest = damage.newest_sound(folder / "runs" / "unbroken")
    assert newest is not None
    shutil.copytree(newest, foreign)
    tallies: dict[str, Tally] = {}
    starts, number, left = 1, 0, arguments.kills
    deck: list[Callable[[], Fault]] = []
    while left > 0:
        number += 1
        name = f"broken-{number}"
        owed: list[tuple[str, str]] = []
        met: list[str] = []
        for _ in range(chance.randint(2, 5)):
            if not deck:  # every kind once before any comes again
                deck = kinds(chance, ranks, length, foreign)
                chance.shuffle(deck)
            kind = deck.pop()
            fault = kind()
            starts += 1
            start = Start(folder, name, ranks=ranks, armed=fault.armed)
            hit = fault.act(start) if fault.act is not None else True
            codes = start.wait()
            said = start.said()
            check_said(start, owed, tallies)
            if fault.armed:
                hit = fault.says in said if fault.says else -signal.SIGKILL in codes
            if fault.damage is not None:
                done, expected = fault.damage(start.run, chance)
                hit = done
                if expected:
                    owed.append((fault.kind, expected))
            if not hit:  # the run was over before; this kind comes later
                deck.insert(0, kind)
                if codes == [0] * ranks:
                    break
                continue
            left -= 1
            met.append(f"{fault.kind} {fault.armed}".strip())
            tally = tallies.setdefault(fault.kind, Tally())
            tally.times += 1
            if "Traceback" in said and "a fault armed" not in said:
                tally.problems.append(f"{name}, {met[-1]}: ended in a traceback")
            if not {0, LOST, 143, -signal.SIGKILL, *fault.codes}.issuperset(codes):
                tally.problems.append(f"{name}, {met[-1]}: ended with {codes}")
        starts += 1
        last = Start(folder, name, ranks=ranks)
        codes = last.wait()
        check_said(last, owed, tallies)
        wrong = differences(folder / "runs" / "unbroken", last.run)
        if codes != [0] * ranks:
            wrong.insert(0, f"the last start ended with {codes}: {last.said()[-600:]}")
        for problem in wrong:
            tallies.setdefault("the whole run", Tally()).problems.append(
                f"{name} after {'; '.join(met)}: {problem}"
            )
        told = f"{len(wrong)} DIFFERENCES" if wrong else "equal"
        print(f"{name}: {told} after {'; '.join(met) or 'nothing'}", flush=True)
        if not wrong and arguments.out is None and last.run.exists():
            shutil.rmtree(last.run)
    return tallies, starts


def check_said(start: Start, owed: list[tuple[str, str]], tallies: dict[str, Tally]) -> None:
    """What damage was done before this start must be named by it."""
    said = start.said()
    for kind, expected in list(owed):
        if expected in said:
            owed.remove((kind, expected))
        elif "from its seed" in said or "; step " in said:  # it looked and went on
            tallies[kind].problems.append(f"{start.run.name}: {expected!r} was not said")
            owed.remove((kind, expected))


# --- the faults ---


def kinds(chance: random.Random, ranks: int, length: float, foreign: Path) -> list[Callable[[], Fault]]:
    """Every kind of fault, as functions that choose its moment."""

    def victim() -> int:
        return chance.randrange(ranks)

    def kill(*, everyone: bool, step: int) -> Fault:
        """At any moment of the start, or a moment after a step."""
        delay, rank = chance.uniform(0, 0.2 if step else length), victim()

        def act(start: Start) -> bool:
            start.wait_for_step(step)
            time.sleep(delay)
            chosen = start.processes if everyone else [start.processes[rank]]
            running = [process for process in chosen if process.poll() is None]
            for process in running:
                process.kill()
            return bool(running)

        whom = "all ranks" if everyone else "one rank"
        return Fault(f"SIGKILL of {whom}, {'while training' if step else 'at any moment'}", act=act)

    def some_step() -> int:
        return chance.randrange(1, STEPS - 4)

    def armed(action: str, point: str, kind: str, says: str = "", *, latest: int = 3) -> Fault:
        codes = {"fail": (1,), "full": (2,)}  # no room for the last save of all ends the start
        rank = 0 if point in ("save.manifest", "save.rename", "save.latest", "save.retention") else victim()
        return Fault(
            kind,
            armed=f"{action}@{point}#{chance.randint(1, latest)}:{rank}",
            says=says,
            codes=codes.get(action, ()),
        )

    def terminate() -> Fault:
        step, delay = some_step(), chance.uniform(0, 0.1)

        def act(start: Start) -> bool:
            start.wait_for_step(step)
            time.sleep(delay)
            running = start.alive()
            for process in start.processes:  # as the launcher does: the next one when this one is gone
                process.terminate()
                deadline = time.monotonic() + 30
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.02)
                process.kill()
            return running

        # Before the ranks listen to it, it ends them at once.
        return Fault("SIGTERM, one rank after the other", act=act, codes=(-signal.SIGTERM,))

    def stopped() -> Fault:
        step, rank = some_step(), victim()

        def act(start: Start) -> bool:
            start.wait_for_step(step)
            running = start.alive()
            start.processes[rank].send_signal(signal.SIGSTOP)
            others = [p for number, p in enumerate(start.processes) if number != rank]
            deadline = time.monotonic() + 60
            while any(p.poll() is None for p in others) and time.monotonic() < deadline:
                time.sleep(0.05)
            start.processes[rank].kill()
            return running and "does not answer" in start.said()

        return Fault("a rank that does not answer (SIGSTOP)", act=act)

    def damaged(kind: str, how: damage.Damage) -> Fault:
        return Fault(kind, act=kill(everyone=True, step=some_step()).act, damage=how)

    saves = ("save.snapshot", "save.shard", "save.manifest", "save.rename", "save.latest", "save.retention")
    draws = ("draw.read", "draw.tear_down", "draw.build", "draw.initialize")
    return [
        lambda: kill(everyone=False, step=0),
        lambda: kill(everyone=True, step=0),
        lambda: kill(everyone=False, step=some_step()),
        lambda: kill(everyone=True, step=some_step()),
        *[lambda point=point: armed("kill", point, f"SIGKILL inside a save ({point})") for point in saves],
        *[
            lambda point=point: armed("kill", point, f"SIGKILL inside the draw ({point})", latest=1)
            for point in draws
        ],
        terminate,
        lambda: armed("hang", "step.data", "a rank that hangs", "the run stands still: rank", latest=20),
        stopped,
        lambda: armed("full", "save.shard", "no space left for a rank's file", "could not write"),
        lambda: armed("full", "save.manifest", "no space left for the manifest", "could not write the manif"),
        lambda: armed("fail", "draw.build", "an error inside the draw", "a fault armed at", latest=1),
        lambda: damaged("a truncated file", damage.truncated),
        lambda: damaged("a flipped bit in a file", damage.flipped),
        lambda: damaged("a flipped bit in the manifest", damage.flipped_manifest),
        lambda: damaged("a missing file", damage.missing),
        lambda: damaged("two ranks' files swapped", damage.swapped),
        lambda: damaged("`latest` names nothing", damage.latest_broken),
        lambda: damaged("a manifest of another run", lambda run, chance: damage.planted(run, foreign)),
        lambda: damaged("a half-written save left behind", damage.left_behind),
    ]


def table(tallies: dict[str, Tally]) -> str:
    rows = ["| fault | times | differences |", "|---|---|---|"]
    rows += [f"| {kind} | {t.times} | {len(t.problems)} |" for kind, t in sorted(tallies.items())]
    return "\n".join(rows)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main())
