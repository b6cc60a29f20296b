"""From a ticket to smaller tensors: one pure index map that cuts weights and optimizer moments alike.

`index_map` gives `{parameter name: Cut(dim, kept indices)}`; every parameter is cut along at most one
dimension. A cut keeps the row-major order of what stays, so the piece `[a, b)` of a flattened parameter that
a ZeRO rank owns is cut into one contiguous piece of the flattened small parameter: no rank needs the other
ranks' elements to cut.

Head h owns rows h*H .. (h+1)*H of query, key and value (H the head size) and the same columns of the
attention's output projection. Neuron j owns row j of the first FFN matrix and column j of the second.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from earlybert.ticket import Kept, Ticket


@dataclass(frozen=True)
class Layer:
    """Names of one layer's parameters that belong to heads and to neurons."""

    head_rows: tuple[str, ...]
    """Cut along dimension 0 in blocks of the head size: query, key and value, weights and biases."""
    head_columns: str
    """The output projection's weight, cut along dimension 1 in blocks of the head size."""
    head_coefficients: str
    neuron_rows: tuple[str, ...]
    neuron_columns: str
    neuron_coefficients: str


@dataclass(frozen=True)
class Cut:
    """Keep `kept` (1-D int64, ascending) along dimension `dim`."""

    dim: int
    kept: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """Elements `[start, start + values.numel())` of a flattened parameter, as one rank holds them."""

    start: int
    values: torch.Tensor


def bert_layers(count: int) -> tuple[Layer, ...]:
    """Where heads and neurons live in a BERT encoder with Hugging Face's parameter names."""
    layers = []
    for index in range(count):
        at = f"bert.encoder.layer.{index}."
        rows = tuple(
            f"{at}attention.self.{p}.{k}" for p in ("query", "key", "value") for k in ("weight", "bias")
        )
        layers.append(
            Layer(
                head_rows=rows,
                head_columns=f"{at}attention.output.dense.weight",
                head_coefficients=f"{at}attention.self.coefficients",
                neuron_rows=(f"{at}intermediate.dense.weight", f"{at}intermediate.dense.bias"),
                neuron_columns=f"{at}output.dense.weight",
                neuron_coefficients=f"{at}intermediate.coefficients",
            )
        )
    return tuple(layers)


def index_map(heads: Kept, neurons: Kept, *, head_size: int) -> dict[str, Cut]:
    """The cuts that leave these heads and neurons (one tuple of indices a layer) of every layer."""
    cuts: dict[str, Cut] = {}
    within = torch.arange(head_size)
    for layer, head_indices, neuron_indices in zip(bert_layers(len(heads)), heads, neurons, strict=True):
        units = torch.tensor(head_indices, dtype=torch.int64)
        rows = (units[:, None] * head_size + within).flatten()
        cuts.update({name: Cut(0, rows) for name in layer.head_rows})
        cuts[layer.head_columns] = Cut(1, rows)
        cuts[layer.head_coefficients] = Cut(0, units)
        units = torch.tensor(neuron_indices, dtype=torch.int64)
        cuts.update({name: Cut(0, units) for name in layer.neuron_rows})
        cuts[layer.neuron_columns] = Cut(1, units)
        cuts[layer.neuron_coefficients] = Cut(0, units)
    return cuts


def cut(tensor: torch.Tensor, by: Cut | None) -> torch.Tensor:
    """Cut a whole parameter (or moment); None leaves it as it is."""
    return tensor if by is None else tensor.index_select(by.dim, by.kept.to(tensor.device))


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


def folded(values: torch.Tensor, coefficient: torch.Tensor, *, power: int) -> torch.Tensor:
    """`values` times coefficient ** power: 1 for weights (W' = c W), -1 and -2 for first and second moments.

    The moments follow the gradient's new units, dL/dW' = dL/dW / c. Where c is 0 they are 0: W' is dead.
    """
    if power < 0:
        return values * torch.where(coefficient == 0, 0.0, coefficient**power)
    return values * coefficient**power


def compose(outer: Kept, inner: Kept) -> Kept:
    """Indices of the dense model that stay after `outer` and then, counted within what it left, `inner`."""
    return tuple(tuple(o[i] for i in ins) for o, ins in zip(outer, inner, strict=True))


def shrunken(config: Any, ticket: Ticket, *, coefficients: str) -> Any:
    """A copy of the model's configuration with the ticket's shape; `coefficients` is the small model's
    setting."""
    values = config.to_dict()
    values["heads_per_layer"] = [len(kept) for kept in ticket.heads]
    values["neurons_per_layer"] = [len(kept) for kept in ticket.neurons]
    values["coefficients"] = coefficients
    return type(config).from_dict(values)


def _within(kept: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Those of `kept` in `[first, first + count)`, counted from `first`."""
    low, high = (int(torch.searchsorted(kept, edge)) for edge in (first, first + count))
    return kept[low:high] - first
