"""A tiny EarlyBERT, its batches and a plain one-process reference, shared by the tests of the engine."""

from __future__ import annotations

from typing import Any

import torch

from earlybert import dist, mechanics
from earlybert.adapters import bert_layers, enable_checkpointing
from earlybert.engine import EarlyBird, Engine, initialize
from earlybert.initial import seeded_model
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining
from earlybert.optim import Lamb, parameter_groups
from earlybert.shrink import Cut, index_map
from earlybert.ticket import Kept, TicketSettings

LENGTH, MICRO, ACCUMULATION = 12, 2, 2
FP16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()
"""DeepSpeed's own question whether this machine computes in fp16: some CPUs do not."""
RATE, DECAY = 3e-3, 0.1


def config(**changes: Any) -> EarlyBertConfig:
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "coefficients": "train",
    }
    return EarlyBertConfig(**{**values, **changes})


def settings(**changes: Any) -> TicketSettings:
    values: dict[str, Any] = {
        "head_ratio": 0.25,
        "neuron_ratio": 0.23,
        "minimum_neurons": 1,
        "neuron_multiple": 1,
        "every": 2,
        "minimum_step": 4,
        "latest_step": 4,
        "penalty": 1e-2,
    }
    return TicketSettings(**{**values, **changes})


def cuts(heads: Kept, neurons: Kept) -> dict[str, Cut]:
    """The index map of `config()`'s shape."""
    widths = {"head_widths": [4] * len(heads), "neuron_widths": [48] * len(neurons)}
    return index_map(bert_layers(len(heads)), heads, neurons, head_size=8, **widths)


def batch(step: int, index: int) -> dict[str, torch.Tensor]:
    """Micro-batch `index` (over ranks and accumulation) of an optimizer step."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return {
        "input_ids": torch.randint(5, 64, (MICRO, LENGTH), generator=generator),
        "masked_positions": torch.stack(
            [torch.randperm(LENGTH, generator=generator)[:3] for _ in range(MICRO)]
        ),
        "masked_labels": torch.randint(5, 64, (MICRO, 3), generator=generator),
    }


def mechanics_of(stage: int, precision: str, **changes: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 10**6}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 40  # some parameters persist, most are partitioned
    values: dict[str, Any] = {"zero_optimization": zero}
    if precision != "fp32":
        values[precision] = {"enabled": True, **({"initial_scale_power": 8} if precision == "fp16" else {})}
    return {**values, **changes}


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6, fused=True)


def engine(
    stage: int,
    precision: str,
    ticket: TicketSettings | None,
    *,
    clipping: float = 0.0,
    model_config: Any = None,
    fp32_accumulation: bool = False,
    offload: bool = False,
    lamb: bool = False,
    bucket: int = 10**6,
    parameter_offload: bool = False,
    checkpointing: bool = False,
    optimizer: Any = None,
    accumulation: int = ACCUMULATION,
) -> Engine:
    asked = mechanics_of(stage, precision)
    if parameter_offload:
        asked["zero_optimization"]["offload_param"] = {"device": "cpu"}
    asked["zero_optimization"]["reduce_bucket_size"] = bucket
    if fp32_accumulation:
        asked["data_types"] = {"grad_accum_dtype": "fp32"}
    if offload:
        asked["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    values = mechanics.complete(asked, micro_batch=MICRO, accumulation=accumulation, clipping=clipping)
    model = seeded_model(model_config or config(), seed=7)
    if checkpointing:
        enable_checkpointing(model)
    return initialize(
        model=model,
        config=values,
        early_bird=None if ticket is None else EarlyBird(settings=ticket, seed=7),
        optimizer=optimizer or ((lambda groups: Lamb(groups, lr=RATE)) if lamb else adamw),
        weight_decay=DECAY,
    )


def train(engine: Engine, steps: range, *, accumulation: int = ACCUMULATION) -> list[float]:
    """Optimizer steps on the keyed batches; the mean loss over ranks and micro-batches of each."""
    losses = []
    ranks, rank = dist.world_size(), dist.rank()
    for step in steps:
        total = torch.zeros(1, dtype=torch.float64)
        for micro in range(accumulation):
            output = engine(**batch(step, micro * ranks + rank))
            engine.backward(output.loss)
            total += output.loss.detach().double()
            del output
            engine.step()
        losses.append((dist.sum_over_ranks(total) / (accumulation * ranks)).item())
    return losses


def reference_step(
    model: EarlyBertForPreTraining, optimizer: torch.optim.Optimizer, step: int, *, ranks: int, penalty: float
) -> float:
    """One step of plain PyTorch on all micro-batches of the step, the L1 term written into the loss."""
    optimizer.zero_grad()
    total = 0.0
    for index in range(ACCUMULATION * ranks):
        loss = model(**batch(step, index)).loss
        total += loss.item() / (ACCUMULATION * ranks)
        (loss / (ACCUMULATION * ranks)).backward()
    l1 = sum(p.abs().sum() for n, p in model.named_parameters() if n.endswith(".coefficients"))
    if penalty:
        (penalty * l1).backward()
    optimizer.step()
    return total


def reference_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return adamw(parameter_groups(model, weight_decay=DECAY))
