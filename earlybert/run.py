"""The run folder: what stands in it before the first step, and the refusal of a folder that holds something
else.

`experiment.toml`, `deepspeed.json` and `environment.json` say what ran. A start is refused where the folder
belongs to another experiment or another corpus; settings that only watch a run (logging, evaluation,
checkpoints) may change.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from earlybert import dist
from earlybert.config import EarlyBertError, SettingsError, as_dict, to_toml, write_atomically
from earlybert.experiment import Experiment


def claim(experiment: Experiment, mechanics: dict[str, Any], *, corpus: str, where: str) -> Path:
    """Make or re-enter the run folder and return it. Collective.

    `corpus`: fingerprint of the corpus; `where`: the experiment file's name for messages. Raises
    EarlyBertError on every rank where the folder holds another experiment, another corpus or something that
    is not a run.
    """
    problem = _problem(experiment, corpus=corpus, where=where) if dist.rank() == 0 else None
    problem = dist.from_rank_0(problem)
    if problem is not None:
        raise EarlyBertError(problem)
    if dist.rank() == 0:
        _describe(experiment, mechanics, corpus=corpus)
    return experiment.folder


def check_cores() -> None:
    """Raise SettingsError where CPU processes outnumber the cores; give each process its share of threads."""
    if torch.cuda.is_available():
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.world_size())
    cores = len(os.sched_getaffinity(0))
    if local > cores:
        raise SettingsError(
            f"{local} processes on {cores} CPU cores would wait for each other; start at most {cores} "
            f"(deepspeed --num_accelerators {cores})"
        )
    torch.set_num_threads(max(1, cores // local))


def _problem(experiment: Experiment, *, corpus: str, where: str) -> str | None:
    folder = experiment.folder
    stamp = folder / "environment.json"
    if not stamp.exists():
        if folder.exists() and any(folder.iterdir()):
            return f"{folder} exists and is not a run folder; choose another name or remove it"
        return None
    try:
        stated = json.loads(stamp.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{stamp} cannot be read ({error}); restore it or choose another name"
    if stated.get("experiment") != experiment.fingerprint:
        return (
            f"{folder} holds another experiment than {where} with these overrides (compare its "
            f"experiment.toml); give this one another name, such as name={experiment.name}-2"
        )
    if stated.get("corpus") != corpus:
        return (
            f"{folder} was trained on another corpus than {experiment.data.corpus}; restore that corpus or "
            f"give this run another name, such as name={experiment.name}-2"
        )
    return None


def _describe(experiment: Experiment, mechanics: dict[str, Any], *, corpus: str) -> None:
    folder = experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "experiment.toml", to_toml(as_dict(experiment)))
    write_atomically(folder / "deepspeed.json", json.dumps(mechanics, indent=2) + "\n")
    environment = {
        "experiment": experiment.fingerprint,
        "corpus": corpus,
        "command": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "world_size": dist.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    write_atomically(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def _git_commit() -> str | None:
    """The commit of this program's own checkout, or None where it is not one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
