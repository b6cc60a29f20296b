"""The early-bird ticket: masks from coefficients, the distance between masks, the ticket's file.

A mask says which heads and neurons stay. It is ranked by |c| on the **fp32 master** values: near 1.0 bf16 has
steps of 2^-8, so ranking its values would rank ties (docs/method.md section 1). Counts are exact, ties go to
the lower index.

The distance between two masks is their normalised Hamming distance divided by its chance level 2p(1-p), p
being the share that is removed: 0 is the same mask, 1 is what two independent masks would show.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from earlybert.config import EarlyBertError, SettingsError, as_dict, write_atomically

FORMAT_VERSION = 2
Kept = tuple[tuple[int, ...], ...]
"""Indices that stay, ascending, one tuple a layer."""


@dataclass(frozen=True)
class TicketSettings:
    """When to draw, how much to remove and how the small model starts (the `[ticket]` table)."""

    enabled: bool = True
    """Search and draw; false trains the dense model without coefficients."""
    kind: Literal["early-bird", "random", "magnitude", "layerdrop"] = "early-bird"
    """How the units that stay are chosen: by the search, or as a baseline drawn at `latest_step`: any units,
    those with the largest weights, or all units of evenly spaced layers (`layer_ratio`, `layerdrop`)."""
    penalty: float = 1e-4
    """lambda of the L1 term lambda * sum |c| (docs/method.md section 1)."""
    head_ratio: float = 1 / 3
    """Share of the attention heads to remove (the paper's 4 of 12)."""
    neuron_ratio: float = 0.3
    """Share of the FFN intermediate neurons to remove."""
    heads_kept: int | None = None
    """Heads that stay, in place of `head_ratio`: in each layer, or in all layers with scope "global"."""
    neurons_kept: int | None = None
    """Neurons that stay, in place of `neuron_ratio`: in each layer, or in all layers with scope "global"."""
    heads_per_layer: tuple[int, ...] | None = None
    """Heads that stay in each layer, in place of ratio, count and budget: the shape of another ticket."""
    neurons_per_layer: tuple[int, ...] | None = None
    """Neurons that stay in each layer, in place of ratio, count and budget."""
    budget: float | None = None
    """FLOPs of the small model's step over the dense one's, in place of both ratios: the same share of heads
    and of neurons goes."""
    head_scope: Literal["layer", "global"] = "layer"
    """Rank the heads within each layer or over all layers."""
    neuron_scope: Literal["layer", "global"] = "global"
    """Rank the neurons within each layer or over all layers."""
    minimum_heads: int = 1
    """Heads that every layer keeps."""
    minimum_neurons: int = 64
    """Neurons that every layer keeps (fewer where the layer has fewer)."""
    head_multiple: int = 1
    """Kept heads a layer are a multiple of this."""
    neuron_multiple: int = 64
    """Kept neurons a layer are a multiple of this, which tensor cores like; 1 turns the rounding off."""
    every: int = 20
    """Optimizer steps between two looks at the coefficients."""
    minimum_step: int = 100
    """No draw before this many steps of search."""
    latest_step: int = 400
    """Draw at this step of search at the latest; the paper searches for 400 steps."""
    window: int = 5
    """Masks in the FIFO: the newest is compared with the `window - 1` before it."""
    settled_distance: float = 0.1
    """Two masks whose chance-normalised distance is at most this count as the same ticket."""
    breakdown_distance: float = 0.5
    """A family that had settled and now lies this far from its last settled mask has broken down (1 is
    chance)."""
    on_breakdown: Literal["draw", "stop"] = "draw"
    """Then: draw at once with that family's last settled mask, or end the run with a message."""
    draws: int = 1
    """Draws in one run; each searches anew on the model that the one before left."""
    start: Literal["keep", "rewind"] = "keep"
    """Weights after the draw: those of the drawing step, or those of `rewind_step`."""
    rewind_step: int = 0
    """Optimizer step whose weights a rewind brings back; 0 are the initial ones."""
    coefficients: Literal["fold", "freeze", "train"] = "fold"
    """Coefficients after the last draw: folded into the weights, kept but frozen, or trained on without
    penalty."""
    moments: Literal["reset", "keep"] = "reset"
    """Optimizer moments after the draw."""
    rewarmup_steps: int = 0
    """Steps after a draw over which the learning rate rises linearly back to its schedule."""
    damping: float = 1.0
    """Factor of the weight gradients of units outside the newest mask while the search lasts; 1 is off. Their
    coefficients learn on, so a unit can come back."""
    layer_ratio: float = 1 / 3
    """kind "layerdrop": share of the layers that the draw removes."""
    layerdrop: float = 0.2
    """kind "layerdrop": probability with which a layer is passed by while the search lasts."""

    def __post_init__(self) -> None:
        for name in ("head_ratio", "neuron_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"ticket.{name} = {getattr(self, name)}: must lie in [0, 1)")
        self._check_targets()
        self._check_start()
        for name in (
            "minimum_heads",
            "minimum_neurons",
            "head_multiple",
            "neuron_multiple",
            "every",
            "draws",
        ):
            if getattr(self, name) < 1:
                raise SettingsError(f"ticket.{name} = {getattr(self, name)}: must be at least 1")
        if self.window < 2:
            raise SettingsError(f"ticket.window = {self.window}: at least 2 masks are needed to compare")
        if self.penalty < 0:
            raise SettingsError(f"ticket.penalty = {self.penalty}: must not be negative")
        if not 0 <= self.settled_distance < 1:
            raise SettingsError(f"ticket.settled_distance = {self.settled_distance}: must lie in [0, 1)")
        if not self.settled_distance < self.breakdown_distance <= 1:
            raise SettingsError(
                f"ticket.breakdown_distance = {self.breakdown_distance}: must lie above "
                f"ticket.settled_distance = {self.settled_distance} and not above 1"
            )
        if not 0 < self.minimum_step <= self.latest_step:
            raise SettingsError(
                f"ticket.minimum_step = {self.minimum_step} and ticket.latest_step = {self.latest_step}: "
                "need 0 < minimum_step <= latest_step"
            )

    def _check_targets(self) -> None:
        for name in ("heads_kept", "neurons_kept"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"ticket.{name} = {value}: must be at least 1")
            if value is not None and self.budget is not None:
                raise SettingsError(f"ticket.{name} and ticket.budget are both set; use one of them")
        for name, other in (("heads_per_layer", "heads_kept"), ("neurons_per_layer", "neurons_kept")):
            if getattr(self, name) is None:
                continue
            for rival in (other, "budget"):
                if getattr(self, rival) is not None:
                    raise SettingsError(f"ticket.{name} and ticket.{rival} are both set; use one of them")
            if self.draws > 1 or self.kind == "layerdrop":
                raise SettingsError(
                    f"ticket.{name} is the shape of one draw of heads and neurons; use draws = 1 and another "
                    'kind than "layerdrop"'
                )
        if self.budget is not None and not 0 < self.budget <= 1:
            raise SettingsError(f"ticket.budget = {self.budget}: must lie in (0, 1]")
        if not 0 < self.layer_ratio <= 0.5:
            raise SettingsError(f"ticket.layer_ratio = {self.layer_ratio}: must lie in (0, 0.5]")
        if not 0 <= self.layerdrop < 1:
            raise SettingsError(f"ticket.layerdrop = {self.layerdrop}: must lie in [0, 1)")
        if self.kind == "layerdrop":
            if self.draws > 1:
                raise SettingsError('ticket.kind = "layerdrop" removes its layers in one draw; use draws = 1')
            for name in ("heads_kept", "neurons_kept", "budget"):
                if (value := getattr(self, name)) is not None:
                    raise SettingsError(
                        f"ticket.{name} = {value} says nothing of layers, which ticket.kind = "
                        '"layerdrop" removes; set ticket.layer_ratio instead'
                    )

    def _check_start(self) -> None:
        if self.rewarmup_steps < 0:
            raise SettingsError(f"ticket.rewarmup_steps = {self.rewarmup_steps}: must not be negative")
        if not 0 <= self.damping <= 1:
            raise SettingsError(f"ticket.damping = {self.damping}: must lie in [0, 1]")
        if self.damping < 1 and self.kind != "early-bird":
            raise SettingsError(f'ticket.damping = {self.damping} needs a search; use kind = "early-bird"')
        if not 0 <= self.rewind_step < self.latest_step:
            raise SettingsError(
                f"ticket.rewind_step = {self.rewind_step}: must lie in [0, ticket.latest_step = "
                f"{self.latest_step})"
            )
        if self.rewind_step and self.start != "rewind":
            raise SettingsError(
                f'ticket.rewind_step = {self.rewind_step} needs ticket.start = "rewind"; set both or none'
            )
        if self.rewind_step >= self.minimum_step and self.kind == "early-bird" and self.start == "rewind":
            raise SettingsError(
                f"ticket.rewind_step = {self.rewind_step}: the draw may come at ticket.minimum_step = "
                f"{self.minimum_step} already; rewind to a step before it"
            )
        if self.start == "rewind" and self.moments == "keep":
            raise SettingsError(
                'ticket.moments = "keep" with ticket.start = "rewind": the moments of the drawing step do '
                'not belong to the weights of another one; use moments = "reset"'
            )

    @property
    def searches(self) -> bool:
        """True where coefficients are learned; the baselines need none."""
        return self.kind == "early-bird"

    def check_shape(self, heads: Sequence[int], neurons: Sequence[int]) -> None:
        """Raise SettingsError if a draw from layers of these widths would leave a layer with too little."""
        families: tuple[tuple[str, Sequence[int], float, str, int, int], ...] = (
            ("head", heads, self.head_ratio, self.head_scope, self.minimum_heads, self.head_multiple),
            (
                "neuron",
                neurons,
                self.neuron_ratio,
                self.neuron_scope,
                self.minimum_neurons,
                self.neuron_multiple,
            ),
        )
        for family, widths, ratio, scope, minimum, multiple in families:
            told = self.heads_per_layer if family == "head" else self.neurons_per_layer
            if told is not None:
                if len(told) != len(widths) or not all(0 < t <= w for t, w in zip(told, widths, strict=True)):
                    raise SettingsError(
                        f"ticket.{family}s_per_layer = {list(told)}: need {len(widths)} numbers from 1 to "
                        f"{', '.join(map(str, widths))}"
                    )
                continue
            least = [least_width(width, minimum, multiple) for width in widths]
            if scope == "layer":
                for layer, width in enumerate(widths):
                    if width - round(ratio * width) < 1:
                        raise SettingsError(
                            f"ticket.{family}_ratio = {ratio} would remove all {width} {family}s of "
                            f"layer {layer}; use at most {(width - 1) / width:.2f}"
                        )
            elif sum(widths) - round(ratio * sum(widths)) < sum(least):
                raise SettingsError(
                    f"ticket.{family}_ratio = {ratio} keeps {sum(widths) - round(ratio * sum(widths))} "
                    f"{family}s, but {len(widths)} layers with at least {least[0]} each need {sum(least)}; "
                    f"lower the ratio or ticket.minimum_{family}s"
                )


@dataclass(frozen=True)
class Ticket:
    """Which heads and neurons stay, where that was decided, and the distances that led to it."""

    step: int
    heads: Kept
    neurons: Kept
    head_widths: tuple[int, ...]
    """Heads a layer before the draw."""
    neuron_widths: tuple[int, ...]
    """Neurons a layer before the draw."""
    reason: str = ""
    distances: tuple[tuple[int, float | None, float | None], ...] = ()
    """(step, heads, neurons) of each look since the search began; None while the window fills."""
    settings: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    """Every look of the search that led here (`search.Search`), for the heat map; None for other tickets."""

    @property
    def sha256(self) -> str:
        """Hash of what decides the small model's shape: the step and the kept indices."""
        return hashlib.sha256(json.dumps([self.step, self.heads, self.neurons]).encode()).hexdigest()

    def __str__(self) -> str:
        kept_heads, kept_neurons = sum(map(len, self.heads)), sum(map(len, self.neurons))
        return (
            f"step {self.step}: keep {kept_heads:,} of {sum(self.head_widths):,} heads, "
            f"{kept_neurons:,} of {sum(self.neuron_widths):,} neurons ({self.reason})"
        )

    def to_json(self) -> dict[str, Any]:
        return {"version": FORMAT_VERSION, **asdict(self), "sha256": self.sha256}

    @staticmethod
    def from_json(values: dict[str, Any], *, where: str) -> Ticket:
        """Rebuild a ticket; raises EarlyBertError where fields are missing, out of range or do not match the
        hash."""
        try:
            if values["version"] != FORMAT_VERSION:
                raise EarlyBertError(
                    f"{where}: ticket format {values['version']}, this program reads {FORMAT_VERSION}; "
                    "draw it again"
                )
            ticket = Ticket(
                step=int(values["step"]),
                heads=tuple(tuple(layer) for layer in values["heads"]),
                neurons=tuple(tuple(layer) for layer in values["neurons"]),
                head_widths=tuple(values["head_widths"]),
                neuron_widths=tuple(values["neuron_widths"]),
                reason=values["reason"],
                distances=tuple((s, h, n) for s, h, n in values["distances"]),
                settings=values["settings"],
                search=values["search"],
            )
            stated = values["sha256"]
        except (KeyError, TypeError) as error:
            raise EarlyBertError(
                f"{where}: not a ticket ({error!r}); use the ticket.json of a run"
            ) from error
        if ticket.sha256 != stated:
            raise EarlyBertError(f"{where}: its content does not match its sha256 {stated}; restore the file")
        return ticket

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Ticket:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EarlyBertError(f"{path}: cannot be read as a ticket: {error}") from error
        return Ticket.from_json(values, where=str(path))


def keep(
    coefficients: Sequence[torch.Tensor],
    *,
    ratio: float,
    scope: str,
    minimum: int,
    multiple: int,
    counts: Sequence[int] | None = None,
) -> Kept:
    """Choose the units of one family that stay: the largest |c|, an exact count, ties to the lower index.

    `coefficients`: one 1-D fp32 tensor a layer. With `multiple` 1 exactly `round(ratio * total)` units go (in
    each layer for scope "layer", over all layers for "global", as far as `minimum` allows); otherwise each
    layer's width is rounded to a multiple, the total staying as near as the multiple allows. `counts`: how
    many each layer keeps, in place of all that.
    """
    widths = [c.numel() for c in coefficients]
    ranked = [c.detach().abs().sort(descending=True, stable=True) for c in coefficients]
    if counts is not None:
        pass
    elif scope == "layer":
        wanted = [width - round(ratio * width) for width in widths]
        counts = [
            _round_widths([want], [width], minimum=minimum, multiple=multiple)[0]
            for want, width in zip(wanted, widths, strict=True)
        ]
    else:
        total = sum(widths) - round(ratio * sum(widths))
        counts = _global_counts([r.values for r in ranked], total=total, minimum=minimum, multiple=multiple)
    kept = (r.indices[:count].sort().values for r, count in zip(ranked, counts, strict=True))
    return tuple(tuple(indices.tolist()) for indices in kept)


def draw(
    heads: Sequence[torch.Tensor],
    neurons: Sequence[torch.Tensor],
    *,
    settings: TicketSettings,
    step: int,
    reason: str = "",
    distances: Sequence[tuple[int, float | None, float | None]] = (),
) -> Ticket:
    """Draw the ticket from fp32 coefficients (one 1-D tensor a layer for each family)."""
    kept_heads, kept_neurons = masks(heads, neurons, settings=settings)
    return Ticket(
        step=step,
        heads=kept_heads,
        neurons=kept_neurons,
        head_widths=tuple(c.numel() for c in heads),
        neuron_widths=tuple(c.numel() for c in neurons),
        reason=reason,
        distances=tuple(distances),
        settings=as_dict(settings),
    )


def masks(
    heads: Sequence[torch.Tensor], neurons: Sequence[torch.Tensor], *, settings: TicketSettings
) -> tuple[Kept, Kept]:
    """Both families' kept indices under `settings`."""
    return (
        keep(
            heads,
            ratio=settings.head_ratio,
            scope=settings.head_scope,
            minimum=settings.minimum_heads,
            multiple=settings.head_multiple,
            counts=settings.heads_per_layer,
        ),
        keep(
            neurons,
            ratio=settings.neuron_ratio,
            scope=settings.neuron_scope,
            minimum=settings.minimum_neurons,
            multiple=settings.neuron_multiple,
            counts=settings.neurons_per_layer,
        ),
    )


def distance(a: Kept, b: Kept, *, widths: Sequence[int]) -> float:
    """Chance-normalised Hamming distance of two masks of one family over layers of these widths (0 same, 1
    chance).

    The chance level is that of two independent masks with the shares p and q removed: p(1-q) + q(1-p).
    """
    total = sum(widths)
    differing = sum(len(set(x) ^ set(y)) for x, y in zip(a, b, strict=True))
    removed_a = 1 - sum(map(len, a)) / total
    removed_b = 1 - sum(map(len, b)) / total
    chance = removed_a * (1 - removed_b) + removed_b * (1 - removed_a)
    return differing / total / chance if chance else 0.0


def least_width(width: int, minimum: int, multiple: int) -> int:
    """The least width that a layer of `width` units may keep: a multiple that is at least `minimum`, or
    all."""
    return min(width, -(-minimum // multiple) * multiple)


def _round_widths(wanted: list[int], widths: list[int], *, minimum: int, multiple: int) -> list[int]:
    """Round each wanted width down to a multiple, then hand the remainder out, largest remainder first."""
    counts = [
        min(width, max(least_width(width, minimum, multiple), want // multiple * multiple))
        for want, width in zip(wanted, widths, strict=True)
    ]
    order = sorted(range(len(wanted)), key=lambda layer: (counts[layer] - wanted[layer], layer))
    for layer in order:
        if sum(wanted) - sum(counts) < (multiple + 1) // 2:
            break
        counts[layer] = min(widths[layer], counts[layer] + multiple)
    return counts


def _global_counts(values: list[torch.Tensor], *, total: int, minimum: int, multiple: int) -> list[int]:
    """How many of each layer's units are among the `total` largest, every layer keeping its minimum first.

    `values[layer]`: |c| descending. Ties go to the lower layer, then to the lower index.
    """
    widths = [v.numel() for v in values]
    least = [least_width(width, minimum, multiple) for width in widths]
    rest = [v[low:] for v, low in zip(values, least, strict=True)]
    places, more = max(0, total - sum(least)), [0] * len(rest)
    if places:
        every = torch.cat(rest)
        limit = every.kthvalue(len(every) - places + 1).values  # the least that still finds a place
        more = [int((v > limit).sum()) for v in rest]
        left = places - sum(more)
        for layer, v in enumerate(rest):
            tied = min(left, int((v == limit).sum()))
            more[layer] += tied
            left -= tied
    wanted = [low + extra for low, extra in zip(least, more, strict=True)]
    return _round_widths(wanted, widths, minimum=minimum, multiple=multiple)
