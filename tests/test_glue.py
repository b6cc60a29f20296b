"""GLUE's files in their three layouts, its metrics, its answers, and what is wrong with a file."""

from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from earlybert import glue
from earlybert.config import EarlyBertError

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "glue"
TSV = {  # GLUE's own layout: header and a row of each label
    "cola": (None, ["gj04\t1\t\tA man sleeps.", "gj04\t0\t*\tMan a sleeps."]),
    "sst2": ("sentence\tlabel", ["good film\t1", 'a "bad" one\t0']),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t7\t8\tIt is.\tIt's so.", "0\t7\t8\tOne.\tTwo."],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tg\tf\ty\t1\ts\ts\tA plane.\tAn air plane.\t5.000", "1\tg\tf\ty\t1\ts\ts\tA.\tB.\t0.25"],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["3\t1\t2\tWhy?\tHow?\t0", "4\t1\t2\tSo?\tSo?\t1"],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tp1\tp2\tp3\tp4\tsentence1\tsentence2\tlabel1\tgold_label",
        [f"0\t1\t2\tg\t.\t.\t.\t.\tAll.\tSome.\t-\t{x}" for x in ("entailment", "neutral", "contradiction")],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel", ["0\tWho?\tHe.\tentailment", "1\tWho?\tAt 3.\tnot_entailment"]
    ),
    "rte": ("index\tsentence1\tsentence2\tlabel", ["0\tA.\tA.\tentailment", "1\tA.\tB.\tnot_entailment"]),
    "wnli": ("index\tsentence1\tsentence2\tlabel", ["0\tA.\tA.\t1", "1\tA.\tB.\t0"]),
}  # fmt: skip
LABELS = {
    "cola": [1, 0], "sst2": [1, 0], "mrpc": [1, 0], "stsb": [5.0, 0.25], "qqp": [0, 1], "mnli": [0, 1, 2],
    "qnli": [0, 1], "rte": [0, 1], "wnli": [1, 0],
}  # fmt: skip


def write_tsv(folder, name, *, rows=None, header="as it is", split=None):
    task = glue.TASKS[name]
    told, usual = TSV[name]
    lines = [*([] if told is None else [told if header == "as it is" else header]), *(rows or usual)]
    path = folder / task.folder / f"{split or next(iter(task.evaluations))}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(f"{line}\n" for line in lines), encoding="utf-8-sig" if name == "mrpc" else "utf-8"
    )
    return path


def write_parquet(folder, name, examples, *, labels=None):
    """The hub's layout of the same examples."""
    task = glue.TASKS[name]
    columns = dict(zip(task.hub_texts, zip(*examples.texts, strict=True), strict=True))
    columns = {key: list(values) for key, values in columns.items()}
    columns["label"] = list(examples.labels if labels is None else labels)
    columns["idx"] = list(range(len(examples)))
    split = next(iter(task.evaluations)).replace("dev", "validation")
    path = folder / name / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("name", glue.TASKS)
def test_a_task_reads_the_same_from_glues_files_and_from_the_hubs(tmp_path, name):
    task = glue.TASKS[name]
    split = next(iter(task.evaluations))
    write_tsv(tmp_path / "glue", name)
    ours = glue.read(task, str(tmp_path / "glue"), split)
    assert list(ours.labels) == LABELS[name] and len(ours) == len(TSV[name][1])
    assert all(len(texts) == len(task.texts) and all(texts) for texts in ours.texts)
    write_parquet(tmp_path / "hub", name, ours)
    assert glue.read(task, str(tmp_path / "hub"), split) == ours
    assert glue.task_of(task.folder) == glue.task_of(name.upper()) == task


def test_quotation_marks_are_text_and_only_tabs_separate(tmp_path):
    write_tsv(tmp_path, "sst2", rows=['"he said\u2028 this\x0b\t1', "it's\t0\r"])
    examples = glue.read(glue.TASKS["sst2"], str(tmp_path), "dev")
    assert examples.texts[0] == ('"he said\u2028 this\x0b',) and len(examples) == 2


def test_only_the_rows_of_qqp_may_break_off(tmp_path):
    write_tsv(tmp_path, "qqp", rows=["3\t1\t2\tWhy?\tHow?\t0", "4\t1\t2\tSo?", "5\t1\t2\tWho?\tWho?\t1"])
    examples = glue.read(glue.TASKS["qqp"], str(tmp_path), "dev")
    assert (len(examples), examples.left_out) == (2, 1)


def test_a_test_split_has_no_labels_and_its_answers_go_to_the_leaderboard_under_its_numbers(tmp_path):
    header = "index\tpromptID\tpairID\tgenre\tp1\tp2\tp3\tp4\tsentence1\tsentence2"
    rows = [f"{number}\t1\t2\tg\t.\t.\t.\t.\tAll.\tSome." for number in (31, 7)]
    write_tsv(tmp_path, "mnli", rows=rows, header=header, split="test_mismatched")
    task = glue.TASKS["mnli"]
    examples = glue.read(task, str(tmp_path), "test_mismatched")
    assert examples.labels is None and examples.indices == (31, 7)
    found = glue.predicted(task, np.array([[0.1, 3.0, 0.2], [0.0, 1.0, 2.0]]))
    path = glue.write_answers(task, "test_mismatched", examples.indices, found, tmp_path)
    assert path.name == "MNLI-mm.tsv"
    assert path.read_text() == "index\tprediction\n31\tneutral\n7\tcontradiction\n"


def test_answers_are_numbers_names_or_degrees_as_each_task_has_them(tmp_path):
    def told(name, logits):
        task = glue.TASKS[name]
        found = glue.predicted(task, np.array(logits))
        return (
            glue.write_answers(task, "test", range(len(found)), found, tmp_path).read_text().split("\n")[1:-1]
        )

    assert told("cola", [[0.0, 1.0], [2.0, 1.0]]) == ["0\t1", "1\t0"]
    assert told("rte", [[0.0, 1.0], [2.0, 1.0]]) == ["0\tnot_entailment", "1\tentailment"]
    assert told("stsb", [[2.7182], [5.3], [-0.1]]) == ["0\t2.718", "1\t5.000", "2\t0.000"]
    assert {path.name for path in tmp_path.iterdir()} == {"CoLA.tsv", "RTE.tsv", "STS-B.tsv"}


def test_every_task_has_the_metrics_of_the_leaderboard():
    assert {name: task.metrics for name, task in glue.TASKS.items()} == {
        "cola": ("matthews",), "sst2": ("accuracy",), "mrpc": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"), "qqp": ("accuracy", "f1"), "mnli": ("accuracy",),
        "qnli": ("accuracy",), "rte": ("accuracy",), "wnli": ("accuracy",),
    }  # fmt: skip


def test_scores_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    labels, told = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    counts = {(a, b): int(((labels == a) & (told == b)).sum()) for a, b in product((0, 1), repeat=2)}
    hits, misses, false, right = counts[1, 1], counts[1, 0], counts[0, 1], counts[0, 0]
    product_ = (hits + false) * (hits + misses) * (right + false) * (right + misses)
    cola = glue.score(glue.TASKS["cola"], told, labels)
    assert cola["matthews"] == cola["score"] == pytest.approx((hits * right - false * misses) / product_**0.5)
    mrpc = glue.score(glue.TASKS["mrpc"], told, labels)
    assert mrpc["accuracy"] == pytest.approx((hits + right) / 200)
    assert mrpc["f1"] == pytest.approx(2 * hits / (2 * hits + misses + false))
    assert mrpc["score"] == pytest.approx((mrpc["accuracy"] + mrpc["f1"]) / 2)
    degrees, guesses = rng.permutation(50) / 10, rng.permutation(50) / 10
    stsb = glue.score(glue.TASKS["stsb"], guesses, degrees)
    assert stsb["pearson"] == pytest.approx(np.corrcoef(degrees, guesses)[0, 1])
    ranks = np.corrcoef(degrees.argsort().argsort(), guesses.argsort().argsort())[0, 1]
    assert stsb["spearman"] == pytest.approx(ranks)


def test_a_model_that_says_the_same_of_all_has_a_score_of_nothing():
    assert glue.score(glue.TASKS["cola"], np.ones(5), [0, 1, 1, 0, 1])["score"] == 0
    assert glue.score(glue.TASKS["stsb"], np.ones(3), [0.0, 1.0, 2.0])["score"] == 0


@pytest.mark.parametrize(
    ("name", "rows", "header", "says"),
    [
        ("rte", None, "index\tsentence1\tlabel", "row 1: the column 'sentence2' is missing; there are 'ind"),
        ("rte", ["0\tA.\tB.\tmaybe"], "as it is", "row 2: 'maybe' is not a label of rte; it has 0 (entail"),
        ("rte", ["0\tA.\tB.\tentailment", "1\tA."], "as it is", "row 3: 2 fields where 4 are needed"),
        ("cola", ["gj04\t1\t\tFine.", "gj04\t2\t\tOdd."], "as it is", "row 2: '2' is not a label of cola"),
        ("stsb", ["0\tg\tf\ty\t1\ts\ts\tA\tB\t5.5"], "as it is", "row 2: the score '5.5' is not a number fr"),
        ("cola", ["gj04\t²\t\tFine."], "as it is", "row 1: '²' is not a label of cola"),
        ("stsb", ["0\tg\tf\ty\t1\ts\ts\tA\tB\tnan"], "as it is", "row 2: the score 'nan' is not a number"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_with_its_row(tmp_path, name, rows, header, says):
    path = write_tsv(tmp_path, name, rows=rows, header=header)
    with pytest.raises(EarlyBertError, match=f"^{path}") as refused:
        glue.read(glue.TASKS[name], str(tmp_path), "dev")
    assert says in str(refused.value)


def test_an_empty_split_and_one_that_is_not_there_are_refused(tmp_path):
    path = write_tsv(tmp_path, "rte")
    path.write_text("index\tsentence1\tsentence2\tlabel\n")
    with pytest.raises(EarlyBertError, match="the split has no examples"):
        glue.read(glue.TASKS["rte"], str(tmp_path), "dev")
    with pytest.raises(
        EarlyBertError, match=r"no split 'train' of rte is there; looked for RTE/train.tsv and"
    ):
        glue.read(glue.TASKS["rte"], str(tmp_path), "train")
    with pytest.raises(EarlyBertError, match="'boolq' is not a task of GLUE; choose among cola, "):
        glue.task_of("boolq")


def test_mistakes_in_the_hubs_files_are_told_with_their_row(tmp_path):
    write_tsv(tmp_path / "glue", "rte")
    examples = glue.read(glue.TASKS["rte"], str(tmp_path / "glue"), "dev")
    write_parquet(tmp_path, "rte", examples, labels=[1, 7])
    with pytest.raises(EarlyBertError, match="row 2: 7 is not a label of rte"):
        glue.read(glue.TASKS["rte"], str(tmp_path), "dev")
    write_parquet(tmp_path, "rte", examples, labels=[1, -1])
    with pytest.raises(EarlyBertError, match="1 of 2 rows have the label -1"):
        glue.read(glue.TASKS["rte"], str(tmp_path), "dev")
    path = write_parquet(tmp_path, "rte", examples)
    table = pa.parquet.read_table(path)
    wrong = pa.array([b"\xff"] * len(table)).view(pa.string())
    pa.parquet.write_table(table.set_column(0, table.column_names[0], wrong), path)
    with pytest.raises(EarlyBertError, match=str(path)):
        glue.read(glue.TASKS["rte"], str(tmp_path), "dev")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EarlyBertError, match=str(path)):
        glue.read(glue.TASKS["rte"], str(tmp_path), "dev")


@pytest.mark.skipif(not SHARED.is_dir(), reason="GLUE's files are not here")
@pytest.mark.parametrize(
    ("name", "train", "dev", "ones"),
    [
        ("cola", 8551, 1043, 719), ("sst2", 67349, 872, 444), ("stsb", 5749, 1500, None),
        ("rte", 2490, 277, 131), ("wnli", 635, 71, 31),
    ],
)  # fmt: skip
def test_the_real_files_have_their_official_counts(name, train, dev, ones):
    task = glue.TASKS[name]
    assert len(glue.read(task, str(SHARED), "train")) == train
    examples = glue.read(task, str(SHARED), "dev")
    assert len(examples) == dev
    if ones is not None:
        assert sum(examples.labels) == ones
    assert glue.score(task, np.array(examples.labels), examples.labels)["score"] == pytest.approx(1)


def test_the_leaderboards_diagnostic_pairs_are_answered_by_the_model_of_mnli(tmp_path):
    told = [("All.", "Some.", 5), ("Some.", "All.", 3)]
    (tmp_path / "glue" / "diagnostic").mkdir(parents=True)
    lines = ["index\tsentence1\tsentence2", *(f"{index}\t{one}\t{two}" for one, two, index in told)]
    (tmp_path / "glue" / "diagnostic" / "diagnostic.tsv").write_text("\n".join(lines) + "\n")
    columns = dict(zip(("premise", "hypothesis", "idx"), map(list, zip(*told, strict=True)), strict=True))
    (tmp_path / "hub" / "ax").mkdir(parents=True)
    pa.parquet.write_table(
        pa.table({**columns, "label": [-1, -1]}), tmp_path / "hub" / "ax" / "test-00000-of-00001.parquet"
    )
    for layout in ("glue", "hub"):
        found = glue.available(glue.DIAGNOSTIC, str(tmp_path / layout), "diagnostic")
        assert found.labels is None and found.indices == (5, 3) and found.texts[1] == ("Some.", "All.")
    answers = glue.predicted(glue.TASKS["mnli"], np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 3.0]]))
    path = glue.write_answers(glue.TASKS["mnli"], "diagnostic", found.indices, answers, tmp_path)
    assert path.name == "AX.tsv"
    assert path.read_text() == "index\tprediction\n5\tentailment\n3\tcontradiction\n"


def test_a_row_that_breaks_off_before_its_number_and_a_number_that_is_none_are_told(tmp_path):
    write_tsv(tmp_path, "sst2", header="sentence\tindex", rows=["good\t0", "bad"], split="test")
    with pytest.raises(EarlyBertError, match="test.tsv, row 3: 1 fields where 2 are needed"):
        glue.available(glue.TASKS["sst2"], str(tmp_path), "test")
    (tmp_path / "hub" / "sst2").mkdir(parents=True)
    rows = pa.table({"sentence": ["a", "b"], "label": [0, 1], "idx": pa.array([0, None])})
    pa.parquet.write_table(rows, tmp_path / "hub" / "sst2" / "validation.parquet")
    with pytest.raises(EarlyBertError, match="row 2: idx = None is not a whole number"):
        glue.read(glue.TASKS["sst2"], str(tmp_path / "hub"), "dev")
