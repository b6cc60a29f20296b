"""Show what a finished run has learned: its held-out loss, and masked words of held-out sentences, guessed.

    python scripts/fill.py runs/NAME --model DIR [--count 3]

DIR is an export of the run. It is loaded as anyone would load it, by transformers' fill-mask pipeline.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from earlybert.shards import Corpus


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fill.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--model", type=Path, required=True, help="an export of that run")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="sentences to fill (3)")
    arguments = parser.parse_args()

    from earlybert import report
    from earlybert.config import EarlyBertError, read_toml
    from earlybert.ticket import Ticket

    run = arguments.run
    if not (run / "metrics.jsonl").is_file():
        raise EarlyBertError(f"{run}: no metrics.jsonl, so not a run folder; give runs/NAME")
    if not (arguments.model / "config.json").is_file():
        raise EarlyBertError(f"{arguments.model}: no config.json; export first: scripts/export.py")
    losses = {}
    for values in report.metrics(run):
        if "eval_loss" in values:
            losses[values["step"]] = values["eval_loss"]
    drawn = Ticket.load(run / "ticket.json").step if (run / "ticket.json").is_file() else None
    if not losses:
        raise EarlyBertError(f"{run}: metrics.jsonl has no held-out loss yet; wait for the first evaluation")
    named = {min(losses): "start", drawn: "draw", max(losses): "end"}
    for step, name in named.items():
        if step in losses:
            print(f"held-out loss at the {name:<5} (step {step:>5,}): {losses[step]:.4f}")
    for prompt, word, guesses in _filled(
        read_toml(run / "experiment.toml"), arguments.model, count=arguments.count
    ):
        print(f"  {prompt}\n      was: {word}   guesses: {', '.join(guesses)}")
    return 0


def _filled(experiment: dict[str, Any], model: Path, *, count: int) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (sentence with a mask, the word that stood there, best guesses) of held-out documents."""
    from transformers import pipeline

    from earlybert.config import parse
    from earlybert.data import DataSettings, split_documents
    from earlybert.shards import Corpus

    corpus = Corpus.open(experiment["data"]["corpus"], verify="size")
    settings = parse(DataSettings, experiment["data"], where="experiment.toml: data")
    # Importing it makes a compact export's architecture known: no code of the folder is run.
    importlib.import_module("earlybert.model")
    fill = pipeline("fill-mask", model=str(model), tokenizer=str(model), trust_remote_code=False, device=-1)
    tokenizer: Any = fill.tokenizer
    documents = split_documents(corpus, settings=settings, split="held_out").tolist()
    waiting = deque(_hidden_words(corpus, tokenizer, document) for document in documents)
    while waiting and count > 0:  # one sentence of each document in turn
        sentences = waiting.popleft()
        found = next(sentences, None)
        if found is not None:
            prompt, word = found
            yield prompt, word, [guess["token_str"] for guess in fill(prompt, top_k=4)]
            waiting.append(sentences)
            count -= 1


def _hidden_words(corpus: Corpus, tokenizer: Any, document: int) -> Iterator[tuple[str, str]]:
    """Yield (sentence with a mask, the word that stood there) of a document."""
    tokens, starts = corpus.document(document)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(tokens)], strict=True):
        pieces = tokenizer.convert_ids_to_tokens(tokens[start:end].tolist())
        place = _word_to_hide(pieces)
        if place is not None:
            hidden = [*pieces[:place], tokenizer.mask_token, *pieces[place + 1 :]]
            yield tokenizer.convert_tokens_to_string(hidden), pieces[place]


def _word_to_hide(pieces: list[str]) -> int | None:
    """The middle-most whole word of a sentence of ordinary length, or None."""
    if not 8 <= len(pieces) <= 24:
        return None
    whole = [
        i
        for i in range(2, len(pieces) - 1)
        if pieces[i].isalpha() and len(pieces[i]) > 2 and not pieces[i + 1].startswith("##")
    ]
    return min(whole, key=lambda i: abs(i - len(pieces) // 2)) if whole else None


if __name__ == "__main__":
    from earlybert.config import run_command

    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that last a moment only hide what is said
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run_command(main)
