"""Parameter groups, and a LAMB that knows ZeRO: one trust ratio an original parameter, although ZeRO hands
over flat partitions.

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (ICLR 2020), algorithm
2. A rank under ZeRO holds a slice of a flat tensor in which many parameters lie one after another, and a
parameter may lie on several ranks. So each rank adds the squares of its own segments, one small sum over the
ranks makes the norms whole, and each segment is scaled by its parameter's ratio. `attach` brings the table of
segments; without one every tensor is a whole parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from earlybert import dist


@dataclass(frozen=True)
class Segment:
    """Elements `[offset, offset + length)` of a flat tensor: a rank's part of one original parameter."""

    parameter: int
    """Which of the flat tensor's parameters, counted alike on all ranks."""
    offset: int
    length: int


@dataclass(frozen=True)
class Segments:
    """What lies in one flat tensor of this rank."""

    parameters: int
    """How many parameters the flat tensor has over all ranks."""
    own: tuple[Segment, ...]


ParameterGroups = list[dict[str, Any]]


def parameter_groups(module: torch.nn.Module, *, weight_decay: float) -> ParameterGroups:
    """Decayed matrices, undecayed vectors (biases, LayerNorm), undecayed coefficients; empty groups are left
    out."""
    groups: ParameterGroups = [
        {"name": "matrices", "params": [], "weight_decay": weight_decay, "trust_ratio": True},
        {"name": "vectors", "params": [], "weight_decay": 0.0, "trust_ratio": False},
        {"name": "coefficients", "params": [], "weight_decay": 0.0, "trust_ratio": False},
    ]
    for name, parameter in module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # sharded, it has none of its own
        which = 2 if name.endswith(".coefficients") else 0 if len(shape) > 1 else 1
        groups[which]["params"].append(parameter)
    return [group for group in groups if group["params"]]


class Lamb(torch.optim.Optimizer):
    """AdamW's direction, scaled for each parameter by |w| / |direction| clamped to `trust`.

    Groups with `trust_ratio` false (biases, LayerNorm, coefficients) step by the direction itself, as
    parameters do whose norm or direction is zero. State as AdamW's: `step`, `exp_avg`, `exp_avg_sq`.
    """

    def __init__(
        self,
        groups: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        trust: tuple[float, float] = (0.0, 10.0),
    ) -> None:
        super().__init__(
            groups,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "trust": trust,
                "trust_ratio": True,
            },
        )
        self._segments: Mapping[torch.Tensor, Segments] = {}
        self._owners: dict[torch.Tensor, torch.Tensor] = {}
        """Which parameter each segment belongs to, on the device: made once, since to send it there waits."""

    def attach(self, segments: Mapping[torch.Tensor, Segments]) -> None:
        """Say what lies in the flat tensors; those named here are shards of a whole that all ranks hold."""
        self._segments = dict(segments)
        self._owners.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Collective where tensors are shards: each group that has ratios costs one
        reduction."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                sharded = self._segments.get(parameter)
                if parameter.grad is None and sharded is None:
                    continue
                direction = self._direction(parameter, group)
                if group["trust_ratio"]:
                    table = sharded or Segments(1, (Segment(0, 0, parameter.numel()),))
                    if parameter not in self._owners:
                        owners = [segment.parameter for segment in table.own]
                        self._owners[parameter] = torch.tensor(owners, device=parameter.device)
                    _scale(
                        direction, parameter, table, self._owners[parameter], group["trust"],
                        over_ranks=sharded is not None,
                    )  # fmt: skip
                parameter.add_(direction, alpha=-group["lr"])
        return loss

    def _direction(self, parameter: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
        """AdamW's direction with decay; a shard without a gradient has one of zeros."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = gradient.to(parameter.dtype)
        first, second = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        step = float(state["step"])
        # As in AdamW the corrections are functions of the step alone, so a resume is exact.
        root = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        direction = (mean / (1 - first**step)).div_(root)
        return direction.add_(parameter, alpha=group["weight_decay"]) if group["weight_decay"] else direction


def _scale(
    direction: torch.Tensor,
    parameter: torch.Tensor,
    table: Segments,
    owners: torch.Tensor,
    trust: Sequence[float],
    *,
    over_ranks: bool,
) -> None:
    """Multiply each segment of `direction` by its parameter's trust ratio. Collective if `over_ranks`."""
    weights = _views(parameter.detach(), table)
    directions = _views(direction, table)
    squares = torch.zeros(2, table.parameters, dtype=torch.float64, device=parameter.device)
    if table.own:
        for row, views in zip(squares, (weights, directions), strict=True):
            norms = torch.stack(torch._foreach_norm(views, 2, dtype=torch.float64))
            row.index_add_(0, owners, norms.square())
    if over_ranks:
        squares = dist.sum_over_ranks(squares.to(dist.collective_device())).to(parameter.device)
    norm_w, norm_d = squares.sqrt()
    ratio = (norm_w / norm_d.clamp(min=torch.finfo(torch.float64).tiny)).clamp(*trust)
    ratio = torch.where((norm_w > 0) & (norm_d > 0), ratio, 1.0).to(direction.dtype)
    for view, segment in zip(directions, table.own, strict=True):
        view.mul_(ratio[segment.parameter])


def _views(flat: torch.Tensor, table: Segments) -> list[torch.Tensor]:
    flat = flat.view(-1)
    return [flat.narrow(0, segment.offset, segment.length) for segment in table.own]
