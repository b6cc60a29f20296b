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

    def record(self, gradient: torch.Tensor) -> None:
        self.value = gradient.detach()


def penalise(
    parameter: torch.Tensor, penalty: float, scale: LossScale
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gradient hook that adds the L1 term's gradient: lambda * sign(c) for the whole batch on every rank.

    The engine averages over micro-batches and ranks, so neither accumulation nor world size changes lambda.
    """

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        assert scale.value is not None and parameter.shape == gradient.shape
        return gradient + (penalty * scale.value).to(gradient.dtype) * parameter.detach().sign()

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
