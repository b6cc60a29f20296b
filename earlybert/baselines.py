"""Tickets to compare the early-bird ticket with, drawn by the same hook at `ticket.latest_step`.

*Random*: any units. *Magnitude*: the units with the largest weights. *LayerDrop* (Fan et al., "Reducing
Transformer Depth on Demand with Structured Dropout", ICLR 2020): layers are dropped at random while the
search lasts, and the draw removes whole layers. In the ticket a removed layer keeps no head and no neuron.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from earlybert import state
from earlybert.adapters import Adapter, Layer
from earlybert.config import as_dict
from earlybert.targets import layers_gone
from earlybert.ticket import Ticket, TicketSettings, draw


def ticket(
    inner: Any, adapter: Adapter, *, rules: TicketSettings, seed: int, step: int, number: int
) -> Ticket:
    """Draw the ticket of `rules.kind` from a DeepSpeed engine; `number`: how many were drawn before.
    Collective."""
    shape = adapter.shape(inner.module)
    if rules.kind == "layerdrop":
        return layerdrop_ticket(shape.heads, shape.neurons, settings=rules, step=step)
    widths = {"heads": shape.heads, "neurons": shape.neurons}
    if rules.kind == "random":
        scores = {
            family: random_scores(own, seed=seed, family=family, draw=number)
            for family, own in widths.items()
        }
    else:
        norms = state.unit_norms(
            inner,
            {f"{family} {i}": width for family, own in widths.items() for i, width in enumerate(own)},
            [
                (f"{family} {i}", name, unit)
                for i, layer in enumerate(adapter.layers(inner.module.config))
                for family, name, unit in units_of(layer, head_size=shape.head_size)
            ],
        )
        scores = {family: [norms[f"{family} {i}"] for i in range(len(own))] for family, own in widths.items()}
    return draw(scores["heads"], scores["neurons"], settings=rules, step=step, reason=rules.kind)


def random_scores(widths: Sequence[int], *, seed: int, family: str, draw: int) -> list[torch.Tensor]:
    """Uniform scores, a pure function of (seed, family, number of the draw, layer)."""
    scores = []
    for layer, width in enumerate(widths):
        digest = hashlib.sha256(f"random ticket {seed} {family} {draw} {layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        scores.append(torch.rand(width, generator=generator))
    return scores


def units_of(
    layer: Layer, *, head_size: int
) -> Iterable[tuple[str, str, Callable[[torch.Tensor, Sequence[int]], torch.Tensor]]]:
    """Yield (family, parameter, flat elements and shape -> their unit) of a layer's weights."""

    def rows(size: int, sections: int) -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor]:
        def unit(flat: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
            row = flat // shape[1] if len(shape) > 1 else flat
            return row % (shape[0] // sections) // size

        return unit

    def columns(size: int) -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor]:
        return lambda flat, shape: flat % shape[1] // size

    for family, size, own, reading in (
        ("heads", head_size, layer.head_rows, layer.head_columns),
        ("neurons", 1, layer.neuron_rows, layer.neuron_columns),
    ):
        for row in own:
            yield family, row.name, rows(size, row.sections)
        yield family, reading, columns(size)


def layerdrop_ticket(
    heads: Sequence[int], neurons: Sequence[int], *, settings: TicketSettings, step: int
) -> Ticket:
    """Remove `layer_ratio` of the layers, evenly spaced, never the first."""
    count = len(heads)
    gone = dropped_layers(count, ratio=settings.layer_ratio)
    kept = [layer not in gone for layer in range(count)]
    return Ticket(
        step=step,
        heads=tuple(tuple(range(w)) if k else () for w, k in zip(heads, kept, strict=True)),
        neurons=tuple(tuple(range(w)) if k else () for w, k in zip(neurons, kept, strict=True)),
        head_widths=tuple(heads),
        neuron_widths=tuple(neurons),
        reason=f"layerdrop: {len(gone)} of {count} layers removed",
        settings=as_dict(settings),
    )


def dropped_layers(count: int, *, ratio: float) -> tuple[int, ...]:
    """Indices of `targets.layers_gone` layers in the middle of equal stretches."""
    gone = layers_gone(count, ratio=ratio)
    return tuple((2 * place + 1) * count // (2 * gone) for place in range(gone))


def drop_layers(module: nn.Module, layers: Sequence[Layer], *, probability: float) -> None:
    """While it trains, let each layer's input pass by it with this probability, in each forward pass anew.

    The layer is computed and its output left out, so every parameter has a gradient on every rank. The coins
    are torch's own generator on the host, thrown before the pass: a seeded step repeats them, and a compiled
    layer reads a tensor like any other. A layer that is computed again in the backward pass (activation
    checkpointing) finds the coins of the last forward pass.
    """

    def throw(whole: nn.Module, _: tuple[Any, ...]) -> None:
        if not whole.training:
            return
        stays_L = (torch.rand(len(layers)) >= probability).to(next(whole.parameters()).device)
        for layer, stays in zip(layers, stays_L.unbind(), strict=True):
            # On the layer, not in a hook of its own: layers alike share what the compiler made of one.
            whole.get_submodule(layer.module).stays = stays  # type: ignore[assignment]

    def hook(layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        if not layer.training:
            return output
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        mixed = torch.where(layer.stays, hidden, inputs[0])
        return mixed if isinstance(output, torch.Tensor) else (mixed, *output[1:])

    module.register_forward_pre_hook(throw)
    for layer in layers:
        module.get_submodule(layer.module).register_forward_hook(hook)
