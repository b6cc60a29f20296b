"""What the ranks agree on: a few collectives that also work where there is one process and no process group.

Every function marked *collective* must be called by all ranks, in the same order; none may stand under `if
rank() == 0`.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist

from earlybert.config import EarlyBertError

T = TypeVar("T")


def active() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    return torch_dist.get_rank() if active() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if active() else 1


def barrier() -> None:
    """Wait for all ranks. Collective."""
    if active():
        torch_dist.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Add `tensor` over the ranks, in place, and return it. Collective."""
    if active():
        torch_dist.all_reduce(tensor)
    return tensor


def begin_sum(tensor: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to add the 1-D `tensor` over the ranks, in place; what is returned waits for it and gives its
    numbers. Collective.

    A device that has more to do goes on: a GPU adds and copies beside its other work, not after it.
    """
    if tensor.device.type != "cuda":
        work = torch_dist.all_reduce(tensor, async_op=True) if active() else None

        def arrived() -> list[float]:
            if work is not None:
                work.wait()
            return tensor.tolist()

        return arrived
    beside = _beside(tensor.device)
    beside.wait_stream(torch.cuda.current_stream())
    told = torch.empty_like(tensor, device="cpu", pin_memory=True)
    with torch.cuda.stream(beside):
        told.copy_(sum_over_ranks(tensor), non_blocking=True)
        tensor.record_stream(beside)
        copied = beside.record_event()

    def copied_numbers() -> list[float]:
        copied.synchronize()
        return told.tolist()

    return copied_numbers


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def gather_pieces(piece: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Return every rank's 1-D `piece`; `lengths[r]` is rank r's number of elements, known to all. Collective.

    Bit-exact (no arithmetic is done on the values). Peak memory is `world_size * max(lengths)` elements.
    """
    assert piece.ndim == 1 and piece.numel() == lengths[rank()]
    if world_size() == 1:
        return [piece]
    longest = max(lengths)
    padded = piece.new_zeros(longest)
    padded[: piece.numel()] = piece
    gathered = [torch.empty_like(padded) for _ in lengths]
    torch_dist.all_gather(gathered, padded)
    return [buffer[:length] for buffer, length in zip(gathered, lengths, strict=True)]


def exchange(sent: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    """Send the 1-D `sent[r]` to rank r and return what each rank sent here, `lengths[r]` elements of rank r.

    Collective. Bit-exact; memory is that of what is sent and of what comes.
    """
    if world_size() == 1:
        return sent
    device = collective_device()
    outgoing = torch.cat(sent).to(device)
    arrived = outgoing.new_empty(sum(lengths))
    torch_dist.all_to_all_single(arrived, outgoing, lengths, [part.numel() for part in sent])
    return list(arrived.split(lengths))


def gather_objects(value: T) -> list[T]:
    """Return every rank's `value` (anything that pickles), in the order of ranks. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def from_rank_0(value: T) -> T:
    """Return rank 0's `value` on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def told_by_host(flaws: list[str]) -> list[str]:
    """What all ranks have found wrong, each flaw once; after its host's name where there are several, since
    what one host alone does not see is a matter of that host. Collective."""
    ranks = gather_objects((socket.gethostname(), flaws))
    several = len({host for host, _ in ranks}) > 1
    told = [f"{host}: {flaw}" if several else flaw for host, found in ranks for flaw in found]
    return list(dict.fromkeys(told))


def check_on_rank_0(check: Callable[[], None]) -> None:
    """Call `check` on rank 0, and raise the EarlyBertError or OSError that it raises on every rank, as an
    EarlyBertError. Collective."""
    problem = None
    if rank() == 0:
        try:
            check()
        except (EarlyBertError, OSError) as error:  # the others wait to hear of it
            problem = str(error)
    if (problem := from_rank_0(problem)) is not None:
        raise EarlyBertError(problem)


def agree(value: Any, *, what: str) -> None:
    """Raise RuntimeError on every rank if `value` is not the same on all of them. Collective."""
    values = gather_objects(value)
    if any(other != values[0] for other in values):
        raise RuntimeError(f"the ranks disagree on {what}: {values}")


def collective_device() -> torch.device:
    """The device whose tensors the default process group can reduce."""
    if active() and torch_dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
