"""EarlyBERT under other heads: none, a label or degree of a text, labels of its tokens, an answer's bounds.

Names and outputs are those of stock BERT's `BertModel`, `BertForSequenceClassification`,
`BertForTokenClassification` and `BertForQuestionAnswering`, so their checkpoints load here. The surprise:
the first two always have a pooler; where the checkpoint has none (it was pretrained on masked tokens alone),
it starts fresh. Exports carry a copy.

B sequences, T tokens, C labels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple
from typing_extensions import Unpack

from .arithmetic import IGNORED, Dropout
from .configuration import EarlyBertConfig
from .encoder import Body
from .model import Asked, EarlyBertPreTrainedModel


class EarlyBertModel(EarlyBertPreTrainedModel):
    """The encoder and its pooler alone."""

    _keys_to_ignore_on_load_unexpected = [r"^cls\.", r"^classifier\.", r"^qa_outputs\."]  # noqa: RUF012

    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__(config)
        self.bert = Body(config, pooled=True)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **asked: Unpack[Asked],
    ) -> BaseModelOutputWithPooling:
        """Run the encoder; all arguments [B, T], `attention_mask` 1 where a token is real."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids)
        hidden, pooled, states = self.bert(*batch, **asked)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=pooled, hidden_states=states
        )


class EarlyBertForSequenceClassification(EarlyBertPreTrainedModel):
    """A label of `config.num_labels` for each text, or a degree where that is 1."""

    _keys_to_ignore_on_load_unexpected = [r"^cls\.", r"^qa_outputs\."]  # noqa: RUF012

    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__(config)
        self.bert = Body(config, pooled=True)
        self.dropout = Dropout(config.hidden_dropout_prob)
        assert config.num_labels is not None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **asked: Unpack[Asked],
    ) -> SequenceClassifierOutput:
        """Logits [B, C] in fp32; with `labels` the mean of what `config.problem_type` says.

        Where it says nothing: the squared error of degrees [B] if C is 1, cross-entropy of numbers [B], and
        that of a yes or no for each label where they are floats [B, C].
        """
        batch = (input_ids, attention_mask, token_type_ids, position_ids)
        _, pooled_BD, states = self.bert(*batch, **asked)
        logits_BC = self.classifier(self.dropout(pooled_BD)).float()
        loss = None if labels is None else self._loss(logits_BC, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC, hidden_states=states)

    def _loss(self, logits_BC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        problem = self.config.problem_type
        if problem == "regression" or (problem is None and self.config.num_labels == 1):
            return functional.mse_loss(logits_BC, labels.float().view_as(logits_BC))
        if problem == "multi_label_classification" or (problem is None and labels.is_floating_point()):
            return functional.binary_cross_entropy_with_logits(logits_BC, labels.float())
        return functional.cross_entropy(logits_BC, labels.flatten())


class EarlyBertForTokenClassification(EarlyBertPreTrainedModel):
    """A label of `config.num_labels` for each token."""

    _keys_to_ignore_on_load_unexpected = [r"^cls\.", r"^qa_outputs\.", r"pooler"]  # noqa: RUF012

    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__(config)
        self.bert = Body(config, pooled=False)
        self.dropout = Dropout(config.hidden_dropout_prob)
        assert config.num_labels is not None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **asked: Unpack[Asked],
    ) -> TokenClassifierOutput:
        """Logits [B, T, C] in fp32; with `labels` [B, T] the mean cross-entropy of those that are not
        -100."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids)
        x_BTD, _, states = self.bert(*batch, **asked)
        logits_BTC = self.classifier(self.dropout(x_BTD)).float()
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits_BTC.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return TokenClassifierOutput(loss=loss, logits=logits_BTC, hidden_states=states)


class EarlyBertForQuestionAnswering(EarlyBertPreTrainedModel):
    """Where an answer begins and ends; the first token, [CLS], stands for none."""

    ignores_padding = False
    """Give padding the lowest logits there are, so that the loss is over real tokens; stock BERT's is over
    all of them."""
    _keys_to_ignore_on_load_unexpected = [r"^cls\.", r"^classifier\.", r"pooler"]  # noqa: RUF012

    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__(config)
        self.bert = Body(config, pooled=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **asked: Unpack[Asked],
    ) -> QuestionAnsweringModelOutput:
        """Logits [B, T] in fp32 of beginning and end; with both positions [B] the mean of their
        cross-entropies."""
        batch = (input_ids, attention_mask, token_type_ids, position_ids)
        x_BTD, _, states = self.bert(*batch, **asked)
        logits_BT2 = self.qa_outputs(x_BTD).float()
        if self.ignores_padding and attention_mask is not None:
            lowest = torch.finfo(logits_BT2.dtype).min
            logits_BT2 = logits_BT2.masked_fill(~attention_mask.bool()[..., None], lowest)
        start_BT, end_BT = logits_BT2.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = functional.cross_entropy(start_BT, start_positions)
            loss = (loss + functional.cross_entropy(end_BT, end_positions)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_BT, end_logits=end_BT, hidden_states=states
        )


if not __name__.startswith("transformers_modules."):  # an export's copy must not take the package's place
    AutoModel.register(EarlyBertConfig, EarlyBertModel, exist_ok=True)
    AutoModelForSequenceClassification.register(
        EarlyBertConfig, EarlyBertForSequenceClassification, exist_ok=True
    )
    AutoModelForTokenClassification.register(EarlyBertConfig, EarlyBertForTokenClassification, exist_ok=True)
    AutoModelForQuestionAnswering.register(EarlyBertConfig, EarlyBertForQuestionAnswering, exist_ok=True)
