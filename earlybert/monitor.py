"""What a run shows of itself: the progress line, TensorBoard, `metrics.jsonl`, `log.txt`; all on rank 0.

A resume first cuts from `metrics.jsonl` what it will do again, so the file never holds a step twice. Floats
are written by `repr`, so two runs can be compared to the last bit.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from earlybert.config import write_atomically


class Monitor:
    """Writers of one run; construct it on rank 0 only."""

    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        """`resume_step`: last step that stays; None starts the files anew."""
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics_path = folder / "metrics.jsonl"
        cut_metrics(self._metrics_path, last_step=resume_step)
        self._metrics = open(self._metrics_path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._log = open(folder / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        # Step 0 too: a start before the first checkpoint repeats what an earlier one has drawn.
        purge = 0 if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def say(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        print(text, flush=True)
        self._log.write(text + "\n")
        self._log.flush()

    def record(self, values: Mapping[str, Any]) -> None:
        """Write one step's metrics to metrics.jsonl and TensorBoard; `values["step"]` is the step."""
        self._metrics.write(json.dumps(dict(values)) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                self._board.add_scalar(name, value, values["step"])
        self._board.flush()

    def point(self, name: str, value: float, *, step: int) -> None:
        """Show a value in TensorBoard alone."""
        self._board.add_scalar(name, value, step)
        self._board.flush()

    def picture(self, name: str, png: bytes, *, step: int) -> None:
        """Show a PNG in TensorBoard."""
        with Image.open(io.BytesIO(png)) as image:
            self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        self._metrics.close()
        self._log.close()
        self._board.close()


def cut_metrics(path: Path, *, last_step: int | None) -> None:
    """Drop the lines of `metrics.jsonl` after `last_step`, and a half-written last line; None drops all."""
    if not path.exists():
        return
    kept = []
    if last_step is not None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the process died in the middle of this line: its step is done again
    write_atomically(path, "".join(kept))


def progress_line(values: Mapping[str, Any], *, total_steps: int, eta_seconds: float | None) -> str:
    """One line of fixed columns with the names of TensorBoard."""
    loss = values["loss"]  # none where every step of the line was skipped
    parts = [
        f"step {values['step']:>7,}/{total_steps:,}",
        "loss     -" if loss is None else f"loss {loss:.3f}",
    ]
    parts.append(f"acc {values['mlm_accuracy']:.3f}")
    norm = values.get("grad_norm")
    parts.append(f"grad {norm:.2f}" if norm is not None else "grad    -")
    parts.append(f"lr {values['lr']:.1e}")
    parts.append(f"{_thousands(values['tokens_per_second'])} tok/s")
    if eta_seconds is not None:
        parts.append(f"eta {duration(eta_seconds)}")
    far = [values.get("mask_distance_heads"), values.get("mask_distance_neurons")]
    if all(d is not None for d in far):
        parts.append(f"search d={far[0]:.3f}/{far[1]:.3f}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as 6h12m, 3m05s or 9s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
