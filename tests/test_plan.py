"""The plan against the model, against engines that really run, and against DeepSpeed's own estimators."""

import json
from pathlib import Path

import pytest
import torch

import ranks
import tiny
from earlybert import experiment, plan
from earlybert.config import SettingsError
from earlybert.initial import encoder_flops_per_token
from earlybert.model import EarlyBertForPreTraining
from memory import live_bytes

ROOT = Path(__file__).parent.parent
SHAPE = {
    "vocab_size": 2000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 1024, "coefficients": "none",
}  # fmt: skip


def test_parameters_and_flops_are_the_models():
    config = tiny.config(**SHAPE)
    found = plan.measure(config, micro_batch=2, sequence_length=16, predicted=0.25)
    assert found.parameters == sum(p.numel() for p in EarlyBertForPreTraining(config).parameters())
    head = 0.25 * (2 * 256 * 256 + 2 * 256 * 2000)
    expected = 32 * (encoder_flops_per_token(config, sequence_length=16) + head)
    assert found.forward_flops == pytest.approx(expected, rel=0.01)
    assert found.backward_flops == pytest.approx(2 * expected, rel=0.01)
    work = plan.targets.bert_work(hidden=256, heads=4, vocabulary=2000, sequence_length=16, predicted=0.25)
    assert 32 * work.of((4,) * 4, (1024,) * 4) == pytest.approx(found.forward_flops, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("heads", "neurons"), [([4] * 6, [1024] * 6), ([4, 2, 4, 4, 2, 2], [64, 320, 64, 64, 320, 320])]
)
def test_a_step_of_many_layers_of_few_shapes_is_told_from_small_models(checkpointing, heads, neurons):
    own = {"num_hidden_layers": 6, "heads_per_layer": heads, "neurons_per_layer": neurons}
    config = tiny.config(**{**SHAPE, **own, "coefficients": "train"})
    words = {"micro_batch": 2, "sequence_length": 16, "predicted": 0.25, "precision": "bf16"}
    found = plan.measure(config, **words, checkpointing=checkpointing)
    assert found == plan._counted(config, **words, checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_a_real_forward_pass_keeps(checkpointing):
    config = tiny.config(**{**SHAPE, "max_position_embeddings": 64})
    model = EarlyBertForPreTraining(config).train()
    if checkpointing:
        tiny.enable_checkpointing(model)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids, places = torch.zeros(2, 64, dtype=torch.long), torch.zeros(2, 10, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=ids + 1, masked_positions=places, masked_labels=places)
    real = sum(storage.nbytes() for storage in kept.values())
    planned = plan.measure(
        config, micro_batch=2, sequence_length=64, predicted=10 / 64, precision="fp32",
        checkpointing=checkpointing,
    )  # fmt: skip
    assert planned.activation_bytes == pytest.approx(real, rel=0.1)


def resident():
    """{(stage, precision): bytes of an engine's tensors between two steps}."""
    found = {}
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            before = live_bytes()
            engine = tiny.engine(stage, precision, None, model_config=tiny.config(**SHAPE), bucket=1000)
            tiny.train(engine, range(1))
            found[stage, precision] = live_bytes() - before
            engine.close()
    return found


@pytest.mark.thorough
def test_the_bytes_of_a_rank_are_those_of_real_engines():
    config = tiny.config(**SHAPE)
    measured = plan.measure(config, micro_batch=1, sequence_length=12, predicted=0.25)
    for found in ranks.run("test_plan:resident", ranks=2):
        for (stage, precision), real in found.items():
            m = plan.memory(
                measured, stage=stage, precision=precision, offload="none", ranks=2, micro_batches=False
            )
            planned = m.parameters + m.masters + m.moments
            planned += m.gradients if stage == 3 else 0  # it keeps their buffer from step to step
            assert real == pytest.approx(planned, rel=0.1), (stage, precision, m)


@pytest.mark.parametrize("count", [1, 8, 4096])
def test_the_states_are_those_of_deepspeeds_estimators(count):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    config = tiny.config(**SHAPE)
    measured = plan.measure(config, micro_batch=1, sequence_length=8, predicted=0.25)
    whole, nodes = measured.parameters, {"num_gpus_per_node": count, "additional_buffer_factor": 1.0}

    def planned(stage, offload):
        return plan.memory(
            measured, stage=stage, precision="bf16", offload=offload, ranks=count, micro_batches=False
        )

    _, two = estimate_zero2_model_states_mem_needs(whole, cpu_offload=False, **nodes)
    assert planned(2, "none").device == pytest.approx(two, rel=0.1)
    host, two = estimate_zero2_model_states_mem_needs(whole, cpu_offload=True, **nodes)
    assert planned(2, "optimizer").device == pytest.approx(two, rel=0.1)
    assert count * planned(2, "optimizer").host == pytest.approx(
        host if count == 1 else 16 * whole, rel=0.1
    ), "it assumes that each of the ranks loads the whole model in fp32 on its host first"
    _, three = estimate_zero3_model_states_mem_needs(
        whole, measured.largest_layer, cpu_offload=False, cpu_offload_params=False, **nodes
    )[:2]
    # It leaves out the 16-bit gradients of the shard, which are there until the step is over.
    assert planned(3, "none").device - 2 * whole / count == pytest.approx(three, rel=0.1)
    _, three = estimate_zero3_model_states_mem_needs(
        whole, measured.largest_layer, cpu_offload=True, cpu_offload_params=True, **nodes
    )[:2]
    assert planned(3, "parameters").device == pytest.approx(three, rel=0.1)


def run(capsys, *words):
    import runpy
    import sys

    before, sys.argv = sys.argv, ["plan.py", *map(str, words)]
    try:
        main = runpy.run_path(str(ROOT / "scripts" / "plan.py"))["main"]
        assert main() == 0
    finally:
        sys.argv = before
    return capsys.readouterr().out


@pytest.mark.thorough
def test_the_command_plans_bert_base(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["scripts/experiments/bert_base.toml", "--ranks", "1,512,4096", "data.corpus=nowhere"]
    figures = json.loads(run(capsys, *words, "--json", "--vocabulary", "30592"))
    assert figures["parameters"]["dense"] == pytest.approx(110e6, rel=0.02)
    saving = figures["saving"]
    assert saving["structure"] == pytest.approx(0.7, abs=0.03) and saving["search_share"] == 400 / 8601
    expected = saving["search_share"] + (1 - saving["search_share"]) * saving["structure"]
    assert saving["cost"] == pytest.approx(expected)
    assert figures["accumulation"]["4096"] == [None, None], "2,048 micro-batches, and fewer, are too few"
    page = run(capsys, *words, "--steps-ratio", "0.8")
    assert "too few micro-batches" in page and "4,096 ranks" in page and "0.8 of the dense run's" in page


def test_without_a_ticket_nothing_is_said_to_be_saved(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["scripts/experiments/bert_mini.toml", "--ranks", "1,8", "data.corpus=nowhere"]
    page = run(capsys, *words, "ticket.enabled=false")
    assert "no ticket is drawn" in page and "all steps are dense" in page
    assert not any(word in page for word in ("looks", "saved", "after the ticket", "small", "->", "the draw"))
    figures = json.loads(run(capsys, *words, "ticket.enabled=false", "--json"))
    assert figures["parameters"]["small"] == figures["parameters"]["dense"]
    assert figures["saving"] == {"structure": 1.0, "search_share": 1.0, "steps": 1.0, "cost": 1.0}
    assert figures["looks"] is None and figures["draw"] is None
    drawn = run(capsys, *words, "ticket.kind=random")
    assert "looks" not in drawn and "saved" in drawn, "a baseline is drawn, but not searched"


@pytest.mark.parametrize("word", ["--steps-ratio", "--memory", "--vocabulary"])
@pytest.mark.parametrize("number", ["0", "-5"])
def test_a_number_that_is_not_above_0_is_refused(capsys, monkeypatch, word, number):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SettingsError, match=f"{word} {number}: give a number above 0"):
        run(capsys, "scripts/experiments/bert_mini.toml", word, number)


def test_a_mistake_is_one_line(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SettingsError, match="whole numbers from 1 with commas"):
        run(capsys, "scripts/experiments/bert_base.toml", "--ranks", "many")
    with pytest.raises(SettingsError, match="did you mean"):
        run(capsys, "scripts/experiments/bert_base.toml", "ticket.budgt=0.6")


def test_the_plan_of_a_budget_meets_it():
    settings, _ = experiment.load(
        ROOT / "scripts" / "experiments" / "bert_base.toml",
        [f"deepspeed={ROOT}/ds_configs/zero2_bf16.json", "ticket.budget=0.6"],
    )
    assert plan.saving(settings, vocabulary=30592).structure == pytest.approx(0.6, abs=0.02)
