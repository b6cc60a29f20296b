"""`bench.py saving` and `recipes`: curves read right, and slices that go on where the one before stopped."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from corpora import random_documents, write_corpus
from earlybert.config import EarlyBertError, to_toml
from earlybert.experiment import load
from ranks import launch

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(SCRIPTS))
    try:
        from benchmarks import recipes, saving
    finally:
        sys.path.remove(str(SCRIPTS))
    return saving, recipes


@pytest.fixture
def saving(benchmarks, tmp_path, monkeypatch):
    def start(command, *, ranks, log):  # real processes still, forked from the tests' server
        path = Path(log.name)
        logs = tmp_path / "logs" / path.stem
        logs.mkdir(parents=True, exist_ok=True)
        path.unlink()
        path.symlink_to(logs / "log-0.txt")
        return launch(command[1], command[2:], ranks=ranks, logs=logs)

    monkeypatch.setattr(benchmarks[0], "start", start)
    return benchmarks[0]


@pytest.fixture
def recipes(benchmarks, saving):
    return benchmarks[1]


def experiment(folder):
    """The values of a tiny experiment with a ticket, on a corpus of random tokens in `folder`."""
    write_corpus(folder / "corpus", random_documents(60, longest=120))
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    return {
        "name": "saving", "deepspeed": str(folder / "ds.json"), "log_every": 1,
        "model": {"layers": 2, "hidden": 32, "heads": 4, "neurons": 48, "positions": 32, "dropout": 0.0},
        "data": {"corpus": str(folder / "corpus"), "held_out": 0.1, "workers": 0},
        "phases": [{"steps": 10, "sequence_length": 16, "batch": 4, "micro_batch": 2, "learning_rate": 1e-3}],
        "ticket": {
            "every": 1, "minimum_step": 4, "latest_step": 4, "neuron_multiple": 1, "minimum_neurons": 1,
        },
        "evaluate": {"every": 5, "samples": 8},
    }  # fmt: skip


def test_the_time_to_a_loss_lies_on_the_line_between_two_evaluations(saving):
    curve = saving.Curve((0, 10, 20), (0.0, 5.0, 10.0), (8.0, 6.0, 5.0))
    assert (
        curve.reaches(8.5) == (0, 0)
        and curve.reaches(7.0) == (2.5, 5)
        and curve.reaches(5.25) == (8.75, 17.5)
    )
    assert curve.reaches(4.9) is None and curve.final == 5.0
    assert (curve.at(0.0), curve.at(9.9), curve.at(50.0)) == (8.0, 6.0, 5.0)


def test_time_is_that_of_steps_and_draws_and_not_of_evaluations_or_the_compiler(saving, tmp_path):
    lines = [
        {"step": 0, "eval_loss": 9.0},
        {"step": 4, "step_seconds": 3.0, "compile_seconds": 10.0},
        {"step": 6, "step_seconds": 1.0, "eval_loss": 7.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert saving.curve(tmp_path) == saving.Curve((0, 6), (0.0, 4.0), (9.0, 7.0), 10.0)


def test_a_slice_goes_on_where_the_one_before_stopped_and_all_arms_have_the_tickets_shape(saving, tmp_path):
    (tmp_path / "e.toml").write_text(to_toml(experiment(tmp_path)))
    arguments = Namespace(
        experiment=tmp_path / "e.toml", override=[], out=tmp_path / "runs", minutes=0.0, rates=[1e-3, 3e-3],
        seeds=1, share=0.8, arm=["dense", "ticket", "random", "scratch"], ranks=1, also=None,
    )  # fmt: skip
    told = saving.measure(arguments)
    assert not told["arms"] and not any(told["grid"].values()), "no time, no run"
    arguments.minutes, arguments.rates = 10.0, [1e-3]
    with pytest.raises(EarlyBertError, match="holds no run of ticket .*; add --arm ticket"):
        saving.measure(Namespace(**{**vars(arguments), "arm": ["random"]}))
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
    other = saving._words(saving.Run("random", 3e-3, 1), arguments)
    widths = [len(neurons) for neurons in tickets[0]["neurons"]]
    assert f"ticket.neurons_per_layer={widths}" in other, "the ticket has run at another rate only"
    assert saving.measure(arguments) == told, "nothing is done twice"
    assert done == {path: path.stat().st_mtime_ns for path in done}


def test_a_folder_answers_one_question_and_an_arm_that_cannot_run_is_told_before_the_others_do(
    saving, tmp_path
):
    values = experiment(tmp_path)
    (tmp_path / "e.toml").write_text(to_toml(values))
    arguments = Namespace(
        experiment=tmp_path / "e.toml", override=[], out=tmp_path / "runs", minutes=0.0, rates=[1e-3],
        seeds=1, share=0.8, arm=["dense"], ranks=1, also=None,
    )  # fmt: skip

    def asked(**changes):
        return saving.measure(Namespace(**{**vars(arguments), **changes}))

    with pytest.raises(EarlyBertError, match="unknown setting 'hiden'"):
        asked(override=["model.hiden=64"])
    with pytest.raises(EarlyBertError, match=r"ticket.latest_step = 100 .*lower ticket.latest_step$"):
        asked(override=["ticket.latest_step=100"], arm=["dense", "ticket", "random"])
    with pytest.raises(EarlyBertError, match="lower ticket.latest_step$"):  # random needs the ticket
        asked(share=0.3, arm=["dense", "ticket", "random"])
    asked()  # what was refused is not on record
    asked(arm=["dense", "ticket"], rates=[1e-3, 3e-3], seeds=2, minutes=0.0)
    with pytest.raises(EarlyBertError, match=r"holds results with another share \(0.8\); choose another"):
        asked(share=1.0)
    with pytest.raises(EarlyBertError, match="holds results with another experiment; choose another"):
        asked(override=["model.hidden=64"])
    with pytest.raises(EarlyBertError, match=r"layer_ratio = 1.0: .*; leave layerdrop out: --arm dense$"):
        asked(override=["ticket.neuron_ratio=0.9"], out=tmp_path / "other", arm=["dense", "layerdrop"])
    with pytest.raises(EarlyBertError, match=r"--arm dence: choose among dense, .*, layerdrop, reset$"):
        asked(arm=["dence"], also=["reset: ticket.moments=reset"])
    with pytest.raises(EarlyBertError, match=r"leave its --also 'wrong' out, or change its words$"):
        asked(arm=["dense"], also=["wrong: ticket.latest_step=-1"])
    with pytest.raises(EarlyBertError, match=r"layer_ratio = 1.0: [^;]*$"):
        asked(override=["ticket.neuron_ratio=0.9"], out=tmp_path / "alone", arm=["layerdrop"])
    (tmp_path / "old" / "dense-0.001-1").mkdir(parents=True)
    (tmp_path / "old" / "dense-0.001-1" / "done").touch()
    with pytest.raises(EarlyBertError, match="old does not say which question its results answer"):
        asked(out=tmp_path / "old")
    (tmp_path / "e.toml").write_text(to_toml({**values, "seed": 7}))
    with pytest.raises(EarlyBertError, match="holds results with another experiment"):
        asked()


def test_a_run_that_fails_is_told_in_its_own_words(saving, tmp_path):
    values = experiment(tmp_path)
    (tmp_path / "e.toml").write_text(to_toml(values))
    (tmp_path / "corpus" / "manifest.json").unlink()
    arguments = Namespace(
        experiment=tmp_path / "e.toml", override=[], out=tmp_path / "runs", minutes=1.0, rates=[1e-3],
        seeds=1, share=0.8, arm=["dense"], ranks=1, also=None,
    )  # fmt: skip
    with pytest.raises(EarlyBertError, match=r"dense-0.001-1: .*corpus.*\(.*dense-0.001-1.log\)"):
        saving.measure(arguments)


def test_a_schedule_is_stretched_in_proportion(recipes):
    assert recipes.stretched([100, 300], [0.1, 0.2], seconds=140) == [200, 600]
    assert recipes.stretched([1000, 1], [1.0, 1.0], seconds=10) == [10, 1], "no phase goes"


def test_recipes_get_the_same_time_and_the_same_held_out_rows_and_slices_go_on(recipes, tmp_path):
    values = experiment(tmp_path)
    (tmp_path / "classic.toml").write_text(to_toml(values))
    longer = {**values["phases"][0], "batch": 8, "sequence_length": 32, "decay": "stable"}
    values["phases"].append(longer)
    values["data"] = {**values["data"], "mask_probability": 0.3}
    (tmp_path / "modern.toml").write_text(to_toml(values))
    arguments = Namespace(
        experiment=[tmp_path / "classic.toml", tmp_path / "modern.toml"], override=[], out=tmp_path / "runs",
        minutes=0.0, seconds=0.3, seeds=1, samples=8, evaluations=2, ranks=1,
    )  # fmt: skip
    assert recipes.measure(arguments)["recipes"] == {}, "no time, no run"
    arguments.minutes = 10.0
    told = recipes.measure(arguments)
    for name in ("classic", "modern"):
        trial = [json.loads(t) for t in (tmp_path / "runs" / f"trial-{name}" / "metrics.jsonl").open()]
        warm = {line["phase"]: line["step_seconds"] for line in trial if "step_seconds" in line}
        run = load(tmp_path / "runs" / f"{name}-1" / "experiment.toml", [])[0]
        steps = [phase.steps for phase in run.phases]
        assert steps == recipes.stretched(
            [10] * len(steps), [warm[n] for n in range(len(steps))], seconds=0.3
        )
        assert not run.ticket.enabled and run.held_out.mask_probability == 0.15
        row, curve = told["recipes"][name], told["curves"][name][0]
        assert row["steps"] == sum(steps) == curve["steps"][-1]
        assert row["final_loss"] == [curve["losses"][-1]] and row["seconds"][0] > 0
        assert row["tokens"] == sum(p.steps * p.batch * p.sequence_length for p in run.phases)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
    assert recipes.measure(arguments) == told, "nothing is done twice"
    with pytest.raises(EarlyBertError, match=r"holds results with another seconds \(0.3\)"):
        recipes.measure(Namespace(**{**vars(arguments), "seconds": 0.4}))
    (tmp_path / "elsewhere").mkdir()
    twice = [*arguments.experiment, tmp_path / "elsewhere" / "modern.toml"]
    with pytest.raises(EarlyBertError, match="two experiments are called modern"):
        recipes.measure(Namespace(**{**vars(arguments), "experiment": twice}))
    assert len(done) == 4 and done == {path: path.stat().st_mtime_ns for path in done}
