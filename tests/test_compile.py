"""torch.compile by regions: how much there is to compile, and that documents go through it."""

from types import SimpleNamespace

import pytest
import torch
import torch._dynamo

from earlybert import arithmetic, baselines, encoder
from earlybert.adapters import bert_layers
from earlybert.lifecycle import compile_module, compile_seconds
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining

LAYERS = 10


@pytest.fixture(autouse=True)
def fresh_compiler():
    settings = torch._dynamo.config
    names = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes")
    before = {name: getattr(settings, name) for name in names}
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    for name, value in before.items():
        setattr(settings, name, value)


def model(neurons):
    torch.manual_seed(0)
    return EarlyBertForPreTraining(
        EarlyBertConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=len(neurons), num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=16, next_sentence=False, neurons_per_layer=neurons,
            heads_per_layer=[2] * len(neurons), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def batch(**more):
    ids = torch.arange(32).view(2, 16) * 7 % 90 + 5
    places = torch.tensor([[1, 5, 9], [2, 6, 14]])
    return {"input_ids": ids, "masked_positions": places, "masked_labels": ids.gather(1, places), **more}


def compiled(module):
    """The graphs that come while `module` is used."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compile_module(SimpleNamespace(module=module), {"backend": backend})
    return graphs


def train(module, **more):
    loss = module(**batch(**more)).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("neurons", [[64] * LAYERS, [8 * n for n in range(1, LAYERS + 1)]])
def test_a_layer_is_compiled_once_whatever_the_widths_of_the_others(neurons):
    expected = train(model(neurons))
    module = model(neurons)
    graphs = compiled(module)
    loss, gradients = train(module)
    assert len(graphs) == 4, "embeddings, a layer, head and loss"
    assert loss == pytest.approx(expected[0], abs=1e-6)
    for name, gradient in expected[1].items():
        assert torch.allclose(gradients[name], gradient, atol=1e-6), name
    train(module)
    assert len(graphs) == 4, "nothing is compiled again"


def test_layers_that_are_passed_by_at_random_break_no_graph_and_are_the_same_ones():
    def drop(module):
        baselines.drop_layers(module, bert_layers(LAYERS), probability=0.5)
        return module

    plain, module = drop(model([64] * LAYERS)), drop(model([64] * LAYERS))
    graphs, losses = compiled(module), set()
    for seed in range(3):
        torch.manual_seed(seed)
        expected, gradients = train(plain)
        torch.manual_seed(seed)
        loss, found = train(module)
        assert loss == pytest.approx(expected, abs=1e-6)
        for name, gradient in gradients.items():
            assert torch.allclose(found[name], gradient, atol=1e-6), name
        losses.add(round(loss, 6))
    assert len(graphs) == 5, "embeddings, a layer, which of the two it is, head and loss"
    assert len(losses) == 3, "other layers each time"


def test_documents_that_share_rows_reach_compiled_layers(monkeypatch):
    """With torch's varlen attention told in plain operations, since it runs on GPUs only."""

    def apart(q, k, v, bounds, *_):
        places = torch.arange(q.shape[0])
        own = torch.searchsorted(bounds[1:-1], places, right=True, out_int32=True)
        mask = own[:, None] == own[None]
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask
        ).transpose(0, 1)

    segments = [
        torch.tensor([[0] * 5 + [1] * 11, [0] * 16]),
        torch.tensor([[0] * 5 + [1] * 11, [0] * 3 + [1] * 6 + [2] * 7]),
    ]
    expected = [train(model([64] * 3), segments=s)[0] for s in segments]
    monkeypatch.setattr(arithmetic, "varlen_attn", apart)
    monkeypatch.setattr(encoder, "visible", lambda _, told, **__: arithmetic.documents_of(told))
    module = model([64] * 3)
    graphs = compiled(module)
    for _ in range(2):
        for told, loss in zip(segments, expected, strict=True):
            assert train(module, segments=told)[0] == pytest.approx(loss, abs=1e-5)
    assert len(graphs) <= 5, "one more for other numbers of documents"


def test_the_compilers_time_is_counted():
    module = model([64])
    compile_module(SimpleNamespace(module=module), {"backend": "aot_eager"})
    before = compile_seconds()
    train(module)
    spent = compile_seconds()
    assert spent > before
    train(module)
    assert compile_seconds() == spent
