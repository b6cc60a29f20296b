"""Every experiment and DeepSpeed JSON that ships is loaded by the real loader, and mistakes are named."""

import itertools
import json
from pathlib import Path

import pytest

from earlybert import experiment, mechanics
from earlybert.config import SettingsError
from earlybert.schedule import total_steps

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted((ROOT / "scripts" / "experiments").glob("*.toml"))
MECHANICS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_experiments_that_the_readme_promises_are_there():
    assert {path.stem for path in EXPERIMENTS} >= {"quickstart", "bert_mini", "bert_base", "bert_large"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_loads_and_its_batches_divide(path):
    loaded, _ = experiment.load(path)
    assert loaded.name == path.stem, "the run folder is named like the file"
    for ranks in [1, 2] if max(p.batch for p in loaded.phases) < 4096 else [1, 2, 8, 64]:
        for phase in loaded.phases:
            assert phase.accumulation(world_size=ranks) * phase.micro_batch * ranks == phase.batch


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("json_path", MECHANICS, ids=lambda path: path.stem)
def test_every_experiment_runs_on_every_shipped_deepspeed_json(path, json_path):
    _, values = experiment.load(path, [f"deepspeed={json_path}"])
    assert values == json.loads(json_path.read_text())
    assert mechanics.stage_of(values) == int(json_path.stem[4])
    assert mechanics.precision_of(values) == json_path.stem.rsplit("_", 1)[1]


def test_the_two_phase_recipe_is_that_of_the_field():
    for name in ("bert_base", "bert_large"):
        loaded, _ = experiment.load(ROOT / "scripts" / "experiments" / f"{name}.toml")
        first, second = loaded.phases
        assert (first.steps, first.sequence_length, first.batch) == (7038, 128, 65536)
        assert (second.steps, second.sequence_length, second.batch) == (1563, 512, 32768)
        assert total_steps(loaded.phases) == 8601
        removed = loaded.model.heads - round(loaded.model.heads * (1 - loaded.ticket.head_ratio))
        assert removed == 4, "the paper removes 4 heads in each layer"


def test_the_modern_recipes_are_modern_and_grow_their_batch_under_one_curve():
    for path in (path for path in EXPERIMENTS if path.stem.endswith("_modern")):
        loaded, _ = experiment.load(path)
        assert loaded.model.pre_norm and loaded.model.dropout == loaded.model.attention_dropout == 0
        assert loaded.data.objective == "mlm" and loaded.data.mask_probability == 0.3
        batches = [phase.batch for phase in loaded.phases]
        assert batches == sorted(set(batches)) and len(batches) > 1
        for before, after in itertools.pairwise(loaded.phases):
            assert before.rate(before.steps - 1) == after.rate(0) == after.learning_rate
        assert loaded.phases[-1].decay == "stable"


def test_what_is_evaluated_can_be_set_apart_from_what_is_trained():
    path = ROOT / "scripts" / "experiments" / "bert_mini.toml"
    loaded, _ = experiment.load(path, ["data.objective=mlm+nsp", "data.mask_probability=0.3"])
    assert loaded.held_out == loaded.data
    words = ["evaluate.objective=mlm", "evaluate.mask_probability=0.15"]
    told, _ = experiment.load(path, ["data.objective=mlm+nsp", "data.mask_probability=0.3", *words])
    assert (told.held_out.objective, told.held_out.mask_probability) == ("mlm", 0.15)
    assert told.data == loaded.data and told.fingerprint == loaded.fingerprint, "it only watches"
    with pytest.raises(SettingsError, match="mask_probability = 1.5: choose between 0 and 1"):
        experiment.load(path, ["evaluate.mask_probability=1.5"])


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model.hiden=64", "did you mean 'hidden'"),
        ("ticket.evry=2", "did you mean 'every'"),
        ("phases.0.step=3", "did you mean 'steps'"),
        ("seed=auto", "seed"),
        ("deepspeed=nowhere.json", "nowhere.json"),
        ("phases.0.sequence_length=256", "raise model.positions to 256"),
        ("ticket.head_ratio=0.9", "would remove all 4 heads of layer 0"),
        ("model.heads=5", "hidden = 256 is not a multiple of heads = 5"),
        ("ticket.latest_step=5000", "lower ticket.latest_step"),
        ("ticket.neuron_ratio=0.97", "lower the ratio or ticket.minimum_neurons"),
        ("name=../x", "must be a plain folder name"),
        ("optimizer.betas=[0.9]", "need two numbers"),
        ("optimizer.name=lion", "choose one of 'adamw', 'lamb'"),
        ("optimizer.trust=[2.0, 1.0]", "0 <= least < largest"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(word, says):
    with pytest.raises(SettingsError) as caught:
        experiment.load(ROOT / "scripts" / "experiments" / "bert_mini.toml", [word])
    assert says in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimization"),
        ({"zero_optimization": {"stage": "auto"}}, "auto"),
        ({"gradient_clipping": 1.0}, "owned by the experiment"),
        ({"train_batch_size": 32}, "owned by the experiment"),
        ({"optimizer": {"type": "Adam"}}, "owned by the experiment"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_a_deepspeed_json_that_cannot_be_meant_is_refused(tmp_path, values, says):
    (tmp_path / "ds.json").write_text(json.dumps(values))
    with pytest.raises(SettingsError) as caught:
        experiment.load(
            ROOT / "scripts" / "experiments" / "bert_mini.toml", [f"deepspeed={tmp_path / 'ds.json'}"]
        )
    assert says in str(caught.value) and "ds.json" in str(caught.value)


def test_the_fingerprint_follows_what_decides_the_run_and_nothing_else():
    path = ROOT / "scripts" / "experiments" / "bert_mini.toml"
    base = experiment.load(path)[0].fingerprint
    for word in (
        "name=x",
        "log_every=3",
        "runs=y",
        "evaluate.every=7",
        "checkpoint.keep=9",
        "data.workers=0",
    ):
        assert experiment.load(path, [word])[0].fingerprint == base, word
    for word in (
        "seed=2",
        "ticket.every=10",
        "phases.0.batch=64",
        "optimizer.epsilon=1e-8",
        "model.layers=2",
    ):
        assert experiment.load(path, [word])[0].fingerprint != base, word
