"""`bench.py ticket` and `train` at a shape of no size: what is timed is what the table says."""

from argparse import Namespace
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_the_step_of_the_search_and_of_the_ticket_are_held_against_the_dense_one(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import engines, ticket

    monkeypatch.setitem(engines.SHAPES, "tiny", {"layers": 2, "hidden": 32, "heads": 4})
    arguments = Namespace(
        shape="tiny", length=16, batch=2, ranks=1, stage=1, steps=6, rounds=2, compile=False, dropout=0.1,
        head_ratio=0.5, neuron_ratio=0.3,
    )  # fmt: skip
    figures = ticket.measure(arguments, Path())
    heads, neurons = figures["widths"]
    assert sum(heads) < 8 and sum(neurons) < 256, "drawn at its first step"
    dense, small = (
        2 * 2 * (32 * 4 * h * 8 + 2 * 16 * h * 8 + 2 * 32 * n)
        for h, n in (([4, 4], [128, 128]), (heads, neurons))
        for h, n in [(sum(h) / 2, sum(n) / 2)]
    )
    assert 0 < small < dense
    head = 2 * 32 * (engines.VOCABULARY + 32) * (2 / 16)
    assert figures["flops_ratio"] == pytest.approx((small + head) / (dense + head), rel=1e-6)
    middle = figures["seconds"]
    look = (middle["look"] - middle["search"]) / figures["every"]
    assert figures["search_ratio"] == pytest.approx((middle["search"] + look) / middle["dense"])
    assert figures["ticket_ratio"] == pytest.approx(middle["shrunken"] / middle["dense"])
    ticket.tell({**figures, "shape": "tiny", "stage": 1, "ranks": 1, "device": "here"})
    assert "| shrunken |" in capsys.readouterr().out


def test_whole_programs_are_timed_in_turn_also_on_one_rank(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import engines, train

    monkeypatch.setitem(engines.SHAPES, "tiny", {"layers": 2, "hidden": 32, "heads": 4})
    arguments = Namespace(
        shape="tiny", length=16, batch=2, ranks=1, steps=5, rounds=1, document=40,
        override=["model.dropout=0"], kind=["ours-boundaries", "deepspeed"],
    )  # fmt: skip
    figures = train.measure(arguments)
    assert list(figures["kinds"]) == arguments.kind and figures["ceiling_flops"] > 1e8
    needed = train.flops_per_token("tiny", 16)
    for row in figures["kinds"].values():
        assert row["utilisation"] == pytest.approx(
            row["tokens_per_second"] * needed / figures["ceiling_flops"]
        )
        assert row["tokens_per_second"] > 10 and row["peak_mb"] > 50
    train.tell(figures)
    assert "| ours-boundaries |" in capsys.readouterr().out


def test_a_kind_of_program_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import train

    from earlybert.config import SettingsError

    with pytest.raises(SettingsError, match="--kind mine: choose among ours, "):
        train.measure(Namespace(kind=["mine"]))
