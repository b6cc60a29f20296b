"""An experiment: one TOML file that owns the science (model, data, optimizer, phases, ticket), checked as a
whole.

`load` is the only way in: file, then overrides, then every check that needs neither a corpus nor a device.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from earlybert import glue, mechanics, targets
from earlybert.config import SettingsError, as_dict, override, parse, read_toml
from earlybert.data import DataSettings, Objective
from earlybert.guard import GuardSettings
from earlybert.model import EarlyBertConfig
from earlybert.optim import Lamb, ParameterGroups
from earlybert.schedule import PhaseSettings
from earlybert.ticket import TicketSettings


@dataclass(frozen=True)
class ModelSettings:
    """The dense model (the `[model]` table); the vocabulary's size comes from the corpus."""

    layers: int
    """Encoder layers."""
    hidden: int
    """Width of the hidden states; a multiple of heads."""
    heads: int
    """Attention heads a layer, before a draw."""
    neurons: int | None = None
    """FFN intermediate neurons a layer; None means 4 * hidden."""
    heads_per_layer: tuple[int, ...] | None = None
    """Heads of each layer where they differ, at most `heads`: a ticket's shape trained from its start."""
    neurons_per_layer: tuple[int, ...] | None = None
    """Neurons of each layer where they differ, at most `neurons`."""
    positions: int = 512
    """Longest sequence the model can take."""
    dropout: float = 0.1
    """Of embeddings and of what attention and FFN add."""
    attention_dropout: float = 0.1
    """Of attention probabilities."""
    pre_norm: bool = False
    """LayerNorm at the beginning of attention and FFN, and behind the last layer, instead of at their ends:
    so a model bears higher learning rates. Stock BERT has it at their ends: then there is no dense export."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more
    time."""
    compile: bool = False
    """Compile forward and backward pass with torch.compile, anew after a draw: for GPUs. Rounds otherwise."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "positions"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.hidden % self.heads:
            raise SettingsError(
                f"hidden = {self.hidden} is not a multiple of heads = {self.heads}; "
                f"use hidden {self.hidden // self.heads * self.heads or self.heads}"
            )
        if self.neurons is not None and self.neurons < 1:
            raise SettingsError(f"neurons = {self.neurons}: must be at least 1; leave it out for 4 * hidden")
        for name, most in (("heads", self.heads), ("neurons", self.neurons or 4 * self.hidden)):
            told = getattr(self, f"{name}_per_layer")
            if told is not None and (len(told) != self.layers or not all(0 < n <= most for n in told)):
                raise SettingsError(
                    f"{name}_per_layer = {list(told)}: need {self.layers} numbers from 1 to {most}"
                )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} = {getattr(self, name)}: must lie in [0, 1)")

    def config(self, *, vocab_size: int, next_sentence: bool, coefficients: str) -> EarlyBertConfig:
        """The dense model's configuration."""
        return EarlyBertConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.neurons or 4 * self.hidden,
            heads_per_layer=None if self.heads_per_layer is None else list(self.heads_per_layer),
            neurons_per_layer=None if self.neurons_per_layer is None else list(self.neurons_per_layer),
            max_position_embeddings=self.positions,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.attention_dropout,
            initializer_range=self.initializer_range,
            next_sentence=next_sentence,
            pre_norm=self.pre_norm,
            coefficients=coefficients,
        )


@dataclass(frozen=True)
class OptimizerSettings:
    """The `[optimizer]` table; the learning rate stands in the phases."""

    name: Literal["adamw", "lamb"] = "adamw"
    """torch's fused AdamW, or a LAMB that knows ZeRO, for large batches."""
    betas: tuple[float, ...] = (0.9, 0.98)
    """Decay of the first and the second moment."""
    epsilon: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Of matrices; biases, LayerNorm and coefficients have none."""
    trust: tuple[float, ...] = (0.0, 10.0)
    """LAMB only: least and largest trust ratio of a matrix; other parameters have none."""
    clipping: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise SettingsError(f"betas = {self.betas}: need two numbers in [0, 1)")
        if len(self.trust) != 2 or not 0 <= self.trust[0] < self.trust[1]:
            raise SettingsError(f"trust = {self.trust}: need two numbers, 0 <= least < largest")
        for name in ("weight_decay", "clipping"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.epsilon <= 0:
            raise SettingsError(f"epsilon = {self.epsilon}: must be positive")

    def build(self, groups: ParameterGroups) -> torch.optim.Optimizer:
        """The optimizer; both correct their bias as a function of the step count, so a resume is exact."""
        betas, eps = (self.betas[0], self.betas[1]), self.epsilon
        if self.name == "lamb":
            return Lamb(groups, lr=0.0, betas=betas, eps=eps, trust=(self.trust[0], self.trust[1]))
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


@dataclass(frozen=True)
class EvaluateSettings:
    """Held-out evaluation (the `[evaluate]` table)."""

    every: int = 200
    """Optimizer steps between evaluations; the first step, the draw and the end are always evaluated."""
    samples: int = 512
    """Held-out sequences, the same ones each time with the same masks."""
    objective: Objective | None = None
    """Rows that are evaluated; None: those of data.objective. The loss is that of masked tokens alone."""
    mask_probability: float | None = None
    """Share of their tokens to guess; None: data.mask_probability. Runs that differ there compare where both
    are set alike."""
    tasks: tuple[str, ...] = ()
    """Tasks of GLUE on which checkpoints are fine-tuned beside the run, in a process of their own."""
    tasks_every: int | None = None
    """Optimizer steps between two such checkpoints, a multiple of checkpoint.every; None: that. The run's
    last checkpoint is always one."""
    tasks_data: str = "nyu-mll/glue"
    """Folder of GLUE's files, or GLUE's name on the hub."""
    tasks_experiment: str | None = None
    """Fine-tuning experiment (TOML) whose recipes, seeds, optimizer and DeepSpeed JSON they follow; relative
    to the working folder or to the experiment's own. None: the defaults of each task, one seed, fp32."""
    tasks_device: str = "cpu"
    """Where they train: "cpu" at the lowest priority, or a GPU of rank 0's machine as CUDA_VISIBLE_DEVICES
    names it, such as "7", best one that the run leaves free."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in glue.TASKS:
                raise SettingsError(
                    f"tasks: {task!r} is not a task of GLUE; choose among {', '.join(glue.TASKS)}"
                )
        if len(set(self.tasks)) < len(self.tasks):
            raise SettingsError(f"tasks = {list(self.tasks)}: name each once")
        if self.tasks_every is not None and self.tasks_every < 1:
            raise SettingsError(f"tasks_every = {self.tasks_every}: must be at least 1")
        if self.mask_probability is not None and not 0 < self.mask_probability < 1:
            raise SettingsError(
                f"mask_probability = {self.mask_probability}: choose between 0 and 1, such as 0.15"
            )
        for name in ("every", "samples"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class CheckpointSettings:
    """The `[checkpoint]` table."""

    every: int = 500
    """Optimizer steps between checkpoints; the draw, the end and SIGTERM always save one."""
    keep: int = 2
    """Newest checkpoints to keep."""
    background: bool = True
    """Write while training goes on, from a copy in host memory; false waits for the disk."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Experiment:
    """A whole experiment."""

    name: str
    """Names the run folder, runs/NAME."""
    deepspeed: str
    """Path of the DeepSpeed JSON, relative to the working folder or to the experiment's own folder."""
    model: ModelSettings
    data: DataSettings
    phases: tuple[PhaseSettings, ...]
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    ticket: TicketSettings = field(default_factory=TicketSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    seed: int = 0
    """Of initial weights, order, masks and dropout, each under a key of its own."""
    runs: str = "runs"
    """Folder of the run folders."""
    log_every: int = 10
    """Optimizer steps between two progress lines."""
    hang_seconds: float = 480.0
    """A run that stands still for so long ends and names the rank it waits for; below the collectives' own
    limit (DEEPSPEED_TIMEOUT, ten minutes)."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise SettingsError(f"name = {self.name!r}: must be a plain folder name")
        if not self.phases:
            raise SettingsError("no [[phases]]: add at least one")
        if self.log_every < 1:
            raise SettingsError(f"log_every = {self.log_every}: must be at least 1")
        if self.hang_seconds <= 0:
            raise SettingsError(f"hang_seconds = {self.hang_seconds}: must be positive")
        if self.seed < 0:
            raise SettingsError(f"seed = {self.seed}: must not be negative")
        every, saved = self.evaluate.tasks_every, self.checkpoint.every
        if every is not None and every % saved:
            near = f"{every // saved * saved} or {(every // saved + 1) * saved}" if every > saved else saved
            raise SettingsError(
                f"evaluate.tasks_every = {every} is not a multiple of checkpoint.every = {saved}; use {near}"
            )
        longest = max(phase.sequence_length for phase in self.phases)
        if longest > self.model.positions:
            raise SettingsError(
                f"phases.sequence_length = {longest} is longer than model.positions = "
                f"{self.model.positions}; raise model.positions to {longest}"
            )
        if self.ticket.enabled:
            if self.ticket.budget is None:  # what a budget counts depends on the corpus' vocabulary
                targets.check(self.ticket, dense=self.dense_widths, work=targets.Work(1, 1))
            steps = sum(phase.steps for phase in self.phases)
            if self.ticket.draws * self.ticket.latest_step > steps:
                raise SettingsError(
                    f"ticket.latest_step = {self.ticket.latest_step} times ticket.draws = "
                    f"{self.ticket.draws} lies past the run's {steps} steps; the last draw might never "
                    "come: lower ticket.latest_step"
                )

    @property
    def dense_widths(self) -> targets.Widths:
        """Heads and neurons of each layer before a draw."""
        model = self.model
        return targets.Widths(
            model.heads_per_layer or (model.heads,) * model.layers,
            model.neurons_per_layer or (model.neurons or 4 * model.hidden,) * model.layers,
        )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs) / self.name

    @property
    def held_out(self) -> DataSettings:
        """What the held-out rows hold."""
        changes: dict[str, Any] = {
            "objective": self.evaluate.objective,
            "mask_probability": self.evaluate.mask_probability,
        }
        changes = {key: value for key, value in changes.items() if value is not None}
        if changes.get("objective", "mlm") != "mlm":
            changes["boundaries"] = False
        return replace(self.data, **changes)

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the course of the run; what only watches it is left out."""
        values = as_dict(self)
        for key in ("name", "runs", "log_every", "hang_seconds", "deepspeed", "evaluate", "checkpoint"):
            values.pop(key, None)
        values["data"].pop("workers", None)
        values["data"].pop("corpus", None)  # its content's fingerprint is compared instead
        for phase in values["phases"]:
            phase.pop("micro_batch", None)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load(path: str | os.PathLike[str], words: Sequence[str] = ()) -> tuple[Experiment, dict[str, Any]]:
    """Read an experiment, apply `key=value` words, check it; return it and its DeepSpeed settings.

    Raises SettingsError naming the file and the setting.
    """
    experiment = parse(Experiment, override(read_toml(path), words), where=str(path))
    told = experiment.evaluate.tasks_experiment
    if told is not None and not Path(told).exists() and (beside := Path(path).parent / told).exists():
        evaluate = replace(experiment.evaluate, tasks_experiment=str(beside))
        experiment = replace(experiment, evaluate=evaluate)
    return experiment, mechanics.load_beside(experiment.deepspeed, experiment=path)
