"""What the engine is asked for, and what it has decided so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from earlybert.search import Search
from earlybert.shrink import compose
from earlybert.targets import Work
from earlybert.ticket import Kept, Ticket, TicketSettings


@dataclass
class EarlyBird:
    """What `initialize` needs to know of the search."""

    settings: TicketSettings = field(default_factory=TicketSettings)
    seed: int = 0
    """Of the random ticket (`settings.kind`)."""
    work: Work | None = None
    """FLOPs that `settings.budget` counts; None counts the encoder's matrices."""
    on_draw: Callable[[Any, Ticket], None] | None = None
    """Called with the engine on every rank right after a draw, with the new inner engine in place."""


@dataclass
class Progress:
    """What the engine has decided so far; goes into a checkpoint's manifest and comes back through
    `initialize`."""

    search: Search = field(default_factory=Search)
    tickets: tuple[Ticket, ...] = ()
    heads: Kept | None = None
    """Kept indices in terms of the dense model, all draws composed; None before the first draw."""
    neurons: Kept | None = None

    def drawn(self, ticket: Ticket) -> Progress:
        """What is decided once `ticket`, in terms of the model before it, is drawn."""
        return Progress(
            search=Search(began=ticket.step),
            tickets=(*self.tickets, ticket),
            heads=ticket.heads if self.heads is None else compose(self.heads, ticket.heads),
            neurons=ticket.neurons if self.neurons is None else compose(self.neurons, ticket.neurons),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "search": self.search.to_json(),
            "tickets": [ticket.to_json() for ticket in self.tickets],
            "heads": self.heads,
            "neurons": self.neurons,
        }

    @staticmethod
    def from_json(values: Mapping[str, Any], *, where: str) -> Progress:
        def kept(value: Any) -> Kept | None:
            return None if value is None else tuple(tuple(layer) for layer in value)

        tickets = tuple(Ticket.from_json(ticket, where=where) for ticket in values["tickets"])
        search = Search.from_json(values["search"], where=where)
        return Progress(search, tickets, kept(values["heads"]), kept(values["neurons"]))
