"""Where DeepSpeed keeps masters and moments, as live views by parameter.

Where DeepSpeed keeps things differs by the class of its optimizer wrapper:

| wrapper | when | masters of a rank |
|---|---|---|
| none (the torch optimizer) | ZeRO-0, fp32 | all, the parameters themselves |
| FP16_UnfusedOptimizer | ZeRO-0, bf16 or fp16 | all, a tensor a parameter |
| FP16_Optimizer | the same with DeepSpeed's fused Adam | all, a flat tensor a group |
| DeepSpeedZeroOptimizer, BF16_Optimizer | ZeRO-1, 2 | a fragment of a flat tensor a group |
| DeepSpeedZeroOptimizer_Stage3 | ZeRO-3 | a padded slice of each parameter |

No setter or getter of DeepSpeed's is used: they miss every group but the first, pad wrongly at odd sizes and
desync before the first step (seen in 0.19.8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Fragment:
    """Live views into an engine: elements `[start, start + master.numel())` of a flattened parameter."""

    start: int
    master: torch.Tensor
    owner: torch.Tensor
    """The tensor under which the optimizer files its state; its state's views have the same offset and
    length."""
    offset: int

    def moment(self, states: Mapping[torch.Tensor, Mapping[str, torch.Tensor]], key: str) -> torch.Tensor:
        return states[self.owner][key].detach().view(-1).narrow(0, self.offset, self.master.numel())


class Layout:
    """ZeRO-0 in fp32: the optimizer works on the module's own parameters."""

    replicated = True
    """Every rank holds every element."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.wrapper = engine.optimizer
        self.optimizer = getattr(self.wrapper, "optimizer", self.wrapper)
        self.states = self.optimizer.state
        self.named = dict(engine.module.named_parameters())

    def owners(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def fragments(self) -> dict[str, Fragment | None]:
        return {name: Fragment(0, p.detach().view(-1), p, 0) for name, p in self.named.items()}

    def names_of_owners(self) -> list[list[str]]:
        """The parameters that each of `owners` holds over all ranks, in an order that the ranks share."""
        raise NotImplementedError("only a sharded optimizer has flat tensors of several parameters")

    def publish(self) -> None:
        """Bring the masters to the parameters that the forward pass uses."""


class _Unfused(Layout):
    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        groups = zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True)
        return [pair for low, high in groups for pair in zip(low, high, strict=True)]

    def fragments(self) -> dict[str, Fragment | None]:
        high = {id(low): high for low, high in self._pairs()}
        masters = {name: high[id(p)] for name, p in self.named.items()}
        return {name: Fragment(0, m.detach().view(-1), m, 0) for name, m in masters.items()}

    def publish(self) -> None:
        for low, high in self._pairs():
            low.data.copy_(high.data)


class _Fused(Layout):
    def fragments(self) -> dict[str, Fragment | None]:
        names = {id(p): name for name, p in self.named.items()}
        found: dict[str, Fragment | None] = {}
        for group, flat in zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups_flat, strict=True):
            offset = 0
            for low in group:
                view = flat.detach().narrow(0, offset, low.numel())
                found[names[id(low)]] = Fragment(0, view, flat, offset)
                offset += low.numel()
        return {name: found[name] for name in self.named}

    def publish(self) -> None:
        for name, fragment in self.fragments().items():
            assert fragment is not None
            self.named[name].data.view(-1).copy_(fragment.master)


class _Sharded(Layout):
    replicated = False

    def owners(self) -> list[torch.Tensor]:
        flats = getattr(self.wrapper, "single_partition_of_fp32_groups", None)
        return list(self.wrapper.fp32_groups_flat_partition if flats is None else flats)

    def names_of_owners(self) -> list[list[str]]:
        names = {id(p): name for name, p in self.named.items()}
        groups = getattr(self.wrapper, "bit16_groups", None) or self.wrapper.bf16_groups
        return [[names[id(p)] for p in group] for group in groups]

    def fragments(self) -> dict[str, Fragment | None]:
        flats = self.owners()
        found: dict[str, Fragment | None] = {}
        for name, parameter in self.named.items():
            mapping = parameter._hp_mapping
            if mapping is None:
                found[name] = None
                continue
            owner = flats[mapping.param_group_index]
            offset, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            view = owner.detach().narrow(0, offset, length)
            found[name] = Fragment(mapping.lp_fragment_address.start, view, owner, offset)
        return found

    def publish(self) -> None:
        self.wrapper._hp_optimizer_states_linked = (
            False  # its one-shot links point at the state that was replaced
        )
        self.wrapper.update_lp_params()


class _Stage3(Layout):
    replicated = False

    def owners(self) -> list[torch.Tensor]:
        return list(self.wrapper.fp32_partitioned_groups_flat)

    def names_of_owners(self) -> list[list[str]]:
        names: list[list[str]] = [[] for _ in self.owners()]
        for name, parameter in self.named.items():
            group, _, _ = self.wrapper.grad_position[self.wrapper.get_param_id(parameter)]
            names[group].append(name)
        return names

    def fragments(self) -> dict[str, Fragment | None]:
        found: dict[str, Fragment | None] = {}
        for name, parameter in self.named.items():
            group, offset, _ = self.wrapper.grad_position[self.wrapper.get_param_id(parameter)]
            padded = parameter.ds_tensor.ds_numel
            start = padded * self.wrapper._get_param_partition_rank(parameter)
            length = min(padded, parameter.ds_numel - start)
            if length <= 0:
                found[name] = None
                continue
            owner = self.wrapper.fp32_partitioned_groups_flat[group]
            found[name] = Fragment(start, owner.detach().narrow(0, offset, length), owner, offset)
        return found

    def publish(self) -> None:
        for group in range(len(self.wrapper.fp32_partitioned_groups_flat)):
            self.wrapper._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self.wrapper.persistent_parameters
        if persistent:
            # Their gathered copies predate the seed: give them up and gather anew.
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


_LAYOUTS: dict[str, type[Layout]] = {
    "FP16_UnfusedOptimizer": _Unfused,
    "FP16_Optimizer": _Fused,
    "DeepSpeedZeroOptimizer": _Sharded,
    "BF16_Optimizer": _Sharded,
    "DeepSpeedZeroOptimizer_Stage3": _Stage3,
}


def layout_of(engine: Any) -> Layout:
    """The views into a DeepSpeed engine's optimizer; raises TypeError for a wrapper that is not known."""
    name = type(engine.optimizer).__name__
    if name not in _LAYOUTS and not isinstance(engine.optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"DeepSpeed wraps the optimizer in {name}, and where that keeps its state is not known"
        )
    return _LAYOUTS.get(name, Layout)(engine)
