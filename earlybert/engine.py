"""`earlybert.initialize`: a DeepSpeed engine that searches for the early-bird ticket and shrinks to it.

Used like DeepSpeed's own: `loss = engine(**batch).loss; engine.backward(loss); engine.step()`. At an
optimizer-step boundary `step` looks at the coefficients' fp32 masters, decides, and on a draw replaces the
inner engine: read the state, cut it, tear the old engine down, build the small model, initialise a new
engine, seed it.

The surprise: `engine.module` is another object after a draw. DeepSpeed leaves marks on modules and
parameters, so none is ever used in two engines (docs/deepspeed.md: a shared parameter reads as zeros once the
old engine is collected).
"""

from __future__ import annotations

import gc
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import pydantic
import torch

from earlybert import dist, mechanics, state
from earlybert.adapters import adapter_of
from earlybert.config import SettingsError
from earlybert.lifecycle import check_config, empty_module, start_ranks, tear_down
from earlybert.model import initial_value
from earlybert.optim import Lamb
from earlybert.penalty import LossScale, penalise
from earlybert.search import Search
from earlybert.shrink import (
    Piece,
    compose,
    cut,
    cut_piece,
    cut_shape,
    fold_map,
    folded,
    index_map,
    spread,
)
from earlybert.ticket import Kept, Ticket, TicketSettings

log = logging.getLogger(__name__)

ParameterGroups = list[dict[str, Any]]
_HOOKS = "_backward_hook_managers"
_FOLD_POWER = {state.MASTER: 1, "exp_avg": -1, "exp_avg_sq": -2}


@dataclass
class EarlyBird:
    """What `initialize` needs to know of the search."""

    settings: TicketSettings = field(default_factory=TicketSettings)
    seed: int = 0
    """Seed of the initial weights (`seeded_model`), needed by `settings.start = "rewind"`."""
    on_draw: Callable[[Engine, Ticket], None] | None = None
    """Called on every rank right after a draw, with the new inner engine in place."""


@dataclass
class Progress:
    """What the engine has decided so far; goes into a checkpoint's manifest and comes back through
    `initialize`."""

    search: Search = field(default_factory=Search)
    tickets: tuple[Ticket, ...] = ()
    heads: Kept | None = None
    """Kept indices in terms of the dense model, all draws composed; None before the first draw."""
    neurons: Kept | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "search": self.search.to_json(),
            "tickets": [ticket.to_json() for ticket in self.tickets],
            "heads": self.heads,
            "neurons": self.neurons,
        }

    @staticmethod
    def from_json(values: Mapping[str, Any], *, where: str) -> Progress:
        def kept(value: Any) -> Kept | None:
            return None if value is None else tuple(tuple(layer) for layer in value)

        tickets = tuple(Ticket.from_json(ticket, where=where) for ticket in values["tickets"])
        search = Search.from_json(values["search"], where=where)
        return Progress(search, tickets, kept(values["heads"]), kept(values["neurons"]))


def initialize(
    *,
    model: torch.nn.Module,
    config: str | os.PathLike[str] | Mapping[str, Any],
    early_bird: EarlyBird | None = None,
    optimizer: Callable[[ParameterGroups], torch.optim.Optimizer] | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    weight_decay: float = 0.01,
    progress: Progress | None = None,
) -> Engine:
    """Return an `Engine` around `model`, in fp32 on the host. Collective.

    `model`: an `EarlyBert*` model or a stock Hugging Face encoder with its head (`adapters` lists them).
    `config`: a DeepSpeed JSON with its batch sizes (path or mapping). `optimizer`: a function from parameter
    groups to a torch optimizer, needed where the config has no "optimizer" section; `lr_scheduler`: one from
    the optimizer to a scheduler, unless the config has a "scheduler" section or the loop sets the rate.
    `weight_decay`: of matrices (biases, LayerNorm and coefficients have none). `progress`: of the checkpoint
    that will be loaded. Without `early_bird`, or with its `enabled` false, nothing is searched. Raises
    SettingsError for a config or a ticket setting that cannot work and for an unknown architecture.
    """
    values, where = mechanics.load(config)
    mechanics.check(values, where=where)
    if optimizer is None and "optimizer" not in values:
        raise SettingsError(f'{where}: no "optimizer" section and no optimizer= given; give one of them')
    if not {"train_batch_size", "train_micro_batch_size_per_gpu"} & values.keys():
        raise SettingsError(
            f"{where}: no batch size; add train_micro_batch_size_per_gpu and gradient_accumulation_steps (a "
            "mapping may be given instead of a path: {**json.load(open(path)), ...})"
        )
    if not dist.active():
        start_ranks()
    check_config(values, where=where)
    bird = early_bird if early_bird is not None and early_bird.settings.enabled else None
    return Engine(
        model,
        config=mechanics.close_traps(values),
        where=where,
        bird=bird,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        weight_decay=weight_decay,
        progress=progress or Progress(),
    )


def parameter_groups(module: torch.nn.Module, *, weight_decay: float) -> ParameterGroups:
    """Decayed matrices, undecayed vectors (biases, LayerNorm), undecayed coefficients; empty groups are left
    out."""
    groups: ParameterGroups = [
        {"name": "matrices", "params": [], "weight_decay": weight_decay, "trust_ratio": True},
        {"name": "vectors", "params": [], "weight_decay": 0.0, "trust_ratio": False},
        {"name": "coefficients", "params": [], "weight_decay": 0.0, "trust_ratio": False},
    ]
    for name, parameter in module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # sharded, it has none of its own
        which = 2 if name.endswith(".coefficients") else 0 if len(shape) > 1 else 1
        groups[which]["params"].append(parameter)
    return [group for group in groups if group["params"]]


class Engine:
    """A DeepSpeed engine whose model may shrink; attributes that are not its own are the inner engine's."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        config: dict[str, Any],
        where: str,
        bird: EarlyBird | None,
        optimizer: Callable[[ParameterGroups], torch.optim.Optimizer] | None,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        weight_decay: float,
        progress: Progress,
    ) -> None:
        self._config = config
        self._where = where
        self._bird = bird
        self._factory = optimizer
        self._scheduler = lr_scheduler
        self._weight_decay = weight_decay
        self.progress = progress
        self.draw_seconds: dict[str, float] = {}
        """Parts of the last draw's pause."""
        self.grad_norm: float | None = None
        """Global gradient norm of the last step, before clipping; None where DeepSpeed does not tell (ZeRO-0,
        fp32)."""
        self._loss_scale = LossScale()
        self._hooked: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self.adapter = adapter_of(model)
        if bird is not None and self.searching:
            model = self.adapter.searchable(model)
            if not self.progress.tickets:
                shape = self.adapter.shape(model)
                bird.settings.check_shape(shape.heads, shape.neurons)
        self._open(model, state.from_module(model))

    # --- DeepSpeed's interface ---

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        # DeepSpeed hangs a closure over the engine on the first output tensor: note it, `close` takes it off
        # again.
        for tensor in _tensors(output):
            if hasattr(tensor, _HOOKS):
                self._hooked[id(tensor)] = tensor
        return output

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not opened yet: do not recurse
            raise AttributeError(name)
        return getattr(self.inner, name)

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Run the backward pass; the L1 term's gradient joins in the coefficients, scaled like the loss."""
        if self.searching:
            loss.register_hook(self._loss_scale.record)
        return self.inner.backward(loss)

    def step(self) -> None:
        """Take the optimizer step at the accumulation boundary; look at the coefficients and draw where it is
        time.

        Collective. After a draw `module`, `optimizer` and their parameters are new objects.
        """
        boundary = self.inner.is_gradient_accumulation_boundary()
        self.inner.step()
        if boundary:
            norm = self.inner.get_global_grad_norm()
            self.grad_norm = None if norm is None else float(norm)
        if boundary and self.searching:
            self._look()

    # --- the search ---

    @property
    def searching(self) -> bool:
        """True until the last draw."""
        return self._bird is not None and len(self.progress.tickets) < self._bird.settings.draws

    @property
    def ticket(self) -> Ticket | None:
        """The newest ticket."""
        return self.progress.tickets[-1] if self.progress.tickets else None

    @property
    def learning_rate(self) -> float:
        return self.inner.optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in self.inner.optimizer.param_groups:
            group["lr"] = value

    def coefficients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """fp32 masters of the heads' and the neurons' coefficients, one 1-D tensor a layer. Collective."""
        layers = self.adapter.layers(self.module.config)
        heads, neurons = [x.head_coefficients for x in layers], [x.neuron_coefficients for x in layers]
        values = state.gather(self.inner, heads + neurons)
        return [values[name] for name in heads], [values[name] for name in neurons]

    def reopen(self, *, micro_batch: int, accumulation: int) -> None:
        """Go on with another micro-batch and accumulation: the same state in a fresh engine. Collective."""
        kept = state.read(self.inner)
        self._config["train_micro_batch_size_per_gpu"] = micro_batch
        self._config["gradient_accumulation_steps"] = accumulation
        self._config.pop("train_batch_size", None)
        config, rates = self.module.config, _Rates(self.inner)
        self.close()
        self._open(self._build(config), kept)
        rates.restore(self.inner)

    def close(self) -> None:
        """Tear the inner engine down so that nothing of it stays alive. Idempotent."""
        inner = self.__dict__.pop("inner", None)
        if inner is not None:
            for tensor in list(self._hooked.values()):
                tensor.__dict__.pop(_HOOKS, None)
            tear_down(inner)
            watched = {"engine": weakref.ref(inner), "module": weakref.ref(inner.module)}
            del inner
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            alive = [what for what, reference in watched.items() if reference() is not None]
            if alive:
                log.warning(
                    "the old %s is still referenced after its tear-down and keeps its memory; "
                    "drop outputs, losses and module references before the draw",
                    " and ".join(alive),
                )

    # --- inside ---

    def _look(self) -> None:
        assert self._bird is not None
        settings, step = self._bird.settings, self.inner.global_steps
        if not self.progress.search.due(step, settings=settings):
            return
        heads, neurons = self.coefficients()
        self.progress.search = self.progress.search.observe(step, heads, neurons, settings=settings)
        if self.progress.search.verdict is not None:
            self._draw(self.progress.search.ticket(settings=settings), heads, neurons)

    def _draw(self, ticket: Ticket, heads: list[torch.Tensor], neurons: list[torch.Tensor]) -> None:
        """Shrink to the ticket. Collective; nothing is cut before all ranks hold the same ticket."""
        assert self._bird is not None
        dist.agree(ticket.sha256, what="the ticket")
        settings, config = self._bird.settings, self.module.config
        last = len(self.progress.tickets) + 1 >= settings.draws
        clock = _Clock()
        kept, rates = self._cut_state(ticket, heads, neurons, last=last), _Rates(self.inner)
        clock.lap("read")
        self.close()
        clock.lap("tear_down")
        mode = "train" if not last else {"fold": "none"}.get(settings.coefficients, settings.coefficients)
        before = self.progress
        self.progress = Progress(
            search=Search(began=ticket.step),
            tickets=(*before.tickets, ticket),
            heads=ticket.heads if before.heads is None else compose(before.heads, ticket.heads),
            neurons=ticket.neurons if before.neurons is None else compose(before.neurons, ticket.neurons),
        )
        module = self._build(
            self.adapter.reshaped(
                config,
                heads=[len(kept_heads) for kept_heads in ticket.heads],
                neurons=[len(kept_neurons) for kept_neurons in ticket.neurons],
                coefficients=mode,
            )
        )
        clock.lap("build")
        if settings.start == "rewind":
            self._rewind(kept, module.config)
        self._open(module, kept)
        rates.restore(self.inner)
        clock.lap("initialize")
        self.draw_seconds = clock.laps
        if self._bird.on_draw is not None:
            self._bird.on_draw(self, ticket)

    def _cut_state(
        self, ticket: Ticket, heads: list[torch.Tensor], neurons: list[torch.Tensor], *, last: bool
    ) -> state.State:
        """Read the state, cut to the ticket, with folded coefficients and reset moments where the settings
        say so."""
        assert self._bird is not None
        settings, config = self._bird.settings, self.module.config
        layers = self.adapter.layers(config)
        names = [x.head_coefficients for x in layers] + [x.neuron_coefficients for x in layers]
        values = dict(zip(names, [*heads, *neurons], strict=True))
        cuts = index_map(
            layers,
            ticket.heads,
            ticket.neurons,
            head_size=self.adapter.shape(self.module).head_size,
            head_widths=ticket.head_widths,
            neuron_widths=ticket.neuron_widths,
        )
        fold = settings.coefficients == "fold"
        folds = fold_map(layers, values) if fold else {}

        def transform(name: str, key: str, shape: tuple[int, ...], piece: Piece) -> Piece:
            if name in folds and piece.values.numel():
                factor = spread(folds[name], shape, piece)
                piece = Piece(piece.start, folded(piece.values, factor, power=_FOLD_POWER[key]))
            elif fold and name in values:
                # Its value now stands in the weights: the next search starts from 1.
                piece = Piece(piece.start, torch.full_like(piece.values, 1.0 if key == state.MASTER else 0.0))
            return cut_piece(piece, shape, cuts.get(name))

        kept = state.read(self.inner, transform=transform)
        kept.shapes = {name: cut_shape(shape, cuts.get(name)) for name, shape in kept.shapes.items()}
        if settings.moments == "reset":
            kept.step = None
        if fold and last:
            for name in names:
                del kept.shapes[name], kept.pieces[name]
        return kept

    def _rewind(self, kept: state.State, config: Any) -> None:
        """Replace the masters by the dense model's initial values, cut to what stays."""
        assert (
            self._bird is not None and self.progress.heads is not None and self.progress.neurons is not None
        )
        first = self.progress.tickets[0]
        cuts = index_map(
            self.adapter.layers(config),
            self.progress.heads,
            self.progress.neurons,
            head_size=config.head_size,
            head_widths=first.head_widths,
            neuron_widths=first.neuron_widths,
        )
        dense = config.dense()
        for name, held in kept.pieces.items():
            whole = cut(initial_value(name, dense, seed=self._bird.seed), cuts.get(name)).float().view(-1)
            old = held[state.MASTER]
            new = whole[old.start : old.start + old.values.numel()].clone()
            held[state.MASTER] = Piece(old.start, new)

    def _build(self, config: Any) -> torch.nn.Module:
        """A fresh module of this shape; its values do not matter, the state comes from `seed`."""
        return empty_module(lambda: self.adapter.build(config), config=self._config)

    def _open(self, module: torch.nn.Module, start: state.State) -> None:
        """Initialise a DeepSpeed engine around `module` and seed it."""
        frozen = self.adapter.shape(module).coefficients == "freeze"
        if frozen:
            # In the optimizer with a zero gradient and no decay: so its fp32 master lives on and is cut like
            # the rest.
            for name, parameter in module.named_parameters():
                if name.endswith(".coefficients"):
                    parameter.requires_grad_(True)
        module.train()
        groups = parameter_groups(module, weight_decay=self._weight_decay)
        given = {"optimizer": self._factory, "lr_scheduler": self._scheduler}
        arguments = {name: value for name, value in given.items() if value is not None}
        try:
            inner, *_ = deepspeed.initialize(
                model=module, model_parameters=groups, config=mechanics.close_traps(self._config), **arguments
            )
        except (pydantic.ValidationError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
            raise SettingsError(f"{self._where}: DeepSpeed refuses it: {error}") from error
        self.inner = inner
        self.adapter.attach(module)
        for name, parameter in module.named_parameters():
            if name.endswith(".coefficients"):
                if frozen:
                    parameter.register_hook(torch.zeros_like)
                elif self.searching:
                    assert self._bird is not None
                    parameter.register_hook(
                        penalise(parameter, self._bird.settings.penalty, self._loss_scale)
                    )
        if isinstance(base := getattr(inner.optimizer, "optimizer", inner.optimizer), Lamb):
            base.attach(state.segments(inner))
        state.seed(inner, start)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


class _Rates:
    """Learning rates by group and the scheduler's position: what a fresh engine must not start anew."""

    def __init__(self, inner: Any) -> None:
        self._rates = {group["name"]: group["lr"] for group in inner.optimizer.param_groups}
        self._scheduler = None if inner.lr_scheduler is None else inner.lr_scheduler.state_dict()

    def restore(self, inner: Any) -> None:
        if self._scheduler is not None:
            inner.lr_scheduler.load_state_dict(self._scheduler)
        for group in inner.optimizer.param_groups:
            group["lr"] = self._rates[group["name"]]


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
