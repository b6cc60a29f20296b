"""A trained model for others to load: *compact* in its true shape, or *dense* in that of stock BERT.

Compact carries copies of `model.py`, `downstream.py` and what they import beside the weights, so it loads
with `trust_remote_code=True` where this package is not installed, and through the package without it. Dense
has the coefficients folded in and zeros where heads and neurons went. Either is loaded again from disk and
compared with the trained model before it gets its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertForMaskedLM,
    BertForPreTraining,
)
from transformers.utils import logging as transformers_logging

from earlybert import arithmetic, card, checkpoint, configuration, downstream, encoder
from earlybert import model as modelling
from earlybert.checkpoint import Checkpoint
from earlybert.config import EarlyBertError, sync_folder
from earlybert.engine import Progress
from earlybert.model import EarlyBertConfig, EarlyBertForMaskedLM, EarlyBertForPreTraining
from earlybert.shards import tokenizer_sha256
from earlybert.stock import stock_model
from earlybert.ticket import Kept

Form = Literal["compact", "dense"]
CODE = {
    "AutoConfig": EarlyBertConfig,
    "AutoModel": downstream.EarlyBertModel,
    "AutoModelForMaskedLM": EarlyBertForMaskedLM,
    "AutoModelForPreTraining": EarlyBertForPreTraining,
    "AutoModelForQuestionAnswering": downstream.EarlyBertForQuestionAnswering,
    "AutoModelForSequenceClassification": downstream.EarlyBertForSequenceClassification,
    "AutoModelForTokenClassification": downstream.EarlyBertForTokenClassification,
}
"""What transformers' Auto classes find in a compact export."""
MARK = "earlybert_export.json"
"""Stands in every export, so that an export may replace an older one and nothing else."""
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Source:
    """What is exported: a trained model and where it came from."""

    weights: Mapping[str, torch.Tensor]
    """fp32 by parameter name."""
    config: EarlyBertConfig
    tokenizer: Path
    """A tokenizer folder; its files are copied."""
    heads: Kept | None = None
    """Kept indices in terms of the dense model; None for a model that was never shrunken."""
    neurons: Kept | None = None
    training: card.Training | None = None
    """The run, where it is known."""


def export(source: Source, *, to: Path, form: Form) -> float:
    """Write `source` to the folder `to` and return the largest difference of logits after loading it again.

    Raises EarlyBertError, leaving nothing behind, where `to` is something else than an export or the logits
    differ by more than 1e-5 of their largest magnitude.
    """
    with new_folder(to) as hidden:
        trained = _model(source)
        (_write_compact if form == "compact" else _write_dense)(source, trained, hidden)
        _write_tokenizer(source, hidden)
        difference, scale = _compare(source, trained, hidden, form=form)
        refuse_difference(to, difference, scale=scale, form=form)
        kept = None if source.heads is None or source.neurons is None else (source.heads, source.neurons)
        page = card.write(
            source.config, form=form, kept=kept, difference=difference, training=source.training
        )
        (hidden / "README.md").write_text(page, encoding="utf-8")
        (hidden / MARK).write_text(json.dumps({"form": form, "largest_difference": difference}) + "\n")
    return difference


@contextlib.contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """Yield a hidden folder that takes the place of `to` when all went well, and is gone otherwise.

    Raises EarlyBertError where `to` is something else than an export, or cannot be made.
    """
    to = to.resolve()  # "." and ".." have no name of their own
    if to.exists() and not (to / MARK).exists() and (not to.is_dir() or any(to.iterdir())):
        raise EarlyBertError(f"{to} exists and is not an export; choose another folder")
    hidden = to.with_name(f".{to.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        raise EarlyBertError(f"{to} cannot be made: {error.strerror}; choose another folder") from error
    try:
        yield hidden
        sync_folder(hidden)
        shutil.rmtree(to, ignore_errors=True)
        os.rename(hidden, to)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' reports of what it loads to itself, but for errors."""
    verbosity, shown = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


def refuse_difference(to: Path, difference: float, *, scale: float, form: Form) -> None:
    """Raise EarlyBertError where the logits of what was written differ by more than rounding explains."""
    if not difference <= TOLERANCE * max(1.0, scale):
        raise EarlyBertError(
            f"{to}: the {form} export's logits differ from the trained model's by {difference:.3g} "
            f"(largest logit {scale:.3g}); nothing was written: this is a fault of the program, report it"
        )


def read_run(path: Path) -> Source:
    """What to export from a run folder (its newest good checkpoint) or from a checkpoint folder.

    Raises EarlyBertError where `path` is neither, or the checkpoint's files do not match its manifest.
    """
    if (path / "manifest.json").exists():
        manifest = checkpoint.read_manifest(path)
        wrong = checkpoint.flaws(path, manifest)
        if wrong:
            raise EarlyBertError(f"{path} is broken: {'; '.join(wrong)}; use another checkpoint")
        found, run = Checkpoint(path, manifest), path.parent.parent
    elif (path / "checkpoints").is_dir():
        newest = checkpoint.newest_good(path / "checkpoints")
        if newest is None:
            raise EarlyBertError(f"{path}: no complete checkpoint yet; export after the first one")
        found, run = newest, path
    else:
        raise EarlyBertError(f"{path}: neither a run folder nor a checkpoint; give runs/NAME")
    training = card.Training.read(run, found.manifest)
    corpus = Path(training.experiment.data.corpus)
    tokenizer = corpus / "tokenizer"
    if not tokenizer.is_dir():
        raise EarlyBertError(f"{tokenizer}: the corpus' tokenizer is not there; restore {corpus}")
    trained_with = training.environment.get("tokenizer")
    if trained_with is not None and tokenizer_sha256(tokenizer) != trained_with:
        raise EarlyBertError(
            f"{tokenizer} is another tokenizer than the one that {run} was trained with: the corpus was "
            "prepared again; put the old tokenizer back"
        )
    progress = Progress.from_json(found.manifest.progress, where=str(found.folder))
    return Source(
        weights=checkpoint.weights(found),
        config=EarlyBertConfig.from_dict(found.manifest.model),
        tokenizer=tokenizer,
        heads=progress.heads,
        neurons=progress.neurons,
        training=training,
    )


def _model(source: Source) -> EarlyBertForPreTraining:
    kind = EarlyBertForPreTraining if source.config.next_sentence else EarlyBertForMaskedLM
    model = kind(source.config)
    model.load_state_dict(dict(source.weights), strict=True)
    return model.eval()


def _write_tokenizer(source: Source, folder: Path) -> None:
    """Copy the tokenizer's files; texts are cut where the model's positions end."""
    for path in source.tokenizer.iterdir():
        if path.is_file():
            shutil.copy(path, folder / path.name)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        values["model_max_length"] = source.config.max_position_embeddings
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_compact(source: Source, trained: EarlyBertForPreTraining, folder: Path) -> None:
    trained.save_pretrained(folder)
    carry_code(folder)


def carry_code(folder: Path) -> None:
    """Put the modelling code beside a saved EarlyBERT, where the Auto classes look for it."""
    for carried in (arithmetic, configuration, encoder, modelling, downstream):
        shutil.copy(str(carried.__file__), folder)
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["auto_map"] = {
        auto: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for auto, kind in CODE.items()
    }
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_dense(source: Source, trained: EarlyBertForPreTraining, folder: Path) -> None:
    stock = stock_model(trained, source.weights, heads=source.heads, neurons=source.neurons)
    stock.save_pretrained(folder)


def _compare(
    source: Source, trained: EarlyBertForPreTraining, folder: Path, *, form: Form
) -> tuple[float, float]:
    """Largest difference of logits between the trained model and what `folder` loads as; largest logit."""
    with quiet_transformers():
        if form == "dense":
            kind = BertForPreTraining if source.config.next_sentence else BertForMaskedLM
            loaded: list[Any] = [kind.from_pretrained(folder)]
        else:
            auto = AutoModelForPreTraining if source.config.next_sentence else AutoModelForMaskedLM
            loaded = [type(trained).from_pretrained(folder)]
            loaded.append(auto.from_pretrained(folder, trust_remote_code=True))
    length = min(24, source.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(source.config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0  # padding too
    worst = 0.0
    with torch.no_grad():
        expected = _logits(trained(input_ids=ids, attention_mask=mask))
        for model in loaded:
            found = _logits(model.eval()(input_ids=ids, attention_mask=mask))
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)))
    return worst, max(float(logits.abs().max()) for logits in expected)


def _logits(output: Any) -> list[torch.Tensor]:
    """The masked-LM logits and, where there is that head, the next-sentence logits."""
    names = ("prediction_logits", "logits", "seq_relationship_logits")
    return [output[name] for name in names if name in output]
