"""Data sets of the hub by name: what fine-tuning asks for, and one line where it cannot be had."""

from __future__ import annotations

from typing import Any

from earlybert.config import EarlyBertError


def rows(source: str, *configuration: str, split: str, remedy: str) -> Any:
    """A split of a data set, as `datasets` has it; raises EarlyBertError with what else may be given, the
    `remedy`."""
    import datasets

    try:
        return datasets.load_dataset(source, *configuration, split=split)
    except Exception as error:  # the hub's errors are of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        asked = ", ".join((*configuration, f"split {split}"))
        raise EarlyBertError(
            f"{source} is no folder, and the hub does not give {asked}: {reason}; give {remedy}"
        ) from error
