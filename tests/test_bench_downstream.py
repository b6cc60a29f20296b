"""`bench.py downstream`: stock BERT tuned by us and by Hugging Face's Trainer takes the same steps."""

import json
import os
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import letters
from earlybert.config import EarlyBertError
from ranks import launch

SCRIPTS = Path(__file__).parent.parent / "scripts"


def alone(script, *arguments):
    """Run a script that must not take itself for a rank of a launch, as accelerate does from LOCAL_RANK."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # threads would wait for other tests' ranks
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


@pytest.fixture
def downstream(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import downstream

    def start(command, *, ranks, log, **environment):  # real processes, forked from the tests' server
        return launch(
            "test_bench_downstream:alone", command[1:], ranks=ranks, logs=Path(log.name).parent, **environment
        )

    monkeypatch.setattr(downstream, "start", start)
    return downstream


def arguments(path, **changes):
    values = {
        "model": path / "bert", "data": path / "data", "out": path / "out", "task": ["rte"], "seeds": 2,
        "dropout": 0.0, "precision": "fp32",
        "override": [
            "recipe.epochs=2.0", "recipe.batch=16", "recipe.learning_rate=3e-3", "recipe.sequence_length=64",
        ],
    }  # fmt: skip
    return Namespace(**{**values, **changes})


def write_rte(folder):
    folder.mkdir(parents=True)
    for split, rows in (("train", 70), ("dev", 30)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for n in range(rows):
            words = f"{'abc'[: n % 3 + 1]} x{n}\t{'vwx'[n % 3 :]} {'no' if n % 2 else 'yes'}"
            lines.append(f"{n}\t{words}\t{'not_' * (n % 2)}entailment")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def test_without_dropout_every_steps_loss_is_trainers(downstream, tmp_path, capsys):
    letters.stock_bert(tmp_path / "bert", hidden_size=32, initializer_range=0.15)
    write_rte(tmp_path / "data" / "RTE")
    figures = downstream.measure(arguments(tmp_path))
    found = figures["tasks"]["rte"]
    assert found["loss_difference"] < 1e-5, found
    assert found["ours"]["scores"] == pytest.approx(found["trainer"]["scores"])
    losses = [
        json.loads((tmp_path / "out" / "trainer" / "rte" / f"seed-{seed}.json").read_text())["losses"]
        for seed in (1, 2)
    ]
    assert len(losses[0]) == 10, "two epochs of 70 rows by 16, the last step of each smaller"
    assert losses[0][0] != losses[1][0] and max(losses[0]) - min(losses[0]) > 1e-2
    downstream.tell(figures)
    told = capsys.readouterr().out
    assert "largest difference of a step's loss" in told and "| RTE | " in told
    with pytest.raises(EarlyBertError, match="holds results with another precision .fp32.; choose"):
        downstream.measure(arguments(tmp_path, precision="bf16"))


@pytest.mark.parametrize(
    ("config", "task", "says"),
    [
        (None, "rte", "no config.json is there; give the folder of a stock BERT"),
        ({"model_type": "earlybert"}, "rte", "is a earlybert, and Trainer's side is stock BERT; give"),
        ({"model_type": "bert"}, None, "no task of GLUE is there"),
        ({"model_type": "bert"}, "boolq", "'boolq' is not a task that is known"),
    ],
)
def test_a_mistake_is_named(downstream, tmp_path, config, task, says):
    (tmp_path / "bert").mkdir()
    if config is not None:
        (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EarlyBertError, match=says):
        downstream.measure(arguments(tmp_path, task=task and [task]))
