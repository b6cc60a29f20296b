"""Prepare a corpus: raw text in, tokenized and checksummed shards out.

    python scripts/prepare.py python-docs --out corpora/docs --vocab-size 8192
    python scripts/prepare.py 'wikiextractor:extract/*/*' books:books.tar.xz --out corpora/wikibooks --tasks 8

SOURCE is one of
    python-docs            help topics and docstrings of this Python's standard library; needs no download
    text:GLOB              plain text, a document a file
    jsonl:GLOB             an object with a field "text" a line
    parquet:GLOB           a column "text"; rows that are sentences are put together again
    hf:NAME[,CONFIG]       a corpus of the hub, or a folder laid out like one: its split "train"
    hf-stream:NAME[,CONFIG]  the same without storing its files here
    books:DIR-or-ARCHIVE   whole books, a text or Markdown file each; tar or zip
    wikipedia:GLOB         pages-articles dumps, .xml or compressed
    wikiextractor:GLOB     WikiExtractor's <doc> files
Files may be plain, .gz, .bz2, .xz or .zst. The same command again goes on after an interruption, and is done
at once where the corpus is there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from earlybert.config import EarlyBertError, run_command


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="KIND:PATTERN, as above; quote the pattern"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the corpus folder, such as corpora/NAME")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--tokenizer", metavar="DIR", help="use this fast Hugging Face tokenizer (or a vocab.txt)"
    )
    which.add_argument(
        "--vocab-size", type=int, metavar="N", help="learn N WordPieces (30522 if nothing is said)"
    )
    parser.add_argument("--tasks", type=int, default=4, metavar="N", help="parts of the work, and shards (4)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="tasks at a time; does not change the result (cores)"
    )
    parser.add_argument(
        "--executor",
        choices=("local", "ray", "slurm"),
        default="local",
        help="where the tasks run (local); ray and slurm need --out on a file system that all hosts share",
    )
    parser.add_argument(
        "--memory", type=float, default=2.0, metavar="GB", help="that a task asks of ray or slurm (2)"
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option for sbatch, such as partition=cpu or time=12:00:00",
    )
    parser.add_argument("--cased", action="store_true", help="keep upper case, and accents with it")
    parser.add_argument(
        "--accents", choices=("keep", "strip"), help="of letters (kept with upper case, else stripped)"
    )
    parser.add_argument(
        "--reserved", type=int, default=0, metavar="N", help="WordPieces [unused0], ... at least (0)"
    )
    parser.add_argument("--min-words", type=int, default=15, metavar="N", help="drop shorter documents (15)")
    parser.add_argument("--max-words", type=int, metavar="N", help="drop longer documents (none)")
    parser.add_argument(
        "--deduplicate",
        choices=("near", "exact", "none"),
        default="near",
        help="drop documents that are there twice, over all sources (near)",
    )
    parser.add_argument("--language", default="en", metavar="CODE", help="whose rules split sentences (en)")
    parser.add_argument(
        "--only-language", action="store_true", help="drop documents that are in another language"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the vocabulary's sample (0)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a corpus of other settings in --out"
    )
    arguments = parser.parse_args()

    from data_prep.build import BuildSettings, build
    from data_prep.executors import Where
    from data_prep.vocab import Letters

    started = time.monotonic()
    settings = BuildSettings(
        sources=tuple(arguments.sources),
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        tasks=arguments.tasks,
        where=Where(
            kind=arguments.executor,
            workers=arguments.workers,
            memory=arguments.memory,
            sbatch=dict(_pair(option) for option in arguments.sbatch),
        ),
        letters=Letters(
            cased=arguments.cased, accents=None if arguments.accents is None else arguments.accents == "keep"
        ),
        reserved=arguments.reserved,
        min_words=arguments.min_words,
        max_words=arguments.max_words,
        deduplicate=arguments.deduplicate,
        only_language=arguments.only_language,
        language=arguments.language,
        seed=arguments.seed,
    )
    build(settings, arguments.out, overwrite=arguments.overwrite, tell=lambda line: print(line, flush=True))
    print(f"{arguments.out} is ready after {time.monotonic() - started:.0f} s", flush=True)
    return 0


def _pair(option: str) -> tuple[str, str]:
    key, equals, value = option.partition("=")
    if not equals or not key.strip("-"):
        raise EarlyBertError(f"--sbatch {option!r}: write KEY=VALUE, such as partition=cpu")
    return key.lstrip("-"), value


if __name__ == "__main__":
    run_command(main)
