"""A model that looks trained, cut unevenly, with a tokenizer of a few words: what the tests export."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertTokenizer

from earlybert.adapters import bert_layers
from earlybert.export import Source
from earlybert.initial import seeded_model
from earlybert.model import EarlyBertConfig
from earlybert.shrink import cut, index_map

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [*SPECIAL, "the", "cat", "sat", "on", "a", "mat", "and", "so", "did", "my", "dog", "or", "his"]
HEADS = ((0, 2, 3), (1,))
NEURONS = (tuple(range(1, 40, 3)), (0, 39))


def environment(folder):
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}


def write_tokenizer(folder: Path) -> Path:
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def trained(tokenizer, *, next_sentence=True, coefficients="train", shrunken=True, pre_norm=False):
    """A model that looks trained: no weight at its initial value, coefficients far from 1, perhaps cut."""
    config = EarlyBertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=32,
        coefficients=coefficients,
        next_sentence=next_sentence,
        pre_norm=pre_norm,
    )
    torch.manual_seed(2)
    model = seeded_model(config, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = (
                torch.rand_like(parameter) if name.endswith(".coefficients") else torch.randn_like(parameter)
            )
            parameter += 0.2 * noise if parameter.ndim > 1 else 0.7 * noise
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if not shrunken:
        return Source(weights=weights, config=config, tokenizer=tokenizer)
    widths = {"head_widths": [4] * 2, "neuron_widths": [40] * 2}
    cuts = index_map(bert_layers(2), HEADS, NEURONS, head_size=8, **widths)
    weights = {name: cut(value, cuts.get(name)) for name, value in weights.items()}
    values = config.to_dict()
    values.update(heads_per_layer=[len(h) for h in HEADS], neurons_per_layer=[len(n) for n in NEURONS])
    small = EarlyBertConfig.from_dict(values)
    return Source(weights=weights, config=small, tokenizer=tokenizer, heads=HEADS, neurons=NEURONS)
