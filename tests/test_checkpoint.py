"""A checkpoint is whole or it is not used; what loads is what was saved."""

import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

import ranks
import tiny
from earlybert import checkpoint, dist, faults, state
from earlybert.config import EarlyBertError
from earlybert.shards import file_sha256

CONFIGS = [
    path
    for path in sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json"))
    if tiny.FP16 or not path.stem.endswith("fp16")
]
FP32 = {"experiment": "e", "corpus": "c", "precision": "fp32"}
WHAT = {"experiment": "e", "corpus": "c", "precision": "bf16", "trainer": {"sums": {}}}


def saves(folder, stage):
    """Six steps, saved after every other; what is on disk then, and the losses after a load of step 4."""
    where = Path(folder)
    engine = tiny.engine(stage, "bf16", tiny.settings(minimum_step=20, latest_step=20))
    for step in (2, 4, 6):
        losses = tiny.train(engine, range(step - 2, step))
        checkpoint.save(engine, where, step=step, stage=stage, keep=2, **WHAT)
    engine.close()
    dist.barrier()
    kept, latest = checkpoint.names(where), (where / "latest").read_text()
    if dist.rank() == 0:  # the newest is damaged
        victim = sorted((where / "step-0000006").glob("*.safetensors"))[-1]
        os.truncate(victim, victim.stat().st_size - 1)
    dist.barrier()
    found = checkpoint.newest_good(where)
    assert found is not None and found.folder.name == "step-0000004"
    assert len({path.stat().st_mode for path in found.folder.iterdir()}) == 1, "all for the same readers"
    again = tiny.engine(stage, "bf16", tiny.settings(minimum_step=20, latest_step=20))
    checkpoint.load(again, found)
    resumed = tiny.train(again, range(4, 6))
    said = []
    # A rank's own difference decides for all of them, or some would wait for the others for ever.
    for shift in (1.0, 1e-3) if dist.rank() == 0 else (0.0, 0.0):
        wrong = dataclasses.replace(found.manifest, logits=[x + shift for x in found.manifest.logits])
        try:
            checkpoint.load(again, dataclasses.replace(found, manifest=wrong))
            said.append("went on")
        except EarlyBertError as error:
            said.append(str(error))
    (where / ".partial-step-0000002").mkdir(exist_ok=True)
    checkpoint.save(again, where, step=4, stage=stage, keep=2, **WHAT)
    entries = sorted(p.name for p in where.iterdir())
    with torch.no_grad():  # a step that broke the weights, whose loss was not seen yet
        for parameter in again.module.parameters():
            (parameter.ds_tensor if stage == 3 else parameter).fill_(math.nan)
    with pytest.raises(EarlyBertError, match="not finite after step 5: nothing was saved"):
        checkpoint.save(again, where, step=5, stage=stage, keep=2, **WHAT)
    again.close()
    return losses, resumed, kept, latest, said, entries


@pytest.mark.parametrize(("stage", "count"), [(0, 2), (2, 1), (3, 2)])
def test_the_newest_good_checkpoint_is_found_and_goes_on_bit_equal(tmp_path, stage, count):
    results = ranks.run("test_checkpoint:saves", ranks=count, folder=str(tmp_path), stage=stage)
    for losses, resumed, kept, latest, said, entries in results:
        assert resumed == losses
        assert kept == ["step-0000006", "step-0000004"], "two stay, and the oldest went"
        assert latest == "step-0000006"
        assert "differ by up to 1 from" in said[0] and said[1] == "went on", "only rounding goes on"
        assert entries == ["broken-step-0000004", "broken-step-0000006", "latest", "step-0000004"], (
            "nothing half-written is left; what was newer than what was resumed is out of the way, not away"
        )
        assert checkpoint.names(tmp_path) == ["step-0000004"]


def every_shipped_config(folder):
    """{DeepSpeed JSON: largest difference between a checkpoint's weights and the engine's masters}."""
    found = {}
    for path in CONFIGS:
        values = json.loads(path.read_text())
        values["train_micro_batch_size_per_gpu"], values["gradient_accumulation_steps"] = 2, 2
        engine = tiny.initialize(
            model=tiny.seeded_model(tiny.config(), seed=7), config=values, optimizer=tiny.adamw
        )
        tiny.train(engine, range(2))
        where, what = Path(folder) / path.stem, {**WHAT, "precision": path.stem.rsplit("_", 1)[1]}
        checkpoint.save(engine, where, step=2, stage=int(path.stem[4]), keep=1, **what)
        masters = {
            name: tensors["master"].clone()
            for name, tensors in state.whole_parameters(state.read(engine.inner))
        }
        stored = checkpoint.newest_good(where)
        assert stored is not None
        weights = checkpoint.weights(stored)
        found[path.stem] = max(float((weights[n] - m).abs().max()) for n, m in masters.items())
        engine.close()
    return found


def test_a_checkpoint_under_every_shipped_config_gives_back_the_masters(tmp_path):
    for found in ranks.run("test_checkpoint:every_shipped_config", ranks=2, folder=str(tmp_path)):
        assert found.keys() == {path.stem for path in CONFIGS} and len(found) >= (7 if tiny.FP16 else 6)
        assert set(found.values()) == {0.0}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def good(tmp_path):
    """A checkpoint folder with one file, complete by its manifest."""
    folder = tmp_path / "step-0000010"
    folder.mkdir()
    (folder / "a.pt").write_bytes(b"0123456789")
    entry = {"bytes": 10, "sha256": file_sha256(folder / "a.pt")}
    manifest = checkpoint.Manifest(
        step=10, world_size=1, stage=2, model={}, progress={}, logits=[], versions={}, files={"a.pt": entry},
        state={}, **WHAT,
    )  # fmt: skip
    (folder / "manifest.json").write_text(checkpoint._sealed(manifest))
    return folder


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "a.pt").unlink(), "a.pt is missing"),
        (lambda f: (f / "a.pt").write_bytes(b"0123"), "a.pt has 4 bytes, the manifest says 10"),
        (lambda f: (f / "a.pt").write_bytes(b"0123456780"), "a.pt does not match its sha256"),
    ],
    ids=["missing", "truncated", "changed"],
)
def test_each_damage_of_a_file_is_named(good, damage, says):
    assert checkpoint.flaws(good, checkpoint.read_manifest(good)) == []
    damage(good)
    assert checkpoint.flaws(good, checkpoint.read_manifest(good)) == [says]
    assert checkpoint.newest_good(good.parent) is None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json, so not a complete checkpoint"),
        (lambda f: (f / "manifest.json").write_text('{"step": 1'), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text('{"version": 99}'), "checkpoint format 99"),
        (lambda f: (f / "manifest.json").write_text('{"version": 2}'), "cannot be read"),
        (lambda f: edit(f / "manifest.json", '"step": 10', '"step": 11'), "does not match the sha256"),
    ],
    ids=["missing", "half", "another format", "empty", "one digit"],
)
def test_a_folder_without_a_readable_manifest_is_no_checkpoint(good, damage, says):
    damage(good)
    with pytest.raises(EarlyBertError, match=says):
        checkpoint.read_manifest(good)
    older = good.parent / "step-0000005"
    shutil.copytree(good, older)
    assert checkpoint.newest_good(good.parent) is None


def test_a_file_that_the_disk_does_not_give_is_a_flaw_and_an_older_checkpoint_is_used(
    good, monkeypatch, caplog
):
    own = good.parent / "step-0000005"
    shutil.copytree(good, own)
    real = checkpoint.file_sha256

    def failing(path):
        if good in Path(path).parents:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "file_sha256", failing)
    found = checkpoint.newest_good(good.parent)
    assert found is not None and found.folder == own
    assert "step-0000010 is not used: [Errno 5] Input/output error" in caplog.text


def test_another_precision_is_refused_with_what_to_start(good):
    manifest = checkpoint.read_manifest(good)
    checkpoint.same_precision(manifest, precision="bf16")
    with pytest.raises(EarlyBertError, match="precision bf16, this start fp32; use a DeepSpeed JSON of that"):
        checkpoint.same_precision(manifest, precision="fp32")


def test_a_checkpoint_of_another_experiment_is_named_and_an_older_own_one_is_used(good, caplog):
    own = good.parent / "step-0000005"
    shutil.copytree(good, own)
    foreign = dataclasses.replace(checkpoint.read_manifest(good), experiment="another")
    (good / "manifest.json").write_text(checkpoint._sealed(foreign))
    found = checkpoint.newest_good(good.parent, of=("e", "c"))
    assert found is not None and found.folder == own
    assert "step-0000010 is not used: its manifest is of another experiment" in caplog.text


def saves_in_the_background(folder):
    """A snapshot of step 2, written while steps 3 and 4 are taken; what a load of it gives."""
    where, settings = Path(folder), tiny.settings(minimum_step=20, latest_step=20)
    engine = tiny.engine(2, "bf16", settings)
    tiny.train(engine, range(2))
    saver = checkpoint.Saver(where, stage=2, keep=1, **{k: v for k, v in WHAT.items() if k != "trainer"})
    saver.begin(engine, step=2, trainer={})
    losses = tiny.train(engine, range(2, 4))
    assert saver.pending and checkpoint.names(where) == [], "no name before the commit"
    saver.commit()
    engine.close()
    again = tiny.engine(2, "bf16", settings)
    checkpoint.load(again, checkpoint.newest_good(where))
    resumed = tiny.train(again, range(2, 4))
    again.close()
    return losses, resumed


def test_a_save_in_the_background_holds_the_step_at_which_it_began(tmp_path):
    for losses, resumed in ranks.run(
        "test_checkpoint:saves_in_the_background", ranks=2, folder=str(tmp_path)
    ):
        assert losses == resumed


def finds_no_room(folder):
    """A save whose disk is full on rank 1, then one that works; what is said and what lies there."""
    os.environ[faults.VARIABLE] = "full@save.shard#2:1"
    engine = tiny.engine(1, "fp32", tiny.settings(minimum_step=20, latest_step=20))
    where, said = Path(folder), []
    for step in (1, 2, 3):
        tiny.train(engine, range(step - 1, step))
        try:
            said.append(checkpoint.save(engine, where, step=step, stage=1, keep=1, **FP32).name)
        except EarlyBertError as error:
            said.append(str(error))
        dist.barrier()
        said.append(sorted(path.name for path in where.iterdir()))
        dist.barrier()
    engine.close()
    return said


def test_no_room_for_a_save_is_said_with_its_rank_and_the_checkpoint_before_stays(tmp_path):
    for said in ranks.run("test_checkpoint:finds_no_room", ranks=2, folder=str(tmp_path)):
        assert said[:2] == ["step-0000001", ["latest", "step-0000001"]]
        assert "rank 1 could not write" in said[2] and "No space left on device" in said[2]
        assert said[3] == ["latest", "step-0000001"], "nothing half-written, and the good one is there"
        assert said[4:] == ["step-0000003", ["latest", "step-0000003"]]


def test_what_nobody_knows_to_be_good_does_not_push_out_the_last_good_one(good):
    """keep=1: the resumed step 5 stays until a newer good one is there, whatever lies between."""
    for name in ("step-0000005", "step-0000007"):
        shutil.copytree(good, good.parent / name)
    (good.parent / "step-0000007" / "a.pt").unlink()
    saver = checkpoint.Saver(
        good.parent, stage=2, keep=2, good=["step-0000005"], experiment="e", corpus="c", precision="bf16"
    )
    saver._retain()
    assert len(checkpoint.names(good.parent)) == 3, "one is known, two are to be kept"
    saver._good.append("step-0000010")
    saver._retain()
    assert checkpoint.names(good.parent) == ["step-0000010", "step-0000005"]
