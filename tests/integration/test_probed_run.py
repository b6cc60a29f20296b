"""Probes as an operator sees them: two ranks, tuned checkpoints beside them, plugs pulled in between."""

import json
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_finetune import write_rte
from test_pretrain import Folder, told

import letters
from corpora import random_documents, write_corpus
from earlybert.config import to_toml
from earlybert.probes import recorded

SHORT = Path(__file__).parent / "pretrain_with_short_probes.py"
QUICK = ["ticket.enabled=false", "phases.0.steps=9", "phases.1.steps=1"]
FINETUNING = {
    "name": "any", "model": "any", "deepspeed": "tune.json", "tasks": ["cola"], "seeds": [1, 2],
    "recipe": {"batch": 16, "learning_rate": 3e-3, "sequence_length": 32, "epochs": 1.0},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """An experiment whose corpus has a tokenizer of letters, a task's files, and how it is tuned."""
    found = Folder(tmp_path, stage=2, precision="bf16")
    shutil.rmtree(tmp_path / "corpus")
    pieces = letters.tokenizer()
    documents = random_documents(60, longest=120, tokens=len(pieces))
    write_corpus(tmp_path / "corpus", documents, pieces=pieces)
    write_rte(tmp_path / "glue", rows=64)
    (tmp_path / "tune.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    (tmp_path / "tune.toml").write_text(to_toml(FINETUNING))
    return found


def probed(folder, *words):
    return [
        "name=probed", 'evaluate.tasks=["rte"]', f"evaluate.tasks_data={folder.path / 'glue'}",
        "evaluate.tasks_experiment=tune.toml", "evaluate.tasks_every=8", "checkpoint.keep=1", *QUICK, *words,
    ]  # fmt: skip


def test_a_run_that_is_stopped_trains_as_it_would_without_probes_and_makes_up_for_them(folder):
    assert folder.run("name=plain", *QUICK) == [0, 0], folder.log()
    run = folder.path / "runs" / "probed"
    (folder.path / "slow").touch()

    processes = folder.start(*probed(folder), script=SHORT)
    began = wait_for_probe(run, folder)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert processes[0].wait(timeout=60) == 143, folder.log()
    assert not psutil.pid_exists(began), "a probe does not outlive its run"
    assert processes[1].wait(timeout=60) in (0, 143)
    assert "are left: the same command goes on with them" in folder.log()
    assert recorded(run) == [] and (run / "probes" / "step-0000008" / "manifest.json").exists()

    (folder.path / "slow").unlink()
    (folder.path / "fails").write_text("mrpc")
    both = 'evaluate.tasks=["rte", "mrpc"]'
    write_mrpc(folder.path / "glue")
    assert folder.run(*probed(folder, both), script=SHORT) == [0, 0], folder.log()
    assert told(folder.metrics("probed")) == told(folder.metrics("plain"))
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-0000010"], "one is kept"
    lines = recorded(run)
    assert [(line["step"], line["task"]) for line in lines] == [
        (step, task) for step in (8, 10) for task in ("rte", "mrpc")
    ]
    assert [line.get("score") for line in lines] == [9.5, None, 11.5, None], "means of two seeds"
    assert lines[1]["error"] == "exit status 2: mrpc is not to be had"
    assert "the probe of step 8 on mrpc failed: exit status 2: mrpc is not to be had" in folder.log()
    assert {path.name for path in (run / "probes").iterdir()} == {
        "failed-step-0000008.txt", "failed-step-0000010.txt",
    }, "what is told is gone"  # fmt: skip
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {(event.step, event.value) for event in board.Scalars("probe/rte")} == {(8, 9.5), (10, 11.5)}


def write_mrpc(folder):
    (folder / "MRPC").mkdir()
    for split in ("train", "dev"):
        header, row = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\ta b\tc d"
        (folder / "MRPC" / f"{split}.tsv").write_text(f"{header}\n{row}\n")


@pytest.mark.thorough
def test_the_last_checkpoint_with_its_ticket_is_tuned_by_the_real_command_at_the_end(folder):
    one = to_toml({**FINETUNING, "seeds": [1]})
    (folder.path / "tune.toml").write_text(one)
    assert folder.run(*probed(folder, "phases.0.steps=6", "ticket.enabled=true"), ranks=1) == [0], (
        folder.log()
    )
    assert "drew the ticket at step 6" in folder.log()
    (line,) = recorded(folder.path / "runs" / "probed")
    assert (line["step"], line["task"]) == (7, "rte") and 0 < line["score"] < 100, line
    assert line["seeds"]["1"]["dev"]["accuracy"] == line["score"] and line["seconds"] > 0
    assert f"probe of step 7: rte {line['score']:.2f}" in folder.log()


def wait_for_probe(run, folder):
    """The process of the probe that has just been started."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["pid", "cmdline"]):
            if str(run / "probes" / "step-0000008" / "finetune.toml") in (process.info["cmdline"] or []):
                return process.info["pid"]
        time.sleep(0.05)
    raise AssertionError(folder.log())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluate.tasks_data=nowhere/glue/files"], "evaluate.tasks_data: nowhere/glue/files is no folder"),
        (["evaluate.tasks_every=6"], "evaluate.tasks_every = 6 is not a multiple of checkpoint.every = 4"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(folder, words, says):
    assert folder.run(*probed(folder, *words), HF_HUB_OFFLINE="1", ranks=1) == [2], folder.log()
    last = folder.log().splitlines()[-1]
    assert last.startswith("error: ") and says in last and "Traceback" not in folder.log()
    assert not (folder.path / "runs").exists()
