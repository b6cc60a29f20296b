"""The state of a large model, made that of the small one: cut, folded, renamed.

`cut_state` applies `cutter` to every piece while it is read, so nothing large is copied, and `settle` to the
result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from earlybert import state
from earlybert.adapters import Adapter, Layer, Shape
from earlybert.shrink import Cut, Piece, cut_piece, cut_shape, fold_map, folded, index_map, renames, spread
from earlybert.state import MASTER, POWERS, State, Transform
from earlybert.ticket import Kept, Ticket, TicketSettings


def coefficient_names(layers: Sequence[Layer]) -> tuple[list[str], list[str]]:
    """Names of the heads' and of the neurons' coefficients, one a layer."""
    return [x.head_coefficients for x in layers], [x.neuron_coefficients for x in layers]


def all_coefficients(layers: Sequence[Layer]) -> list[str]:
    """Both families' names in one list."""
    heads, neurons = coefficient_names(layers)
    return heads + neurons


def ticket_cuts(layers: Sequence[Layer], ticket: Ticket, *, head_size: int) -> dict[str, Cut]:
    """The ticket's index map."""
    return index_map(
        layers,
        ticket.heads,
        ticket.neurons,
        head_size=head_size,
        head_widths=ticket.head_widths,
        neuron_widths=ticket.neuron_widths,
    )


def cutter(
    layers: Sequence[Layer],
    cuts: Mapping[str, Cut],
    coefficients: Mapping[str, torch.Tensor],
    *,
    fold: bool,
    still: bool,
) -> Transform:
    """The transform that cuts each piece, folds `coefficients` (whole masters by name; none is fine) into the
    matrices that read them if `fold`, and forgets their moments if they are to stand `still`."""
    folds = fold_map(layers, coefficients) if fold and coefficients else {}

    def transform(name: str, key: str, shape: tuple[int, ...], piece: Piece) -> Piece:
        if name in folds and piece.values.numel():
            factor = spread(folds[name], shape, piece)
            piece = Piece(piece.start, folded(piece.values, factor, power=POWERS[key]))
        elif name in coefficients and (fold or (still and key != MASTER)):
            # Folded, its value stands in the weights and the next search starts from 1. Frozen, a moment that
            # was carried over would go on moving it.
            value = 1.0 if key == MASTER else 0.0
            piece = Piece(piece.start, torch.full_like(piece.values, value))
        return cut_piece(piece, shape, cuts.get(name))

    return transform


def cut_state(
    inner: Any,
    adapter: Adapter,
    ticket: Ticket,
    *,
    settings: TicketSettings,
    last: bool,
    anchor: State | None = None,
) -> State:
    """The state of a DeepSpeed engine, or `anchor`, that of the step to rewind to, cut to the ticket.

    Collective. Coefficients are folded in and moments reset where the settings say so; `last`: no search
    comes after.
    """
    shape, layers = adapter.shape(inner.module), adapter.layers(inner.module.config)
    names = all_coefficients(layers) if shape.coefficients != "none" else []
    values = state.gather(inner, names) if anchor is None else state.whole(anchor, names)
    transform = cutter(
        layers,
        ticket_cuts(layers, ticket, head_size=shape.head_size),
        values,
        fold=settings.coefficients == "fold",
        still=last and settings.coefficients == "freeze",
    )
    if anchor is None:
        return state.read(inner, transform=transform, moments=settings.moments == "keep")
    kept = state.transformed(anchor, transform)
    kept.counters = state.counters(inner)
    return kept


def settle(
    kept: State,
    cuts: Mapping[str, Cut],
    *,
    old: Sequence[Layer],
    new: Sequence[Layer],
    heads: Kept,
    drop: Sequence[str],
) -> None:
    """Give a state whose pieces were cut the small model's shapes and names, without the parameters
    `drop`."""
    named = renames(kept.shapes, old, new, heads)
    shapes, pieces = {}, {}
    for name, shape in kept.shapes.items():
        small = named[name]
        if small is not None and name not in drop:
            shapes[small], pieces[small] = cut_shape(shape, cuts.get(name)), kept.pieces[name]
    kept.shapes, kept.pieces = shapes, pieces


def dampers(
    layers: Sequence[Layer],
    shape: Shape,
    *,
    heads: Kept,
    neurons: Kept,
    factor: float,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[int, torch.Tensor]]:
    """{weight: (dimension, factor of each index on `device`)}: 1 for units of the mask, `factor` for others.

    Coefficients are left out: they must be free to bring a unit back.
    """
    cuts = index_map(
        layers,
        heads,
        neurons,
        head_size=shape.head_size,
        head_widths=shape.heads,
        neuron_widths=shape.neurons,
    )
    own = set(all_coefficients(layers))
    found = {}
    for name, by in cuts.items():
        if name not in own:
            vector = torch.full((by.whole,), factor)
            vector[by.kept] = 1.0
            found[name] = (by.dim, vector.to(device))  # once, not in each backward pass
    return found


def small_config(adapter: Adapter, config: object, ticket: Ticket, *, coefficients: str) -> object:
    """The small model's config; a layer that keeps no unit is gone."""
    stays = [layer for layer, heads in enumerate(ticket.heads) if heads]
    return adapter.reshaped(
        config,
        heads=[len(ticket.heads[layer]) for layer in stays],
        neurons=[len(ticket.neurons[layer]) for layer in stays],
        coefficients=coefficients,
        layers=stays,
    )
