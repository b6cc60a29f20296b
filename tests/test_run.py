"""The run folder is one run's own; CPU processes share the cores that they are bound to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlybert import run
from earlybert.config import SettingsError


def test_processes_that_share_cores_share_the_threads_and_bound_ones_have_their_own():
    every = {0, 1, 2, 3}
    assert run.threads([every] * 2, every) == 2
    assert run.threads([{0, 1}, {2, 3}], {2, 3}) == 2
    assert run.threads([{0}, {1}], {1}) == 1
    with pytest.raises(SettingsError, match="3 processes on 2 CPU cores"):
        run.threads([{0, 1}] * 3, {0, 1})


@given(st.lists(st.sets(st.integers(0, 7), min_size=1), min_size=1, max_size=8))
def test_threads_are_at_least_one_and_at_most_the_cores(bound):
    cores = set().union(*bound)
    if len(bound) > len(cores):
        with pytest.raises(SettingsError):
            run.threads(bound, bound[0])
    else:
        assert all(1 <= run.threads(bound, own) <= len(own) for own in bound)


@pytest.mark.parametrize(
    "precision, fast, said", [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_a_processor_that_emulates_bf16_is_named_with_what_to_use(monkeypatch, caplog, precision, fast, said):
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    monkeypatch.setattr(run.torch, "set_num_threads", lambda number: None)
    run.check_cores(precision=precision)
    assert ("zero2_fp32.json" in caplog.text) is said
    assert run.fast_precision() == ("bf16" if fast else "fp32")
