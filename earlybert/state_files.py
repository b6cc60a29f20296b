"""The per-parameter state on disk: one safetensors file a rank, read by any number of ranks at any stage.

A file holds this rank's pieces as 1-D fp32 tensors named "master/PARAMETER", "exp_avg/PARAMETER" and so on;
its metadata says where each piece starts in the flattened parameter. To read, a rank takes its even share of
every parameter out of whichever files hold it, slice by slice, so the number of ranks that wrote does not
matter. Nothing here is a pickle: a file can hold numbers and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from earlybert import faults
from earlybert.config import EarlyBertError
from earlybert.shrink import Piece
from earlybert.state import MASTER, State, share

_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it, and not from a thread
ANCHOR = "anchor"
"""Masters of the step to rewind to, beside the state's own."""


def file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def describe(state: State, anchor: State | None) -> dict[str, Any]:
    """What the files' tensors do not say, as JSON: `read` wants it back."""
    return {
        "shapes": {name: list(shape) for name, shape in state.shapes.items()},
        "step": state.step,
        "moments": list(state.moments),
        "counters": state.counters,
        "anchor": anchor is not None,
    }


def write(path: Path, state: State, anchor: State | None) -> dict[str, Any]:
    """Write this rank's pieces, make them durable and return {"bytes", "sha256"}. OSError where it cannot."""
    tensors, starts = {}, {}
    held = [(key, name, own[key]) for name, own in state.pieces.items() for key in state.keys]
    if anchor is not None:
        held += [(ANCHOR, name, own[MASTER]) for name, own in anchor.pieces.items()]
    for key, name, piece in held:
        if piece.values.numel():
            tensors[f"{key}/{name}"] = piece.values
            starts[f"{key}/{name}"] = piece.start
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, path, metadata={"starts": json.dumps(starts)})
    except SafetensorError as error:  # its words for the system's refusal to write
        raise OSError(str(error)) from error
    path.chmod(0o666 & ~_UMASK)  # safetensors writes for the owner alone
    faults.point("save.shard")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read(folder: Path, names: Sequence[str], described: Mapping[str, Any]) -> tuple[State, State | None]:
    """This rank's even share of every parameter, and of the anchor where there is one.

    `names`: the files; `described`: from `describe`. Raises EarlyBertError where the files lack elements of a
    parameter, or hold some that do not fit.
    """
    shapes = {name: tuple(shape) for name, shape in described["shapes"].items()}
    moments = tuple(described["moments"])
    with _Files([folder / name for name in names]) as files:
        state = State(shapes, {}, described["step"], moments, dict(described["counters"]))
        for name, shape in shapes.items():
            first, last = share(math.prod(shape))
            state.pieces[name] = {
                key: Piece(first, files.take(f"{key}/{name}", first, last)) for key in state.keys
            }
        if not described["anchor"]:
            return state, None
        anchor = State(dict(shapes), {})
        for name, held in state.pieces.items():
            piece = held[MASTER]
            values = files.take(f"{ANCHOR}/{name}", piece.start, piece.start + piece.values.numel())
            anchor.pieces[name] = {MASTER: Piece(piece.start, values)}
    return state, anchor


def masters(folder: Path, names: Sequence[str], described: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Whole fp32 masters by parameter name; errors as `read`."""
    with _Files([folder / name for name in names]) as files:
        return {
            name: files.take(f"{MASTER}/{name}", 0, math.prod(shape)).view(shape)
            for name, shape in described["shapes"].items()
        }


class _Files:
    """Open files, and where each tensor's elements lie in them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: list[Any] = []
        self._where: dict[str, list[tuple[int, int, Any]]] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
                starts = json.loads((file.metadata() or {})["starts"])
                for tensor in file.keys():  # noqa: SIM118 - not a dict
                    length = math.prod(file.get_slice(tensor).get_shape())
                    self._where.setdefault(tensor, []).append((starts[tensor], length, file))
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                raise EarlyBertError(
                    f"{path}: not a file that a checkpoint has ({error}); use another"
                ) from error
            self._files.append(file)
        self._paths = paths

    def take(self, tensor: str, first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of a flattened tensor, from the files that have them."""
        values = torch.empty(last - first)
        taken = 0
        for start, length, file in self._where.get(tensor, ()):
            low, high = max(first, start), min(last, start + length)
            if low < high:
                values[low - first : high - first] = file.get_slice(tensor)[low - start : high - start]
                taken += high - low
        if taken != last - first:
            raise EarlyBertError(
                f"{self._paths[0].parent}: of {tensor}, elements {first} to {last} are wanted and {taken} "
                "found; files are missing or belong to another checkpoint: use another"
            )
        return values

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._where.clear()
        self._files.clear()  # the last references: the files are closed
