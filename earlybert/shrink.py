"""From a ticket to smaller tensors: one pure index map that cuts weights and optimizer moments alike.

`index_map` gives `{parameter name: Cut(dim, kept indices)}`; every parameter is cut along at most one
dimension. A cut keeps the row-major order of what stays, so the piece `[a, b)` of a flattened parameter that
a ZeRO rank owns is cut into one contiguous piece of the flattened small parameter: no rank needs the other
ranks' elements to cut.

Head h owns rows h*H .. (h+1)*H of query, key and value (H the head size) and the same columns of the
attention's output projection. Neuron j owns row j of the first FFN matrix and column j of the second. A fused
matrix has such rows once in each of its sections. Which parameters these are, the adapter says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from earlybert.adapters import Layer
from earlybert.ticket import Kept


@dataclass(frozen=True)
class Cut:
    """Keep `kept` (1-D int64, ascending) of the `whole` indices along dimension `dim`."""

    dim: int
    kept: torch.Tensor
    whole: int


@dataclass(frozen=True)
class Piece:
    """Elements `[start, start + values.numel())` of a flattened parameter, as one rank holds them."""

    start: int
    values: torch.Tensor


def index_map(
    layers: Sequence[Layer],
    heads: Kept,
    neurons: Kept,
    *,
    head_size: int,
    head_widths: Sequence[int],
    neuron_widths: Sequence[int],
) -> dict[str, Cut]:
    """The cuts that leave these heads and neurons (one tuple of indices a layer) of every layer.

    `head_widths`, `neuron_widths`: units of each layer before the cut; a fused matrix has that many a
    section.
    """
    cuts: dict[str, Cut] = {}
    for layer, kept_heads, kept_neurons, head_width, neuron_width in zip(
        layers, heads, neurons, head_widths, neuron_widths, strict=True
    ):
        for units, size, width, rows, columns, coefficients in (
            (kept_heads, head_size, head_width, layer.head_rows, layer.head_columns, layer.head_coefficients),
            (
                kept_neurons,
                1,
                neuron_width,
                layer.neuron_rows,
                layer.neuron_columns,
                layer.neuron_coefficients,
            ),
        ):
            kept = torch.tensor(units, dtype=torch.int64)
            inside = (kept[:, None] * size + torch.arange(size)).flatten()
            for row in rows:
                sections = torch.arange(row.sections)[:, None] * (width * size)
                cuts[row.name] = Cut(0, (sections + inside).flatten(), row.sections * width * size)
            cuts[columns] = Cut(1, inside, width * size)
            cuts[coefficients] = Cut(0, kept, width)
    return cuts


def cut(tensor: torch.Tensor, by: Cut | None) -> torch.Tensor:
    """Cut a whole parameter (or moment); None leaves it as it is."""
    return tensor if by is None else tensor.index_select(by.dim, by.kept.to(tensor.device))


def uncut(tensor: torch.Tensor, by: Cut | None) -> torch.Tensor:
    """The parameter before the cut, zeros where units went."""
    if by is None:
        return tensor
    shape = list(tensor.shape)
    shape[by.dim] = by.whole
    return tensor.new_zeros(shape).index_copy_(by.dim, by.kept.to(tensor.device), tensor)


def cut_shape(shape: Sequence[int], by: Cut | None) -> tuple[int, ...]:
    """The shape after the cut."""
    if by is None:
        return tuple(shape)
    return tuple(by.kept.numel() if dim == by.dim else size for dim, size in enumerate(shape))


def cut_piece(piece: Piece, shape: Sequence[int], by: Cut | None) -> Piece:
    """Cut the piece of a flattened parameter of this shape; the result is a piece of the flattened small
    parameter."""
    if by is None:
        return piece
    columns, kept = (shape[1] if len(shape) == 2 else 1), by.kept.to(piece.values.device)
    start, stop = piece.start, piece.start + piece.values.numel()
    # A part of a row, whole rows, a part of a row: so no index is longer than a dimension.
    rows_begin, rows_end = -(-start // columns) * columns, stop // columns * columns
    edges = sorted({start, min(stop, rows_begin), max(start, rows_end), stop})
    parts = []
    for low, high in itertools.pairwise(edges):
        row, column = divmod(low, columns)
        block = piece.values[low - start : high - start].view(-1, min(high - low, columns))
        if by.dim == 0:
            parts.append(block.index_select(0, _within(kept, row, block.shape[0])).flatten())
        else:
            parts.append(block.index_select(1, _within(kept, column, block.shape[1])).flatten())
    row, column = divmod(start, columns)
    if by.dim == 0:
        above = int(torch.searchsorted(kept, row))
        partly = column if above < kept.numel() and kept[above] == row else 0
        first = above * columns + partly
    else:
        first = row * kept.numel() + int(torch.searchsorted(kept, column))
    return Piece(first, torch.cat(parts) if parts else piece.values)


def spread(vector: torch.Tensor, shape: Sequence[int], piece: Piece) -> torch.Tensor:
    """The factor for each element of a piece of a [rows, columns] matrix whose columns are scaled by
    `vector`.

    `vector` [units] is repeated over the columns of each unit: columns / units is the head size, or 1 for
    neurons.
    """
    columns, count = shape[1], piece.values.numel()
    row = vector.to(piece.values.device).repeat_interleave(columns // vector.numel())
    return row.roll(-piece.start % columns).repeat(-(-count // columns))[:count]


def fold_map(layers: Sequence[Layer], coefficients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name of a column-scaled matrix: its coefficients}: where c * x before a matrix product folds into the
    matrix."""
    folds = {}
    for layer in layers:
        folds[layer.head_columns] = coefficients[layer.head_coefficients]
        folds[layer.neuron_columns] = coefficients[layer.neuron_coefficients]
    return folds


def without_coefficients(
    layers: Sequence[Layer], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whole weights with the coefficients folded in and gone, where there are any."""
    coefficients = {name for layer in layers for name in (layer.head_coefficients, layer.neuron_coefficients)}
    plain = {name: value for name, value in weights.items() if name not in coefficients}
    if len(plain) < len(weights):
        for name, vector in fold_map(layers, weights).items():
            plain[name] = plain[name] * vector.repeat_interleave(plain[name].shape[1] // vector.numel())
    return plain


def folded(values: torch.Tensor, coefficient: torch.Tensor, *, power: int) -> torch.Tensor:
    """`values` times coefficient ** power: 1 for weights (W' = c W), -1 and -2 for first and second moments.

    The moments follow the gradient's new units, dL/dW' = dL/dW / c. Where c is 0 they are 0: W' is dead.
    """
    if power < 0:
        return values * torch.where(coefficient == 0, 0.0, coefficient**power)
    return values * coefficient**power


def compose(outer: Kept, inner: Kept) -> Kept:
    """Indices of the dense model that stay after `outer` and then, counted within what it left, `inner`.

    A layer that `outer` removed stays empty; `inner` has none for it.
    """
    left = iter(inner)
    found = tuple(tuple(o[i] for i in next(left)) if o else () for o in outer)
    assert next(left, None) is None
    return found


def present(kept: Kept) -> Kept:
    """Without the layers that were removed."""
    return tuple(units for units in kept if units)


def renames(
    names: Iterable[str], old: Sequence[Layer], new: Sequence[Layer], kept: Kept
) -> dict[str, str | None]:
    """{parameter: its name in the model of the layers that kept any unit}, None where its layer went.

    `old` and `new`: the layers of the large and of the small model.
    """
    left = iter(new)
    modules = {
        layer.module: next(left).module if units else None for layer, units in zip(old, kept, strict=True)
    }
    found: dict[str, str | None] = {}
    for name in names:
        found[name] = name
        for before, after in modules.items():
            if name.startswith(f"{before}."):
                found[name] = None if after is None else after + name[len(before) :]
    return found


def _within(kept: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Those of `kept` in `[first, first + count)`, counted from `first`."""
    low, high = (int(torch.searchsorted(kept, edge)) for edge in (first, first + count))
    return kept[low:high] - first
