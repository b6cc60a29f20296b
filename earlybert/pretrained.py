"""What `earlybert.initialize` trained, saved for others: in its true shape, or as the stock model it was.

    earlybert.save(engine, "models/mine")                  # compact; earlybert.load("models/mine")
    earlybert.save(engine, "models/mine", form="dense")    # stock; AutoModel...from_pretrained("models/mine")

Both are loaded again and compared with the trained weights before they get their name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from earlybert import adapters, dist, saved_card, state
from earlybert.config import EarlyBertError, read_json
from earlybert.downstream import (
    EarlyBertForQuestionAnswering,
    EarlyBertForSequenceClassification,
    EarlyBertForTokenClassification,
    EarlyBertModel,
)
from earlybert.engine import Engine
from earlybert.export import MARK, Form, carry_code, new_folder, refuse_difference
from earlybert.model import EarlyBertForMaskedLM, EarlyBertForPreTraining, EarlyBertPreTrainedModel
from earlybert.saved_card import Saved
from earlybert.shrink import index_map, present, uncut, without_coefficients
from earlybert.stock import stock_model


def save(
    engine: Engine, to: str | Path, *, form: Form = "compact", result: Mapping[str, Any] | None = None
) -> float:
    """Write the model to a folder; return the largest difference of logits after loading it. Collective.

    A model card (README.md) stands beside it; `result`: its figures, those of `result.json` of a fine-tuning.

    "compact" has the true shapes and is for `load`; "dense" has coefficients folded in and zeros where heads
    and neurons went, and is for the stock class: what the model was, BERT for an EarlyBERT. Raises
    EarlyBertError, on every rank, where `to` is something else than an export, stock BERT cannot hold the
    model, or the logits differ by more than 1e-5 of their largest magnitude.
    """
    weights = {}
    for name, tensors in state.whole_parameters(state.read(engine.inner)):
        if dist.rank() == 0:
            weights[name] = tensors[state.MASTER]
    problem, difference = None, 0.0
    if dist.rank() == 0:
        try:
            difference = _write(engine, weights, Path(to), form=form, result=result)
        except EarlyBertError as error:
            problem = str(error)
    problem, difference = dist.from_rank_0((problem, difference))
    if problem is not None:
        raise EarlyBertError(problem)
    return difference


def form_of(folder: Path) -> Form | None:
    """In which form `save` or `scripts/export.py` wrote a folder; None where they did not."""
    mark = folder / MARK
    return read_json(mark).get("form") if mark.is_file() else None


def load(folder: str | Path) -> Any:
    """Load what `save` or `scripts/export.py` wrote, in its true shape, in eval mode.

    Raises EarlyBertError where the folder holds no model, or one that this program did not shrink.
    """
    folder = Path(folder)
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder)
        name = config.architectures[0]
    except (OSError, ValueError, TypeError) as error:
        raise EarlyBertError(
            f"{folder}: no model is there ({error}); give a folder that save wrote"
        ) from error
    kinds = (
        EarlyBertForPreTraining, EarlyBertForMaskedLM, EarlyBertModel, EarlyBertForSequenceClassification,
        EarlyBertForTokenClassification, EarlyBertForQuestionAnswering,
    )  # fmt: skip
    own = {kind.__name__: kind for kind in kinds}
    kind = own.get(name) or getattr(transformers, name, None)
    if kind is None:
        raise EarlyBertError(f"{folder}: transformers has no {name}; load it with its own class")
    with torch.device("meta"):
        adapter = adapters.adapter_of(kind(config))
    module = adapter.build(config)
    try:
        load_model(module, folder / "model.safetensors", strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise EarlyBertError(f"{folder}: model.safetensors does not hold this model ({error})") from error
    adapter.attach(module)
    return module.eval()


def _write(
    engine: Engine,
    weights: dict[str, torch.Tensor],
    to: Path,
    *,
    form: Form,
    result: Mapping[str, Any] | None,
) -> float:
    adapter, config = engine.adapter, engine.module.config
    trained = _filled(adapter, config, weights)
    with new_folder(to) as hidden:
        if form == "compact":
            written = trained
        elif isinstance(trained, EarlyBertPreTrainedModel):
            kept = engine.progress
            written = stock_model(trained, weights, heads=kept.heads, neurons=kept.neurons)
        else:
            written = _as_it_was(engine, trained, weights)
        written.save_pretrained(hidden, max_shard_size="1TB")
        if isinstance(written, EarlyBertPreTrainedModel):
            carry_code(hidden)
        loaded = load(hidden) if form == "compact" else type(written).from_pretrained(hidden).eval()
        difference, scale = _difference(trained, loaded)
        refuse_difference(to, difference, scale=scale, form=form)
        shape, filled = adapter.shape(trained), _size(written) > _size(trained)
        saved = Saved(written, form, shape, engine.progress, difference, filled)
        (hidden / "README.md").write_text(saved_card.write(saved, result), encoding="utf-8")
        (hidden / MARK).write_text(json.dumps({"form": form, "largest_difference": difference}) + "\n")
    return difference


def _as_it_was(engine: Engine, trained: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A stock model in the shape that it had before the first draw, zeros where heads and neurons went."""
    adapter, config, progress = engine.adapter, engine.module.config, engine.progress
    layers = adapter.layers(config)
    weights = without_coefficients(layers, weights)
    if progress.heads is not None and progress.neurons is not None:
        first = progress.tickets[0]
        left = [layer for layer, heads in enumerate(progress.heads) if heads]
        cuts = index_map(
            layers,
            present(progress.heads),
            present(progress.neurons),
            head_size=adapter.shape(trained).head_size,
            head_widths=[first.head_widths[layer] for layer in left],
            neuron_widths=[first.neuron_widths[layer] for layer in left],
        )
        weights = {name: uncut(value, cuts.get(name)) for name, value in weights.items()}
    return _filled(adapter, adapter.dense(config), weights)


def _filled(adapter: adapters.Adapter, config: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A module of the config's shape with these weights, which are all of its parameters."""
    module = adapter.build(config)
    names = {name for name, _ in module.named_parameters()}
    assert names == weights.keys(), names ^ weights.keys()
    module.load_state_dict(weights, strict=False)  # what is missing is tied to what is there, or a buffer
    adapter.attach(module)
    return module.eval()


def _size(module: nn.Module) -> int:
    """Elements of parameters, without coefficients."""
    return sum(p.numel() for name, p in module.named_parameters() if not name.endswith(".coefficients"))


def _difference(trained: nn.Module, loaded: nn.Module) -> tuple[float, float]:
    """Largest difference of the first output on a fixed input; its largest magnitude."""
    config: Any = trained.config
    length = min(24, config.max_position_embeddings - 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0  # padding too
    with torch.no_grad():
        first, other = (model(input_ids=ids, attention_mask=mask)[0] for model in (trained, loaded))
    return float((first - other).abs().max()), float(first.abs().max())
