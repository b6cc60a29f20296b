"""The encoder: embeddings, layers that may differ in heads and neurons, a pooler.

Parameters are named as in stock BERT's `bert`. The surprise: coefficients scale the columns of the matrix
that reads what they belong to, which has fewer numbers than a batch. Exports carry a copy.

B sequences, T tokens, D hidden, N heads, H head size, I heads side by side, F neurons.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .arithmetic import ACTIVATIONS, Dropout, Unpadded, Visible, attend, unpadded, visible
from .configuration import EarlyBertConfig


class Body(nn.Module):
    """Embeddings, encoder and, where `pooled`, the pooler: stock BERT's `bert`."""

    skips_padding = False
    """Compute what belongs to a token for real tokens and few others: hidden states where `mask_BT` is 0 mean
    nothing. Not in effect for segments, nor where hidden states of all layers are asked for."""

    def __init__(self, config: EarlyBertConfig, *, pooled: bool) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.pooler = _Pooler(config) if pooled else None
        self.config = config

    def forward(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None,
        types_BT: torch.Tensor | None,
        positions_BT: torch.Tensor | None,
        segments_BT: torch.Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...] | None]:
        """(last hidden states, pooled, all hidden states). Raises ValueError where attention weights are
        asked for, and for a mask of another shape than [B, T]."""
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions is set: attention weights are not kept here; load the dense export with "
                'attn_implementation="eager", which has them'
            )
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if self.skips_padding and mask_BT is not None and segments_BT is None and not keep:
            x_BTD, states = self._real_tokens(unpadded(mask_BT), ids_BT, types_BT, positions_BT), None
        else:
            x_BTD = self.embeddings(ids_BT, types_BT, positions_BT)
            dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
            mask = visible(mask_BT, segments_BT, x_BTD=x_BTD, dropout=dropout)
            x_BTD, states = self.encoder(x_BTD, mask, keep=bool(keep))
        return x_BTD, None if self.pooler is None else self.pooler(x_BTD), states

    def _real_tokens(
        self,
        real: Unpadded,
        ids_BT: torch.Tensor,
        types_BT: torch.Tensor | None,
        positions_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        """The last hidden states [B, T, D]."""
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        types_K = None if types_BT is None else real.gather(types_BT)
        positions_K = real.gather(positions_BT.expand_as(ids_BT))
        x_KD, _ = self.encoder(self.embeddings(real.gather(ids_BT), types_K, positions_K), real, keep=False)
        return real.spread(x_KD)


class _Embeddings(nn.Module):
    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, ids_BT: torch.Tensor, types_BT: torch.Tensor | None, positions_BT: torch.Tensor | None
    ) -> torch.Tensor:
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        if types_BT is None:
            types_BT = torch.zeros_like(positions_BT)
        x_BTD = self.word_embeddings(ids_BT) + self.token_type_embeddings(types_BT)
        return self.dropout(self.LayerNorm(x_BTD + self.position_embeddings(positions_BT)))


class _SelfAttention(nn.Module):
    def __init__(self, config: EarlyBertConfig, heads: int) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.attention_dropout = config.attention_probs_dropout_prob
        inner = heads * config.head_size
        self.query = nn.Linear(config.hidden_size, inner)
        self.key = nn.Linear(config.hidden_size, inner)
        self.value = nn.Linear(config.hidden_size, inner)
        self.coefficients = _coefficients(config, heads)

    def forward(self, x_BTD: torch.Tensor, mask: Visible) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(contexts of the heads side by side, a factor for each of their columns)."""
        real = mask if isinstance(mask, Unpadded) else None
        projected = (layer(x_BTD) for layer in (self.query, self.key, self.value))
        rows = projected if real is None else map(real.spread, projected)
        q, k, v = (x.unflatten(2, (-1, self.head_size)).transpose(1, 2) for x in rows)
        dropout = self.attention_dropout if self.training else 0.0
        inner_BTI = attend(q, k, v, mask=mask, dropout=dropout).transpose(1, 2).flatten(2)
        if real is not None:
            inner_BTI = real.gather(inner_BTI)
        if self.coefficients is None:
            return inner_BTI, None
        return inner_BTI, self.coefficients[:, None].expand(-1, self.head_size).reshape(-1)


class _Scaled(nn.Linear):
    """A matrix whose inputs are scaled by coefficients, in its columns: it has fewer numbers than a batch."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        weight = self.weight if scale is None else self.weight * scale
        return functional.linear(x, weight, self.bias)


class _Residual(nn.Module):
    """Matrix, dropout, residual, LayerNorm: the end of both halves of a layer.

    With `pre_norm` the LayerNorm is that of the half's beginning, and `begin` applies it.
    """

    def __init__(self, config: EarlyBertConfig, width: int) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.dense = _Scaled(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, inner: torch.Tensor, x_BTD: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        x_BTD = self.dropout(self.dense(inner, scale)) + x_BTD
        return x_BTD if self.pre_norm else self.LayerNorm(x_BTD)

    def begin(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """What the half's first matrices see of its input."""
        return self.LayerNorm(x_BTD) if self.pre_norm else x_BTD


class _Attention(nn.Module):
    def __init__(self, config: EarlyBertConfig, heads: int) -> None:
        super().__init__()
        self.self = _SelfAttention(config, heads)
        self.output = _Residual(config, heads * config.head_size)

    def forward(self, x_BTD: torch.Tensor, mask: Visible) -> torch.Tensor:
        inner_BTI, scale = self.self(self.output.begin(x_BTD), mask)
        return self.output(inner_BTI, x_BTD, scale)


class _Intermediate(nn.Module):
    def __init__(self, config: EarlyBertConfig, neurons: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, neurons)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.coefficients = _coefficients(config, neurons)

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(neurons, a factor for each)."""
        inner_BTF = self.activation(self.dense(x_BTD))
        # A copy: ZeRO-3 holds the parameter itself only while this module runs, forward and backward.
        return inner_BTF, None if self.coefficients is None else self.coefficients.clone()


class _Layer(nn.Module):
    def __init__(self, config: EarlyBertConfig, heads: int, neurons: int) -> None:
        super().__init__()
        self.attention = _Attention(config, heads)
        self.intermediate = _Intermediate(config, neurons)
        self.output = _Residual(config, neurons)

    def forward(self, x_BTD: torch.Tensor, mask: Visible) -> torch.Tensor:
        x_BTD = self.attention(x_BTD, mask)
        inner_BTF, scale = self.intermediate(self.output.begin(x_BTD))
        return self.output(inner_BTF, x_BTD, scale)


class _Encoder(nn.Module):
    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__()
        shapes = zip(config.heads_per_layer, config.neurons_per_layer, strict=True)
        self.layer = nn.ModuleList(_Layer(config, heads, neurons) for heads, neurons in shapes)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_norm else None
        self.LayerNorm = norm
        self.gradient_checkpointing = False

    def forward(
        self, x_BTD: torch.Tensor, mask: Visible, *, keep: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """(hidden states, with `keep` those of the embeddings and of each layer, the former among them)."""
        kept = [x_BTD]
        for layer in self.layer:
            if self.gradient_checkpointing and self.training:
                x_BTD = checkpoint(layer, x_BTD, mask, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, mask)
            if keep:
                kept.append(x_BTD)
        x_BTD = x_BTD if self.LayerNorm is None else self.LayerNorm(x_BTD)
        return x_BTD, (*kept[:-1], x_BTD) if keep else None


class _Pooler(nn.Module):
    def __init__(self, config: EarlyBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(x_BTD[:, 0]))


def _coefficients(config: EarlyBertConfig, count: int) -> nn.Parameter | None:
    if config.coefficients == "none":
        return None
    return nn.Parameter(torch.ones(count), requires_grad=config.coefficients == "train")
