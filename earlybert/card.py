"""The model card of an export: a README.md with metadata, from what the run folder says.

The surprise: nothing here is promised by a template. What a run does not tell is left out with its line, so
the card of a model without a run has its shape and how to load it, and no more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData

from earlybert import checkpoint, plan, shards
from earlybert.config import EarlyBertError, parse, read_toml
from earlybert.experiment import Experiment
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining
from earlybert.monitor import duration
from earlybert.progress import Progress
from earlybert.targets import Widths
from earlybert.ticket import Kept, Ticket

_OBJECTIVES = {
    "mlm": "masked tokens",
    "mlm+nsp": "masked tokens and the next sentence",
    "mlm+sop": "masked tokens and the order of two sentences",
}


@dataclass(frozen=True)
class Training:
    """What is known of the run that a model comes from, up to one of its checkpoints."""

    experiment: Experiment
    manifest: checkpoint.Manifest
    tickets: tuple[Ticket, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    """environment.json: the last start."""
    corpus: shards.Manifest | None = None
    """None where another corpus stands in the place of the one that was trained on."""

    @staticmethod
    def read(run: Path, manifest: checkpoint.Manifest) -> Training:
        """From a run folder and the manifest of one of its checkpoints.

        Raises EarlyBertError where the experiment cannot be read; what else is missing stays unknown.
        """
        experiment = parse(Experiment, read_toml(run / "experiment.toml"), where=str(run / "experiment.toml"))
        progress = Progress.from_json(manifest.progress, where=str(run))
        stated, corpus = run / "environment.json", None
        if (Path(experiment.data.corpus) / shards.MANIFEST).is_file():
            corpus = shards.read_manifest(experiment.data.corpus)
        try:
            environment = json.loads(stated.read_text(encoding="utf-8")) if stated.is_file() else {}
        except ValueError as error:
            raise EarlyBertError(f"{stated} cannot be read ({error}); restore it, or remove it") from error
        known = corpus is not None and corpus.content == manifest.corpus
        return Training(experiment, manifest, progress.tickets, environment, corpus if known else None)

    @property
    def losses(self) -> dict[int, float]:
        """{step: held-out loss}, in their order."""
        told = self.manifest.trainer.get("eval_losses", {})
        return {step: told[str(step)] for step in sorted(map(int, told))}

    @property
    def tokens(self) -> int:
        """Tokens of all rows up to the checkpoint, padding among them."""
        left, total = self.manifest.step, 0
        for phase in self.experiment.phases:
            steps = min(left, phase.steps)
            total, left = total + steps * phase.batch * phase.sequence_length, left - steps
        return total

    @property
    def headline(self) -> dict[str, str]:
        """The figures that other runs quote."""
        told = {"optimizer steps": f"{self.manifest.step:,}"}
        if self.tickets:
            told["ticket"] = str(self.tickets[-1])
        if self.losses:
            step, loss = list(self.losses.items())[-1]
            told["held-out masked-LM loss"] = f"{loss:.4f} at step {step:,}"
        return told


def write(
    config: EarlyBertConfig,
    *,
    form: str,
    kept: tuple[Kept, Kept] | None,
    difference: float,
    training: Training | None,
) -> str:
    """The page. `kept`: heads and neurons in terms of the dense model, where a ticket was drawn;
    `difference`: the largest of logits between the export and the trained model."""
    name = "EarlyBERT" if training is None else training.experiment.name
    dense = config.dense() if training is None else _dense(config, training.experiment)
    parts = [
        metadata(task="fill-mask", language=None if training is None else _language(training), tags=["bert"]),
        [f"# {plain(name)}, {form} export", "", _opening(config, training)],
        _shape(config, dense, form=form, difference=difference, training=training),
        []
        if kept is None
        else ticket_lines(kept, _widths(dense), () if training is None else training.tickets),
        *([] if training is None else [_text(training), _course(training), _settings(training)]),
        _use(config, form=form, training=training),
        _loading(form),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def metadata(*, task: str | None, language: str | None, tags: Sequence[str], **more: Any) -> list[str]:
    """YAML, which model hubs read. `task`: the pipeline that opens the model; `more`: of ModelCardData."""
    values = ModelCardData(
        language=language,
        library_name="transformers",
        pipeline_tag=task,
        tags=[*tags, "earlybert", "lottery-ticket"],
        **more,
    )
    return ["---", values.to_yaml().strip(), "---"]


def _language(training: Training) -> str | None:
    """Where the corpus was kept to one, or split by the rules of another than the one taken by default."""
    settings = {} if training.corpus is None else training.corpus.settings
    language = settings.get("language")
    return language if settings.get("only_language") or language != "en" else None


def _opening(config: EarlyBertConfig, training: Training | None) -> str:
    told = f"A BERT encoder of {config.num_hidden_layers} layers, {config.hidden_size} wide"
    if training is None:
        return told + ", trained with earlybert."
    steps = sum(phase.steps for phase in training.experiment.phases)
    told += f", pretrained with earlybert for {training.manifest.step:,} steps"
    if training.manifest.step < steps:
        told += f" of {steps:,}: its training was not finished"
    if training.tickets:
        at = " and ".join(f"{ticket.step:,}" for ticket in training.tickets)
        what = {"early-bird": "its early-bird lottery ticket"}.get(
            training.experiment.ticket.kind, f'a "{training.experiment.ticket.kind}" ticket, a baseline'
        )
        told += f". It was cut to {what} at step {at}, and went on from there"
    return told + "."


def _shape(
    config: EarlyBertConfig,
    dense: EarlyBertConfig,
    *,
    form: str,
    difference: float,
    training: Training | None,
) -> list[str]:
    rows = [
        ("parameters", _parameters(dense), _parameters(config)),
        ("attention heads", sum(dense.heads_per_layer), sum(config.heads_per_layer)),
        ("FFN neurons", sum(dense.neurons_per_layer), sum(config.neurons_per_layer)),
    ]
    lines = ["## Shape", "| | dense model | this model |", "|---|---|---|"]
    lines += [f"| {what} | {before:,} | {after:,} |" for what, before, after in rows]
    if training is not None:
        work = plan.work_of(training.experiment, vocabulary=config.vocab_size)
        share = work.of(config.heads_per_layer, config.neurons_per_layer) / work.of(
            dense.heads_per_layer, dense.neurons_per_layer
        )
        lines.append(f"| FLOPs of a training step (encoder matrices, scores, head) | 1 | {share:.3f} |")
    lines += [
        "",
        f"Head size {config.head_size}, vocabulary {config.vocab_size:,}, at most "
        f"{config.max_position_embeddings} tokens a text{', LayerNorm first' if config.pre_norm else ''}.",
    ]
    if form == "dense":
        lines.append(
            "In this form heads and neurons that were removed stand as zeros: stock BERT loads it, and needs "
            "the dense model's memory and time."
        )
    lines.append(f"Largest difference of logits between this export and the trained model: {difference:.3g}.")
    return lines


def ticket_lines(kept: tuple[Kept, Kept], dense: Widths, tickets: Sequence[Ticket]) -> list[str]:
    """What was drawn, and layer by layer what stayed; `kept` in terms of the dense model."""
    lines = ["## Ticket"]
    for ticket in tickets:
        told = str(ticket)
        lines.append(f"- {plain(told[:1].upper() + told[1:])}")
        for step, far_heads, far_neurons in ticket.distances[-1:]:
            if far_heads is not None and far_neurons is not None:
                lines.append(
                    f"- largest distance to the masks before, step {step:,}: heads {far_heads:.3f}, neurons "
                    f"{far_neurons:.3f} (0 is the same mask, 1 is chance)"
                )
    lines += ["", "| layer of the dense model | heads that stayed | neurons that stayed |", "|---|---|---|"]
    heads, neurons = kept
    widths = zip(heads, dense.heads, neurons, dense.neurons, strict=True)
    for layer, (own_heads, of_heads, own_neurons, of_neurons) in enumerate(widths):
        which = f" ({', '.join(map(str, own_heads))})" if own_heads else ""
        lines.append(
            f"| {layer} | {len(own_heads)} of {of_heads}{which} | {len(own_neurons):,} of {of_neurons:,} |"
        )
    return lines


def _text(training: Training) -> list[str]:
    corpus, settings = training.corpus, training.experiment.data
    if corpus is None:
        return []
    lines = ["## What it was trained on"]
    if corpus.sources:
        lines += ["| source | documents | tokens |", "|---|---|---|"]
        lines += [
            f"| {plain(name)} | {row['documents']:,} | {row['tokens']:,} |"
            for name, row in corpus.sources.items()
        ]
        lines.append("")
    told = f"In all {corpus.documents:,} documents, {corpus.sentences:,} sentences, {corpus.tokens:,} tokens"
    lines.append(f"{told}; {settings.held_out:.3%} of the documents were held out and never trained on.")
    if settings.weights is not None:
        shares = ", ".join(f"{plain(name)} {weight:g}" for name, weight in settings.weights.items())
        lines.append(f"Sources were mixed in the proportion {shares}.")
    if corpus.settings.get("only_language"):
        lines.append(f"Documents in another language than `{corpus.settings['language']}` were dropped.")
    lines.append(f"Corpus (sha256 of its shards and tokenizer): `{corpus.content}`.")
    return lines


def _course(training: Training) -> list[str]:
    manifest = training.manifest
    lines = ["## Training", f"- {manifest.step:,} optimizer steps, {training.tokens:,} tokens with padding"]
    seconds = manifest.trainer.get("trained_seconds")
    if seconds:
        device = training.environment.get("device")
        where = "" if device is None else f" ({plain(str(device))})"
        lines.append(
            f"- {duration(seconds)} of training steps and draws, evaluations and saves not counted, on "
            f"{processes(manifest.world_size)}{where}"
        )
    drawn = {ticket.step for ticket in training.tickets}
    losses = training.losses
    ends = {step for step in (min(losses, default=None), max(losses, default=None)) if step is not None}
    if losses:
        lines += ["", "| step | held-out masked-LM loss |", "|---|---|"]
        lines += [
            f"| {step:,}{' (draw)' if step in drawn else ''} | {loss:.4f} |"
            for step, loss in losses.items()
            if step in drawn | ends
        ]
    return lines


def _settings(training: Training) -> list[str]:
    experiment, manifest = training.experiment, training.manifest
    optimizer, data, model = experiment.optimizer, experiment.data, experiment.model
    lines = ["## Settings", "| steps | tokens a row | rows a step | learning rate | warm-up | decay |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {phase.steps:,} | {phase.sequence_length} | {phase.batch:,} | {phase.learning_rate:g} "
        f"| {phase.warmup:.0%} | {phase.decay} |"
        for phase in experiment.phases
    ]
    betas = ", ".join(f"{beta:g}" for beta in optimizer.betas)
    whole = ", whole words" if data.whole_word else ""
    lines += [
        "",
        f"- objective: {_OBJECTIVES[data.objective]}; {data.mask_probability:.0%} of the tokens{whole}",
        f"- optimizer: {optimizer.name}, betas {betas}, epsilon {optimizer.epsilon:g}, weight decay "
        f"{optimizer.weight_decay:g}, clipping {optimizer.clipping:g}",
        f"- dropout {model.dropout:g}, of attention {model.attention_dropout:g}; seed {experiment.seed}",
        f"- {manifest.precision}, ZeRO-{manifest.stage}, {processes(manifest.world_size)}",
    ]
    if experiment.ticket.enabled:
        lines.append(f"- ticket: {experiment.ticket.kind}, penalty {experiment.ticket.penalty:g}")
    versions = dict(manifest.versions)
    if python := training.environment.get("python"):
        versions["python"] = python
    if commit := training.environment.get("git_commit"):
        versions["earlybert"] = f"commit {commit}"
    if versions:
        lines.append("- versions: " + ", ".join(f"{name} {told}" for name, told in versions.items()))
    return lines


def _use(config: EarlyBertConfig, *, form: str, training: Training | None) -> list[str]:
    lines = [
        "## Use and limits",
        "It guesses masked tokens, and is meant to be tuned for a task (classification, tagging, questions, "
        "embeddings). It does not generate text.",
        "No task was evaluated for this card: the only figures of quality are the held-out losses above, "
        "which compare only with those of the same text and vocabulary."
        if training is not None and training.losses
        else "Nothing was evaluated for this card.",
        "It repeats what stands in its text, errors and prejudice among it; look at its guesses on your own "
        "text before they matter to anybody.",
    ]
    if form == "compact":
        lines.append(
            "Its layers differ in heads and neurons, which stock BERT cannot hold: the code for them lies in "
            "this folder, and `trust_remote_code=True` runs it. Read it first, or load with earlybert."
        )
    return lines


def _loading(form: str) -> list[str]:
    trust = ", trust_remote_code=True" if form == "compact" else ""
    lines = ["## Load it", "```python", "from transformers import AutoModelForMaskedLM, pipeline", ""]
    lines.append(f'fill = pipeline("fill-mask", model="path/of/this/folder"{trust})')
    lines.append('fill("the [MASK] of a word")')
    lines.append(f'model = AutoModelForMaskedLM.from_pretrained("path/of/this/folder"{trust})')
    lines.append("```")
    if form == "compact":
        lines += [
            "Where earlybert is installed, no code of this folder has to run:",
            "```python",
            "import earlybert",
            "",
            'model = earlybert.load("path/of/this/folder")',
            "```",
        ]
    return lines


def _dense(config: EarlyBertConfig, experiment: Experiment) -> EarlyBertConfig:
    """The configuration before any draw, with the layers that a draw may have removed."""
    widths = experiment.dense_widths
    values = config.to_dict()
    values.update(
        num_hidden_layers=len(widths.heads),
        heads_per_layer=list(widths.heads),
        neurons_per_layer=list(widths.neurons),
    )
    return EarlyBertConfig.from_dict(values)


def _widths(config: EarlyBertConfig) -> Widths:
    return Widths(tuple(config.heads_per_layer), tuple(config.neurons_per_layer))


def _parameters(config: EarlyBertConfig) -> int:
    """Of a model of this shape, coefficients not counted."""
    bare = EarlyBertConfig.from_dict({**config.to_dict(), "coefficients": "none"})
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in EarlyBertForPreTraining(bare).parameters())


def processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def plain(text: str) -> str:
    """Text that means nothing to Markdown, on one line."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(text.split()))
