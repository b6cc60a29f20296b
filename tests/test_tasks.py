"""What fine-tuning asks of a task."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from test_glue import write_tsv

import letters
from earlybert import tasks
from earlybert.recipes import Recipe, defaults
from earlybert.tasks import Rows


def test_labels_of_a_test_split_enter_no_score_and_its_answers_are_written(tmp_path):
    """Mirrors of the hub's data set have some."""
    (tmp_path / "rte").mkdir()
    for split, label in (("train", 0), ("validation", 1), ("test", 0)):
        columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [label] * 2, "idx": [0, 1]}
        pa.parquet.write_table(pa.table(columns), tmp_path / "rte" / f"{split}-00000-of-00001.parquet")
    task = tasks.load(Recipe(**defaults("rte")), data=str(tmp_path), tokenizer=letters.tokenizer())
    assert set(task.evaluations) == {"dev"} and set(task.answers) == {"test"}
    assert not task.answers["test"].targets
    right = [(np.array([0.0, 1.0]),)] * 2
    assert task.judge("dev", right, to=tmp_path)["score"] == 100
    assert task.judge("test", right, to=tmp_path) == {}
    assert (tmp_path / "RTE.tsv").read_text() == "index\tprediction\n0\tnot_entailment\n1\tnot_entailment\n"


@pytest.mark.parametrize(("longest", "padded"), [(21, 21), (24, 24), (90, 24)])
def test_rows_are_padded_to_a_multiple_but_never_beyond_what_was_asked_for(longest, padded):
    """A model may have a number of positions that is no multiple."""
    ids = [np.arange(length, dtype=np.int32) for length in (3, 21)]
    rows = Rows(ids, [np.zeros_like(x, dtype=np.int8) for x in ids], {}, longest)
    assert rows.collate([0, 1], pad=0)["input_ids"].shape == (2, padded)
    assert rows.collate([0], pad=0)["input_ids"].shape == (1, 8)


def test_a_task_pads_no_row_beyond_its_recipes_length(tmp_path):
    for split in ("train", "dev"):
        write_tsv(tmp_path, "rte", rows=[f"0\t{'a' * 70}\t{'b' * 70}\tentailment"], split=split)
    recipe = Recipe(**{**defaults("rte"), "sequence_length": 90})
    task = tasks.load(recipe, data=str(tmp_path), tokenizer=letters.tokenizer())
    assert task.train.collate([0], pad=0)["input_ids"].shape == (1, 90)
