"""A signal is heard within an evaluation, on all ranks in the same place, and nothing is trained twice."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from integration.test_finetune import Folder, timeless, write_rte

import ranks
from earlybert import dist, finetune, judging, recipes, tuning

BATCH = 4


class Rows:
    """Numbered rows; the model says each row's number."""

    def __init__(self, count):
        self.input_ids = [[number] * (1 + number % 3) for number in range(count)]

    def __len__(self):
        return len(self.input_ids)

    def collate(self, rows, *, pad, targets):
        assert not targets
        ids = torch.tensor([[self.input_ids[row][0]] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Engine:
    device = "cpu"
    training = True

    def __call__(self, input_ids, attention_mask):
        assert not self.training
        return input_ids

    def eval(self):
        self.training = False

    def train(self):
        self.training = True


TASK = SimpleNamespace(logits=lambda output, mask: [(row.item(),) for row in output])


def said(stop_rank=None, stop_before=None):
    """What comes of an evaluation of 19 rows, how many batches were begun, and whether training goes on;
    rank `stop_rank` is asked to stop before its batch number `stop_before`."""
    begun, engine = [], Engine()
    try:
        found = judging.logits(
            engine, TASK, Rows(19), batch=BATCH, pad=0, mark=lambda: begun.append(1),
            asked=lambda: dist.rank() == stop_rank and len(begun) > stop_before,
        )  # fmt: skip
    except judging.Interrupted:
        found = None
    return found, len(begun), engine.training


@pytest.mark.parametrize("size", [1, 2])
def test_each_row_is_answered_in_its_place(size):
    told = ranks.run("test_judging:said", ranks=size)
    assert told[0] == ([(number,) for number in range(19)], -(-5 // size), True)


@pytest.mark.parametrize("stop_rank", [0, 1])
def test_all_ranks_stop_before_the_batch_where_one_is_asked(stop_rank):
    assert (
        ranks.run("test_judging:said", ranks=2, stop_rank=stop_rank, stop_before=1) == [(None, 2, True)] * 2
    )


class Lost(Exception):
    """What a start dies of."""


def stopped(path, stops, dies=()):
    """Tune RTE. Evaluations number `stops` are stopped within, by a signal to rank 1 or by `stop` in the
    folder; the start whose evaluation number `dies` is done dies before its next save."""
    real, count = judging.logits, []

    def logits(*given, **named):
        count.append(1)
        if len(count) in stops and dist.rank() == 1:
            if len(count) % 2:
                (Path(path).parent / "runs" / "stopped" / "stop").touch()
            else:
                signal.raise_signal(signal.SIGTERM)
        return real(*given, **named)

    judging.logits = logits
    record = tuning.Tuning._record

    def dying(self, *given, **named):
        told = record(self, *given, **named)
        if told and len(count) in dies:
            count.append(1)
            raise Lost
        return told

    tuning.Tuning._record = dying
    done = []
    while not done or done[-1] is not True:
        settings, values = recipes.load(path, ["name=stopped" if stops else "name=whole"], kind="glue")
        try:
            done.append(finetune.tune(settings, values, where="e.toml"))
        except Lost:
            done.append("lost")
    return done, len(count)


def test_an_evaluation_that_is_stopped_comes_first_when_the_same_command_goes_on(tmp_path):
    folder = Folder(tmp_path, tasks=["rte"], checkpoint_every=100, recipe={
        "batch": 16, "micro_batch": 4, "learning_rate": 3e-3, "sequence_length": 64, "epochs": 2.0,
    })  # fmt: skip
    write_rte(tmp_path / "data", rows=96)
    for name, stops, dies, runs, evaluations in (
        ("whole", [], [], [True], 3),
        ("stopped", [1, 2, 5], [3], [False, False, "lost", False, True], 8),
    ):
        for told in ranks.run(
            "test_judging:stopped", ranks=2, path=str(tmp_path / "e.toml"), stops=stops, dies=dies
        ):
            assert told == (runs, evaluations)
        assert [line["step"] for line in folder.metrics(name, "rte")] == [5, 6, 10, 12]
    assert timeless(folder.metrics("whole", "rte")) == timeless(folder.metrics("stopped", "rte"))
    whole, broken = (folder.result(name, "rte") for name in ("whole", "stopped"))
    assert (whole["scores"], whole["steps"]) == (broken["scores"], broken["steps"])
