"""What a run remembers and tells: the sums of the open progress line, held-out loss, metrics, lines of text.

Nothing here decides anything or changes a weight; `trainer` calls it with what happened.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from earlybert import dist
from earlybert.checkpoint import Checkpoint
from earlybert.data import PackedSamples
from earlybert.engine import Engine
from earlybert.experiment import Experiment
from earlybert.loader import held_out_batches
from earlybert.targets import Work


@dataclass
class Sums:
    """Sums since the last progress line; stored in checkpoints, so that a line may span a resume."""

    loss: float = 0.0
    correct: float = 0.0
    counted: float = 0.0
    micro_batches: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    compiling: float = 0.0
    """Of these `seconds`."""
    waiting: float = 0.0
    """Of them, for the loader."""


@dataclass
class Memory:
    """What the trainer itself must remember across a resume; everything else follows from the step."""

    sums: Sums = field(default_factory=Sums)
    trained_seconds: float = 0.0
    """Time in training steps and draws, evaluations and saves not counted."""
    eval_losses: dict[str, float] = field(default_factory=dict)
    """{step: held-out loss}."""
    recent: list[float] = field(default_factory=list)
    """Good losses of the last steps of this phase and shape, for the guard."""
    bad_steps: int = 0
    """In a row, up to now."""
    passed: dict[str, int] = field(default_factory=dict)
    """{sequence length: samples that roll-backs have passed by}."""

    @staticmethod
    def stored(values: Mapping[str, Any]) -> Memory:
        """From what a checkpoint's manifest has, which stays as it is."""
        own = copy.deepcopy(dict(values))
        return Memory(**{**own, "sums": Sums(**own["sums"])})


def held_out_loss(
    engine: Engine,
    samples: PackedSamples,
    *,
    micro_batch: int,
    limit: int | None,
    mark: Callable[[], None],
) -> float:
    """Mean masked-LM loss over all masked positions of the first `limit` held-out samples. Collective.

    `mark` is called before each micro-batch.
    """
    batches = held_out_batches(
        samples, micro_batch=micro_batch, rank=dist.rank(), world_size=dist.world_size(), limit=limit
    )
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.eval()
    with torch.no_grad():
        for batch in batches:
            mark()
            batch.pop("next_sentence_label", None)  # the held-out loss is the masked-LM loss
            output = engine(**{key: value.to(engine.device) for key, value in batch.items()})
            counted = output.counted.double()
            loss = torch.where(counted > 0, output.loss.double() * counted, 0.0)
            sums += torch.stack([loss, counted])
    engine.train()
    total, told = dist.sum_over_ranks(sums.to(dist.collective_device())).tolist()
    return total / max(1.0, told)


def metrics(
    engine: Engine, sums: Sums, *, step: int, phase: int, rate: float, eval_loss: float | None
) -> dict[str, Any]:
    """The line of metrics.jsonl that closes `sums`: means over all ranks and micro-batches since the last."""
    distances = engine.progress.search.distances if engine.searching else ()
    ticket, config = engine.ticket, engine.module.config
    drawn = ticket is not None and ticket.step == step
    if ticket is not None and drawn:
        distances = ticket.distances
    far_heads, far_neurons = distances[-1][1:] if distances else (None, None)
    values = {
        "step": step,
        "phase": phase,
        "loss": sums.loss / sums.micro_batches if sums.micro_batches else None,
        "mlm_accuracy": sums.correct / max(1.0, sums.counted),
        "lr": rate,
        "grad_norm": engine.grad_norm,
        "tokens_per_second": sums.tokens / sums.seconds,
        "step_seconds": sums.seconds / sums.steps,
        "loader_seconds": sums.waiting / sums.steps,
        "mask_distance_heads": far_heads,
        "mask_distance_neurons": far_neurons,
        "heads_kept": sum(config.heads_per_layer),
        "neurons_kept": sum(config.neurons_per_layer),
        "parameters": parameter_count(engine.module),
        "skipped_steps": engine.skipped_steps,
    }
    if sums.compiling:
        values["compile_seconds"] = sums.compiling
    if engine.loss_scale is not None:
        values["loss_scale"] = engine.loss_scale
    if eval_loss is not None:
        values["eval_loss"] = eval_loss
    if drawn:
        values["draw_seconds"] = engine.draw_seconds
    return values


def announcement(
    experiment: Experiment,
    engine: Engine,
    *,
    found: Checkpoint | None,
    step: int,
    total: int,
    phase: int,
    layout: str,
) -> Iterator[str]:
    """What starts, and from where; `layout`: the ZeRO stage and precision in words."""
    config, ranks = engine.module.config, dist.world_size()
    shape = (
        f"{parameter_count(engine.module):,} parameters, {sum(config.heads_per_layer)} heads, "
        f"{sum(config.neurons_per_layer):,} neurons in {config.num_hidden_layers} layers"
    )
    start = "from its seed" if found is None else f"from {found.folder}"
    yield f"{experiment.name}: {shape}; {ranks} ranks, {layout}; step {step:,} of {total:,}, {start}"
    if found is not None:
        then = f"ZeRO-{found.manifest.stage}"
        if found.manifest.world_size != ranks or not layout.startswith(then):
            yield (
                f"saved by {found.manifest.world_size} ranks at {then}: the same samples and masks go on, "
                "sums are rounded in another order"
            )
    settings = experiment.phases[phase]
    idle = settings.idle_share(world_size=ranks)
    if idle:
        yield (
            f"{settings.micro_batches} micro-batches a step on {ranks} ranks leave {idle:.0%} of the ranks' "
            "time idle; a phases.micro_batch or a number of ranks that divides would not"
        )


def draw_told(experiment: Experiment, engine: Engine, work: Work) -> Iterator[str]:
    """What the draw that was just made saves, keeps and cost."""
    ticket, seconds, dense = engine.ticket, engine.draw_seconds, experiment.dense_widths
    assert ticket is not None
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    small = [len(heads) for heads in ticket.heads], [len(neurons) for neurons in ticket.neurons]
    share = work.of(*small) / work.of(dense.heads, dense.neurons)
    yield (
        f"the small model's step has {share:.3f} of the dense one's FLOPs (encoder matrices, scores, "
        "masked-LM head)"
    )
    yield f"drew the ticket at {ticket}; pause {sum(seconds.values()):.2f} s ({parts})"


def parameter_count(module: torch.nn.Module) -> int:
    """Parameters of a module, whole ones where ZeRO-3 has sharded them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
