"""EarlyBERT: a BERT whose layers may differ in heads and neurons, with a coefficient for each.

Parameters are named as in Hugging Face's `BertForPreTraining`, whose weights
load here.

The surprise: the masked-LM head runs on masked positions only. With `masked_positions`, `prediction_logits`
has a row for each of them, not for each token. Exports carry copies of this file, `encoder.py`,
`downstream.py`, `arithmetic.py` and `configuration.py`, which import nothing else of their package.

B sequences, T tokens, P masked positions a sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForPreTraining
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from .arithmetic import ACTIVATIONS, IGNORED, MaskedLoss
from .configuration import EarlyBertConfig
from .encoder import Body


@dataclass
class EarlyBertOutput(ModelOutput):
    """What a forward pass returns."""

    loss: torch.Tensor | None = None
    """Mean masked-LM loss over the labelled positions, in fp32, plus the next-sentence loss if labelled."""
    prediction_logits: torch.Tensor | None = None
    """[B, P, V] with `masked_positions`, else [B, T, V]; None where `labels` were given in training mode."""
    seq_relationship_logits: torch.Tensor | None = None
    """[B, 2]; class 1 means that the second segment does not follow the first."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    """[B, T, D] of the embeddings and of each layer, where they were asked for."""
    correct: torch.Tensor | None = None
    """Masked positions predicted right, a scalar."""
    counted: torch.Tensor | None = None
    """Masked positions with a label, a scalar."""


@dataclass
class EarlyBertMaskedLMOutput(ModelOutput):
    """What `EarlyBertForMaskedLM` returns: the names of stock `BertForMaskedLM`, which pipelines look up."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    """As `EarlyBertOutput.prediction_logits`."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    correct: torch.Tensor | None = None
    counted: torch.Tensor | None = None

    @property
    def prediction_logits(self) -> torch.Tensor | None:
        """`logits` under the name of `EarlyBertOutput`."""
        return self.logits


class Asked(TypedDict, total=False):
    """What stock BERT can be asked for beside its answer; None: what the configuration says."""

    output_hidden_states: bool | None
    output_attentions: bool | None
    """Refused: attention goes through kernels that keep no weights."""


class Packed(Asked, total=False):
    """What pretraining says beside stock BERT's arguments.

    Not parameters with names of their own: Hugging Face's Trainer takes every one that has "label" in its
    name for a label that each batch must have, and would evaluate without a loss.
    """

    masked_positions: torch.Tensor
    masked_labels: torch.Tensor
    segments: torch.Tensor


class _Transform(nn.Module):
    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.activation(self.dense(x)))


class _Predictions(nn.Module):
    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__()
        self.transform = _Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(x))


class _Heads(nn.Module):
    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__()
        self.predictions = _Predictions(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2) if config.next_sentence else None


class EarlyBertPreTrainedModel(PreTrainedModel):
    """What EarlyBERTs share, whatever head they have on their `bert`."""

    config_class = EarlyBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # a loss is the mean over its own batch, whatever a Trainer accumulates
    _supports_sdpa = True
    bert: Body

    def regions(self) -> list[nn.Module]:
        """The modules that `Engine.compile` compiles, each by itself; what is between them stays as it is."""
        return [self.bert.embeddings, *self.bert.encoder.layer]

    def get_input_embeddings(self) -> nn.Module:
        return self.bert.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.bert.embeddings.word_embeddings = value  # type: ignore[assignment]

    def _init_weights(self, module: nn.Module) -> None:
        """Hugging Face BERT's initial values; runs for what a checkpoint does not bring."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            # A slice loses the mark that guards a loaded weight from a second initialisation: ask the whole.
            loaded = getattr(module.weight, "_is_hf_initialized", False)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and not loaded:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, _Predictions):
            nn.init.zeros_(module.bias)
        elif isinstance(coefficients := getattr(module, "coefficients", None), nn.Parameter):
            nn.init.ones_(coefficients)


class EarlyBertForPreTraining(EarlyBertPreTrainedModel):
    """The encoder with the masked-LM head and, with `config.next_sentence`, the next-sentence head."""

    _tied_weights_keys = {  # noqa: RUF012 - the base class's own declaration
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__(config)
        self.bert = Body(config, pooled=config.next_sentence)
        self.cls = _Heads(config)
        self.masked_loss = MaskedLoss()
        self.post_init()

    def regions(self) -> list[nn.Module]:
        """As of every EarlyBERT, and the masked-LM head and its loss."""
        return [*super().regions(), self.cls.predictions, self.masked_loss]

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.cls.predictions.decoder = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        **packed: Unpack[Packed],
    ) -> EarlyBertOutput:
        """Run the encoder and the heads.

        `input_ids`, `attention_mask` (1 real, 0 padding), `token_type_ids`, `position_ids`, `labels`,
        `segments` (documents that share a row: tokens attend to those of their own number only, which stand
        side by side): [B, T];
        `masked_positions`, `masked_labels`: [B, P], positions within the row; `next_sentence_label`: [B].
        A label of -100 is not counted. Give either `masked_positions` (static shapes; the head runs on those
        rows only) or `labels`, as stock BERT has them; in training mode the head then runs on the labelled
        rows only. Raises ValueError for both, and for labels that have no head or no positions.
        """
        batch = (input_ids, attention_mask, token_type_ids, position_ids)
        return self._answer(*batch, labels=labels, next_sentence_label=next_sentence_label, **packed)

    def _answer(
        self,
        *batch: torch.Tensor | None,
        labels: torch.Tensor | None,
        next_sentence_label: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        masked_labels: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        **asked: Unpack[Asked],
    ) -> EarlyBertOutput:
        if masked_positions is not None and labels is not None:
            raise ValueError(
                "labels and masked_positions are both given; give one (masked_labels go with the latter)"
            )
        if masked_labels is not None and masked_positions is None:
            raise ValueError("masked_labels are given without masked_positions; give both")
        if next_sentence_label is not None and not self.config.next_sentence:
            raise ValueError(
                "next_sentence_label is given to a model without that head; set config.next_sentence"
            )
        x_BTD, pooled_BD, states = self.bert(*batch, segments, **asked)
        rows, targets, shape = x_BTD.flatten(0, 1), None, None
        if masked_positions is not None:
            first_B1 = torch.arange(x_BTD.shape[0], device=x_BTD.device)[:, None] * x_BTD.shape[1]
            rows = rows.index_select(0, (first_B1 + masked_positions).flatten())
            targets = None if masked_labels is None else masked_labels.flatten()
            shape = masked_positions.shape
        elif labels is not None and self.training:
            labelled = (labels.flatten() != IGNORED).nonzero().squeeze(1)
            rows, targets = rows.index_select(0, labelled), labels.flatten()[labelled]
        else:
            targets = None if labels is None else labels.flatten()
            shape = x_BTD.shape[:2]
        logits = self.cls.predictions(rows)
        loss = correct = counted = pairs_B2 = None
        if targets is not None:
            counted = (targets != IGNORED).sum()
            total, correct = self.masked_loss(logits, targets)
            # A rank's share of a held-out set may hold no label at all: its loss is 0, not 0 / 0.
            loss = total / counted.clamp(min=1)
        if pooled_BD is not None and self.cls.seq_relationship is not None:
            pairs_B2 = self.cls.seq_relationship(pooled_BD)
            if next_sentence_label is not None:
                told = (next_sentence_label != IGNORED).sum().clamp(min=1)
                pair = functional.cross_entropy(
                    pairs_B2.float(), next_sentence_label, ignore_index=IGNORED, reduction="sum"
                )
                loss = pair / told if loss is None else loss + pair / told
        return EarlyBertOutput(
            loss=loss,
            prediction_logits=None if shape is None else logits.view(*shape, -1),
            seq_relationship_logits=pairs_B2,
            hidden_states=states,
            correct=correct,
            counted=counted,
        )


class EarlyBertForMaskedLM(EarlyBertForPreTraining):
    """The same model without the next-sentence head; called, and answering, like stock `BertForMaskedLM`."""

    def __init__(self, config: EarlyBertConfig) -> None:
        if config.next_sentence:
            config = type(config).from_dict({**config.to_dict(), "next_sentence": False})
        super().__init__(config)

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **packed: Unpack[Packed],
    ) -> EarlyBertMaskedLMOutput:
        """Run encoder and head; the arguments are those of `EarlyBertForPreTraining`."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids)
        output = self._answer(*batch, labels=labels, **packed)
        return EarlyBertMaskedLMOutput(
            loss=output.loss,
            logits=output.prediction_logits,
            correct=output.correct,
            counted=output.counted,
            hidden_states=output.hidden_states,
        )


if not __name__.startswith("transformers_modules."):  # an export's copy must not take the package's place
    AutoConfig.register(EarlyBertConfig.model_type, EarlyBertConfig, exist_ok=True)
    AutoModelForPreTraining.register(EarlyBertConfig, EarlyBertForPreTraining, exist_ok=True)
    AutoModelForMaskedLM.register(EarlyBertConfig, EarlyBertForMaskedLM, exist_ok=True)
