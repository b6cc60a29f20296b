"""The search's L1 term, added to the coefficients' gradients by hooks and never to the loss.

So the reported loss is the model's own, and lambda depends on neither accumulation nor the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


class LossScale:
    """The factor between the loss given to `backward` and what is differentiated: 1 / accumulation, times
    fp16's scale.

    Recorded from the gradient that arrives at the loss itself, so it is right for every precision and
    accumulation.
    """

    value: torch.Tensor | None = None

    def __init__(self) -> None:
        self._times: dict[tuple[float, torch.dtype], torch.Tensor] = {}

    def record(self, gradient: torch.Tensor) -> None:
        self.value = gradient.detach()
        self._times = {}

    def times(self, factor: float, dtype: torch.dtype) -> torch.Tensor:
        """`factor` times the scale, a scalar; computed once a backward pass for all who ask."""
        assert self.value is not None
        if (factor, dtype) not in self._times:
            self._times[factor, dtype] = (factor * self.value).to(dtype)
        return self._times[factor, dtype]


def penalise(
    parameter: torch.Tensor, penalty: float, scale: LossScale
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gradient hook that adds the L1 term's gradient: lambda * sign(c) for the whole batch on every rank.

    The engine averages over micro-batches and ranks, so neither accumulation nor world size changes lambda.
    """

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        assert parameter.shape == gradient.shape
        weight = scale.times(penalty, gradient.dtype)
        return torch.addcmul(gradient, parameter.detach().sign().to(gradient.dtype), weight)

    return hook


def damp(
    name: str, dampers: Callable[[], Mapping[str, tuple[int, torch.Tensor]]]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gradient hook that scales rows or columns of `name` by what `dampers()` says at that time."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        found = dampers().get(name)
        if found is None:
            return gradient
        dim, vector = found
        shape = [-1 if place == dim else 1 for place in range(gradient.ndim)]
        return gradient * vector.to(gradient).view(shape)

    return hook
