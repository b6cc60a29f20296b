"""How much goes: counts and budgets become ratios, and impossible ones are named."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlybert import baselines, targets
from earlybert.config import SettingsError
from earlybert.targets import Widths, Work
from earlybert.ticket import TicketSettings, keep

DENSE = Widths((12,) * 12, (3072,) * 12)
BASE = targets.bert_work(hidden=768, heads=12, vocabulary=30522, sequence_length=128, predicted=0.15)


def small(**changes):
    return TicketSettings(**{"neuron_multiple": 1, "minimum_neurons": 1, **changes})


@given(st.floats(0.3, 1.0), st.integers(1, 4), st.sampled_from([1, 64]))
def test_a_budget_is_met_and_as_nearly_as_the_widths_allow(budget, draws, multiple):
    settings = TicketSettings(budget=budget, draws=draws, neuron_multiple=multiple)
    now = DENSE
    for number in range(1, draws + 1):
        rules = targets.resolved(settings, now=now, dense=DENSE, draw=number, work=BASE)
        now = targets.kept_widths(rules, now)
    share = BASE.of(now.heads, now.neurons) / BASE.of(DENSE.heads, DENSE.neurons)
    step = (12 * BASE.head + 12 * multiple * BASE.neuron) / BASE.of(DENSE.heads, DENSE.neurons)
    assert budget - step <= share <= budget


@given(st.integers(1, 12), st.integers(1, 3072), st.integers(1, 4))
def test_counts_are_exact_after_the_last_draw(heads, neurons, draws):
    settings = small(heads_kept=heads, neurons_kept=neurons, neuron_scope="layer", draws=draws)
    now = DENSE
    for number in range(1, draws + 1):
        rules = targets.resolved(settings, now=now, dense=DENSE, draw=number, work=BASE)
        now = targets.kept_widths(rules, now)
    assert now == Widths((heads,) * 12, (neurons,) * 12)


@given(st.floats(0, 0.9), st.floats(0, 0.9), st.integers(0, 50))
def test_the_planned_widths_are_those_of_a_draw(heads, neurons, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    settings = replace(small(), head_ratio=heads, neuron_ratio=neurons)
    widths = Widths((6,) * 3, (40,) * 3)
    planned = targets.kept_widths(settings, widths)
    drawn = keep(
        [torch.rand(40, generator=generator) for _ in range(3)], ratio=neurons, scope="global", minimum=1,
        multiple=1,
    )  # fmt: skip
    assert sum(planned.neurons) == sum(map(len, drawn))
    per_layer = keep(
        [torch.rand(6, generator=generator)] * 3, ratio=heads, scope="layer", minimum=1, multiple=1
    )
    assert planned.heads == tuple(map(len, per_layer))


def test_the_papers_ticket_has_the_papers_share_of_the_work():
    encoder = Work(head=8 * 768 * 64, neuron=4 * 768)
    kept = targets.kept_widths(TicketSettings(), DENSE)
    share = encoder.of(kept.heads, kept.neurons) / encoder.of(DENSE.heads, DENSE.neurons)
    assert share == pytest.approx(0.69, abs=0.005), "docs/method.md section 3"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (small(budget=0.05), "the least that heads and neurons can reach is 0"),
        (small(heads_kept=13), "there are 12 heads in a layer; use at most 12"),
        (small(neurons_kept=99999), "there are 36864 neurons in all layers"),
        (small(kind="layerdrop", layer_ratio=0.02), "removes none of 12 layers"),
        (small(head_ratio=0.99), "would remove all 12 heads"),
        (small(kind="layerdrop", layer_ratio=0.5), None),
    ],
)
def test_what_cannot_be_reached_is_named_at_the_start(settings, says):
    if says is None:
        targets.check(settings, dense=DENSE, work=BASE)
        return
    with pytest.raises(SettingsError, match=says):
        targets.check(settings, dense=DENSE, work=BASE)


def test_a_count_a_layer_is_refused_where_layers_differ_and_one_over_all_is_kept():
    uneven = Widths((2, 8, 8, 2), (10, 40, 40, 10))
    with pytest.raises(
        SettingsError, match="heads_kept = 4 in each layer: the layers have 2 to 8 heads; say"
    ):
        targets.check(small(heads_kept=4), dense=uneven, work=BASE)
    rules = small(heads_kept=10, head_scope="global", neuron_ratio=0.0)
    resolved = targets.resolved(rules, now=uneven, dense=uneven, draw=1, work=BASE)
    assert resolved.head_ratio == pytest.approx(0.5)


@pytest.mark.parametrize("layers", range(2, 30))
@pytest.mark.parametrize("ratio", [0.1, 1 / 3, 0.5])
def test_layerdrop_never_drops_the_first_layer(layers, ratio):
    gone = baselines.dropped_layers(layers, ratio=ratio)
    assert 0 not in gone and len(set(gone)) == len(gone) == min(round(ratio * layers), layers // 2)
    assert all(0 < layer < layers for layer in gone)


def test_a_model_of_one_layer_has_none_to_drop():
    with pytest.raises(SettingsError, match="keeps the first layer, and there is no other"):
        targets.check(small(kind="layerdrop"), dense=Widths((4,), (48,)), work=BASE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget": 0.5, "heads_kept": 3}, "both set"),
        ({"budget": 1.5}, "in \\(0, 1\\]"),
        ({"heads_kept": 0}, "at least 1"),
        ({"start": "rewind", "moments": "keep"}, "do not belong"),
        ({"rewind_step": 5}, 'needs ticket.start = "rewind"'),
        ({"start": "rewind", "rewind_step": 300}, "rewind to a step before it"),
        ({"damping": 0.5, "kind": "random"}, "needs a search"),
        ({"kind": "layerdrop", "draws": 2}, "in one draw"),
        ({"kind": "layerdrop", "heads_kept": 3}, "heads_kept = 3 says nothing of layers"),
        ({"kind": "layerdrop", "budget": 0.9}, "set ticket.layer_ratio instead"),
        ({"layer_ratio": 0.7}, "in \\(0, 0.5\\]"),
        ({"rewarmup_steps": -1}, "not be negative"),
    ],
)
def test_contradictions_are_refused(changes, says):
    with pytest.raises(SettingsError, match=says):
        TicketSettings(**changes)


def test_a_shape_of_each_layer_is_kept_exactly_whatever_the_ratios_say():
    settings = TicketSettings(heads_per_layer=(3, 1), neurons_per_layer=(10, 40), draws=1)
    dense = Widths((4, 4), (48, 48))
    targets.check(settings, dense=dense, work=BASE)
    assert targets.kept_widths(settings, dense) == Widths((3, 1), (10, 40))
    scores = [torch.rand(width, generator=torch.Generator().manual_seed(width)) for width in (4, 4)]
    kept = keep(scores, ratio=0.5, scope="layer", minimum=1, multiple=1, counts=settings.heads_per_layer)
    assert [len(layer) for layer in kept] == [3, 1]
    assert set(kept[1]) == {int(scores[1].argmax())}


def test_a_shape_that_does_not_fit_or_has_a_rival_is_refused():
    with pytest.raises(SettingsError, match=r"ticket.heads_per_layer = \[5, 1\]: need 2 numbers from 1 to 4"):
        targets.check(TicketSettings(heads_per_layer=(5, 1)), dense=Widths((4, 4), (48, 48)), work=BASE)
    with pytest.raises(SettingsError, match="neurons_per_layer and ticket.budget are both set"):
        TicketSettings(neurons_per_layer=(5, 1), budget=0.5)
    with pytest.raises(SettingsError, match="heads_per_layer is the shape of one draw"):
        TicketSettings(heads_per_layer=(5, 1), draws=2)
