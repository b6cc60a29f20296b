"""What the search costs a step and what the ticket saves: a dense, a searching and a shrunken engine in the
same ranks take a few steps each in turn; beside the FLOPs that the shapes promise.

Steps in turn within one process see the same machine at the same moment, so a few per cent show; whole
programs one after the other do not (LOG.md). A look at the coefficients comes every so many steps: its cost
is spread over them.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks import train
from benchmarks.engines import VOCABULARY, engine_of, step

_CONFIGS = Path(__file__).parents[2] / "ds_configs"
_LOOKS = 4
"""Steps from look to look here, where each is timed; a run has `TicketSettings.every`."""
_NEVER = 10**6


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """JSON types; times in seconds."""
    import torch

    from earlybert import dist, mechanics
    from earlybert.masking import predictions_a_row
    from earlybert.ticket import TicketSettings

    settings = {
        "dense": TicketSettings(enabled=False),
        "search": TicketSettings(every=_LOOKS, minimum_step=_NEVER, latest_step=_NEVER),
        "shrunken": TicketSettings(
            every=1,
            minimum_step=1,
            latest_step=1,
            head_ratio=arguments.head_ratio,
            neuron_ratio=arguments.neuron_ratio,
        ),
    }
    share = arguments.batch // arguments.ranks
    shipped, _ = mechanics.load(_CONFIGS / f"zero{arguments.stage}_bf16.json")
    config = mechanics.complete(shipped, micro_batch=share, accumulation=1, clipping=1.0)
    engines = {
        kind: engine_of(
            arguments, ticket, config=config, positions=arguments.length, dropout=arguments.dropout
        )
        for kind, ticket in settings.items()
    }
    guesses = predictions_a_row(arguments.length, probability=0.15)
    guessed = torch.rand(share, arguments.length).topk(guesses).indices
    batch = {
        "input_ids": torch.randint(5, VOCABULARY, (share, arguments.length)),
        "masked_positions": guessed,
        "masked_labels": torch.randint(5, VOCABULARY, guessed.shape),
    }
    step(engines["shrunken"], batch)  # draws
    if arguments.compile:
        for engine in engines.values():
            engine.compile()
    for kind, engine in engines.items():
        for _ in range(_LOOKS + (kind != "shrunken")):  # a look is never a block's first step
            step(engine, batch)
    times: dict[str, list[float]] = {kind: [] for kind in [*engines, "look"]}
    for _ in range(-(-arguments.rounds * arguments.steps // (_LOOKS - 1))):
        for kind, engine in engines.items():
            for number in range(_LOOKS):
                dist.barrier()
                seconds = step(engine, batch)
                looked = kind == "search" and engine.global_steps % _LOOKS == 0
                if number:  # the first after another engine's finds its memory cold
                    times["look" if looked else kind].append(seconds)
    small_shape = engines["shrunken"].module.config
    widths = [small_shape.heads_per_layer, small_shape.neurons_per_layer]
    for engine in engines.values():
        engine.close()
    dense, small = (
        train.flops_per_token(arguments.shape, arguments.length, widths=w) for w in (None, widths)
    )
    medians = {kind: statistics.median(taken) for kind, taken in times.items()}
    look = (medians["look"] - medians["search"]) / TicketSettings().every
    return {
        "length": arguments.length, "batch": arguments.batch, "compile": arguments.compile,
        "dropout": arguments.dropout, "seconds": medians, "widths": widths,
        "quartiles": {kind: statistics.quantiles(taken, n=4) for kind, taken in times.items()},
        "flops_ratio": small / dense, "search_ratio": (medians["search"] + look) / medians["dense"],
        "ticket_ratio": medians["shrunken"] / medians["dense"], "every": TicketSettings().every,
    }  # fmt: skip


def tell(figures: dict[str, Any]) -> None:
    print(
        f"{figures['shape']}, {figures['length']} tokens, global batch {figures['batch']}, bf16, "
        f"ZeRO-{figures['stage']}, {figures['ranks']} ranks{', compiled' if figures['compile'] else ''}; "
        f"{figures['device']}\n"
    )
    print("| step | seconds (middle half) | of dense | promised by FLOPs |")
    print("|---|---|---|---|")
    promised = {"shrunken": figures["flops_ratio"]}
    for kind, seconds in figures["seconds"].items():
        low, _, high = figures["quartiles"][kind]
        print(
            f"| {kind} | {seconds:.4f} ({low:.4f} to {high:.4f}) "
            f"| {seconds / figures['seconds']['dense']:.3f} | {promised.get(kind, 1.0):.3f} |"
        )
    reached = figures["flops_ratio"] / figures["ticket_ratio"]
    print(
        f"\nthe search costs {figures['search_ratio'] - 1:.1%} of a step (a look every {figures['every']} "
        f"steps among it); the ticket's step reaches {reached:.1%} of the speed-up that its FLOPs promise"
    )
