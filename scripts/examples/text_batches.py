"""The examples' command line and data: any text file as bytes, masked or with bytes replaced.

A real script has its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

README = Path(__file__).parent.parent.parent / "README.md"
FIRST, MASK = 5, 4
"""Byte b is token FIRST + b; before that stand padding and special tokens."""
VOCABULARY = FIRST + 256 + 3


def arguments(name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"{name}.py")
    parser.add_argument("text", nargs="?", default=str(README), help="any file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--draw", type=int, default=100, help="draw the ticket at this step")
    parser.add_argument("--out", default=f"{name}-ticket", help="folder for the small model")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def masked(path: str, *, steps: int, rank: int, size: int = 8, length: int = 64) -> Iterator[dict]:
    """Yield {input_ids, attention_mask, labels}, all [size, length]; labels are -100 where nothing is
    masked."""
    for ids, hidden in _chosen(path, steps=steps, rank=rank, size=size, length=length):
        labels = torch.where(hidden, ids, -100)
        yield _batch(torch.where(hidden, MASK, ids), labels)


def replaced(path: str, *, steps: int, rank: int, size: int = 8, length: int = 64) -> Iterator[dict]:
    """Yield the same with some bytes replaced by others; labels are 1 at these, as ELECTRA has them."""
    for ids, changed in _chosen(path, steps=steps, rank=rank, size=size, length=length):
        other = FIRST + (ids - FIRST + torch.randint(1, 256, ids.shape)) % 256
        yield _batch(torch.where(changed, other, ids), changed.long())


def _chosen(
    path: str, *, steps: int, rank: int, size: int, length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield windows of the text and which 15 % of their places are chosen."""
    text = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8).long() + FIRST
    torch.manual_seed(rank)
    for _ in range(steps):
        starts = torch.randint(0, text.numel() - length, (size, 1))
        ids = text[starts + torch.arange(length)]
        yield ids, torch.rand(ids.shape) < 0.15


def _batch(ids: torch.Tensor, labels: torch.Tensor) -> dict:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
