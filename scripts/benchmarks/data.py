"""Data preparation: dump to prose, prose to shards, the loader, and memory; each beside its baseline.

One core is one process pinned to it, two cores are two processes or, of a baseline, its own two processes or
threads. Kinds take turns, and medians are told with the least and the most.
"""

from __future__ import annotations

import argparse
import bz2
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine
from earlybert.config import EarlyBertError

_PREPARE = Path(__file__).resolve().parent.parent / "prepare.py"
_VOCABULARY, _LENGTH, _ROWS = 30_522, 128, 32
_COMPARED = ("tokenizers", "wikiextractor", "mwparserfromhell", "transformers")
Rates = dict[str, list[float]]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    parts: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
        "prose": _prose, "tokens": _tokens, "loader": _loader, "memory": _memory,
    }  # fmt: skip
    for path in (arguments.dump, *arguments.extract):
        if not path.is_file():
            raise EarlyBertError(f"{path}: no such file; give a dump, then files of WikiExtractor's")
    folder = Path(tempfile.mkdtemp())
    try:
        figures: dict[str, Any] = {"machine": machine.processor()}
        figures["versions"] = {
            n: machine.version(n) for n in ("tokenizers", "wikiextractor", "mwparserfromhell", "transformers")
        }
        wanted = arguments.only or list(parts)
        if wanted != ["prose"]:
            _text(arguments, folder)
        for name in wanted:
            figures[name] = parts[name](arguments, folder)
            print(f"measured: {name}", file=sys.stderr, flush=True)
        return figures
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell(figures: dict[str, Any]) -> None:
    print(f"{figures['machine']}; {', '.join(f'{k} {v}' for k, v in figures['versions'].items())}\n")
    print("| what | MB/s (least to most) |\n|---|---|")
    for part in ("prose", "tokens"):
        for name, rates in figures.get(part, {}).items():
            print(f"| {name} | {_spread(rates, 1)} |")
    if "loader" in figures:
        print("\n| loader, one core | million tokens/s (least to most) |\n|---|---|")
        for name, rates in figures["loader"].items():
            print(f"| {name} | {_spread(rates, 2)} |")
    if "memory" in figures:
        print("\n| text prepared | most memory of a process, MB | seconds |\n|---|---|---|")
        for name, row in figures["memory"].items():
            print(f"| {name} | {row['peak_mb']:,.0f} | {row['seconds']:.0f} |")


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# --- in processes of their own -----------------------------------------------------------------------------


def _seconds(function: Callable[..., Any], shares: list[tuple[Any, ...]]) -> float:
    """Run a function once a core, each with its arguments, started together; until the last is done."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Barrier(len(shares) + 1), context.Barrier(len(shares) + 1)
    taken = context.SimpleQueue()
    processes = [
        context.Process(target=_pinned, args=(core, ready, go, taken, function, share))
        for core, share in enumerate(shares)
    ]
    for process in processes:
        process.start()
    ready.wait()
    go.wait()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{function.__name__} ended with {process.exitcode}")
    return max(taken.get() for _ in processes)


def _pinned(core: int, ready: Any, go: Any, taken: Any, function: Callable[..., Any], share: Any) -> None:
    os.sched_setaffinity(0, {core})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prepared = function(*share)  # imports and inputs
    ready.wait()
    go.wait()
    began = time.perf_counter()
    prepared()
    taken.put(time.perf_counter() - began)


# --- dump to prose -----------------------------------------------------------------------------------------


def _prose(arguments: argparse.Namespace, folder: Path) -> Rates:
    """MB/s of XML."""
    content = bz2.decompress(arguments.dump.read_bytes())
    head, tail = content.index(b"<page>"), content.rindex(b"</page>") + len(b"</page>")
    dump = folder / "dump.xml.bz2"
    dump.write_bytes(bz2.compress(content[:head] + content[head:tail] * arguments.copies + content[tail:]))
    size = (len(content) + (tail - head) * (arguments.copies - 1)) / 1e6
    kinds: dict[str, Callable[[], float]] = {
        "dump to prose, ours, one core": lambda: size / _seconds(_our_prose, [(dump, (0, 1))]),
        "dump to prose, ours, two cores": lambda: (
            size / _seconds(_our_prose, [(dump, (0, 2)), (dump, (1, 2))])
        ),
    }
    versions = (
        [(f"wikiextractor {machine.version('wikiextractor')}", None)]
        if machine.version("wikiextractor")
        else []
    )
    if arguments.wikiextractor is not None:
        versions.append((f"wikiextractor in {arguments.wikiextractor.name}", arguments.wikiextractor))
    for name, place in versions:
        for cores, options in ((1, ["--no-templates"]), (2, ["--no-templates"]), (1, [])):
            how = f"{('one core', 'two cores')[cores - 1]}{'' if options else ', expanding templates'}"
            run = functools.partial(_wikiextractor, dump, folder, place, cores, options)
            kinds[f"dump to prose, {name}, {how}"] = functools.partial(_rate, size, run)
    if machine.version("mwparserfromhell"):
        one = len(content) / 1e6
        kinds["dump to prose, mwparserfromhell, one core"] = lambda: (
            one / _seconds(_their_prose, [(arguments.dump,)])
        )
    return _in_turn(kinds, arguments.rounds)


def _rate(size: float, seconds: Callable[[], float]) -> float:
    return size / seconds()


def _in_turn(kinds: dict[str, Callable[[], float]], rounds: int) -> Rates:
    found: Rates = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, run in kinds.items():
            found[name].append(run())
    return found


def _our_prose(dump: Path, part: tuple[int, int]) -> Callable[[], None]:
    from data_prep import sources

    source = sources.parse(f"wikipedia:{dump}")

    def run() -> None:
        for raw in source.part(dump, part, progress=lambda done: None):
            if raw.dropped is None:
                source.clean(raw)

    return run


def _their_prose(dump: Path) -> Callable[[], None]:
    import mwparserfromhell  # type: ignore[import-not-found]  # not a dependency: pip install it to compare

    from data_prep import sources

    source = sources.parse(f"wikipedia:{dump}")

    def run() -> None:
        for raw in source.documents(dump, progress=lambda done: None):
            if raw.dropped is None:
                mwparserfromhell.parse(raw.text).strip_code()

    return run


def _wikiextractor(dump: Path, folder: Path, place: Path | None, cores: int, options: list[str]) -> float:
    """Seconds of the whole command, whose start is small beside the dump."""
    out = folder / "extracted"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "wikiextractor.WikiExtractor", str(dump), "-q", *options]
    command += ["--processes", str(cores), "-o", str(out)]
    environment = os.environ | ({"PYTHONPATH": str(place)} if place is not None else {})
    began = time.perf_counter()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=folder,
        preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if done.returncode or not any(out.rglob("wiki_*")):
        raise RuntimeError(f"wikiextractor failed: {done.stderr[-2000:]}")
    return seconds


# --- prose to shards ---------------------------------------------------------------------------------------


def _text(arguments: argparse.Namespace, folder: Path) -> None:
    """Documents as sentences in two staged files, a tokenizer learnt from them, and a corpus."""
    from datatrove.data import Document

    from data_prep import sentences, sources, steps, vocab

    source = sources.parse(f"wikiextractor:{arguments.extract[0]}")
    documents: list[Document] = []
    size = 0
    for raw in source.documents(arguments.extract[0], progress=lambda done: None):
        text = source.clean(raw)
        if not text:
            continue
        size += len(text)
        split = sentences.split(text)
        documents.append(Document(text=text, id=raw.id, metadata={"source": 0, "sentences": split}))
        if size > arguments.megabytes * 1e6:
            break
    for rank in (0, 1):
        for _ in steps.Stage(folder).run(iter(documents[rank::2]), rank):
            pass
    batches = [document.metadata["sentences"] for document in documents]
    vocab.save(vocab.learn(batches, vocab_size=_VOCABULARY), folder / "tokenizer")


def _tokens(arguments: argparse.Namespace, folder: Path) -> Rates:
    """MB/s of sentences."""
    size = sum(len(s) for rank in (0, 1) for s in _sentences(folder, (rank,))) / 1e6
    both, halves = [(folder, (0, 1))], [(folder, (0,)), (folder, (1,))]
    return _in_turn(
        {
            "prose to shards, ours, one core": lambda: size / _seconds(_our_shards, both),
            "prose to ids, encode_batch, one core": lambda: size / _seconds(_their_ids, both),
            "prose to shards, ours, two cores": lambda: size / _seconds(_our_shards, halves),
            "prose to ids, encode_batch, two cores": lambda: size / _seconds(_their_ids, halves),
        },
        arguments.rounds,
    )


def _sentences(folder: Path, ranks: tuple[int, ...]) -> Iterator[str]:
    from data_prep import steps

    for rank in ranks:
        for _, _, split in steps.staged(steps.staged_file(folder, rank)):
            yield from split


def _our_shards(folder: Path, ranks: tuple[int, ...]) -> Callable[[], None]:
    from data_prep import steps, vocab

    size = vocab.load(folder / "tokenizer").get_vocab_size()

    def run() -> None:
        for rank in ranks:
            tokenize = steps.Tokenize(folder / "tokenizer")
            shard = steps.Shard(folder, names=["text"], vocab_size=size, progress=folder)
            for _ in shard.run(tokenize.run(steps.Unstage(folder).run(None, rank)), rank, 2):
                pass

    return run


def _their_ids(folder: Path, ranks: tuple[int, ...]) -> Callable[[], None]:
    from data_prep import vocab

    tokenizer = vocab.load(folder / "tokenizer")
    tokenizer.no_truncation()
    texts = list(_sentences(folder, ranks))

    def run() -> None:
        for first in range(0, len(texts), 8192):
            tokenizer.encode_batch(texts[first : first + 8192], add_special_tokens=False)

    return run


# --- the loader --------------------------------------------------------------------------------------------


def _loader(arguments: argparse.Namespace, folder: Path) -> Rates:
    """Million tokens a second on one core, rows of 128 tokens."""
    rows = folder / "rows.txt"
    rows.write_text("\n".join("\n".join([*split, ""]) for split in _documents(folder)))
    command = [sys.executable, str(_PREPARE), f"text:{rows}", "--out", str(folder / "corpus"), "--tasks", "1"]
    command += ["--tokenizer", str(folder / "tokenizer"), "--deduplicate", "none"]
    subprocess.run(command, check=True, capture_output=True)
    batches = 400
    tokens = batches * _ROWS * _LENGTH / 1e6
    return _in_turn(
        {
            "ours: packed, masked": lambda: tokens / _seconds(_our_batches, [(folder, batches)]),
            "transformers' collator, rows packed before": lambda: (
                tokens / _seconds(_their_batches, [(folder, batches)])
            ),
        },
        arguments.rounds,
    )


def _documents(folder: Path) -> Iterator[list[str]]:
    from data_prep import steps

    for rank in (0, 1):
        for _, _, split in steps.staged(steps.staged_file(folder, rank)):
            yield split


def _samples(folder: Path) -> Any:
    from earlybert.data import DataSettings, PackedSamples
    from earlybert.shards import Corpus

    settings = DataSettings(corpus=str(folder / "corpus"))
    corpus = Corpus.open(folder / "corpus")
    return PackedSamples(corpus, settings=settings, sequence_length=_LENGTH, seed=0)


def _our_batches(folder: Path, count: int) -> Callable[[], None]:
    from earlybert.loader import Loader

    loader = Loader(_samples(folder), micro_batch=_ROWS, accumulation=1, rank=0, world_size=1)
    next(loader)

    def run() -> None:
        for _ in range(count):
            next(loader)

    return run


def _their_batches(folder: Path, count: int) -> Callable[[], None]:
    import numpy as np
    import transformers

    samples = _samples(folder)
    ids, epochs = samples.ids(np.arange(_ROWS * count))
    rows = samples.rows(ids, epochs=epochs)["input_ids"].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    collate = transformers.DataCollatorForLanguageModeling(tokenizer)
    features = [{"input_ids": row} for row in rows]

    def run() -> None:
        for batch in range(count):
            collate(features[batch * _ROWS : (batch + 1) * _ROWS])

    return run


# --- memory ------------------------------------------------------------------------------------------------

_PEAK = (
    "import json, resource, subprocess, sys, time; began = time.monotonic(); "
    "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
    "print(json.dumps({'peak_mb': resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6, "
    "'seconds': time.monotonic() - began}))"
)


def _memory(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The most that a process of a preparation holds, of the extracts' first tenth and of all of them."""
    from data_prep import streams

    whole, tenth = folder / "whole.txt", folder / "tenth.txt"
    size = 0
    with open(whole, "w") as file:
        for line in itertools.chain.from_iterable(map(streams.lines, arguments.extract)):
            size += file.write(line + "\n")
    written = 0
    with open(whole) as file, open(tenth, "w") as first:
        for line in file:
            written += first.write(line)
            if line.startswith("</doc>") and written > size / 10:
                break
    found = {}
    for name, path, bytes_ in (("a tenth", tenth, written), ("the whole", whole, size)):
        command = [sys.executable, str(_PREPARE), f"wikiextractor:{path}", "--out", str(folder / path.stem)]
        command += ["--tokenizer", str(folder / "tokenizer"), "--tasks", "2"]
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, *command], capture_output=True, text=True, check=True
        )
        found[f"{name}, {bytes_ / 1e6:,.0f} MB"] = json.loads(done.stdout)
    return found
