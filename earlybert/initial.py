"""A model's initial weights as pure functions of their names, and the work that its shape asks for."""

from __future__ import annotations

import hashlib

import torch

from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining


def seeded_model(config: EarlyBertConfig, *, seed: int) -> EarlyBertForPreTraining:
    """A model whose initial weights are a pure function of (seed, parameter name, shape); fp32 on CPU."""
    with torch.random.fork_rng(devices=[]):
        model = EarlyBertForPreTraining(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, config, seed=seed))
    return model


def initial_value(name: str, config: EarlyBertConfig, *, seed: int) -> torch.Tensor:
    """The initial value of one parameter of `seeded_model(config, seed=seed)`, without building the model.

    So a ticket that rewinds regenerates the dense weights one parameter at a time. Raises KeyError for
    an unknown name.
    """
    shape = _shape(name, config)
    if name.endswith(("LayerNorm.weight", ".coefficients")):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)
    if name.endswith("word_embeddings.weight") and config.pad_token_id is not None:
        value[config.pad_token_id] = 0
    return value


def encoder_flops_per_token(config: EarlyBertConfig, *, sequence_length: int) -> float:
    """Matrix work of one token's forward pass through the encoder, a multiply-add counted as 2."""
    total = 0
    for heads, neurons in zip(config.heads_per_layer, config.neurons_per_layer, strict=True):
        inner = heads * config.head_size
        total += 2 * 4 * config.hidden_size * inner  # query, key, value, output projection
        total += 2 * 2 * sequence_length * inner  # scores and their product with the values
        total += 2 * 2 * config.hidden_size * neurons
    return float(total)


def _shape(name: str, config: EarlyBertConfig) -> tuple[int, ...]:
    """Shape of a parameter by its name; KeyError for a name that the model does not have."""
    width, vocabulary = config.hidden_size, config.vocab_size
    rest = name.partition("bert.encoder.layer.")[2]
    if not rest:
        matrices = {
            "bert.embeddings.word_embeddings": (vocabulary, width),
            "bert.embeddings.position_embeddings": (config.max_position_embeddings, width),
            "bert.embeddings.token_type_embeddings": (config.type_vocab_size, width),
            "bert.embeddings.LayerNorm": (width,),
            "bert.encoder.LayerNorm": (width,),
            "bert.pooler.dense": (width, width),
            "cls.predictions": (vocabulary,),
            "cls.predictions.decoder": (vocabulary, width),
            "cls.predictions.transform.dense": (width, width),
            "cls.predictions.transform.LayerNorm": (width,),
            "cls.seq_relationship": (2, width),
        }
        module, kind = name.rsplit(".", 1)
    else:
        index, _, tail = rest.partition(".")
        widths = zip(config.heads_per_layer, config.neurons_per_layer, strict=True)
        heads, neurons = {str(i): pair for i, pair in enumerate(widths)}[index]
        inner = heads * config.head_size
        matrices = {
            **{f"attention.self.{which}": (inner, width) for which in ("query", "key", "value")},
            "attention.output.dense": (width, inner),
            "attention.output.LayerNorm": (width,),
            "intermediate.dense": (neurons, width),
            "output.dense": (width, neurons),
            "output.LayerNorm": (width,),
        }
        module, kind = tail.rsplit(".", 1)
        if kind == "coefficients":
            return {"attention.self": (heads,), "intermediate": (neurons,)}[module]
    return {"weight": matrices[module], "bias": matrices[module][:1]}[kind]
