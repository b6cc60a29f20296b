"""Both exports load elsewhere and give the trained model's logits; one that does not is never left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    BertForMaskedLM,
    BertForPreTraining,
)

from earlybert import export as exporting
from earlybert.config import EarlyBertError
from earlybert.downstream import (
    EarlyBertForSequenceClassification,
    EarlyBertForTokenClassification,
    EarlyBertModel,
)
from earlybert.export import CODE, MARK, export
from earlybert.finetune import tune
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining, EarlyBertPreTrainedModel
from earlybert.recipes import Finetuning
from earlybert.stock import dense_weights, stock_model
from exports import NEURONS, WORDS, environment, trained, write_tokenizer

ELSEWHERE = """
import json, sys
sys.modules["earlybert"] = None  # any import of the package fails
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification, AutoTokenizer, pipeline,
)
folder, trust, pretraining = sys.argv[1], sys.argv[2] == "compact", sys.argv[3] == "nsp"
words = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
batch = words(["the cat sat on a [MASK]", "my dog"], padding=True, return_tensors="pt")
told = {"type": AutoConfig.from_pretrained(folder, trust_remote_code=trust).model_type}
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust).eval()
with torch.no_grad():
    told["logits"] = model(**batch).logits.flatten().tolist()
    if pretraining:
        model = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=trust).eval()
        told["pairs"] = model(**batch).seq_relationship_logits.flatten().tolist()
    model = AutoModel.from_pretrained(folder, trust_remote_code=trust).eval()
    told["hidden"] = model(**batch).last_hidden_state[batch["attention_mask"].bool()].flatten().tolist()
    for auto, labels in ((AutoModelForQuestionAnswering, 2), (AutoModelForSequenceClassification, 3)):
        model = auto.from_pretrained(folder, trust_remote_code=trust, num_labels=labels).eval()
        told[auto.__name__] = [list(value.shape) for value in model(**batch).values()]
filled = pipeline("fill-mask", model=folder, trust_remote_code=trust)("the cat sat on a [MASK] .")
told["filled"] = [one["token_str"] for one in filled]
print(json.dumps(told))
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


def batch_of(folder):
    words = AutoTokenizer.from_pretrained(folder)
    return words(["the cat sat on a [MASK]", "my dog"], padding=True, return_tensors="pt")


def logits_of(source, batch):
    model = EarlyBertForPreTraining(source.config)
    model.load_state_dict(source.weights, strict=True)
    with torch.no_grad():
        return model.eval()(**batch)


def expected_hidden(source, batch):
    model = EarlyBertForPreTraining(source.config)
    model.load_state_dict(source.weights, strict=True)
    with torch.no_grad():
        ids, types, mask = (batch[name] for name in ("input_ids", "token_type_ids", "attention_mask"))
        hidden_BTD, _, _ = model.eval().bert(ids, mask, types, None, None)
    return hidden_BTD[mask.bool()]


def near(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours).flatten(), theirs.flatten(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "next_sentence", [pytest.param(True, marks=pytest.mark.thorough), False], ids=["nsp", "mlm"]
)
@pytest.mark.parametrize("form", ["compact", pytest.param("dense", marks=pytest.mark.thorough)])
def test_an_export_loads_and_fills_masks_where_the_package_is_not(tmp_path, tokenizer, form, next_sentence):
    source, to = trained(tokenizer, next_sentence=next_sentence), tmp_path / "my.export"
    assert export(source, to=to, form=form) < 1e-5
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, to, form, "nsp" if next_sentence else "mlm"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env={**os.environ, **environment(tmp_path / "elsewhere")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    expected = logits_of(source, batch_of(to))
    near(told["logits"], expected.prediction_logits)
    if next_sentence:
        near(told["pairs"], expected.seq_relationship_logits)
    near(told["hidden"], expected_hidden(source, batch_of(to)))
    assert told["AutoModelForSequenceClassification"] == [[2, 3]]
    assert told["AutoModelForQuestionAnswering"] == [[2, batch_of(to)["input_ids"].shape[1]]] * 2
    assert told["type"] == ("earlybert" if form == "compact" else "bert")
    assert len(told["filled"]) == 5 and set(told["filled"]) <= set(WORDS)


def test_compact_loads_through_the_package_without_remote_code_and_keeps_shape_and_coefficients(
    tmp_path, tokenizer
):
    source, to = trained(tokenizer), tmp_path / "compact"
    export(source, to=to, form="compact")
    expected = logits_of(source, batch_of(to))
    model = AutoModelForPreTraining.from_pretrained(to, trust_remote_code=False).eval()
    assert type(model) is EarlyBertForPreTraining
    assert model.config.heads_per_layer == [3, 1] and model.config.neurons_per_layer == [13, 2]
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.weights[name]), name
    with torch.no_grad():
        near(model(**batch_of(to)).prediction_logits, expected.prediction_logits)
        near(
            AutoModelForMaskedLM.from_pretrained(to).eval()(**batch_of(to)).logits, expected.prediction_logits
        )


@pytest.mark.parametrize("coefficients", ["none", "train", "freeze"])
@pytest.mark.parametrize("shrunken", [True, False], ids=["shrunken", "never shrunken"])
def test_dense_is_stock_bert_with_coefficients_folded_in_and_zeros_put_back(
    tmp_path, tokenizer, coefficients, shrunken
):
    source, to = trained(tokenizer, coefficients=coefficients, shrunken=shrunken), tmp_path / "dense"
    export(source, to=to, form="dense")
    expected = logits_of(source, batch_of(to))
    model = BertForPreTraining.from_pretrained(to).eval()
    with torch.no_grad():
        output = model(**batch_of(to))
        masked = BertForMaskedLM.from_pretrained(to).eval()(**batch_of(to)).logits
    near(output.prediction_logits, expected.prediction_logits)
    near(output.seq_relationship_logits, expected.seq_relationship_logits)
    near(masked, expected.prediction_logits)
    layer = model.bert.encoder.layer[1]
    assert layer.attention.self.query.weight.shape == (32, 32) and layer.output.dense.weight.shape == (32, 40)
    gone = torch.ones(40, dtype=torch.bool)
    gone[list(NEURONS[1])] = False
    if shrunken:
        assert not layer.output.dense.weight[:, gone].any() and not layer.intermediate.dense.bias[gone].any()
        assert layer.output.dense.weight[:, ~gone].any(0).all()
        assert layer.attention.self.value.weight.any(1).tolist() == [8 <= row < 16 for row in range(32)]
    assert not list(to.glob("*.py"))


LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "small from the start"])
@pytest.mark.parametrize("kind", list(CODE.values())[1:], ids=lambda kind: kind.__name__)
def test_under_every_head_stock_bert_gives_the_small_models_outputs(tmp_path, tokenizer, kind, drawn):
    source = trained(tokenizer)
    config = EarlyBertConfig(**{**source.config.to_dict(), **LABELS})
    torch.manual_seed(0)
    small = kind(config).eval()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    kept = {"heads": source.heads, "neurons": source.neurons} if drawn else {}
    stock = stock_model(small, dict(small.named_parameters()), **kept)
    assert type(stock).__name__ == kind.__name__.removeprefix("Early") and not stock.training
    ids, mask = torch.randint(config.vocab_size, (2, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, attention_mask=mask).to_tuple() for model in (small, stock))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        real = mask.bool() if one.shape[:2] == mask.shape else slice(None)
        near(one[real], other[real])
    if kind in (EarlyBertForSequenceClassification, EarlyBertForTokenClassification):
        stock.save_pretrained(tmp_path)
        written = AutoConfig.from_pretrained(tmp_path)
        assert written.id2label == {0: "a", 1: "b", 2: "c"} and theirs[0].shape[-1] == 3
        assert written.label2id == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"head_size": 16}, "head_size 16 x 4 heads is not hidden_size 32"), ({"pre_norm": True}, "pre_norm")],
    ids=["wide heads", "pre_norm"],
)
def test_what_stock_bert_cannot_hold_is_refused_before_it_is_tuned(tmp_path, tokenizer, changes, says):
    config = EarlyBertConfig(**{**trained(tokenizer, shrunken=False).config.to_dict(), **changes})
    model = tmp_path / "model"
    EarlyBertModel(config).save_pretrained(model)
    shutil.copytree(tokenizer, model, dirs_exist_ok=True)
    settings = Finetuning(
        name="run", runs=str(tmp_path), model=str(model), deepspeed="ds.json", data=str(tmp_path),
        tasks=("rte",), keep_models="dense",
    )  # fmt: skip
    with pytest.raises(EarlyBertError, match=f"{says}.*compact form"):
        tune(settings, {}, where="e.toml")
    with pytest.raises(EarlyBertError, match=f"{says}.*compact form"):
        stock_model(EarlyBertModel(config), {})


class Users(EarlyBertForSequenceClassification):
    """A head of a user's own."""

    def __init__(self, config, width):
        super().__init__(config)
        self.more = torch.nn.Linear(config.hidden_size, width)


class UsersWide(EarlyBertForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.classifier = torch.nn.Linear(config.hidden_size, 7)


def test_models_of_a_users_own_and_untied_ones_are_stock_bert_or_refused(tokenizer):
    config = trained(tokenizer, next_sentence=False).config
    for model, says in (
        (Users(config, 3), "Users has other parameters than BertForSequenceClassification .more"),
        (UsersWide(config), "UsersWide: .*size mismatch"),
        (EarlyBertPreTrainedModel(config), "stock BERT has no EarlyBertPreTrainedModel"),
    ):
        with pytest.raises(EarlyBertError, match=f"(?s){says}.*compact form"):
            stock_model(model, dict(model.named_parameters()))
    config.tie_word_embeddings = False
    model = EarlyBertForPreTraining(config).eval()
    with torch.no_grad():
        model.cls.predictions.decoder.weight.normal_()
    stock, ids = stock_model(model, dict(model.named_parameters())), torch.arange(5, 12)[None]
    with torch.no_grad():
        near(model(input_ids=ids).prediction_logits, stock(input_ids=ids).logits)


def test_the_dense_weights_leave_the_source_alone(tokenizer):
    source = trained(tokenizer)
    before = {name: value.clone() for name, value in source.weights.items()}
    dense_weights(source.config, source.weights, heads=source.heads, neurons=source.neurons)
    assert all(torch.equal(value, source.weights[name]) for name, value in before.items())


@pytest.mark.parametrize("form", ["compact", "dense"])
@pytest.mark.parametrize("weight", ["cls.predictions.bias", "cls.seq_relationship.bias"])
def test_an_export_that_gives_other_logits_is_refused_and_removed(
    tmp_path, tokenizer, monkeypatch, form, weight
):
    write = getattr(exporting, f"_write_{form}")

    def break_it(source, model, folder):
        write(source, model, folder)
        weights = load_file(folder / "model.safetensors")
        weights[weight] = weights[weight] + 1e-3
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(exporting, f"_write_{form}", break_it)
    with pytest.raises(EarlyBertError, match=f"the {form} export's logits differ"):
        export(trained(tokenizer), to=tmp_path / "out" / "broken", form=form)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("form", ["compact", "dense"])
def test_an_export_replaces_an_export_and_nothing_else(tmp_path, tokenizer, monkeypatch, form):
    source, to = trained(tokenizer), tmp_path / "out"
    to.mkdir()
    (to / "thesis.txt").write_text("mine")
    with pytest.raises(EarlyBertError, match=r"out exists and is not an export; choose another folder"):
        export(source, to=to, form=form)
    assert [path.name for path in to.iterdir()] == ["thesis.txt"]
    (to / "thesis.txt").unlink()
    export(source, to=to, form=form)
    assert (to / MARK).exists()
    export(source, to=to, form="dense")
    assert not list(to.glob("*.py"))
    weights = (to / "model.safetensors").read_bytes()
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(EarlyBertError, match="logits differ"):
        export(source, to=to, form=form)
    assert (to / "model.safetensors").read_bytes() == weights, "a refused export leaves the older one"


def test_a_file_in_the_place_of_the_export_is_refused(tmp_path, tokenizer):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EarlyBertError, match="not an export"):
        export(trained(tokenizer), to=tmp_path / "out", form="dense")
    with pytest.raises(EarlyBertError, match=r"out/x cannot be made: Not a directory; choose another folder"):
        export(trained(tokenizer), to=tmp_path / "out" / "x", form="dense")


def test_the_copied_code_is_the_package_s_own(tmp_path, tokenizer):
    export(trained(tokenizer), to=tmp_path / "out", form="compact")
    package = Path(exporting.__file__).parent
    carried = {"model.py", "encoder.py", "downstream.py", "arithmetic.py", "configuration.py"}
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == carried
    for name in carried:
        own = (package / name).read_text()
        assert (tmp_path / "out" / name).read_text() == own
        assert {f"{room}.py" for room in re.findall(r"^from \.(\w*)", own, re.M)} <= carried
        assert not re.search(r"^\s*(from|import) earlybert", own, re.M)


def test_a_text_that_is_longer_than_the_positions_is_cut_where_they_end(tmp_path, tokenizer):
    assert AutoTokenizer.from_pretrained(tokenizer).model_max_length > 32
    export(trained(tokenizer), to=tmp_path / "out", form="dense")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(words("the cat " * 50, truncation=True)["input_ids"]) == words.model_max_length == 32


@pytest.mark.thorough
def test_the_command_says_in_one_line_what_is_not_a_run(tmp_path):
    script = Path(__file__).parent.parent / "scripts" / "export.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "nowhere", "--to", tmp_path / "out", "--form", "dense"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "neither a run folder nor a checkpoint" in done.stderr
    assert not (tmp_path / "out").exists()
