"""A document as its source has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Raw:
    """`dropped` says why it is none (a redirect), before any text is looked at."""

    id: str
    text: str
    dropped: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
