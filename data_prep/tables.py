"""Rows of tables (Parquet files and hub corpora) as documents: a column "text", and whichever of "id" and
"title" is there.

BookCorpus has one sentence a row on the hub and no sign of where a book ends; rows that short are put
together again in their order. A file is read a batch of rows at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.words import count_words
from earlybert.config import EarlyBertError

Row = tuple[str, str]
"""(id, text)"""
_ROWS_A_BATCH = 1000
_LOOKED_AT = 1000
_SENTENCE_WORDS = 40
"""Rows of a median below this, each in one line, are sentences of longer texts."""
_DOCUMENT_CHARACTERS = 200_000
MAGIC = b"PAR1"


def documents(path: Path, *, progress: Callable[[int], None]) -> Iterator[Row]:
    """Stream a Parquet file's documents; raises EarlyBertError naming file and row group."""
    return whole(_rows(path, progress), path.name)


def _rows(path: Path, progress: Callable[[int], None]) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise EarlyBertError(
            f"{path}: not a whole Parquet file ({_first_line(error)}); get it again"
        ) from error
    with file:
        names = set(file.schema_arrow.names)
        if "text" not in names or not _is_text(file.schema_arrow.field("text").type):
            raise EarlyBertError(
                f'{path}: no column "text" of strings (columns: {", ".join(sorted(names))}); rename the '
                "column that holds the text"
            )
        columns = ["text", *sorted(names & {"id"})]
        size, groups, number = path.stat().st_size, max(1, file.num_row_groups), 0
        for group in range(file.num_row_groups):
            try:
                for batch in file.iter_batches(_ROWS_A_BATCH, row_groups=[group], columns=columns):
                    texts = batch.column("text").to_pylist()
                    ids = batch.column("id").to_pylist() if "id" in columns else [None] * len(texts)
                    for id, text in zip(ids, texts, strict=True):
                        yield f"{path.name}:{number}" if id is None else str(id), text or ""
                        number += 1
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise EarlyBertError(
                    f"{path}, row group {group}: cannot be read after row {number} ({_first_line(error)}); "
                    "the file is damaged, get it again"
                ) from error
            progress(size * (group + 1) // groups)


def whole(rows: Iterator[Row], name: str) -> Iterator[Row]:
    """The rows, or where they are sentences, documents of about `_DOCUMENT_CHARACTERS` of them in order."""
    first = list(islice(rows, _LOOKED_AT))
    texts = [text for _, text in first if text.strip()]
    every = chain(first, rows)
    if not texts or statistics.median(map(count_words, texts)) >= _SENTENCE_WORDS:
        yield from every
        return
    if any("\n" in text.strip() for text in texts):
        yield from every
        return
    held: list[str] = []
    length = part = 0
    for _, text in every:
        held.append(text)
        length += len(text) + 1
        if length >= _DOCUMENT_CHARACTERS:
            yield f"{name}#{part}", "\n".join(held)
            held, length, part = [], 0, part + 1
    if held:
        yield f"{name}#{part}", "\n".join(held)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
