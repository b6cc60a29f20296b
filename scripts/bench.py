"""Measure on this machine; every figure beside its baseline, as a table and as JSON.

    python scripts/bench.py draw|save [--shape mini|base|large] [--stage 0-3] [--ranks 2] [--json FILE]

draw: the pause of a draw with its parts, beside one checkpoint save of the same run, and the memory of a
rank. save: how long a checkpoint keeps training waiting, in the background and not, beside DeepSpeed's own
save (which makes nothing durable and hashes nothing). The model has the shape's true widths, random weights
and tokens; batches are tiny, since neither depends on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "mini": {"layers": 4, "hidden": 256, "heads": 4},
    "base": {"layers": 12, "hidden": 768, "heads": 12},
    "large": {"layers": 24, "hidden": 1024, "heads": 16},
}
VOCABULARY, LENGTH = 30_592, 32


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("draw", help="the pause of a draw and a rank's memory")
    draw.add_argument("--moments", choices=("reset", "keep"), default="reset")
    save = commands.add_parser("save", help="how long a checkpoint keeps training waiting")
    save.add_argument("--rounds", type=int, default=3, help="of each kind, in turn")
    for command in (draw, save):
        command.add_argument("--shape", choices=SHAPES, default="base")
        command.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=3)
        command.add_argument("--ranks", type=int, default=2)
        command.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return _rank(arguments)
    return _start(arguments)


def _start(arguments: argparse.Namespace) -> int:
    """Start the ranks; rank 0 prints."""
    from earlybert.lifecycle import free_port

    shared = {
        **os.environ,
        "WORLD_SIZE": str(arguments.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    processes = [
        subprocess.Popen([sys.executable, *sys.argv], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(arguments.ranks)
    ]
    return max(abs(process.wait()) for process in processes)


def _rank(arguments: argparse.Namespace) -> int:
    from earlybert import dist
    from earlybert.lifecycle import end_ranks, start_ranks

    start_ranks()
    folder = dist.from_rank_0(Path(tempfile.mkdtemp()) if dist.rank() == 0 else None)
    assert folder is not None
    measure, tell = {"draw": (_draw, _tell_draw), "save": (_save, _tell_save)}[arguments.command]
    figures = {**_about(arguments), **measure(arguments, folder)}
    if dist.rank() == 0:
        tell(figures)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
    end_ranks()
    return 0


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "shape": arguments.shape, "stage": arguments.stage, "ranks": arguments.ranks,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }  # fmt: skip


def _engine(arguments: argparse.Namespace, ticket: Any) -> Any:
    """A searching engine of the shape, in bf16."""
    import torch

    from earlybert.engine import initialize
    from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining
    from earlybert.progress import EarlyBird

    shape = SHAPES[arguments.shape]
    torch.manual_seed(0)
    model = EarlyBertForPreTraining(
        EarlyBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape["hidden"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            intermediate_size=4 * shape["hidden"],
            coefficients="train",
        )
    )
    zero = {"stage": arguments.stage, "reduce_bucket_size": 2_000_000}
    return initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": zero,
        },
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-4, fused=True),
        early_bird=EarlyBird(ticket),
    )


def _step(engine: Any) -> float:
    """One optimizer step on random tokens; its seconds."""
    import torch

    began = time.perf_counter()
    ids = torch.randint(5, VOCABULARY, (1, LENGTH)).to(engine.device)
    places = torch.arange(0, LENGTH, 6)[None].to(engine.device)
    loss = engine(input_ids=ids, masked_positions=places, masked_labels=ids[:, ::6]).loss
    engine.backward(loss)
    del loss
    engine.step()
    return time.perf_counter() - began


def _parameters(engine: Any) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())


def _save(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """DeepSpeed's save, ours with training waiting, ours in the background, in turn."""
    from earlybert import checkpoint, dist
    from earlybert.ticket import TicketSettings

    engine = _engine(arguments, TicketSettings(minimum_step=10**6, latest_step=10**6))
    what = {"experiment": "bench", "corpus": "bench", "stage": arguments.stage, "precision": "bf16"}
    saver = checkpoint.Saver(folder / "ours", keep=1, **what)
    found: dict[str, list[float]] = {
        key: [] for key in ("deepspeed", "waiting", "stall", "written", "beside", "step")
    }
    for _ in range(3):
        _step(engine)
    for _ in range(arguments.rounds):
        dist.barrier()
        began = time.perf_counter()
        engine.inner.save_checkpoint(str(folder / "deepspeed"), tag="t", save_latest=False)
        dist.barrier()
        found["deepspeed"].append(time.perf_counter() - began)
        found["step"] += [_step(engine) for _ in range(3)]
        began = time.perf_counter()
        saver.begin(engine, step=engine.global_steps, trainer={})
        saver.commit()
        found["waiting"].append(time.perf_counter() - began)
        found["step"] += [_step(engine) for _ in range(3)]
        began = time.perf_counter()
        saver.begin(engine, step=engine.global_steps, trainer={})
        stall = time.perf_counter() - began
        while any(dist.gather_objects(saver.writing)):
            found["beside"].append(_step(engine))
        found["written"].append(time.perf_counter() - began)
        before = time.perf_counter()
        saver.commit()
        found["stall"].append(stall + time.perf_counter() - before)
    parameters = _parameters(engine)
    engine.close()
    sizes = {
        name: sum(f.stat().st_size for f in (folder / name).rglob("*") if f.is_file()) / 1e6
        for name in ("deepspeed", "ours")
    }
    medians = {f"{key}_seconds": statistics.median(values) for key, values in found.items() if values}
    return {"parameters": parameters, **medians, "all_seconds": found, "megabytes": sizes}


def _tell_save(figures: dict[str, Any]) -> None:
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


def _draw(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from earlybert import checkpoint, dist
    from earlybert.ticket import TicketSettings

    engine = _engine(
        arguments, TicketSettings(minimum_step=3, latest_step=3, every=3, moments=arguments.moments)
    )
    parameters = _parameters(engine)
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
        _step(engine)
    figures.update(
        moments=arguments.moments, parameters=parameters, small_parameters=_parameters(engine),
        pause_seconds=seconds["draw"], parts=engine.draw_seconds, save_seconds=seconds["save"],
        pause_over_save=seconds["draw"] / seconds["save"],
    )  # fmt: skip
    engine.close()
    return figures


def _tell_draw(figures: dict[str, Any]) -> None:
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


if __name__ == "__main__":
    from earlybert.config import run_command

    run_command(main)
