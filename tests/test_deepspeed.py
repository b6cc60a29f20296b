"""Canaries: corners of DeepSpeed that earlybert works around. If one fails, its workaround can go."""

import pytest
import torch

import ranks
import tiny
from earlybert import mechanics

SAVED_AT = 20
"""0.999 ** 21 in fp32 depends on how it is computed; at some other steps both ways happen to agree."""


def _adam_losses(folder, *, resume, recompute):
    """Losses of 8 steps after SAVED_AT and the masters then, with DeepSpeed's own Adam in bf16, unbroken
    (and saved on the way) or resumed there.

    `recompute` moves the counter of its C++ object away before each step, so that it takes the powers of beta
    from the step number instead of multiplying on.
    """
    import deepspeed
    from deepspeed.ops.adam import FusedAdam

    config = mechanics.complete(tiny.mechanics_of(1, "bf16"), micro_batch=2, accumulation=2, clipping=0.0)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": tiny.RATE, "betas": [0.9, 0.999]}}
    model = tiny.seeded_model(tiny.config(coefficients="none"), seed=7)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    assert type(engine.optimizer.optimizer) is FusedAdam
    elsewhere = FusedAdam([torch.zeros(8, requires_grad=True)], betas=(0.9, 0.999))
    tag = f"recompute-{recompute}"
    if resume:
        engine.load_checkpoint(str(folder), tag=tag)
    losses = []
    for step in range(SAVED_AT if resume else 0, SAVED_AT + 8):
        if step == SAVED_AT and not resume:
            engine.save_checkpoint(str(folder), tag=tag)
        if recompute:
            elsewhere.param_groups[0]["params"][0].grad = torch.zeros(8)
            elsewhere.param_groups[0]["step"] = 1000 + 7 * step
            elsewhere.step()
        for micro in range(tiny.ACCUMULATION):
            loss = engine(**tiny.batch(step, micro)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    masters = torch.cat([flat.detach().clone() for flat in engine.optimizer.single_partition_of_fp32_groups])
    engine.destroy()
    return losses[-16:], masters


def adam_losses(folder, resume):
    return [_adam_losses(folder, resume=resume, recompute=recompute) for recompute in (False, True)]


@pytest.mark.slow  # compiles DeepSpeed's Adam, which nothing else here uses
def test_deepspeeds_own_adam_resumes_inexactly_because_it_multiplies_beta_powers_on(tmp_path):
    arguments = {"folder": str(tmp_path), "ranks": 1}
    (unbroken,) = ranks.run("test_deepspeed:adam_losses", resume=False, **arguments)
    (resumed,) = ranks.run("test_deepspeed:adam_losses", resume=True, **arguments)
    running, recomputed = zip(unbroken, resumed, strict=True)
    assert not torch.equal(running[0][1], running[1][1]), "exact now: DeepSpeed's Adam could be offered"
    assert recomputed[0][0] == recomputed[1][0], "the running powers were the only difference"
    assert torch.equal(recomputed[0][1], recomputed[1][1])


def step_of_fp16_at_stage_0():
    """How far one SGD step moved a weight, over how far its gradient says, at a loss scale of 256."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "fp16": {"enabled": True, "initial_scale_power": 8},
        "zero_optimization": {"stage": 0},
    }
    model = torch.nn.Linear(4, 1, bias=False)
    engine, *_ = deepspeed.initialize(
        model=model, config=config, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0),
        model_parameters=list(model.parameters()),
    )  # fmt: skip
    before = engine.module.weight.detach().float().clone()
    loss = engine(torch.ones(1, 4, dtype=torch.float16)).sum()  # its gradient is 1 everywhere
    engine.backward(loss)
    engine.step()
    return float((before - engine.module.weight.detach().float()).mean())


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="no fp16 on this processor")
def test_fp16_at_stage_0_still_divides_by_a_scale_that_the_loss_never_had():
    """When this fails, DeepSpeed is mended and `mechanics.check` need not refuse fp16 at stage 0."""
    (moved,) = ranks.run("test_deepspeed:step_of_fp16_at_stage_0", ranks=1)
    assert moved < 0.1, moved
