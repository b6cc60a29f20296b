import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlybert.config import EarlyBertError, SettingsError
from earlybert.ticket import Ticket, TicketSettings, distance, draw, keep

widths = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def coefficients(sizes, seed, *, ties=False):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(n, generator=generator) for n in sizes]
    return [v.mul(2).round() for v in values] if ties else values


@given(widths, st.integers(0, 99), st.floats(0, 0.95), st.booleans())
def test_the_global_count_is_exact_and_every_layer_keeps_its_minimum(sizes, seed, ratio, ties):
    kept = keep(coefficients(sizes, seed, ties=ties), ratio=ratio, scope="global", minimum=1, multiple=1)
    assert all(len(layer) >= 1 for layer in kept)
    assert sum(map(len, kept)) == max(len(sizes), sum(sizes) - round(ratio * sum(sizes)))


@given(widths, st.integers(0, 99), st.floats(0, 0.95), st.booleans())
def test_the_layer_count_is_exact(sizes, seed, ratio, ties):
    kept = keep(coefficients(sizes, seed, ties=ties), ratio=ratio, scope="layer", minimum=1, multiple=1)
    assert [len(layer) for layer in kept] == [max(1, n - round(ratio * n)) for n in sizes]


@given(widths, st.integers(0, 99), st.floats(0.05, 0.9))
def test_global_masks_equal_a_brute_force_reference(sizes, seed, ratio):
    values = coefficients(sizes, seed, ties=True)
    kept = keep(values, ratio=ratio, scope="global", minimum=1, multiple=1)
    first = {
        (layer, int(v.abs().sort(descending=True, stable=True).indices[0])) for layer, v in enumerate(values)
    }
    rest = [(-abs(float(c)), layer, i) for layer, v in enumerate(values) for i, c in enumerate(v)]
    rest = sorted(entry for entry in rest if entry[1:] not in first)
    total = sum(sizes) - round(ratio * sum(sizes))
    chosen = first | {entry[1:] for entry in rest[: max(0, total - len(first))]}
    assert {(layer, i) for layer, indices in enumerate(kept) for i in indices} == chosen


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(0, 99), st.floats(0, 0.8))
def test_widths_are_multiples_and_the_total_is_near(blocks, seed, ratio):
    sizes = [8 * n for n in blocks]
    for scope in ("layer", "global"):
        kept = keep(coefficients(sizes, seed), ratio=ratio, scope=scope, minimum=8, multiple=8)
        assert all(len(layer) % 8 == 0 and len(layer) >= 8 for layer in kept)
        want = max(8 * len(sizes), sum(sizes) - round(ratio * sum(sizes)))
        slack = 8 * len(sizes) if scope == "layer" else 8
        assert abs(sum(map(len, kept)) - want) <= slack


def test_the_sign_of_a_coefficient_does_not_matter():
    values = [torch.tensor([-3.0, 0.1, 2.0, -0.2])]
    assert keep(values, ratio=0.5, scope="layer", minimum=1, multiple=1) == ((0, 2),)


def test_ties_keep_the_lower_index():
    assert keep([torch.ones(6)], ratio=0.5, scope="layer", minimum=1, multiple=1) == ((0, 1, 2),)


def test_independent_masks_are_at_distance_one_and_equal_masks_at_zero():
    sizes = [3000] * 4
    a, b = (keep(coefficients(sizes, s), ratio=0.3, scope="global", minimum=1, multiple=1) for s in (1, 2))
    assert distance(a, b, widths=sizes) == pytest.approx(1, abs=0.05)
    assert distance(a, a, widths=sizes) == 0


def test_a_ticket_whose_content_was_changed_is_refused(tmp_path):
    ticket = draw([torch.rand(4)], [torch.rand(90)], settings=TicketSettings(), step=3)
    ticket.save(tmp_path / "ticket.json")
    assert Ticket.load(tmp_path / "ticket.json") == ticket
    values = json.loads((tmp_path / "ticket.json").read_text())
    values["heads"][0] = values["heads"][0][1:]
    (tmp_path / "ticket.json").write_text(json.dumps(values))
    with pytest.raises(EarlyBertError, match="sha256"):
        Ticket.load(tmp_path / "ticket.json")


@pytest.mark.parametrize(
    ("changes", "heads", "neurons", "names"),
    [
        ({"head_ratio": 0.9}, [2, 2], [64, 64], "head_ratio = 0.9 would remove all 2 heads of layer 0"),
        ({"neuron_ratio": 0.99, "neuron_scope": "layer"}, [4], [20], "would remove all 20 neurons"),
        ({"neuron_ratio": 0.9}, [4, 4], [256, 256], "ticket.minimum_neurons"),
    ],
)
def test_a_draw_that_would_empty_a_layer_is_refused_at_the_start(changes, heads, neurons, names):
    with pytest.raises(SettingsError, match=names):
        TicketSettings(**changes).check_shape(heads, neurons)
