"""An EarlyBERT as stock BERT: the same model in the dense shape, under the same head.

The surprise: nothing is lost by it but time. A head or neuron that went is one whose outgoing weights are
zero, and a coefficient is a factor of those weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import BertConfig, PreTrainedModel

from earlybert import downstream
from earlybert.adapters import bert_layers
from earlybert.config import EarlyBertError
from earlybert.model import EarlyBertConfig, EarlyBertForMaskedLM, EarlyBertForPreTraining
from earlybert.shrink import index_map, present, uncut, without_coefficients
from earlybert.ticket import Kept

_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings",
    "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
"""Settings that stock BERT has by the same names."""
_LABELS = ("id2label", "label2id", "problem_type")
_KINDS: dict[type, type[PreTrainedModel]] = {
    EarlyBertForMaskedLM: transformers.BertForMaskedLM,
    EarlyBertForPreTraining: transformers.BertForPreTraining,
    downstream.EarlyBertModel: transformers.BertModel,
    downstream.EarlyBertForSequenceClassification: transformers.BertForSequenceClassification,
    downstream.EarlyBertForTokenClassification: transformers.BertForTokenClassification,
    downstream.EarlyBertForQuestionAnswering: transformers.BertForQuestionAnswering,
}


def dense_weights(
    config: EarlyBertConfig,
    weights: Mapping[str, torch.Tensor],
    *,
    heads: Kept | None = None,
    neurons: Kept | None = None,
) -> dict[str, torch.Tensor]:
    """`weights` in the dense model's shape: coefficients folded in, zeros where heads and neurons went.

    `heads` and `neurons`: kept indices; where there was no draw, the first of each layer.
    """
    layers = bert_layers(config.num_hidden_layers)
    weights = without_coefficients(layers, weights)
    if heads is None or neurons is None:  # layers that were small from the start are filled up
        heads = tuple(tuple(range(width)) for width in config.heads_per_layer)
        neurons = tuple(tuple(range(width)) for width in config.neurons_per_layer)
    cuts = index_map(
        layers,
        present(heads),
        present(neurons),
        head_size=config.head_size,
        head_widths=[config.num_attention_heads] * len(layers),
        neuron_widths=[config.intermediate_size] * len(layers),
    )
    return {name: uncut(value, cuts.get(name)) for name, value in weights.items()}


def refuse_unlike_stock(config: EarlyBertConfig) -> None:
    """Raise EarlyBertError for a model that stock BERT cannot hold."""
    if config.num_attention_heads * config.head_size != config.hidden_size:
        raise EarlyBertError(
            f"head_size {config.head_size} x {config.num_attention_heads} heads is not hidden_size "
            f"{config.hidden_size}: stock BERT cannot hold it; use the compact form"
        )
    if config.pre_norm:
        raise EarlyBertError(
            "the model was trained with model.pre_norm: stock BERT has its LayerNorms elsewhere; use the "
            "compact form"
        )


def stock_model(
    trained: Any,
    weights: Mapping[str, torch.Tensor],
    *,
    heads: Kept | None = None,
    neurons: Kept | None = None,
) -> PreTrainedModel:
    """`dense_weights` of `trained`, an EarlyBERT, in the stock class under the same head, in eval mode.

    Raises EarlyBertError where there is none.
    """
    config: Any = trained.config
    refuse_unlike_stock(config)
    kind = next((kind for own, kind in _KINDS.items() if isinstance(trained, own)), None)
    if kind is transformers.BertForPreTraining and not config.next_sentence:
        kind = transformers.BertForMaskedLM
    if kind is None:
        raise EarlyBertError(f"stock BERT has no {type(trained).__name__}; use the compact form")
    values = {name: getattr(config, name) for name in _SHARED}
    if kind.__name__.endswith("Classification"):
        values |= {name: getattr(config, name) for name in _LABELS}
    stock: Any = kind(BertConfig(**values))
    own = "" if hasattr(stock, "bert") else "bert."  # BertModel's own parameters have no prefix
    found = dense_weights(config, weights, heads=heads, neurons=neurons)
    found = {name.removeprefix(own): value for name, value in found.items()}
    try:
        told = stock.load_state_dict(found, strict=False)
    except RuntimeError as error:  # other shapes
        raise EarlyBertError(f"{type(trained).__name__}: {error}; use the compact form") from error
    missing = {name for name, _ in stock.named_parameters()} - found.keys()
    other = [*sorted(missing), *told.unexpected_keys]
    if other:
        raise EarlyBertError(
            f"{type(trained).__name__} has other parameters than {kind.__name__} ({', '.join(other)}); use "
            "the compact form"
        )
    return stock.eval()
