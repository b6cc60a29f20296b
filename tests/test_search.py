"""The detector on trajectories of coefficients: settling, never settling, breaking down, over a resume."""

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlybert.config import EarlyBertError
from earlybert.search import Masks, Search
from earlybert.ticket import Ticket, TicketSettings, distance, keep, masks

HEADS, NEURONS = [6, 6], [50, 50]


def coefficients(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in sizes]


def settings(**changes):
    values = {"every": 10, "minimum_step": 60, "latest_step": 500, "neuron_multiple": 1, "minimum_neurons": 1}
    return TicketSettings(**{**values, **changes})


def walk(seeds, rules):
    """Observe (seed of the heads, seed of the neurons) at steps 10, 20, ...; stop at a verdict. The same seed
    gives the same mask, another one an independent mask."""
    search = Search()
    for place, (heads, neurons) in enumerate(seeds, start=1):
        search = search.observe(
            10 * place, coefficients(HEADS, heads), coefficients(NEURONS, neurons), settings=rules
        )
        if search.verdict is not None:
            break
        search = Search.from_json(json.loads(json.dumps(search.to_json())))  # every look is after a resume
    return search


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 99), st.floats(0, 0.9)), min_size=2, max_size=4),
)
def test_packed_distances_are_those_of_the_index_lists(sizes, looks):
    kept = [keep(coefficients(sizes, s), ratio=r, scope="global", minimum=1, multiple=1) for s, r in looks]
    family = Masks()
    for indices in kept:
        family = family.add(indices, widths=sizes)
    assert [family.kept(look) for look in range(len(kept))] == kept
    reference = np.array([[distance(a, b, widths=sizes) for b in kept] for a in kept])
    np.testing.assert_allclose(family.matrix(), reference, atol=1e-12)


def test_both_families_must_have_settled():
    assert walk([(1, 2)] * 9, settings()).verdict.startswith("settled")
    assert walk([(1, 2)] * 9, settings()).steps[-1] == 60, "not before the minimum"
    restless = walk([(1, place) for place in range(30)], settings())
    assert restless.verdict is None and restless.settled == (50, None)
    late = walk([(1, place) for place in range(10)] + [(1, 99)] * 9, settings())
    assert late.steps[-1] == 150 and late.settled == (50, 150)


def test_a_family_that_falls_apart_is_drawn_as_it_was():
    seeds = [(place, 2) for place in range(12)] + [(20 + place, 40 + place) for place in range(9)]
    found = walk(seeds, settings())
    assert found.steps[-1] == 130 and found.broken == ("neurons",), "at the first look that shows it"
    assert "the mask of the neurons, settled until step 120, broke down (distance " in found.verdict
    ticket = found.ticket(settings=settings())
    heads, neurons = masks(coefficients(HEADS, 20), coefficients(NEURONS, 2), settings=settings())
    assert ticket.neurons == neurons, "the last settled mask, not that of the drawing step"
    assert ticket.heads == heads and ticket.step == 130
    with pytest.raises(EarlyBertError, match=r"broke down.*ticket\.latest_step = 120"):
        walk(seeds, settings(on_breakdown="stop"))
    early = [(place, 2) for place in range(5)] + [(place, 40 + place) for place in range(9)]
    assert walk(early, settings()).broken == (), "what was settled before the minimum step was chance"


def test_both_families_that_fall_apart_at_one_look_are_drawn_as_they_were():
    seeds = [(1, place) for place in range(7)] + [(1, 7)] * 9 + [(20, 40)]
    rules, search = settings(minimum_step=10), Search()
    for place, (heads, neurons) in enumerate(seeds, start=1):
        seen = [coefficients(HEADS, heads), coefficients(NEURONS, neurons)]
        search = search.observe(10 * place, *seen, settings=rules)
    assert search.broken == ("heads", "neurons")
    ticket = search.ticket(settings=rules)
    settled = masks(coefficients(HEADS, 1), coefficients(NEURONS, 7), settings=rules)
    assert (ticket.heads, ticket.neurons) == settled
    assert ticket.reason.count("broke down") == 2 and "with the masks from before" in ticket.reason
    told = search.to_json()
    assert Search.from_json(told) == search
    for before, now in (("neurons", ("neurons",)), (None, ())):
        assert Search.from_json({**told, "version": 1, "broken": before}).broken == now


def test_where_to_draw_earlier_is_told_in_the_steps_of_its_own_search():
    search, rules = Search(began=1000), settings(on_breakdown="stop")
    with pytest.raises(EarlyBertError, match=r"^step 1130: .*until step 1120, .*ticket\.latest_step = 120\)"):
        for place in range(12):
            search = search.observe(
                1010 + 10 * place, coefficients(HEADS, place), coefficients(NEURONS, 2), settings=rules
            )
        search.observe(1130, coefficients(HEADS, 20), coefficients(NEURONS, 40), settings=rules)


def test_at_the_latest_step_it_is_drawn_in_any_case():
    assert Search().due(95, settings=settings(latest_step=95)), "off the grid, and due"
    rules = settings(latest_step=90)
    found = walk([(place, 50 + place) for place in range(50)], rules)
    assert found.steps[-1] == 90 and "latest step 90" in found.verdict
    assert (
        found.ticket(settings=rules).heads
        == masks(coefficients(HEADS, 8), coefficients(NEURONS, 58), settings=rules)[0]
    )


def test_coefficients_that_have_not_moved_are_not_settled():
    search = Search()
    for step in range(10, 150, 10):
        search = search.observe(step, [torch.ones(6)], [torch.ones(50)], settings=settings())
    assert search.verdict is None and search.settled == (None, None)


def test_a_second_search_counts_from_the_draw_before():
    rules = TicketSettings(every=10, minimum_step=5, latest_step=25)
    assert not Search(began=100).due(100, settings=rules)
    assert Search(began=100).due(110, settings=rules) and Search(began=100).due(125, settings=rules)
    assert not Search().due(24, settings=rules)


def test_search_and_ticket_survive_json_and_another_format_is_refused():
    search = walk([(1, 2)] * 9, settings())
    values = json.loads(json.dumps(search.to_json()))
    assert Search.from_json(values) == search
    ticket = search.ticket(settings=settings())
    again = Ticket.from_json(json.loads(json.dumps(ticket.to_json())), where="x")
    assert again == ticket and Search.from_json(again.search) == search
    with pytest.raises(EarlyBertError, match="format 0"):
        Search.from_json({**values, "version": 0})


def test_a_look_at_bert_large_after_400_looks_takes_a_twentieth_of_a_second():
    heads, neurons = coefficients([16] * 24, 1), coefficients([4096] * 24, 2)
    search = Search().observe(1, heads, neurons, settings=TicketSettings())
    family, count = search.neurons, 400
    search = Search(
        steps=(1,) * count,
        heads=Masks(search.heads.widths, search.heads.packed * count),
        neurons=Masks(family.widths, family.packed * count),
        distances=search.distances * count,
    )
    times = []
    for _ in range(5):
        before = time.process_time()
        search.observe(2, heads, neurons, settings=TicketSettings())
        times.append(time.process_time() - before)
    assert min(times) < 0.05, times
    assert len(json.dumps(search.neurons.to_json())) / count < 20_000, "bytes a look"
