"""A corpus as Megatron's indexed dataset, PREFIX.bin and PREFIX.idx, and the way back.

A sequence of theirs is a sentence of ours and their document index says where documents begin. Ids are
written as int32: the codes of other types differ between Megatron and DeepSpeed. Little-endian.
"""

from __future__ import annotations

import os
import shutil
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep import vocab
from earlybert.config import EarlyBertError, sync_folder
from earlybert.shards import (
    MANIFEST,
    TOKENIZER,
    Corpus,
    Manifest,
    ShardWriter,
    shard_name,
    token_type_for,
    tokenizer_sha256,
    write_manifest,
)

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_INT32 = 4
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, _INT32: np.int32, 5: np.int64}
"""Codes on which Megatron and DeepSpeed agree; 6 and above they give to other types each."""
_HEADER = struct.Struct("<9sQBQQ")


def write(corpus: Corpus, prefix: Path) -> tuple[int, int]:
    """Write PREFIX.bin and PREFIX.idx; (documents, sequences). Both appear whole or not at all."""
    paths = _pair(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    hidden = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    lengths: list[np.ndarray] = []
    counts = np.zeros(len(corpus) + 1, dtype=np.int64)
    try:
        with open(hidden[0], "wb") as file:
            for index in range(len(corpus)):
                tokens, starts = corpus.document(index)
                file.write(tokens.astype("<i4").tobytes())
                lengths.append(np.diff(starts.astype(np.int64), append=len(tokens)))
                counts[index + 1] = len(starts)
            os.fsync(file.fileno())
        sizes = np.concatenate(lengths)
        pointers = 4 * (np.cumsum(sizes) - sizes)
        with open(hidden[1], "wb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, _INT32, len(sizes), len(counts)))
            for array, kind in ((sizes, "<i4"), (pointers, "<i8"), (np.cumsum(counts), "<i8")):
                file.write(array.astype(kind).tobytes())
            os.fsync(file.fileno())
        for temporary, path in zip(hidden, paths, strict=True):
            os.replace(temporary, path)
        sync_folder(prefix.parent)
    finally:
        for temporary in hidden:
            temporary.unlink(missing_ok=True)
    return len(corpus), len(sizes)


def read(prefix: Path, *, tokenizer: Path, out: Path, shards: int) -> Manifest:
    """Make a corpus folder of PREFIX.bin and PREFIX.idx; `tokenizer`: the folder whose ids they are.

    Raises EarlyBertError where the files do not hold together, or an id is not the tokenizer's; `out` is not
    there then.
    """
    out = out.absolute()  # "." has no name of its own
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EarlyBertError(f"{out} exists and is not an empty folder; choose another --out")
    size = vocab.load(tokenizer).get_vocab_size()
    tokens, pointers, lengths, documents = _index(prefix, tokenizer_size=size)
    hidden = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        try:
            (hidden / TOKENIZER).parent.mkdir(parents=True)
        except OSError as error:
            raise EarlyBertError(f"{out} cannot be made: {error.strerror}; choose another --out") from error
        shutil.copytree(tokenizer, hidden / TOKENIZER)
        infos = []
        bounds = np.linspace(0, len(documents) - 1, shards + 1).astype(int)
        for number, (first, last) in enumerate(pairwise(bounds.tolist())):
            path = hidden / shard_name(number, of=shards)
            with ShardWriter(path, token_dtype=token_type_for(size)) as writer:
                for document in range(first, last):
                    begin, end = int(documents[document]), int(documents[document + 1])
                    held = [(p, n) for p, n in zip(pointers[begin:end], lengths[begin:end], strict=True) if n]
                    if not held:
                        continue  # Megatron allows an empty document
                    parts = [tokens[p : p + n] for p, n in held]
                    starts = np.cumsum([0, *(n for _, n in held[:-1])])
                    writer.add(np.concatenate(parts), starts, "megatron", f"{prefix.name}:{document}")
            infos.append(writer.close())
        kept = sum(info.documents for info in infos)
        manifest = Manifest(
            tokenizer_sha256=tokenizer_sha256(hidden / TOKENIZER),
            vocab_size=size,
            token_dtype=token_type_for(size),
            documents=kept,
            sentences=sum(info.sentences for info in infos),
            tokens=sum(info.tokens for info in infos),
            shards=tuple(infos),
            fingerprint=infos[0].sha256,
            settings={"megatron": prefix.name},
            sources={"megatron": {"documents": kept, "tokens": sum(info.tokens for info in infos)}},
            statistics={"sources": []},
        )
        write_manifest(hidden, manifest)
        assert (hidden / MANIFEST).exists()
        if out.exists():
            out.rmdir()
        os.rename(hidden, out)
        return manifest
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _pair(prefix: Path) -> tuple[Path, Path]:
    """PREFIX.bin and PREFIX.idx."""
    if prefix.name in ("", ".."):
        raise EarlyBertError(f"{prefix} is a folder; give the files' prefix, such as {prefix / 'data'}")
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


def _index(prefix: Path, *, tokenizer_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(all ids, first id of each sequence, length of each sequence, first sequence of each document + 1)."""
    binary, index = _pair(prefix)
    for path in (binary, index):
        if not path.is_file() or not path.stat().st_size:
            raise EarlyBertError(f"{path}: missing or empty; give the prefix of a .bin and a .idx file")
    raw = np.memmap(index, dtype=np.uint8, mode="r")
    if len(raw) < _HEADER.size:
        raise EarlyBertError(f"{index}: too short for an index; it is truncated, get it again")
    magic, version, code, sequences, entries = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != _VERSION:
        raise EarlyBertError(f"{index}: not a Megatron index of version {_VERSION} (MMIDIDX)")
    if code not in _TYPES:
        raise EarlyBertError(
            f"{index}: ids of type {code}, which Megatron and DeepSpeed read differently; write them as int32"
        )
    expected = _HEADER.size + 12 * sequences + 8 * entries
    if len(raw) != expected:
        raise EarlyBertError(f"{index} has {len(raw)} bytes, its header says {expected}; get it again")
    body = raw[_HEADER.size :]
    lengths = body[: 4 * sequences].view("<i4").astype(np.int64)
    starts = body[4 * sequences : 12 * sequences].view("<i8")
    documents = body[12 * sequences :].view("<i8")
    kind = np.dtype(_TYPES[code])
    if binary.stat().st_size % kind.itemsize:
        raise EarlyBertError(
            f"{binary} has {binary.stat().st_size:,} bytes, no multiple of an id's {kind.itemsize}; it is "
            "truncated, get it again"
        )
    tokens = np.memmap(binary, dtype=kind, mode="r")
    whole = (starts % kind.itemsize == 0).all() and (starts // kind.itemsize + lengths <= len(tokens)).all()
    ascending = len(documents) > 1 and documents[0] == 0 and documents[-1] == sequences
    if not whole or not ascending or (np.diff(documents) < 0).any():
        raise EarlyBertError(f"{index} does not fit {binary} ({len(tokens):,} ids); get both again")
    if int(tokens.max()) >= tokenizer_size or int(tokens.min()) < 0:
        raise EarlyBertError(
            f"{binary} holds ids from {int(tokens.min())} to {int(tokens.max())}, the tokenizer has "
            f"{tokenizer_size}; give the tokenizer that it was written with"
        )
    return tokens, starts // kind.itemsize, lengths, documents
