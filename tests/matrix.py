"""What runs: ZeRO stage, precision, processes, offload, optimizer, accumulation, activation checkpointing.

    python tests/matrix.py            run every case and write docs/matrix.md

`cases()` is a covering set: every pair of choices stands in one of its cases, or is refused at the start with
the reason (`refusal`). A case searches, draws, saves, draws again, and goes on from the checkpoint.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ranks
import tiny
from earlybert import checkpoint, dist, mechanics, state
from earlybert.adapters import bert_layers
from earlybert.config import SettingsError
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining

FACTORS: dict[str, tuple[Any, ...]] = {
    "stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16", "fp16"),
    "processes": (1, 2, 4),
    "offload": ("none", "optimizer", "parameters"),
    "optimizer": ("AdamW", "LAMB", "Muon"),
    "accumulation": (1, 4),
    "checkpointing": ("off", "on"),
}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.06, "fp16": 0.01}
PAGE = Path(__file__).parent.parent / "docs" / "matrix.md"
Case = tuple[Any, ...]


def refusal(case: Case) -> str | None:
    """Why this combination is refused, in the program's words; None where it runs."""
    asked = dict(zip(FACTORS, case, strict=True))
    zero: dict[str, Any] = {"stage": asked["stage"]}
    if asked["offload"] != "none":
        zero["offload_optimizer" if asked["offload"] == "optimizer" else "offload_param"] = {"device": "cpu"}
    values: dict[str, Any] = {"zero_optimization": zero}
    if asked["precision"] != "fp32":
        values[asked["precision"]] = {"enabled": True}
    if asked["optimizer"] == "Muon":
        values["optimizer"] = {"type": "Muon"}
    try:
        mechanics.check(values, where="ds.json")
    except SettingsError as error:
        return str(error).removeprefix("ds.json: ")
    return None


def pairs(case: Case) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    """The pairs of choices that a case has."""
    return set(itertools.combinations(enumerate(case), 2))


def cases() -> list[Case]:
    """A covering set of those that run, greedily and the same each time."""
    running = [case for case in itertools.product(*FACTORS.values()) if refusal(case) is None]
    left = set().union(*map(pairs, running))
    chosen = []
    while left:
        best = max(running, key=lambda case: (len(pairs(case) & left), -case[2]))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def refused_pairs() -> dict[tuple[str, str], str]:
    """{(choice, choice): reason} of pairs that no running case has, whatever else is chosen."""
    every = list(itertools.product(*FACTORS.values()))
    runs = set().union(*(pairs(case) for case in every if refusal(case) is None))
    names = list(FACTORS)
    found = {}
    for case in every:
        reason = refusal(case)
        for one, two in pairs(case) - runs if reason is not None else ():
            key = f"{names[one[0]]} {one[1]}", f"{names[two[0]]} {two[1]}"
            found.setdefault(key, reason)
    return found


def words(case: Case) -> str:
    return ", ".join(f"{name} {choice}" for name, choice in zip(FACTORS, case, strict=True))


# --- on every rank ---


def fixed_logits(engine: Any) -> torch.Tensor:
    engine.eval()
    with torch.no_grad():
        logits = engine(**tiny.batch(99, 0)).prediction_logits.float().clone()
    engine.train()
    return logits


def masked_logits(masters: dict[str, torch.Tensor], ticket: Any) -> torch.Tensor:
    """Of the dense model in fp32, the coefficients of units outside the ticket being 0."""
    model = EarlyBertForPreTraining(tiny.config())
    weights = {name: value.clone() for name, value in masters.items()}
    for layer, heads, neurons in zip(bert_layers(2), ticket.heads, ticket.neurons, strict=True):
        for name, kept in ((layer.head_coefficients, heads), (layer.neuron_coefficients, neurons)):
            mask = torch.zeros_like(weights[name])
            mask[list(kept)] = 1
            weights[name] *= mask
    return model_logits(model, weights)


def model_logits(model: EarlyBertForPreTraining, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return model.eval()(**tiny.batch(99, 0)).prediction_logits


def run_case(case: Case, folder: str) -> dict[str, Any]:
    """Search, draw, save, draw again; then the same from the checkpoint. What a test compares."""
    asked = dict(zip(FACTORS, case, strict=True))
    tiny.ACCUMULATION = asked["accumulation"]
    settings = tiny.settings(draws=2, moments="keep")

    def fresh(**changes: Any) -> Any:
        return tiny.engine(
            asked["stage"], asked["precision"], settings, clipping=1.0,
            offload=asked["offload"] == "optimizer", parameter_offload=asked["offload"] == "parameters",
            lamb=asked["optimizer"] == "LAMB", checkpointing=asked["checkpointing"] == "on", **changes,
        )  # fmt: skip

    engine, masters = fresh(), {}
    cut_state = engine._cut_state

    def cutting(*arguments: Any, **options: Any) -> Any:
        if not masters:
            whole = state.whole_parameters(state.read(engine.inner))
            masters.update({name: tensors["master"].clone() for name, tensors in whole})
        return cut_state(*arguments, **options)

    engine._cut_state = cutting
    losses = tiny.train(engine, range(4))
    drawn, masked = fixed_logits(engine), masked_logits(masters, engine.ticket)
    losses += tiny.train(engine, range(4, 6))
    saved = fixed_logits(engine)
    what = {"experiment": "e", "corpus": "c", "trainer": {}, "keep": 1}
    checkpoint.save(engine, Path(folder), step=6, stage=asked["stage"], precision=asked["precision"], **what)
    progress, shape = engine.progress, engine.module.config
    after = tiny.train(engine, range(6, 10))
    tickets = engine.progress.tickets
    engine.close()
    dist.barrier()
    found = checkpoint.newest_good(Path(folder))
    assert found is not None
    exported = model_logits(
        EarlyBertForPreTraining(EarlyBertConfig.from_dict(shape.to_dict())), checkpoint.weights(found)
    )
    again = tiny.initialize(
        model=_enabled(EarlyBertForPreTraining(EarlyBertConfig.from_dict(found.manifest.model)), asked),
        config=engine._config,
        early_bird=tiny.EarlyBird(settings=settings, seed=7),
        optimizer=engine._factory,
        weight_decay=tiny.DECAY,
        progress=type(progress).from_json(found.manifest.progress, where="test"),
    )
    checkpoint.load(again, found)
    resumed = tiny.train(again, range(6, 10))
    again.close()
    return {
        "losses": losses + after, "resumed": resumed, "after": after, "tickets": tickets,
        "drawn": float((drawn - masked).abs().max()), "exported": float((saved - exported).abs().max()),
    }  # fmt: skip


def _enabled(model: Any, asked: dict[str, Any]) -> Any:
    if asked["checkpointing"] == "on":
        tiny.enable_checkpointing(model)
    return model


# --- in the test's process ---


def check(case: Case) -> None:
    """Run a case and compare; raises AssertionError with what is off."""
    asked = dict(zip(FACTORS, case, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        results = ranks.run("matrix:run_case", ranks=asked["processes"], case=case, folder=folder)
    for result in results:
        assert len(result["tickets"]) == 2, "both draws came"
        assert result["losses"] == results[0]["losses"], "the ranks agree"
        assert all(0 < loss < 10 for loss in result["losses"])
        assert result["resumed"] == result["after"], "a resume is bit-equal"
        assert result["drawn"] <= TOLERANCE[asked["precision"]], "the small model is the masked dense one"
        assert result["exported"] <= TOLERANCE[asked["precision"]], "the checkpoint has the engine's weights"


def page(outcomes: dict[Case, str]) -> str:
    """docs/matrix.md."""
    lines = [
        "# What runs",
        "",
        "Written by `python tests/matrix.py`, which ran each line: a search, a draw, a checkpoint, a second",
        "draw, and the same again from the checkpoint, bit-equal, on CPU processes. Every pair of choices",
        "stands in one of the lines or is refused. fp16 has a dynamic loss scale; LAMB is",
        "`earlybert.optim.Lamb`.",
        "",
        f"| {' | '.join(FACTORS)} | outcome |",
        f"|{'---|' * (len(FACTORS) + 1)}",
    ]
    lines += [f"| {' | '.join(map(str, case))} | {outcomes[case]} |" for case in cases()]
    lines += ["", "## What is refused at the start", "", "| pair | reason |", "|---|---|"]
    rows: dict[str, list[str]] = {}
    for (one, two), reason in refused_pairs().items():
        if reason.startswith("Muon") or "optimizer Muon" not in (one, two):
            rows.setdefault(reason, []).append(f"{one} with {two}")
    for reason, found in rows.items():
        what = "optimizer Muon" if reason.startswith("Muon") else "; ".join(sorted(found))
        lines.append(f"| {what} | {reason} |")
    return "\n".join(lines) + "\n"


def _outcomes() -> Iterator[tuple[Case, str]]:
    for case in cases():
        began = time.monotonic()
        try:
            check(case)
            outcome = "works"
        except AssertionError as error:
            outcome = f"FAILS: {str(error).splitlines()[0]}"
            print(str(error)[-3000:], file=sys.stderr)
        print(f"{words(case)}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
        yield case, outcome


if __name__ == "__main__":
    PAGE.write_text(page(dict(_outcomes())))
