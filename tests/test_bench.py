"""`bench.py ticket`, `train` and `latency` at a shape of no size: what is timed is what the table says."""

import importlib
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import ranks
from earlybert.config import EarlyBertError, SettingsError
from earlybert.export import export
from exports import environment, trained, write_tokenizer

SCRIPTS = Path(__file__).parent.parent / "scripts"
TINY = {"layers": 2, "hidden": 32, "heads": 4}


def alone(bench, **settings):
    """The figures of a benchmark that takes its steps in this very process: not in that of the tests."""
    sys.path.insert(0, str(SCRIPTS))
    from benchmarks import engines

    engines.SHAPES["tiny"] = TINY
    given = Namespace(ranks=1, **settings)
    return importlib.import_module(f"benchmarks.{bench}").measure(given, Path())


def test_the_step_of_the_search_and_of_the_ticket_are_held_against_the_dense_one(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import engines, ticket

    (figures,) = ranks.run(
        "test_bench:alone", ranks=1, bench="ticket", shape="tiny", length=16, batch=2, stage=1,
        steps=6, rounds=2, compile=False, dropout=0.1, head_ratio=0.5, neuron_ratio=0.3,
    )  # fmt: skip
    heads, neurons = figures["widths"]
    assert sum(heads) < 8 and sum(neurons) < 256, "drawn at its first step"
    dense, small = (
        2 * 2 * (32 * 4 * h * 8 + 2 * 16 * h * 8 + 2 * 32 * n)
        for h, n in (([4, 4], [128, 128]), (heads, neurons))
        for h, n in [(sum(h) / 2, sum(n) / 2)]
    )
    assert 0 < small < dense
    head = 2 * 32 * (engines.VOCABULARY + 32) * (2 / 16)
    assert figures["flops_ratio"] == pytest.approx((small + head) / (dense + head), rel=1e-6)
    middle = figures["seconds"]
    look = (middle["look"] - middle["search"]) / figures["every"]
    assert figures["search_ratio"] == pytest.approx((middle["search"] + look) / middle["dense"])
    assert figures["ticket_ratio"] == pytest.approx(middle["shrunken"] / middle["dense"])
    ticket.tell({**figures, "shape": "tiny", "stage": 1, "ranks": 1, "device": "here"})
    assert "| shrunken |" in capsys.readouterr().out


def test_a_step_is_taken_apart_and_held_against_a_matrix_product(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import engines, step, train

    monkeypatch.setitem(engines.SHAPES, "tiny", TINY)
    profile = tmp_path / "profile.txt"
    (figures,) = ranks.run(
        "test_bench:alone", ranks=1, bench="step", shape="tiny", kind="shrunken", length=32, batch=2, stage=1,
        steps=3, compile=False, dropout=0.0, head_ratio=0.5, neuron_ratio=0.3, document=8, profile=profile,
    )  # fmt: skip
    heads, neurons = figures["widths"]
    assert sum(heads) == 4 and sum(neurons) < 256, "drawn before the first step that counts"
    assert len(figures["all"]) == 3 and figures["tokens_per_second"] == 64 / figures["seconds"]
    needed = train.flops_per_token("tiny", 32, widths=[heads, neurons])
    assert figures["flops"] == pytest.approx(figures["tokens_per_second"] * needed)
    assert figures["ceiling_flops"] > 1e7 and all(0 < s < 10 for s in figures["parts"].values())
    assert "aten::addmm" in profile.read_text()
    step.tell({**figures, "shape": "tiny", "stage": 1, "ranks": 1, "device": "here"})
    assert "tiny, shrunken, 2 rows of 32 tokens in documents of 8" in capsys.readouterr().out


@pytest.mark.thorough
def test_whole_programs_are_timed_in_turn_also_on_one_rank(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import engines, train

    monkeypatch.setitem(engines.SHAPES, "tiny", TINY)
    arguments = Namespace(
        shape="tiny", length=16, batch=2, ranks=1, steps=5, rounds=1, document=40,
        override=["model.dropout=0"], kind=["ours-boundaries", "deepspeed"],
    )  # fmt: skip
    figures = train.measure(arguments)
    assert list(figures["kinds"]) == arguments.kind and figures["ceiling_flops"] > 1e8
    needed = train.flops_per_token("tiny", 16)
    for row in figures["kinds"].values():
        assert row["utilisation"] == pytest.approx(
            row["tokens_per_second"] * needed / figures["ceiling_flops"]
        )
        assert row["tokens_per_second"] > 10 and row["peak_mb"] > 50
    assert 0 < figures["kinds"]["ours-boundaries"]["waiting"] < 1
    train.tell(figures)
    assert "| ours-boundaries |" in capsys.readouterr().out


def test_a_kind_of_program_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import train

    with pytest.raises(SettingsError, match="--kind mine: choose among ours, "):
        train.measure(Namespace(kind=["mine"]))


@pytest.fixture
def latency(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import engines, latency

    monkeypatch.setitem(engines.SHAPES, "tiny", TINY)
    return latency


def asked(**changes):
    told = {
        "export": None, "shape": "tiny", "head_ratio": 0.25, "neuron_ratio": 0.5, "batch": [1, 2],
        "length": [8, 16], "rounds": 3, "seconds": 60.0, "runtime": ["pytorch"], "threads": None,
    }  # fmt: skip
    return Namespace(**{**told, **changes})


def test_the_ticket_s_pass_is_held_against_the_dense_one_and_what_its_flops_promise(latency, capsys):
    figures = latency.measure(asked())
    dense, compact = figures["models"].values()
    assert (dense["heads"], dense["neurons"]) == ([4, 4], [128, 128])
    assert (compact["heads"], compact["neurons"]) == ([3, 3], [64, 64])
    sizes = [(row["batch"], row["length"]) for row in figures["rows"]]
    assert sizes == [(1, 8), (2, 8), (1, 16), (2, 16)]
    for row in figures["rows"]:
        assert list(row["milliseconds"]) == ["dense", "compact"]
        for told in row["milliseconds"].values():
            assert 0 < told["low"] <= told["median"] <= told["high"] and told["rounds"] == 3
    latency.tell(figures)
    lines = capsys.readouterr().out.splitlines()
    head, neuron = 2 * 4 * 32 * 8 + 2 * 2 * 16 * 8, 2 * 2 * 32
    promised = (6 * head + 128 * neuron) / (8 * head + 256 * neuron)
    assert lines[-1].startswith("| cpu, pytorch | 2 | 16 | compact | ")
    assert lines[-1].endswith(f" | {promised:.3f} |")
    assert lines[-2].endswith(" | 1.000 | 1.000 |")


def test_passes_take_turns_and_five_of_each_are_timed_however_long_they_take(latency):
    order = []
    passes = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert {name: len(times) for name, times in latency.in_turn(passes, rounds=3, seconds=60).items()} == {
        "a": 3, "b": 3,
    }  # fmt: skip
    assert "".join(order) == "abababab", "a round that warms up, then the three"
    times = latency.in_turn(passes, rounds=99, seconds=0)
    assert [len(taken) for taken in times.values()] == [5, 5]
    assert latency.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "rounds": 3}
    assert latency.spread([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0, "rounds": 1}


@pytest.fixture
def both(tmp_path, monkeypatch):
    """A dense and a compact export of the same model."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    source = trained(write_tokenizer(tmp_path / "tokenizer"))
    for form in ("dense", "compact"):
        export(source, to=tmp_path / form, form=form)
    return [tmp_path / "dense", tmp_path / "compact"]


def test_exports_are_timed_by_their_names_in_their_true_shapes(latency, both):
    figures = latency.measure(asked(export=both, rounds=2))
    assert [sum(model["heads"]) for model in figures["models"].values()] == [8, 4]
    models, ids = latency.opened(both), torch.arange(10)[None]
    dense, compact = (latency.in_pytorch(model, device="cpu")(ids)() for model in models.values())
    torch.testing.assert_close(dense, compact, rtol=1e-4, atol=1e-4)
    assert list(latency.opened([both[0], both[0].parent / "." / "dense"])) == ["dense", str(both[0])]


@pytest.mark.slow
def test_onnx_runtime_computes_what_pytorch_does(latency, both, tmp_path):
    for number, model in enumerate(latency.opened(both).values()):
        bind = latency.in_onnxruntime(model, tmp_path / f"{number}.onnx")
        for shape in ((1, 10), (3, 32)):
            ids = torch.randint(18, shape)
            expected = latency.in_pytorch(model, device="cpu")(ids)()
            torch.testing.assert_close(torch.as_tensor(bind(ids)()), expected, rtol=1e-4, atol=1e-4)
    figures = latency.measure(asked(export=both, rounds=2, runtime=None, batch=[1]))
    assert [row["runtime"] for row in figures["rows"]] == ["pytorch"] * 2 + ["onnxruntime"] * 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"export": [Path("nowhere")]}, "--export nowhere: no export is there"),
        ({"batch": [1, 0]}, "--batch 0: choose at least 1"),
        ({"threads": -1}, "--threads -1: choose at least 1"),
        ({"runtime": ["onnxruntime"]}, "--runtime onnxruntime needs onnx: pip install onnx onnxscript"),
        ({"head_ratio": 1.5}, "head_ratio = 1.5: must lie in"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_words(latency, monkeypatch, changes, says):
    monkeypatch.setattr(latency.machine, "version", lambda _: None)
    with pytest.raises(SettingsError, match=says):
        latency.measure(asked(**changes))


def test_rows_that_are_longer_than_the_positions_and_folders_without_a_model_are_refused(latency, both):
    with pytest.raises(SettingsError, match="--length 64: dense has 32 positions"):
        latency.measure(asked(export=both, length=[8, 64]))
    (both[1] / "model.safetensors").write_bytes(b"")
    with pytest.raises(SettingsError, match="compact: its encoder cannot be read .* give what"):
        latency.measure(asked(export=both))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["step", "--ranks", "0"], "--ranks 0: give a number from 1"),
        (["latency", "--batch", "8", "0"], "--batch 0: give a number from 1"),
        (["data", "nothere.bz2", "nothere.txt"], "nothere.bz2: no such file; give a dump"),
    ],
)
def test_a_command_that_could_measure_nothing_is_refused(monkeypatch, words, says):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr("sys.argv", ["bench.py", *words])
    with pytest.raises(EarlyBertError, match=says):
        runpy.run_path(str(SCRIPTS / "bench.py"))["main"]()
