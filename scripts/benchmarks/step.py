"""One kind of step, taken apart: an engine of a shape on random tokens, its forward pass, backward pass and
update, beside the device's own matrix product.

For finding out where a step's time goes: no program around it, no loader. `train` measures whole programs,
`ticket` holds kinds of step against each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import train
from benchmarks.engines import VOCABULARY, engine_of, step

_CONFIGS = Path(__file__).parents[2] / "ds_configs"
_WARM = 3
_NEVER = 10**6


def measure(arguments: argparse.Namespace, _: Path) -> dict[str, Any]:
    """JSON types; times in seconds."""
    import torch

    from earlybert import dist, mechanics
    from earlybert.lifecycle import compile_seconds
    from earlybert.model import EarlyBertConfig
    from earlybert.ticket import TicketSettings

    share = arguments.batch // arguments.ranks
    shipped, _where = mechanics.load(_CONFIGS / f"zero{arguments.stage}_bf16.json")
    config = mechanics.complete(shipped, micro_batch=share, accumulation=1, clipping=1.0)
    tickets = {
        "dense": TicketSettings(enabled=False),
        "search": TicketSettings(minimum_step=_NEVER, latest_step=_NEVER),
        "shrunken": TicketSettings(
            every=1, minimum_step=1, latest_step=1, head_ratio=arguments.head_ratio,
            neuron_ratio=arguments.neuron_ratio,
        ),
    }  # fmt: skip
    engine = engine_of(
        arguments, tickets[arguments.kind], config=config, positions=arguments.length,
        dropout=arguments.dropout,
    )  # fmt: skip
    batch = _batch(share, arguments.length, document=arguments.document)
    if arguments.kind == "shrunken":
        step(engine, batch)  # draws
    if arguments.compile:
        engine.compile()
    for _number in range(_WARM):
        step(engine, batch)
    times = []
    for _number in range(arguments.steps):
        dist.barrier()
        times.append(step(engine, batch))
    taken = [_parts(engine, batch) for _number in range(arguments.steps)]
    parts = {name: statistics.median(each[name] for each in taken) for name in taken[0]}
    if arguments.profile is not None:
        _profile(engine, batch, arguments.profile)
    shape: EarlyBertConfig = engine.module.config
    widths = [shape.heads_per_layer, shape.neurons_per_layer]
    needed = train.flops_per_token(arguments.shape, arguments.length, widths=widths)
    seconds = statistics.median(times)
    compiling = compile_seconds()  # closing sets the clock back
    engine.close()
    width = shape.hidden_size
    ceiling = train.product_flops(
        share * arguments.length, width, 4 * width, device=batch["input_ids"].device
    )
    return {
        "kind": arguments.kind, "length": arguments.length, "batch": arguments.batch,
        "document": arguments.document, "dropout": arguments.dropout, "compile": arguments.compile,
        "seconds": seconds, "all": times, "parts": parts, "compile_seconds": compiling,
        "tokens_per_second": arguments.batch * arguments.length / seconds, "widths": widths,
        "flops": share * arguments.length * needed / seconds, "ceiling_flops": ceiling,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None,
    }  # fmt: skip


def tell(figures: dict[str, Any]) -> None:
    own, most = figures["flops"], figures["ceiling_flops"]
    print(
        f"{figures['shape']}, {figures['kind']}, {figures['batch']} rows of {figures['length']} tokens"
        f"{'' if figures['document'] is None else ' in documents of ' + str(figures['document'])}, bf16, "
        f"ZeRO-{figures['stage']}, {figures['ranks']} ranks, dropout {figures['dropout']:g}"
        f"{', compiled' if figures['compile'] else ''}; {figures['device']}\n"
    )
    print("| step ms | tokens/s | TFLOP/s a rank | of a matrix product | forward, backward, update ms |")
    print("|---|---|---|---|---|")
    parts = ", ".join(f"{1e3 * seconds:.1f}" for seconds in figures["parts"].values())
    print(
        f"| {1e3 * figures['seconds']:.1f} | {figures['tokens_per_second']:,.0f} | {own / 1e12:,.1f} "
        f"| {own / most:.1%} | {parts} |"
    )


def _batch(rows: int, length: int, *, document: int | None) -> dict[str, Any]:
    """Random tokens on the device; with `document`, rows of documents of about that many tokens."""
    import torch

    from earlybert.masking import predictions_a_row

    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = torch.rand(rows, length).topk(predictions_a_row(length, probability=0.15)).indices
    batch = {
        "input_ids": torch.randint(5, VOCABULARY, (rows, length)),
        "masked_positions": places,
        "masked_labels": torch.randint(5, VOCABULARY, places.shape),
    }
    if document is not None:
        begins = torch.rand(rows, length) < 1 / document
        begins[:, 0] = True
        at = torch.arange(length).expand(rows, -1)
        batch["segments"] = begins.cumsum(1) - 1
        batch["position_ids"] = at - torch.where(begins, at, 0).cummax(1).values
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _parts(engine: Any, batch: dict[str, Any]) -> dict[str, float]:
    """Seconds of forward pass, backward pass and update of one step, each to its end on the device."""
    marks = [time.perf_counter()]
    loss = engine(**batch).loss
    marks.append(_now())
    engine.backward(loss)
    del loss
    marks.append(_now())
    engine.step()
    marks.append(_now())
    names = ("forward", "backward", "update")
    return {name: b - a for name, a, b in zip(names, marks, marks[1:], strict=False)}


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _profile(engine: Any, batch: dict[str, Any], path: Path) -> None:
    """Write torch's profile of one step: a table by time on the device, one by time on the host."""
    from torch.profiler import profile

    with profile() as told:
        step(engine, batch)
    found = told.key_averages()
    tables = (
        found.table(sort_by=order, row_limit=40, max_name_column_width=70)
        for order in ("self_device_time_total", "self_cpu_time_total")
    )
    path.write_text("\n".join(tables) + "\n")
