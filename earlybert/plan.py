"""What a run will need, before it needs it: parameters, FLOPs, bytes of a rank, what the ticket should save.

Shapes and work are not modelled but taken from the model itself: it is built without values on PyTorch's meta
device, run forward and backward there, and its products and saved tensors are counted. Only what DeepSpeed
adds (masters, moments, gradients, shards) is arithmetic, checked against its own estimators and against
engines in tests/test_plan.py. Nothing here touches a device or starts a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from earlybert import schedule, targets
from earlybert.adapters import enable_checkpointing
from earlybert.experiment import Experiment
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining
from earlybert.state import CHUNK
from earlybert.targets import Widths

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Measured:
    """One training step of one rank's micro-batch."""

    parameters: int
    largest_layer: int
    """Parameters of the largest module that ZeRO-3 gathers at a time (the embeddings or an encoder layer)."""
    forward_flops: int
    backward_flops: int
    """With activation checkpointing the second forward pass is in it."""
    activation_bytes: int
    """Tensors that the forward pass keeps for the backward pass, weights not counted; attention is fused."""

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by what they are for; `host` is what offload moves off the device."""

    parameters: float
    gradients: float
    masters: float
    moments: float
    step: float
    """fp32 gradients of the rank's shard, there while the optimizer steps."""
    working_layer: float
    """ZeRO-3: the layer that is gathered for the moment, and its gradients."""
    activations: float = 0.0
    host: float = 0.0

    @property
    def device(self) -> float:
        """Sum on the device."""
        return (
            self.parameters + self.gradients + self.masters + self.moments + self.step + self.working_layer
            + self.activations
        )  # fmt: skip


def measure(
    config: EarlyBertConfig,
    *,
    micro_batch: int,
    sequence_length: int,
    predicted: float,
    precision: str = "bf16",
    checkpointing: bool = False,
) -> Measured:
    """Count a step of this model on the meta device. `predicted`: share of tokens that are masked."""
    given = (micro_batch, sequence_length, predicted, precision, checkpointing)
    widths = list(zip(config.heads_per_layer, config.neurons_per_layer, strict=True))
    shapes = list(dict.fromkeys(widths))
    if 2 * len(shapes) + 1 >= len(widths):
        return _counted(config, *given)
    # Layers of one shape add the same each: a model of one layer and those of two tell all, in less time.
    one = _counted(_of(config, shapes[:1]), *given)
    pairs = {shape: _counted(_of(config, [shapes[0], shape]), *given) for shape in shapes}

    def whole(name: str) -> int:
        first = getattr(one, name)
        return first + sum(getattr(pairs[shape], name) - first for shape in widths[1:])

    return Measured(
        whole("parameters"), max(pair.largest_layer for pair in pairs.values()), whole("forward_flops"),
        whole("backward_flops"), whole("activation_bytes"),
    )  # fmt: skip


def _of(config: EarlyBertConfig, widths: Sequence[tuple[int, int]]) -> EarlyBertConfig:
    """A model like this one with layers of other (heads, neurons)."""
    heads, neurons = map(list, zip(*widths, strict=True))
    own = {"num_hidden_layers": len(widths), "heads_per_layer": heads, "neurons_per_layer": neurons}
    return EarlyBertConfig.from_dict({**config.to_dict(), **own})


def _counted(
    config: EarlyBertConfig,
    micro_batch: int,
    sequence_length: int,
    predicted: float,
    precision: str,
    checkpointing: bool,
) -> Measured:
    """`measure`, layer by layer."""
    with torch.device("meta"):
        model: Any = EarlyBertForPreTraining(config)
    model.to(_TYPES[precision]).train()
    if checkpointing:
        enable_checkpointing(model)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    scores = torch.Size((sequence_length, sequence_length))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # A fused attention computes scores and their dropout again; on the meta device there is none.
        if storage._cdata not in weights and not (tensor.ndim == 4 and tensor.shape[-2:] == scores):
            saved[storage._cdata] = storage  # held, so that no two share an address
        return tensor

    ids = torch.zeros(micro_batch, sequence_length, dtype=torch.long, device="meta")
    places = torch.zeros(micro_batch, round(predicted * sequence_length), dtype=torch.long, device="meta")
    inputs: dict[str, torch.Tensor] = {
        "input_ids": ids, "attention_mask": ids, "masked_positions": places, "masked_labels": places,
    }  # fmt: skip
    if config.next_sentence:
        inputs["next_sentence_label"] = ids[:, 0]
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        FlopCounterMode(display=False) as forward,
    ):
        loss = model(**inputs).loss
    kept = sum(storage.nbytes() for storage in saved.values())
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.bert.encoder.layer]
    sizes.append(sum(p.numel() for p in model.bert.embeddings.parameters()))
    return Measured(
        sum(p.numel() for p in model.parameters()), max(sizes), forward.get_total_flops(),
        backward.get_total_flops(), kept,
    )  # fmt: skip


def memory(
    measured: Measured, *, stage: int, precision: str, offload: str, ranks: int, micro_batches: bool = True
) -> Memory:
    """Bytes of a rank. `offload`: "none", "optimizer" or "parameters" (ZeRO-3, with the optimizer)."""
    count, size = measured.parameters, BYTES[precision]
    shard = count / ranks
    optimizer, gradients = (count if stage == 0 else shard), (count if stage < 2 else shard)
    masters = 4.0 * optimizer if precision != "fp32" or stage > 0 else 0.0
    step = 4.0 * optimizer if size < 4 else 0.0
    parameters = size * (count if stage < 3 else shard)
    moved = masters + 8.0 * optimizer + step if offload != "none" else 0.0
    if offload == "parameters":
        moved += parameters
    kept = offload == "none"
    return Memory(
        parameters=0.0 if offload == "parameters" else parameters,
        gradients=size * gradients if kept else 0.0,
        masters=masters if kept else 0.0,
        moments=8.0 * optimizer if kept else 0.0,
        step=step if kept else 0.0,
        working_layer=2.0 * size * measured.largest_layer if stage == 3 else 0.0,
        activations=float(measured.activation_bytes) if micro_batches else 0.0,
        host=moved,
    )


def traffic(measured: Measured, *, stage: int, precision: str, ranks: int) -> float:
    """Bytes that a rank sends in a step: a ring's all-reduce or reduce-scatter and all-gather of the
    parameters."""
    whole = measured.parameters * BYTES[precision] * (ranks - 1) / ranks
    return whole * (3 if stage == 3 else 2)


@dataclass(frozen=True)
class Saving:
    """What the ticket saves of the dense run's FLOPs, search counted."""

    structure: float
    """FLOPs of the small model's step over the dense one's, tokens of all phases weighted."""
    search_share: float
    """Share of the steps that are still dense."""
    steps: float
    """Steps of the run with the ticket over those of the dense run it is compared with."""

    @property
    def cost(self) -> float:
        """FLOPs of the run with the ticket over those of the dense run."""
        return self.steps * (self.search_share + (1 - self.search_share) * self.structure)


def small_widths(experiment: Experiment, *, vocabulary: int) -> Widths:
    """Widths after the last draw, if any; under scope "global" spread evenly over the layers."""
    settings, dense = experiment.ticket, experiment.dense_widths
    if not settings.enabled:
        return dense
    work = work_of(experiment, vocabulary=vocabulary)
    if settings.kind == "layerdrop":
        stays = len(dense.heads) - targets.layers_gone(len(dense.heads), ratio=settings.layer_ratio)
        return Widths(dense.heads[:stays], dense.neurons[:stays])
    now = dense
    for draw in range(1, settings.draws + 1):
        rules = targets.resolved(settings, now=now, dense=dense, draw=draw, work=work)
        now = targets.kept_widths(rules, now)
    return now


def work_of(experiment: Experiment, *, vocabulary: int) -> targets.Work:
    """FLOPs of a head, of a neuron and of what no draw removes (`targets.Work`)."""
    return targets.bert_work(
        hidden=experiment.model.hidden,
        heads=experiment.model.heads,
        vocabulary=vocabulary,
        sequence_length=schedule.mean_length(experiment.phases),
        predicted=experiment.data.mask_probability,
    )


def configs(experiment: Experiment, *, vocabulary: int) -> tuple[EarlyBertConfig, EarlyBertConfig]:
    """The dense model while it is searched, and the small one; they are alike where no ticket is drawn."""
    searched = experiment.ticket.enabled and experiment.ticket.searches
    objective = experiment.data.objective != "mlm"
    dense = experiment.model.config(
        vocab_size=vocabulary, next_sentence=objective, coefficients="train" if searched else "none"
    )
    widths = small_widths(experiment, vocabulary=vocabulary)
    values = dense.to_dict()
    values.update(
        num_hidden_layers=len(widths.heads),
        heads_per_layer=list(widths.heads),
        neurons_per_layer=list(widths.neurons),
        coefficients="none",
    )
    return dense, EarlyBertConfig.from_dict(values)


def saving(experiment: Experiment, *, vocabulary: int, steps: float = 1.0) -> Saving:
    """What the ticket should save. `steps`: steps of this run over those of the dense run."""
    dense, small = configs(experiment, vocabulary=vocabulary)
    flops = [0.0, 0.0]
    for phase in experiment.phases:
        for place, config in enumerate((dense, small)):
            one = measure(
                config, micro_batch=1, sequence_length=phase.sequence_length,
                predicted=experiment.data.mask_probability,
            )  # fmt: skip
            flops[place] += one.flops * phase.batch * phase.steps
    total = schedule.total_steps(experiment.phases)
    settings = experiment.ticket
    search = settings.latest_step * settings.draws if settings.enabled else total
    return Saving(flops[1] / flops[0], search / total, steps)


@dataclass(frozen=True)
class DrawCost:
    """Bytes of one draw, a rank's."""

    read: float
    """Masters, and moments where they are kept, copied to host memory."""
    sent: float
    """At most: elements whose owner changes."""
    beside_shards: float
    """Largest buffers beside the old and the new shards."""


def draw_cost(experiment: Experiment, measured: Measured, *, ranks: int) -> DrawCost:
    """The cost of the draw to a small model of `measured` parameters."""
    each = 4.0 * (3 if experiment.ticket.moments == "keep" else 1) * measured.parameters / ranks
    return DrawCost(each, each * (ranks - 1) / ranks, 2 * 4.0 * min(CHUNK, measured.parameters))


def accumulations(experiment: Experiment, ranks: Sequence[int]) -> dict[int, list[int | None]]:
    """{ranks: micro-batches a rank adds up in each phase}, None where it has too few of them."""
    found: dict[int, list[int | None]] = {}
    for count in ranks:
        found[count] = []
        for phase in experiment.phases:
            try:
                found[count].append(phase.accumulation(world_size=count))
            except ValueError:
                found[count].append(None)
    return found
