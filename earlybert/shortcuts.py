"""Work that DeepSpeed's ZeRO-1 and 2 do in each step and that changes no number, left out.

On a GPU small operations cost the host more than the device, and with few rows, or after a deep cut, a step
is as long as the host takes to launch it. Every shortcut is taken only where its conditions hold and the
numbers stay the same to the last bit; elsewhere the optimizer is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from earlybert import dist

_CACHED = 2**16
"""Numbers whose squares are added up at a time on a CPU: half a mebibyte in double precision."""


def take(optimizer: Any) -> None:
    """Take all shortcuts that a fresh DeepSpeed optimizer allows."""
    if type(optimizer).__name__ != "DeepSpeedZeroOptimizer":
        return
    judge_by_norm(optimizer)
    reduce_nothing_alone(optimizer)
    keep_views(optimizer)


def judge_by_norm(optimizer: Any) -> None:
    """Let the optimizer look at its gradients once a step instead of three times a parameter.

    DeepSpeed first asks each gradient for numbers that are not finite and then, in double precision, for its
    norm, which such a number spoils too: on a GPU these launches took 40 of the 50 ms of BERT-Base's update
    (LOG.md). The norm stays as it is and alone decides, on all ranks alike, since it is summed over them.
    """
    if optimizer.compute_grad_norm and not optimizer.cpu_offload:
        optimizer.has_overflow = lambda partition_gradients=True: False
        optimizer.get_grad_norm_direct = functools.partial(_norm, optimizer.dp_process_group)


def reduce_nothing_alone(optimizer: Any) -> None:
    """Leave the gradients of a rank that is alone where the backward pass puts them, or add them to the fp32
    sums that ZeRO-2 may keep of them.

    DeepSpeed copies each into a bucket, divides by one, sums over one rank and copies it into a second
    buffer, from hooks that it runs a parameter: half of what the host does in a backward pass (LOG.md). What
    scales gradients there, or takes them elsewhere, is left alone.
    """
    alone = all(torch.distributed.get_world_size(group) == 1 for group in optimizer.real_dp_process_group)
    plain = not (
        optimizer.cpu_offload
        or optimizer.overlap_comm
        or optimizer.use_grad_accum_attribute
        or optimizer.has_moe_layers
        or optimizer.gradient_predivide_factor != 1
        or optimizer.sequence_parallel_size != 1
        or set(optimizer.ipg_buckets) != {optimizer.dtype}
    )
    if alone and plain:
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks.clear()
        optimizer.contiguous_gradients = False
        optimizer.reduce_ready_partitions_and_remove_grads = lambda parameter, group: None
        optimizer.reduce_ipg_grads = functools.partial(_add_to_sums, optimizer)


def _add_to_sums(optimizer: Any, comm_dtype: torch.dtype | None = None) -> None:
    """Add a micro-batch's gradients to ZeRO-2's fp32 sums, where it keeps such."""
    for group, parameters in enumerate(optimizer.bit16_groups):
        given = [parameter for parameter in parameters if parameter.grad is not None]
        if given and optimizer._use_compact_grad_partition_buffer(group):
            sums = [
                optimizer._get_compact_grad_partition_slice(
                    group, 0, optimizer.get_param_id(one), one.numel()
                )
                for one in given
            ]
            torch._foreach_add_(sums, [one.grad.reshape(-1) for one in given])


def keep_views(optimizer: Any) -> None:
    """Keep the parameters' views of the flat weights as long as these stay where they are.

    DeepSpeed makes a new view for each parameter after every update, which was written in place.
    """
    renewed = optimizer._update_model_bit16_weights

    def renew_if_moved(group: int) -> None:
        flat, first = optimizer.bit16_groups_flat[group], optimizer.round_robin_bit16_offsets[group][0]
        held = optimizer.round_robin_bit16_groups[group][0]
        if held.data_ptr() != flat.data_ptr() + first * flat.element_size():
            renewed(group)

    optimizer._update_model_bit16_weights = renew_if_moved


def _norm(group: Any, gradients: Sequence[torch.Tensor], _: Any, norm_type: float = 2) -> torch.Tensor:
    """The norm of what all ranks hold of a parameter group, fp32; -1 where it is not finite. Collective."""
    assert norm_type == 2
    own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    squares = [_squares(own)] if own else []
    total = sum(squares, torch.zeros((), dtype=torch.float64, device=dist.collective_device())).float()
    torch.distributed.all_reduce(total, group=group)
    norm = total.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


def _squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all gradients, in double precision."""
    if gradients[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(gradients), dtype=torch.float64)).square().sum()
    # A CPU would write each gradient out in double precision before it looks at it: a fifth of BERT-Base's
    # step went into that (LOG.md).
    room, total = torch.empty(_CACHED, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for gradient in gradients:
        for piece in gradient.flatten().split(_CACHED):
            doubles = room[: len(piece)].copy_(piece)
            total += doubles.dot(doubles)
    return total
