"""A checkpoint is whole or it is not used; what loads is what was saved."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

import ranks
import tiny
from earlybert import checkpoint, dist, state
from earlybert.config import EarlyBertError

CONFIGS = sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json"))
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
        victim = sorted(p for p in (where / "step-0000006").iterdir() if p.suffix == ".pt")[-1]
        os.truncate(victim, victim.stat().st_size - 1)
    dist.barrier()
    found = checkpoint.newest_good(where)
    assert found is not None and found.folder.name == "step-0000004"
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
        assert [name for name in entries if name.startswith((".", "step"))] == ["step-0000004"], (
            "nothing half-written is left, and not the broken one that was newer than what was resumed"
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
        assert found.keys() == {path.stem for path in CONFIGS} and len(found) >= 7
        assert set(found.values()) == {0.0}


@pytest.fixture
def good(tmp_path):
    """A checkpoint folder with one file, complete by its manifest."""
    folder = tmp_path / "step-0000010"
    folder.mkdir()
    (folder / "a.pt").write_bytes(b"0123456789")
    entry = {"bytes": 10, "sha256": checkpoint._sha256(folder / "a.pt")}
    manifest = checkpoint.Manifest(
        step=10, world_size=1, stage=2, model={}, progress={}, logits=[], versions={}, files={"a.pt": entry},
        **WHAT,
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
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
        (lambda f: (f / "manifest.json").write_text('{"version": 1}'), "cannot be read"),
    ],
    ids=["missing", "half", "another format", "empty"],
)
def test_a_folder_without_a_readable_manifest_is_no_checkpoint(good, damage, says):
    damage(good)
    with pytest.raises(EarlyBertError, match=says):
        checkpoint.read_manifest(good)
    older = good.parent / "step-0000005"
    shutil.copytree(good, older)
    assert checkpoint.newest_good(good.parent) is None


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({"stage": 3, "precision": "bf16"}, "ZeRO stage 2, this start 3"),
        ({"stage": 2, "precision": "fp32"}, "precision bf16, this start fp32"),
    ],
)
def test_another_layout_is_refused_with_what_to_start(good, now, says):
    manifest = checkpoint.read_manifest(good)
    checkpoint.same_layout(manifest, stage=2, precision="bf16")
    with pytest.raises(EarlyBertError, match=says):
        checkpoint.same_layout(manifest, **now)
