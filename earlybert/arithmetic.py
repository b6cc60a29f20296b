"""The parts of a step that are computed otherwise on a CPU than on a GPU: loss, dropout, attention.

Each gives torch's values (dropout: its distribution) in less time or memory; LOG.md has the figures. Exports
carry a copy, so this file imports nothing of its package.

B sequences, T tokens, N heads, H head size, R rows of logits (lower case: the few at hand), V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

varlen_attn: Any = None
with contextlib.suppress(ImportError):  # an export may meet an older torch: a mask does it
    from torch.nn.attention.varlen import varlen_attn

IGNORED = -100
"""A label that is not counted."""
_CACHED, _LARGEST = 2**18, 2**28
"""Logits taken at a time in fp32: as many as a core's cache holds, and as many as a GPU's memory spares."""
_GRAIN = 64
"""Tokens without padding come in multiples of it: for each new number of rows oneDNN writes its code anew."""
ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


class CrossEntropy(torch.autograd.Function):
    """(sum of the losses, right guesses) of logits [R, V] in any precision and labels [R], computed in fp32.

    A few rows at a time, so that what lies in between stays in a CPU's cache: the whole softmax in fp32 is
    the largest tensor of a step, and on a CPU reading and writing it took a third of the time (LOG.md).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits_RV: torch.Tensor, labels_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.rows = max(1, (_CACHED if logits_RV.device.type == "cpu" else _LARGEST) // logits_RV.shape[1])
        told_R, own_R1 = labels_R != IGNORED, labels_R.clamp(min=0)[:, None]
        logs, chosen, right = [], [], told_R.new_zeros((), dtype=torch.long)
        for scores_rV, own_r1, labels_r in zip(
            logits_RV.split(ctx.rows), own_R1.split(ctx.rows), labels_R.split(ctx.rows), strict=True
        ):
            scores_rV = scores_rV.to(torch.float32, copy=True)
            chosen.append(scores_rV.gather(1, own_r1))
            best_r1, place_r1 = scores_rV.max(1, keepdim=True)  # in a seventh of argmax's time on a CPU
            right += (place_r1.squeeze(1) == labels_r).sum()
            logs.append(scores_rV.sub_(best_r1).exp_().sum(1, keepdim=True).log_().add_(best_r1))
        log_R1 = torch.cat(logs) if logs else logits_RV.new_zeros((0, 1), dtype=torch.float32)
        ctx.save_for_backward(logits_RV, told_R, own_R1, log_R1)
        ctx.mark_non_differentiable(right)
        lost_R1 = log_R1 - torch.cat(chosen) if chosen else log_R1
        return lost_R1.squeeze(1).masked_fill(~told_R, 0).sum(), right

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        logits_RV, told_R, own_R1, log_R1 = ctx.saved_tensors
        result_RV = torch.empty_like(logits_RV)
        weight_R1 = (gradient * told_R)[:, None]
        words_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
        minus_R1 = torch.full_like(log_R1, -1)
        for first in range(0, len(logits_RV), ctx.rows):
            rows = slice(first, first + ctx.rows)
            scores_rV = logits_RV[rows].to(torch.float32, copy=True).sub_(log_R1[rows]).exp_()
            if scores_rV.is_cuda:  # compiled: one pass from logits to gradient; a scatter would break it up
                scores_rV = torch.where(words_V == own_R1[rows], scores_rV - 1, scores_rV)
            else:
                scores_rV.scatter_add_(1, own_R1[rows], minus_R1[rows])
            result_RV[rows] = scores_rV.mul_(weight_R1[rows])
        return result_RV, None


class MaskedLoss(nn.Module):
    """`CrossEntropy` as a module, so that it can be compiled by itself."""

    def forward(self, logits_RV: torch.Tensor, labels_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return CrossEntropy.apply(logits_RV, labels_R)


def dropped(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Dropout in training. On a CPU from 16 random bits an element, which takes a quarter of the time of
    torch's: `probability` is rounded to a multiple of 2**-16."""
    if not probability or x.device.type != "cpu":
        return functional.dropout(x, probability)
    with torch.no_grad():
        gone = round(probability * 2**16)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
        factors = torch.empty(x.shape, dtype=x.dtype)
        torch.ge(lanes, gone - 2**15, out=factors).mul_(2**16 / (2**16 - gone))
    return x * factors


class Dropout(nn.Dropout):
    """`dropped` as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropped(x, self.p) if self.training else x


class Documents(NamedTuple):
    """Where the documents that share rows begin: attention runs over each alone, without a mask."""

    bounds: torch.Tensor
    """int32, a number more than there are documents: the beginning of each in the flattened rows, and the
    end."""
    longest: int
    """Tokens that no document exceeds."""


class Unpadded(NamedTuple):
    """Real tokens and next to no others, so that hardly more than attention is computed for padding."""

    places: torch.Tensor
    """Where each of them stands in the flattened rows, the real ones first."""
    mask: torch.Tensor
    """bool [B, 1, 1, T]: true where a token is real."""

    def gather(self, x_BTx: torch.Tensor) -> torch.Tensor:
        """The tokens of `places`, from rows."""
        return x_BTx.flatten(0, 1).index_select(0, self.places)

    def spread(self, x_Kx: torch.Tensor) -> torch.Tensor:
        """Rows again, with zeros in all other places."""
        rows, tokens = self.mask.shape[0], self.mask.shape[-1]
        zeros = x_Kx.new_zeros((rows * tokens, *x_Kx.shape[1:]))
        return zeros.index_copy(0, self.places, x_Kx).unflatten(0, (rows, tokens))


Visible = torch.Tensor | Documents | Unpadded | None
"""What a token attends to: where bool [B, 1, 1 or T, T] is true, its own document, its own row's real tokens
(where there are no others), or the whole row."""


def unpadded(mask_BT: torch.Tensor) -> Unpadded:
    """The real tokens of `mask_BT`, of which each row has one at least, and padding up to a multiple of
    `_GRAIN` where there is so much. Raises ValueError as `visible` does."""
    _check_mask(mask_BT)
    real_BT = mask_BT.bool()
    count = -(-int(real_BT.sum()) // _GRAIN) * _GRAIN
    places = (~real_BT).flatten().to(torch.uint8).argsort(stable=True)[:count]
    return Unpadded(places, real_BT[:, None, None, :])


def visible(
    mask_BT: torch.Tensor | None, segments_BT: torch.Tensor | None, *, x_BTD: torch.Tensor, dropout: float
) -> Visible:
    """What each token of `x_BTD` attends to, in the form that `attend` is fastest with.

    Documents on a GPU in 16 bits, where a mask would keep PyTorch from its flash kernels (which know no
    dropout for them); else a mask. Raises ValueError for a `mask_BT` that has not two dimensions.
    """
    if mask_BT is not None:
        _check_mask(mask_BT)
    if segments_BT is None:
        return None if mask_BT is None else mask_BT[:, None, None, :].bool()
    fused = varlen_attn is not None and x_BTD.device.type == "cuda" and x_BTD.dtype != torch.float32
    if fused and mask_BT is None and not dropout:
        return documents_of(segments_BT)
    same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return same if mask_BT is None else mask_BT[:, None, None, :].bool() & same


def _check_mask(mask_BT: torch.Tensor) -> None:
    if mask_BT.ndim != 2:
        raise ValueError(
            f"attention_mask has the shape {list(mask_BT.shape)}; give [sequences, tokens], 1 where a token "
            "is real, 0 where it is padding"
        )


def documents_of(segments_BT: torch.Tensor) -> Documents:
    """The runs of equal numbers within each row of `segments_BT`."""
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = begins_BT.flatten().nonzero().squeeze(1)
    bounds = functional.pad(starts, (0, 1), value=segments_BT.numel()).to(torch.int32)
    return Documents(bounds, segments_BT.shape[1])


def attend(
    q_BNTH: torch.Tensor,
    k_BNTH: torch.Tensor,
    v_BNTH: torch.Tensor,
    *,
    mask: Visible,
    dropout: float,
) -> torch.Tensor:
    """Scaled dot-product attention, here and nowhere else. `mask`: what `visible` says.

    PyTorch's own, but for training in 16 bits on a CPU: its backward pass there takes 2 to 6 times as long as
    the plain products (torch 2.13; LOG.md has the figures, tests/test_model.py compares the values).
    """
    if isinstance(mask, Documents):
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNTH, k_BNTH, v_BNTH))
        bounds, longest = mask
        out = varlen_attn(*rows, bounds, bounds, longest, longest)
        return out.unflatten(0, (q_BNTH.shape[0], q_BNTH.shape[2])).transpose(1, 2)
    if isinstance(mask, Unpadded):
        mask = mask.mask
    if q_BNTH.device.type != "cpu" or q_BNTH.dtype == torch.float32 or not q_BNTH.requires_grad:
        return functional.scaled_dot_product_attention(
            q_BNTH, k_BNTH, v_BNTH, attn_mask=mask, dropout_p=dropout
        )
    scores_BNTT = (q_BNTH * q_BNTH.shape[-1] ** -0.5) @ k_BNTH.transpose(-1, -2)
    if mask is not None:
        # Not -inf: a row of nothing but padding must stay finite, whatever is added. A sum, since a CPU fills
        # by masks one number at a time, and a sum's backward pass is none.
        bias = torch.zeros(mask.shape, dtype=scores_BNTT.dtype)
        scores_BNTT += bias.masked_fill_(~mask, torch.finfo(bias.dtype).min / 2)
    return dropped(scores_BNTT.softmax(-1), dropout) @ v_BNTH
