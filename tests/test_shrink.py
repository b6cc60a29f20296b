"""The index map: pure, the same for weights and moments, and exact for any piece of a flattened parameter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from earlybert.adapters import EarlyBertAdapter, bert_layers
from earlybert.model import EarlyBertForPreTraining
from earlybert.shrink import (
    Cut,
    Piece,
    compose,
    cut,
    cut_piece,
    cut_shape,
    fold_map,
    folded,
    spread,
)

HEADS = ((0, 2, 3), (1,))
NEURONS = (tuple(range(0, 48, 3)), (5, 47))


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**tiny.batch(0, 0)).prediction_logits


def reshaped(config, coefficients):
    widths = {"heads": list(map(len, HEADS)), "neurons": list(map(len, NEURONS))}
    return EarlyBertAdapter(EarlyBertForPreTraining).reshaped(config, **widths, coefficients=coefficients)


def small_of(dense, coefficients):
    """The small model with the dense model's weights cut to the ticket."""
    small = EarlyBertForPreTraining(reshaped(dense.config, coefficients)).eval()
    cuts = tiny.cuts(HEADS, NEURONS)
    weights = {name: cut(value, cuts.get(name)) for name, value in dense.state_dict().items()}
    return small, weights


@st.composite
def cases(draw):
    """A shape of one or two dimensions, indices to keep along one of them, and two edges of its elements."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=2))
    dim = draw(st.integers(0, len(shape) - 1))
    kept = draw(st.sets(st.integers(0, shape[dim] - 1)))
    count = torch.Size(shape).numel()
    first, last = sorted(draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    return shape, Cut(dim, torch.tensor(sorted(kept), dtype=torch.int64), shape[dim]), first, last


@given(cases())
@settings(max_examples=300, deadline=None)
def test_a_rank_cuts_its_piece_without_the_other_ranks_elements(case):
    shape, by, first, last = case
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
    small = cut(whole.view(shape), by)
    assert tuple(small.shape) == cut_shape(shape, by)
    pieces = [Piece(0, whole[:first]), Piece(first, whole[first:last]), Piece(last, whole[last:])]
    parts = [cut_piece(piece, shape, by) for piece in pieces]
    assert torch.equal(torch.cat([part.values for part in parts]), small.flatten())
    for part, end in zip(parts, [parts[1].start, parts[2].start, small.numel()], strict=True):
        assert part.start + part.values.numel() == end, "the pieces follow on each other"


def test_the_small_model_is_the_dense_model_with_the_other_coefficients_at_zero():
    dense = randomised(tiny.seeded_model(tiny.config(), seed=7))
    small, weights = small_of(dense, "train")
    small.load_state_dict(weights, strict=True)
    with torch.no_grad():
        for layer, heads, neurons in zip(bert_layers(2), HEADS, NEURONS, strict=True):
            for name, kept in ((layer.head_coefficients, heads), (layer.neuron_coefficients, neurons)):
                vector = dict(dense.named_parameters())[name]
                vector.mul_(torch.zeros_like(vector).index_fill(0, torch.tensor(kept), 1.0))
    torch.testing.assert_close(logits(small), logits(dense), atol=1e-5, rtol=1e-5)


def test_folding_changes_no_output():
    dense = randomised(tiny.seeded_model(tiny.config(), seed=7))
    small, weights = small_of(dense, "train")
    small.load_state_dict(weights, strict=True)
    bare, _ = small_of(dense, "none")
    for name, coefficient in fold_map(bert_layers(2), weights).items():
        flat = weights[name].flatten()
        factor = spread(coefficient, weights[name].shape, Piece(0, flat))
        weights[name] = folded(flat, factor, power=1).view(weights[name].shape)
    bare.load_state_dict({k: v for k, v in weights.items() if not k.endswith("coefficients")}, strict=True)
    torch.testing.assert_close(logits(bare), logits(small), atol=1e-5, rtol=1e-5)


def test_folded_moments_are_in_the_units_of_the_folded_weights_gradient():
    # y = sum(c * w * x): the gradient of w is c x, that of w' = c w is x.
    c, x = torch.tensor([0.5, -2.0, 0.0]), torch.tensor([1.0, 3.0, 7.0])
    assert folded(c * x, c, power=-1).tolist() == [1.0, 3.0, 0.0], "0 where c is 0: the weight is dead"
    assert folded((c * x) ** 2, c, power=-2).tolist() == [1.0, 9.0, 0.0]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_composed_tickets_keep_what_two_cuts_in_a_row_keep(data):
    width = data.draw(st.integers(1, 12))
    outer = tuple(sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1))))
    inner = tuple(sorted(data.draw(st.sets(st.integers(0, len(outer) - 1), min_size=1))))
    vector = torch.randn(width)
    twice = vector[list(outer)][list(inner)]
    assert torch.equal(vector[list(compose((outer,), (inner,))[0])], twice)


def test_a_shrunken_config_says_the_shape_of_each_layer():
    config = reshaped(tiny.config(), "none")
    assert config.heads_per_layer == [3, 1] and config.neurons_per_layer == [16, 2]
    assert config.dense().heads_per_layer == [4, 4]


@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"])
def test_what_belongs_to_no_head_and_no_neuron_stays_whole(name):
    assert name not in tiny.cuts(HEADS, NEURONS)
