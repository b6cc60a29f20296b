"""Runs side by side: what a mean is taken over, and what is not compared."""

import json

import pytest

from earlybert import scores
from earlybert.config import EarlyBertError
from earlybert.recipes import defaults


def write(folder, task, seed, *, score=80.0, metrics=None, **changes):
    """A result, as scripts/finetune.py leaves it."""
    told = {
        "task": task, "seed": seed, "score": score,
        "scores": metrics or {"dev": {"accuracy": score, "score": score}},
        "seconds": {"search": 0.0, "train": 100.0}, "parameters": 10, "recipe": defaults(task), "rows": "r",
        "judged": "j", "origin": "o", "precision": "fp32", "ranks": 2, "device": "cpu", **changes,
    }  # fmt: skip
    path = folder / task / f"seed-{seed}" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(told))
    return path


def test_a_folder_of_several_runs_is_refused_by_their_names(tmp_path):
    for name in ("dense", "ticket"):
        write(tmp_path / name, "rte", 1)
    with pytest.raises(EarlyBertError, match="several runs: .*dense/rte/seed-1 and .*ticket/rte/seed-1"):
        scores.collect([tmp_path])
    assert [run.name for run in scores.collect([tmp_path / "dense", tmp_path / "ticket"])] == [
        "dense",
        "ticket",
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": "s"}, "the same training rows"), ({"judged": "k"}, "the same rows to judge by"),
        ({"origin": "p"}, "the same model"), ({"precision": "bf16"}, "the same precision"),
        ({"recipe": {**defaults("rte"), "epochs": 1.0}}, "the same recipe"),
        ({"recipe": {**defaults("rte"), "micro_batch": 2}}, None), ({"ranks": 1, "device": "other"}, None),
        ({"recipe": {k: v for k, v in defaults("rte").items() if k != "batch"}}, None),
        ({"origin": None}, None),
    ],
)  # fmt: skip
def test_a_mean_over_seeds_that_are_not_alike_is_refused(tmp_path, changes, says):
    write(tmp_path, "rte", 1)
    write(tmp_path, "cola", 1, rows="another task's")
    write(tmp_path, "rte", 2, **changes)
    if says is None:
        assert scores.collect([tmp_path])[0].scores("rte") == [80.0, 80.0]
        return
    with pytest.raises(EarlyBertError, match=f"seed-1 and .*seed-2 do not have {says}"):
        scores.collect([tmp_path])


def test_a_cell_of_fewer_seeds_says_so(tmp_path):
    for run, task, seed in (("a", "rte", 1), ("a", "rte", 2), ("b", "rte", 2), ("b", "cola", 1)):
        write(tmp_path / run, task, seed, score=70.0 + seed)
    lines = scores.table(scores.collect([tmp_path / "a", tmp_path / "b"])).splitlines()
    assert lines[0].startswith("| run | CoLA | RTE |")
    assert lines[2].startswith("| a |  | 71.50 ± 0.71 |")
    assert lines[3].startswith("| b | 71.00 | 72.00 (1 of 2 seeds) |")


def test_times_of_other_machines_are_not_compared(tmp_path):
    write(tmp_path / "a", "rte", 1)
    write(tmp_path / "b", "rte", 1, seconds={"search": 10.0, "train": 50.0})
    for number, change in enumerate(({"ranks": 1}, {"device": "a GPU"}, {"precision": "bf16"})):
        write(tmp_path / f"c{number}", "rte", 1, **change)
    first, second, *others = scores.collect([tmp_path / name for name in ("a", "b", "c0", "c1", "c2")])
    assert second.share(first) == pytest.approx(0.6)
    assert [other.share(first) for other in others] == [None] * 3
    assert scores.table([first, *others]).splitlines()[-1].endswith("| 100 s |  |")


def test_each_metric_has_a_column_where_that_is_asked_for(tmp_path):
    both = {
        f"dev_{kind}": {"accuracy": value, "score": value}
        for kind, value in (("matched", 80.0), ("mismatched", 70.0))
    }
    write(tmp_path, "mnli", 1, score=75.0, metrics=both)
    for seed, f1 in ((1, 90.0), (2, 92.0)):
        write(
            tmp_path, "mrpc", seed, score=86.0, metrics={"dev": {"accuracy": 82.0, "f1": f1, "score": 86.0}}
        )
    write(
        tmp_path,
        "squad2",
        1,
        metrics={"dev": {"exact": 1.0, "f1": 2.0, "best f1 threshold": -3.0, "score": 2.0}},
    )
    runs = scores.collect([tmp_path])
    head, _, row = scores.table(runs, each_metric=True).splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["MRPC accuracy"] == "82.00 ± 0.00" and cells["MRPC f1"] == "91.00 ± 1.41"
    assert cells["MNLI-m accuracy"] == "80.00" and cells["MNLI-mm accuracy"] == "70.00"
    assert cells["SQuAD 2.0 exact"] == "1.00" and not any("threshold" in name for name in cells)
    assert cells["mean"] == scores.table(runs).splitlines()[2].split(" | ")[-4]


def test_a_result_that_cannot_be_read_is_told(tmp_path):
    path = write(tmp_path, "rte", 1)
    path.write_text("{")
    with pytest.raises(EarlyBertError, match="result.json: not valid JSON"):
        scores.collect([tmp_path])
    path.write_text('{"task": "tea"}')
    with pytest.raises(EarlyBertError, match="result.json is no result of scripts/finetune.py"):
        scores.collect([tmp_path])
    with pytest.raises(EarlyBertError, match=r"x\.foo: the picture cannot be written"):
        scores.picture(
            [scores.Run("a", {("rte", 1): {"score": 1.0, "seconds": {"train": 1.0}}})], tmp_path / "x.foo"
        )
