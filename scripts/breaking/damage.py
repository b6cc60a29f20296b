"""What spoils a run's checkpoints between two starts, and what the next start must say of it."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

FOREIGN = "0" * 64
"""Of an experiment that no run here is."""
Damage = Callable[[Path, random.Random], tuple[bool, str]]
"""Spoils a run's newest checkpoint; whether there was one, and what the next start must say."""


def newest_sound(run: Path) -> Path | None:
    """The newest sound checkpoint of this experiment."""
    # Here, as everywhere in scripts: importing PyTorch takes seconds that `--help` need not.
    from earlybert import checkpoint
    from earlybert.config import EarlyBertError

    for name in checkpoint.names(run / "checkpoints"):
        path = run / "checkpoints" / name
        try:
            manifest = checkpoint.read_manifest(path)
        except EarlyBertError:
            continue
        if manifest.experiment != FOREIGN and not checkpoint.flaws(path, manifest):
            return path
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncated(run: Path, chance: random.Random) -> tuple[bool, str]:
    if (newest := newest_sound(run)) is None:
        return False, ""
    path = chance.choice(_files(newest))
    os.truncate(path, chance.randrange(path.stat().st_size))
    return True, f"{newest.name} is not used: {path.name} has"


def flipped(run: Path, chance: random.Random) -> tuple[bool, str]:
    if (newest := newest_sound(run)) is None:
        return False, ""
    path = chance.choice(_files(newest))
    _flip(path, chance.randrange(path.stat().st_size), chance)
    return True, f"{newest.name} is not used: {path.name} does not match its sha256"


def flipped_manifest(run: Path, chance: random.Random) -> tuple[bool, str]:
    if (newest := newest_sound(run)) is None:
        return False, ""
    path = newest / "manifest.json"
    digits = [i for i, byte in enumerate(path.read_bytes()) if chr(byte).isdigit()]
    _flip(path, chance.choice(digits), random.Random(0))
    return True, f"{newest.name} is not used: "


def missing(run: Path, chance: random.Random) -> tuple[bool, str]:
    if (newest := newest_sound(run)) is None:
        return False, ""
    path = chance.choice(_files(newest))
    path.unlink()
    return True, f"{newest.name} is not used: {path.name} is missing"


def swapped(run: Path, chance: random.Random) -> tuple[bool, str]:
    if (newest := newest_sound(run)) is None or len(_files(newest)) < 2:
        return False, ""
    first, second = chance.sample(_files(newest), 2)
    first.rename(newest / "aside")
    second.rename(first)
    (newest / "aside").rename(second)
    return True, f"{newest.name} is not used: "


def latest_broken(run: Path, chance: random.Random) -> tuple[bool, str]:
    if (newest := newest_sound(run)) is None:
        return False, ""
    (newest.parent / "latest").write_text("step-9999999")
    return True, ""  # nobody reads it but people


def planted(run: Path, foreign: Path) -> tuple[bool, str]:
    """A whole checkpoint whose manifest is another experiment's, sealed as its own program would."""
    from earlybert.checkpoint import _sealed, read_manifest

    if (newest := newest_sound(run)) is None:
        return False, ""
    name = f"step-{int(newest.name[5:]) + 1:07d}"
    shutil.rmtree(newest.parent / name, ignore_errors=True)
    shutil.copytree(foreign, newest.parent / name)
    manifest = dataclasses.replace(read_manifest(foreign), experiment=FOREIGN)
    (newest.parent / name / "manifest.json").write_text(_sealed(manifest))
    return True, f"{name} is not used: its manifest is of another experiment"


def left_behind(run: Path, chance: random.Random) -> tuple[bool, str]:
    if (newest := newest_sound(run)) is None:
        return False, ""
    half = newest.parent / ".partial-step-0000029"
    shutil.copytree(newest, half, dirs_exist_ok=True)
    (half / "manifest.json").unlink()
    return True, ""


def _flip(path: Path, at: int, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << chance.randrange(8) if chance.random() < 0.9 else 1
    path.write_bytes(content)
