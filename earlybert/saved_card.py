"""The model card of what `earlybert.save` writes: what the engine knows of the model, and how it was tuned.

The surprise: there is no run folder here. A training loop of the user's own tells the engine nothing of its
text and its losses, so a card has its shape, its ticket and how to load it; only a fine-tuning by this
program has figures of quality (its `result.json`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult
from torch import nn

from earlybert.adapters import Shape
from earlybert.card import metadata, plain, processes, ticket_lines
from earlybert.export import CODE, Form
from earlybert.model import EarlyBertPreTrainedModel
from earlybert.monitor import duration
from earlybert.progress import Progress
from earlybert.scores import measured, title
from earlybert.targets import Widths

_PIPELINES = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForQuestionAnswering": "question-answering",
    "ForTokenClassification": "token-classification",
    "Model": "feature-extraction",
}
"""{how a class' name ends: the pipeline that opens it}."""
_SQUAD = {"squad": "rajpurkar/squad", "squad2": "rajpurkar/squad_v2"}
"""Their names on the hub; all other tasks are configurations of GLUE there."""
_NAMES = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
"""Of metrics, where hubs have other ones."""


@dataclass(frozen=True)
class Saved:
    """A model as it was written."""

    module: nn.Module
    """Of the written shape."""
    form: Form
    shape: Shape
    """Of the trained model."""
    progress: Progress
    difference: float
    """Largest difference of logits between what was written and the trained model."""
    filled: bool = False
    """True where zeros stand for heads and neurons that the trained model has not."""

    @property
    def dense(self) -> Widths:
        """Widths before the first draw."""
        tickets = self.progress.tickets
        if not tickets:
            return Widths(self.shape.heads, self.shape.neurons)
        return Widths(tickets[0].head_widths, tickets[0].neuron_widths)


def write(saved: Saved, result: Mapping[str, Any] | None = None) -> str:
    """The page. `result`: `result.json` of the fine-tuning that ends here."""
    name, progress = type(saved.module).__name__, saved.progress
    kept = None if progress.heads is None or progress.neurons is None else (progress.heads, progress.neurons)
    config: Any = saved.module.config
    parts = [
        metadata(
            task=next((task for end, task in _PIPELINES.items() if name.endswith(end)), None),
            language=None, tags=[str(config.model_type)],
            **({} if result is None else {"model_name": name, "eval_results": _evaluations(result)}),
        ),
        [f"# {name}, {saved.form} form", "", _opening(saved)],
        _shape(saved),
        [] if kept is None else ticket_lines(kept, saved.dense, progress.tickets),
        [] if result is None else _tuning(result),
        _limits(result),
        _loading(saved),
    ]  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _opening(saved: Saved) -> str:
    config: Any = saved.module.config
    told = f"A model of the architecture `{plain(str(config.model_type))}`"
    if saved.shape.heads:
        told += f" with {len(saved.shape.heads)} layers, {config.hidden_size} wide"
    told += ", trained with earlybert"
    if tickets := saved.progress.tickets:
        at = " and ".join(f"{ticket.step:,}" for ticket in tickets)
        kind = tickets[-1].settings.get("kind", "early-bird")
        baseline = f'a "{plain(kind)}" ticket, a baseline'
        what = "its early-bird lottery ticket" if kind == "early-bird" else baseline
        told += f". It was cut to {what} at step {at}"
    return told + "."


def _shape(saved: Saved) -> list[str]:
    lines, now, dense = ["## Shape"], saved.shape, saved.dense
    rows = [
        ("layers", len(dense.heads), len(now.heads)),
        ("attention heads", sum(dense.heads), sum(now.heads)),
        ("FFN neurons", sum(dense.neurons), sum(now.neurons)),
    ]
    if saved.progress.tickets:
        lines += ["| | before the ticket | this model |", "|---|---|---|"]
        lines += [f"| {what} | {before:,} | {after:,} |" for what, before, after in rows] + [""]
    elif now.heads:
        lines.append(", ".join(f"{after:,} {what}" for what, _, after in rows) + ".")
    count = sum(p.numel() for n, p in saved.module.named_parameters() if not n.endswith(".coefficients"))
    lines.append(f"The file has {count:,} parameters.")
    if saved.filled:
        lines.append("Heads and neurons that were removed stand in it as zeros.")
    lines.append(
        f"Largest difference of logits between this file and the trained model: {saved.difference:.3g}."
    )
    return lines


def _tuning(result: Mapping[str, Any]) -> list[str]:
    recipe, seconds = result["recipe"], result["seconds"]
    lines = [
        "## Task",
        f"{_name(result['task'])}, from `{plain(str(result['model']))}`, seed {result['seed']}. One seed of "
        "several says little by itself; percent:",
        "",
        "| split | metric | |", "|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {plain(split)} | {plain(metric)} | {value:.2f} |"
        for (split, metric), value in measured(result).items()
    ]
    lines += [
        "",
        f"- {recipe['epochs']:g} epochs, {recipe['batch']} rows a step, learning rate at most "
        f"{recipe['learning_rate']:g}, at most {recipe['sequence_length']} tokens a row; "
        f"{result['precision']}, {processes(result['ranks'])}",
        f"- {duration(seconds['search'] + seconds['train'])} of training steps"
        + (f", {duration(seconds['search'])} of them up to the draw" if seconds["search"] else ""),
    ]
    lines += [
        f"- its pretraining, {plain(what)}: {plain(told)}" for what, told in result["pretraining"].items()
    ]
    return lines


def _limits(result: Mapping[str, Any] | None) -> list[str]:
    lines = ["## Use and limits"]
    if result is None:
        lines.append(
            "Nothing was evaluated for this card, and what text it was trained on is not known to it."
        )
    else:
        lines.append("The figures above are of that task's own texts; on others it may do worse.")
    return lines


def _loading(saved: Saved) -> list[str]:
    name = type(saved.module).__name__
    lines = ["## Load it", "```python"]
    own = isinstance(saved.module, EarlyBertPreTrainedModel)
    if own or saved.form == "compact":
        lines += ["import earlybert", "", 'model = earlybert.load("path/of/this/folder")', "```"]
    else:
        lines += [f"from transformers import {name}", ""]
        lines += [f'model = {name}.from_pretrained("path/of/this/folder")', "```"]
    auto = next((auto for auto, kind in CODE.items() if kind is type(saved.module)), None)
    if auto is not None:
        lines += [
            "Where earlybert is not installed, the code in this folder runs in its place; read it first:",
            "```python",
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("path/of/this/folder", trust_remote_code=True)',
            "```",
        ]
    return lines


def _evaluations(result: Mapping[str, Any]) -> Sequence[EvalResult]:
    """The scores as hubs read them."""
    task = result["task"]
    config = None if task in _SQUAD else task
    return [
        EvalResult(
            task_type="question-answering" if config is None else "text-classification",
            dataset_type=_SQUAD.get(task, "nyu-mll/glue"), dataset_name=_name(task), dataset_config=config,
            dataset_split=split,
            metric_type=_NAMES.get(metric, metric.replace(" ", "_")), metric_name=metric,
            metric_value=round(value, 4),
        )
        for (split, metric), value in measured(result).items()
    ]  # fmt: skip


def _name(task: str) -> str:
    return title(task) if task in _SQUAD else f"GLUE {title(task)}"
