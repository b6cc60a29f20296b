"""What is fine-tuned: the encoder, whatever it comes from, under a fresh head."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, RobertaConfig, RobertaForMaskedLM

import letters
from earlybert.config import EarlyBertError
from earlybert.downstream import EarlyBertForQuestionAnswering, EarlyBertForSequenceClassification
from earlybert.model import EarlyBertConfig, EarlyBertForMaskedLM
from earlybert.origin import Origin
from earlybert.recipes import Finetuning

TWO = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}


def encoder(model):
    return {name: value for name, value in model.state_dict().items() if name.startswith("bert.")}


def test_the_encoder_of_a_stock_bert_is_taken_and_the_rest_is_fresh_from_its_seed(tmp_path):
    stock = letters.stock_bert(tmp_path)
    origin = Origin.read(str(tmp_path))
    first, again, other = (
        origin.model(EarlyBertForSequenceClassification, TWO, coefficients="train", seed=seed)
        for seed in (1, 1, 2)
    )
    for name, value in encoder(stock).items():
        assert torch.equal(first.state_dict()[name], value), name
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert not torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight), "none was trained"
    assert first.config.num_labels == 2 and first.bert.encoder.layer[0].intermediate.coefficients is not None
    questions = origin.model(EarlyBertForQuestionAnswering, {}, coefficients="none", seed=1)
    assert torch.equal(questions.state_dict()["bert.encoder.layer.1.output.dense.weight"],
                       stock.bert.encoder.layer[1].output.dense.weight)  # fmt: skip


def test_a_pooler_that_was_trained_is_taken_and_an_old_head_is_not(tmp_path):
    torch.manual_seed(5)
    tuned = BertForSequenceClassification(
        letters.stock_bert(tmp_path / "before").config.__class__(**letters.SHAPE, num_labels=2)
    )
    tuned.save_pretrained(tmp_path / "tuned")
    letters.tokenizer().save_pretrained(tmp_path / "tuned")
    model = Origin.read(str(tmp_path / "tuned")).model(
        EarlyBertForSequenceClassification, TWO, coefficients="none", seed=1
    )
    assert torch.equal(model.bert.pooler.dense.weight, tuned.bert.pooler.dense.weight)
    assert not torch.equal(model.classifier.weight, tuned.classifier.weight)


def test_a_shrunken_model_keeps_its_shape_and_the_fingerprint_is_that_of_shape_and_weights(tmp_path):
    torch.manual_seed(6)
    small = EarlyBertForMaskedLM(
        EarlyBertConfig(**letters.SHAPE, heads_per_layer=[1, 3], neurons_per_layer=[48, 9], pre_norm=True)
    )
    small.save_pretrained(tmp_path)
    letters.tokenizer().save_pretrained(tmp_path)
    origin = Origin.read(str(tmp_path))
    model = origin.model(EarlyBertForSequenceClassification, TWO, coefficients="none", seed=1)
    assert model.config.heads_per_layer == [1, 3] and model.config.pre_norm
    assert torch.equal(model.bert.encoder.LayerNorm.weight, small.bert.encoder.LayerNorm.weight)
    assert origin.fingerprint == Origin.read(str(tmp_path)).fingerprint
    copy = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-elsewhere")
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, "transformers_version": "4.0.0"}))
    assert origin.fingerprint == Origin.read(str(copy)).fingerprint, "wherever it lies, whatever wrote it"
    with torch.no_grad():
        small.bert.encoder.layer[1].output.dense.bias[3] += 1e-6
    small.save_pretrained(tmp_path)
    assert origin.fingerprint != Origin.read(str(tmp_path)).fingerprint


def test_what_cannot_be_tuned_is_refused_in_words(tmp_path):
    with pytest.raises(EarlyBertError, match="no such folder"):
        Origin.read(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(EarlyBertError, match="no model could be read there"):
        Origin.read(str(tmp_path / "empty"))
    shape = {key: value for key, value in letters.SHAPE.items() if key != "max_position_embeddings"}
    RobertaForMaskedLM(RobertaConfig(**shape, pad_token_id=0)).save_pretrained(tmp_path / "roberta")
    letters.tokenizer().save_pretrained(tmp_path / "roberta")
    with pytest.raises(EarlyBertError, match="is a roberta: scripts/finetune.py tunes BERTs"):
        Origin.read(str(tmp_path / "roberta"))
    letters.stock_bert(tmp_path / "small", vocab_size=50)
    with pytest.raises(EarlyBertError, match="goes up to id 108, its embeddings have 50 rows"):
        Origin.read(str(tmp_path / "small"))
    letters.stock_bert(tmp_path / "large", vocab_size=2000)
    with pytest.raises(EarlyBertError, match="goes up to id 108, its embeddings have 2000 rows"):
        Origin.read(str(tmp_path / "large"))
    letters.stock_bert(tmp_path / "bare")
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(EarlyBertError, match="its tokenizer cannot be read"):
        Origin.read(str(tmp_path / "bare"))
    letters.stock_bert(tmp_path / "damaged")
    stated = json.loads((tmp_path / "damaged" / "config.json").read_text())
    for name, wrong in (("hidden_size", "wide"), ("num_attention_heads", 0), ("pad_token_id", 10**6)):
        (tmp_path / "damaged" / "config.json").write_text(json.dumps({**stated, name: wrong}))
        with pytest.raises(EarlyBertError, match="damaged: no model could be read there"):
            Origin.read(str(tmp_path / "damaged"))
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(stated))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        whole = (tmp_path / "damaged" / name).read_text()
        (tmp_path / "damaged" / name).write_text("[]")
        with pytest.raises(EarlyBertError, match="its tokenizer cannot be read"):
            Origin.read(str(tmp_path / "damaged"))
        (tmp_path / "damaged" / name).write_text(whole)
    letters.stock_bert(tmp_path / "good")
    values = json.loads((tmp_path / "good" / "config.json").read_text())
    (tmp_path / "good" / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 3}))
    with pytest.raises(EarlyBertError, match=r"has no bert\.encoder\.layer\.2"):
        Origin.read(str(tmp_path / "good"))
    weights = tmp_path / "good" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5])
    with pytest.raises(EarlyBertError, match="good: no model could be read there"):
        Origin.read(str(tmp_path / "good"))


@pytest.mark.parametrize(("told", "kept"), [(None, 96), (512, 96), (64, 64)])
def test_its_tokenizer_cuts_where_the_positions_end_also_when_it_is_saved(tmp_path, told, kept):
    letters.stock_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "tokenizer_config.json"
    stated = {key: v for key, v in json.loads(path.read_text()).items() if key != "model_max_length"}
    path.write_text(json.dumps(stated if told is None else {**stated, "model_max_length": told}))
    Origin.read(str(tmp_path / "bert")).tokenizer.save_pretrained(tmp_path / "tuned")
    saved = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert saved.model_max_length == kept and len(saved("a " * 200, truncation=True)["input_ids"]) == kept


def test_rows_longer_than_the_models_positions_are_refused(tmp_path):
    letters.stock_bert(tmp_path)
    settings = Finetuning(name="a", model="m", deepspeed="d", tasks=("rte",))
    with pytest.raises(EarlyBertError, match="rte: sequence_length = 128, but .* has 96 positions"):
        Origin.read(str(tmp_path)).check(settings.of("rte"))
