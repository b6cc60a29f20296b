"""What counts as a bad number, and what the engine does with a gradient that is not finite."""

import math
from types import SimpleNamespace

import pytest
import torch

import ranks
import tiny
from earlybert import state
from earlybert.config import SettingsError
from earlybert.guard import GuardSettings, judge, suspects

SETTINGS = GuardSettings(window=10, spike=6)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_at_once(loss):
    assert judge(loss, [], settings=SETTINGS) == f"the loss is {loss}"


def test_a_spike_is_told_from_the_window_s_mean_and_spread():
    recent = [7.0, 7.2] * 5
    assert judge(7.1 + 6 * 0.1 - 0.01, recent, settings=SETTINGS) is None
    said = judge(7.1 + 6 * 0.1 + 0.1, recent, settings=SETTINGS)
    assert said is not None and "7.0 standard deviations above 7.100" in said
    assert judge(70.0, recent[:9], settings=SETTINGS) is None, "too few steps to judge by"
    assert judge(70.0, recent, settings=GuardSettings(window=10, spike=0)) is None
    assert judge(0.0, recent, settings=SETTINGS) is None, "better is never bad"


def test_a_plateau_has_a_least_spread():
    assert judge(7.0 + 6 * 0.07 - 0.01, [7.0] * 10, settings=SETTINGS) is None
    assert judge(7.0 + 6 * 0.07 + 0.01, [7.0] * 10, settings=SETTINGS) is not None


@pytest.mark.parametrize("changes", [{"spike": -1.0}, {"window": 1}, {"limit": 0}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(SettingsError):
        GuardSettings(**changes)


class Fake:
    """An engine whose loss is the mean of what its rows say, and samples that are their own documents."""

    device, module, sequence_length = "cpu", SimpleNamespace(training=True), 12

    def __init__(self):
        self.passes = 0

    def __call__(self, input_ids):
        self.passes += 1
        return SimpleNamespace(loss=input_ids.double().mean())

    def eval(self):
        pass

    def train(self, _training):
        pass

    def ids(self, places):
        return places, 0 * places

    def documents_of(self, sample):
        return [sample]


@pytest.mark.parametrize(
    ("values", "worst", "says", "passes"),
    [
        (
            {13: math.nan},
            math.inf,
            "at sequence length 12: sample 13 of epoch 0 (documents 13), loss nan",
            12,
        ),
        ({13: 90.0}, 4.0, "sample 13 of epoch 0 (documents 13), loss 90.000", 12),
        ({29: 90.0, **{4 * n: 17.0 for n in range(6)}}, 4.0, "sample 29 of epoch 0 (documents 29)", 24),
        ({n: math.nan for n in range(4, 8)}, math.inf, "sample 4 of epoch 0 (documents 4), loss nan; ", 12),
        ({}, 4.0, "no sample of the step is bad by itself", 12),
        ({n: math.inf for n in range(32)}, math.inf, "all 16 samples that were tried alone are bad", 24),
    ],
)
def test_only_micro_batches_that_are_bad_are_looked_into(values, worst, says, passes):
    losses = torch.tensor([[values.get(n, 1.0)] for n in range(32)])
    batches, engine, marks = [{"input_ids": part} for part in losses.split(4)], Fake(), []
    told = suspects(engine, batches, engine, first=0, micro_batches=8, worst=worst, mark=marks.append)
    assert says in told and engine.passes == passes == len(marks), told


def masters(engine):
    return {n: t["master"].clone() for n, t in state.whole_parameters(state.read(engine.inner))}


def skips(stage, precision):
    """Two good steps, one given up by `skip`, one whose gradient is not finite; then one more, and the same
    without the bad ones."""
    results = []
    for bad in (True, False):
        engine = tiny.engine(stage, precision, tiny.settings(minimum_step=20, latest_step=20))
        tiny.train(engine, range(2))
        if bad:
            before = masters(engine)
            give_up(engine, 7)
            poison(engine, 8)
            after = masters(engine)
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert (engine.global_steps, engine.skipped_steps) == (4, 2)
        losses = tiny.train(engine, range(2, 5))
        results.append((losses, masters(engine)))
        engine.close()
    return results


def give_up(engine, step):
    for micro in range(tiny.ACCUMULATION):
        loss = engine(**tiny.batch(step, micro)).loss
        engine.backward(loss)
        del loss
        if micro < tiny.ACCUMULATION - 1:
            engine.step()
    engine.skip()
    assert engine.grad_norm is None, "not that of the step before, which a resume does not know"


def poison(engine, step):
    for micro in range(tiny.ACCUMULATION):
        loss = engine(**tiny.batch(step, micro)).loss
        engine.backward(loss * math.inf)
        del loss
        engine.step()
    assert not math.isfinite(engine.grad_norm)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (0, "bf16"), (3, "bf16")]
)
def test_a_step_that_is_given_up_leaves_no_trace_but_its_count(stage, precision):
    for with_bad, without in ranks.run("test_guard:skips", ranks=2, stage=stage, precision=precision):
        assert with_bad[0] == without[0]
        assert all(torch.equal(with_bad[1][name], without[1][name]) for name in without[1])
