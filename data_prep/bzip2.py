"""Parts of a bzip2 file, each decompressed by itself, so that many tasks share one file.

A bzip2 file is a chain of blocks of at most 900 kB of content, each with its own check sum and each readable
without those before it; only, blocks begin at any bit. Their 48-bit marks are looked for at all eight bit
positions, and a block is read by shifting its bits into a stream of its own. Streams of many members (the
multistream dumps) need nothing special. Format: the source of bzip2 1.0.8, bzip2recover.c.
"""

from __future__ import annotations

import bz2
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from earlybert.config import EarlyBertError

MAGIC = b"BZh"
_BLOCK, _END = 0x314159265359, 0x177245385090
"""What a block begins with, and what follows the last block of a stream (48 bits each)."""

_WINDOW = 1 << 20
_LONGEST_BLOCK = 2_000_000
"""Bytes; a block of 900 kB that cannot be compressed grows by a few per cent."""


def blocks(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[bytes, int, bool]]:
    """Stream (content, first byte in the file, whether that is before byte `stop`) of the blocks from byte
    `start` on, and past `stop` as far as the caller goes.

    Raises EarlyBertError naming file and byte for a damaged block and for a file that breaks off.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        marks = _marks(file.fileno(), start, size)
        here = next(marks, None)
        while here is not None:
            at, is_block = here
            if not is_block:
                here = next(marks, None)
                continue
            content = None
            while content is None:
                here = next(marks, None)
                if here is None:
                    raise EarlyBertError(
                        f"{path}: the bz2 stream breaks off in the block at byte {at // 8:,} of {size:,}; "
                        "the file is truncated, get it again"
                    )
                content = _content(file.fileno(), at, here[0])
                if content is None and here[0] - at > 8 * _LONGEST_BLOCK:
                    raise EarlyBertError(
                        f"{path}: the bz2 block at byte {at // 8:,} is damaged; get the file again"
                    )
            yield content, at // 8, stop is None or at < 8 * stop


def _marks(file: int, start: int, size: int) -> Iterator[tuple[int, bool]]:
    """(first bit, whether a block begins there) of the marks from byte `start` on, in order."""
    overlap = 6
    while start < size:
        data = os.pread(file, _WINDOW + overlap, start)
        found = [
            (8 * start + bit, is_block)
            for bit, is_block in _marks_in(data)
            if bit < 8 * min(_WINDOW, len(data))
        ]
        yield from sorted(found)
        start += _WINDOW


def _needles() -> list[tuple[bool, int, bytes, int, int, int]]:
    """For each mark and bit position: the bytes that it fills, and what the bytes at its two ends hold of
    it."""
    needles = []
    for mark in (_BLOCK, _END):
        for shift in range(8):
            spread = (mark << (8 - shift)).to_bytes(7, "big")
            low = (1 << (8 - shift)) - 1
            needles.append((mark == _BLOCK, shift, spread[1:6], low, spread[0] & low, spread[6]))
    return needles


_NEEDLES = _needles()


def _marks_in(data: bytes) -> Iterator[tuple[int, bool]]:
    """(bit, whether a block begins there) of the whole marks in `data`, in no order."""
    for is_block, shift, inner, low, first, last in _NEEDLES:
        at = data.find(inner, 1)
        while at >= 0:
            high = 0xFF ^ (0xFF >> shift)
            end_fits = not shift or (at + 5 < len(data) and data[at + 5] & high == last)
            if end_fits and data[at - 1] & low == first:
                yield 8 * (at - 1) + shift, is_block
            at = data.find(inner, at + 1)


def _content(file: int, start: int, stop: int) -> bytes | None:
    """Decompress the block of the bits [start, stop); None where they are no block."""
    shift, bits = start % 8, stop - start
    raw = np.frombuffer(os.pread(file, (stop + 7) // 8 - start // 8 + 1, start // 8), dtype=np.uint8)
    raw = np.append(raw, np.uint8(0)).astype(np.uint16)
    shifted = ((raw[:-1] << shift | raw[1:] >> (8 - shift)) & 0xFF).astype(np.uint8).tobytes()
    whole, rest = divmod(bits, 8)
    check = int.from_bytes(shifted[6:10], "big")  # of the block; of a stream of one block, too
    last = shifted[whole] >> (8 - rest) if rest else 0
    tail = (last << 80 | _END << 32 | check) << (-(rest + 80) % 8)
    stream = b"BZh9" + shifted[:whole] + tail.to_bytes((rest + 80 + 7) // 8, "big")
    try:
        return bz2.decompress(stream)
    except (OSError, ValueError, EOFError):
        return None
