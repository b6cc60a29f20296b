"""Say what an experiment will need and save, without starting it.

    python scripts/plan.py EXPERIMENT.toml [key=value ...] [--ranks 1,8,64,512,4096] [--memory 80]

Parameters, FLOPs a token, bytes a rank at each ZeRO stage and offload, the cost of search and draw, and the
expected saving in its two parts. The vocabulary is that of data.corpus where that exists, else --vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

CHOICES = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"),
           (3, "optimizer"), (3, "parameters")]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="experiment file (TOML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--ranks", default="1,2,8,64,512,4096", help="numbers of processes")
    parser.add_argument("--memory", type=float, default=80.0, metavar="GIB", help="of a device")
    parser.add_argument("--vocabulary", type=int, default=30_592, help="where the corpus is not there yet")
    parser.add_argument(
        "--steps-ratio", type=float, default=1.0, help="steps of this run over those of the dense run"
    )
    parser.add_argument("--json", action="store_true", help="print figures and nothing else")
    arguments = parser.parse_intermixed_args()  # overrides may stand after options

    from earlybert import experiment, mechanics
    from earlybert.config import SettingsError

    settings, json_values = experiment.load(arguments.experiment, arguments.overrides)
    try:
        ranks = [int(word) for word in arguments.ranks.split(",")]
        if min(ranks) < 1:
            raise ValueError
    except ValueError as error:
        raise SettingsError(
            f"--ranks {arguments.ranks}: whole numbers from 1 with commas, such as 1,8"
        ) from error
    for name, given in (
        ("memory", arguments.memory), ("vocabulary", arguments.vocabulary),
        ("steps-ratio", arguments.steps_ratio),
    ):  # fmt: skip
        if not 0 < given < math.inf:
            raise SettingsError(f"--{name} {given:g}: give a number above 0")
    vocabulary = _vocabulary(Path(settings.data.corpus), arguments.vocabulary)
    figures = _figures(
        settings, vocabulary=vocabulary, ranks=ranks, precision=mechanics.precision_of(json_values),
        steps=arguments.steps_ratio,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        print("\n".join(_page(settings.name, figures, memory=arguments.memory)))
    return 0


def _vocabulary(corpus: Path, otherwise: int) -> int:
    from earlybert.shards import read_manifest

    return read_manifest(corpus).vocab_size if (corpus / "manifest.json").is_file() else otherwise


def _figures(
    settings: Any, *, vocabulary: int, ranks: list[int], precision: str, steps: float
) -> dict[str, Any]:
    from earlybert import plan

    dense, small = plan.configs(settings, vocabulary=vocabulary)
    phases: list[dict[str, Any]] = []
    first: dict[tuple[str, int], Any] = {}
    for place, phase in enumerate(settings.phases):
        row: dict[str, Any] = {"sequence_length": phase.sequence_length, "batch": phase.batch}
        for name, config in (("dense", dense), ("small", small)):
            for checkpointing in (False, True):
                found = plan.measure(
                    config, micro_batch=phase.micro_batch, sequence_length=phase.sequence_length,
                    predicted=settings.data.mask_probability, precision=precision,
                    checkpointing=checkpointing,
                )  # fmt: skip
                tokens = phase.micro_batch * phase.sequence_length
                key = name + (", checkpointing" if checkpointing else "")
                row[key] = {
                    "forward_flops_per_token": found.forward_flops / tokens,
                    "step_flops_per_token": found.flops / tokens,
                    "activation_bytes": found.activation_bytes,
                }
                if checkpointing == settings.model.checkpointing:
                    first.setdefault((name, place), found)
        phases.append(row)
    memory = [
        {
            "stage": stage, "offload": offload, "ranks": count, "model": name, "device": m.device,
            **asdict(m),
        }
        for stage, offload in CHOICES
        for count in ranks
        for name in ("dense", "small")
        for m in [
            max(
                (
                    plan.memory(first[name, place], stage=stage, precision=precision, offload=offload,
                                ranks=count)
                    for place in range(len(phases))
                ),
                key=lambda found: found.device,
            )
        ]
    ]  # fmt: skip
    expected = plan.saving(settings, vocabulary=vocabulary, steps=steps)
    big, little, ticket = first["dense", 0], first["small", 0], settings.ticket
    return {
        "vocabulary": vocabulary,
        "precision": precision,
        "parameters": {"dense": big.parameters, "small": little.parameters},
        "widths": {"heads": list(small.heads_per_layer), "neurons": list(small.neurons_per_layer)},
        "phases": phases,
        "memory": memory,
        "traffic": [
            {"stage": s, "ranks": n, "bytes": plan.traffic(big, stage=s, precision=precision, ranks=n)}
            for s in range(4)
            for n in ranks
        ],
        "accumulation": plan.accumulations(settings, ranks),
        "draw": {n: asdict(plan.draw_cost(settings, little, ranks=n)) for n in ranks}
        if ticket.enabled
        else None,
        "looks": ticket.latest_step // ticket.every if ticket.enabled and ticket.searches else None,
        "saving": {**asdict(expected), "cost": expected.cost},
    }


def _page(name: str, figures: dict[str, Any], *, memory: float) -> Iterator[str]:
    count, widths, draw = figures["parameters"], figures["widths"], figures["draw"]
    yield f"# {name}: vocabulary {figures['vocabulary']:,}, {figures['precision']}"
    after = f", {count['small']:,} after the ticket ({count['small'] / count['dense']:.3f})" if draw else ""
    yield (
        f"parameters: {count['dense']:,} dense{after}; heads a layer {_span(widths['heads'])}, neurons a "
        f"layer {_span(widths['neurons'])}"
    )
    models = ("dense", "small") if draw else ("dense",)
    yield ""
    yield "| phase | model | forward MFLOPs a token | step MFLOPs a token | activations MB |"
    yield "|---|---|---|---|---|"
    for place, row in enumerate(figures["phases"], 1):
        for kind in (f"{model}{how}" for how in ("", ", checkpointing") for model in models):
            found = row[kind]
            yield (
                f"| {place}: length {row['sequence_length']} | {kind} "
                f"| {found['forward_flops_per_token'] / 1e6:,.1f} "
                f"| {found['step_flops_per_token'] / 1e6:,.1f} "
                f"| {found['activation_bytes'] / 1e6:,.0f} |"
            )
    yield ""
    yield (
        f"GB of a rank's device (and of its host), {' -> '.join(models)}; * does not fit into {memory:g} GiB"
    )
    counts = sorted({row["ranks"] for row in figures["memory"]})
    yield f"| ZeRO | offload | {' | '.join(f'{n:,} ranks' for n in counts)} |"
    yield f"|---|---|{'---|' * len(counts)}"
    cells = {(r["stage"], r["offload"], r["ranks"], r["model"]): r for r in figures["memory"]}
    for stage, offload in CHOICES:
        row = []
        for n in counts:
            big, little = (cells[stage, offload, n, model] for model in ("dense", "small"))
            mark = "*" if big["device"] > memory * 2**30 else ""
            host = f" ({big['host'] / 1e9:.1f})" if big["host"] else ""
            then = f" -> {little['device'] / 1e9:.2f}" if draw else ""
            row.append(f"{big['device'] / 1e9:.2f}{mark}{host}{then}")
        yield f"| {stage} | {offload} | {' | '.join(row)} |"
    yield ""
    yield (
        "| ranks | micro-batches added up, by phase | GB sent a step, ZeRO 0-2 | ZeRO-3 |"
        f"{' GB read in the draw |' if draw else ''}"
    )
    yield f"|---|---|---|---|{'---|' if draw else ''}"
    sent = {(row["stage"], row["ranks"]): row["bytes"] for row in figures["traffic"]}
    for n in counts:
        steps = ", ".join(
            "too few micro-batches" if a is None else str(a) for a in figures["accumulation"][n]
        )
        yield (
            f"| {n:,} | {steps} | {sent[2, n] / 1e9:.2f} | {sent[3, n] / 1e9:.2f} |"
            + (f" {draw[n]['read'] / 1e9:.3f} |" if draw else "")
        )
    yield ""
    saving = figures["saving"]
    if not draw:
        steps = f"{saving['steps']:g} of the dense run's"
        yield f"no ticket is drawn (ticket.enabled = false): all steps are dense, {steps}"
        return
    looks = f"the search: {figures['looks']} looks" if figures["looks"] else "no search"
    yield (
        f"{looks}, {saving['search_share']:.1%} of the steps dense; the draw holds at most "
        f"{draw[counts[0]]['beside_shards'] / 1e6:.0f} MB beside the shards"
    )
    yield (
        f"structure: the small step has {saving['structure']:.3f} of the dense step's FLOPs; steps: "
        f"{saving['steps']:g} of the dense run's; together {saving['cost']:.3f} of its FLOPs, "
        f"{1 - saving['cost']:.1%} saved, search counted"
    )


def _span(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


if __name__ == "__main__":
    from earlybert.config import run_command

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here touches a device
    run_command(main)
