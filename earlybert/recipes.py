"""A fine-tuning experiment: one TOML file that owns model, tasks, seeds, the recipe of each task and the
ticket.

`load` is the only way in: file, then overrides, then every check that needs neither data nor a device.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from earlybert import glue, mechanics, squad, squad_files
from earlybert.config import EarlyBertError, SettingsError, as_dict, override, parse, read_toml
from earlybert.experiment import OptimizerSettings
from earlybert.schedule import PhaseSettings
from earlybert.ticket import TicketSettings

SQUADS = tuple(squad_files.FILES)
_OF_THE_SEARCH = (
    "every", "minimum_step", "latest_step", "settled_distance", "breakdown_distance", "on_breakdown",
)  # fmt: skip
"""Settings of a ticket that decide when a search of pretraining ends."""
_SQUADS_OWN = ("stride", "ignore_padding", "n_best", "longest_answer", "null_threshold")


@dataclass(frozen=True)
class RecipeSettings:
    """How a task is trained (the `[recipe]` table, and one `[[recipes]]` a task for what it does
    otherwise); None leaves what stands in `DEFAULTS`."""

    task: str | None = None
    """`[[recipes]]` only: which task."""
    epochs: float | None = None
    """Passes over the training rows; with a ticket that rewinds, after the draw."""
    batch: int | None = None
    """Rows an optimizer step, over all ranks."""
    micro_batch: int | None = None
    """Rows a rank works on at a time; None: `batch`, shared out over the ranks."""
    learning_rate: float | None = None
    """Peak learning rate."""
    warmup: float | None = None
    """Share of the steps over which the rate rises; then it falls linearly to 0."""
    sequence_length: int | None = None
    """Longest row in tokens; longer texts lose their end, longer contexts become several windows."""
    stride: int | None = None
    """SQuAD only: tokens by which the windows of a context overlap."""
    ignore_padding: bool | None = None
    """SQuAD only: leave padding out of the loss, where stock BERT has it; on a CPU nothing is computed for
    it then."""
    n_best: int | None = None
    """SQuAD only: beginnings and ends of a window that answers are made of, and answers that are written."""
    longest_answer: int | None = None
    """SQuAD only: tokens of an answer at most."""
    null_threshold: float | None = None
    """SQuAD 2.0 only: a question has no answer where the logit of none exceeds that of the best one by
    more."""


@dataclass(frozen=True)
class Recipe:
    """How one task is trained, everything filled in."""

    task: str
    epochs: float
    batch: int
    micro_batch: int | None
    learning_rate: float
    warmup: float
    sequence_length: int
    stride: int
    ignore_padding: bool
    n_best: int
    longest_answer: int
    null_threshold: float

    def __post_init__(self) -> None:
        where = f"the recipe of {self.task}"
        if self.epochs <= 0:
            raise SettingsError(f"{where}: epochs = {self.epochs}: must be positive")
        for name in ("micro_batch", "n_best", "longest_answer"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingsError(f"{where}: {name} = {value}: must be at least 1")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise SettingsError(
                f"{where}: batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; use "
                f"micro_batch {max(m for m in range(1, self.micro_batch + 1) if self.batch % m == 0)}"
            )
        try:
            self.curve(steps=1)
            if self.task in SQUADS:
                squad.check_room(length=self.sequence_length, stride=self.stride)
        except EarlyBertError as error:
            raise SettingsError(f"{where}: {error}") from error

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides the course of a run: not `micro_batch`, and SQuAD's own for SQuAD alone."""
        return deciding(self.task, asdict(self))

    def curve(self, *, steps: int) -> PhaseSettings:
        """The learning rate over `steps` optimizer steps."""
        return PhaseSettings(
            steps=steps, sequence_length=self.sequence_length, batch=self.batch, micro_batch=self.batch,
            learning_rate=self.learning_rate, warmup=self.warmup,
        )  # fmt: skip


DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "epochs": 3.0, "batch": 32, "micro_batch": None, "learning_rate": 3e-5, "warmup": 0.1,
        "sequence_length": 128, "stride": 128, "ignore_padding": False, "n_best": 20,
        "longest_answer": 30, "null_threshold": 0.0,
    },
    # Small sets need more passes than three to leave the majority's answer.
    "cola": {"epochs": 5.0},
    "mrpc": {"epochs": 5.0},
    "stsb": {"epochs": 5.0},
    "rte": {"epochs": 5.0},
    "wnli": {"epochs": 5.0},
    "squad": {"epochs": 2.0, "sequence_length": 384},
    "squad2": {"epochs": 2.0, "sequence_length": 384},
}  # fmt: skip
"""{task, or "" for every task: what it does unless the experiment says otherwise}."""


def deciding(task: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recipe's settings those that decide the course of a run of `task`."""
    spare = {"micro_batch"} if task in SQUADS else {"micro_batch", *_SQUADS_OWN}
    return {name: value for name, value in values.items() if name not in spare}


def defaults(task: str) -> dict[str, Any]:
    """A task's recipe where an experiment says nothing of it."""
    return {**DEFAULTS[""], **DEFAULTS.get(task, {}), "task": task}


@dataclass(frozen=True)
class Finetuning:
    """A whole fine-tuning experiment."""

    name: str
    """Names the run folder, runs/NAME; each task and seed has a folder in it."""
    model: str
    """What is fine-tuned: a run folder, a checkpoint, an export, a folder or hub name of stock BERT."""
    deepspeed: str
    """Path of the DeepSpeed JSON, relative to the working folder or to the experiment's own folder."""
    data: str = "nyu-mll/glue"
    """Folder of GLUE's or SQuAD's files, or GLUE's name on the hub."""
    tasks: tuple[str, ...] = ()
    """Which tasks; none given: all nine of GLUE, or SQuAD 1.1."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of fresh heads, order and dropout; each is a run of its own."""
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    recipes: tuple[RecipeSettings, ...] = ()
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(betas=(0.9, 0.999)))
    ticket: TicketSettings = field(
        default_factory=lambda: TicketSettings(enabled=False, start="rewind", neuron_ratio=0.4)
    )
    """As the paper fine-tunes: 40 % of the neurons go, and training begins anew."""
    search_epochs: float = 0.2
    """Part of the first epoch that searches for the ticket; `ticket.latest_step` follows from it."""
    runs: str = "runs"
    """Folder of the run folders."""
    log_every: int = 50
    """Optimizer steps between two progress lines."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints; SIGTERM saves one too."""
    keep_models: Literal["none", "compact", "dense"] = "none"
    """In which form each tuned model is written (runs/NAME/TASK/seed-N/model): its true shape, or that of
    stock BERT."""
    hang_seconds: float = 480.0
    """A run that stands still for so long ends and names the rank it waits for."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise SettingsError(f"name = {self.name!r}: must be a plain folder name")
        for task in (*self.tasks, *(told.task or "" for told in self.recipes)):
            if task not in SQUADS and task not in glue.TASKS:
                raise SettingsError(
                    f"{task!r} is not a task that is known ({', '.join((*glue.TASKS, *SQUADS))}); name one"
                )
        if self.recipe.task is not None:
            raise SettingsError("recipe.task is set; what one task does otherwise goes into [[recipes]]")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise SettingsError(f"seeds = {list(self.seeds)}: need different numbers, none negative")
        if not 0 < self.search_epochs <= 1:
            raise SettingsError(f"search_epochs = {self.search_epochs}: must lie in (0, 1]")
        if self.ticket.draws > 1:
            raise SettingsError(f"ticket.draws = {self.ticket.draws}: fine-tuning draws once")
        for name in _OF_THE_SEARCH:
            if (value := getattr(self.ticket, name)) != getattr(TicketSettings, name):
                raise SettingsError(
                    f"ticket.{name} = {value}: fine-tuning searches for search_epochs of an epoch and draws "
                    "then; leave it out"
                )
        if self.ticket.rewind_step:
            raise SettingsError(
                f"ticket.rewind_step = {self.ticket.rewind_step}: fine-tuning rewinds to the pretrained "
                "weights; leave it out"
            )
        for name in ("log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.hang_seconds <= 0:
            raise SettingsError(f"hang_seconds = {self.hang_seconds}: must be positive")
        for task in self.tasks:
            recipe, ticket = self.of(task), self.ticket
            if ticket.enabled and ticket.searches and ticket.start == "keep":
                self._check_search(recipe)

    def _check_search(self, recipe: Recipe) -> None:
        """Raise SettingsError where training ends before the search, which goes over into it."""
        if self.search_epochs >= recipe.epochs:
            raise SettingsError(
                f"search_epochs = {self.search_epochs}: {recipe.task} trains for {recipe.epochs:g} epochs, "
                "and with ticket.start=keep nothing of them would be left after the draw; search for less, "
                "or train for more"
            )

    def of(self, task: str) -> Recipe:
        """The recipe of a task: its own settings, else the experiment's, else the defaults."""
        values = defaults(task)
        own = [told for told in self.recipes if told.task == task]
        for told in (self.recipe, *own):
            given = {f.name: getattr(told, f.name) for f in fields(told)}
            values |= {name: value for name, value in given.items() if value is not None}
        return Recipe(**{**values, "task": task})

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs) / self.name

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the course of the runs of all tasks; their recipes, which
        `tuned.check` compares task by task, and what only watches them are left out."""
        values = as_dict(self)
        for key in ("name", "runs", "log_every", "hang_seconds", "deepspeed", "checkpoint_every", "data",
                    "model", "tasks", "seeds", "keep_models", "recipe", "recipes"):  # fmt: skip
            values.pop(key, None)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load(
    path: str | os.PathLike[str], words: Sequence[str] = (), *, kind: str
) -> tuple[Finetuning, dict[str, Any]]:
    """Read an experiment, apply `key=value` words, check it; return it and its DeepSpeed settings.

    `kind` is "glue" or "squad" and says which tasks it may have. Raises SettingsError naming file and
    setting.
    """
    settings = parse(Finetuning, override(read_toml(path), words), where=str(path))
    known = tuple(glue.TASKS) if kind == "glue" else SQUADS
    for task in settings.tasks:
        if task not in known:
            raise SettingsError(f"{path}: {task} is none of the tasks of {kind} ({', '.join(known)})")
    if not settings.tasks:
        settings = replace(settings, tasks=known if kind == "glue" else known[:1])
    return settings, mechanics.load_beside(settings.deepspeed, experiment=path)
