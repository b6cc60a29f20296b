"""The pause of a draw with its parts, beside a checkpoint save of the same run, and a rank's memory."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.engines import engine_of, parameters, step


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from earlybert import checkpoint, dist
    from earlybert.ticket import TicketSettings

    engine = engine_of(
        arguments, TicketSettings(minimum_step=3, latest_step=3, every=3, moments=arguments.moments)
    )
    count = parameters(engine)
    draw, seconds = engine._draw, {}

    def measured(ticket: Any) -> None:
        """Save first, then draw, in the same state."""
        before = time.perf_counter()
        checkpoint.save(
            engine, folder, step=engine.global_steps, experiment="bench", corpus="bench",
            stage=arguments.stage, precision="bf16", trainer={}, keep=1,
        )  # fmt: skip
        seconds["save"] = time.perf_counter() - before
        memory = _Memory()
        before = time.perf_counter()
        draw(ticket)
        dist.barrier()
        seconds["draw"] = time.perf_counter() - before
        figures.update(memory.figures())

    figures: dict[str, Any] = {}
    engine._draw = measured  # type: ignore[method-assign]
    for _ in range(3):
        step(engine)
    figures.update(
        moments=arguments.moments, parameters=count, small_parameters=parameters(engine),
        pause_seconds=seconds["draw"], parts=engine.draw_seconds, save_seconds=seconds["save"],
        pause_over_save=seconds["draw"] / seconds["save"],
    )  # fmt: skip
    engine.close()
    return figures


def tell(figures: dict[str, Any]) -> None:
    parts = ", ".join(f"{name} {value:.2f}" for name, value in figures["parts"].items())
    print(
        "| shape | ZeRO | ranks | moments | pause s | parts s | save s | pause / save | rank before MB "
        "| peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {figures['shape']} | {figures['stage']} | {figures['ranks']} | {figures['moments']} | "
        f"{figures['pause_seconds']:.2f} | {parts} | {figures['save_seconds']:.2f} | "
        f"{figures['pause_over_save']:.2f} | {figures['before_mb']:,.0f} | {figures['peak_mb']:,.0f} |"
    )


class _Memory:
    """A rank's memory before and at its peak: of the GPU where there is one, else resident in the process."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
            self._before = self._cuda.memory_allocated() / 1e6
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            self._before = self._resident("VmRSS")

    def figures(self) -> dict[str, float]:
        peak = self._resident("VmHWM") if self._cuda is None else self._cuda.max_memory_allocated() / 1e6
        return {"before_mb": self._before, "peak_mb": peak}

    @staticmethod
    def _resident(what: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024 / 1e6
        raise RuntimeError(f"/proc/self/status has no {what}")
