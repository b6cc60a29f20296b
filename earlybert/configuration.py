"""The shape of an EarlyBERT as data, so that a shrunken model is built from its config and loaded strictly.

Exports carry a copy: beside `arithmetic.py` this file imports nothing of its package.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PretrainedConfig

from .arithmetic import ACTIVATIONS

COEFFICIENTS = ("none", "train", "freeze")


class EarlyBertConfig(PretrainedConfig):
    """Shape and settings of an EarlyBERT; `*_per_layer` are true widths, the scalars the dense model's."""

    model_type = "earlybert"
    keys_to_ignore_at_inference = ["correct", "counted"]  # noqa: RUF012 - a list, as Trainer adds to it
    """Counts, which Hugging Face's Trainer must not take for predictions."""

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        head_size: int | None = None,
        heads_per_layer: list[int] | None = None,
        neurons_per_layer: list[int] | None = None,
        coefficients: str = "none",
        next_sentence: bool = False,
        pre_norm: bool = False,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int | None = 0,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients = {coefficients!r}: choose one of {', '.join(COEFFICIENTS)}")
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act = {hidden_act!r}: choose one of {', '.join(ACTIVATIONS)}")
        if others.get("position_embedding_type", "absolute") != "absolute" or others.get("is_decoder"):
            raise ValueError(
                "only BERT encoders with absolute positions are known; this configuration is another"
            )
        if head_size is None and hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.head_size = head_size or hidden_size // num_attention_heads
        self.heads_per_layer = _per_layer(
            heads_per_layer, num_attention_heads, num_hidden_layers, "heads_per_layer"
        )
        self.neurons_per_layer = _per_layer(
            neurons_per_layer, intermediate_size, num_hidden_layers, "neurons_per_layer"
        )
        self.coefficients = coefficients
        self.next_sentence = next_sentence
        self.pre_norm = pre_norm
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**others)
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings

    def dense(self) -> EarlyBertConfig:
        """The configuration before any draw."""
        values = self.to_dict()
        values.update(heads_per_layer=None, neurons_per_layer=None)
        return type(self).from_dict(values)


def _per_layer(widths: list[int] | None, dense: int, layers: int, what: str) -> list[int]:
    if widths is None:
        return [dense] * layers
    if len(widths) != layers or not all(0 < width <= dense for width in widths):
        raise ValueError(f"{what} = {list(widths)}: need {layers} numbers from 1 to {dense}")
    return list(widths)
