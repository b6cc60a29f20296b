"""Describe a corpus, a run, a checkpoint or a ticket in words.

    python scripts/show.py corpora/NAME [--document 17] [--verify]
    python scripts/show.py runs/NAME [--verify] [--report]
    python scripts/show.py runs/NAME/checkpoints/step-0000400 [--verify]
    python scripts/show.py runs/NAME/ticket.json

--verify compares every checksum; --report writes the page and the heat map of the search, runs/NAME/report/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from earlybert.config import EarlyBertError, read_toml, run_command


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
    from data_prep.report import fertility, histogram, report
    from data_prep.vocab import load
    from earlybert.shards import Corpus

    corpus = Corpus.open(path, verify="checksum" if arguments.verify else "size")
    manifest = corpus.manifest
    yield f"corpus {path}, format {manifest.version}, fingerprint {manifest.fingerprint[:16]}"
    yield from report(manifest)
    for name, row in manifest.sources.items():
        yield (
            f"share of {name}: {row['tokens'] / max(1, manifest.tokens):.1%} of the tokens, "
            f"{row['documents'] / max(1, manifest.documents):.1%} of the documents"
        )
    yield fertility(manifest)
    lengths = corpus.document_lengths
    yield (
        f"tokens a document: least {lengths.min():,}, mean {lengths.mean():,.0f}, most {lengths.max():,}; "
        f"stored as {manifest.token_dtype}"
    )
    yield from histogram(lengths)
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


def _is_run(path: Path) -> bool:
    return (path / "environment.json").is_file() and (path / "experiment.toml").is_file()


def _describe_run(path: Path, arguments: argparse.Namespace) -> Iterator[str]:
    from earlybert import checkpoint, probes, report

    if arguments.report:
        yield f"report of the search: {report.write(path) / 'report.md'}"

    values, environment = read_toml(path / "experiment.toml"), _read_json(path / "environment.json")
    if "phases" not in values:
        yield from _describe_tuning(path, values)
        return
    total = sum(phase["steps"] for phase in values["phases"])
    lines = report.metrics(path)
    reached = lines[-1]["step"] if lines else 0
    yield f"run {path}: step {reached:,} of {total:,}{' (finished)' if reached == total else ''}"
    model = values["model"]
    yield (
        f"dense model: {model['layers']} layers, {model['hidden']} wide, {model['heads']} heads a layer; "
        f"corpus {values['data']['corpus']}"
    )
    for number, phase in enumerate(values["phases"], 1):
        yield (
            f"phase {number}: {phase['steps']:,} steps of {phase['batch']:,} sequences of "
            f"{phase['sequence_length']} tokens, learning rate {phase['learning_rate']:g}"
        )
    try:
        yield (
            f"last started on {environment['world_size']} ranks ({environment['device']}) with torch "
            f"{environment['torch']}, commit {environment['git_commit'] or 'unknown'}"
        )
    except KeyError as error:
        raise EarlyBertError(
            f"{path / 'environment.json'}: {error} is missing; the next start of the run writes it anew"
        ) from error
    trained = [line for line in lines if "loss" in line]
    if trained:
        last = trained[-1]
        yield (
            f"newest line: loss {_told(last['loss'], '.4f')}, masked-LM accuracy "
            f"{_told(last['mlm_accuracy'], '.3f')}, "
            f"{last['tokens_per_second']:,.0f} tokens/s, {last['parameters']:,} parameters"
        )
    for line in lines:
        if "eval_loss" in line:
            yield f"held-out loss at step {line['step']:>7,}: {line['eval_loss']:.4f}"
    for line in probes.recorded(path):
        told = f"failed: {line['error']}" if "error" in line else f"{line['score']:.2f}"
        yield f"probe of {line['task']} at step {line['step']:>7,}: {told}"
    if (path / "ticket.json").is_file():
        yield from _describe_ticket(path / "ticket.json", arguments)
    else:
        yield "no ticket has been drawn"
    names = checkpoint.names(path / "checkpoints")
    for name in names:
        folder = path / "checkpoints" / name
        yield f"checkpoint {name}: {_state_of(folder, arguments)}"
    if not names:
        yield "no checkpoint yet"
    yield f"TensorBoard: tensorboard --logdir {path / 'tensorboard'}"


def _told(value: float | None, form: str) -> str:
    """None: every step of a line was skipped."""
    return "unknown (its steps were skipped)" if value is None else format(value, form)


def _describe_tuning(path: Path, values: Mapping[str, Any]) -> Iterator[str]:
    """The run folder of scripts/finetune.py."""
    from earlybert import scores

    yield f"fine-tuning {path} of {values['model']}: {', '.join(values['tasks'])}"
    runs = scores.collect([path]) if any(path.glob("**/result.json")) else []
    done, asked = sum(len(run.results) for run in runs), len(values["tasks"]) * len(values["seeds"])
    yield f"{done} of {asked} done, each task with each seed"
    if runs:
        yield scores.table(runs)


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and path.name.startswith("step-") and path.parent.name == "checkpoints"


def _describe_checkpoint(path: Path, arguments: argparse.Namespace) -> Iterator[str]:
    from earlybert import checkpoint

    manifest = checkpoint.read_manifest(path)
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    size = sum(entry["bytes"] for entry in manifest.files.values())
    yield f"checkpoint {path}: step {manifest.step:,}, format {manifest.version}"
    yield (
        f"written by {manifest.world_size} ranks, ZeRO-{manifest.stage}, {manifest.precision}, "
        f"with {versions}"
    )
    yield f"{len(manifest.files)} files, {size / 1e6:,.1f} MB: {_state_of(path, arguments)}"
    heads, neurons = manifest.model["heads_per_layer"], manifest.model["neurons_per_layer"]
    for layer, (h, n) in enumerate(zip(heads, neurons, strict=True)):
        yield f"layer {layer:>2}: {h} heads, {n:,} neurons"
    for ticket in manifest.progress["tickets"]:
        yield f"ticket drawn at step {ticket['step']:,} ({ticket['reason']})"
    for step, loss in manifest.trainer.get("eval_losses", {}).items():
        yield f"held-out loss at step {int(step):>7,}: {loss:.4f}"


def _is_ticket(path: Path) -> bool:
    return path.is_file() and path.suffix == ".json" and "neuron_widths" in _read_json(path)


def _describe_ticket(path: Path, arguments: argparse.Namespace) -> Iterator[str]:
    from earlybert.ticket import Ticket

    ticket = Ticket.load(path)
    yield f"ticket {path}: {ticket}"
    for layer, (heads, neurons) in enumerate(zip(ticket.heads, ticket.neurons, strict=True)):
        width, wide = ticket.head_widths[layer], ticket.neuron_widths[layer]
        picture = "".join("#" if head in heads else "." for head in range(width))
        bar = "=" * round(_BAR * len(neurons) / wide)
        yield (
            f"layer {layer:>2}: heads {picture} ({len(heads)} of {width})  "
            f"neurons {bar:.<{_BAR}} ({len(neurons):,} of {wide:,})"
        )
    for step, far_heads, far_neurons in ticket.distances:
        if far_heads is not None and far_neurons is not None:
            yield f"distance at step {step:>6,}: heads {far_heads:.3f}, neurons {far_neurons:.3f}"
    yield f"sha256 {ticket.sha256}"


_BAR = 32


def _state_of(folder: Path, arguments: argparse.Namespace) -> str:
    from earlybert import checkpoint

    try:
        manifest = checkpoint.read_manifest(folder)
    except EarlyBertError as error:
        return f"broken: {error}"
    if not arguments.verify:
        return "complete (--verify compares the checksums)"
    wrong = checkpoint.flaws(folder, manifest)
    return f"broken: {'; '.join(wrong)}" if wrong else "complete, every checksum is right"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EarlyBertError(f"{path}: cannot be read as JSON: {error}") from error
    return values if isinstance(values, dict) else {}


DESCRIBERS = {
    "checkpoint": Describer(_is_checkpoint, _describe_checkpoint),
    "run": Describer(_is_run, _describe_run),
    "corpus": Describer(_is_corpus, _describe_corpus),
    "ticket": Describer(_is_ticket, _describe_ticket),
}
"""Asked in this order; the first that recognises PATH describes it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="PATH", help=" or ".join(DESCRIBERS))
    parser.add_argument("--document", type=int, metavar="I", help="show this document of a corpus")
    parser.add_argument("--verify", action="store_true", help="compare every checksum first")
    parser.add_argument("--report", action="store_true", help="write a run's page and heat map of the search")
    arguments = parser.parse_args()
    if not arguments.path.exists():
        raise EarlyBertError(f"{arguments.path}: no such file or folder; check the path")
    for describer in DESCRIBERS.values():
        if describer.recognises(arguments.path):
            for line in describer.describe(arguments.path, arguments):
                print(line)
            return 0
    raise EarlyBertError(
        f"{arguments.path} is none of: {', '.join(DESCRIBERS)}; give the folder or file of one"
    )


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing here touches a device: DeepSpeed need not look
    run_command(main)
