"""GLUE: the nine tasks as a table, their files, their scores and the leaderboard's answers.

A task's examples come from a folder in GLUE's own layout (CoLA/train.tsv), from one in the hub's
(cola/*.parquet) or from the hub itself. The surprise: a label is a number in the hub's order wherever it came
from, also where the TSV spells it, so a model tuned on one reads the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from earlybert import hub
from earlybert.config import EarlyBertError

LARGEST = 5.0
"""Of STS-B's degrees of similarity, which begin at 0."""


@dataclass(frozen=True)
class Task:
    """One of GLUE's tasks: what its files look like and what it is scored by."""

    name: str
    """The hub's."""
    folder: str
    """Of the TSV files."""
    texts: tuple[str, ...]
    """Columns of the TSV files that hold one sentence or two."""
    hub_texts: tuple[str, ...]
    """The same columns in the hub's files."""
    label: str
    """Column of the TSV files; the hub's is `label`."""
    labels: tuple[str, ...]
    """In the hub's order; empty for a degree of similarity."""
    metrics: tuple[str, ...]
    """Names in `METRICS`; a task's score is their mean."""
    spelled: bool = False
    """True where the TSV files and the leaderboard have the labels' names, not their numbers."""
    evaluations: dict[str, str] = field(default_factory=lambda: {"dev": "test"})
    """{split that is evaluated: the leaderboard's split that goes with it}."""
    columns: tuple[str, ...] | None = None
    """Of TSV files without a header (the test split has one)."""
    ragged: bool = False
    """True where the official files have rows that break off, which everybody leaves out."""


_ENTAILED = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        Task(
            "cola", "CoLA", ("sentence",), ("sentence",), "label", ("unacceptable", "acceptable"),
            ("matthews",), columns=("source", "label", "star", "sentence"),
        ),
        Task("sst2", "SST-2", ("sentence",), ("sentence",), "label", ("negative", "positive"), ("accuracy",)),
        Task(
            "mrpc", "MRPC", ("#1 String", "#2 String"), _PAIR, "Quality", ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
        ),
        Task("stsb", "STS-B", _PAIR, _PAIR, "score", (), ("pearson", "spearman")),
        Task(
            "qqp", "QQP", ("question1", "question2"), ("question1", "question2"), "is_duplicate",
            ("not_duplicate", "duplicate"), ("accuracy", "f1"), ragged=True,
        ),
        Task(
            "mnli", "MNLI", _PAIR, ("premise", "hypothesis"), "gold_label",
            ("entailment", "neutral", "contradiction"), ("accuracy",), spelled=True,
            evaluations={"dev_matched": "test_matched", "dev_mismatched": "test_mismatched"},
        ),
        Task(
            "qnli", "QNLI", ("question", "sentence"), ("question", "sentence"), "label", _ENTAILED,
            ("accuracy",), spelled=True,
        ),
        Task("rte", "RTE", _PAIR, _PAIR, "label", _ENTAILED, ("accuracy",), spelled=True),
        Task("wnli", "WNLI", _PAIR, _PAIR, "label", ("not_entailment", "entailment"), ("accuracy",)),
    )
}  # fmt: skip
DIAGNOSTIC = Task(
    "ax",
    "diagnostic",
    _PAIR,
    ("premise", "hypothesis"),
    "label",
    TASKS["mnli"].labels,
    ("matthews",),
    spelled=True,
)
"""Pairs without labels, the split "diagnostic": the leaderboard wants MNLI's model to answer them."""
_UNLABELLED = ("test", "diagnostic")
"""How the names of splits begin whose TSV files have no labels."""
_LEADERBOARD = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm", "diagnostic": "AX"}


@dataclass(frozen=True)
class Examples:
    """A split of a task."""

    texts: tuple[tuple[str, ...], ...]
    """One sentence or two of each example."""
    labels: tuple[float, ...] | None
    """Numbers of the labels, or degrees; None for a test split."""
    indices: tuple[int, ...]
    """What the leaderboard calls each."""
    left_out: int = 0
    """Rows of a ragged file that break off."""

    def __len__(self) -> int:
        return len(self.texts)


def task_of(name: str) -> Task:
    """The task of a name, the hub's or the folder's; raises EarlyBertError for another."""
    for task in TASKS.values():
        if name.lower() in (task.name, task.folder.lower()):
            return task
    raise EarlyBertError(f"{name!r} is not a task of GLUE; choose among {', '.join(TASKS)}")


def read(task: Task, source: str, split: str) -> Examples:
    """Read a split ("train", "dev", "test", for MNLI "dev_matched" and so on) of a task.

    `source` is a folder with a folder of the task's, of TSV or of parquet files, or a data set of the hub.
    Raises EarlyBertError naming file and row for a missing column, an unknown label, a row that breaks off
    and a split without examples.
    """
    found = available(task, source, split)
    if found is None:
        raise EarlyBertError(
            f"{source}: no split {split!r} of {task.name} is there; looked for {task.folder}/{split}.tsv and "
            f"{task.name}/{_hub_split(split)}-*.parquet"
        )
    return found


def available(task: Task, source: str, split: str) -> Examples | None:
    """As `read`, but None where a folder has no such split."""
    folder, hub_split = Path(source), _hub_split(split)
    for name in (task.folder, task.name):
        path = folder / name / f"{split}.tsv"
        if path.is_file():
            return _checked(_from_tsv(task, path, labelled=not split.startswith(_UNLABELLED)), str(path))
        patterns = f"{hub_split}-*.parquet", f"{hub_split}.parquet"
        files = [path for pattern in patterns for path in (folder / name).glob(pattern)]
        if files:
            return _checked(_from_parquet(task, sorted(files)), str(min(files)))
    if folder.is_dir():
        return None
    remedy = "a folder with the task's TSV or parquet files, or nyu-mll/glue"
    rows = hub.rows(source, task.name, split=hub_split, remedy=remedy)
    where = f"{source}, {task.name}, {hub_split}"
    return _checked(_from_rows(task, rows.column_names, iter(rows), where=where), where)


def _hub_split(split: str) -> str:
    return "test" if split == "diagnostic" else split.replace("dev", "validation")


def score(task: Task, predictions: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    """The task's metrics as shares of 1, its official ones, and their mean as "score".

    `predictions`: numbers of labels or degrees, one an example.
    """
    found = {name: float(METRICS[name](np.asarray(labels), predictions)) for name in task.metrics}
    return {**found, "score": sum(found.values()) / len(found)}


def predicted(task: Task, logits_BC: np.ndarray) -> np.ndarray:
    """Numbers of labels [B] from logits, or degrees within GLUE's range."""
    if not task.labels:
        return logits_BC[:, 0].clip(0.0, LARGEST)
    return logits_BC.argmax(1)


def write_answers(task: Task, split: str, indices: Sequence[int], predictions: np.ndarray, to: Path) -> Path:
    """Write predictions of a test split as the leaderboard wants them; return the file."""
    path = to / f"{_LEADERBOARD.get(split, task.folder)}.tsv"

    def told(value: Any) -> str:
        if not task.labels:
            return f"{value:.3f}"
        return task.labels[int(value)] if task.spelled else str(int(value))

    lines = [f"{index}\t{told(value)}\n" for index, value in zip(indices, predictions, strict=True)]
    path.write_text("index\tprediction\n" + "".join(lines), encoding="utf-8")
    return path


# --- metrics -----------------------------------------------------------------------------------------------


def _pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, labels, predictions)


def _spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, labels, predictions)


def _correlation(measure: Callable[..., Any], labels: np.ndarray, predictions: np.ndarray) -> float:
    """0 where either side is constant: a model that says the same of all has found nothing."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return measure(labels, predictions).statistic


def _of_sklearn(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def measure(labels: np.ndarray, predictions: np.ndarray) -> float:
        from sklearn import metrics

        return getattr(metrics, name)(labels, predictions)

    return measure


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _of_sklearn("accuracy_score"),
    "f1": _of_sklearn("f1_score"),
    "matthews": _of_sklearn("matthews_corrcoef"),
    "pearson": _pearson,
    "spearman": _spearman,
}


# --- files -------------------------------------------------------------------------------------------------


def _from_tsv(task: Task, path: Path, *, labelled: bool) -> Examples:
    """Rows are cut at tabs alone: GLUE's quotation marks are text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EarlyBertError(f"{path}: {error}; give the file as GLUE has it, in UTF-8") from error
    rows = [line.rstrip("\r").split("\t") for line in lines]
    if rows and rows[-1] == [""]:
        rows.pop()
    first = 1
    if labelled and task.columns is not None:
        header = list(task.columns)
    elif rows:
        header, first = rows.pop(0), 2
    else:
        header = []
    wanted = [*task.texts, *([task.label] if labelled else [])]
    places = [_place(header, name, where=f"{path}, row 1") for name in wanted]
    index = None if labelled else next((header.index(n) for n in ("index", "id") if n in header), None)
    needed = max([*places, *([] if index is None else [index])]) + 1
    texts, labels, indices, left_out = [], [], [], 0
    for number, row in enumerate(rows):
        if len(row) < needed:
            if task.ragged:
                left_out += 1
                continue
            raise EarlyBertError(
                f"{path}, row {number + first}: {len(row)} fields where {needed} are needed "
                f"({', '.join(header)}); mend or remove the row"
            )
        texts.append(tuple(row[place] for place in places[: len(task.texts)]))
        if labelled:
            labels.append(_label(task, row[places[-1]], where=f"{path}, row {number + first}"))
        told = row[index] if index is not None else str(number)
        indices.append(int(told) if told.isdecimal() else number)
    return Examples(tuple(texts), tuple(labels) if labelled else None, tuple(indices), left_out)


def _from_parquet(task: Task, files: Sequence[Path]) -> Examples:
    import pyarrow.parquet

    def rows(names: Sequence[str]) -> Iterator[dict[str, Any]]:
        for file in files:
            yield from pyarrow.parquet.read_table(file, columns=list(names)).to_pylist()

    try:
        names = pyarrow.parquet.read_schema(files[0]).names
        return _from_rows(task, names, rows(names), where=str(files[0]))
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise EarlyBertError(f"{files[0]}: {error}; give the parquet files as the hub has them") from error


def _from_rows(task: Task, names: Sequence[str], rows: Iterator[dict[str, Any]], *, where: str) -> Examples:
    """Examples of the hub's columns; a label of -1 is that of a test split."""
    for name in (*task.hub_texts, "label"):
        _place(names, name, where=where)
    texts, labels, indices = [], [], []
    for number, row in enumerate(rows):
        for name in task.hub_texts:
            if not isinstance(row[name], str):
                raise EarlyBertError(f"{where}, row {number + 1}: {name} = {row[name]!r} is not a text")
        texts.append(tuple(row[name] for name in task.hub_texts))
        if row["label"] != -1:
            labels.append(_label(task, row["label"], where=f"{where}, row {number + 1}"))
        index = row.get("idx", number)
        if not isinstance(index, int):
            raise EarlyBertError(f"{where}, row {number + 1}: idx = {index!r} is not a whole number")
        indices.append(index)
    if labels and len(labels) < len(texts):
        raise EarlyBertError(
            f"{where}: {len(texts) - len(labels):,} of {len(texts):,} rows have the label -1, which stands "
            "for none; give labels to all or to none"
        )
    return Examples(tuple(texts), tuple(labels) if labels else None, tuple(indices))


def _place(header: Sequence[str], name: str, *, where: str) -> int:
    if name not in header:
        raise EarlyBertError(
            f"{where}: the column {name!r} is missing; there are {', '.join(map(repr, header)) or 'none'}"
        )
    return list(header).index(name)


def _label(task: Task, told: Any, *, where: str) -> float:
    """Number of a label given by name or number, or a degree."""
    if not task.labels:
        try:
            degree = float(told)
        except (TypeError, ValueError):
            degree = float("nan")
        if not 0 <= degree <= LARGEST:
            raise EarlyBertError(f"{where}: the score {told!r} is not a number from 0 to {LARGEST:g}")
        return degree
    if told in task.labels:
        return task.labels.index(told)
    if str(told).isdecimal() and int(told) < len(task.labels):
        return int(told)
    numbers = ", ".join(f"{number} ({name})" for number, name in enumerate(task.labels))
    raise EarlyBertError(f"{where}: {told!r} is not a label of {task.name}; it has {numbers}")


def _checked(examples: Examples, where: str) -> Examples:
    if not len(examples):
        raise EarlyBertError(f"{where}: the split has no examples; give the whole file")
    return examples
