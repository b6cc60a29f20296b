"""The per-parameter state: fp32 master weights, optimizer moments and counters, read from an engine and put
into one.

It is the currency of every change of shape. Each rank holds, of each parameter, one contiguous piece of its
flattened elements (`Piece`); together the ranks hold each element exactly once. To read, a rank copies what
it owns; only counters travel. To seed, each element travels from the rank that read it to those that own it
now, a chunk of at most `CHUNK` elements at a time: no rank ever holds a whole parameter for it.

Where DeepSpeed keeps things differs by the class of its optimizer wrapper (`_Layout` below):

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

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from earlybert import dist
from earlybert.optim import Segment, Segments
from earlybert.shrink import Piece

UnitsOf = tuple[str, str, Callable[[torch.Tensor, Sequence[int]], torch.Tensor]]
MASTER = "master"
NOTHING = Piece(0, torch.empty(0))
MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK = 2**22
"""Elements of all parameters that one exchange of a seed moves, over all ranks."""


@dataclass
class State:
    """What this rank holds of every parameter, and the counters that go with it."""

    shapes: dict[str, tuple[int, ...]]
    """Whole shape of each parameter, in the module's order."""
    pieces: dict[str, dict[str, Piece]]
    """{parameter: {"master" | moment: piece}}; a parameter of which this rank owns nothing has empty
    pieces."""
    step: float | None = None
    """The optimizer's own step counter (bias correction); None before its first step or after a reset."""
    counters: dict[str, Any] = field(default_factory=dict)
    """The engine's counters and the loss scaler."""

    @property
    def keys(self) -> tuple[str, ...]:
        """ "master", and the moments where there are any (the same on all ranks)."""
        return (MASTER,) if self.step is None else (MASTER, *MOMENTS)


@dataclass(frozen=True)
class _Fragment:
    """Live views into an engine: elements `[start, start + master.numel())` of a flattened parameter."""

    start: int
    master: torch.Tensor
    owner: torch.Tensor
    """The tensor under which the optimizer files its state; its state's views have the same offset and
    length."""
    offset: int

    def moment(self, states: Mapping[torch.Tensor, Mapping[str, torch.Tensor]], key: str) -> torch.Tensor:
        return states[self.owner][key].detach().view(-1).narrow(0, self.offset, self.master.numel())


def from_module(module: torch.nn.Module) -> State:
    """The state of a plain fp32 module that no optimizer has touched: each rank takes its share of each
    parameter."""
    shapes, pieces = {}, {}
    for name, parameter in module.named_parameters():
        flat = parameter.detach().float().view(-1)
        start, stop = _share(flat.numel())
        shapes[name] = tuple(parameter.shape)
        pieces[name] = {MASTER: Piece(start, flat[start:stop].clone())}
    return State(shapes, pieces)


Transform = Callable[[str, str, tuple[int, ...], Piece], Piece]
"""(parameter, "master" or moment, whole shape, piece) -> piece, cut or scaled."""


def read(engine: Any, *, transform: Transform | None = None, moments: bool = True) -> State:
    """Copy what this rank owns to host memory, one piece at a time; no communication.

    `transform` may cut or scale a piece before it is copied; `shapes` stay those of the engine, so a caller
    that cuts replaces them. Without `moments` the masters alone. Must run at an optimizer-step boundary (no
    gradients pending).
    """
    layout = _layout(engine)
    step = _step_counter(layout) if moments else None
    state = State(shapes=_shapes(engine.module), pieces={}, step=step, counters=counters(engine))
    for name, fragment in layout.fragments().items():
        held: dict[str, Piece] = {}
        for key in state.keys:
            if fragment is None:
                piece = NOTHING
            else:
                values = fragment.master if key == MASTER else fragment.moment(layout.states, key)
                piece = Piece(fragment.start, values.detach())
            if transform is not None:
                piece = transform(name, key, state.shapes[name], piece)
            held[key] = Piece(piece.start, piece.values.to("cpu", torch.float32, copy=True))
        state.pieces[name] = held
    if layout.replicated:
        _keep_share(state)
    return state


def transformed(state: State, transform: Transform) -> State:
    """The state with each piece cut or scaled; `shapes` stay."""
    pieces = {
        name: {key: transform(name, key, state.shapes[name], piece) for key, piece in held.items()}
        for name, held in state.pieces.items()
    }
    return State(dict(state.shapes), pieces, state.step, dict(state.counters))


def to_tensors(state: State) -> dict[str, Any]:
    """A state without moments, as what `torch.load` reads without trusting anyone."""
    return {
        "shapes": {name: list(shape) for name, shape in state.shapes.items()},
        "starts": {name: held[MASTER].start for name, held in state.pieces.items()},
        "masters": {name: held[MASTER].values for name, held in state.pieces.items()},
    }


def from_tensors(values: Mapping[str, Any]) -> State:
    """The reverse of `to_tensors`."""
    pieces = {
        name: {MASTER: Piece(values["starts"][name], master)} for name, master in values["masters"].items()
    }
    return State({name: tuple(shape) for name, shape in values["shapes"].items()}, pieces)


def unit_norms(engine: Any, widths: Mapping[str, int], units: Iterable[UnitsOf]) -> dict[str, torch.Tensor]:
    """L2 norm of all weights of each unit, {group: [units]}, the same on every rank. Collective (one sum).

    `widths`: units of each group; `units`: (group, parameter, flat elements and shape -> their unit in it).
    """
    layout, shapes = _layout(engine), _shapes(engine.module)
    fragments = layout.fragments()
    squares = {name: torch.zeros(width, dtype=torch.float64) for name, width in widths.items()}
    for group, name, unit in units:
        fragment = fragments[name]
        if fragment is None or (layout.replicated and dist.rank() > 0):
            continue
        values = fragment.master.detach().cpu().double().square()
        flat = torch.arange(fragment.start, fragment.start + values.numel())
        squares[group].index_add_(0, unit(flat, shapes[name]), values)
    whole = dist.sum_over_ranks(torch.cat(list(squares.values())).to(dist.collective_device())).cpu()
    parts = whole.sqrt().split([part.numel() for part in squares.values()])
    return dict(zip(squares, parts, strict=True))


def seed(engine: Any, state: State) -> None:
    """Put `state` into a freshly initialised engine of the same parameters and shapes. Collective.

    Whatever the constructors did to the optimizer before (ZeRO-0 takes a step with zero gradients) is
    overwritten. Raises AssertionError where names or shapes differ.
    """
    layout = _layout(engine)
    assert _shapes(engine.module) == state.shapes, "the state and the module differ in names or shapes"
    layout.states.clear()
    fragments = layout.fragments()
    if state.step is not None:
        for owner in layout.owners():
            layout.states[owner] = {
                "step": _fresh_step(layout.optimizer, owner, state.step),
                **{key: torch.zeros_like(owner.detach()) for key in MOMENTS},
            }
    have = _bounds(state)
    want = _interchange([(f.start, f.master.numel()) if f else (0, 0) for f in fragments.values()], fragments)
    for chunk in _chunks(state.shapes):
        for key in state.keys:
            for name, start, values in _moved(state, key, chunk, have=have, want=want):  # collective
                fragment = fragments[name]
                assert fragment is not None
                target = fragment.master if key == MASTER else fragment.moment(layout.states, key)
                target.detach().narrow(0, start - fragment.start, values.numel()).copy_(values)
    layout.publish()
    _write_counters(engine, state.counters)


def gather(engine: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Whole fp32 masters of some small parameters, on the host, the same on every rank. Collective (one
    reduction)."""
    wanted = list(names)
    layout, shapes = _layout(engine), _shapes(engine.module)
    fragments = layout.fragments()
    sizes = [math.prod(shapes[name]) for name in wanted]
    flat = torch.zeros(sum(sizes), device=dist.collective_device())
    base = 0
    for name, size in zip(wanted, sizes, strict=True):
        fragment = fragments[name]
        if fragment is not None and not (layout.replicated and dist.rank() > 0):
            into = flat.narrow(0, base + fragment.start, fragment.master.numel())
            into.copy_(fragment.master.detach())
        base += size
    whole = (
        dist.sum_over_ranks(flat).cpu().split(sizes)
    )  # exact: each element has one owner, the rest adds zeros
    return {name: part.view(shapes[name]).clone() for name, part in zip(wanted, whole, strict=True)}


def whole(state: State, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Whole masters of some small parameters of a state, on the host. Collective."""
    bounds = _bounds(state)
    return {
        name: _whole(state.pieces[name][MASTER], bounds[name], device=dist.collective_device())
        .cpu()
        .view(state.shapes[name])
        for name in names
    }


def segments(engine: Any) -> dict[torch.Tensor, Segments]:
    """What lies in each flat tensor of this rank's optimizer; nothing where it works on whole parameters."""
    layout = _layout(engine)
    if layout.replicated:
        return {}
    fragments, table = layout.fragments(), {}
    for owner, names in zip(layout.owners(), layout.names_of_owners(), strict=True):
        found = [(index, fragments[name]) for index, name in enumerate(names)]
        own = tuple(Segment(i, f.offset, f.master.numel()) for i, f in found if f is not None)
        table[owner] = Segments(len(names), own)
    return table


def whole_parameters(state: State) -> Iterable[tuple[str, dict[str, torch.Tensor]]]:
    """Yield (name, {"master" | moment: whole tensor on the host}), one parameter at a time. Collective, to
    the end."""
    bounds = _bounds(state)
    for name, shape in state.shapes.items():
        tensors = {
            key: _whole(state.pieces[name][key], bounds[name], device=dist.collective_device())
            .cpu()
            .view(shape)
            for key in state.keys
        }
        yield name, tensors


# --- where DeepSpeed keeps things
# -----------------------------------------------------------------------------------


class _Layout:
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

    def fragments(self) -> dict[str, _Fragment | None]:
        return {name: _Fragment(0, p.detach().view(-1), p, 0) for name, p in self.named.items()}

    def names_of_owners(self) -> list[list[str]]:
        """The parameters that each of `owners` holds over all ranks, in an order that the ranks share."""
        raise NotImplementedError("only a sharded optimizer has flat tensors of several parameters")

    def publish(self) -> None:
        """Bring the masters to the parameters that the forward pass uses."""


class _Unfused(_Layout):
    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        groups = zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True)
        return [pair for low, high in groups for pair in zip(low, high, strict=True)]

    def fragments(self) -> dict[str, _Fragment | None]:
        high = {id(low): high for low, high in self._pairs()}
        masters = {name: high[id(p)] for name, p in self.named.items()}
        return {name: _Fragment(0, m.detach().view(-1), m, 0) for name, m in masters.items()}

    def publish(self) -> None:
        for low, high in self._pairs():
            low.data.copy_(high.data)


class _Fused(_Layout):
    def fragments(self) -> dict[str, _Fragment | None]:
        names = {id(p): name for name, p in self.named.items()}
        found: dict[str, _Fragment | None] = {}
        for group, flat in zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups_flat, strict=True):
            offset = 0
            for low in group:
                view = flat.detach().narrow(0, offset, low.numel())
                found[names[id(low)]] = _Fragment(0, view, flat, offset)
                offset += low.numel()
        return {name: found[name] for name in self.named}

    def publish(self) -> None:
        for name, fragment in self.fragments().items():
            assert fragment is not None
            self.named[name].data.view(-1).copy_(fragment.master)


class _Sharded(_Layout):
    replicated = False

    def owners(self) -> list[torch.Tensor]:
        flats = getattr(self.wrapper, "single_partition_of_fp32_groups", None)
        return list(self.wrapper.fp32_groups_flat_partition if flats is None else flats)

    def names_of_owners(self) -> list[list[str]]:
        names = {id(p): name for name, p in self.named.items()}
        groups = getattr(self.wrapper, "bit16_groups", None) or self.wrapper.bf16_groups
        return [[names[id(p)] for p in group] for group in groups]

    def fragments(self) -> dict[str, _Fragment | None]:
        flats = self.owners()
        found: dict[str, _Fragment | None] = {}
        for name, parameter in self.named.items():
            mapping = parameter._hp_mapping
            if mapping is None:
                found[name] = None
                continue
            owner = flats[mapping.param_group_index]
            offset, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            view = owner.detach().narrow(0, offset, length)
            found[name] = _Fragment(mapping.lp_fragment_address.start, view, owner, offset)
        return found

    def publish(self) -> None:
        self.wrapper._hp_optimizer_states_linked = (
            False  # its one-shot links point at the state that was replaced
        )
        self.wrapper.update_lp_params()


class _Stage3(_Layout):
    replicated = False

    def owners(self) -> list[torch.Tensor]:
        return list(self.wrapper.fp32_partitioned_groups_flat)

    def names_of_owners(self) -> list[list[str]]:
        names: list[list[str]] = [[] for _ in self.owners()]
        for name, parameter in self.named.items():
            group, _, _ = self.wrapper.grad_position[self.wrapper.get_param_id(parameter)]
            names[group].append(name)
        return names

    def fragments(self) -> dict[str, _Fragment | None]:
        found: dict[str, _Fragment | None] = {}
        for name, parameter in self.named.items():
            group, offset, _ = self.wrapper.grad_position[self.wrapper.get_param_id(parameter)]
            padded = parameter.ds_tensor.ds_numel
            start = padded * self.wrapper._get_param_partition_rank(parameter)
            length = min(padded, parameter.ds_numel - start)
            if length <= 0:
                found[name] = None
                continue
            owner = self.wrapper.fp32_partitioned_groups_flat[group]
            found[name] = _Fragment(start, owner.detach().narrow(0, offset, length), owner, offset)
        return found

    def publish(self) -> None:
        for group in range(len(self.wrapper.fp32_partitioned_groups_flat)):
            self.wrapper._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self.wrapper.persistent_parameters
        if persistent:
            # Their gathered copies predate the seed: give them up and gather anew.
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


_LAYOUTS: dict[str, type[_Layout]] = {
    "FP16_UnfusedOptimizer": _Unfused,
    "FP16_Optimizer": _Fused,
    "DeepSpeedZeroOptimizer": _Sharded,
    "BF16_Optimizer": _Sharded,
    "DeepSpeedZeroOptimizer_Stage3": _Stage3,
}


def _layout(engine: Any) -> _Layout:
    return _LAYOUTS.get(type(engine.optimizer).__name__, _Layout)(engine)


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def _step_counter(layout: _Layout) -> float | None:
    """The optimizer's step count: the largest, since DeepSpeed's fused Adam counts in one parameter a group
    only."""
    steps = [float(s["step"]) for s in layout.states.values() if s and "exp_avg" in s]
    count = max(steps, default=0.0)
    # A rank may own nothing, and ZeRO-0's constructor takes a step of its own: the ranks' and the engine's
    # word counts.
    count = max(dist.gather_objects(count))
    taken = layout.engine.global_steps - layout.engine.skipped_steps
    return count if count and taken > 0 else None


def _fresh_step(optimizer: torch.optim.Optimizer, owner: torch.Tensor, step: float) -> Any:
    """A step counter of the kind that the optimizer keeps; one object each, since torch's Adam counts in
    place."""
    if not isinstance(optimizer, torch.optim.Adam):
        return int(step)
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(step, dtype=torch.float32, device=owner.device if fused else "cpu")


def counters(engine: Any) -> dict[str, Any]:
    """The engine's step counters and its loss scaler."""
    found = {key: getattr(engine, key) for key in ("global_steps", "global_samples", "skipped_steps")}
    for key in ("loss_scaler", "loss_scale_config"):
        if getattr(engine.optimizer, key, None) is not None:
            found[key] = getattr(engine.optimizer, key)
    return found


def _write_counters(engine: Any, counters: Mapping[str, Any]) -> None:
    for key, value in counters.items():
        setattr(engine.optimizer if key.startswith("loss_scal") else engine, key, value)


def _share(count: int) -> tuple[int, int]:
    """This rank's even share of `count` elements."""
    each = -(-count // dist.world_size())
    start = min(count, dist.rank() * each)
    return start, min(count, start + each)


def _keep_share(state: State) -> None:
    """Of pieces that every rank holds whole, keep this rank's share."""
    for held in state.pieces.values():
        for key, piece in held.items():
            start, stop = _share(piece.values.numel())
            held[key] = Piece(start, piece.values[start:stop].clone())


def _bounds(state: State) -> dict[str, list[tuple[int, int]]]:
    """(start, length) of every rank's piece of every parameter. Collective (one exchange)."""
    own = [(held[MASTER].start, held[MASTER].values.numel()) for held in state.pieces.values()]
    return _interchange(own, state.pieces)


def _interchange(own: list[tuple[int, int]], names: Iterable[str]) -> dict[str, list[tuple[int, int]]]:
    """{name: every rank's entry}, each rank giving one entry a name. Collective (one exchange)."""
    ranks: Sequence[list[tuple[int, int]]] = dist.gather_objects(own)
    return {name: [entries[i] for entries in ranks] for i, name in enumerate(names)}


def _chunks(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[list[tuple[str, int, int]]]:
    """All elements of all parameters in order, as lists of (name, first, end) of `CHUNK` elements."""
    chunk, room = [], CHUNK
    for name, shape in shapes.items():
        first, size = 0, math.prod(shape)
        while first < size:
            last = min(size, first + room)
            chunk.append((name, first, last))
            room -= last - first
            first = last
            if not room:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk


def _moved(
    state: State,
    key: str,
    chunk: Sequence[tuple[str, int, int]],
    *,
    have: Mapping[str, Sequence[tuple[int, int]]],
    want: Mapping[str, Sequence[tuple[int, int]]],
) -> Iterable[tuple[str, int, torch.Tensor]]:
    """Yield (name, first element, values) of what this rank wants of a chunk, from the ranks that have it.

    `have` and `want`: (start, length) of each rank's part of each parameter. Collective.
    """
    me, ranks = dist.rank(), range(dist.world_size())

    def overlaps(source: int, target: int) -> Iterable[tuple[str, int, int]]:
        for name, first, last in chunk:
            (start, length), (wanted, count) = have[name][source], want[name][target]
            low, high = max(first, start, wanted), min(last, start + length, wanted + count)
            if low < high:
                yield name, low, high

    def own(name: str, low: int, high: int) -> torch.Tensor:
        piece = state.pieces[name][key]
        return piece.values[low - piece.start : high - piece.start]

    nothing = torch.empty(0)
    sent = [torch.cat([own(*part) for part in overlaps(me, rank)] or [nothing]) for rank in ranks]
    coming = [list(overlaps(rank, me)) for rank in ranks]
    arrived = dist.exchange(sent, [sum(high - low for _, low, high in parts) for parts in coming])
    for parts, values in zip(coming, arrived, strict=True):
        at = 0
        for name, low, high in parts:
            yield name, low, values[at : at + high - low]
            at += high - low


def _whole(piece: Piece, bounds: Sequence[tuple[int, int]], *, device: torch.device) -> torch.Tensor:
    """The flattened parameter, put together from the ranks' pieces. Collective."""
    pieces = dist.gather_pieces(piece.values.to(device), [length for _, length in bounds])
    filled = sorted(
        (start, values) for (start, _), values in zip(bounds, pieces, strict=True) if values.numel()
    )
    return torch.cat([values for _, values in filled])
