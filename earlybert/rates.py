"""The learning rate over a draw: what must not start anew, and the rise after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Rates:
    """Learning rates by group and the scheduler's position: what a fresh engine must not start anew."""

    def __init__(self, inner: Any) -> None:
        self._rates = {group["name"]: group["lr"] for group in inner.optimizer.param_groups}
        self._scheduler = None if inner.lr_scheduler is None else inner.lr_scheduler.state_dict()

    def restore(self, inner: Any) -> None:
        if self._scheduler is not None:
            inner.lr_scheduler.load_state_dict(self._scheduler)
        for group in inner.optimizer.param_groups:
            group["lr"] = self._rates[group["name"]]


def warm_up(optimizer: torch.optim.Optimizer, factor: Callable[[], float]) -> None:
    """Scale the learning rate by `factor()` inside each step only, so that every scheduler goes on untouched.

    ZeRO steps group by group with the groups swapped: what is scaled before a step is restored after it.
    """
    rates: list[tuple[dict[str, Any], float]] = []

    def before(own: torch.optim.Optimizer, *_: Any) -> None:
        rates[:] = [(group, group["lr"]) for group in own.param_groups]
        for group, rate in rates:
            group["lr"] = rate * factor()

    def after(*_: Any) -> None:
        for group, rate in rates:
            group["lr"] = rate

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
