"""A corpus of the Hugging Face hub, or a folder laid out like one: its split "train".

`hf:` has `datasets` find out which files make the split and fetch those that are not local into its own
cache; what is in them is read by the readers of plain files. `hf-stream:` never stores them: rows come over
the network while they are cleaned, each task reading its own of the files.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import streams, tables
from earlybert.config import EarlyBertError

_SPLIT = "train"
_READ_HERE = ("parquet", "json", "text")
"""Readers of `datasets` for whose files there is one here."""


def files(pattern: str, *, word: str) -> list[Path]:
    """The files of NAME[,CONFIG], in the corpus' order; `word` names the source in messages.

    Raises EarlyBertError for a name or configuration that is not there, where the hub cannot be reached, and
    for files that are neither Parquet nor JSON lines nor text.
    """
    import datasets

    def fetch() -> list[Path]:
        builder = _builder(pattern)
        places = _places(builder, word)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in _READ_HERE:
            raise _not_read_here(places[0], f"read by the reader {kind!r} of datasets", word)
        manager = datasets.DownloadManager()

        def local(chosen: list[str]) -> list[Path]:
            remote = [place for place in chosen if "://" in place]
            fetched = dict(zip(remote, manager.download(remote) if remote else [], strict=True))
            found = [Path(fetched.get(place, place)) for place in chosen]
            for place, path in zip(chosen, found, strict=True) if kind == "json" else ():
                start = next(streams.chunks(path, check=False), b"").lstrip()
                if start and not start.startswith(b"{"):
                    raise _not_read_here(place, "called JSON, but does not begin with an object", word)
            return found

        local(places[:1])  # a mistake is told before all of a corpus is fetched
        return local(places)

    return _told(fetch, word)


@dataclass(frozen=True)
class Stream:
    """A corpus that is read where it lies."""

    pattern: str
    word: str
    files: int
    identity: str
    """Hash of its files' names and of what the hub says of their versions."""

    @classmethod
    def open(cls, pattern: str, *, word: str) -> Stream:
        """Look a corpus up; raises EarlyBertError as `files` does."""

        def look() -> Stream:
            builder = _builder(pattern)
            places = _places(builder, word)
            versions = [list(map(str, mark)) for mark in builder.config.data_files[_SPLIT].origin_metadata]
            local = [streams.identity(Path(place)) for place in places if "://" not in place]
            told = repr(([Path(place).name for place in places], versions, local))
            return cls(pattern, word, len(places), hashlib.sha256(told.encode()).hexdigest())

        return _told(look, word)

    def documents(self, part: tuple[int, int], progress: Callable[[int], None]) -> Iterator[tuple[str, str]]:
        """(id, text) of the documents of a part (which, of how many); each is in one of them."""
        which, parts = part
        by_file = self.files >= parts
        rows = self._rows(part if by_file else (0, 1), progress)
        name = f"{self.pattern}:{which if by_file else 0}"
        documents = tables.whole(rows, name)
        return documents if by_file else itertools.islice(documents, which, None, parts)

    def _rows(self, part: tuple[int, int], progress: Callable[[int], None]) -> Iterator[tuple[str, str]]:
        rows = _told(lambda: self._dataset(part), self.word)
        for number in itertools.count():
            row = _told(lambda: next(rows, None), self.word)
            if row is None:
                return
            text = row.get("text")
            if not isinstance(text, str):
                raise EarlyBertError(
                    f'source {self.word!r}, row {number}: no column "text" of strings (columns: '
                    f"{', '.join(sorted(row))}); give a corpus that has one"
                )
            progress(number + 1)
            id = row.get("id")
            yield f"{self.pattern}:{part[0]}:{number}" if id is None else str(id), text

    def _dataset(self, part: tuple[int, int]) -> Iterator[dict[str, Any]]:
        import datasets

        name, _, configuration = self.pattern.partition(",")
        dataset = datasets.load_dataset(name, configuration or None, split=_SPLIT, streaming=True)
        if part[1] > 1:
            dataset = dataset.shard(num_shards=part[1], index=part[0])
        return iter(dataset)


def _not_read_here(place: str, what: str, word: str) -> EarlyBertError:
    return EarlyBertError(
        f"source {word!r}: {Path(place).name} is {what}; write the source as hf-stream:, or give "
        "Parquet files or JSON lines"
    )


def _builder(pattern: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    name, _, configuration = pattern.partition(",")
    return datasets.load_dataset_builder(name, configuration or None)


def _places(builder: Any, word: str) -> list[str]:
    found = dict(builder.config.data_files or {})
    if _SPLIT not in found:
        there = ", ".join(map(str, found)) or "none"
        raise EarlyBertError(
            f'source {word!r}: no split "{_SPLIT}" (splits: {there}); give its files instead'
        )
    return [str(place) for place in found[_SPLIT]]


def _told(action: Callable[[], Any], word: str) -> Any:
    """Do it; what goes wrong with the network, the hub or a name becomes a message of ours."""
    try:
        return action()
    except EarlyBertError:
        raise
    except Exception as error:  # datasets has many kinds
        said = " ".join(str(error).split()) or type(error).__name__
        raise EarlyBertError(
            f"source {word!r}: {said}; check the name and its configuration, or download the files and give "
            "them as parquet:GLOB"
        ) from error
