"""The draw under every ZeRO stage, with real processes: exact, agreed on, and nothing of the old engine
left."""

import gc
import math
import weakref
from itertools import chain

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch._subclasses import FakeTensor

import ranks
import tiny
from earlybert import dist, state
from earlybert.adapters import bert_layers
from earlybert.shrink import cut

VARIANTS = [("keep", "train"), ("reset", "freeze"), ("keep", "freeze")]
"""Moments and coefficients after the draw."""


def sgd(groups):
    return torch.optim.SGD(groups, lr=tiny.RATE, momentum=0.9)


def live_bytes():
    gc.collect()
    # What a compiler keeps of the shapes that it has seen has no bytes.
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def whole(engine):
    """{name: {"master" | moment: whole tensor}} of an engine."""
    return {
        name: {k: v.clone() for k, v in t.items()}
        for name, t in state.whole_parameters(state.read(engine.inner))
    }


def fixed_logits(engine):
    engine.eval()
    with torch.no_grad():
        logits = engine(**tiny.batch(99, 0)).prediction_logits.float().clone()
    engine.train()
    return logits


# --- workers: run on every rank ---


def null_draws(variants):
    """For each variant, losses of 6 steps without and with an engine that is re-opened in the middle."""
    results = []
    state.CHUNK = 999  # many chunks, whose edges lie inside parameters
    for variant in variants:

        def fresh(variant=variant):
            asked = {"clipping": 1.0, "model_config": tiny.config(coefficients="none"), **variant}
            return tiny.engine(asked.pop("stage"), asked.pop("precision"), None, **asked)

        one = fresh()
        unbroken = tiny.train(one, range(6))
        one.close()
        two = fresh()
        broken = tiny.train(two, range(3))
        two.reopen(micro_batch=tiny.MICRO, accumulation=tiny.ACCUMULATION)
        broken += tiny.train(two, range(3, 6))
        results.append((unbroken, broken, two.global_steps))
        two.close()
    return results


def draw_and_compare(stage, moments, coefficients):
    """An fp32 draw against plain PyTorch on one process, which masks instead of cutting."""
    settings = tiny.settings(moments=moments, coefficients=coefficients)
    engine = tiny.engine(stage, "fp32", settings)
    losses = tiny.train(engine, range(4))
    ticket = engine.ticket
    assert ticket is not None and ticket.step == 4, "the latest step draws"

    model = tiny.seeded_model(tiny.config(), seed=7)
    optimizer = tiny.reference_optimizer(model)
    reference = [
        tiny.reference_step(model, optimizer, step, ranks=dist.world_size(), penalty=settings.penalty)
        for step in range(4)
    ]
    names = dict(model.named_parameters())
    heads = [names[x.head_coefficients].detach().clone() for x in bert_layers(2)]
    with torch.no_grad():  # mask: a unit that goes has the coefficient 0
        for layer, kept_heads, kept_neurons in zip(bert_layers(2), ticket.heads, ticket.neurons, strict=True):
            for name, kept in (
                (layer.head_coefficients, kept_heads),
                (layer.neuron_coefficients, kept_neurons),
            ):
                mask = torch.zeros_like(names[name])
                mask[list(kept)] = 1
                names[name].mul_(mask)
        model.eval()
        masked_logits = model(**tiny.batch(99, 0)).prediction_logits
        model.train()
    logits = fixed_logits(engine)
    after = tiny.train(engine, range(4, 5))
    if coefficients == "freeze":
        for name, parameter in names.items():
            parameter.requires_grad_(not name.endswith(".coefficients"))
    if moments == "reset":
        optimizer = tiny.reference_optimizer(model)
    reference += [tiny.reference_step(model, optimizer, 4, ranks=dist.world_size(), penalty=0.0)]
    cuts = tiny.cuts(ticket.heads, ticket.neurons)
    expected = {name: cut(p.detach(), cuts.get(name)) for name, p in names.items()}
    got = {name: tensors["master"] for name, tensors in whole(engine).items()}
    spread = max(float((h - 1).abs().max()) for h in heads)
    engine.close()
    return ticket, losses + after, reference, logits, masked_logits, got, expected, spread


def draws_and_compare(stage):
    return [draw_and_compare(stage, *variant) for variant in VARIANTS]


def many_draws(stage, precision, compiled):
    """Ten draws in a row that remove nothing (the shape stays, so the bytes must): what stays alive, bytes,
    process groups."""
    settings = tiny.settings(head_ratio=0.0, neuron_ratio=0.0, minimum_step=2, latest_step=2, draws=10)
    engine = tiny.engine(stage, precision, settings)
    alive, bytes_after, groups = [], [], []
    if compiled:
        engine.compile(backend="eager")
    for number in range(10):
        old = [weakref.ref(x) for x in (engine.inner, engine.inner.optimizer, engine.inner.module)]
        output = engine(**tiny.batch(0, 0))  # a caller that still holds an output and its loss
        kept = output.loss.detach()
        del output
        tiny.train(engine, range(2 * number, 2 * number + 2))
        assert len(engine.progress.tickets) == number + 1
        gc.collect()
        alive += [reference() is not None for reference in old]
        bytes_after.append(live_bytes())
        groups.append(len(torch.distributed.distributed_c10d._world.pg_map))
        assert not compiled or engine.is_compiled, "the small module too"
        del kept
    searching = engine.searching
    losses = tiny.train(engine, range(20, 22))
    engine.close()
    return alive, bytes_after, groups, searching, losses


def plain_and_compiled(stage):
    """Losses of 8 steps with a draw after the 4th, and a held-out loss: plain, then by torch's compiler."""
    results = []
    for compiled in (False, True):
        engine = tiny.engine(stage, "fp32", tiny.settings(), clipping=1.0)
        if compiled:
            engine.compile()
        losses = tiny.train(engine, range(8))
        engine.eval()
        with torch.no_grad():
            losses.append(engine(**tiny.batch(99, 0)).loss.item())
        assert engine.progress.tickets and engine.is_compiled == compiled
        engine.close()
        results.append(losses)
    return results


def waits(stage, precision):
    """How often a step, from the fourth on, asks the device to have done everything."""
    engine, device = tiny.engine(stage, precision, None), get_accelerator()
    tiny.train(engine, range(4))
    asked, real = [], type(device).synchronize
    type(device).synchronize = lambda self, *given: asked.append(given)
    try:
        tiny.train(engine, range(4, 6))
    finally:
        type(device).synchronize = real
    engine.close()
    return len(asked)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_does_not_wait_for_the_device_to_be_idle(stage):
    assert ranks.run("test_engine:waits", ranks=2, stage=stage, precision="bf16") == [0, 0]


def two_draws(stage, precision, start):
    """Two draws with odd sizes, the second counted in terms of the dense model too."""
    moments = "reset" if start == "rewind" else "keep"
    settings = tiny.settings(draws=2, start=start, moments=moments, latest_step=4)
    engine = tiny.engine(stage, precision, settings, clipping=1.0)
    losses = tiny.train(engine, range(8))
    kept = engine.progress
    config = engine.module.config
    at_draw = whole(engine)
    losses += tiny.train(engine, range(8, 10))
    engine.close()
    return kept, config.heads_per_layer, config.neurons_per_layer, config.coefficients, at_draw, losses


# --- claims ---


def variants_of(stage):
    yield {"stage": stage, "precision": "fp32"}
    yield {"stage": stage, "precision": "bf16"}
    if tiny.FP16 and stage:
        yield {"stage": stage, "precision": "fp16"}
    if stage:  # DeepSpeed has no fp32 accumulation of 16-bit gradients at stage 0
        yield {"stage": stage, "precision": "bf16", "fp32_accumulation": True}
        yield {"stage": stage, "precision": "bf16", "offload": True}
    if stage == 3:
        yield {"stage": stage, "precision": "bf16", "fp32_accumulation": True, "offload": True}
    if stage in (0, 2):
        yield {"stage": stage, "precision": "fp32", "optimizer": sgd}


@pytest.mark.parametrize(
    ("count", "stages"),
    [
        pytest.param(1, (0, 1, 2, 3), marks=pytest.mark.thorough),
        pytest.param(2, (0, 1), marks=pytest.mark.thorough), (2, (2,)),
        pytest.param(2, (3,), marks=pytest.mark.thorough),
    ],
)  # fmt: skip
def test_an_engine_that_is_torn_down_and_seeded_again_goes_on_bit_equal(count, stages):
    variants = [variant for stage in stages for variant in variants_of(stage)]
    for results in ranks.run("test_engine:null_draws", ranks=count, variants=variants):
        for variant, (unbroken, broken, steps) in zip(variants, results, strict=True):
            assert broken == unbroken, variant
            assert steps == 6


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.thorough)])
def test_the_shrunken_model_is_the_masked_dense_model_before_and_after_a_step(stage):
    of_ranks = ranks.run("test_engine:draws_and_compare", ranks=2, stage=stage)
    assert all(len(results) == len(VARIANTS) for results in of_ranks)
    for ticket, losses, reference, logits, masked_logits, got, expected, spread in chain(*of_ranks):
        assert spread > 1e-3, "the coefficients have moved, or the comparison says little"
        assert [len(x) for x in ticket.heads] == [3, 3]
        assert sum(map(len, ticket.neurons)) == 96 - round(0.23 * 96)
        # The L1 term of the reference stands once in the whole batch's loss: so it does not depend on ranks
        # or micro-batches.
        assert losses == pytest.approx(reference, abs=2e-5)
        torch.testing.assert_close(logits, masked_logits, atol=1e-5, rtol=1e-5)
        assert got.keys() == expected.keys()
        for name in got:
            torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-5, msg=name)


def taken_of_the_state(stage):
    """(numbers of the model, numbers that this rank takes of masters and moments)."""
    engine = tiny.engine(stage, "fp32", None)
    tiny.train(engine, range(1))
    taken = []

    def count(_name, _key, _shape, piece):
        taken.append(piece.values.numel())
        return piece

    state.read(engine.inner, transform=count)
    whole = sum(math.prod(shape) for shape in state.read(engine.inner).shapes.values())
    engine.close()
    return whole, sum(taken)


@pytest.mark.parametrize("stage", [0, 1])
def test_no_rank_takes_more_of_the_state_than_its_share(stage):
    (whole, first), (_, second) = ranks.run("test_engine:taken_of_the_state", ranks=2, stage=stage)
    assert first + second == 3 * whole
    assert max(first, second) < 0.6 * 3 * whole


@pytest.mark.parametrize(
    ("stage", "precision", "compiled"),
    [
        (0, "bf16", False), pytest.param(1, "bf16", True, marks=pytest.mark.thorough), (2, "bf16", False),
        pytest.param(3, "bf16", False, marks=pytest.mark.thorough),
        pytest.param(3, "fp32", False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_after_ten_draws_nothing_of_the_old_engines_is_alive(stage, precision, compiled):
    for alive, bytes_after, groups, searching, losses in ranks.run(
        "test_engine:many_draws", ranks=2, stage=stage, precision=precision, compiled=compiled
    ):
        assert not any(alive)
        assert len(set(groups)) == 1, groups
        assert max(bytes_after[1:-1]) - min(bytes_after[1:-1]) <= 4096, bytes_after
        assert not searching and all(loss < 10 for loss in losses)


@pytest.mark.parametrize(
    "stage", [pytest.param(2, marks=pytest.mark.thorough), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_compiled_model_trains_draws_and_is_evaluated_as_the_plain_one(stage):
    ((plain, compiled),) = ranks.run("test_engine:plain_and_compiled", ranks=1, stage=stage)
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "precision", "start"), [(3, "bf16", "rewind"), (2, "fp32", "rewind"), (1, "bf16", "keep")]
)
def test_a_second_draw_in_the_same_run_works(stage, precision, start):
    results = ranks.run("test_engine:two_draws", ranks=2, stage=stage, precision=precision, start=start)
    progress, heads, neurons, coefficients, at_draw, losses = results[0]
    first, second = progress.tickets
    assert (first.step, second.step) == (4, 8)
    assert heads == [len(x) for x in second.heads] == [2, 2]
    assert neurons == [len(x) for x in second.neurons]
    assert second.neuron_widths == tuple(map(len, first.neurons))
    assert coefficients == "none", "folded at the last draw"
    assert set(progress.heads[0]) <= set(first.heads[0])
    if start == "rewind":
        dense = tiny.seeded_model(tiny.config(coefficients="none"), seed=7)
        cuts = tiny.cuts(progress.heads, progress.neurons)
        for name, parameter in dense.named_parameters():
            assert torch.equal(at_draw[name]["master"], cut(parameter.detach(), cuts.get(name))), name
    assert all(r[5] == losses and r[0].tickets[1].sha256 == second.sha256 for r in results)
