"""The per-parameter state: fp32 master weights, optimizer moments and counters, read from an engine and put
into one.

It is the currency of every change of shape. Each rank holds, of each parameter, one contiguous piece of its
flattened elements (`Piece`); together the ranks hold each element exactly once. To read, a rank copies what
it owns; only counters travel. To seed, each element travels from the rank that read it to those that own it
now, a chunk of at most `CHUNK` elements at a time: no rank ever holds a whole parameter for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from earlybert import dist
from earlybert.layouts import Layout, layout_of
from earlybert.optim import Segment, Segments
from earlybert.shrink import Piece

UnitsOf = tuple[str, str, Callable[[torch.Tensor, Sequence[int]], torch.Tensor]]
MASTER = "master"
NOTHING = Piece(0, torch.empty(0))
POWERS = {
    MASTER: 1,
    "exp_avg": -1,
    "momentum_buffer": -1,
    "exp_avg_sq": -2,
    "max_exp_avg_sq": -2,
}
"""What an optimizer keeps for each element, and the power of a coefficient c that is folded into the weight:
W' = cW has the gradient dL/dW / c."""
_COUNTERS = {"global_steps", "global_samples", "skipped_steps"}
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
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
    """The optimizer's own step counter (bias correction); None where it has none or after a reset."""
    moments: tuple[str, ...] = ()
    """What the optimizer keeps for each element (`POWERS`); none before its first step or after a reset."""
    counters: dict[str, Any] = field(default_factory=dict)
    """The engine's counters and the loss scaler."""

    @property
    def keys(self) -> tuple[str, ...]:
        """ "master", and the moments where there are any (the same on all ranks)."""
        return (MASTER, *self.moments)


def from_module(module: torch.nn.Module) -> State:
    """The state of a plain fp32 module that no optimizer has touched: each rank takes its share of each
    parameter."""
    shapes, pieces = {}, {}
    for name, parameter in module.named_parameters():
        flat = parameter.detach().float().view(-1)
        start, stop = share(flat.numel())
        shapes[name] = tuple(parameter.shape)
        pieces[name] = {MASTER: Piece(start, flat[start:stop].clone())}
    return State(shapes, pieces)


Transform = Callable[[str, str, tuple[int, ...], Piece], Piece]
"""(parameter, "master" or moment, whole shape, piece) -> piece, cut or scaled."""


def read(engine: Any, *, transform: Transform | None = None, moments: bool = True) -> State:
    """Copy what this rank owns to host memory, one piece at a time. Collective, but only counters travel.

    `transform` may cut or scale a piece before it is copied; `shapes` stay those of the engine, so a caller
    that cuts replaces them. Without `moments` the masters alone. Must run at an optimizer-step boundary (no
    gradients pending).
    """
    layout = layout_of(engine)
    step, kept = _counted(layout) if moments else (None, ())
    state = State(_shapes(engine.module), {}, step, kept, counters(engine))
    for name, fragment in layout.fragments().items():
        held: dict[str, Piece] = {}
        for key in state.keys:
            if fragment is None:
                piece = NOTHING
            else:
                values = fragment.master if key == MASTER else fragment.moment(layout.states, key)
                # What every rank holds whole: each reads its share.
                first, last = share(values.numel()) if layout.replicated else (0, values.numel())
                piece = Piece(fragment.start + first, values.detach()[first:last])
            if transform is not None:
                piece = transform(name, key, state.shapes[name], piece)
            held[key] = Piece(piece.start, piece.values.to("cpu", torch.float32, copy=True))
        state.pieces[name] = held
    return state


def transformed(state: State, transform: Transform) -> State:
    """The state with each piece cut or scaled; `shapes` stay."""
    pieces = {
        name: {key: transform(name, key, state.shapes[name], piece) for key, piece in held.items()}
        for name, held in state.pieces.items()
    }
    return State(dict(state.shapes), pieces, state.step, state.moments, dict(state.counters))


def share(count: int) -> tuple[int, int]:
    """This rank's even share [first, last) of `count` elements."""
    each = -(-count // dist.world_size())
    start = min(count, dist.rank() * each)
    return start, min(count, start + each)


def unit_norms(engine: Any, widths: Mapping[str, int], units: Iterable[UnitsOf]) -> dict[str, torch.Tensor]:
    """L2 norm of all weights of each unit, {group: [units]}, the same on every rank. Collective (one sum).

    `widths`: units of each group; `units`: (group, parameter, flat elements and shape -> their unit in it).
    """
    layout, shapes = layout_of(engine), _shapes(engine.module)
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
    layout = layout_of(engine)
    assert _shapes(engine.module) == state.shapes, "the state and the module differ in names or shapes"
    layout.states.clear()
    fragments = layout.fragments()
    for owner in layout.owners() if state.moments else ():
        layout.states[owner] = {key: torch.zeros_like(owner.detach()) for key in state.moments}
        if state.step is not None:
            layout.states[owner]["step"] = _fresh_step(layout.optimizer, owner, state.step)
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
    layout, shapes = layout_of(engine), _shapes(engine.module)
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
    layout = layout_of(engine)
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


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}


def _counted(layout: Layout) -> tuple[float | None, tuple[str, ...]]:
    """The optimizer's step count, where it has one, and the names of what it keeps for each element.

    The largest count: DeepSpeed's fused Adam counts in one parameter a group only. Collective.
    """
    own = [(owner, states) for owner, states in layout.states.items() if states]
    steps = [float(states["step"]) for _, states in own if "step" in states]
    names = {
        name
        for owner, states in own
        for name, value in states.items()
        if name != "step" and isinstance(value, torch.Tensor) and value.numel() == owner.numel()
    }
    # A rank may own nothing, and ZeRO-0's constructor takes a step of its own: the ranks' and the engine's
    # word counts.
    ranks = dist.gather_objects((max(steps, default=None), sorted(names)))
    if layout.engine.global_steps <= layout.engine.skipped_steps:
        return None, ()
    found = tuple(sorted({name for _, kept in ranks for name in kept}))
    assert set(found) <= POWERS.keys(), found
    return max((step for step, _ in ranks if step is not None), default=None), found


def _fresh_step(optimizer: torch.optim.Optimizer, owner: torch.Tensor, step: float) -> Any:
    """A step counter of the kind that the optimizer keeps; one object each, since torch's Adam counts in
    place."""
    if not isinstance(optimizer, torch.optim.Adam):
        return int(step)
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(step, dtype=torch.float32, device=owner.device if fused else "cpu")


def counters(engine: Any) -> dict[str, Any]:
    """The engine's step counters and what moves in its dynamic loss scaler: plain numbers."""
    found: dict[str, Any] = {key: getattr(engine, key) for key in _COUNTERS}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if getattr(scaler, "dynamic", False):
        found["loss_scaler"] = {key: getattr(scaler, key) for key in _SCALER}
    return found


def _write_counters(engine: Any, counters: Mapping[str, Any]) -> None:
    for key in _COUNTERS & counters.keys():
        setattr(engine, key, counters[key])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if getattr(scaler, "dynamic", False):
        for key, value in counters.get("loss_scaler", {}).items():
            setattr(scaler, key, value)


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
