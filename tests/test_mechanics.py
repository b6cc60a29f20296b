from pathlib import Path

import pytest

from earlybert import mechanics
from earlybert.config import SettingsError

SHIPPED = sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_mechanics_only(path):
    values, where = mechanics.load(path)
    mechanics.check(values, where=where, experiment="experiment.toml")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"zero_optimisation": {"stage": 2}},
            "unknown setting 'zero_optimisation'; did you mean 'zero_optimization'",
        ),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage = "auto"'),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled = "auto"'),
        ({"train_batch_size": 8}, "train_batch_size = 8 is owned by the experiment.*phases.batch in e.toml"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer = .* is owned by the experiment.*\[optimizer\]"),
        ({"gradient_clipping": 1.0}, "optimizer.clipping"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
        ({"zero_optimization": {"stage": 4}}, "choose 0, 1, 2 or 3"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean 'grad_accum_dtype'"),
        ({"bf16": True}, r'bf16 = true: must be an object, such as \{"enabled": true\}'),
        ({"zero_optimization": 2}, r'zero_optimization = 2: must be an object, such as \{"stage": 2\}'),
        ({"fp16": {"enabled": True}}, "fp16 at ZeRO stage 0: .*use stage 1"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "only stage 3 shards"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "no shards to offload"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offload to cpu"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload to cpu"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            r'zero_optimization.offload_optimizer = "cpu": must be an object, such as \{"device": "cpu"\}',
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": True}}, "offload_param = true: must be an obj"),
        (
            {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
            "zenflow or super_offload: .* which a draw does not reach",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "super_offload": True},
                },
            },
            "zenflow or super_offload",
        ),
        (
            {
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
            },
            "master weights in 16 bits",
        ),
    ],
)
def test_what_deepspeed_would_ignore_or_what_stands_twice_is_refused(values, says):
    with pytest.raises(SettingsError, match=says):
        mechanics.check(values, where="ds.json", experiment="e.toml")


def test_an_optimizer_in_a_scripts_own_json_is_an_object():
    with pytest.raises(SettingsError, match='optimizer = "AdamW": must be an object, such as'):
        mechanics.check({"optimizer": "AdamW"}, where="ds.json")


def test_an_offloaded_optimizer_needs_no_adam_of_deepspeeds_unless_it_is_asked_for():
    assert mechanics.close_traps({})["zero_force_ds_cpu_optimizer"] is False
    asked = {"zero_force_ds_cpu_optimizer": True}
    assert mechanics.close_traps(asked)["zero_force_ds_cpu_optimizer"] is True


def test_a_script_of_its_own_may_set_the_batch_in_its_json():
    mechanics.check({"train_batch_size": 8, "optimizer": {"type": "Adam"}}, where="ds.json")
