"""How much a draw removes: from shares, from counts or from a budget of FLOPs to the two ratios that rank by.

Everything here is a pure function of settings and widths. `resolved` replaces what the settings ask for by
`head_ratio` and `neuron_ratio` of the draw that comes next, so the rest of the program knows ratios only.

With several draws ratios are those of each draw; counts and a budget are what the last draw must reach, and
the ones before approach them geometrically: draw i of n keeps dense * (target / dense) ** (i / n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from earlybert.config import SettingsError
from earlybert.ticket import TicketSettings, least_width


@dataclass(frozen=True)
class Work:
    """FLOPs of one token's forward pass, a multiply-add counted as 2."""

    head: float
    """One attention head: its rows of query, key and value, scores, context, its columns of the output."""
    neuron: float
    """One FFN neuron."""
    fixed: float = 0.0
    """What no draw removes: the masked-LM head on the masked positions."""

    def of(self, heads: Sequence[int], neurons: Sequence[int]) -> float:
        """Of a model with these heads and neurons a layer."""
        return self.fixed + self.head * sum(heads) + self.neuron * sum(neurons)


def bert_work(*, hidden: int, heads: int, vocabulary: int, sequence_length: float, predicted: float) -> Work:
    """Of a BERT of this width and dense number of heads, `predicted` the share of tokens that are masked."""
    size = hidden // heads
    matrices, scores = 2 * 4 * hidden * size, 2 * 2 * sequence_length * size
    masked_lm = predicted * (2 * hidden * hidden + 2 * hidden * vocabulary)
    return Work(head=matrices + scores, neuron=2 * 2 * hidden, fixed=masked_lm)


@dataclass(frozen=True)
class Widths:
    """Heads and neurons of each layer."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def resolved(
    settings: TicketSettings, *, now: Widths, dense: Widths, draw: int, work: Work
) -> TicketSettings:
    """The settings with the ratios of draw number `draw` (from 1), counted within the widths `now`.

    Raises SettingsError for a count above what is there and for a budget that cannot be reached.
    """
    if settings.kind == "layerdrop":  # ranks no units
        return settings
    part = draw / settings.draws
    heads, neurons = settings.head_ratio, settings.neuron_ratio
    if settings.budget is not None:
        heads = neurons = _share(settings, now=now, dense=dense, part=part, work=work)
    for name, kept, scope, own, whole in (
        ("heads", settings.heads_kept, settings.head_scope, now.heads, dense.heads),
        ("neurons", settings.neurons_kept, settings.neuron_scope, now.neurons, dense.neurons),
    ):
        if kept is None:
            continue
        places = len(whole) if scope == "layer" else 1
        if scope == "layer" and min(whole) < max(whole):
            raise SettingsError(
                f"ticket.{name}_kept = {kept} in each layer: the layers have {min(whole)} to {max(whole)} "
                f"{name}; say how many each keeps (ticket.{name}_per_layer), or a share of them"
            )
        if kept * places > sum(whole):
            most = sum(whole) // places
            raise SettingsError(
                f"ticket.{name}_kept = {kept}: there are {most} {name} {_in(scope)}; use at most {most}"
            )
        target = sum(whole) * (kept * places / sum(whole)) ** part
        ratio = max(0.0, 1 - target / sum(own))
        heads, neurons = (ratio, neurons) if name == "heads" else (heads, ratio)
    return replace(settings, head_ratio=heads, neuron_ratio=neurons)


def check(settings: TicketSettings, *, dense: Widths, work: Work) -> None:
    """Raise SettingsError where one of the draws, from a dense model of these widths, cannot be made."""
    if settings.kind == "layerdrop":
        layers = len(dense.heads)
        if layers < 2:
            raise SettingsError(
                'ticket.kind = "layerdrop" keeps the first layer, and there is no other; use another kind'
            )
        if not layers_gone(layers, ratio=settings.layer_ratio):
            raise SettingsError(
                f"ticket.layer_ratio = {settings.layer_ratio} removes none of {layers} layers; use "
                f"{1 / layers:.2f} for one of them"
            )
        return
    now = dense
    for number in range(1, settings.draws + 1):
        rules = resolved(settings, now=now, dense=dense, draw=number, work=work)
        rules.check_shape(now.heads, now.neurons)
        now = kept_widths(rules, now)


def layers_gone(count: int, *, ratio: float) -> int:
    """How many of `count` layers LayerDrop removes; at most half of them, so that the first one stays."""
    return min(round(ratio * count), count // 2)


def kept_widths(settings: TicketSettings, now: Widths) -> Widths:
    """Units that the ratios leave in each layer; under scope "global" spread evenly, which a draw may not
    do."""
    found = []
    for told, widths, ratio, scope, minimum, multiple in (
        (
            settings.heads_per_layer,
            now.heads,
            settings.head_ratio,
            settings.head_scope,
            settings.minimum_heads,
            settings.head_multiple,
        ),
        (
            settings.neurons_per_layer,
            now.neurons,
            settings.neuron_ratio,
            settings.neuron_scope,
            settings.minimum_neurons,
            settings.neuron_multiple,
        ),
    ):
        if told is not None:
            found.append(tuple(told))
            continue
        wanted = [width - round(ratio * width) for width in widths]
        if scope == "global":
            each, more = divmod(sum(widths) - round(ratio * sum(widths)), len(widths))
            wanted = [each + (place < more) for place in range(len(widths))]
        near = [(want + multiple // 2) // multiple * multiple for want in wanted]
        if scope == "global":
            near = wanted
        least = [least_width(width, minimum, multiple) for width in widths]
        found.append(tuple(min(w, max(low, n)) for w, low, n in zip(widths, least, near, strict=True)))
    return Widths(found[0], found[1])


def _share(settings: TicketSettings, *, now: Widths, dense: Widths, part: float, work: Work) -> float:
    """The least share, the same of heads and neurons, whose removal meets the budget."""
    assert settings.budget is not None
    whole = work.of(dense.heads, dense.neurons)

    def reached(share: float) -> float:
        left = kept_widths(replace(settings, head_ratio=share, neuron_ratio=share), now)
        return work.of(left.heads, left.neurons) / whole

    budget, least = settings.budget**part, reached(0.999)
    if least > budget:
        raise SettingsError(
            f"ticket.budget = {settings.budget}: the least that heads and neurons can reach is {least:.3f} "
            "of the dense step's FLOPs; raise it, or lower ticket.minimum_heads and ticket.minimum_neurons"
        )
    low, high = 0.0, 0.999
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) <= budget else (middle, high)
    return 0.0 if reached(0.0) <= budget else high


def _in(scope: str) -> str:
    return "in a layer" if scope == "layer" else "in all layers"
