"""The run as an operator sees it: two processes, killed and started again, equal to the last bit to an
unbroken run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from corpora import random_documents, write_corpus
from earlybert import checkpoint, export
from earlybert.config import EarlyBertError, to_toml
from earlybert.lifecycle import free_port
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining
from ranks import Rank, launch

ROOT = Path(__file__).parent.parent.parent
PRETRAIN = ROOT / "scripts" / "pretrain.py"

EXPERIMENT = {
    "name": "run",
    "deepspeed": "ds.json",
    "seed": 3,
    "log_every": 1,
    "model": {"layers": 2, "hidden": 32, "heads": 4, "neurons": 48, "positions": 32},  # with dropout
    "data": {"held_out": 0.1, "workers": 0},
    "phases": [
        {"steps": 12, "sequence_length": 16, "batch": 8, "micro_batch": 2, "learning_rate": 3e-3},
        {"steps": 4, "sequence_length": 32, "batch": 4, "micro_batch": 2, "learning_rate": 1e-3},
    ],
    "ticket": {"every": 2, "minimum_step": 6, "latest_step": 6, "neuron_multiple": 1, "minimum_neurons": 1},
    "evaluate": {"every": 5, "samples": 8},
    "checkpoint": {"every": 4},
}


class Folder:
    """An experiment file, its DeepSpeed JSON and its corpus in a folder of the test's."""

    def __init__(self, path: Path, *, stage: int, precision: str, optimizer: str = "adamw") -> None:
        self.path = path
        write_corpus(path / "corpus", random_documents(60, longest=120))
        mechanics = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100000}}
        if precision != "fp32":
            mechanics[precision] = {"enabled": True}
        (path / "ds.json").write_text(json.dumps(mechanics))
        values = {**EXPERIMENT, "runs": str(path / "runs"), "optimizer": {"name": optimizer}}
        values["data"] = {**values["data"], "corpus": str(path / "corpus")}
        (path / "e.toml").write_text(to_toml(values))

    def start(self, *words: str, ranks: int = 2, script: Path = PRETRAIN, **environment: str) -> list[Rank]:
        command = [str(self.path / "e.toml"), *words]
        return launch(str(script), command, ranks=ranks, logs=self.path, **environment)

    def run(self, *words: str, **options) -> list[int]:
        return [process.wait(timeout=240) for process in self.start(*words, **options)]

    def metrics(self, name: str) -> list[dict]:
        path = self.path / "runs" / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def stop_at(self, name: str, step: int, sent: signal.Signals, *words: str) -> list[int]:
        """Start, wait for a step, send every rank the signal, and return the exit codes."""
        processes = self.start(f"name={name}", *words)
        wait_for_step(self, name, step, lambda: all(p.poll() is None for p in processes))
        for process in processes:
            process.send_signal(sent)
        return [process.wait(timeout=120) for process in processes]

    def log(self) -> str:
        path = self.path / "log-0.txt"
        return path.read_text() if path.exists() else ""


def told(lines: list[dict]) -> list[tuple]:
    """What must not depend on a stop: everything but the times."""
    times = ("tokens_per_second", "step_seconds", "loader_seconds", "draw_seconds", "compile_seconds")
    return [tuple((k, v) for k, v in line.items() if k not in times) for line in lines]


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [
        pytest.param(0, "bf16", "adamw", marks=pytest.mark.thorough), (1, "fp32", "lamb"),
        pytest.param(3, "bf16", "adamw", marks=pytest.mark.thorough),
    ],  # torture.py pulls plugs at ZeRO-2
)  # fmt: skip
def test_a_run_killed_before_in_and_after_the_draw_equals_the_unbroken_run_to_the_last_bit(
    tmp_path, stage, precision, optimizer
):
    folder = Folder(tmp_path, stage=stage, precision=precision, optimizer=optimizer)
    assert folder.run("name=unbroken") == [0, 0], folder.log()
    unbroken = folder.metrics("unbroken")
    assert [line["step"] for line in unbroken] == list(range(17))
    assert unbroken[6]["heads_kept"] < unbroken[5]["heads_kept"]

    assert folder.stop_at("broken", 5, signal.SIGKILL) == [-signal.SIGKILL] * 2
    dying = Path(__file__).parent / "pretrain_dying_in_draw.py"
    codes = folder.run("name=broken", script=dying)
    assert -signal.SIGKILL in codes, folder.log()
    runs = folder.path / "runs"
    assert not (runs / "broken" / "ticket.json").exists(), "died before the ticket was written"
    assert folder.stop_at("broken", 9, signal.SIGTERM) == [143, 143], folder.log()
    assert folder.run("name=broken") == [0, 0], folder.log()

    assert told(folder.metrics("broken")) == told(unbroken)
    tickets = [json.loads((runs / name / "ticket.json").read_text()) for name in ("unbroken", "broken")]
    assert tickets[0] == tickets[1]
    reports = [runs / name / "report" for name in ("unbroken", "broken")]
    numbers = [json.loads((report / "distances.json").read_text()) for report in reports]
    assert numbers[0] == numbers[1] and numbers[0]["steps"] == [2, 4, 6] and numbers[0]["drawn_at"] == 6
    assert "paused training for" in (reports[1] / "report.md").read_text()
    assert folder.run("name=broken") == [0, 0], "a finished run is finished at once"
    assert told(folder.metrics("broken")) == told(unbroken)
    assert_the_files_are_the_shrunken_weights(runs / "broken" / "checkpoints")


@pytest.mark.slow
def test_a_compiled_run_that_was_killed_equals_the_unbroken_one_to_the_last_bit(tmp_path):
    folder, compiled = Folder(tmp_path, stage=2, precision="bf16"), "model.compile=true"
    assert folder.run("name=unbroken", compiled) == [0, 0], folder.log()
    assert folder.stop_at("broken", 5, signal.SIGKILL, compiled) == [-signal.SIGKILL] * 2
    assert folder.stop_at("broken", 9, signal.SIGTERM, compiled) == [143, 143], folder.log()
    assert folder.run("name=broken", compiled) == [0, 0], folder.log()
    assert told(folder.metrics("broken")) == told(folder.metrics("unbroken"))


def assert_the_files_are_the_shrunken_weights(checkpoints: Path) -> None:
    """What the rank files hold, against a model of the manifest's shape and the logits at the save."""
    found = checkpoint.newest_good(checkpoints)
    assert found is not None
    config = EarlyBertConfig.from_dict(found.manifest.model)
    assert sum(config.heads_per_layer) == 6 and sum(config.neurons_per_layer) < 96
    weights = checkpoint.weights(found)
    assert all(w.dtype == torch.float32 for w in weights.values())
    model = EarlyBertForPreTraining(config)
    model.load_state_dict(weights, strict=True)
    model.eval()
    ids = (torch.arange(16) * 7919 % config.vocab_size)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, masked_positions=torch.arange(0, 16, 4)[None]).prediction_logits
    probe = logits.flatten()[:: max(1, logits.numel() // 8)][:8].tolist()
    assert probe == pytest.approx(found.manifest.logits, abs=0.05)  # the run computes in bf16, this in fp32
    assert probe != [0.0] * 8


@pytest.mark.thorough
def test_a_run_stops_through_the_launcher_or_by_a_file_and_its_folder_is_its_own(small):
    """SIGTERM to the launcher reaches the ranks, who have 30 seconds; the file `stop` needs no signal."""
    endless = ["phases.0.steps=5000", "checkpoint.every=5000", "data.workers=1"]
    launcher = start_launcher(small.path / "e.toml", "name=endless", *endless)
    wait_for_step(small, "endless", 8, lambda: launcher.poll() is None)
    assert small.run("name=endless", *endless) == [2, 2]
    assert "endless is being written by process" in small.log(), small.log()
    for process in psutil.Process(launcher.pid).children():
        process.terminate()  # launch.py, which the node's ranks are children of
    said = launcher.communicate(timeout=60)[0]
    stopped = json.loads((small.path / "runs" / "endless" / "metrics.jsonl").read_text().splitlines()[-1])
    found = checkpoint.newest_good(small.path / "runs" / "endless" / "checkpoints")
    assert found is not None and found.manifest.step == stopped["step"], said
    assert "stopped at step" in said and launcher.returncode == 1, "the launcher has a status of its own"

    processes = small.start("name=endless", *endless)
    wait_for_step(small, "endless", stopped["step"] + 3, lambda: all(p.poll() is None for p in processes))
    (small.path / "runs" / "endless" / "stop").touch()
    assert [process.wait(timeout=60) for process in processes] == [143, 143], small.log()
    assert not (small.path / "runs" / "endless" / "stop").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["ticket.kind=layerdrop", "model.layers=3", "ticket.layerdrop=0.3"],
        ["ticket.kind=random", "ticket.start=rewind", "ticket.rewind_step=2", "ticket.rewarmup_steps=3"],
        ["ticket.budget=0.8", "ticket.damping=0.5", "model.checkpointing=true"],
    ],
    ids=["layerdrop", "random, rewound", "budget, damped, checkpointing"],
)
def test_other_choices_train_resume_and_are_exported(small, tmp_path, words):
    name = f"name={words[0].replace('=', '-')}"
    assert small.run(name, *words) == [0, 0], small.log()
    run = small.path / "runs" / name.removeprefix("name=")
    unbroken = small.metrics(run.name)
    assert len(unbroken) == 17 and unbroken[-1]["parameters"] < unbroken[5]["parameters"]
    shutil.rmtree(run / "checkpoints" / "step-0000016")
    assert small.run(name, *words) == [0, 0], small.log()
    assert told(small.metrics(run.name)) == told(unbroken)
    for form in ("compact", "dense"):
        assert export.export(export.read_run(run), to=tmp_path / form, form=form) < 1e-5
        card = (tmp_path / form / "README.md").read_text()
        assert "16 optimizer steps" in card and f"| 16 | {unbroken[-1]['eval_loss']:.4f} |" in card


def wait_for_step(folder: Folder, name: str, step: int, alive) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in folder.metrics(name)):
        assert time.monotonic() < deadline and alive(), folder.log()
        time.sleep(0.02)


def start_launcher(*arguments: object) -> subprocess.Popen:
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{scripts}:{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [scripts / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    return subprocess.Popen(
        [*map(str, [*command, PRETRAIN, *arguments])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("small"), stage=2, precision="bf16")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tickett.every=2"], "unknown setting 'tickett'; did you mean 'ticket'"),
        (["phases.0.batch=9"], "batch 9 is not a multiple of micro_batch 2; use batch 8 or 10"),
        (["ticket.head_ratio=0.9"], "ticket.head_ratio = 0.9 would remove all 4 heads of layer 0"),
        (["data.corpus=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_ends_with_one_message_exit_code_2_and_no_run_folder(small, words, says):
    before = len(small.log())
    assert small.run("name=mistake", *words, ranks=1) == [2], small.log()
    told = small.log()[before:]
    assert says in told and "Traceback" not in told
    assert not (small.path / "runs" / "mistake").exists()


@pytest.mark.thorough
def test_the_launcher_trains_and_a_run_folder_of_another_experiment_is_refused(small):
    launcher = start_launcher(small.path / "e.toml", "name=launched", "data.workers=1")
    said = launcher.communicate(timeout=240)[0]
    assert launcher.returncode == 0, said
    run = small.path / "runs" / "launched"
    names = {
        "experiment.toml",
        "deepspeed.json",
        "environment.json",
        "metrics.jsonl",
        "log.txt",
        "ticket.json",
    }
    assert names <= {path.name for path in run.iterdir()}
    assert list((run / "tensorboard").glob("events.*"))
    folders = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert folders == ["step-0000012", "step-0000016"], "the two newest, and nothing half-written"

    assert small.run("name=launched", "seed=4") == [2, 2] and "holds another experiment" in small.log()

    newest = run / "checkpoints" / "step-0000016"
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert small.run("name=launched") == [0, 0], small.log()
    assert f"step-0000016 is not used: {shard.name} does not match its sha256" in small.log()
    assert small.metrics("launched")[-1]["step"] == 16


def test_a_run_goes_on_with_other_ranks_at_another_stage_with_dropout_and_idle_rounds(tmp_path):
    """2 ranks at ZeRO-2, then 1 at ZeRO-3 after the draw, against an unbroken run of 2 at ZeRO-2; then the
    same run once more, whose 3 micro-batches leave a rank idle."""
    folder = Folder(tmp_path, stage=2, precision="fp32")
    (tmp_path / "ds3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    words = ["phases.0.batch=6", "checkpoint.every=3", "checkpoint.keep=9"]
    assert folder.run("name=whole", *words) == [0, 0], folder.log()
    assert "leave 25% of the ranks' time idle" in folder.log()
    checkpoints = tmp_path / "runs" / "whole" / "checkpoints"
    shutil.copytree(tmp_path / "runs" / "whole", tmp_path / "runs" / "other")
    for gone in [name for name in checkpoint.names(checkpoints) if name > "step-0000009"]:
        shutil.rmtree(tmp_path / "runs" / "other" / "checkpoints" / gone)
    other = ["name=other", f"deepspeed={tmp_path / 'ds3.json'}", *words]
    assert folder.run(*other, ranks=1) == [0], folder.log()
    assert "saved by 2 ranks at ZeRO-2: the same samples and masks go on" in folder.log()
    lines = [folder.metrics(name) for name in ("whole", "other")]
    assert [m["step"] for m in lines[1]] == [m["step"] for m in lines[0]] == list(range(17))
    for whole, changed in zip(*lines, strict=True):
        if whole["step"]:
            assert changed["loss"] == pytest.approx(whole["loss"], rel=1e-5), "dropout and all"
    assert folder.run("name=crowd", "phases.0.batch=2") == [2, 2]
    assert "gives 1 of them, too few for 2 ranks; use at most 1 ranks" in folder.log()


def test_a_changed_byte_of_a_shard_is_noticed_before_anything_starts(tmp_path):
    folder = Folder(tmp_path, stage=2, precision="bf16")
    shard = sorted((folder.path / "corpus").glob("*.arrow"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert folder.run("name=flipped") == [2, 2]
    assert f"{shard} has sha256" in folder.log() and "prepare the corpus again" in folder.log()
    assert not (folder.path / "runs").exists()


def test_more_processes_than_cores_are_refused(small):
    many = len(os.sched_getaffinity(0)) + 1
    assert small.run("name=crowded", ranks=many) == [2] * many
    assert "CPU cores" in small.log() and not (small.path / "runs" / "crowded").exists()


def test_another_text_at_the_same_path_is_refused(tmp_path):
    folder = Folder(tmp_path, stage=2, precision="bf16")
    short = ["phases.0.steps=6", "phases.1.steps=1"]
    assert folder.run("name=a", *short) == [0, 0], folder.log()
    before = {p: p.read_bytes() for p in (tmp_path / "runs" / "a").iterdir() if p.is_file()}
    shutil.rmtree(tmp_path / "corpus")
    write_corpus(tmp_path / "corpus", random_documents(61, longest=120))
    assert folder.run("name=a", *short) == [2, 2]
    assert "was trained on another corpus" in folder.log()
    assert before == {p: p.read_bytes() for p in (tmp_path / "runs" / "a").iterdir() if p.is_file()}


def test_the_evaluation_at_a_phases_last_step_is_of_that_phase(small):
    """So it does not depend on the phase that comes next."""
    losses = []
    for length in (16, 32):
        name = f"name=next-{length}"
        words = ["evaluate.every=6", "phases.0.steps=6", "phases.1.steps=1"]
        assert small.run(name, f"phases.1.sequence_length={length}", *words) == [0, 0], small.log()
        losses.append([m["eval_loss"] for m in small.metrics(f"next-{length}") if m["step"] == 6])
    assert losses[0] == losses[1] and len(losses[0]) == 1


def test_the_guard_of_a_run_that_is_resumed_at_a_phases_start_knows_no_losses_of_the_phase_before(small):
    name, words = "name=edge", ["ticket.enabled=false", "phases.0.steps=3", "phases.1.steps=2"]
    keep = ["checkpoint.every=1", "checkpoint.keep=9", "checkpoint.background=false"]
    assert small.run(name, *words, *keep) == [0, 0], small.log()
    kept = [
        len(json.loads(path.read_text())["trainer"]["recent"])
        for path in sorted((small.path / "runs" / "edge" / "checkpoints").glob("*/manifest.json"))
    ]
    assert kept == [1, 2, 0, 1, 0]


def test_a_run_is_not_exported_with_another_tokenizer_than_its_own(tmp_path):
    folder = Folder(tmp_path, stage=1, precision="fp32")
    words = ["ticket.enabled=false", "phases.0.steps=1", "phases.1.steps=1"]
    assert folder.run(*words, ranks=1) == [0], folder.log()
    run, tokenizer = tmp_path / "runs" / "run", tmp_path / "corpus" / "tokenizer" / "tokenizer.json"
    assert export.read_run(run).tokenizer == tokenizer.parent
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(EarlyBertError, match=r"another tokenizer than the one that .*run was trained with"):
        export.read_run(run)


def test_runs_that_train_on_other_rows_are_evaluated_on_the_same(tmp_path):
    folder = Folder(tmp_path, stage=1, precision="fp32")
    short = ["ticket.enabled=false", "phases.0.steps=1", "phases.1.steps=1"]
    same = ["evaluate.objective=mlm", "evaluate.mask_probability=0.2"]
    for name, words in {"own": [], "few": same, "many": [*same, "data.mask_probability=0.5"]}.items():
        assert folder.run(f"name={name}", *short, *words, ranks=1) == [0], folder.log()
    own, few, many = (folder.metrics(name) for name in ("own", "few", "many"))
    assert few[0]["eval_loss"] == many[0]["eval_loss"] != own[0]["eval_loss"]
    assert few[1]["loss"] != many[1]["loss"]
