"""The model against stock Hugging Face BERT, the reference for values, gradients, names and files."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)

from earlybert import arithmetic, encoder
from earlybert.arithmetic import Documents, attend, documents_of, dropped, visible
from earlybert.initial import encoder_flops_per_token, initial_value, seeded_model
from earlybert.model import (
    EarlyBertConfig,
    EarlyBertForMaskedLM,
    EarlyBertForPreTraining,
)

SHAPE = {
    "vocab_size": 71,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
ROWS, TOKENS = 3, 20


def small(**changes):
    return EarlyBertConfig(**{**SHAPE, **changes})


def stock():
    """Stock BERT, eager, in training mode, with no weight left at 0 or 1."""
    torch.manual_seed(3)
    model = BertForPreTraining(BertConfig(**SHAPE, attn_implementation="eager")).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def ours(reference, **changes):
    model = EarlyBertForPreTraining(small(next_sentence=True, **changes)).train()
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(".coefficients") for name in missing)
    return model


def inputs(*, padding):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 71, (ROWS, TOKENS), generator=generator)
    labels = torch.where(torch.rand(ROWS, TOKENS, generator=generator) < 0.2, ids.roll(1), -100)
    labels[:, 1] = ids[:, 2]  # every row has a label
    batch = {
        "input_ids": ids,
        "token_type_ids": (torch.arange(TOKENS) > 9).long().expand(ROWS, -1),
        "labels": labels,
        "next_sentence_label": torch.tensor([0, 1, 1]),
    }
    if padding:
        batch["attention_mask"] = (torch.arange(TOKENS) < torch.tensor([[20], [13], [6]])).long()
        batch["labels"] = torch.where(batch["attention_mask"].bool(), labels, -100)
    return batch


def as_positions(labels):
    """The labels as `masked_positions` and `masked_labels`, padded as the loader pads them."""
    width = int((labels != -100).sum(1).max())
    positions = torch.zeros(ROWS, width, dtype=torch.long)
    targets = torch.full((ROWS, width), -100)
    for row, line in enumerate(labels):
        found = (line != -100).nonzero().squeeze(1)
        positions[row, : len(found)], targets[row, : len(found)] = found, line[found]
    return {"masked_positions": positions, "masked_labels": targets}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(ours, theirs, *, within=1e-5):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=within, atol=within, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("way", ["labels", "masked_positions"])
def test_forward_and_gradients_equal_stock_bert(padding, way):
    reference, batch = stock(), inputs(padding=padding)
    model = ours(reference)
    theirs = reference(**batch)
    given = dict(batch)
    if way == "masked_positions":
        given.update(as_positions(given.pop("labels")))
    output = model(**given)
    torch.testing.assert_close(output.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        output.seq_relationship_logits, theirs.seq_relationship_logits, rtol=1e-5, atol=1e-5
    )
    assert_near(gradients(model, output.loss), gradients(reference, theirs.loss))

    del given["next_sentence_label"]
    logits = model.eval()(**{k: v for k, v in given.items() if "label" not in k}).prediction_logits
    expected = theirs.prediction_logits
    if way == "masked_positions":
        expected = expected[torch.arange(ROWS)[:, None], given["masked_positions"]]
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-5, atol=1e-5)


def test_positions_and_labels_give_the_same_loss_gradients_and_counts():
    model, batch = ours(stock()), inputs(padding=True)
    by_label = model(**batch)
    by_position = model(**{k: v for k, v in batch.items() if k != "labels"}, **as_positions(batch["labels"]))
    torch.testing.assert_close(by_label.loss, by_position.loss)
    assert_near(gradients(model, by_label.loss), gradients(model, by_position.loss))
    labels = batch["labels"]
    evaluated = model.eval()(**batch)
    right = (evaluated.prediction_logits.argmax(-1) == labels).sum()
    for output in (by_label, by_position, evaluated):
        assert output.counted == (labels != -100).sum() and output.correct == right
        assert output.correct.ndim == output.counted.ndim == 0
    torch.testing.assert_close(evaluated.loss, by_label.loss)


def test_a_batch_without_labels_has_loss_zero_and_zero_gradients():
    model, batch = ours(stock()), inputs(padding=False)
    del batch["next_sentence_label"]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for mode in (True, False):
        output = model.train(mode)(**batch)
        assert output.loss == 0 and output.counted == 0
    positions = as_positions(inputs(padding=False)["labels"])
    positions["masked_labels"].fill_(-100)
    output = model.train()(input_ids=batch["input_ids"], **positions)
    assert output.loss == 0
    assert all(not g.any() for g in gradients(model, output.loss).values())


@pytest.mark.parametrize("padding", [False, True])
def test_attention_in_16_bits_on_a_cpu_is_within_twice_the_error_of_pytorchs_own(padding):
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 3, 24, 16, generator=generator).requires_grad_() for _ in range(3)]
    mask = torch.ones(2, 1, 1, 24, dtype=torch.bool)
    if padding:
        mask[0, ..., 17:] = False
    asked = mask if padding else None

    def run(dtype, way):
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
        out = way(*inputs)
        out.square().sum().backward()
        return [out.float(), *(x.grad.float() for x in inputs)]

    def stock(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=asked)

    def ours(q, k, v):
        return attend(q, k, v, mask=asked, dropout=0.0)

    reference = run(torch.float32, stock)
    for true, theirs, own in zip(
        reference, run(torch.bfloat16, stock), run(torch.bfloat16, ours), strict=True
    ):
        assert (own - true).norm() < 2 * (theirs - true).norm()
    assert all(map(torch.equal, run(torch.float32, ours), reference)), "fp32 is PyTorch's own"


def test_attention_in_16_bits_on_a_cpu_drops_probabilities_and_survives_a_row_of_padding():
    q = torch.randn(1, 1, 64, 8, dtype=torch.bfloat16).requires_grad_()
    ones = torch.ones(1, 1, 64, 8, dtype=torch.bfloat16)
    dropped = attend(q, q, ones, mask=None, dropout=0.5).float()
    assert dropped.std() > 0.05 and abs(dropped.mean().item() - 1) < 0.1
    nothing = torch.zeros(1, 1, 1, 64, dtype=torch.bool)
    out = attend(q, q, ones, mask=nothing, dropout=0.0)
    out.sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_scores_weigh_nothing_and_a_row_of_them_alone_is_finite(dtype):
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 1, 4, 8, dtype=dtype).mul_(20) for _ in range(3))
    q[1].abs_().neg_()  # so that every score of the masked row is negative
    k[1].abs_()
    for x in (q, k, v):
        x.requires_grad_()
    mask = torch.tensor([[True, True, False, False], [False] * 4])[:, None, None, :]
    out = attend(q, k, v, mask=mask, dropout=0.0)
    out.sum().backward()
    cut = functional.scaled_dot_product_attention(*(x[:1, :, :2].float() for x in (q, k, v)))
    torch.testing.assert_close(out[:1, :, :2].float(), cut, rtol=0.02, atol=0.3)
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in (q, k, v))
    assert not k.grad[0, :, 2:].any() and not v.grad[0, :, 2:].any()


def test_a_row_of_nothing_but_padding_has_finite_values_and_gradients():
    model, batch = ours(stock()), inputs(padding=True)
    batch["attention_mask"][2] = 0
    batch["labels"][2] = -100
    output = model(**batch)
    assert output.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(model, output.loss).values())


def test_labels_that_the_model_cannot_use_are_refused():
    model, batch = EarlyBertForPreTraining(small()), inputs(padding=False)
    ids, both = batch["input_ids"], as_positions(batch["labels"])
    with pytest.raises(ValueError, match="both given"):
        model(ids, labels=batch["labels"], **both)
    with pytest.raises(ValueError, match="without masked_positions"):
        model(ids, masked_labels=both["masked_labels"])
    with pytest.raises(ValueError, match="without that head"):
        model(ids, next_sentence_label=batch["next_sentence_label"])
    with pytest.raises(TypeError, match="masked_label"):
        model(ids, masked_label=both["masked_labels"])


def test_without_next_sentence_there_is_no_pooler():
    names = EarlyBertForPreTraining(small()).state_dict()
    assert not any("pooler" in name or "seq_relationship" in name for name in names)
    assert names.keys() == BertForMaskedLM(BertConfig(**SHAPE)).state_dict().keys()


def test_parameter_names_and_shapes_are_those_of_stock_bert():
    theirs = {name: p.shape for name, p in BertForPreTraining(BertConfig(**SHAPE)).named_parameters()}
    assert {
        name: p.shape for name, p in EarlyBertForPreTraining(small(next_sentence=True)).named_parameters()
    } == theirs


@pytest.mark.parametrize("spelling", ["weight and bias", "gamma and beta"])
def test_a_folder_of_stock_bert_loads(tmp_path, spelling):
    reference = stock().eval()
    reference.save_pretrained(tmp_path)
    if spelling == "gamma and beta":
        weights = load_file(tmp_path / "model.safetensors")
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in old.items():
            weights = {key.replace(new, name): value for key, value in weights.items()}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    batch = {k: v for k, v in inputs(padding=True).items() if "label" not in k}
    with torch.no_grad():
        expected = reference(**batch)
        model = EarlyBertForPreTraining.from_pretrained(
            tmp_path, next_sentence=True, coefficients="train"
        ).eval()
        output = model(**batch)
        bare = EarlyBertForMaskedLM.from_pretrained(tmp_path).eval()(**batch)
    torch.testing.assert_close(output.prediction_logits, expected.prediction_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        output.seq_relationship_logits, expected.seq_relationship_logits, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(bare.logits, expected.prediction_logits, rtol=1e-5, atol=1e-5)
    assert all((p == 1).all() for name, p in model.named_parameters() if name.endswith(".coefficients"))
    assert model.bert.embeddings.word_embeddings.weight[0].any(), (
        "the padding row is loaded, not set to zero again"
    )
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_a_configuration_of_another_kind_of_bert_is_refused():
    with pytest.raises(ValueError, match="absolute positions"):
        small(position_embedding_type="relative_key")
    with pytest.raises(ValueError, match="hidden_act = 'mish'"):
        small(hidden_act="mish")
    with pytest.raises(ValueError, match="coefficients = 'yes'"):
        small(coefficients="yes")
    with pytest.raises(ValueError, match="not a multiple"):
        small(num_attention_heads=5)
    with pytest.raises(ValueError, match="need 3 numbers from 1 to 4"):
        small(heads_per_layer=[4, 4])
    with pytest.raises(ValueError, match="need 3 numbers from 1 to 40"):
        small(neurons_per_layer=[40, 0, 40])


def test_coefficients_of_one_change_nothing_and_train_or_freeze():
    reference, batch = stock(), inputs(padding=True)
    plain = ours(reference)(**batch)
    for setting in ("train", "freeze"):
        model = ours(reference, coefficients=setting)
        found = {name: p for name, p in model.named_parameters() if name.endswith(".coefficients")}
        assert len(found) == 6 and all(p.requires_grad is (setting == "train") for p in found.values())
        assert {tuple(p.shape) for p in found.values()} == {(4,), (40,)}
        output = model(**batch)
        assert torch.equal(output.loss, plain.loss)
        grads = gradients(model, output.loss)
        assert all((name in grads) is (setting == "train") for name in found)


def test_a_coefficient_scales_as_its_column_of_the_next_matrix_does():
    torch.manual_seed(1)
    model, batch = ours(stock(), coefficients="train"), inputs(padding=True)
    folded = copy.deepcopy(model)
    with torch.no_grad():
        for layer, plain in zip(model.bert.encoder.layer, folded.bert.encoder.layer, strict=True):
            heads, neurons = layer.attention.self.coefficients, layer.intermediate.coefficients
            heads.uniform_(-1, 1)
            neurons.uniform_(-1, 1)
            plain.attention.output.dense.weight *= heads.repeat_interleave(8)
            plain.output.dense.weight *= neurons
    torch.testing.assert_close(model(**batch).loss, folded(**batch).loss, rtol=1e-5, atol=1e-5)


def test_zero_coefficients_equal_a_model_built_without_those_heads_and_neurons():
    heads, neurons = [[0, 2, 3], [1], [0, 1, 2, 3]], [list(range(0, 40, 2)), [5], list(range(40))]
    model, batch = ours(stock(), coefficients="train"), inputs(padding=True)
    shrunk = EarlyBertForPreTraining(
        small(
            next_sentence=True, heads_per_layer=[3, 1, 4], neurons_per_layer=[20, 1, 40], coefficients="none"
        )
    )
    weights = model.state_dict()
    for index, (layer, h, n) in enumerate(zip(model.bert.encoder.layer, heads, neurons, strict=True)):
        with torch.no_grad():
            layer.attention.self.coefficients.copy_(torch.tensor([float(i in h) for i in range(4)]))
            layer.intermediate.coefficients.copy_(torch.tensor([float(i in n) for i in range(40)]))
        rows = torch.cat([torch.arange(i * 8, i * 8 + 8) for i in h])
        at = f"bert.encoder.layer.{index}."
        for part in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                weights[f"{at}attention.self.{part}.{kind}"] = weights[f"{at}attention.self.{part}.{kind}"][
                    rows
                ]
        weights[f"{at}attention.output.dense.weight"] = weights[f"{at}attention.output.dense.weight"][:, rows]
        for kind in ("weight", "bias"):
            weights[f"{at}intermediate.dense.{kind}"] = weights[f"{at}intermediate.dense.{kind}"][n]
        weights[f"{at}output.dense.weight"] = weights[f"{at}output.dense.weight"][:, n]
    shrunk.load_state_dict({k: v for k, v in weights.items() if not k.endswith(".coefficients")}, strict=True)
    torch.testing.assert_close(shrunk(**batch).loss, model(**batch).loss, rtol=1e-5, atol=1e-5)


def test_each_layer_has_its_own_shape_and_loads_strictly_from_its_config():
    config = small(
        heads_per_layer=[1, 4, 2], neurons_per_layer=[7, 40, 1], coefficients="freeze", next_sentence=True
    )
    model = seeded_model(config, seed=1)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for index, (heads, neurons) in enumerate([(1, 7), (4, 40), (2, 1)]):
        at = f"bert.encoder.layer.{index}."
        assert shapes[f"{at}attention.self.query.weight"] == (heads * 8, 32)
        assert shapes[f"{at}attention.output.dense.weight"] == (32, heads * 8)
        assert shapes[f"{at}attention.self.coefficients"] == (heads,)
        assert shapes[f"{at}intermediate.dense.bias"] == (neurons,)
        assert shapes[f"{at}output.dense.weight"] == (32, neurons)
    again = EarlyBertForPreTraining(EarlyBertConfig.from_dict(config.to_dict()))
    again.load_state_dict(model.state_dict(), strict=True)
    batch = inputs(padding=False)
    assert torch.equal(model.eval()(**batch).loss, again.eval()(**batch).loss)
    dense = config.dense()
    assert dense.heads_per_layer == [4, 4, 4] and dense.neurons_per_layer == [40, 40, 40]
    with pytest.raises(RuntimeError, match="size mismatch"):
        EarlyBertForPreTraining(dense).load_state_dict(model.state_dict())


def test_initial_weights_are_a_pure_function_of_the_seed():
    config = small(coefficients="train", next_sentence=True)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    model = seeded_model(config, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
    torch.manual_seed(12)
    again, other = seeded_model(config, seed=7), seeded_model(config, seed=8)
    for name, value in model.named_parameters():
        assert torch.equal(value, dict(again.named_parameters())[name])
        assert torch.equal(value, initial_value(name, config, seed=7)), name
        if name.endswith("weight") and "LayerNorm" not in name:
            assert not torch.equal(value, dict(other.named_parameters())[name])
            assert 0.01 < value.std() < 0.03
        else:
            assert (value == (0 if name.endswith("bias") else 1)).all()
    words = model.bert.embeddings.word_embeddings.weight
    assert not words[0].any() and words[1:].any(1).all()
    weights = [p.flatten()[:32] for n, p in model.named_parameters() if n.endswith("query.weight")]
    assert not torch.equal(weights[0], weights[1])


def test_the_initial_value_of_an_unknown_parameter_is_an_error():
    for name in (
        "bert.encoder.layer.0.attention.self.gate.weight",
        "bert.nothing.weight",
        "bert.encoder.layer.9.output.x",
    ):
        with pytest.raises(KeyError):
            initial_value(name, small(), seed=1)


@pytest.mark.parametrize("coefficients", ["none", "train"])
def test_bf16_runs_and_the_loss_is_fp32(coefficients):
    reference, batch = stock(), inputs(padding=True)
    exact = ours(reference)(**batch)
    model = ours(reference, coefficients=coefficients).bfloat16()
    output = model(**{k: v for k, v in batch.items() if k != "labels"}, **as_positions(batch["labels"]))
    assert output.loss.dtype == torch.float32 and output.prediction_logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, exact.loss, rtol=0.05, atol=0.05)
    assert all(g.isfinite().all() for g in gradients(model, output.loss).values())


def test_gradient_checkpointing_gives_the_same_gradients_also_with_dropout():
    model = ours(stock(), coefficients="train", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    batch, results = inputs(padding=True), []
    for enabled in (False, True):
        (model.gradient_checkpointing_enable if enabled else model.gradient_checkpointing_disable)()
        assert model.bert.encoder.gradient_checkpointing is enabled
        torch.manual_seed(4)
        results.append(gradients(model, model(**batch).loss))
    assert_near(*results, within=1e-6)


def test_it_saves_loads_and_is_found_by_the_auto_classes(tmp_path):
    config = small(
        heads_per_layer=[1, 4, 2], neurons_per_layer=[7, 40, 1], coefficients="train", next_sentence=True
    )
    model = seeded_model(config, seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".coefficients"):
                parameter.uniform_(0.2, 2)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EarlyBertConfig)
    batch = inputs(padding=True)
    for loader in (EarlyBertForPreTraining, AutoModelForPreTraining):
        again = loader.from_pretrained(tmp_path).eval()
        assert type(again) is EarlyBertForPreTraining and again.config.heads_per_layer == [1, 4, 2]
        assert_near(again.state_dict(), model.state_dict(), within=0)
        assert torch.equal(again(**batch).loss, model(**batch).loss)
    for loader in (EarlyBertForMaskedLM, AutoModelForMaskedLM):
        again = loader.from_pretrained(tmp_path).eval()
        assert type(again) is EarlyBertForMaskedLM and again.bert.pooler is None
        output = again(**{k: v for k, v in batch.items() if k != "next_sentence_label"})
        assert torch.equal(output["logits"], model(**batch).prediction_logits)


def test_flops_count_the_matrices_that_are_there():
    config = small(num_hidden_layers=2, heads_per_layer=[4, 1], neurons_per_layer=[40, 10])
    # Layer 0: four matrices 32 x 32, two 32 x 40, scores and values; layer 1: inner width 8, 10 neurons.
    first = 2 * (4 * 32 * 32 + 2 * 32 * 40 + 2 * 20 * 32)
    second = 2 * (4 * 32 * 8 + 2 * 32 * 10 + 2 * 20 * 8)
    assert encoder_flops_per_token(config, sequence_length=20) == first + second


def as_pre_norm(names):
    """Our names for those of stock RobertaPreLayerNorm, whose LayerNorms stand with what they feed."""
    changes = (
        ("roberta_prelayernorm.LayerNorm", "bert.encoder.LayerNorm"),
        ("roberta_prelayernorm.", "bert."),
        ("attention.LayerNorm", "attention.output.LayerNorm"),
        ("intermediate.LayerNorm", "output.LayerNorm"),
        ("lm_head.dense", "cls.predictions.transform.dense"),
        ("lm_head.layer_norm", "cls.predictions.transform.LayerNorm"),
        ("lm_head.", "cls.predictions."),
    )
    ours = {}
    for name in names:
        told = name
        for old, new in changes:
            told = told.replace(old, new)
        ours[told] = name
    return ours


def test_pre_norm_equals_stock_pre_layer_norm_roberta_in_loss_and_gradients():
    torch.manual_seed(3)
    offset = 1  # RoBERTa counts positions from behind the padding's index
    shape = {**SHAPE, "max_position_embeddings": SHAPE["max_position_embeddings"] + offset}
    config = RobertaPreLayerNormConfig(
        **shape, pad_token_id=0, type_vocab_size=2, attn_implementation="eager"
    )
    reference = RobertaPreLayerNormForMaskedLM(config).train()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    named = dict(reference.named_parameters())
    model = EarlyBertForPreTraining(small(pre_norm=True)).train()
    names = as_pre_norm(named)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = named[names[name]]
            parameter.copy_(value[offset:] if "position_embeddings" in name else value)
    batch = inputs(padding=True)
    del batch["next_sentence_label"]
    positions = torch.arange(TOKENS)[None].expand(ROWS, -1)
    told = reference(**batch, position_ids=positions + offset)
    output = model(**batch, position_ids=positions)
    assert output.loss.item() == pytest.approx(told.loss.item(), abs=1e-5)
    told.loss.backward()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        expected = named[names[name]].grad
        expected = expected[offset:] if "position_embeddings" in name else expected
        assert torch.allclose(parameter.grad, expected, atol=1e-6), name


def test_the_initial_values_of_a_pre_norm_model_can_be_had_one_by_one():
    model = seeded_model(small(pre_norm=True), seed=4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial_value(name, small(pre_norm=True), seed=4)), name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_the_loss_in_pieces_equals_torchs_in_value_gradient_and_right_guesses(precision, rows, monkeypatch):
    monkeypatch.setattr(arithmetic, "_CACHED", 5 * 71)  # five rows at a time
    generator = torch.Generator().manual_seed(rows)
    logits = (4 * torch.randn(rows, 71, generator=generator)).to(precision)
    logits[:, 60:] = logits[:, :11]  # ties: the first of the best is the guess
    labels = torch.randint(0, 71, (rows,), generator=generator)
    labels[:10] = logits[:10].float().max(-1).indices
    labels[::3] = -100
    expected, told = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    reference = functional.cross_entropy(expected.float(), labels, ignore_index=-100, reduction="sum")
    total, right = arithmetic.CrossEntropy.apply(told, labels)
    assert total.item() == pytest.approx(reference.item(), rel=1e-6)
    assert right == (logits.float().max(-1).indices == labels).sum()
    (512 * reference).backward()
    (512 * total).backward()
    assert told.grad.dtype == precision
    assert torch.allclose(
        told.grad.float(), expected.grad.float(), rtol=1e-2 if precision != torch.float32 else 1e-5
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean_drops_the_share_and_repeats_under_a_seed(precision):
    x = torch.full((300, 701), 2.0, dtype=precision, requires_grad=True)  # no multiple of four
    torch.manual_seed(7)
    y = dropped(x, 0.1)
    torch.manual_seed(7)
    assert torch.equal(y, dropped(x, 0.1)) and not torch.equal(y, dropped(x, 0.1))
    gone = (y == 0).float()
    assert gone.mean().item() == pytest.approx(0.1, abs=5 * (0.09 / x.numel()) ** 0.5)
    for axis in (0, 1):  # no row and no column has a share of its own
        width = 701 if axis else 300
        shares = gone.mean(axis)
        assert shares.std().item() == pytest.approx((0.09 / (x.numel() / len(shares))) ** 0.5, rel=0.2), width
    near = gone[:, 1:] * gone[:, :-1]
    assert near.mean().item() == pytest.approx(0.01, abs=1e-3), "neighbours fall independently"
    assert y.max().item() == pytest.approx(2 / 0.9, rel=1e-2)
    y.sum().backward()
    assert torch.equal(x.grad == 0, gone.bool()) and x.grad.max().item() == pytest.approx(1 / 0.9, rel=1e-2)


def test_dropout_is_torchs_elsewhere_and_nothing_at_zero():
    x = torch.randn(4, 5)
    assert torch.equal(dropped(x, 0.0), x)
    assert dropped(torch.empty(4, 5, device="meta"), 0.5).device.type == "meta"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_documents_that_share_a_row_do_not_see_each_other(precision):
    model = seeded_model(small(initializer_range=0.3), seed=2).to(precision).train()
    generator = torch.Generator().manual_seed(1)
    first, second = (
        torch.randint(5, 71, (2, 8), generator=generator),
        torch.randint(5, 71, (2, 12), generator=generator),
    )
    together = {
        "input_ids": torch.cat([first, second], 1),
        "segments": torch.tensor([0] * 8 + [1] * 12).expand(2, -1),
        "position_ids": torch.tensor([*range(8), *range(12)]).expand(2, -1),
    }
    alone = [model(ids).prediction_logits for ids in (first, second)]
    packed = model(**together).prediction_logits
    apart, near = torch.cat(alone, 1), (1e-4 if precision == torch.float32 else 0.05) * packed.abs().max()
    assert (packed - apart).abs().max() < near
    padded = model(**together, attention_mask=torch.ones(2, 20)).prediction_logits
    assert torch.equal(padded, packed)
    del together["segments"]
    assert (model(**together).prediction_logits - packed).abs().max() > 4 * near


def one_by_one(q_RNH, k_RNH, v_RNH, bounds, bounds_of_keys, longest, longest_key):
    """What torch's `varlen_attn` promises, a document at a time; it runs on GPUs only."""
    assert torch.equal(bounds, bounds_of_keys) and longest == longest_key and bounds.dtype == torch.int32
    parts = [
        functional.scaled_dot_product_attention(
            *(x[first:end].transpose(0, 1) for x in (q_RNH, k_RNH, v_RNH))
        )
        for first, end in pairwise(bounds.tolist())
        if end - first <= longest
    ]
    return torch.cat([part.transpose(0, 1) for part in parts])


def test_documents_go_to_the_varlen_kernel_as_they_would_under_a_mask(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    for seed in range(5):
        model = seeded_model(small(initializer_range=0.3, pre_norm=True), seed=seed).train()
        begins = torch.rand(ROWS, TOKENS, generator=generator) < 0.3
        batch = {
            "input_ids": torch.randint(5, 71, (ROWS, TOKENS), generator=generator),
            "segments": begins.cumsum(1),
            "labels": torch.randint(5, 71, (ROWS, TOKENS), generator=generator),
        }
        masked = gradients(model, model(**batch).loss)
        with monkeypatch.context() as patched:
            patched.setattr(arithmetic, "varlen_attn", one_by_one)
            patched.setattr(encoder, "visible", lambda _, segments_BT, **__: documents_of(segments_BT))
            alone = gradients(model, model(**batch).loss)
        assert_near(alone, masked, within=1e-4)


def test_documents_are_the_runs_of_a_row_and_end_with_it():
    bounds, longest = documents_of(torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0], [3, 4, 4, 4, 4]]))
    assert bounds.tolist() == [0, 2, 3, 5, 10, 11, 15] and longest == 5


def test_the_varlen_kernel_is_asked_where_it_runs_and_nowhere_else():
    segments_BT = torch.tensor([[0, 0, 1]])

    def asked(device="cuda", dtype=torch.bfloat16, mask=None, dropout=0.0):
        x_BTD = SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype)
        return visible(mask, segments_BT, x_BTD=x_BTD, dropout=dropout)

    assert isinstance(asked(), Documents) and isinstance(asked(dtype=torch.float16), Documents)
    same_1111 = torch.tensor([[[[True, True, False], [True, True, False], [False, False, True]]]])
    for other in ({"device": "cpu"}, {"dtype": torch.float32}, {"dropout": 0.1}):
        assert torch.equal(asked(**other), same_1111), other
    padded = asked(mask=torch.tensor([[1, 0, 1]]))
    assert torch.equal(padded, same_1111 & torch.tensor([True, False, True]))
