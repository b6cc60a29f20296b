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

import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import pydantic
import torch

from earlybert import baselines, cutting, dist, faults, guard, mechanics, ops, shortcuts, state, targets
from earlybert.adapters import adapter_of, enable_checkpointing
from earlybert.config import SettingsError
from earlybert.lifecycle import (
    Clock,
    OutputMarks,
    as_written,
    check_config,
    check_optimizer,
    compile_module,
    empty_module,
    start_ranks,
    tear_down,
    warn_of_survivors,
)
from earlybert.optim import Lamb, ParameterGroups, parameter_groups
from earlybert.penalty import LossScale, damp, penalise
from earlybert.progress import EarlyBird, Progress
from earlybert.rates import Rates, warm_up
from earlybert.targets import Widths
from earlybert.ticket import Ticket, TicketSettings

Restored = tuple[state.State, state.State | None]
"""A state, and the anchor to rewind to where a draw that rewinds is still to come."""


def initialize(
    *,
    model: torch.nn.Module,
    config: str | os.PathLike[str] | Mapping[str, Any],
    early_bird: EarlyBird | None = None,
    optimizer: Callable[[ParameterGroups], torch.optim.Optimizer] | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    weight_decay: float = 0.01,
    progress: Progress | None = None,
    restored: Restored | None = None,
) -> Engine:
    """Return an `Engine` around `model`, in fp32 on the host. Collective.

    `model`: an `EarlyBert*` model or a stock Hugging Face encoder with its head (`adapters` lists them).
    `config`: a DeepSpeed JSON with its batch sizes (path or mapping). `optimizer`: a function from parameter
    groups to a torch optimizer, needed where the config has no "optimizer" section; `lr_scheduler`: one from
    the optimizer to a scheduler, unless the config has a "scheduler" section or the loop sets the rate.
    `weight_decay`: of matrices (biases, LayerNorm and coefficients have none). `progress`: of the checkpoint
    that is loaded; `restored`: its state, put in place of the model's values. Without `early_bird`, or with
    its `enabled` false, nothing is searched. Raises SettingsError for a config or a ticket setting that
    cannot work and for an unknown architecture.
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
        restored=restored,
    )


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
        restored: Restored | None,
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
        self._grad_norm: torch.Tensor | float | None = None
        self._loss_scale = LossScale()
        self._marks = OutputMarks()
        self.adapter = adapter_of(model, searched=bird is not None)
        self._checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
        self._dampers: dict[str, tuple[int, torch.Tensor]] = {}
        self._compile_options: dict[str, Any] | None = None
        self.anchor: state.State | None = None
        """This rank's part of the weights that a rewind brings back; stored in checkpoints."""
        if bird is not None and self.searching:
            if bird.settings.searches:
                model = self.adapter.searchable(model)
            if not self.progress.tickets:
                shape = self.adapter.shape(model)
                dense = Widths(shape.heads, shape.neurons)
                targets.check(bird.settings, dense=dense, work=self._work(model))
        self._open(model, state.from_module(model) if restored is None else restored[0])
        if restored is not None:
            self.anchor = restored[1]

    # --- DeepSpeed's interface ---

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with as_written(self.inner):
            output = self.inner(*args, **kwargs)
        self._marks.note(output)
        return output

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not opened yet: do not recurse
            raise AttributeError(name)
        return getattr(self.inner, name)

    def compile(self, **options: Any) -> None:
        """Compile the module, with DeepSpeed's arguments; after a draw the small module is compiled anew.

        Only training is: an evaluation runs the module as it is written.
        """
        self._compile_options = options
        compile_module(self.inner, options)

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Run the backward pass; the L1 term's gradient joins in the coefficients, scaled like the loss."""
        if self._penalised:
            loss.register_hook(self._loss_scale.record)
        return self.inner.backward(loss)

    def step(self) -> None:
        """Take the optimizer step at the accumulation boundary; look at the coefficients and draw where it is
        time.

        Collective. After a draw `module`, `optimizer` and their parameters are new objects.
        """
        boundary = self.inner.is_gradient_accumulation_boundary()
        norm = guard.plain_norm(self.inner) if boundary else None
        self.inner.step()
        if not boundary:
            return
        self._after_step(self.inner.get_global_grad_norm() if norm is None else norm)

    def skip(self) -> None:
        """Give up the gradients of this step, instead of `step` at its boundary, and count it. Collective.

        The state goes on in a fresh engine, since no DeepSpeed optimizer forgets its gradients on demand. A
        look that is due comes all the same.
        """
        kept = state.read(self.inner)
        kept.counters["global_steps"] += 1
        kept.counters["skipped_steps"] += 1
        kept.counters["global_samples"] += self.inner.train_batch_size()
        self._reopen(kept)
        self._after_step(None)

    def _after_step(self, norm: torch.Tensor | float | None) -> None:
        self._grad_norm = norm
        if self._bird is not None and self.searching:
            if self._anchors_at(self.inner.global_steps):
                self.anchor = state.read(self.inner, moments=False)
            self._look(self._bird)

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
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step, before clipping; None before the first and after a skipped
        one. A device is waited for here, not in `step`."""
        return None if self._grad_norm is None else float(self._grad_norm)

    @property
    def learning_rate(self) -> float:
        return self.inner.optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in self.inner.optimizer.param_groups:
            group["lr"] = value

    @property
    def loss_scale(self) -> float | None:
        """Factor of the loss in fp16; None in other precisions."""
        return self.inner.optimizer.loss_scale if mechanics.precision_of(self._config) == "fp16" else None

    @property
    def warming(self) -> float:
        """Factor of the learning rate in the next step: below 1 while it rises again after a draw."""
        if self._bird is None or not self.progress.tickets or not self._bird.settings.rewarmup_steps:
            return 1.0
        since = self.inner.global_steps + 1 - self.progress.tickets[-1].step
        return min(1.0, since / self._bird.settings.rewarmup_steps)

    def coefficients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """fp32 masters of the heads' and the neurons' coefficients, one 1-D tensor a layer. Collective."""
        heads, neurons = cutting.coefficient_names(self.adapter.layers(self.module.config))
        values = state.gather(self.inner, heads + neurons)
        return [values[name] for name in heads], [values[name] for name in neurons]

    def reopen(self, *, micro_batch: int, accumulation: int) -> None:
        """Go on with another micro-batch and accumulation: the same state in a fresh engine. Collective."""
        self._config["train_micro_batch_size_per_gpu"] = micro_batch
        self._config["gradient_accumulation_steps"] = accumulation
        self._config.pop("train_batch_size", None)
        self._reopen(state.read(self.inner))

    def _reopen(self, kept: state.State) -> None:
        config, rates = self.module.config, Rates(self.inner)
        self.close()
        self._open(self._build(config), kept)
        rates.restore(self.inner)

    def restore(self, start: state.State, anchor: state.State | None = None) -> None:
        """Put a state of this shape into the engine, and the anchor to rewind to. Collective."""
        state.seed(self.inner, start)
        self.anchor = anchor

    def close(self) -> None:
        """Tear the inner engine down so that nothing of it stays alive. Idempotent."""
        inner = self.__dict__.pop("inner", None)
        if inner is not None:
            self._marks.remove()
            if self._compile_options is not None:
                torch._dynamo.reset()  # its graphs hold the module
            watched = {"engine": weakref.ref(inner), "module": weakref.ref(inner.module)}
            tear_down(inner)
            del inner
            warn_of_survivors(watched)

    # --- inside ---

    @property
    def _penalised(self) -> bool:
        return self.searching and self._bird is not None and self._bird.settings.searches

    def _work(self, module: torch.nn.Module) -> targets.Work:
        assert self._bird is not None
        return self._bird.work or self.adapter.work(module)

    def _rules(self) -> TicketSettings:
        """The settings with the ratios of the draw that comes next."""
        assert self._bird is not None
        shape, tickets = self.adapter.shape(self.module), self.progress.tickets
        now = Widths(shape.heads, shape.neurons)
        dense = Widths(tickets[0].head_widths, tickets[0].neuron_widths) if tickets else now
        settings, work = self._bird.settings, self._work(self.module)
        return targets.resolved(settings, now=now, dense=dense, draw=len(tickets) + 1, work=work)

    def _anchors_at(self, step: int) -> bool:
        """True where the weights after `step` are those that a rewind brings back."""
        bird = self._bird
        return (
            bird is not None
            and self.searching
            and not self.progress.tickets
            and bird.settings.start == "rewind"
            and bird.settings.rewind_step == step
        )

    def _look(self, bird: EarlyBird) -> None:
        step, search = self.inner.global_steps, self.progress.search
        if not bird.settings.searches:
            if step - search.began == bird.settings.latest_step:
                self._draw(
                    baselines.ticket(
                        self.inner, self.adapter, rules=self._rules(), seed=bird.seed, step=step,
                        number=len(self.progress.tickets),
                    )
                )  # fmt: skip
        elif search.due(step, settings=bird.settings):
            rules = self._rules()
            self.progress.search = search.observe(step, *self.coefficients(), settings=rules)
            self._watch_mask(bird)
            if self.progress.search.verdict is not None:
                self._draw(self.progress.search.ticket(settings=rules))

    def _watch_mask(self, bird: EarlyBird) -> None:
        """Note which weights' gradients are damped until the next look."""
        search = self.progress.search
        if bird.settings.damping < 1 and search.steps:
            look = len(search.steps) - 1
            self._dampers = cutting.dampers(
                self.adapter.layers(self.module.config),
                self.adapter.shape(self.module),
                heads=search.heads.kept(look),
                neurons=search.neurons.kept(look),
                factor=bird.settings.damping,
                device=self.device,
            )

    def _draw(self, ticket: Ticket) -> None:
        """Shrink to the ticket. Collective; nothing is cut before all ranks hold the same ticket."""
        assert self._bird is not None
        dist.agree(ticket.sha256, what="the ticket")
        settings, config = self._bird.settings, self.module.config
        old = self.adapter.layers(config)
        last = len(self.progress.tickets) + 1 >= settings.draws
        clock = Clock()
        kept, rates = self._cut_state(ticket, last=last), Rates(self.inner)
        clock.lap("read")
        faults.point("draw.read")
        bare = self.adapter.shape(self.module).coefficients == "none"
        self.close()
        clock.lap("tear_down")
        faults.point("draw.tear_down")
        after = {"fold": "none"}.get(settings.coefficients, settings.coefficients) if last else "train"
        mode = "none" if bare else after
        self.progress = self.progress.drawn(ticket)
        small = cutting.small_config(self.adapter, config, ticket, coefficients=mode)
        new, names = self.adapter.layers(small), cutting.all_coefficients(old)
        cuts = cutting.ticket_cuts(old, ticket, head_size=self._head_size)
        drop = names if mode == "none" else []
        cutting.settle(kept, cuts, old=old, new=new, heads=ticket.heads, drop=drop)
        if settings.start == "rewind":
            self.anchor = None if last else state.transformed(kept, lambda *given: given[3])
        module = self._build(small)
        clock.lap("build")
        faults.point("draw.build")
        self._open(module, kept)
        rates.restore(self.inner)
        clock.lap("initialize")
        faults.point("draw.initialize")
        self.draw_seconds = clock.laps
        if self._bird.on_draw is not None:
            self._bird.on_draw(self, ticket)

    def _cut_state(self, ticket: Ticket, *, last: bool) -> state.State:
        """The state, or that of the step to rewind to, cut to the ticket. Collective."""
        assert self._bird is not None
        settings = self._bird.settings
        anchor = self.anchor if settings.start == "rewind" else None
        return cutting.cut_state(
            self.inner, self.adapter, ticket, settings=settings, last=last, anchor=anchor
        )

    def _build(self, config: Any) -> torch.nn.Module:
        """A fresh module of this shape; its values do not matter, the state comes from `seed`."""
        module = empty_module(lambda: self.adapter.build(config), config=self._config)
        if self._checkpointing:
            enable_checkpointing(module)
        return module

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
        ops.leave_muon_uncompiled()
        try:
            inner, *_ = deepspeed.initialize(
                model=module, model_parameters=groups, config=mechanics.close_traps(self._config), **arguments
            )
        except (pydantic.ValidationError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
            raise SettingsError(f"{self._where}: DeepSpeed refuses it: {error}") from error
        self.inner = inner
        shortcuts.take(inner.optimizer)
        if self.searching:
            check_optimizer(inner.optimizer, where=self._where)
        self.adapter.attach(module)
        self._head_size = self.adapter.shape(module).head_size
        self._hook(module, frozen=frozen)
        if isinstance(base := getattr(inner.optimizer, "optimizer", inner.optimizer), Lamb):
            base.attach(state.segments(inner))
        state.seed(inner, start)
        if self._compile_options is not None:
            compile_module(inner, self._compile_options)
        if self._anchors_at(inner.global_steps):
            self.anchor = state.read(inner, moments=False)

    def _hook(self, module: torch.nn.Module, *, frozen: bool) -> None:
        """Set what the search and its settings do to gradients, layers and the learning rate."""
        bird = self._bird
        for name, parameter in module.named_parameters():
            if frozen and name.endswith(".coefficients"):
                parameter.register_hook(torch.zeros_like)
        if bird is None:
            return
        for name, parameter in module.named_parameters():
            if name.endswith(".coefficients"):
                if self._penalised:
                    parameter.register_hook(penalise(parameter, bird.settings.penalty, self._loss_scale))
            elif self._penalised and bird.settings.damping < 1:
                parameter.register_hook(damp(name, lambda: self._dampers))
        self._dampers = {}
        if self._penalised:
            self._watch_mask(bird)
        if self.searching and bird.settings.kind == "layerdrop":
            layers = self.adapter.layers(module.config)
            baselines.drop_layers(module, layers, probability=bird.settings.layerdrop)
        if bird.settings.rewarmup_steps and self.progress.tickets:
            base = getattr(self.inner.optimizer, "optimizer", self.inner.optimizer)
            warm_up(base, lambda: self.warming)
