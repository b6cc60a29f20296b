"""How long a checkpoint keeps training waiting, beside DeepSpeed's own save."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.engines import engine_of, parameters, step


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """DeepSpeed's save, ours with training waiting, ours in the background, in turn."""
    from earlybert import checkpoint, dist
    from earlybert.ticket import TicketSettings

    engine = engine_of(arguments, TicketSettings(minimum_step=10**6, latest_step=10**6))
    what = {"experiment": "bench", "corpus": "bench", "stage": arguments.stage, "precision": "bf16"}
    saver = checkpoint.Saver(folder / "ours", keep=1, **what)
    found: dict[str, list[float]] = {
        key: [] for key in ("deepspeed", "waiting", "stall", "written", "beside", "step")
    }
    for _ in range(3):
        step(engine)
    for _ in range(arguments.rounds):
        dist.barrier()
        began = time.perf_counter()
        engine.inner.save_checkpoint(str(folder / "deepspeed"), tag="t", save_latest=False)
        dist.barrier()
        found["deepspeed"].append(time.perf_counter() - began)
        found["step"] += [step(engine) for _ in range(3)]
        began = time.perf_counter()
        saver.begin(engine, step=engine.global_steps, trainer={})
        saver.commit()
        found["waiting"].append(time.perf_counter() - began)
        found["step"] += [step(engine) for _ in range(3)]
        began = time.perf_counter()
        saver.begin(engine, step=engine.global_steps, trainer={})
        stall = time.perf_counter() - began
        while any(dist.gather_objects(saver.writing)):
            found["beside"].append(step(engine))
        found["written"].append(time.perf_counter() - began)
        before = time.perf_counter()
        saver.commit()
        found["stall"].append(stall + time.perf_counter() - before)
    count = parameters(engine)
    engine.close()
    sizes = {
        name: sum(f.stat().st_size for f in (folder / name).rglob("*") if f.is_file()) / 1e6
        for name in ("deepspeed", "ours")
    }
    medians = {f"{key}_seconds": statistics.median(values) for key, values in found.items() if values}
    return {"parameters": count, **medians, "all_seconds": found, "megabytes": sizes}


def tell(figures: dict[str, Any]) -> None:
    sizes = figures["megabytes"]
    print("| shape | ZeRO | ranks | save | training waits s | until durable s | MB |")
    print("|---|---|---|---|---|---|---|")
    row = f"| {figures['shape']} | {figures['stage']} | {figures['ranks']} |"
    print(
        f"{row} DeepSpeed's | {figures['deepspeed_seconds']:.2f} | never made | {sizes['deepspeed']:,.0f} |"
    )
    waiting = figures["waiting_seconds"]
    print(f"{row} ours, waiting | {waiting:.2f} | {waiting:.2f} | {sizes['ours']:,.0f} |")
    print(
        f"{row} ours, in the background | {figures['stall_seconds']:.2f} | {figures['written_seconds']:.2f} "
        f"| {sizes['ours']:,.0f} |"
    )
    beside = figures.get("beside_seconds", float("nan"))
    print(f"\na step takes {figures['step_seconds']:.2f} s, and {beside:.2f} s while a save is being written")
