"""Convert a corpus to Megatron's .bin/.idx, or make a corpus of them.

python scripts/megatron.py to corpora/NAME PREFIX
python scripts/megatron.py from PREFIX --tokenizer DIR --out corpora/NAME [--shards 4]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from earlybert.config import run_command


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(dest="way", required=True)
    to = ways.add_parser("to", help="write PREFIX.bin and PREFIX.idx")
    to.add_argument("corpus", type=Path)
    to.add_argument("prefix", type=Path)
    back = ways.add_parser("from", help="make a corpus folder")
    back.add_argument("prefix", type=Path)
    back.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="whose ids they are")
    back.add_argument("--out", type=Path, required=True, metavar="DIR")
    back.add_argument("--shards", type=int, default=4, metavar="N")
    arguments = parser.parse_args()

    from data_prep import megatron
    from earlybert.shards import Corpus

    if arguments.way == "to":
        documents, sequences = megatron.write(
            Corpus.open(arguments.corpus, verify="checksum"), arguments.prefix
        )
        print(f"{arguments.prefix}.bin and .idx: {documents:,} documents, {sequences:,} sentences")
    else:
        manifest = megatron.read(
            arguments.prefix,
            tokenizer=arguments.tokenizer,
            out=arguments.out,
            shards=max(1, arguments.shards),
        )
        print(f"{arguments.out}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    run_command(main)
