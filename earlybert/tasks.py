"""What fine-tuning asks of a task: rows to train on, rows to judge by, a head, and what its logits are worth.

`GlueTask` and `SquadTask` answer alike, so the loop knows neither. The surprise: rows are not padded here but
in `collate`, to the longest of a micro-batch, since most of GLUE is short.

B sequences, T tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from earlybert import glue, squad, squad_files
from earlybert.config import EarlyBertError, write_atomically
from earlybert.downstream import EarlyBertForQuestionAnswering, EarlyBertForSequenceClassification
from earlybert.recipes import Recipe

log = logging.getLogger(__name__)

_MULTIPLE = 8
"""Rows of a micro-batch are padded to a multiple of this, which tensor cores like."""
Logits = tuple[np.ndarray, ...]
"""What the model says to one row: logits [C], or of beginning and end [T] each."""


@dataclass(frozen=True)
class Rows:
    """Token ids of a split, of any lengths, and what they are trained to."""

    input_ids: Sequence[np.ndarray]
    """int32, a row each."""
    token_type_ids: Sequence[np.ndarray]
    """int8."""
    targets: Mapping[str, np.ndarray]
    """{argument of the model's forward pass: one value a row}; empty where there are none."""
    longest: int
    """No row has more tokens, nor is one padded beyond: a model need not have positions for more."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @functools.cached_property
    def sha256(self) -> str:
        """Of all rows and targets, in their order."""
        told = hashlib.sha256()
        for ids, types in zip(self.input_ids, self.token_type_ids, strict=True):
            told.update(np.concatenate([[len(ids)], ids, types]).astype(np.int32).tobytes())
        for name in sorted(self.targets):
            told.update(name.encode() + self.targets[name].tobytes())
        return told.hexdigest()

    def collate(self, which: Sequence[int], *, pad: int, targets: bool = True) -> dict[str, torch.Tensor]:
        """The rows `which` as a micro-batch: input_ids, token_type_ids, attention_mask [B, T] and targets."""
        longest = max(len(self.input_ids[row]) for row in which)
        length = min(-(-longest // _MULTIPLE) * _MULTIPLE, self.longest)
        ids_BT = torch.full((len(which), length), pad, dtype=torch.long)
        types_BT, mask_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
        for place, row in enumerate(which):
            own = len(self.input_ids[row])
            ids_BT[place, :own] = torch.from_numpy(self.input_ids[row])
            types_BT[place, :own] = torch.from_numpy(self.token_type_ids[row])
            mask_BT[place, :own] = 1
        batch = {"input_ids": ids_BT, "token_type_ids": types_BT, "attention_mask": mask_BT}
        if targets:
            batch |= {name: torch.from_numpy(values[list(which)]) for name, values in self.targets.items()}
        return batch


class Task:
    """What the loop asks."""

    model_class: Any
    """A class of `downstream`."""
    model_settings: dict[str, Any]
    """What its config gets beside the pretrained model's."""
    train: Rows
    evaluations: dict[str, Rows]
    """{split: rows}; the mean of their scores is the task's."""
    answers: dict[str, Rows]
    """{split without labels: rows}, whose answers are written."""

    @property
    def judged(self) -> str:
        """sha256 of what the scores come from: the rows of all evaluations and what is right."""
        told = hashlib.sha256()
        for split in sorted(self.evaluations):
            told.update(f"{split} {self.evaluations[split].sha256}".encode())
        return told.hexdigest()

    def logits(self, output: Any, mask_BT: torch.Tensor) -> list[Logits]:
        """What a forward pass says, one entry a row, without padding."""
        raise NotImplementedError

    def judge(self, split: str, logits: Sequence[Logits], *, to: Path | None) -> dict[str, float]:
        """The official metrics of a split, and "score", the one of the tables, in percent; nothing for a
        split without labels. The answers are written into `to`, where that is given."""
        raise NotImplementedError


def load(recipe: Recipe, *, data: str, tokenizer: Any) -> Task:
    """A task's rows; raises EarlyBertError for files that are missing or wrong."""
    kind = SquadTask if recipe.task in squad_files.FILES else GlueTask
    return kind(recipe, data=data, tokenizer=tokenizer)


def check(recipe: Recipe, *, data: str) -> None:
    """Raise EarlyBertError where a task's files are missing or wrong, before anything is trained."""
    if recipe.task in squad_files.FILES:
        for number in (0, 1):
            squad_files.load(data, recipe.task, number)
        return
    task = glue.task_of(recipe.task)
    for split in ("train", *task.evaluations):
        _labelled(task, data, split)
    for split in task.evaluations.values():
        glue.available(task, data, split)
    _diagnostic(task, data)


def tokenizer(place: str | Path, *, of: str) -> Any:
    """Read a fast tokenizer; raises EarlyBertError where none is at `place`. `of`: whose it is."""
    try:
        found: Any = transformers.AutoTokenizer.from_pretrained(place)
    except Exception as error:  # damaged files end in errors of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EarlyBertError(f"{of}: its tokenizer cannot be read from {place} ({reason})") from error
    if len(found) <= len(found.all_special_tokens):  # what transformers makes of no file at all
        raise EarlyBertError(f"{of}: its tokenizer cannot be read from {place} (no words are there)")
    if not found.is_fast or found.pad_token_id is None:
        raise EarlyBertError(f"{of}: a fast tokenizer with a padding token is needed; {place} has another")
    return found


class GlueTask(Task):
    """A task of GLUE's: one sentence or two, a label or a degree."""

    model_class = EarlyBertForSequenceClassification

    def __init__(self, recipe: Recipe, *, data: str, tokenizer: Any) -> None:
        self.task = glue.task_of(recipe.task)
        labels = {number: name for number, name in enumerate(self.task.labels)} or {0: "degree"}
        self.model_settings = {
            "id2label": labels, "label2id": {name: number for number, name in labels.items()},
            "problem_type": "single_label_classification" if self.task.labels else "regression",
        }  # fmt: skip
        self._tokenizer, self._length = tokenizer, recipe.sequence_length
        self.train = self._rows(_labelled(self.task, data, "train"))
        self._examples = {split: _labelled(self.task, data, split) for split in self.task.evaluations}
        self.evaluations = {split: self._rows(examples) for split, examples in self._examples.items()}
        told = {split: glue.available(self.task, data, split) for split in self.task.evaluations.values()}
        told["diagnostic"] = _diagnostic(self.task, data)
        # A mirror may have labels there; a task's score is that of its evaluations all the same.
        unlabelled = {split: replace(found, labels=None) for split, found in told.items() if found}
        self._examples |= unlabelled
        self.answers = {split: self._rows(examples) for split, examples in unlabelled.items()}

    def logits(self, output: Any, mask_BT: torch.Tensor) -> list[Logits]:
        return [(row,) for row in output.logits.float().cpu().numpy()]

    def judge(self, split: str, logits: Sequence[Logits], *, to: Path | None) -> dict[str, float]:
        examples = self._examples[split]
        predictions = glue.predicted(self.task, np.stack([row for (row,) in logits]))
        if to is not None and split in self.answers:
            glue.write_answers(self.task, split, examples.indices, predictions, to)
        elif to is not None:
            told = [f"{i}\t{value:g}\n" for i, value in zip(examples.indices, predictions, strict=True)]
            write_atomically(to / f"{split}.tsv", "index\tprediction\n" + "".join(told))
        if examples.labels is None:
            return {}
        found = glue.score(self.task, predictions, examples.labels)
        return {name: 100.0 * value for name, value in found.items()}

    def _rows(self, examples: glue.Examples) -> Rows:
        told = self._tokenizer(
            *(list(column) for column in zip(*examples.texts, strict=True)),
            truncation=True, max_length=self._length, return_token_type_ids=True,
            return_attention_mask=False,
        )  # fmt: skip
        targets = {}
        if examples.labels is not None:
            kind = np.int64 if self.task.labels else np.float32
            targets["labels"] = np.array(examples.labels, dtype=kind)
        ids = squad.arrays(told["input_ids"], np.int32)
        return Rows(ids, squad.arrays(told["token_type_ids"], np.int8), targets, self._length)


class SquadTask(Task):
    """SQuAD 1.1 ("squad") or 2.0 ("squad2"): a question and a text that may hold the answer."""

    model_class = EarlyBertForQuestionAnswering

    def __init__(self, recipe: Recipe, *, data: str, tokenizer: Any) -> None:
        self._impossible, self._recipe = recipe.task == "squad2", recipe
        self.model_settings = {}
        self.answers = {}
        train, dev = (squad_files.load(data, recipe.task, number) for number in (0, 1))
        cut = {"length": recipe.sequence_length, "stride": recipe.stride}
        windows = squad.windows(train, tokenizer, **cut)
        positions = {"start_positions": windows.starts, "end_positions": windows.ends}
        longest = recipe.sequence_length
        self.train = Rows(windows.input_ids, windows.token_type_ids, positions, longest)
        self._questions, self._windows = dev, squad.windows(dev, tokenizer, **cut)
        ids, types = self._windows.input_ids, self._windows.token_type_ids
        self.evaluations = {"dev": Rows(ids, types, {}, longest)}

    @property
    def judged(self) -> str:
        right = json.dumps([[question.id, question.answers] for question in self._questions])
        return hashlib.sha256(f"{super().judged} {right}".encode()).hexdigest()

    def logits(self, output: Any, mask_BT: torch.Tensor) -> list[Logits]:
        starts, ends = (x.float().cpu().numpy() for x in (output.start_logits, output.end_logits))
        lengths = mask_BT.sum(1).tolist()
        return [(starts[row, :own], ends[row, :own]) for row, own in enumerate(lengths)]

    def judge(self, split: str, logits: Sequence[Logits], *, to: Path | None) -> dict[str, float]:
        starts, ends = [row[0] for row in logits], [row[1] for row in logits]
        answered = squad.answers(
            self._questions, self._windows, starts, ends, impossible=self._impossible,
            n_best=self._recipe.n_best, longest=self._recipe.longest_answer,
        )  # fmt: skip
        told = dict(zip((question.id for question in self._questions), answered, strict=True))
        best = {id: own.best(threshold=self._recipe.null_threshold) for id, own in told.items()}
        if to is not None:
            self._write(told, best, to)
        found = squad.evaluate(self._questions, best, impossible=self._impossible)
        if self._impossible:
            for name, measure in (("exact", squad.exact), ("f1", squad.f1)):
                threshold, most = squad.best_threshold(self._questions, answered, measure)
                found |= {f"best {name}": most, f"best {name} threshold": threshold}
        return {**found, "score": found["f1"]}

    def _write(self, answered: Mapping[str, squad.Answered], best: Mapping[str, str], to: Path) -> None:
        """`predictions.json` and `nbest.json` by question, and with SQuAD 2.0 `null_odds.json`: the files
        that the official scripts read."""
        files: dict[str, Any] = {
            "predictions": dict(best),
            "nbest": {id: [vars(c) for c in told.candidates] for id, told in answered.items()},
        }
        if self._impossible:
            files["null_odds"] = {id: told.null_odds for id, told in answered.items()}
        for name, values in files.items():
            write_atomically(to / f"{name}.json", json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def _diagnostic(task: glue.Task, data: str) -> glue.Examples | None:
    """The leaderboard's pairs for MNLI's model; a mirror of the hub's data set may be without them."""
    if task.name != "mnli":
        return None
    try:
        return glue.available(glue.DIAGNOSTIC, data, "diagnostic")
    except EarlyBertError as error:
        if Path(data).is_dir():
            raise
        log.warning(f"AX.tsv will not be written: {error}")
        return None


def _labelled(task: glue.Task, data: str, split: str) -> glue.Examples:
    examples = glue.read(task, data, split)
    if examples.labels is None:
        raise EarlyBertError(
            f"{data}: the split {split!r} of {task.name} has no labels; give the file with them"
        )
    return examples
