"""Describe a corpus in words: counts, sizes, where the text came from, and a sample of it.

python scripts/show.py corpora/NAME
python scripts/show.py corpora/NAME --document 17
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from earlybert.config import EarlyBertError, run_command


@dataclass(frozen=True)
class Describer:
    """How one kind of PATH is recognised and described."""

    recognises: Callable[[Path], bool]
    describe: Callable[[Path, argparse.Namespace], Iterator[str]]


_SAMPLE_TOKENS = 120


def _is_corpus(path: Path) -> bool:
    """A folder of shards, finished or not; an unfinished one is then refused with its remedy."""
    if not path.is_dir() or (path / "checkpoints").exists():
        return False
    return any(path.glob("shard-*.arrow")) or any(path.glob(".work-*"))


def _describe_corpus(path: Path, arguments: argparse.Namespace) -> Iterator[str]:
    from data_prep.build import report
    from data_prep.vocab import load
    from earlybert.shards import Corpus

    corpus = Corpus.open(path, verify="checksum" if arguments.verify else "size")
    manifest = corpus.manifest
    yield f"corpus {path}, format {manifest.version}, fingerprint {manifest.fingerprint[:16]}"
    yield from report(manifest)
    for name, row in manifest.sources.items():
        yield f"share of {name}: {row['tokens'] / max(1, manifest.tokens):.1%} of the tokens"
    lengths = corpus.document_lengths
    yield (
        f"tokens a document: least {lengths.min():,}, mean {lengths.mean():,.0f}, most {lengths.max():,}; "
        f"stored as {manifest.token_dtype}"
    )
    yield f"settings: {', '.join(f'{k} {v}' for k, v in manifest.settings.items() if k != 'sources')}"
    if arguments.verify:
        yield "every checksum is right"
    index = len(corpus) // 2 if arguments.document is None else arguments.document
    if not 0 <= index < len(corpus):
        raise EarlyBertError(f"--document {index}: the corpus has documents 0 to {len(corpus) - 1}")
    tokens, starts = corpus.document(index)
    source, id = corpus.origin(index)
    yield f"document {index} ({source}, {id}): {len(tokens):,} tokens, {len(starts):,} sentences"
    tokenizer = load(corpus.tokenizer_folder)
    ends = [*starts[1:].tolist(), len(tokens)]
    for start, end in zip(starts.tolist(), ends, strict=True):
        if start >= _SAMPLE_TOKENS:
            break
        yield "  | " + tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)


DESCRIBERS = {
    "corpus": Describer(_is_corpus, _describe_corpus),
}
"""Asked in this order; the first that recognises PATH describes it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="PATH", help=" or ".join(DESCRIBERS))
    parser.add_argument("--document", type=int, metavar="I", help="show this document of a corpus")
    parser.add_argument("--verify", action="store_true", help="compare every checksum first")
    arguments = parser.parse_args()
    if not arguments.path.exists():
        raise EarlyBertError(f"{arguments.path}: no such file or folder; check the path")
    for describer in DESCRIBERS.values():
        if describer.recognises(arguments.path):
            for line in describer.describe(arguments.path, arguments):
                print(line)
            return 0
    raise EarlyBertError(f"{arguments.path} is none of: {', '.join(DESCRIBERS)}; give the folder of one")


if __name__ == "__main__":
    run_command(main)
