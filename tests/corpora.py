"""Small corpora of random tokens, written through the real shard writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from earlybert.shards import Corpus, Manifest, ShardWriter, shard_name, tokenizer_sha256, write_manifest

PAD, UNK, CLS, SEP, MASK = range(5)
V = 500
Document = tuple[np.ndarray, list[int]]


def write_corpus(
    folder: Path, documents: list[Document], *, sources: list[str] | None = None, pieces: Any = None
) -> Corpus:
    """Write documents as two shards beside a vocabulary in which every third token continues a word, or
    beside the tokenizer `pieces`."""
    sources = sources or ["text"] * len(documents)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    vocabulary = {token: id for id, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    vocabulary |= {f"##p{id}" if id % 3 == 0 else f"w{id}": id for id in range(5, V)}
    if pieces is None:
        (tokenizer / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    else:
        pieces.save_pretrained(tokenizer)
    infos = []
    half = len(documents) // 2
    for index, part in enumerate([range(half), range(half, len(documents))]):
        with ShardWriter(folder / shard_name(index, of=2), token_dtype="uint16") as writer:
            for number in part:
                writer.add(*documents[number], sources[number], str(number - part.start))
        infos.append(writer.close())
    write_manifest(
        folder,
        Manifest(
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            vocab_size=V if pieces is None else len(pieces),
            token_dtype="uint16",
            documents=sum(info.documents for info in infos),
            sentences=sum(info.sentences for info in infos),
            tokens=sum(info.tokens for info in infos),
            shards=tuple(infos),
            fingerprint="f" * 64,
            settings={},
            sources={},
            statistics={},
        ),
    )
    return Corpus.open(folder)


def random_documents(count: int, *, longest: int, seed: int = 0, tokens: int = V) -> list[Document]:
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        ids = rng.integers(5, tokens, rng.integers(1, longest))
        inner = rng.integers(1, max(2, len(ids)), 1 + len(ids) // 12)
        documents.append((ids, [0, *sorted({int(start) for start in inner if start < len(ids)})]))
    return documents
