import itertools

import pytest

from earlybert import schedule
from earlybert.config import SettingsError
from earlybert.schedule import PhaseSettings

FIRST = PhaseSettings(steps=100, sequence_length=128, batch=64, micro_batch=8, learning_rate=1e-3, warmup=0.1)
LONG = PhaseSettings(steps=50, sequence_length=512, batch=32, micro_batch=4, learning_rate=4e-4, warmup=0.2)


def test_the_rate_rises_linearly_to_its_peak_and_falls_to_its_end():
    rates = [FIRST.rate(step) for step in range(100)]
    assert [rates[0], rates[9], rates[10]] == pytest.approx([1e-4, 1e-3, 1e-3])
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(1e-3 / 90)


def test_polynomial_decay_is_the_power_of_what_is_left():
    phase = PhaseSettings(
        steps=100,
        sequence_length=128,
        batch=8,
        micro_batch=8,
        learning_rate=1.0,
        warmup=0.0,
        decay="polynomial",
    )
    assert phase.rate(75) == pytest.approx(0.25**0.5)


def test_a_step_knows_its_phase_and_its_place_in_the_data():
    phases = (FIRST, LONG, FIRST)
    assert schedule.at(99, phases=phases).phase == 0
    at = schedule.at(100, phases=phases)
    assert (at.phase, at.step_in_phase, at.samples_before) == (1, 0, 0)
    at = schedule.at(151, phases=phases)
    assert (at.phase, at.samples_before) == (
        2,
        100 * 64 + 64,
    )  # goes on where the first phase of that length stopped
    with pytest.raises(IndexError):
        schedule.at(250, phases=phases)


def test_a_batch_that_does_not_divide_is_refused_with_what_would():
    what = {"steps": 1, "sequence_length": 128, "learning_rate": 1e-3}
    with pytest.raises(SettingsError, match=r"micro_batch 48; use batch 4080 or 4128, or micro_batch 32"):
        PhaseSettings(batch=4096, micro_batch=48, **what)
    assert FIRST.accumulation(world_size=4) == 2 and FIRST.idle_share(world_size=4) == 0
    assert FIRST.accumulation(world_size=3) == 3 and FIRST.idle_share(world_size=3) == pytest.approx(1 / 9)
    with pytest.raises(SettingsError, match=r"gives 8 of them, too few for 9 ranks; use at most 8 ranks"):
        FIRST.accumulation(world_size=9)


def test_a_stable_rate_keeps_its_peak_and_then_falls_to_its_end():
    phase = PhaseSettings(
        steps=100, sequence_length=128, batch=8, micro_batch=8, learning_rate=1.0, warmup=0.1,
        decay="stable", decay_share=0.2, end_learning_rate=0.1,
    )  # fmt: skip
    rates = [phase.rate(step) for step in range(100)]
    assert rates[10:81] == [1.0] * 71
    assert all(a > b for a, b in itertools.pairwise(rates[80:]))
    assert rates[85] == pytest.approx(0.1 + 0.9 * (1 - 0.25**0.5))
    assert 0.1 < rates[-1] < 0.15
    what = {"steps": 100, "sequence_length": 128, "batch": 8, "micro_batch": 8, "learning_rate": 1.0}
    for warmup, share in ((0.8, 0.2), (0.9, 0.1), (0.7, 0.3)):  # 1 - 0.8 is a little less than 0.2
        PhaseSettings(**what, warmup=warmup, decay="stable", decay_share=share)
    with pytest.raises(SettingsError, match=r"power = -1.0: must be positive"):
        PhaseSettings(**what, decay="polynomial", power=-1.0)
    with pytest.raises(SettingsError, match=r"decay_share = 0.95: .* at most 0.9"):
        PhaseSettings(
            steps=100, sequence_length=128, batch=8, micro_batch=8, learning_rate=1.0, warmup=0.1,
            decay="stable", decay_share=0.95,
        )  # fmt: skip
