"""An engine of a shape's true widths with random weights, and a step of it on random tokens."""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks import machine

SHAPES = {
    "mini": {"layers": 4, "hidden": 256, "heads": 4},
    "base": {"layers": 12, "hidden": 768, "heads": 12},
    "large": {"layers": 24, "hidden": 1024, "heads": 16},
}
VOCABULARY, LENGTH = 30_592, 32


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "shape": arguments.shape, "stage": arguments.stage, "ranks": arguments.ranks,
        "device": machine.device(), "versions": machine.versions("torch", "deepspeed"),
    }  # fmt: skip


def engine_of(
    arguments: argparse.Namespace,
    ticket: Any,
    *,
    config: dict[str, Any] | None = None,
    positions: int = 512,
    dropout: float = 0.1,
) -> Any:
    """An engine of the shape, in bf16; it searches where `ticket` is enabled.

    `config`: a DeepSpeed JSON's values; without it one row a step, in small buckets.
    """
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
            max_position_embeddings=positions,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            coefficients="train" if ticket.enabled else "none",
        )
    )
    own = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": arguments.stage, "reduce_bucket_size": 2_000_000},
    }
    return initialize(
        model=model,
        config=config or own,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-4, fused=True),
        early_bird=EarlyBird(ticket),
    )


def step(engine: Any, batch: dict[str, Any] | None = None) -> float:
    """One optimizer step on a batch, or on one short row of random tokens; its seconds."""
    import torch

    if batch is None:
        ids = torch.randint(5, VOCABULARY, (1, LENGTH))
        places = torch.arange(0, LENGTH, 6)[None]
        batch = {"input_ids": ids, "masked_positions": places, "masked_labels": ids[:, ::6]}
    began = time.perf_counter()
    loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
    engine.backward(loss)
    del loss
    engine.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def parameters(engine: Any) -> int:
    """Of the whole model, sharded or not."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
