"""The pipeline steps of `build`.

Two pipelines of datatrove steps: Read, Clean, Split, Stage (raw files to sentences in the work folder) and
Unstage, Tokenize, Shard (sentences to shards). Task r of N does the same documents whichever process runs
it and writes one file, so the result does not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_prep import sentences
from data_prep.raw import Raw
from data_prep.report import Examples
from data_prep.sources import Place, Source
from data_prep.tokens import Tokens
from data_prep.wikipedia import STUB_WORDS
from data_prep.words import count_words
from earlybert.config import write_atomically
from earlybert.shards import ShardWriter, shard_name, token_type_for

_STAGED = pa.schema([("source", pa.uint16()), ("id", pa.string()), ("sentences", pa.list_(pa.string()))])
_STAGED_ROWS = 1000
_STAGED_CHARACTERS = 1 << 21
_SENTENCES_A_BATCH = 8192
_PROGRESS_SECONDS = 0.25


def is_split_by_file(paths: Sequence[Place], tasks: int) -> bool:
    """A source of many files gives each task its own; one of few is read by every task, each keeps its
    documents."""
    return len(paths) >= tasks


class Read(PipelineStep):
    """Stream this task's share of the raw documents."""

    name, type = "sources", "1 - read"

    def __init__(self, inputs: list[tuple[Source, list[Place]]], *, progress: Path) -> None:
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
                    self.stat_update(f"{index}|documents")
                    yield Document(text=raw.text, id=raw.id, metadata={"source": index, "raw": raw})
                ticker.next()
        ticker.close()


class Clean(PipelineStep):
    """Turn raw text into plain prose; drop what is empty, too short or in another language.

    Of what is dropped for each reason a task keeps the first ids in the folder `examples`.
    """

    name, type = "prose", "2 - clean"

    def __init__(
        self,
        sources: list[Source],
        *,
        min_words: int,
        max_words: int | None,
        only_language: str | None,
        examples: Path,
    ) -> None:
        super().__init__()
        self.sources = sources
        self.min_words = min_words
        self.max_words = max_words
        self.only_language = only_language
        self.examples = examples

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        examples = Examples(self.examples / f"clean-{rank:05d}.json")
        for document in data:
            index = document.metadata["source"]
            raw: Raw = document.metadata.pop("raw")
            reason, words = raw.dropped, 0
            if reason is None:
                with self.track_time():
                    document.text = self.sources[index].clean(raw)
                    words = count_words(document.text)
                    reason = self._why_dropped(document.text, words, stub=raw.details.get("stub", False))
            if reason is not None:
                label = f"{index}|dropped|{reason}"
                self.stat_update(label)
                examples.add(label, document.id)
                continue
            self.stat_update(f"{index}|words", value=words)
            self.stat_update(f"{index}|characters", value=len(document.text))
            yield document
        examples.write()

    def _why_dropped(self, text: str, words: int, *, stub: bool) -> str | None:
        if not words:
            return "empty after cleaning"
        if words < self.min_words:
            return f"fewer than {self.min_words} words"
        if self.max_words is not None and words > self.max_words:
            return f"more than {self.max_words} words"
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
    """Turn sentences into token ids, many documents at a time."""

    name, type = "WordPiece", "6 - tokenize"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tokens = Tokens(self.folder)
        held: list[Document] = []
        count = 0
        for document in data:
            held.append(document)
            count += len(document.metadata["sentences"])
            if count >= _SENTENCES_A_BATCH:
                yield from self._encode(tokens, held)
                held, count = [], 0
        yield from self._encode(tokens, held)

    def _encode(self, tokens: Tokens, documents: list[Document]) -> Iterator[Document]:
        split = [document.metadata.pop("sentences") for document in documents]
        with self.track_time():
            ids, lengths = tokens.encode(list(chain.from_iterable(split)))
        ends = np.cumsum(list(map(len, split)), dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        first = 0
        for document, last in zip(documents, ends.tolist(), strict=True):
            index = document.metadata["source"]
            own = ids[starts[first] : starts[last]]
            own_lengths = lengths[first:last]
            first = last
            if not own.size:
                self.stat_update(f"{index}|dropped|no token")
                continue
            own_lengths = own_lengths[own_lengths > 0]
            document.metadata["tokens"] = own
            document.metadata["sentence_starts"] = np.cumsum(own_lengths) - own_lengths
            self.stat_update(f"{index}|kept")
            self.stat_update(f"{index}|sentences", value=len(own_lengths))
            self.stat_update(f"{index}|tokens", value=len(own))
            self.stat_update(f"{index}|unknown", value=int(np.count_nonzero(own == tokens.unknown)))
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
    with pa.OSFile(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            columns = [batch.column(name) for name in ("source", "id", "sentences")]
            for row in range(batch.num_rows):
                source, id, split = (column[row].as_py() for column in columns)
                yield source, id, split


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
