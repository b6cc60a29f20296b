"""Probes as an operator sees them: two ranks, tuned checkpoints beside them, plugs pulled in between."""

import json
import shutil
import signal
import time

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_finetune import write_rte
from test_pretrain import Folder, told

import letters
from corpora import random_documents, write_corpus
from earlybert.config import to_toml
from earlybert.probes import recorded

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
        "evaluate.tasks_experiment=tune.toml", "evaluate.tasks_every=8", "checkpoint.keep=1", *words,
    ]  # fmt: skip


def test_checkpoints_are_probed_beside_a_run_that_is_killed_and_trains_as_it_would_without(folder):
    assert folder.run("name=plain") == [0, 0], folder.log()
    run = folder.path / "runs" / "probed"

    for sent, codes in ((signal.SIGTERM, [143]), (signal.SIGKILL, [-signal.SIGKILL])):
        processes = folder.start(*probed(folder))
        began = wait_for_probe(run, folder)
        for process in processes:
            process.send_signal(sent)
        ended = [process.wait(timeout=60) for process in processes]
        assert ended[:1] == codes, folder.log()
        assert not psutil.pid_exists(began) or wait_gone(began), "a probe does not outlive its run"
    assert "are left: the same command goes on with them" in folder.log()
    assert recorded(run) == [] and (run / "probes" / "step-0000008" / "manifest.json").exists()

    assert folder.run(*probed(folder)) == [0, 0], folder.log()
    assert told(folder.metrics("probed")) == told(folder.metrics("plain"))
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-0000016"], "one is kept"
    lines = recorded(run)
    assert [(line["step"], line["task"]) for line in lines] == [(8, "rte"), (16, "rte")]
    assert all(0 < line["score"] < 100 and set(line["seeds"]) == {"1", "2"} for line in lines)
    assert list((run / "probes").iterdir()) == [], "what is told is gone"
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {event.step for event in board.Scalars("probe/rte")} == {8, 16}
    assert f"probe of step 16: rte {lines[1]['score']:.2f}" in folder.log()


def wait_for_probe(run, folder):
    """The process of the probe that has just been started."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["pid", "cmdline"]):
            if str(run / "probes" / "step-0000008" / "finetune.toml") in (process.info["cmdline"] or []):
                return process.info["pid"]
        time.sleep(0.05)
    raise AssertionError(folder.log())


def wait_gone(pid):
    try:
        psutil.Process(pid).wait(timeout=10)
    except psutil.NoSuchProcess:
        return True
    return not psutil.pid_exists(pid)


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
