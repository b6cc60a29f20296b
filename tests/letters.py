"""A tokenizer whose pieces are single letters, and a small stock BERT that reads them."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

SIGNS = string.ascii_lowercase + string.digits
PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *string.punctuation,
    *SIGNS,
    *(f"##{c}" for c in SIGNS),
]
SHAPE = {
    "vocab_size": len(PIECES), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 96, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = {
        "unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


def stock_bert(folder: Path, *, seed: int = 0, **changes: float) -> BertForMaskedLM:
    """A stock BERT with random weights in a folder, with its tokenizer."""
    torch.manual_seed(seed)
    model = BertForMaskedLM(BertConfig(**{**SHAPE, **changes}))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model
