"""What is left out of DeepSpeed's steps, and that no number changes."""

import math

import pytest
import torch

import ranks
import tiny
from earlybert import dist, shortcuts, state

fp16_here = pytest.mark.skipif(not tiny.FP16, reason="this processor has no fp16 products")


def norms(stage):
    """{what is wrong with the gradients: the groups' norms by DeepSpeed and by us, and what it says of them
    itself}, on gradients that have arrived and wait for the update."""
    found = {}
    for wrong in (None, math.inf, -math.inf, math.nan):
        engine = tiny.engine(stage, "bf16", tiny.settings(minimum_step=20, latest_step=20))
        for micro in range(tiny.ACCUMULATION):
            loss = engine(**tiny.batch(0, micro * dist.world_size() + dist.rank())).loss
            engine.backward(loss)
            del loss
            if micro < tiny.ACCUMULATION - 1:
                engine.step()
        optimizer = engine.inner.optimizer
        gradients = optimizer.averaged_gradients
        if wrong is not None and dist.rank() == 0:
            gradients[0][0].view(-1)[3] = wrong
        theirs = type(optimizer)
        pairs = [(gradients[group], optimizer.params_in_partition[group]) for group in sorted(gradients)]
        found[wrong] = (
            [theirs.get_grad_norm_direct(optimizer, *pair).item() for pair in pairs],
            [optimizer.get_grad_norm_direct(*pair).item() for pair in pairs],
            theirs.has_overflow(optimizer),
        )
        engine.close()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_of_gradients_of_any_length_are_those_of_one_sum_in_double_precision(dtype):
    torch.manual_seed(0)
    most = shortcuts._CACHED
    given = [torch.randn(shape).to(dtype) for shape in ((), (1,), (3, most), (most,), (most + 1,), (2, 5, 7))]
    given.append(torch.randn(40, 30).to(dtype).t())
    whole = sum(float(x.double().square().sum()) for x in given)
    assert shortcuts._squares(given).item() == pytest.approx(whole, rel=1e-13)


@pytest.mark.parametrize("stage", [1, 2])
def test_norms_are_deepspeeds_to_the_last_bit_and_show_what_its_scan_shows(stage):
    for found in ranks.run("test_shortcuts:norms", ranks=2, stage=stage):
        for wrong, (theirs, own, bad) in found.items():
            assert own == theirs and len(own) == 3
            assert bad == (wrong is not None) == (own[0] == -1) and all(norm > 0 for norm in own[1:])


def taken_and_not(stage, precision, fp32_accumulation):
    """With the shortcuts and as DeepSpeed has it: (losses of steps with a draw, the state after them, hooks
    on gradients, whether views are renewed where the weights stay, and where they move)."""
    found = []
    for take in (shortcuts.take, lambda optimizer: None):
        shortcuts.take = take
        settings = tiny.settings()
        engine = tiny.engine(
            stage, precision, settings, clipping=0.1, fp32_accumulation=fp32_accumulation,
            checkpointing=stage == 2,
        )  # fmt: skip
        losses = tiny.train(engine, range(settings.latest_step + 2))
        assert engine.ticket is not None
        optimizer, after = engine.inner.optimizer, state.read(engine.inner)
        first, second, *_ = optimizer.bit16_groups[0]
        second.data = own = second.data.clone()
        optimizer._update_model_bit16_weights(0)
        staying = second.data_ptr() != own.data_ptr()
        place = first.data_ptr()
        optimizer.bit16_groups_flat[0] = optimizer.bit16_groups_flat[0].clone()
        optimizer._update_model_bit16_weights(0)
        moved = first.data_ptr() != place
        found.append((losses, after.pieces, len(optimizer._grad_acc_hooks), staying, moved))
        engine.close()
    return found


@pytest.mark.parametrize(
    ("stage", "precision", "fp32_accumulation"),
    [
        (1, "bf16", False),
        (2, "bf16", True),
        pytest.param(2, "bf16", False, marks=pytest.mark.thorough),
        pytest.param(1, "fp32", False, marks=pytest.mark.thorough),
        pytest.param(2, "fp32", False, marks=pytest.mark.thorough),
        pytest.param(1, "fp16", False, marks=[pytest.mark.thorough, fp16_here]),
    ],
)
def test_a_rank_that_is_alone_reduces_nothing_and_trains_to_the_same_bits(
    stage, precision, fp32_accumulation
):
    ((own, theirs),) = ranks.run(
        "test_shortcuts:taken_and_not", ranks=1, stage=stage, precision=precision,
        fp32_accumulation=fp32_accumulation,
    )  # fmt: skip
    assert own[0] == theirs[0]
    for name, pieces in theirs[1].items():
        for key, piece in pieces.items():
            assert torch.equal(own[1][name][key].values, piece.values), (name, key)
    assert own[2] == 0 < theirs[2]
    assert (own[3], theirs[3]) == (False, True) and own[4] and theirs[4]


def hooks(**asked):
    engine = tiny.engine(precision="bf16", ticket=None, **asked)
    tiny.train(engine, range(1))
    left = len(engine.inner.optimizer._grad_acc_hooks)
    engine.close()
    return left


@pytest.mark.parametrize(
    ("count", "asked"),
    [(2, {"stage": 1}), (1, {"stage": 2, "offload": True})],
)
def test_gradients_that_are_shared_or_kept_elsewhere_go_deepspeeds_way(count, asked):
    assert all(ranks.run("test_shortcuts:hooks", ranks=count, **asked))
