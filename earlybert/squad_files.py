"""SQuAD's questions from its own JSON, from Parquet or from the hub.

The surprise: an answer that does not stand in its context where the file says is refused, not searched for.
A model that is tuned on spans that are off learns them.
"""

from __future__ import annotations

import bz2
import collections
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlybert import hub
from earlybert.config import EarlyBertError

FILES = {"squad": ("train-v1.1", "dev-v1.1"), "squad2": ("train-v2.0", "dev-v2.0")}
"""{task: names of its files}."""
_SPLITS = ("train", "validation")
_SUFFIXES = (".json", ".json.xz", ".json.gz", ".json.bz2", ".parquet")
_HUB_FOLDERS = {"squad": ("plain_text",), "squad2": ("squad_v2",)}
"""{task: where the hub's data set has its files}."""
_COLUMNS = ("id", "question", "context", "answers")
_UNREADABLE = (
    OSError, EOFError, RecursionError, UnicodeDecodeError, json.JSONDecodeError, lzma.LZMAError, zlib.error,
)  # fmt: skip
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


@dataclass(frozen=True)
class Question:
    """A question, the text it is asked about, and the answers that count as right."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    """As they stand in the context; none for a question that has no answer."""
    starts: tuple[int, ...]
    """Characters of the context before each answer."""


def load(source: str, task: str, number: int) -> tuple[Question, ...]:
    """Read the training (0) or the development (1) questions of a task, from a folder or from the hub.

    A folder holds SQuAD's own JSON (.json, .json.xz, .gz or .bz2), one Parquet file of that name, or the
    hub's files (`train-*.parquet`, also in a folder of the hub's). Raises EarlyBertError as `read` does, and
    for questions of the other version.
    """
    found = _found(source, task, number)
    without = next((question.id for question in found if not question.answers), None)
    if task == "squad" and without is not None:
        raise EarlyBertError(
            f"{source}: question {without} has no answer, which SQuAD 1.1 does not know; use "
            'tasks=["squad2"], or SQuAD 1.1\'s files or data=rajpurkar/squad'
        )
    if task == "squad2" and number == 0 and without is None:
        raise EarlyBertError(
            f"{source}: every question to train on has an answer, so it is not SQuAD 2.0; use "
            'tasks=["squad"], or SQuAD 2.0\'s files or data=rajpurkar/squad_v2'
        )
    return found


def read(path: str | Path) -> tuple[Question, ...]:
    """Read a file in SQuAD's own JSON (.json, .json.xz, .gz or .bz2) or the hub's parquet.

    Raises EarlyBertError naming file and question for what is missing, and for an answer that does not stand
    in its context where the file says.
    """
    path = Path(path)
    return _checked(_from_parquet([path]) if path.suffix == ".parquet" else _from_json(path), str(path))


# --- inside ------------------------------------------------------------------------------------------------


def _found(source: str, task: str, number: int) -> tuple[Question, ...]:
    name, split = FILES[task][number], _SPLITS[number]
    folder = Path(source)
    if not folder.is_dir():
        return _checked(_from_hub(source, split), f"{source}, {split}")
    for path in (folder / f"{name}{suffix}" for suffix in _SUFFIXES):
        if path.is_file():
            return read(path)
    for place in (folder, *(folder / inner for inner in _HUB_FOLDERS[task])):
        if files := sorted(place.glob(f"{split}-*.parquet")):
            return _checked(_from_parquet(files), str(files[0]))
    raise EarlyBertError(
        f"{folder / name}.json is not there, nor packed or as parquet; give the folder of SQuAD's files"
    )


def _checked(questions: Iterator[Question], where: str) -> tuple[Question, ...]:
    found = tuple(questions)
    if not found:
        raise EarlyBertError(f"{where}: the file has no questions; give the whole file")
    ids = collections.Counter(question.id for question in found)
    if (twice := ids.most_common(1)[0])[1] > 1:
        raise EarlyBertError(f"{where}: {twice[1]} questions have the id {twice[0]!r}; give each its own")
    return found


def _from_json(path: Path) -> Iterator[Question]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            values = json.load(file)
    except _UNREADABLE as error:
        raise EarlyBertError(f"{path}: {error}; give a JSON file in SQuAD's layout") from error
    number = 0
    try:
        for article in values["data"]:
            for paragraph in article["paragraphs"]:
                for told in paragraph["qas"]:
                    number += 1
                    given = [] if told.get("is_impossible") else told["answers"]
                    yield _question(
                        f"{path}, question {number}", id=told["id"], text=told["question"],
                        context=paragraph["context"], answers=[answer["text"] for answer in given],
                        starts=[answer["answer_start"] for answer in given],
                    )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        missing = isinstance(error, KeyError)
        wrong = f"{error.args[0]!r} is missing" if missing else "something is of another type"
        raise EarlyBertError(
            f"{path}, question {number}: {wrong}; SQuAD's layout is "
            "data > paragraphs > context, qas > id, question, answers > text, answer_start"
        ) from error


def _from_parquet(files: Sequence[Path]) -> Iterator[Question]:
    import pyarrow.parquet

    for path in files:
        try:
            rows = pyarrow.parquet.read_table(path, columns=list(_COLUMNS)).to_pylist()
        except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise EarlyBertError(f"{path}: {error}; the columns {', '.join(_COLUMNS)} are needed") from error
        yield from _from_rows(rows, where=str(path))


def _from_hub(source: str, split: str) -> Iterator[Question]:
    remedy = "a folder with SQuAD's files, rajpurkar/squad or rajpurkar/squad_v2"
    rows = hub.rows(source, split=split, remedy=remedy)
    for name in _COLUMNS:
        if name not in rows.column_names:
            raise EarlyBertError(
                f"{source}, {split}: the column {name!r} is missing; SQuAD's columns are needed"
            )
    yield from _from_rows(rows, where=f"{source}, {split}")


def _from_rows(rows: Iterable[Mapping[str, Any]], *, where: str) -> Iterator[Question]:
    """Questions of the hub's columns."""
    for number, row in enumerate(rows, start=1):
        place, told = f"{where}, question {number}", row["answers"]
        if not isinstance(told, Mapping) or not {"text", "answer_start"} <= told.keys():
            raise EarlyBertError(f"{place}: answers = {told!r} are not lists of text and answer_start")
        yield _question(
            place, id=row["id"], text=row["question"], context=row["context"],
            answers=told["text"], starts=told["answer_start"],
        )  # fmt: skip


def _question(where: str, *, id: Any, text: Any, context: Any, answers: Any, starts: Any) -> Question:
    """Check what a file says of a question; raises EarlyBertError."""
    for name, value in (("id", id), ("question", text), ("context", context)):
        if not isinstance(value, str) and (name != "id" or not isinstance(value, int)):
            raise EarlyBertError(f"{where}: {name} = {value!r} is not a text")
    lists = all(isinstance(told, Sequence) and not isinstance(told, str) for told in (answers, starts))
    if not lists or len(answers) != len(starts):
        raise EarlyBertError(
            f"{where} ({id}): text = {answers!r} and answer_start = {starts!r} are not lists of one length"
        )
    for answer, start in zip(answers, starts, strict=True):
        if not isinstance(answer, str) or not isinstance(start, int):
            raise EarlyBertError(
                f"{where} ({id}): text = {answer!r} with answer_start = {start!r}: need a text and a number"
            )
        if not answer.strip() or start < 0 or context[start : start + len(answer)] != answer:
            near = context.find(answer) if answer.strip() else -1
            remedy = f"it stands at {near}" if near >= 0 else "nor does it anywhere"
            raise EarlyBertError(
                f"{where} ({id}): the answer {answer!r} does not stand at character "
                f"{start} of its context; {remedy}; mend or remove the question"
            )
    return Question(str(id), text, context, tuple(answers), tuple(starts))
