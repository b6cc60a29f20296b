"""EarlyBERT under a task's head against stock BERT: values, gradients, names, files."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

import letters
from earlybert import arithmetic, tasks, tuning
from earlybert.config import EarlyBertError
from earlybert.downstream import (
    EarlyBertForQuestionAnswering,
    EarlyBertForSequenceClassification,
    EarlyBertForTokenClassification,
    EarlyBertModel,
)
from earlybert.model import EarlyBertConfig, EarlyBertForMaskedLM, EarlyBertForPreTraining
from earlybert.recipes import Finetuning, RecipeSettings

PLAIN = {**letters.SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
KINDS = [
    (BertForSequenceClassification, EarlyBertForSequenceClassification, {"num_labels": 3}),
    (BertForSequenceClassification, EarlyBertForSequenceClassification, {"num_labels": 1}),
    (BertForQuestionAnswering, EarlyBertForQuestionAnswering, {}),
    (BertForTokenClassification, EarlyBertForTokenClassification, {"num_labels": 4}),
]


def batch(kind, labels):
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, 9:] = mask[2, 4:] = 0
    values = {
        "input_ids": torch.randint(5, PLAIN["vocab_size"], (3, 16), generator=generator),
        "token_type_ids": torch.randint(0, 2, (3, 16), generator=generator),
        "attention_mask": mask,
    }
    if kind is EarlyBertForQuestionAnswering:
        return {
            **values,
            "start_positions": torch.tensor([3, 0, 1]),
            "end_positions": torch.tensor([15, 0, 2]),
        }
    if kind is EarlyBertForTokenClassification:
        told = torch.randint(0, labels, (3, 16), generator=generator).masked_fill(~mask.bool(), -100)
        return {**values, "labels": told}
    told = torch.tensor([0, 2, 1]) if labels > 1 else torch.tensor([0.5, 5.0, 2.25])
    return {**values, "labels": told}


@pytest.mark.parametrize(
    ("stock", "ours", "settings", "skips"),
    [*((*kind, False) for kind in KINDS), *((*kind, True) for kind in KINDS[:2])],
)
def test_heads_equal_those_of_stock_bert_in_loss_logits_and_gradients(
    stock, ours, settings, skips, monkeypatch
):
    monkeypatch.setattr(arithmetic, "_GRAIN", 8)
    torch.manual_seed(1)
    theirs = stock(BertConfig(**PLAIN, **settings)).train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model = ours(EarlyBertConfig(**PLAIN, **settings)).train()
    model.load_state_dict(theirs.state_dict(), strict=True)
    model.bert.skips_padding = skips
    rows = []
    model.bert.encoder.layer[-1].intermediate.register_forward_hook(lambda _m, x, _y: rows.append(x[0].shape))
    values = batch(ours, settings.get("num_labels", 0))
    found, expected = model(**values), theirs(**values)
    assert rows == [(32, 32) if skips else (3, 16, 32)], "29 of 48 tokens are real, three fill up a multiple"
    torch.testing.assert_close(found.loss, expected.loss)
    names = ("start_logits", "end_logits") if "start_positions" in values else ("logits",)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("skips", [False, True])
def test_an_answers_loss_without_padding_is_that_of_each_row_alone(skips):
    torch.manual_seed(5)
    model = EarlyBertForQuestionAnswering(EarlyBertConfig(**PLAIN)).train()
    values = batch(EarlyBertForQuestionAnswering, 0)
    alone = []
    for row, length in enumerate(values["attention_mask"].sum(1)):
        own = {
            name: v[row : row + 1, :length] if v.ndim == 2 else v[row : row + 1] for name, v in values.items()
        }
        alone.append(model(**own))
    expected = torch.stack([told.loss for told in alone]).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    model.ignores_padding, model.bert.skips_padding = True, skips
    found = model(**values)
    torch.testing.assert_close(found.loss, expected)
    for row, told in enumerate(alone):
        own = found.start_logits[row : row + 1, : told.start_logits.shape[1]]
        torch.testing.assert_close(own, told.start_logits, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("kind", "device", "ignore", "skips"),
    [
        (EarlyBertForSequenceClassification, "cpu", False, True),
        (EarlyBertForSequenceClassification, "cuda", False, False),
        (EarlyBertForQuestionAnswering, "cpu", False, False),
        (EarlyBertForQuestionAnswering, "cpu", True, True),
        (EarlyBertForQuestionAnswering, "cuda", True, False),
    ],
)
def test_fine_tuning_skips_padding_where_it_saves_time_and_changes_no_loss(kind, device, ignore, skips):
    engine = SimpleNamespace(module=kind(EarlyBertConfig(**PLAIN)), device=torch.device(device))
    task = "squad" if kind is EarlyBertForQuestionAnswering else "rte"
    words = RecipeSettings(ignore_padding=ignore)
    recipe = Finetuning(name="x", model="", deepspeed="", recipe=words).of(task)
    tuning._skip_padding(engine, recipe=recipe)
    assert engine.module.bert.skips_padding is skips
    assert getattr(engine.module, "ignores_padding", None) in (None, ignore)


def test_the_bare_encoder_is_stock_berts_and_opens_what_other_heads_have_saved(tmp_path):
    torch.manual_seed(3)
    theirs = BertModel(BertConfig(**PLAIN)).eval()
    model = EarlyBertModel(EarlyBertConfig(**PLAIN)).eval()
    model.load_state_dict({f"bert.{name}": value for name, value in theirs.state_dict().items()}, strict=True)
    values = {name: v for name, v in batch(EarlyBertModel, 3).items() if name != "labels"}
    with torch.no_grad():
        found, expected = model(**values), theirs(**values)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    real = values["attention_mask"].bool()
    torch.testing.assert_close(
        found.last_hidden_state[real], expected.last_hidden_state[real], rtol=1e-5, atol=1e-5
    )
    pretrained = EarlyBertForMaskedLM(EarlyBertConfig(**PLAIN, heads_per_layer=[3, 1])).eval()
    pretrained.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(opened, EarlyBertModel) and opened.config.heads_per_layer == [3, 1]
    hidden, _, _ = pretrained.bert(values["input_ids"], values["attention_mask"], None, None, None)
    assert torch.equal(opened(values["input_ids"], values["attention_mask"]).last_hidden_state, hidden)


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        (EarlyBertForSequenceClassification, AutoModelForSequenceClassification),
        (EarlyBertForTokenClassification, AutoModelForTokenClassification),
        (EarlyBertForQuestionAnswering, AutoModelForQuestionAnswering),
    ],
)
def test_a_tuned_model_is_found_by_its_auto_class_in_its_true_shape(tmp_path, kind, auto):
    torch.manual_seed(4)
    config = EarlyBertConfig(
        **PLAIN, neurons_per_layer=[40, 7], id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    model = kind(config).eval()
    model.save_pretrained(tmp_path)
    opened = auto.from_pretrained(tmp_path).eval()
    assert type(opened) is kind and opened.config.id2label == {0: "no", 1: "yes"}
    for name, value in opened.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("pre_norm", [False, True])
def test_hidden_states_are_those_of_the_embeddings_and_of_each_layer(pre_norm):
    model = EarlyBertModel(EarlyBertConfig(**PLAIN, pre_norm=pre_norm)).eval()
    ids = batch(EarlyBertModel, 3)["input_ids"]
    with torch.no_grad():
        plain, told = model(ids), model(ids, output_hidden_states=True)
        assert plain.hidden_states is None and len(told.hidden_states) == 3
        assert torch.equal(told.hidden_states[0], model.bert.embeddings(ids, None, None))
        assert torch.equal(told.hidden_states[1], model.bert.encoder.layer[0](told.hidden_states[0], None))
        assert torch.equal(told.hidden_states[2], plain.last_hidden_state)
        model.config.output_hidden_states = True
        assert len(model(ids).hidden_states) == 3 and model(ids, output_hidden_states=False)[-1].ndim == 2


@pytest.mark.parametrize(
    ("stock", "ours", "settings"),
    [
        (BertModel, EarlyBertModel, {}),
        (BertForMaskedLM, EarlyBertForMaskedLM, {}),
        (BertForPreTraining, EarlyBertForPreTraining, {"next_sentence": True}),
        (BertForSequenceClassification, EarlyBertForSequenceClassification, {"num_labels": 3}),
        (BertForQuestionAnswering, EarlyBertForQuestionAnswering, {}),
    ],
)
def test_what_is_asked_for_as_of_stock_bert_comes_in_its_order(stock, ours, settings):
    torch.manual_seed(5)
    theirs = stock(BertConfig(**PLAIN, **settings)).eval()
    model = ours(EarlyBertConfig(**PLAIN, **settings)).eval()
    prefix = "bert." if stock is BertModel else ""
    model.load_state_dict({prefix + name: v for name, v in theirs.state_dict().items()}, strict=True)
    values = {k: v for k, v in batch(ours, 3).items() if k in ("input_ids", "token_type_ids")}
    if stock in (BertForMaskedLM, BertForPreTraining):
        values["labels"] = values["input_ids"]
    if stock is BertForPreTraining:
        values["next_sentence_label"] = torch.tensor([0, 1, 1])
    asked = {"output_hidden_states": True, "return_dict": False}
    with torch.no_grad():
        found, expected = model(**values, **asked), theirs(**values, **asked)
        named = model(**values, output_hidden_states=True)
    assert type(found) is tuple
    for ours_is, theirs_is in zip(found, expected, strict=False):  # counts of ours may follow
        for a, b in zip(*(x if type(x) is tuple else (x,) for x in (ours_is, theirs_is)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(found) >= len(expected) and {"hidden_states"} <= set(named.keys())
    model.config.return_dict = False
    assert type(model(**values)) is tuple


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
def test_the_loss_of_several_labels_a_text_is_that_of_stock_bert(problem):
    torch.manual_seed(6)
    settings = {**PLAIN, "num_labels": 4, "problem_type": problem}
    theirs = BertForSequenceClassification(BertConfig(**settings)).eval()
    model = EarlyBertForSequenceClassification(EarlyBertConfig(**settings)).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    values = {**batch(EarlyBertForSequenceClassification, 3), "labels": torch.randint(0, 2, (3, 4)).float()}
    torch.testing.assert_close(model(**values).loss, theirs(**values).loss)


def test_what_no_model_here_can_answer_is_refused_in_words():
    model = EarlyBertModel(EarlyBertConfig(**PLAIN)).eval()
    ids = batch(EarlyBertModel, 3)["input_ids"]
    with pytest.raises(ValueError, match=r"load the dense export with attn_implementation=\"eager\""):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"attention_mask has the shape \[3, 1, 16, 16\]; give"):
        model(ids, torch.ones(3, 1, 16, 16))
    with pytest.raises(TypeError, match="atention_mask"):
        model(ids, atention_mask=torch.ones(3, 16))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_any_type_hides_the_same_tokens(dtype):
    model = EarlyBertModel(EarlyBertConfig(**PLAIN)).eval()
    values = batch(EarlyBertModel, 3)
    ids, mask = values["input_ids"], values["attention_mask"]
    with torch.no_grad():
        assert torch.equal(model(ids, mask.to(dtype))[0], model(ids, mask)[0])


def test_mnli_is_tuned_from_a_mirror_of_the_hub_that_has_no_diagnostic_pairs(monkeypatch, caplog, tmp_path):
    def absent(*_):
        raise EarlyBertError("the hub does not give ax")

    monkeypatch.setattr(tasks.glue, "available", absent)
    mnli = tasks.glue.TASKS["mnli"]
    assert tasks._diagnostic(mnli, "my/mirror") is None and "AX.tsv will not be written" in caplog.text
    with pytest.raises(EarlyBertError):
        tasks._diagnostic(mnli, str(tmp_path))
    assert tasks._diagnostic(tasks.glue.TASKS["rte"], str(tmp_path)) is None
