"""Build a corpus folder: sources -> prose -> sentences -> WordPiece vocabulary -> Arrow shards -> manifest.

All work happens in `.work-FINGERPRINT` inside the output folder, so an interrupted run goes on where it
was, a run with other settings never meets its completion markers, and the folder holds either a whole
corpus or none. The result is a pure function of the settings and the sources: the number of worker
processes does not change a byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep import duplicates, folders, sentences, sources, steps, vocab
from data_prep.executors import TaskError, Where
from data_prep.report import EXAMPLES, megabytes, progress_bar, report
from data_prep.sources import Place, Source
from earlybert.config import EarlyBertError, SettingsError, sync_folder
from earlybert.shards import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardInfo,
    read_manifest,
    shard_name,
    token_type_for,
    tokenizer_sha256,
    write_manifest,
)

_PREPARATION_VERSION = 4
"""Raised where the same settings give other shards than before."""

_VOCABULARY_CHARACTERS = 256_000_000
"""The vocabulary is learnt from at most about this much text, whole documents chosen by the seed."""

_SMALL = 10_000
"""Documents; for fewer, starting processes takes longer than looking for duplicates."""


@dataclass(frozen=True)
class BuildSettings:
    """What a corpus is made of; every field but `where` shapes the result."""

    sources: tuple[str, ...]
    """SOURCE words such as "books:books.tar.xz"."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer folder to use; otherwise a vocabulary is learnt."""
    vocab_size: int | None = None
    """WordPieces to learn; 30522 where neither this nor a tokenizer is given."""
    tasks: int = 4
    """Parts that the work is cut in, and so the number of shards."""
    where: Where = field(default_factory=Where)
    """Processes of this machine or of a cluster."""
    letters: vocab.Letters = field(default_factory=vocab.Letters)
    """Whether upper case and accents are kept; a given tokenizer.json says it itself."""
    reserved: int = 0
    """At least so many pieces `[unused0]`, ... of a learnt vocabulary stand for nothing yet."""
    min_words: int = 15
    """Documents of fewer words are dropped."""
    max_words: int | None = None
    """Documents of more words are dropped; none where not given."""
    deduplicate: duplicates.Kind = "near"
    """Drop documents that are there twice: nearly, exactly, or keep them."""
    language: str = "en"
    """ISO 639 code of the language whose rules split the sentences."""
    only_language: bool = False
    """Drop documents that are in another language, by a guess from their beginning."""
    seed: int = 0
    """Chooses the documents that the vocabulary is learnt from, where there is more text than it needs."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise SettingsError(
                "no source: give at least one SOURCE, such as python-docs or text:notes/*.txt"
            )
        if len(set(self.sources)) < len(self.sources):
            raise SettingsError(f"a source is given twice: {' '.join(self.sources)}; give each once")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise SettingsError("--tokenizer and --vocab-size are both given; keep one")
        if self.tokenizer is not None and self.reserved:
            raise SettingsError(f"--tokenizer and --reserved {self.reserved} are both given; keep one")
        if self.vocab_size is not None:
            vocab.check_size(self.vocab_size)
        if not 1 <= self.tasks <= 99_999:
            raise SettingsError(f"--tasks {self.tasks}: choose from 1 to 99999")
        if self.deduplicate not in ("near", "exact", "none"):
            raise SettingsError(f"--deduplicate {self.deduplicate}: choose near, exact or none")
        if self.min_words < 0:
            raise SettingsError(f"--min-words {self.min_words}: at least 0")
        if self.max_words is not None and self.max_words < max(1, self.min_words):
            raise SettingsError(f"--max-words {self.max_words}: at least --min-words ({self.min_words})")
        if not 0 <= self.reserved <= 65_536:
            raise SettingsError(f"--reserved {self.reserved}: choose from 0 to 65536")
        sentences.check_language(self.language)


def build(
    settings: BuildSettings,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    tell: Callable[[str], None],
) -> Manifest:
    """Prepare a corpus in the folder `out` and return its manifest; done at once where it is there already.

    `tell` gets a line before and after each stage. Raises EarlyBertError for bad input, leaving nothing
    behind, for a folder that holds something else, and (keeping the finished tasks) for a task that died.
    """
    folder = Path(out)
    given = [sources.parse(word) for word in settings.sources]
    inputs = [
        (source, [place.absolute() if isinstance(place, Path) else place for place in sources.files(source)])
        for source in given
    ]
    before = [sources.version(path) for _, paths in inputs for path in paths]
    identity = _identity(settings, inputs)
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if (folder / MANIFEST).exists() and not overwrite:
        manifest = read_manifest(folder)
        if manifest.fingerprint == fingerprint:
            tell(f"{folder} is already prepared with these settings; nothing to do")
            return manifest
        raise EarlyBertError(
            f"{folder} holds a corpus prepared with other settings "
            f"({folders.differences(manifest.settings, identity)}); "
            "choose another --out, or replace it with --overwrite"
        )
    folders.refuse_foreign(folder)
    existed = folder.exists()
    work = folder.absolute() / f".work-{fingerprint[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folders.locked(folder):
            try:
                return _Build(settings, inputs, before, identity, fingerprint, folder, work, tell).run()
            except TaskError:
                raise
            except EarlyBertError:
                shutil.rmtree(work, ignore_errors=True)
                raise
    except OSError as error:
        raise EarlyBertError(
            f"--out {folder}: {error.strerror or error} ({error.filename or folder}); make it writable and "
            "give it space, or choose another; the same command goes on from the finished tasks"
        ) from error
    finally:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@dataclass(frozen=True)
class _Build:
    """One run of the pipeline over a work folder."""

    settings: BuildSettings
    inputs: list[tuple[Source, list[Place]]]
    before: list[tuple[int, ...]]
    """The versions of the inputs' files before they were read."""
    identity: dict[str, Any]
    fingerprint: str
    folder: Path
    work: Path
    tell: Callable[[str], None]

    def run(self) -> Manifest:
        for name in ("staged", "unique", "shards", "progress", "examples"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        cleaned = self._unique(self._clean())
        vocab_size = self._vocabulary(cleaned)
        tokenized = self._tokenize(cleaned, vocab_size)
        statistics = self._statistics(cleaned, tokenized)
        manifest = self._publish(statistics, vocab_size)
        self._report(manifest)
        return manifest

    def _clean(self) -> dict[str, int]:
        total = 0
        for source, paths in self.inputs:
            size = sum(map(sources.size_of, paths))
            once = steps.is_split_by_file(paths, self.settings.tasks)
            total += sum(
                sources.size_of(path) * (1 if once or source.can_split(path) else self.settings.tasks)
                for path in paths
            )
            self.tell(f"reading {source.word}: {len(paths):,} files, {megabytes(size)}")
        given = [source for source, _ in self.inputs]
        pipeline = [
            steps.Read(self.inputs, progress=self.work / "progress"),
            steps.Clean(
                given,
                min_words=self.settings.min_words,
                max_words=self.settings.max_words,
                only_language=self.settings.language if self.settings.only_language else None,
                examples=self.work / "examples",
            ),
            steps.Split(language=self.settings.language),
            steps.Stage(self.work / "staged"),
        ]
        counts = self._execute("clean", pipeline, bar="read", total=total, unit="B")
        self._refuse_changed_sources()
        for index, (source, paths) in enumerate(self.inputs):
            if not counts.get(f"{index}|characters"):
                dropped = _dropped(counts, index)
                reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()) or "no document in it"
                raise EarlyBertError(
                    f"source {source.word!r} is empty: {len(paths)} files gave no text ({reasons}); "
                    "give one with text, or lower --min-words"
                )
        return counts

    def _refuse_changed_sources(self) -> None:
        paths = [path for _, paths in self.inputs for path in paths]
        for path, before in zip(paths, self.before, strict=True):
            if sources.version(path) != before:
                raise EarlyBertError(f"{path} changed while it was read; start the command again")

    def _unique(self, cleaned: dict[str, int]) -> dict[str, int]:
        """Drop duplicates between all sources and tasks; the counts of what is left, and of what went."""
        kind = self.settings.deduplicate
        if kind == "none":
            return cleaned
        hashes, pairs, clusters = (self.work / name for name in ("signatures", "pairs", "clusters"))
        documents = sum(n for label, n in cleaned.items() if label.endswith("|documents"))
        self.tell(f"looking for {kind} duplicates")
        for stage, pipeline, tasks in (
            ("hash", [steps.Unstage(self._staged), duplicates.Signature(hashes, kind=kind)], None),
            ("pair", [duplicates.buckets(hashes, pairs, kind=kind)], duplicates.config(kind).num_buckets),
            ("cluster", [duplicates.cluster(pairs, clusters, kind=kind)], 1),
        ):
            self._run(stage, pipeline, tasks=tasks, small=documents < _SMALL)
        unique = duplicates.Unique(clusters, kind=kind, examples=self.work / "examples")
        pipeline = [steps.Unstage(self._staged), unique, steps.Stage(self.work / "unique")]
        filtered = self._run("unique", pipeline, small=documents < _SMALL)
        for gone, stays in duplicates.examples(clusters, tasks=self.settings.tasks, count=EXAMPLES):
            self.tell(f"  a duplicate: {self._id(gone)} of {self._id(stays)}, which stays")
        dropped = sum(n for label, n in (cleaned | filtered).items() if "|dropped|" in label)
        if documents - dropped < 2:
            raise EarlyBertError(
                f"a corpus needs at least two documents, and of {documents:,} only {documents - dropped} is "
                f"left when short ones and {kind} duplicates are dropped; add text, or --deduplicate none"
            )
        kept = ("|words", "|characters")
        return {k: n for k, n in cleaned.items() if not k.endswith(kept)} | filtered

    def _id(self, place: tuple[int, int]) -> str:
        """Name a staged document of (task, place)."""
        rank, number = place
        index, id, _ = next(islice(steps.staged(steps.staged_file(self._staged, rank)), number, None))
        return f"{self.inputs[index][0].kind} {id!r}"

    @property
    def _staged(self) -> Path:
        return self.work / "staged"

    @property
    def _ready(self) -> Path:
        """Where the documents lie that go into the corpus."""
        return self._staged if self.settings.deduplicate == "none" else self.work / "unique"

    def _vocabulary(self, cleaned: dict[str, int]) -> int:
        """Learn or copy the tokenizer into the work folder; returns its size."""
        target = self.work / TOKENIZER
        if not target.exists():
            started = time.monotonic()
            temporary = self.work / "tokenizer.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            if self.settings.tokenizer is not None:
                vocab.take(Path(self.settings.tokenizer), temporary, self.settings.letters)
            else:
                size = self.settings.vocab_size or 30522
                characters = sum(n for label, n in cleaned.items() if label.endswith("|characters"))
                share = min(1.0, _VOCABULARY_CHARACTERS / characters)
                self.tell(f"learning {size:,} WordPieces from {megabytes(int(characters * share))} of text")
                files = [steps.staged_file(self._ready, rank) for rank in range(self.settings.tasks)]
                sample = _Sample(files, share, self.settings.seed)
                letters, reserved = self.settings.letters, self.settings.reserved
                learnt = vocab.learn(sample, vocab_size=size, letters=letters, reserved=reserved)
                vocab.save(learnt, temporary, letters)
            os.replace(temporary, target)
            self.tell(f"vocabulary ready in {time.monotonic() - started:.0f} s")
        return vocab.load(target).get_vocab_size()

    def _tokenize(self, cleaned: dict[str, int], vocab_size: int) -> dict[str, int]:
        dropped = sum(n for label, n in cleaned.items() if "|dropped|" in label)
        documents = sum(n for label, n in cleaned.items() if label.endswith("|documents")) - dropped
        pipeline = [
            steps.Unstage(self._ready),
            steps.Tokenize(self.work / TOKENIZER),
            steps.Shard(
                self.work / "shards",
                names=[source.name for source, _ in self.inputs],
                vocab_size=vocab_size,
                progress=self.work / "progress",
            ),
        ]
        return self._execute("tokenize", pipeline, bar="shard", total=documents, unit=" documents")

    def _execute(self, stage: str, pipeline: list[Any], *, bar: str, total: int, unit: str) -> dict[str, int]:
        with progress_bar(self.work / "progress", prefix=bar, stage=stage, total=total, unit=unit):
            return self._run(stage, pipeline)

    def _run(
        self, stage: str, pipeline: list[Any], *, tasks: int | None = None, small: bool = False
    ) -> dict[str, int]:
        """Run a pipeline's tasks, as many as the settings say if nothing else is; their counts."""
        where = self.settings.where
        return where.run(pipeline, tasks=tasks or self.settings.tasks, folder=self.work / stage, small=small)

    def _statistics(self, cleaned: dict[str, int], tokenized: dict[str, int]) -> list[dict[str, Any]]:
        """Say for each source what went in, what was dropped and why, and what came out."""
        result = []
        for index, (source, paths) in enumerate(self.inputs):
            result.append(
                {
                    "source": source.kind,
                    "name": source.name,
                    "files": len(paths),
                    "bytes": sum(map(sources.size_of, paths)),
                    "documents_read": cleaned.get(f"{index}|documents", 0),
                    "dropped": _dropped(cleaned, index) | _dropped(tokenized, index),
                    "examples": self._examples(index),
                    "documents": tokenized.get(f"{index}|kept", 0),
                    "words": cleaned.get(f"{index}|words", 0),
                    "characters": cleaned.get(f"{index}|characters", 0),
                    "sentences": tokenized.get(f"{index}|sentences", 0),
                    "tokens": tokenized.get(f"{index}|tokens", 0),
                    "unknown_tokens": tokenized.get(f"{index}|unknown", 0),
                }
            )
        return result

    def _examples(self, index: int) -> dict[str, list[str]]:
        """Ids of a few documents of a source that were dropped, for each reason."""
        found: dict[str, list[str]] = {}
        prefix = f"{index}|dropped|"
        for path in sorted((self.work / "examples").glob("*.json")):
            for label, ids in json.loads(path.read_text()).items():
                if label.startswith(prefix):
                    found.setdefault(label.removeprefix(prefix), []).extend(ids)
        return {reason: ids[:EXAMPLES] for reason, ids in sorted(found.items())}

    def _publish(self, statistics: list[dict[str, Any]], vocab_size: int) -> Manifest:
        """Move shards and tokenizer into place and write the manifest last; may be repeated after a crash."""
        names = [shard_name(rank, of=self.settings.tasks) for rank in range(self.settings.tasks)]
        made = self.work / "shards"
        shards = tuple(ShardInfo(**json.loads((made / f"{name}.json").read_text())) for name in names)
        named: dict[str, dict[str, Any]] = {}
        for row in statistics:
            entry = named.setdefault(row["name"], {"documents": 0, "tokens": 0})
            entry["documents"] += row["documents"]
            entry["tokens"] += row["tokens"]
        (self.folder / MANIFEST).unlink(missing_ok=True)  # an older corpus ends here
        for stale in self.folder.glob("shard-*.arrow"):
            if stale.name not in names:
                stale.unlink()
        for name in names:
            if (made / name).exists():
                os.replace(made / name, self.folder / name)
        shutil.rmtree(self.folder / TOKENIZER, ignore_errors=True)
        shutil.copytree(self.work / TOKENIZER, self.folder / TOKENIZER)
        sync_folder(self.folder)
        manifest = Manifest(
            tokenizer_sha256=tokenizer_sha256(self.folder / TOKENIZER),
            vocab_size=vocab_size,
            token_dtype=token_type_for(vocab_size),
            documents=sum(shard.documents for shard in shards),
            sentences=sum(shard.sentences for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            shards=shards,
            fingerprint=self.fingerprint,
            settings=self.identity,
            sources=named,
            statistics={"sources": statistics},
        )
        write_manifest(self.folder, manifest)
        for finished in self.folder.glob(".work-*"):
            shutil.rmtree(finished, ignore_errors=True)
        return manifest

    def _report(self, manifest: Manifest) -> None:
        for line in report(manifest):
            self.tell(line)


class _Sample:
    """Sentences of the staged documents that the seed chooses, a list a document; may be iterated again."""

    def __init__(self, files: list[Path], share: float, seed: int) -> None:
        self._files = files
        self._limit = int(share * (1 << 64))
        self._seed = seed

    def __iter__(self) -> Iterator[list[str]]:
        for path in self._files:
            for source, id, split in steps.staged(path):
                key = f"{self._seed}\0{source}\0{id}".encode()
                if int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < self._limit:
                    yield split


def _identity(settings: BuildSettings, inputs: list[tuple[Source, list[Place]]]) -> dict[str, Any]:
    """What shapes the result, without paths or times: equal for equal settings and sources on any machine."""
    read = []
    for source, paths in inputs:
        marks = hashlib.sha256("\n".join(map(sources.identity, paths)).encode()).hexdigest()
        size = sum(map(sources.size_of, paths))
        read.append({"kind": source.kind, "files": len(paths), "bytes": size, "sha256": marks})
    tokenizer = None
    if settings.tokenizer is not None:
        tokenizer = vocab.identity(Path(settings.tokenizer), settings.letters)
    return {
        "version": _PREPARATION_VERSION,
        "sources": read,
        "tokenizer": tokenizer,
        "vocab_size": None if tokenizer else settings.vocab_size or 30522,
        "cased": settings.letters.cased,
        "accents": settings.letters.accents,
        "reserved": None if tokenizer else settings.reserved,
        "min_words": settings.min_words,
        "max_words": settings.max_words,
        "deduplicate": settings.deduplicate,
        "language": settings.language,
        "only_language": settings.only_language,
        "seed": settings.seed,
        "tasks": settings.tasks,
    }


def _dropped(counts: dict[str, int], index: int) -> dict[str, int]:
    prefix = f"{index}|dropped|"
    return {
        label.removeprefix(prefix): n for label, n in sorted(counts.items()) if label.startswith(prefix) and n
    }
