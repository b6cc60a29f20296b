"""scripts/show.py on runs, checkpoints and tickets, as a user runs it."""

import json
import runpy
import tempfile
from pathlib import Path

import pytest

import ranks
from earlybert.checkpoint import Manifest, _sealed
from earlybert.ticket import Ticket

ROOT = Path(__file__).resolve().parent.parent
TICKET = Ticket(
    step=310,
    heads=((0, 1), (0, 2)),
    neurons=((0, 1, 2), (0,)),
    head_widths=(3, 3),
    neuron_widths=(4, 4),
    reason="settled",
    distances=((100, None, None), (110, 0.25, 0.5)),
)


def show(*arguments):
    with tempfile.TemporaryDirectory() as folder:
        words = list(map(str, arguments))
        (process,) = ranks.launch(str(ROOT / "scripts" / "show.py"), words, ranks=1, logs=Path(folder))
        code = process.wait(timeout=120)
        said = (Path(folder) / "log-0.txt").read_text()
    assert "Traceback" not in said, said
    return code, said


@pytest.fixture
def run(tmp_path):
    """A run folder of two phases that was stopped at step 4 after its draw, with one good checkpoint."""
    folder = tmp_path / "runs" / "r"
    checkpoint = folder / "checkpoints" / "step-0000004"
    checkpoint.mkdir(parents=True)
    (folder / "experiment.toml").write_text(
        "[model]\nlayers = 2\nhidden = 12\nheads = 3\n[data]\ncorpus = 'c'\n"
        "[[phases]]\nsteps = 6\nbatch = 8\nsequence_length = 16\nlearning_rate = 1e-3\n"
        "[[phases]]\nsteps = 4\nbatch = 4\nsequence_length = 32\nlearning_rate = 5e-4\n"
    )
    environment = {"world_size": 2, "device": "cpu", "torch": "2", "git_commit": None}
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [{"step": 0, "eval_loss": 4.5}]
    line = {"step": 4, "loss": 3.25, "mlm_accuracy": 0.5, "tokens_per_second": 1234.5, "parameters": 999}
    lines.append({**line, "eval_loss": 3.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 5, "lo')
    probes = [{"step": 4, "task": "rte", "score": 57.25}, {"step": 4, "task": "mrpc", "error": "no"}]
    (folder / "probes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in probes) + '{"st')
    TICKET.save(folder / "ticket.json")
    (checkpoint / "shard.pt").write_bytes(b"weights")
    sha = "9faf4a0cd6e8fa0a4d6a5aa0bd1bd5b3d5b0f3f9b3f0f2b1a9a1b6f9e2ce3cd9"
    manifest = {
        "step": 4, "experiment": "e", "corpus": "c", "world_size": 2, "stage": 1, "precision": "bf16",
        "model": {"heads_per_layer": [2, 2], "neurons_per_layer": [3, 1]},
        "progress": {"tickets": [TICKET.to_json()]}, "trainer": {"eval_losses": {"0": 4.5}}, "logits": [],
        "versions": {"torch": "2"}, "files": {"shard.pt": {"bytes": 7, "sha256": sha}}, "state": {},
    }  # fmt: skip
    (checkpoint / "manifest.json").write_text(_sealed(Manifest(**manifest)))
    return folder


def test_a_run_is_described_while_it_is_being_written(run):
    code, said = show(run)
    assert code == 0
    for words in (
        "step 4 of 10",
        "phase 2: 4 steps of 4 sequences of 32 tokens",
        "held-out loss at step       4: 3.5000",
        "newest line: loss 3.2500",
        "probe of rte at step       4: 57.25",
        "probe of mrpc at step       4: failed: no",
        "keep 4 of 6 heads, 4 of 8 neurons",
        "layer  0: heads ##. (2 of 3)",
        "checkpoint step-0000004: complete",
        "tensorboard --logdir",
    ):
        assert words in said, said


def test_a_checkpoint_is_described_and_verify_names_what_is_broken(run):
    folder = run / "checkpoints" / "step-0000004"
    code, said = show(folder)
    assert code == 0 and "written by 2 ranks, ZeRO-1, bf16" in said and "layer  1: 2 heads, 1 neurons" in said
    code, said = show(folder, "--verify")
    assert code == 0 and "broken: shard.pt does not match its sha256" in said


def test_a_ticket_is_drawn_in_characters_and_a_changed_one_is_refused(run):
    code, said = show(run / "ticket.json")
    assert code == 0 and "layer  1: heads #.# (2 of 3)" in said
    assert "distance at step    110: heads 0.250, neurons 0.500" in said and "step    100" not in said
    values = json.loads((run / "ticket.json").read_text())
    values["heads"][0] = [0, 2]
    (run / "ticket.json").write_text(json.dumps(values))
    code, said = show(run / "ticket.json")
    assert code == 2 and "does not match its sha256" in said


def test_a_line_whose_steps_were_all_skipped_has_no_loss_to_tell(run):
    line = {"step": 5, "loss": None, "mlm_accuracy": None, "tokens_per_second": 10.0, "parameters": 9}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    code, said = show(run)
    assert code == 0 and "newest line: loss unknown (its steps were skipped)" in said, said


def test_a_fine_tuning_run_is_described(tmp_path):
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "experiment.toml").write_text(
        'model = "runs/mine"\ntasks = ["rte", "cola"]\nseeds = [1, 2]\n'
    )
    code, said = show(tmp_path)
    assert code == 0 and "of runs/mine: rte, cola" in said and "0 of 4 done" in said, said
    (tmp_path / "rte" / "seed-2").mkdir(parents=True)
    told = {"task": "rte", "seed": 2, "score": 61.371, "parameters": 90, "seconds": {"train": 7.0}}
    (tmp_path / "rte" / "seed-2" / "result.json").write_text(json.dumps(told))
    code, said = show(tmp_path)
    assert code == 0 and "1 of 4 done" in said and "| 61.37 | 61.37 | 90 | 7 s |" in said, said


def test_an_unfinished_save_is_no_checkpoint(run):
    (run / "checkpoints" / "step-0000004" / "manifest.json").unlink()
    code, said = show(run / "checkpoints" / "step-0000004")
    assert code == 2 and "no manifest.json, so not a complete checkpoint" in said
    code, said = show(run)
    assert code == 0 and "step-0000004: broken" in said


def test_an_environment_that_says_too_little_is_one_line(run):
    (run / "environment.json").write_text("{}")
    code, said = show(run)
    assert code == 2 and "environment.json: 'world_size' is missing" in said


def test_what_a_run_has_learned_is_shown_while_its_last_line_is_written(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").touch()
    main = runpy.run_path(str(ROOT / "scripts" / "fill.py"))["main"]
    monkeypatch.setitem(main.__globals__, "_filled", lambda *_, **__: [("the [MASK]", "cat", ["dog"])])
    monkeypatch.setattr("sys.argv", ["fill.py", str(run), "--model", str(tmp_path)])
    assert main() == 0
    assert "held-out loss at the end   (step     4): 3.5000" in capsys.readouterr().out
