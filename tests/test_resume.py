"""A checkpoint of N ranks at ZeRO stage s goes on with M ranks at stage t, before and after the draw.

`python tests/test_resume.py` runs all pairs of {1, 2, 4} ranks and {0, 1, 2, 3} stages, and 3 ranks once, and
writes docs/resume.md.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import pytest

import ranks
import tiny
from earlybert import checkpoint, dist, state
from earlybert.engine import EarlyBird, initialize
from earlybert.lifecycle import empty_module
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining
from earlybert.progress import Progress

MICRO_BATCHES = 12  # of every step, however many ranks share them
SAVED = {"before": 3, "after": 6}
DRAWN, END = 4, 8
WHAT = {"experiment": "e", "corpus": "c", "precision": "fp32"}

Setup = tuple[int, int]
"""Ranks, ZeRO stage."""
SAMPLE: list[tuple[Setup, Setup]] = [
    ((1, 0), (2, 3)), ((2, 3), (1, 0)), ((2, 1), (2, 2)), ((2, 2), (1, 1)), ((2, 0), (3, 2)),
    ((3, 2), (2, 1)),
    ((2, 1), (2, 1)), ((2, 0), (2, 0)), ((2, 3), (2, 3)), ((2, 2), (2, 2)),
]  # fmt: skip
"""Every stage is saved and loaded, up and down in ranks and in stages, and as it was."""


def trains(folder: str, stage: int) -> list[float]:
    """An unbroken run, saved before and after its draw; the losses."""
    rounds = MICRO_BATCHES // dist.world_size()
    engine = tiny.engine(stage, "fp32", tiny.settings(), accumulation=rounds)
    where = Path(folder) / f"{dist.world_size()}-{stage}"
    losses = []
    for step in range(END):
        losses += tiny.train(engine, range(step, step + 1), accumulation=rounds)
        for when, at in SAVED.items():
            if step + 1 == at:
                assert (len(engine.progress.tickets) > 0) == (when == "after")
                checkpoint.save(engine, where / when, step=at, stage=stage, keep=1, **WHAT)
    engine.close()
    return losses


def resumes(folder: str, stage: int, saved: list[Setup]) -> dict[tuple[Setup, str], list[float]]:
    """{what was saved, when: the losses after it}."""
    rounds = MICRO_BATCHES // dist.world_size()
    found = {}
    for (count, saved_stage), when in itertools.product(saved, SAVED):
        stored = checkpoint.newest_good(Path(folder) / f"{count}-{saved_stage}" / when)
        assert stored is not None
        values = tiny.mechanics.complete(
            tiny.mechanics_of(stage, "fp32"), micro_batch=tiny.MICRO, accumulation=rounds, clipping=0.0
        )
        shape = EarlyBertConfig.from_dict(stored.manifest.model)
        engine = initialize(
            model=empty_module(lambda shape=shape: EarlyBertForPreTraining(shape), config=values),
            config=values,
            early_bird=EarlyBird(settings=tiny.settings(), seed=7),
            optimizer=tiny.adamw,
            weight_decay=tiny.DECAY,
            progress=Progress.from_json(stored.manifest.progress, where="test"),
            restored=checkpoint.read(stored),
        )
        checkpoint.verify(engine, stored)
        key = ((count, saved_stage), when)
        found[key] = tiny.train(engine, range(stored.manifest.step, END), accumulation=rounds)
        assert len(engine.progress.tickets) == 1
        assert len(list(state.whole_parameters(state.read(engine.inner)))) > 10
        engine.close()
    return found


def differences(folder: Path, pairs: list[tuple[Setup, Setup]]) -> dict[tuple[Setup, Setup, str], float]:
    """{saved, loaded, when: largest relative difference from the unbroken run of the saving set-up}."""
    unbroken = {
        (count, stage): ranks.run("test_resume:trains", ranks=count, folder=str(folder), stage=stage)[0]
        for count, stage in sorted({saved for saved, _ in pairs})
    }
    found = {}
    for loaded in sorted({loaded for _, loaded in pairs}):
        wanted = [saved for saved, other in pairs if other == loaded]
        arguments = {"folder": str(folder), "stage": loaded[1], "saved": wanted}
        for (saved, when), losses in ranks.run("test_resume:resumes", ranks=loaded[0], **arguments)[
            0
        ].items():
            expected = unbroken[saved][SAVED[when] :]
            found[saved, loaded, when] = max(
                abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)
            )
    return found


def check(found: dict[tuple[Setup, Setup, str], float]) -> None:
    for (saved, loaded, when), difference in found.items():
        bound = 0.0 if saved == loaded else 1e-5
        assert difference <= bound, f"{saved} -> {loaded}, {when} the draw: {difference}"


@pytest.mark.thorough
def test_a_checkpoint_goes_on_with_other_ranks_at_another_stage(tmp_path):
    found = differences(tmp_path, SAMPLE)
    assert len(found) == 2 * len(SAMPLE)
    check(found)


def every_pair() -> list[tuple[Setup, Setup]]:
    setups = list(itertools.product((1, 2, 4), (0, 1, 2, 3)))
    return [*itertools.product(setups, setups), ((4, 1), (3, 3)), ((3, 3), (2, 2))]


@pytest.mark.slow
def test_every_pair_of_ranks_and_stages(tmp_path):
    check(differences(tmp_path, every_pair()))


def table(found: dict[tuple[Setup, Setup, str], float]) -> str:
    """Rows saved, columns loaded; in a cell the larger of before and after the draw."""
    setups = sorted({setup for saved, loaded, _ in found for setup in (saved, loaded)})
    name = "{0[0]}r s{0[1]}".format
    rows = ["| saved \\ loaded | " + " | ".join(map(name, setups)) + " |", "|---" * (len(setups) + 1) + "|"]
    for saved in setups:
        cells = []
        for loaded in setups:
            both = [found[saved, loaded, when] for when in SAVED if (saved, loaded, when) in found]
            cells.append("" if not both else "=" if max(both) == 0 else f"{max(both):.0e}")
        rows.append(f"| {name(saved)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = differences(Path(folder), every_pair())
    check(found)
    (Path(__file__).parent.parent / "docs" / "resume.md").write_text(
        "# Resuming on other ranks and at another ZeRO stage\n\n"
        "Written by `python tests/test_resume.py`. A tiny EarlyBERT in fp32 on CPU, 12 micro-batches a step, "
        f"drawn at step {DRAWN}, saved at steps {SAVED['before']} (before the draw) and {SAVED['after']} "
        f"(after it), by N ranks (`r`) at stage `s`; resumed, and trained to step {END}. In each cell the "
        "largest relative difference of a step's loss from that of the unbroken run, of both checkpoints; "
        "`=` is bit-equal.\n\n" + table(found) + "\n"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
