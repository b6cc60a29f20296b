"""The corpus on disk: Arrow shards of token ids, one row a document, and a manifest that is written last.

A corpus folder holds `shard-00000-of-00004.arrow` and so on (Arrow IPC streams, which
`datasets.Dataset.from_file` opens), `tokenizer/` (a Hugging Face tokenizer folder) and `manifest.json`. No
manifest: not a corpus. The surprise: no special token is stored and nothing is cut to a length; framing,
packing and masking happen when the shards are read, so one corpus serves every sequence length and
objective.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from earlybert.config import EarlyBertError, read_json, sync_folder, write_atomically

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"

TokenType = Literal["uint16", "uint32"]

_ROWS_A_BATCH = 1000
_TOKENS_A_BATCH = 1_000_000  # bounds the writer's memory where documents are whole books


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says about one shard file."""

    name: str
    documents: int
    sentences: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a corpus folder holds; `manifest.json` is this, and it is written when all else is in place."""

    tokenizer_sha256: str
    vocab_size: int
    token_dtype: TokenType
    documents: int
    sentences: int
    tokens: int
    shards: tuple[ShardInfo, ...]
    fingerprint: str
    """sha256 of the settings that the corpus was prepared with."""
    settings: dict[str, Any]
    sources: dict[str, dict[str, Any]]
    """Documents and tokens of each source."""
    statistics: dict[str, Any]
    """What went in and what was dropped, in any form that JSON takes."""
    version: int = FORMAT_VERSION

    @property
    def content(self) -> str:
        """sha256 of what is in the corpus: its shards' and its tokenizer's checksums, in order.

        `fingerprint` says how a corpus was asked for; two texts under one path have the same.
        """
        parts = [shard.sha256 for shard in self.shards] + [self.tokenizer_sha256]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def shard_name(index: int, *, of: int) -> str:
    """Name shard `index` of `of`."""
    return f"shard-{index:05d}-of-{of:05d}.arrow"


def token_type_for(vocab_size: int) -> TokenType:
    """Choose the smallest stored type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hash a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_sha256(folder: str | os.PathLike[str]) -> str:
    """Hash the `tokenizer.json` of a Hugging Face tokenizer folder; raises EarlyBertError if missing."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise EarlyBertError(
            f"{path} is missing; give a folder that a fast Hugging Face tokenizer was saved to"
        )
    return file_sha256(path)


class ShardWriter:
    """Write one shard: `add` documents, then `close` (or leave the `with` block); the file appears whole.

    Leaving the block through an exception removes the unfinished file.
    """

    def __init__(self, path: str | os.PathLike[str], *, token_dtype: TokenType) -> None:
        if token_dtype not in ("uint16", "uint32"):
            raise EarlyBertError(f"token_dtype = {token_dtype!r}: choose 'uint16' or 'uint32'")
        self.path = Path(path)
        self.info: ShardInfo | None = None
        self._dtype = np.dtype(token_dtype)
        token, start = pa.from_numpy_dtype(self._dtype), pa.uint32()
        self._schema = pa.schema(
            [
                ("tokens", pa.list_(token)),
                ("sentence_starts", pa.list_(start)),
                ("source", pa.string()),
                ("id", pa.string()),
            ]
        )
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close() or _discard()
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._documents = self._sentences = self._tokens = 0
        self._empty_batch()

    def add(
        self,
        tokens: Sequence[int] | np.ndarray,
        sentence_starts: Sequence[int] | np.ndarray,
        source: str,
        id: str,
    ) -> None:
        """Append a document: its token ids without specials, and where in them each sentence starts.

        Raises EarlyBertError for an empty document, starts that do not ascend from 0, or an id too large.
        """
        ids, starts = np.asarray(tokens), np.asarray(sentence_starts)
        if not ids.size or not starts.size:
            raise EarlyBertError(f"document {id!r} of {source!r} has no tokens; drop it before it is written")
        if starts[0] != 0 or np.any(np.diff(starts.astype(np.int64)) <= 0) or starts[-1] >= ids.size:
            raise EarlyBertError(
                f"document {id!r} of {source!r}: sentence starts must ascend from 0 and stay below its "
                f"{ids.size} tokens, got {starts[:8].tolist()}..."
            )
        if ids.min() < 0 or ids.max() > np.iinfo(self._dtype).max:
            raise EarlyBertError(
                f"document {id!r} of {source!r}: token id {int(ids.max())} does not fit {self._dtype}; "
                "write uint32 shards"
            )
        self._rows_tokens.append(ids.astype(self._dtype, copy=True))
        self._rows_starts.append(starts.astype(np.uint32, copy=True))
        self._rows_source.append(source)
        self._rows_id.append(id)
        self._batch_tokens += ids.size
        self._documents += 1
        self._sentences += starts.size
        self._tokens += ids.size
        if len(self._rows_id) >= _ROWS_A_BATCH or self._batch_tokens >= _TOKENS_A_BATCH:
            self._flush()

    def close(self) -> ShardInfo:
        """Finish the file: flush, fsync, rename; return what the manifest says about it."""
        if self.info is not None:
            return self.info
        self._flush()
        self._stream.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest, size = file_sha256(self._temporary), self._temporary.stat().st_size
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        self.info = ShardInfo(
            name=self.path.name,
            documents=self._documents,
            sentences=self._sentences,
            tokens=self._tokens,
            bytes=size,
            sha256=digest,
        )
        return self.info

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self.info is None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _empty_batch(self) -> None:
        self._rows_tokens: list[np.ndarray] = []
        self._rows_starts: list[np.ndarray] = []
        self._rows_source: list[str] = []
        self._rows_id: list[str] = []
        self._batch_tokens = 0

    def _flush(self) -> None:
        if not self._rows_id:
            return
        columns = [
            _lists(self._rows_tokens),
            _lists(self._rows_starts),
            pa.array(self._rows_source, pa.string()),
            pa.array(self._rows_id, pa.string()),
        ]
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))
        self._empty_batch()


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `manifest.json` atomically; call it last, when every shard and the tokenizer are in place."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(Path(folder) / MANIFEST, text + "\n")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read a corpus folder's manifest; raises EarlyBertError if missing, malformed or of another version."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise EarlyBertError(
            f"{folder} is not a finished corpus: it has no {MANIFEST}; prepare it with scripts/prepare.py"
        )
    values = read_json(path)
    if values.get("version") != FORMAT_VERSION:
        raise EarlyBertError(
            f"{path} has version {values.get('version')!r}, this program reads {FORMAT_VERSION}; "
            "prepare the corpus again"
        )
    try:
        shards = tuple(ShardInfo(**shard) for shard in values.pop("shards"))
        return Manifest(shards=shards, **values)
    except (TypeError, KeyError) as error:
        raise EarlyBertError(
            f"{path} is not a corpus manifest ({error}); prepare the corpus again"
        ) from error


class Corpus:
    """A memory-mapped corpus: documents by index, as views into the shard files."""

    def __init__(self, folder: Path, manifest: Manifest, batches: list[_Batch]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tokenizer_folder = folder / TOKENIZER
        self._batches = batches
        self._firsts = np.cumsum([0] + [batch.documents for batch in batches])
        lengths = [np.diff(batch.token_offsets).astype(np.int64) for batch in batches]
        self.document_lengths: np.ndarray = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        """Tokens of each document, int64 [documents]."""

    @functools.cached_property
    def sources(self) -> list[str]:
        """Names of the sources that the documents come from, sorted."""
        return sorted({name for batch in self._batches for name in pc.unique(batch.source).to_pylist()})

    @functools.cached_property
    def document_sources(self) -> np.ndarray:
        """Of each document the place of its source in `sources`, int64 [documents]."""
        names = pa.array(self.sources)
        parts = [np.from_dlpack(pc.index_in(batch.source, names)) for batch in self._batches]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: Literal["size", "checksum"] = "size") -> Corpus:
        """Map the shards of a corpus folder.

        `verify="size"` compares file sizes and counts with the manifest, `"checksum"` also hashes every byte.
        Raises EarlyBertError naming the file that is missing or differs.
        """
        root = Path(folder)
        manifest = read_manifest(root)
        found = tokenizer_sha256(root / TOKENIZER)
        if found != manifest.tokenizer_sha256:
            raise EarlyBertError(
                f"{root / TOKENIZER} has sha256 {found[:12]}, the shards were written with "
                f"{manifest.tokenizer_sha256[:12]}; put that tokenizer back or prepare the corpus again"
            )
        batches: list[_Batch] = []
        for shard in manifest.shards:
            batches.extend(_map_shard(root / shard.name, shard, manifest=manifest, verify=verify))
        corpus = cls(root, manifest, batches)
        tokens = int(corpus.document_lengths.sum())
        if len(corpus) != manifest.documents or tokens != manifest.tokens:
            raise EarlyBertError(
                f"{root} holds {len(corpus)} documents and {tokens} tokens, its manifest says "
                f"{manifest.documents} and {manifest.tokens}; prepare the corpus again"
            )
        return corpus

    def flaws(self, *, only: slice | None = None) -> list[str]:
        """Hash every byte of the shards, or of a share of them, and say which do not match the manifest."""
        return [
            wrong
            for shard in self.manifest.shards[only or slice(None)]
            if (wrong := _checksum_flaw(self.folder / shard.name, shard)) is not None
        ]

    def __len__(self) -> int:
        return len(self.document_lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is spawned rather than forked maps the files again; the bytes are never copied.
        return (Corpus.open, (self.folder,))

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a document's tokens and sentence starts as read-only views (no copy)."""
        batch, row = self._row(index)
        tokens = batch.tokens[batch.token_offsets[row] : batch.token_offsets[row + 1]]
        return tokens, batch.starts[batch.start_offsets[row] : batch.start_offsets[row + 1]]

    def origin(self, index: int) -> tuple[str, str]:
        """Return the source and id that a document was stored with."""
        batch, row = self._row(index)
        return batch.source[row].as_py(), batch.id[row].as_py()

    def _row(self, index: int) -> tuple[_Batch, int]:
        if not 0 <= index < len(self.document_lengths):
            raise IndexError(f"document {index} of {len(self)}")
        at = int(self._firsts.searchsorted(index, side="right")) - 1
        return self._batches[at], index - int(self._firsts[at])


@dataclass(frozen=True)
class _Batch:
    """One record batch of a shard, its columns as numpy views."""

    documents: int
    tokens: np.ndarray
    token_offsets: np.ndarray
    starts: np.ndarray
    start_offsets: np.ndarray
    source: Any
    id: Any


def _lists(rows: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(row) for row in rows]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))


def _map_shard(path: Path, shard: ShardInfo, *, manifest: Manifest, verify: str) -> list[_Batch]:
    if not path.is_file():
        raise EarlyBertError(f"shard {path} is missing; prepare the corpus again")
    size = path.stat().st_size
    if size != shard.bytes:
        raise EarlyBertError(
            f"shard {path} has {size} bytes, the manifest says {shard.bytes}; prepare the corpus again"
        )
    wrong = _checksum_flaw(path, shard) if verify == "checksum" else None
    if wrong is not None:
        raise EarlyBertError(wrong)
    try:
        with pa.memory_map(str(path)) as mapped:
            batches = [_batch(batch) for batch in pa.ipc.open_stream(mapped)]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise EarlyBertError(
            f"shard {path} is not a readable Arrow stream ({error}); prepare the corpus again"
        ) from error
    if any(batch.tokens.dtype != np.dtype(manifest.token_dtype) for batch in batches):
        raise EarlyBertError(
            f"shard {path} does not hold the {manifest.token_dtype} tokens that the manifest announces; "
            "prepare the corpus again"
        )
    return batches


def _checksum_flaw(path: Path, shard: ShardInfo) -> str | None:
    found = file_sha256(path)
    if found == shard.sha256:
        return None
    return f"shard {path} has sha256 {found}, the manifest says {shard.sha256}; prepare the corpus again"


def _batch(batch: pa.RecordBatch) -> _Batch:
    tokens, starts = batch.column("tokens"), batch.column("sentence_starts")
    # Not `to_numpy`, which imports pandas for the sake of types that are not here. Neither copies.
    return _Batch(
        documents=batch.num_rows,
        tokens=np.from_dlpack(tokens.values),
        token_offsets=np.from_dlpack(tokens.offsets),
        starts=np.from_dlpack(starts.values),
        start_offsets=np.from_dlpack(starts.offsets),
        source=batch.column("source"),
        id=batch.column("id"),
    )
