"""The detector: what the search has seen so far, and whether to draw.

A `Search` is a value: `observe` returns the next one. It keeps every look since the search began as packed
bits (a few kilobytes each, where lists of indices took megabytes), so the whole matrix of pairwise distances
between masks is there for the heat map, and it goes into a checkpoint's manifest.

Heads and neurons are judged apart. A family has settled when its newest mask lies within `settled_distance`
of all others in the window. It has broken down when it had settled and its newest mask lies
`breakdown_distance` from the last mask that was: the masks of FFN neurons do so in the paper's runs
(docs/method.md section 2).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from earlybert.config import EarlyBertError, as_dict
from earlybert.ticket import Kept, Ticket, TicketSettings, masks

FORMAT_VERSION = 2
FAMILIES = ("heads", "neurons")


@dataclass(frozen=True)
class Masks:
    """The masks of one family, one a look, as packed bits over all layers."""

    widths: tuple[int, ...] = ()
    """Units of each layer."""
    packed: tuple[bytes, ...] = ()

    def add(self, kept: Kept, *, widths: Sequence[int]) -> Masks:
        flags = np.zeros(sum(widths), dtype=bool)
        first = 0
        for indices, width in zip(kept, widths, strict=True):
            flags[first + np.asarray(indices, dtype=np.int64)] = True
            first += width
        return Masks(tuple(widths), (*self.packed, np.packbits(flags).tobytes()))

    def kept(self, look: int) -> Kept:
        """Kept indices of a look, one tuple a layer."""
        flags = np.unpackbits(self._bits([look])[0], count=sum(self.widths)).astype(bool)
        layers = np.split(flags, np.cumsum(self.widths)[:-1])
        return tuple(tuple(np.flatnonzero(layer).tolist()) for layer in layers)

    def distances(self, look: int, others: Sequence[int]) -> list[float]:
        """Distances of a look to others, each divided by its chance level (`ticket.distance`)."""
        one, many, total = self._bits([look]), self._bits(others), sum(self.widths)
        differing = np.bitwise_count(one ^ many).sum(1, dtype=np.int64) / total
        removed = 1 - np.bitwise_count(one).sum(dtype=np.int64) / total
        removed_many = 1 - np.bitwise_count(many).sum(1, dtype=np.int64) / total
        chance = removed * (1 - removed_many) + removed_many * (1 - removed)
        return [float(d / c) if c else 0.0 for d, c in zip(differing, chance, strict=True)]

    def matrix(self) -> np.ndarray:
        """All pairwise distances, [looks, looks]."""
        every = range(len(self.packed))
        return np.array([self.distances(look, every) for look in every]).reshape(len(every), len(every))

    def _bits(self, looks: Sequence[int]) -> np.ndarray:
        """[looks, bytes]."""
        size = -(-sum(self.widths) // 8)
        joined = b"".join(self.packed[look] for look in looks)
        return np.frombuffer(joined, dtype=np.uint8).reshape(-1, size)

    def to_json(self) -> dict[str, Any]:
        return {"widths": list(self.widths), "packed": [base64.b64encode(p).decode() for p in self.packed]}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Masks:
        return Masks(tuple(values["widths"]), tuple(base64.b64decode(p) for p in values["packed"]))


@dataclass(frozen=True)
class Search:
    """What the search has seen since it began."""

    began: int = 0
    """Step at which this search began (0, or the step of the draw before)."""
    steps: tuple[int, ...] = ()
    """The steps of the looks."""
    heads: Masks = Masks()
    neurons: Masks = Masks()
    distances: tuple[tuple[int, float | None, float | None], ...] = ()
    """(step, heads, neurons) of each look: the largest distance to the others in the window."""
    settled: tuple[int | None, int | None] = (None, None)
    """Step since which heads and neurons have stayed settled; None where they have not."""
    last_settled: tuple[int | None, int | None] = (None, None)
    """Newest look (its place in `steps`) at which heads and neurons had settled, not before
    `minimum_step`."""
    verdict: str | None = None
    """Why to draw now, or None."""
    broken: tuple[str, ...] = ()
    """The families that broke down at the newest look."""

    def due(self, step: int, *, settings: TicketSettings) -> bool:
        """True at the steps at which the coefficients are to be looked at."""
        since = step - self.began
        return since > 0 and (since % settings.every == 0 or since == settings.latest_step)

    def observe(
        self,
        step: int,
        heads: Sequence[torch.Tensor],
        neurons: Sequence[torch.Tensor],
        *,
        settings: TicketSettings,
    ) -> Search:
        """Look at the fp32 coefficients (a 1-D tensor a layer) after optimizer step `step` and judge.

        To draw, both families must have settled, not before `minimum_step`; at `latest_step` in any case, and
        at once where a family breaks down. A family without any spread has said nothing yet and has not
        settled.
        """
        kept = masks(heads, neurons, settings=settings)
        newest, since = len(self.steps), step - self.began
        families, far, settled, last, broken = [], [], [], [], []
        for place, (coefficients, indices) in enumerate(zip((heads, neurons), kept, strict=True)):
            family = (self.heads, self.neurons)[place].add(indices, widths=[c.numel() for c in coefficients])
            window = range(max(0, newest - settings.window + 1), newest)
            distance = max(family.distances(newest, window), default=None) if window else None
            holds = (
                newest + 1 >= settings.window
                and distance is not None
                and distance <= settings.settled_distance
                and _spread(coefficients)
            )
            before = self.last_settled[place]
            if not holds and before is not None:
                moved = family.distances(newest, [before])[0]
                if moved >= settings.breakdown_distance:
                    broken.append(FAMILIES[place])
            families.append(family)
            far.append(distance)
            settled.append(None if not holds else self.settled[place] or step)
            last.append(newest if holds and since >= settings.minimum_step else before)
        found = replace(
            self,
            steps=(*self.steps, step),
            heads=families[0],
            neurons=families[1],
            distances=(*self.distances, (step, far[0], far[1])),
            settled=(settled[0], settled[1]),
            last_settled=(last[0], last[1]),
            broken=tuple(broken),
        )
        return replace(found, verdict=found._verdict(since, settings=settings))

    def ticket(self, *, settings: TicketSettings) -> Ticket:
        """The ticket of the newest look; of families that broke down, the last masks that had settled."""
        looks = [len(self.steps) - 1] * 2
        for place in map(FAMILIES.index, self.broken):
            looks[place] = self._settled_look(place)
        return Ticket(
            step=self.steps[-1],
            heads=self.heads.kept(looks[0]),
            neurons=self.neurons.kept(looks[1]),
            head_widths=self.heads.widths,
            neuron_widths=self.neurons.widths,
            reason=self.verdict or "",
            distances=self.distances,
            settings=as_dict(settings),
            search=self.to_json(),
        )

    def _verdict(self, since: int, *, settings: TicketSettings) -> str | None:
        step, far_heads, far_neurons = self.distances[-1]
        if self.broken:
            looks = [self._settled_look(place) for place in map(FAMILIES.index, self.broken)]
            told = " and ".join(map(self._told, self.broken, looks))
            if settings.on_breakdown == "stop":
                # Each search counts its own steps.
                earlier = min(self.steps[look] for look in looks) - self.began
                raise EarlyBertError(
                    f"step {step}: {told}; draw earlier (ticket.latest_step = {earlier}), or set "
                    'ticket.on_breakdown = "draw" to take the mask from before'
                )
            which = f"mask of step {self.steps[looks[0]]}" if len(looks) == 1 else "masks from before"
            return f"{told}: drawn with the {which}"
        if since >= settings.minimum_step and None not in self.settled:
            return f"settled: distance {far_heads:.3f} heads, {far_neurons:.3f} neurons"
        if since >= settings.latest_step:
            return f"latest step {settings.latest_step} of the search reached"
        return None

    def _settled_look(self, place: int) -> int:
        """The last look at which a family that broke down had settled."""
        look = self.last_settled[place]
        assert look is not None
        return look

    def _told(self, family: str, look: int) -> str:
        masks = (self.heads, self.neurons)[FAMILIES.index(family)]
        moved = masks.distances(len(self.steps) - 1, [look])[0]
        return (
            f"the mask of the {family}, settled until step {self.steps[look]}, broke down (distance "
            f"{moved:.2f} of chance)"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "version": FORMAT_VERSION,
            "began": self.began,
            "steps": list(self.steps),
            "heads": self.heads.to_json(),
            "neurons": self.neurons.to_json(),
            "distances": [list(entry) for entry in self.distances],
            "settled": list(self.settled),
            "last_settled": list(self.last_settled),
            "verdict": self.verdict,
            "broken": list(self.broken),
        }

    @staticmethod
    def from_json(values: Mapping[str, Any], *, where: str = "search") -> Search:
        """Rebuild a search; raises EarlyBertError for another format."""
        if values.get("version") not in (1, FORMAT_VERSION):
            raise EarlyBertError(
                f"{where}: its search has format {values.get('version')}, this program reads "
                f"{FORMAT_VERSION}; use the program version that wrote it"
            )
        broken = values["broken"]
        if values["version"] == 1:  # one family, or None
            broken = [broken] if broken else []
        return Search(
            began=values["began"],
            steps=tuple(values["steps"]),
            heads=Masks.from_json(values["heads"]),
            neurons=Masks.from_json(values["neurons"]),
            distances=tuple((s, h, n) for s, h, n in values["distances"]),
            settled=(values["settled"][0], values["settled"][1]),
            last_settled=(values["last_settled"][0], values["last_settled"][1]),
            verdict=values["verdict"],
            broken=tuple(broken),
        )


def _spread(coefficients: Sequence[torch.Tensor]) -> bool:
    every = torch.cat([c.detach().double().abs().flatten() for c in coefficients])
    return bool(every.max() > every.min())
