"""The pipeline steps of `build`, and the executor that runs them on one machine.

Two pipelines of datatrove steps: Read, Clean, Split, Stage (raw files to sentences in the work folder) and
Unstage, Tokenize, Shard (sentences to shards). Task r of N does the same documents whichever process runs
it and writes one file, so the result does not depend on the number of processes.

The surprise: `Executor.run` replaces the pool of `LocalPipelineExecutor`, which waits for ever for a worker
that the kernel killed. Tasks, completion markers, logs and statistics are datatrove's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from data_prep import sentences, vocab
from data_prep.raw import Raw
from data_prep.sources import Source
from data_prep.wikipedia import STUB_WORDS
from earlybert.config import EarlyBertError, write_atomically
from earlybert.shards import ShardWriter, shard_name, token_type_for

_STAGED = pa.schema([("source", pa.uint16()), ("id", pa.string()), ("sentences", pa.list_(pa.string()))])
_STAGED_ROWS = 1000
_STAGED_CHARACTERS = 1 << 24
_SENTENCES_A_BATCH = 8192
_PROGRESS_SECONDS = 0.25
EXAMPLES = 3
"""Ids of dropped documents that are kept for each reason."""


class TaskError(EarlyBertError):
    """A task that failed for a reason outside the sources; what was finished stays, the same command goes
    on."""


def is_split_by_file(paths: list[Path], tasks: int) -> bool:
    """A source of many files gives each task its own; one of few is read by every task, each keeps its
    documents."""
    return len(paths) >= tasks


class Read(PipelineStep):
    """Stream this task's share of the raw documents."""

    name, type = "sources", "1 - read"

    def __init__(self, inputs: list[tuple[Source, list[Path]]], *, progress: Path) -> None:
        super().__init__()
        self.inputs = inputs
        self.progress = progress

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        ticker = _Ticker(self.progress / f"read-{rank:05d}")
        for index, (source, paths) in enumerate(self.inputs):
            by_file = is_split_by_file(paths, world_size)
            for place, path in enumerate(paths):
                if by_file and place % world_size != rank:
                    continue
                if by_file or source.can_split(path):
                    part = (0, 1) if by_file else (rank, world_size)
                    mine = source.part(path, part, progress=ticker.at)
                else:
                    every = source.documents(path, progress=ticker.at)
                    mine = islice(every, (rank - place) % world_size, None, world_size)
                for raw in mine:
                    details = raw.details | {"dropped": raw.dropped}
                    self.stat_update(f"{index}|documents")
                    yield Document(text=raw.text, id=raw.id, metadata={"source": index, "details": details})
                ticker.next()
        ticker.close()


class Clean(PipelineStep):
    """Turn raw text into plain prose; drop what is empty, too short or in another language.

    Of what is dropped for each reason a task keeps the first ids in `examples`/RANK.json.
    """

    name, type = "prose", "2 - clean"

    def __init__(
        self, sources: list[Source], *, min_words: int, only_language: str | None, examples: Path
    ) -> None:
        super().__init__()
        self.sources = sources
        self.min_words = min_words
        self.only_language = only_language
        self.examples = examples

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        examples: dict[str, list[str]] = {}
        for document in data:
            index = document.metadata["source"]
            raw = Raw(id=document.id, text=document.text, details=document.metadata.pop("details"))
            reason = raw.details["dropped"]
            words = 0
            if reason is None:
                with self.track_time():
                    document.text = self.sources[index].clean(raw)
                    words = len(document.text.split())
                    reason = self._why_dropped(document.text, words, stub=raw.details.get("stub", False))
            if reason is not None:
                label = f"{index}|dropped|{reason}"
                self.stat_update(label)
                if len(held := examples.setdefault(label, [])) < EXAMPLES:
                    held.append(document.id)
                continue
            self.stat_update(f"{index}|words", value=words)
            self.stat_update(f"{index}|characters", value=len(document.text))
            yield document
        write_atomically(self.examples / f"{rank:05d}.json", json.dumps(examples))

    def _why_dropped(self, text: str, words: int, *, stub: bool) -> str | None:
        if not words:
            return "empty after cleaning"
        if words < self.min_words:
            return f"fewer than {self.min_words} words"
        if stub and words < STUB_WORDS:
            return f"a stub of fewer than {STUB_WORDS} words"
        if self.only_language is not None:
            found = sentences.language_of(text)
            if found != self.only_language:
                return f"in {found}, not {self.only_language}"
        return None


class Split(PipelineStep):
    """Split the prose into sentences."""

    name, type = "sentences", "3 - split"

    def __init__(self, *, language: str) -> None:
        super().__init__()
        self.language = language

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            with self.track_time():
                document.metadata["sentences"] = sentences.split(document.text, language=self.language)
            yield document


class Stage(PipelineStep):
    """Keep the sentences in the work folder, one Arrow file a task."""

    name, type = "staged", "4 - write"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        path = staged_file(self.folder, rank)
        temporary = path.with_suffix(".tmp")
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))
        rows: list[dict[str, Any]] = []
        characters = 0
        with open(temporary, "wb") as file, pa.ipc.new_stream(file, _STAGED, options=options) as stream:
            for document in data:
                values = document.metadata
                rows.append({"source": values["source"], "id": document.id, "sentences": values["sentences"]})
                characters += len(document.text)
                if len(rows) >= _STAGED_ROWS or characters >= _STAGED_CHARACTERS:
                    stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=_STAGED))
                    rows, characters = [], 0
                yield document
            if rows:
                stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=_STAGED))
        os.replace(temporary, path)


class Unstage(PipelineStep):
    """Read back what this task staged."""

    name, type = "staged", "5 - read"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for source, id, split in staged(staged_file(self.folder, rank)):
            metadata = {"source": source, "sentences": split}
            yield Document(text=" ".join(split), id=id, metadata=metadata)


class Tokenize(PipelineStep):
    """Turn sentences into token ids, many documents a call into the Rust side."""

    name, type = "WordPiece", "6 - tokenize"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tokenizer = vocab.load(self.folder)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        unknown = tokenizer.token_to_id("[UNK]")
        held: list[Document] = []
        count = 0
        for document in data:
            held.append(document)
            count += len(document.metadata["sentences"])
            if count >= _SENTENCES_A_BATCH:
                yield from self._encode(tokenizer, held, unknown=unknown)
                held, count = [], 0
        yield from self._encode(tokenizer, held, unknown=unknown)

    def _encode(
        self, tokenizer: Any, documents: list[Document], *, unknown: int | None
    ) -> Iterator[Document]:
        with self.track_time():
            texts = [s for document in documents for s in document.metadata["sentences"]]
            encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for document in documents:
            index = document.metadata["source"]
            ids = [next(encoded).ids for _ in document.metadata.pop("sentences")]
            lengths = np.array([len(sentence) for sentence in ids if sentence], dtype=np.int64)
            if not lengths.size:
                self.stat_update(f"{index}|dropped|no token")
                continue
            tokens = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=int(lengths.sum()))
            document.metadata["tokens"] = tokens
            document.metadata["sentence_starts"] = np.cumsum(lengths) - lengths
            self.stat_update(f"{index}|kept")
            self.stat_update(f"{index}|sentences", value=len(lengths))
            self.stat_update(f"{index}|tokens", value=len(tokens))
            self.stat_update(f"{index}|unknown", value=int(np.count_nonzero(tokens == unknown)))
            yield document


class Shard(PipelineStep):
    """Write this task's shard, and beside it what the manifest will say about it."""

    name, type = "shards", "7 - write"

    def __init__(self, folder: Path, *, names: list[str], vocab_size: int, progress: Path) -> None:
        super().__init__()
        self.folder = folder
        self.names = names
        self.vocab_size = vocab_size
        self.progress = progress

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        ticker = _Ticker(self.progress / f"shard-{rank:05d}")
        path = self.folder / shard_name(rank, of=world_size)
        with ShardWriter(path, token_dtype=token_type_for(self.vocab_size)) as writer:
            for number, document in enumerate(data, start=1):
                values = document.metadata
                name = self.names[values["source"]]
                writer.add(values["tokens"], values["sentence_starts"], name, document.id)
                ticker.at(number)
                yield document
        ticker.close()
        assert writer.info is not None
        text = json.dumps(dataclasses.asdict(writer.info))
        write_atomically(self.folder / f"{path.name}.json", text)


def staged_file(folder: Path, rank: int) -> Path:
    """Name the file of sentences that task `rank` stages."""
    return folder / f"{rank:05d}.arrow"


def staged(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Stream (source index, document id, sentences) from a staged file."""
    with pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            columns = [batch.column(name) for name in ("source", "id", "sentences")]
            for row in range(batch.num_rows):
                source, id, split = (column[row].as_py() for column in columns)
                yield source, id, split


def totals(folder: Path, *, tasks: int) -> dict[str, int]:
    """Add up the counts that every task's steps have saved under an executor's folder."""
    result: dict[str, int] = {}
    for rank in range(tasks):
        for step in json.loads((folder / "stats" / f"{rank:05d}.json").read_text()):
            for label, value in step["stats"].items():
                total = value["total"] if isinstance(value, dict) else value
                result[label] = result.get(label, 0) + int(total)
    return result


class Executor(LocalPipelineExecutor):
    """LocalPipelineExecutor with processes that may die, and errors that stay one message."""

    def run(self) -> None:
        """Run the tasks that have no completion marker.

        Raises EarlyBertError as a task raised it, and TaskError for anything else, naming the task's log.
        """
        ranks = self.get_incomplete_ranks()
        if self.workers == 1 or len(ranks) <= 1:
            for rank in ranks:
                deepcopy(self).run_task(rank)
        else:
            self._run_in_processes(ranks)

    def run_task(self, rank: int) -> None:
        """Run one task; datatrove's log goes to the task's file only."""
        from loguru import logger

        try:
            with contextlib.redirect_stderr(_Nowhere()):
                self._run_for_rank(rank, 1)
        except EarlyBertError:
            raise
        except Exception as error:
            log = Path(self.logging_dir.path) / "logs" / f"task_{rank:05d}.log"
            raise TaskError(
                f"task {rank} failed: {type(error).__name__}: {error}; its log is {log}, and the same "
                "command goes on from the finished tasks"
            ) from error
        finally:
            logger.remove()

    def _run_in_processes(self, ranks: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        taken = context.Value("l", 0)
        failures = context.SimpleQueue()
        workers = [
            context.Process(target=_work, args=(self, ranks, taken, failures), daemon=True)
            for _ in range(min(self.workers, len(ranks)))
        ]
        try:
            for worker in workers:
                worker.start()
            alive: dict[Any, Any] = {worker.sentinel: worker for worker in workers}
            while alive:
                for sentinel in multiprocessing.connection.wait(list(alive)):
                    worker = alive.pop(sentinel)
                    worker.join()
                    if not failures.empty():
                        kind, message = failures.get()
                        raise kind(message)
                    if worker.exitcode:
                        raise TaskError(
                            f"a worker process ended with code {worker.exitcode} (-9 is often: out of "
                            "memory); use fewer --workers; the same command goes on from the finished tasks"
                        )
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
                    worker.join()


def _work(executor: Executor, ranks: list[int], taken: Any, failures: Any) -> None:
    """Take tasks until none is left (the body of a worker process)."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    while True:
        with taken.get_lock():
            place = taken.value
            taken.value += 1
        if place >= len(ranks):
            return
        try:
            deepcopy(executor).run_task(ranks[place])  # a step's statistics belong to one task
        except EarlyBertError as error:
            failures.put((type(error), str(error)))
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def _end_with_parent() -> None:
    """Leave no worker behind a killed command: it would write into the work folder of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Nowhere(io.TextIOBase):
    """A stderr that forgets."""

    def write(self, text: str) -> int:
        return len(text)


class _Ticker:
    """Tell the process that shows the progress bar how far a task is, through a small file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._now = 0
        self._told = 0.0

    def at(self, done: int) -> None:
        """Note how much of the current file is done."""
        self._now = done
        if time.monotonic() - self._told > _PROGRESS_SECONDS:
            self.close()
            self._told = time.monotonic()

    def next(self) -> None:
        """Go on to the next file."""
        self._before += self._now
        self._now = 0

    def close(self) -> None:
        """Write what is done so far."""
        self._path.write_text(str(self._before + self._now))
