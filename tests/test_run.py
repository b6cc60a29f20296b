"""The run folder is one run's own; CPU processes share the cores that they are bound to."""

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ranks
from corpora import random_documents, write_corpus
from earlybert import assembly, dist, run, watch
from earlybert.assembly import Assembly
from earlybert.config import EarlyBertError, SettingsError
from earlybert.recipes import Finetuning
from earlybert.schedule import PhaseSettings


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


def started_unlike(changes, mechanics):
    settings = Finetuning(
        **{"name": "a", "model": "m", "deepspeed": "d", "seeds": (1, 2), **(changes if dist.rank() else {})}
    )
    try:
        run.check_alike(settings, {"zero_optimization": {"stage": 1}, **(mechanics if dist.rank() else {})})
    except EarlyBertError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("changes", "mechanics", "says"),
    [
        ({"seeds": (1, 3)}, {}, "has seeds.1 = 3, rank 0 has 2"),
        (
            {},
            {"zero_optimization": {"stage": 2}},
            "has deepspeed.json.zero_optimization.stage = 2, rank 0 has 1",
        ),
        ({}, {"bf16": {"enabled": True}}, "has deepspeed.json.bf16.enabled = True, rank 0 has None"),
        ({"model": "/other/m", "data": "/other/glue", "runs": "/other/runs"}, {}, None),
    ],
)
def test_ranks_that_were_started_with_other_settings_are_all_told_which(changes, mechanics, says):
    found = ranks.run("test_run:started_unlike", ranks=2, changes=changes, mechanics=mechanics)
    assert found[0] == found[1]
    assert found == [None, None] if says is None else found[0].startswith("rank 1 on ") and says in found[0]


def claims(folders):
    run._LOOKS = 2
    settings = Finetuning(name="a", model="m", deepspeed="d", runs=folders[dist.rank()])
    try:
        claim = run.claim(settings, corpus="c", where="here")
    except EarlyBertError as error:
        return str(error)
    dist.barrier()
    claim.release()
    return None


def test_a_run_folder_that_a_rank_does_not_see_is_refused_on_all_of_them_and_let_go(tmp_path):
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    found = ranks.run("test_run:claims", ranks=2, folders=[one, other])
    assert found[0] == found[1] and found[0].startswith("rank 1 on ")
    assert "does not see the run folder" in found[0] and "runs=" in found[0]
    assert not (tmp_path / "one" / "a").exists(), "a refused start leaves no run folder"
    assert ranks.run("test_run:claims", ranks=2, folders=[one, one]) == [None, None]


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ("taken", "a exists and is not a run folder"), ("taken/a", "folder cannot be used"),
        ("x" * 300, "folder cannot be used"), ("odd", "folder cannot be used"), ("list", "no JSON object"),
    ],
)  # fmt: skip
def test_a_run_folder_that_cannot_be_made_is_told_on_all_ranks(tmp_path, runs, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").write_text("a file")
    (tmp_path / "odd" / "a" / "environment.json").mkdir(parents=True)
    (tmp_path / "list" / "a").mkdir(parents=True)
    (tmp_path / "list" / "a" / "environment.json").write_text("[]")
    told = ranks.run("test_run:claims", ranks=2, folders=[str(tmp_path / runs)] * 2)
    assert told[0] == told[1] and says in told[0]


def corpora(folders):
    try:
        return len(assembly._opened(folders[dist.rank()]))
    except EarlyBertError as error:
        return str(error)


def test_a_corpus_that_one_rank_cannot_open_is_told_on_all(tmp_path):
    write_corpus(tmp_path / "there", random_documents(5, longest=20))
    there, absent = str(tmp_path / "there"), str(tmp_path / "absent")
    told = ranks.run("test_run:corpora", ranks=2, folders=[there, absent])
    assert told[0] == told[1] and absent in told[0]
    assert ranks.run("test_run:corpora", ranks=2, folders=[there, there]) == [5, 5]


def slow_end(folder):
    """Rank 0 has something to write after its last mark, which the others do not wait for."""
    watch._WAITS, watch._SILENT, watch._PUBLISHED_EVERY = 2.0, 3.0, 0.1
    own = watch.Watch(Path(folder), seconds=60.0)
    with watch.explained(own):
        own.mark("the report")
        if dist.rank() == 0:
            time.sleep(9)
    dist.barrier()
    return "done"


def test_a_rank_that_has_come_to_its_end_is_not_taken_for_one_that_is_lost(tmp_path):
    assert ranks.run("test_run:slow_end", ranks=2, folder=str(tmp_path)) == ["done", "done"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(None, "it stopped"), (KeyError("x"), "KeyError: 'x'"), (KeyboardInterrupt(), "KeyboardInterrupt: ")],
)
def test_a_rank_that_ends_by_a_bug_does_not_say_that_it_came_to_its_end(error, said):
    left = []
    with (
        contextlib.suppress(KeyError, KeyboardInterrupt),
        watch.explained(SimpleNamespace(leave=left.append)),
    ):
        if error is not None:
            raise error
    assert left == [said]


@pytest.mark.parametrize(
    ("stage", "precision", "asked", "rows", "warned"),
    [(1, "bf16", None, 64, True), (1, "bf16", None, 62, False), (2, "bf16", None, 64, False),
     (1, "fp32", None, 64, False), (1, "bf16", "fp32", 64, False)],
)  # fmt: skip
def test_many_additions_in_bf16_are_warned_of(caplog, stage, precision, asked, rows, warned):
    phases = [PhaseSettings(steps=1, sequence_length=8, batch=rows, micro_batch=2, learning_rate=1e-3)]
    parts = SimpleNamespace(
        mechanics={"data_types": {"grad_accum_dtype": asked}}, stage=stage, precision=precision,
        experiment=SimpleNamespace(phases=phases),
    )  # fmt: skip
    Assembly._warn_of_rounding(parts)
    assert ("32 micro-batches in bf16" in caplog.text) is warned
