"""Fine-tuning as a user runs it: two processes, GLUE and SQuAD files small enough to learn in seconds."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from test_glue import TSV, write_tsv
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

import letters
from earlybert import load, scores
from earlybert.config import to_toml
from earlybert.downstream import EarlyBertForSequenceClassification
from earlybert.glue import TASKS
from earlybert.ticket import Ticket
from ranks import launch

ROOT = Path(__file__).parent.parent.parent
FINETUNE = ROOT / "scripts" / "finetune.py"


def words(rng, count, letters="abcdefghij"):
    return ["".join(rng.choices(letters, k=rng.randint(1, 4))) for _ in range(count)]


def write_rte(folder: Path, *, rows: int = 192) -> None:
    """A pair entails where its second sentence is written in other letters than its first."""
    (folder / "RTE").mkdir(parents=True)
    rng = random.Random(0)
    for split, count in (("train", rows), ("dev", 61), ("test", 20)):
        labelled = split != "test"
        lines = ["index\tsentence1\tsentence2" + ("\tlabel" if labelled else "")]
        for number in range(count):
            entails = rng.random() < 0.5
            second = words(rng, 4, "vwxyz" if entails else "abcdefghij")
            label = "entailment" if entails else "not_entailment"
            told = [str(number), " ".join(words(rng, 5)), " ".join(second), *([label] if labelled else [])]
            lines.append("\t".join(told))
        (folder / "RTE" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def write_squad(folder: Path, *, impossible: bool) -> None:
    """The answer is the word of z's; without one there is none."""
    folder.mkdir()
    rng = random.Random(1)
    version = "v2.0" if impossible else "v1.1"
    for split, count in ((f"train-{version}", 160), (f"dev-{version}", 40)):
        paragraphs = []
        for number in range(count):
            told, answers = words(rng, 20), []
            if not impossible or number % 2:
                told[rng.randrange(20)] = "zzz"
                answers = [{"text": "zzz", "answer_start": " ".join(told).index("zzz")}]
            question = {"id": f"{split}-{number}", "question": "who?", "answers": answers}
            if impossible:
                question["is_impossible"] = not answers
            paragraphs.append({"context": " ".join(told), "qas": [question]})
        values = {"version": version, "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{split}.json").write_text(json.dumps(values))


class Folder:
    """A stock BERT, the tasks' files and a fine-tuning experiment."""

    def __init__(self, path: Path, *, stage: int = 1, **changes) -> None:
        self.path = path
        letters.stock_bert(path / "bert", hidden_size=32)
        (path / "ds.json").write_text(
            json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}})
        )
        values = {
            "name": "run", "runs": str(path / "runs"), "model": str(path / "bert"),
            "deepspeed": str(path / "ds.json"), "data": str(path / "data"), "seeds": [1], "log_every": 5,
            "checkpoint_every": 10,
            "recipe": {
                "batch": 16, "micro_batch": 4, "learning_rate": 3e-3, "sequence_length": 64, "epochs": 6.0,
            },
            "ticket": {"enabled": False, "start": "rewind", "head_ratio": 0.5, "neuron_ratio": 0.5,
                       "neuron_multiple": 1, "minimum_neurons": 1},
            **changes,
        }  # fmt: skip
        (path / "e.toml").write_text(to_toml(values))

    def start(self, kind: str, *words: str, ranks: int = 2, file: str = "e.toml"):
        command = [kind, str(self.path / file), *words]
        return launch(str(FINETUNE), command, ranks=ranks, logs=self.path, HF_HUB_OFFLINE="1")

    def run(self, kind: str, *words: str, **options) -> list[int]:
        return [process.wait(timeout=240) for process in self.start(kind, *words, **options)]

    def log(self) -> str:
        return (self.path / "log-0.txt").read_text()

    def result(self, name: str, task: str, seed: int = 1) -> dict:
        return json.loads((self.path / "runs" / name / task / f"seed-{seed}" / "result.json").read_text())

    def metrics(self, name: str, task: str) -> list[dict]:
        path = self.path / "runs" / name / task / "seed-1" / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def timeless(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.thorough
def test_a_task_is_learned_judged_answered_and_goes_on_bit_equal_after_a_kill(tmp_path):
    folder = Folder(tmp_path, tasks=["rte"])
    write_rte(tmp_path / "data")
    assert folder.run("glue", "name=unbroken", "seeds=[1, 2]") == [0, 0], folder.log()
    told = folder.result("unbroken", "rte")
    assert told["score"] == told["scores"]["dev"]["accuracy"] > 90
    assert told["steps"] == {"search": 0, "train": 72} and told["ticket"] is None
    answers = tmp_path / "runs" / "unbroken" / "rte" / "seed-1" / "RTE.tsv"
    assert answers.read_text().startswith("index\tprediction\n0\t")
    assert len(answers.read_text().splitlines()) == 21
    assert not (answers.parent / "checkpoints").exists(), "a run that is done needs none"
    losses = [(answers.parents[1] / f"seed-{seed}" / "metrics.jsonl").read_text() for seed in (1, 2)]
    assert losses[0] != losses[1] and folder.run("glue", "name=unbroken", "seeds=[1, 2]") == [0, 0]

    processes = folder.start("glue", "name=broken")
    wait_for(folder, "broken", 25, processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [process.wait(60) for process in processes] == [-signal.SIGKILL] * 2
    processes = folder.start("glue", "name=broken")
    wait_for(folder, "broken", 45, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in processes] == [143, 143], folder.log()
    assert folder.run("glue", "name=broken") == [0, 0], folder.log()
    assert timeless(folder.metrics("broken", "rte")) == timeless(folder.metrics("unbroken", "rte"))
    assert folder.result("broken", "rte")["scores"] == told["scores"]


def wait_for(folder, name, step, processes):
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in folder.metrics(name, "rte")):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), folder.log()
        time.sleep(0.01)


def begun(path: Path) -> Folder:
    """A run of RTE that a signal stopped after step 10."""
    folder = Folder(path, tasks=["rte"])
    write_rte(path / "data")
    (process,) = folder.start("glue", ranks=1)
    wait_for(folder, "run", 10, [process])
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, folder.log()
    return folder


@pytest.mark.thorough
def test_the_ticket_rewinds_trains_all_epochs_and_stands_beside_its_baselines_in_the_table(tmp_path, capsys):
    folder = Folder(tmp_path, tasks=["rte"], search_epochs=0.5, keep_models="compact")
    write_rte(tmp_path / "data")
    assert folder.run("glue", "name=dense") == [0, 0], folder.log()
    for kind in ("early-bird", "random", "layerdrop"):
        words = [f"name={kind}", "ticket.enabled=true", f"ticket.kind={kind}"]
        words += ["keep_models=dense"] if kind == "early-bird" else []
        assert folder.run("glue", *words) == [0, 0], folder.log()
    dense, ticket, random_, layers = (
        folder.result(name, "rte") for name in ("dense", "early-bird", "random", "layerdrop")
    )
    assert ticket["steps"] == {"search": 6, "train": 72} and random_["steps"]["search"] == 1
    assert ticket["heads_per_layer"] == random_["heads_per_layer"] == [2, 2]
    assert sum(ticket["neurons_per_layer"]) == 48 and layers["heads_per_layer"] == [4]
    assert ticket["parameters"] < dense["parameters"] > layers["parameters"]
    assert min(ticket["seconds"].values()) > 0 == dense["seconds"]["search"]
    assert ticket["score"] > 80 and (dense["ticket"], ticket["ticket"]) == (None, "early-bird")
    kept = Ticket.load(tmp_path / "runs" / "early-bird" / "rte" / "seed-1" / "ticket.json")
    assert kept.step == 6 and [len(heads) for heads in kept.heads] == [2, 2]

    model = load(tmp_path / "runs" / "random" / "rte" / "seed-1" / "model")
    stock = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "runs" / "early-bird" / "rte" / "seed-1" / "model"
    )
    assert type(model) is EarlyBertForSequenceClassification and model.config.heads_per_layer == [2, 2]
    assert type(stock) is BertForSequenceClassification and stock.config.num_attention_heads == 4
    for kept_model in (model, stock):
        assert kept_model.config.id2label == {0: "entailment", 1: "not_entailment"}
    card = (tmp_path / "runs" / "early-bird" / "rte" / "seed-1" / "model" / "README.md").read_text()
    assert f"| dev | accuracy | {ticket['score']:.2f} |" in card and "## Ticket" in card
    found = scores.collect([tmp_path / "runs" / name for name in ("dense", "early-bird", "random")])
    lines = scores.table(found).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dense", "| early-bird", "| random"]
    assert f"{ticket['score']:.2f}" in lines[3] and lines[2].endswith("| 1.00 |")
    assert "RTE" in lines[0] and f"{ticket['parameters']:,}" in lines[3]
    scores.picture(found, tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["squad", "squad2"])
def test_answers_are_found_in_their_contexts_and_written_for_the_official_scripts(tmp_path, task):
    folder = Folder(tmp_path, stage=2, tasks=[task])
    write_squad(tmp_path / "data", impossible=task == "squad2")
    words = ("recipe.epochs=16.0", "recipe.sequence_length=90", "recipe.stride=10")
    assert folder.run("squad", *words) == [0, 0], folder.log()
    told = folder.result("run", task)["scores"]["dev"]
    assert told["score"] == told["f1"] > 60, "the words of z's are found"
    here = tmp_path / "runs" / "run" / task / "seed-1"
    predictions = json.loads((here / "predictions.json").read_text())
    assert len(predictions) == 40 and list(predictions.values()).count("zzz") > 10
    assert set(json.loads((here / "nbest.json").read_text())) == set(predictions)
    assert (here / "null_odds.json").exists() == (task == "squad2")
    if task == "squad2":
        assert told["unanswerable exact"] > 50 and told["best f1"] >= told["f1"]


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        ("glue", ['tasks=["boolq"]'], "'boolq' is not a task that is known"),
        (
            "glue",
            ['tasks=["squad"]', "recipe.sequence_length=90", "recipe.stride=9"],
            "squad is none of the tasks of glue",
        ),
        ("glue", ["recipe.epochs=0.0"], "the recipe of rte: epochs = 0.0: must be positive"),
        ("glue", ["recipe.lr=1.0"], "unknown setting 'lr'"),
        ("glue", ["model=/nowhere"], "/nowhere: no such folder; give a run folder"),
        ("glue", ["recipe.sequence_length=97"], "rte: sequence_length = 97, but"),
        ("glue", ["data=/nowhere"], "/nowhere is no folder, and the hub does not give rte"),
        ("glue", ['tasks=["mrpc"]'], "no split 'train' of mrpc is there"),
        ("squad", ['tasks=["squad"]', "recipe.sequence_length=90"], "or a stride below 23"),
        ("squad", [], "rte is none of the tasks of squad"),
        (
            "squad",
            ['tasks=["squad"]', "recipe.sequence_length=90", "recipe.stride=9"],
            "-v1.1.json is not there",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(mistaken, kind, words, says):
    assert mistaken.run(kind, *words, "name=wrong", ranks=1) == [2], mistaken.log()
    last = mistaken.log().splitlines()[-1]
    assert last.startswith("error: ") and says in last, mistaken.log()[-2000:]
    assert "Traceback" not in mistaken.log() and not (mistaken.path / "runs").exists()


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    path = tmp_path_factory.mktemp("mistaken")
    write_rte(path / "data", rows=8)
    return Folder(path, tasks=["rte"])


def test_the_model_of_a_run_folder_must_not_change_while_it_is_tuned(tmp_path):
    folder = Folder(tmp_path, tasks=["rte"])
    write_rte(tmp_path / "data", rows=16)
    assert folder.run("glue", "recipe.epochs=1.0", ranks=1) == [0], folder.log()
    letters.stock_bert(tmp_path / "bert", seed=9)
    assert folder.run("glue", "recipe.epochs=1.0", "seeds=[2]", ranks=1) == [2]
    assert "was trained on another model than" in folder.log()
    assert folder.run("glue", "ticket.enabled=true", "seeds=[2]", ranks=1) == [2]
    assert "holds another experiment" in folder.log()


def test_a_task_keeps_its_recipe_and_another_one_is_added_with_its_own(tmp_path):
    folder = Folder(tmp_path, tasks=["rte"])
    write_rte(tmp_path / "data", rows=32)
    write_tsv(tmp_path / "data", "wnli", split="train")
    write_tsv(tmp_path / "data", "wnli", split="dev")
    assert folder.run("glue", "recipe.epochs=1.0", ranks=1) == [0], folder.log()
    stated = (tmp_path / "runs" / "run" / "experiment.toml").read_text()
    assert folder.run("glue", "recipe.epochs=2.0", "seeds=[2]") == [2, 2]
    assert "rte/seed-1 is tuned with epochs = 1.0, not 2.0; give it that again" in folder.log()
    assert (tmp_path / "runs" / "run" / "experiment.toml").read_text() == stated
    both = ("recipe.epochs=1.0", 'recipes=[{task="wnli", epochs=2.0}]', 'tasks=["rte", "wnli"]',
            "recipe.stride=1")  # fmt: skip
    assert folder.run("glue", *both, ranks=1) == [0], folder.log()
    assert [folder.result("run", task)["recipe"]["epochs"] for task in ("rte", "wnli")] == [1.0, 2.0]
    (tmp_path / "runs" / "run" / "rte" / "seed-1" / "result.json").write_text("{")
    assert folder.run("glue", *both) == [2, 2], "on every rank"
    assert "result.json" in folder.log().splitlines()[-1]


@pytest.mark.thorough
def test_a_run_in_progress_keeps_its_recipe_but_for_the_micro_batch(tmp_path):
    folder = begun(tmp_path)
    assert folder.run("glue", "recipe.epochs=1.0", ranks=1) == [2]
    assert "rte/seed-1 is tuned with epochs = 6.0, not 1.0; give it that again" in folder.log()
    assert folder.run("glue", "recipe.micro_batch=8", ranks=1) == [0], folder.log()
    assert folder.log().count("; from step 0") == 1


@pytest.mark.thorough
def test_a_run_that_was_begun_on_other_rows_starts_anew(tmp_path):
    folder = begun(tmp_path)
    rows = tmp_path / "data" / "RTE" / "train.tsv"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    assert folder.run("glue", ranks=1) == [0], folder.log()
    assert "is not used: its manifest is of another experiment or corpus" in folder.log()
    assert folder.log().count("; from step 0") == 2


def test_seeds_of_one_task_are_tuned_on_the_same_rows(tmp_path):
    folder = Folder(tmp_path, tasks=["rte"])
    write_rte(tmp_path / "data")
    assert folder.run("glue", "recipe.epochs=0.1", ranks=1) == [0], folder.log()
    rows = tmp_path / "data" / "RTE" / "train.tsv"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    words = ("recipe.epochs=0.1", "seeds=[1, 2]")
    assert folder.run("glue", *words, ranks=1) == [2]
    assert "seed-1 was tuned on other rows than those of" in folder.log().splitlines()[-1]
    shutil.rmtree(tmp_path / "runs" / "run" / "rte" / "seed-1")
    assert folder.run("glue", *words, ranks=1) == [0], folder.log()
    assert folder.result("run", "rte")["rows"] == folder.result("run", "rte", seed=2)["rows"]


def test_every_task_of_glue_trains_a_step_from_its_own_files(tmp_path):
    folder = Folder(tmp_path)
    for name, task in TASKS.items():
        for split in ("train", *task.evaluations):
            write_tsv(tmp_path / "data", name, split=split)
    assert set(TSV) == set(TASKS)
    assert folder.run("glue", "recipe.epochs=1.0", "recipe.batch=4", "recipe.micro_batch=2") == [0, 0], (
        folder.log()
    )
    for name, task in TASKS.items():
        told = folder.result("run", name)
        assert set(told["scores"]) == set(task.evaluations)
        assert all(set(found) == {*task.metrics, "score"} for found in told["scores"].values())
