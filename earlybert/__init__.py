"""Pretrain BERT-style encoders with DeepSpeed and shrink them in mid-run to their early-bird ticket.

    import earlybert

    engine = earlybert.initialize(model=model, config="ds_configs/zero2_bf16.json",
                                  early_bird=earlybert.EarlyBird(earlybert.TicketSettings()), optimizer=...)

Names are imported when they are first used: importing the package alone loads neither torch nor DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from earlybert.config import EarlyBertError, SettingsError
    from earlybert.engine import EarlyBird, Engine, Progress, initialize
    from earlybert.initial import seeded_model
    from earlybert.lifecycle import end_ranks
    from earlybert.model import EarlyBertConfig, EarlyBertForMaskedLM, EarlyBertForPreTraining
    from earlybert.pretrained import load, save
    from earlybert.ticket import Ticket, TicketSettings

__version__ = "0.1.0"
__all__ = [
    "EarlyBertConfig",
    "EarlyBertError",
    "EarlyBertForMaskedLM",
    "EarlyBertForPreTraining",
    "EarlyBird",
    "Engine",
    "Progress",
    "SettingsError",
    "Ticket",
    "TicketSettings",
    "end_ranks",
    "initialize",
    "load",
    "save",
    "seeded_model",
]
_ROOMS = {
    "config": ("EarlyBertError", "SettingsError"),
    "engine": ("EarlyBird", "Engine", "Progress", "initialize"),
    "initial": ("seeded_model",),
    "model": ("EarlyBertConfig", "EarlyBertForMaskedLM", "EarlyBertForPreTraining"),
    "lifecycle": ("end_ranks",),
    "pretrained": ("load", "save"),
    "ticket": ("Ticket", "TicketSettings"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'earlybert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"earlybert.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
