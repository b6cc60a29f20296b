"""Where heads and neurons live in an architecture, and how its smaller model is built.

The engine knows no model: it asks an `Adapter` for the layers' parameter names, the shape, a module of
another shape. EarlyBERT has one of its own; stock Hugging Face encoders need a table of names only (`Names`),
because their forward passes read the widths from the weights. Coefficients come into those from outside: a
parameter on the matrix that reads the heads (or neurons) and a hook that scales that matrix' input.

`register` adds an architecture; ADDING says how, and is what an unknown model is refused with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from earlybert.config import SettingsError
from earlybert.model import EarlyBertPreTrainedModel
from earlybert.targets import Work

ADDING = """\
write where its layers keep heads and neurons and register it:
    from earlybert.adapters import Names, register
    register("MODEL_TYPE", Names(
        layer="encoder.layer.{i}",               # a layer's module, counted from the backbone
        head_rows=("attention.query", "attention.key", "attention.value"),   # Linears whose outputs are heads
        head_columns="attention.output",         # the Linear that reads the heads
        neuron_rows=("intermediate",),           # Linears whose outputs are neurons
        neuron_columns="output"))                # the Linear that reads the neurons
A fused query-key-value matrix has head_sections=3, a fused gated FFN neuron_sections=2."""


@dataclass(frozen=True)
class Rows:
    """A parameter whose rows (dimension 0) belong to units, once in each of its `sections`."""

    name: str
    sections: int = 1


@dataclass(frozen=True)
class Layer:
    """Names of one layer's module and of its parameters that belong to heads and to neurons."""

    module: str
    head_rows: tuple[Rows, ...]
    """Query, key and value, weights and biases: blocks of the head size."""
    head_columns: str
    """The output projection's weight, whose columns (dimension 1) read the heads."""
    head_coefficients: str
    neuron_rows: tuple[Rows, ...]
    neuron_columns: str
    neuron_coefficients: str


@dataclass(frozen=True)
class Shape:
    """A model's true widths."""

    heads: tuple[int, ...]
    """Heads of each layer."""
    neurons: tuple[int, ...]
    head_size: int
    coefficients: str
    """ "none", "train" or "freeze"."""


@dataclass(frozen=True)
class Names:
    """Where one layer of an architecture keeps heads and neurons: dotted names of Linear modules."""

    layer: str
    """The layer's module from the backbone on, with {i} for its index; the others count from the layer on."""
    head_rows: tuple[str, ...]
    head_columns: str
    neuron_rows: tuple[str, ...]
    neuron_columns: str
    head_sections: int = 1
    """3 where query, key and value are one matrix."""
    neuron_sections: int = 1
    """2 where a gated FFN's two halves are one matrix."""


_BERT = Names(
    layer="encoder.layer.{i}",
    head_rows=("attention.self.query", "attention.self.key", "attention.self.value"),
    head_columns="attention.output.dense",
    neuron_rows=("intermediate.dense",),
    neuron_columns="output.dense",
)
_TABLE: dict[str, Names] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "distilbert": Names(
        layer="transformer.layer.{i}",
        head_rows=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        head_columns="attention.out_lin",
        neuron_rows=("ffn.lin1",),
        neuron_columns="ffn.lin2",
    ),
    "modernbert": Names(
        layer="layers.{i}",
        head_rows=("attn.Wqkv",),
        head_columns="attn.Wo",
        neuron_rows=("mlp.Wi",),
        neuron_columns="mlp.Wo",
        head_sections=3,
        neuron_sections=2,
    ),
}


def register(model_type: str, names: Names) -> None:
    """Make an architecture known by its config's `model_type`; its forward pass must read widths from its
    weights."""
    _TABLE[model_type] = names


def adapter_of(model: nn.Module, *, searched: bool = True) -> Adapter:
    """The adapter of a model; raises SettingsError for an architecture that is not known, saying how to add
    it, unless no ticket is to be searched in it."""
    if isinstance(model, EarlyBertPreTrainedModel):
        return EarlyBertAdapter(type(model))
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _TABLE:
        if not searched:
            return PlainAdapter(type(model))
        raise SettingsError(
            f"{type(model).__name__} (model_type {model_type!r}) is not an architecture that is known "
            f"({', '.join(sorted(_TABLE))}, earlybert); {ADDING}"
        )
    return StockAdapter(model, _TABLE[model_type])


def enable_checkpointing(module: Any) -> None:
    """Compute activations again in the backward pass, layer by layer, instead of keeping them."""
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def bert_layers(count: int) -> tuple[Layer, ...]:
    """The layers of an EarlyBERT: Hugging Face BERT's names, coefficients in modules of their own."""
    layers = _layers(_BERT, "bert.", count, biases=lambda _: True)
    return tuple(
        replace(
            layer,
            head_coefficients=f"{layer.module}.attention.self.coefficients",
            neuron_coefficients=f"{layer.module}.intermediate.coefficients",
        )
        for layer in layers
    )


class Adapter:
    """What the engine asks of an architecture."""

    def layers(self, config: Any) -> tuple[Layer, ...]:
        raise NotImplementedError

    def shape(self, module: nn.Module) -> Shape:
        raise NotImplementedError

    def searchable(self, model: nn.Module) -> nn.Module:
        """The model with coefficients to train; raises SettingsError where it cannot have them."""
        raise NotImplementedError

    def work(self, module: nn.Module) -> Work:
        """FLOPs of a head's and a neuron's matrices for one token."""
        raise NotImplementedError

    def reshaped(
        self,
        config: Any,
        *,
        heads: Sequence[int],
        neurons: Sequence[int],
        coefficients: str,
        layers: Sequence[int] | None = None,
    ) -> Any:
        """A copy of the config for a model of these widths a layer; `layers`: which of the layers they
        are."""
        raise NotImplementedError

    def dense(self, config: Any) -> Any:
        """The config before any draw, without coefficients."""
        raise NotImplementedError

    def build(self, config: Any) -> nn.Module:
        """A fresh module of the config's shape; the values do not matter."""
        raise NotImplementedError

    def attach(self, module: nn.Module) -> None:
        """Set the hooks that apply coefficients; after `deepspeed.initialize`, whose own must run before."""


class PlainAdapter(Adapter):
    """Any model, trained as it is."""

    def __init__(self, model_class: type[nn.Module]) -> None:
        self._class = model_class

    def shape(self, module: nn.Module) -> Shape:
        return Shape((), (), 1, "none")

    def build(self, config: Any) -> nn.Module:
        return self._class(config)


class EarlyBertAdapter(Adapter):
    """EarlyBERT: the shape is in the config, coefficients in the modules."""

    def __init__(self, model_class: type[EarlyBertPreTrainedModel]) -> None:
        self._class = model_class

    def layers(self, config: Any) -> tuple[Layer, ...]:
        return bert_layers(len(config.heads_per_layer))

    def shape(self, module: nn.Module) -> Shape:
        config: Any = module.config
        return Shape(
            tuple(config.heads_per_layer),
            tuple(config.neurons_per_layer),
            config.head_size,
            config.coefficients,
        )

    def searchable(self, model: nn.Module) -> nn.Module:
        if self.shape(model).coefficients == "none":
            raise SettingsError(
                'the ticket is to be searched, but the model\'s config has coefficients = "none"; use "train"'
            )
        return model

    def work(self, module: nn.Module) -> Work:
        config: Any = module.config
        return Work(head=8.0 * config.hidden_size * config.head_size, neuron=4.0 * config.hidden_size)

    def reshaped(
        self,
        config: Any,
        *,
        heads: Sequence[int],
        neurons: Sequence[int],
        coefficients: str,
        layers: Sequence[int] | None = None,
    ) -> Any:
        values = config.to_dict()
        values.update(
            num_hidden_layers=len(heads),
            heads_per_layer=list(heads),
            neurons_per_layer=list(neurons),
            coefficients=coefficients,
        )
        return type(config).from_dict(values)

    def dense(self, config: Any) -> Any:
        values = {**config.dense().to_dict(), "coefficients": "none"}
        return type(config).from_dict(values)

    def build(self, config: Any) -> nn.Module:
        return self._class(config)


class StockAdapter(Adapter):
    """A stock Hugging Face encoder under any head; `config.early_bird` holds the shape once it has one."""

    def __init__(self, model: Any, names: Names) -> None:
        prefix = getattr(model, "base_model_prefix", "")
        self._class = type(model)
        self._prefix = f"{prefix}." if prefix and hasattr(model, prefix) else ""
        self._names = names
        first = self._linear(model, 0, names.head_columns)  # fails here where the table does not fit
        biased = {
            rows: self._linear(model, 0, rows).bias is not None
            for rows in (*names.head_rows, *names.neuron_rows)
        }
        self._biased = biased
        size = getattr(model.config, "head_dim", None)
        self._head_size = size or model.config.hidden_size // model.config.num_attention_heads
        assert first.in_features % self._head_size == 0

    def layers(self, config: Any) -> tuple[Layer, ...]:
        return _layers(self._names, self._prefix, config.num_hidden_layers, biases=self._biased.__getitem__)

    def shape(self, module: nn.Module) -> Shape:
        config: Any = module.config
        every = range(config.num_hidden_layers)
        heads = (self._linear(module, i, self._names.head_columns).in_features for i in every)
        neurons = (self._linear(module, i, self._names.neuron_columns).in_features for i in every)
        told = getattr(config, "early_bird", None) or {}
        return Shape(
            tuple(width // self._head_size for width in heads),
            tuple(neurons),
            self._head_size,
            told.get("coefficients", "none"),
        )

    def searchable(self, model: nn.Module) -> nn.Module:
        shape = self.shape(model)
        if shape.coefficients == "none":
            model.config = self.reshaped(
                model.config, heads=shape.heads, neurons=shape.neurons, coefficients="train"
            )
            self._add_coefficients(model, requires_grad=True)
        return model

    def work(self, module: nn.Module) -> Work:
        width = cast(Any, module.config).hidden_size
        matrices = self._names.neuron_sections * len(self._names.neuron_rows) + 1
        return Work(head=8.0 * width * self._head_size, neuron=2.0 * matrices * width)

    def reshaped(
        self,
        config: Any,
        *,
        heads: Sequence[int],
        neurons: Sequence[int],
        coefficients: str,
        layers: Sequence[int] | None = None,
    ) -> Any:
        changed = type(config).from_dict(config.to_dict())
        changed._attn_implementation = config._attn_implementation  # to_dict leaves it out
        if len(heads) != config.num_hidden_layers:
            changed.num_hidden_layers = len(heads)
            if getattr(config, "layer_types", None) and layers is not None:
                changed.layer_types = [config.layer_types[layer] for layer in layers]
        changed.early_bird = {
            "heads_per_layer": list(heads),
            "neurons_per_layer": list(neurons),
            "coefficients": coefficients,
        }
        return changed

    def dense(self, config: Any) -> Any:
        values = config.to_dict()
        values.pop("early_bird", None)
        return type(config).from_dict(values)

    def build(self, config: Any) -> nn.Module:
        module = self._class(config)
        told = getattr(config, "early_bird", None)
        if not told:
            return module
        for index, (heads, neurons) in enumerate(
            zip(told["heads_per_layer"], told["neurons_per_layer"], strict=True)
        ):
            for width, sections, rows, columns in (
                (heads * self._head_size, self._names.head_sections, self._names.head_rows,
                 self._names.head_columns),
                (neurons, self._names.neuron_sections, self._names.neuron_rows, self._names.neuron_columns),
            ):  # fmt: skip
                for name in rows:
                    self._resize(module, index, name, rows=width * sections)
                self._resize(module, index, columns, columns=width)
        if told["coefficients"] != "none":
            self._add_coefficients(module, requires_grad=told["coefficients"] == "train")
        return module

    def attach(self, module: nn.Module) -> None:
        config: Any = module.config
        for index in range(config.num_hidden_layers):
            for name, size in ((self._names.head_columns, self._head_size), (self._names.neuron_columns, 1)):
                linear = self._linear(module, index, name)
                if "coefficients" in linear._parameters:
                    linear.register_forward_pre_hook(_scaling(size))

    def _add_coefficients(self, module: nn.Module, *, requires_grad: bool) -> None:
        shape = self.shape(module)
        for index, (heads, neurons) in enumerate(zip(shape.heads, shape.neurons, strict=True)):
            for name, width in ((self._names.head_columns, heads), (self._names.neuron_columns, neurons)):
                ones = nn.Parameter(torch.ones(width), requires_grad=requires_grad)
                self._linear(module, index, name).register_parameter("coefficients", ones)

    def _linear(self, module: nn.Module, index: int, name: str) -> nn.Linear:
        path = f"{self._prefix}{self._names.layer.format(i=index)}.{name}"
        try:
            found = module.get_submodule(path)
        except AttributeError:
            found = None
        if not isinstance(found, nn.Linear):
            raise SettingsError(
                f"{type(module).__name__} has no Linear {path!r}, which its adapter names; {ADDING}"
            )
        return found

    def _resize(
        self, module: nn.Module, index: int, name: str, *, rows: int | None = None, columns: int | None = None
    ) -> None:
        old = self._linear(module, index, name)
        new = nn.Linear(
            old.in_features if columns is None else columns,
            old.out_features if rows is None else rows,
            bias=old.bias is not None,
        )
        path = f"{self._prefix}{self._names.layer.format(i=index)}.{name}"
        parent, _, last = path.rpartition(".")
        setattr(module.get_submodule(parent), last, new)


def _scaling(size: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """A forward pre-hook that scales each unit's `size` columns of a Linear's input by its coefficient."""

    def scale(linear: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        coefficients: Any = linear.coefficients
        # A copy in any case: ZeRO-3 releases the parameter before the product's backward pass reads it.
        spread = coefficients.repeat_interleave(size) if size > 1 else coefficients.clone()
        return (inputs[0] * spread.to(inputs[0].dtype), *inputs[1:])

    return scale


def _layers(names: Names, prefix: str, count: int, *, biases: Callable[[str], bool]) -> tuple[Layer, ...]:
    def rows(at: str, modules: Sequence[str], sections: int) -> tuple[Rows, ...]:
        kinds = [(m, kind) for m in modules for kind in ("weight", "bias") if kind == "weight" or biases(m)]
        return tuple(Rows(f"{at}.{module}.{kind}", sections) for module, kind in kinds)

    layers = []
    for index in range(count):
        at = prefix + names.layer.format(i=index)
        layers.append(
            Layer(
                module=at,
                head_rows=rows(at, names.head_rows, names.head_sections),
                head_columns=f"{at}.{names.head_columns}.weight",
                head_coefficients=f"{at}.{names.head_columns}.coefficients",
                neuron_rows=rows(at, names.neuron_rows, names.neuron_sections),
                neuron_columns=f"{at}.{names.neuron_columns}.weight",
                neuron_coefficients=f"{at}.{names.neuron_columns}.coefficients",
            )
        )
    return tuple(layers)
