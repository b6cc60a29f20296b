"""Exports do in their users' tools what stock BERT does there, with the trained model's numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from earlybert.export import export
from earlybert.model import EarlyBertForPreTraining
from exports import environment, trained, write_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
TEXTS = ["the cat sat on a mat", "my dog", "so did the dog and his cat on a mat or so"]
KINDS = {
    "compact": ("compact", {}),
    "compact, coefficients folded": ("compact", {"coefficients": "none"}),
    "compact, LayerNorm first": ("compact", {"pre_norm": True, "next_sentence": False}),
    "dense": ("dense", {}),
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{kind: (folder, the model that was exported)}."""
    folder = tmp_path_factory.mktemp("exports")
    tokenizer, made = write_tokenizer(folder / "tokenizer"), {}
    for number, (kind, (form, changes)) in enumerate(KINDS.items()):
        source, to = trained(tokenizer, **changes), folder / str(number)
        export(source, to=to, form=form)
        model = EarlyBertForPreTraining(source.config).eval()
        model.load_state_dict(source.weights, strict=True)
        made[kind] = to, model
    return made


@pytest.fixture(params=KINDS)
def exported(request, exports):
    return exports[request.param]


def settings(folder, **changes):
    told = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return TrainingArguments(str(folder / "tuned"), **{**told, **changes})


def near(found, expected, *, within=1e-5):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=within, atol=within)


def test_the_fill_mask_pipeline_has_the_trained_model_s_guesses(exported):
    folder, model = exported
    filled = pipeline("fill-mask", model=str(folder), trust_remote_code=True)("the cat [MASK] on a mat")
    words = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**words("the cat [MASK] on a mat", return_tensors="pt")).prediction_logits[0, 3]
    best = logits.softmax(-1).topk(5)
    assert [one["token"] for one in filled] == best.indices.tolist()
    near([one["score"] for one in filled], best.values)


def test_trainer_evaluates_the_loss_and_predicts_nothing_but_logits(exported):
    folder, trained_model = exported
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    words = AutoTokenizer.from_pretrained(folder)
    batch = words(TEXTS, padding=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(len(TEXTS))]
    trainer = Trainer(model=model, args=settings(folder), eval_dataset=rows)
    predicted = trainer.predict(rows)
    with torch.no_grad():
        expected = trained_model(**batch)
    near(predicted.metrics["test_loss"], expected.loss, within=1e-4)
    near(predicted.predictions, expected.prediction_logits, within=1e-4)


def test_trainer_that_accumulates_takes_the_step_of_the_whole_batch(exports):
    folder, _ = exports["compact"]  # not dense: stock BERT's loss is not divided there
    words = AutoTokenizer.from_pretrained(folder)
    rows = [
        {**words("the cat sat on a mat"), "labels": [-100, n, 6, 7, -100, -100, -100, n]} for n in range(5, 9)
    ]
    found = []
    for changes in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}):
        model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, **STILL)
        given = {"per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.1, **changes}
        Trainer(model=model, args=settings(folder, max_grad_norm=0.0, **given), train_dataset=rows).train()
        found.append(model.state_dict())
    moved = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).state_dict()
    for name, value in found[0].items():
        near(found[1][name], value)
    assert any((value - moved[name]).abs().max() > 1e-3 for name, value in found[0].items())


@pytest.mark.parametrize("kind", ["compact", "compact, LayerNorm first", "dense"])
def test_a_classifier_is_tuned_saved_and_opened_as_run_glue_does(exports, kind, tmp_path):
    folder, _ = exports[kind]
    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, trust_remote_code=True)
    pairs = [(first, second) for first in TEXTS for second in ("my cat", "my dog", "his dog", "a cat")]
    rows = [{**words(*pair), "label": int("dog" in pair[1])} for pair in pairs]

    def accuracy(told):
        return {"accuracy": float((np.argmax(told.predictions, axis=1) == told.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=settings(tmp_path, max_steps=40, learning_rate=5e-3, per_device_train_batch_size=12),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=words,
        data_collator=DataCollatorWithPadding(words),
        compute_metrics=accuracy,
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    trainer.save_model()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    batch = words([pair[0] for pair in pairs], [pair[1] for pair in pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        near(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_sentence_transformers_has_the_mean_of_the_trained_model_s_hidden_states(exported):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder, model = exported
    trust = {"trust_remote_code": True}
    body = Transformer(str(folder), model_kwargs=trust, config_kwargs=trust, processor_kwargs=trust)
    embedder = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())], device="cpu")
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        mask, types = batch["attention_mask"], batch["token_type_ids"]
        hidden_BTD, _, _ = model.bert(batch["input_ids"], mask, types, None)
    counted_BT1 = mask[..., None]
    near(embedder.encode(TEXTS), (hidden_BTD * counted_BT1).sum(1) / counted_BT1.sum(1))
    assert body.max_seq_length == 32, "its positions, so that longer texts are cut"


@pytest.mark.slow  # the page's test below has a compact one in every run
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:# The axis name")
def test_onnx_runtime_has_the_trained_model_s_logits_for_batches_of_any_shape(exports, kind, tmp_path):
    folder, model = exports[kind]
    exported_model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    shapes = {name: {0: "batch", 1: "length"} for name in batch}
    torch.onnx.export(
        exported_model, kwargs=dict(batch), f=tmp_path / "model.onnx", dynamo=True, external_data=False,
        input_names=list(shapes), output_names=["logits"], dynamic_shapes=shapes, verbose=False,
    )  # fmt: skip
    assert_onnx_is(model, tmp_path / "model.onnx")


def assert_onnx_is(model, path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    generator = torch.Generator().manual_seed(0)
    for rows, length in ((3, 14), (1, 2), (5, 32), (1, 1), (8, 3)):
        ids = torch.randint(18, (rows, length), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids % 2}
        batch["attention_mask"][-1, 1:] = 0
        (found,) = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})
        with torch.no_grad():
            near(found, model(**batch).prediction_logits, within=2e-5)


def snippets():
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.thorough
def test_every_snippet_of_the_page_runs_in_its_order_where_the_package_is_not(exports, tmp_path):
    folder, model = exports["compact"]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(folder)
    text = 'import sys\nsys.modules["earlybert"] = None\n' + "\n".join(snippets())
    (tmp_path / "page.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=180,
        env={**os.environ, **environment(tmp_path / "elsewhere"), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_onnx_is(model, tmp_path / "mine.onnx")
    tuned = {path.name for path in (tmp_path / "classifier").iterdir()}
    assert {"downstream.py", "model.py", "encoder.py", "arithmetic.py", "configuration.py"} <= tuned
