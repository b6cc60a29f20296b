"""`bench.py saving`: curves read right, and slices that go on where the one before stopped."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from corpora import random_documents, write_corpus
from earlybert.config import to_toml
from ranks import launch

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def saving():
    sys.path.insert(0, str(SCRIPTS))
    try:
        from benchmarks import saving
    finally:
        sys.path.remove(str(SCRIPTS))
    return saving


def test_the_time_to_a_loss_lies_on_the_line_between_two_evaluations(saving):
    curve = saving.Curve((0, 10, 20), (0.0, 5.0, 10.0), (8.0, 6.0, 5.0))
    assert curve.reaches(8.5) == 0 and curve.reaches(7.0) == 2.5 and curve.reaches(5.25) == 8.75
    assert curve.reaches(4.9) is None and curve.final == 5.0
    assert (curve.at(0.0), curve.at(9.9), curve.at(50.0)) == (8.0, 6.0, 5.0)


def test_time_is_that_of_steps_and_draws_and_not_of_evaluations(saving, tmp_path):
    lines = [
        {"step": 0, "eval_loss": 9.0},
        {"step": 4, "step_seconds": 0.5},
        {"step": 6, "step_seconds": 1.0, "eval_loss": 7.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert saving.curve(tmp_path) == saving.Curve((0, 6), (0.0, 4.0), (9.0, 7.0))


def test_a_slice_goes_on_where_the_one_before_stopped_and_all_arms_have_the_tickets_shape(
    saving, tmp_path, monkeypatch
):
    def start(command, *, ranks, log):  # real processes still, forked from the tests' server
        return launch(command[1], command[2:], ranks=ranks, logs=tmp_path)

    monkeypatch.setattr(saving, "start", start)
    write_corpus(tmp_path / "corpus", random_documents(60, longest=120))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    values = {
        "name": "saving", "deepspeed": "ds.json", "log_every": 1,
        "model": {"layers": 2, "hidden": 32, "heads": 4, "neurons": 48, "positions": 32, "dropout": 0.0},
        "data": {"corpus": str(tmp_path / "corpus"), "held_out": 0.1, "workers": 0},
        "phases": [{"steps": 10, "sequence_length": 16, "batch": 4, "micro_batch": 2, "learning_rate": 1e-3}],
        "ticket": {
            "every": 1, "minimum_step": 4, "latest_step": 4, "neuron_multiple": 1, "minimum_neurons": 1,
        },
        "evaluate": {"every": 5, "samples": 8},
    }  # fmt: skip
    (tmp_path / "e.toml").write_text(to_toml(values))
    arguments = Namespace(
        experiment=tmp_path / "e.toml", override=[], out=tmp_path / "runs", minutes=0.0, rates=[1e-3, 3e-3],
        seeds=1, share=0.8, arm=["dense", "ticket", "random", "scratch"], ranks=1, also=None,
    )  # fmt: skip
    told = saving.measure(arguments)
    assert not told["arms"] and not any(told["grid"].values()), "no time, no run"
    arguments.minutes, arguments.rates = 10.0, [1e-3]
    told = saving.measure(arguments)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
    assert len(done) == 4
    for arm, row in told["arms"].items():
        lines = (tmp_path / "runs" / f"{arm}-0.001-1" / "metrics.jsonl").read_text().splitlines()
        evaluated = [line for line in map(json.loads, lines) if "eval_loss" in line]
        assert row["final_loss"] == [evaluated[-1]["eval_loss"]]
        assert told["curves"][arm][0]["steps"] == tuple(line["step"] for line in evaluated)
    assert [told["arms"][arm]["steps"][0] for arm in told["arms"]] == [10, 8, 8, 8]

    def shape(name):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        return last["heads_kept"], last["neurons_kept"], last["parameters"]

    shapes = {arm: shape(f"{arm}-0.001-1") for arm in told["arms"]}
    assert shapes["random"] == shapes["ticket"] and shapes["scratch"] == shapes["ticket"] < shapes["dense"]
    tickets = [
        json.loads((tmp_path / "runs" / f"{arm}-0.001-1" / "ticket.json").read_text())
        for arm in ("ticket", "random")
    ]
    assert [len(n) for n in tickets[0]["neurons"]] == [len(n) for n in tickets[1]["neurons"]]
    assert tickets[0]["neurons"] != tickets[1]["neurons"] and tickets[1]["step"] == tickets[0]["step"] == 4
    assert saving.measure(arguments) == told, "nothing is done twice"
    assert done == {path: path.stat().st_mtime_ns for path in done}
