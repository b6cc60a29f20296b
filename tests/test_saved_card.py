"""The card of a saved engine says what the engine knows, and its lines load the model."""

import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import earlybert
import ranks
import tiny
from earlybert import EarlyBertError
from earlybert.recipes import defaults
from exports import environment

RESULT = {
    "task": "stsb", "seed": 3, "score": 80.5,
    "scores": {"dev": {"pearson": 81.0, "spearman": 80.0, "score": 80.5}},
    "seconds": {"search": 12.0, "train": 90.5}, "recipe": {**defaults("stsb"), "learning_rate": 1e-4},
    "model": "models/a_b|c", "pretraining": {"optimizer steps": "1,200"}, "ranks": 2, "precision": "bf16",
}  # fmt: skip
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40,
}  # fmt: skip


def saved(folder):
    """A stock classifier in both forms after its draw, an EarlyBERT without a ticket, one that was tuned."""
    stock = transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE, num_labels=3))
    engine = earlybert.initialize(
        model=stock,
        config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3),
        early_bird=earlybert.EarlyBird(tiny.settings(every=1, minimum_step=2, latest_step=2)),
    )
    for _ in range(3):
        ids = torch.randint(5, 64, (2, 12))
        loss = engine(input_ids=ids, labels=torch.tensor([0, 1])).loss
        engine.backward(loss)
        del loss
        engine.step()
    for form in ("compact", "dense"):
        earlybert.save(engine, Path(folder) / form, form=form)
    kept = engine.progress.heads
    engine.close()
    engine = tiny.engine(1, "fp32", None, model_config=tiny.config(coefficients="none"))
    earlybert.save(engine, Path(folder) / "plain")
    earlybert.save(engine, Path(folder) / "tuned", result=RESULT)
    engine.close()
    small = tiny.config(coefficients="none", heads_per_layer=[2, 3], neurons_per_layer=[40, 9])
    engine = tiny.engine(1, "fp32", None, model_config=small)
    earlybert.save(engine, Path(folder) / "stock", form="dense")
    engine.close()
    engine = tiny.engine(1, "fp32", None, model_config=tiny.config(coefficients="none", pre_norm=True))
    with pytest.raises(EarlyBertError, match="LayerNorms elsewhere; use the compact form"):
        earlybert.save(engine, Path(folder) / "refused", form="dense")
    assert not (Path(folder) / "refused").exists()
    engine.close()
    return kept


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    (kept,) = ranks.run("test_saved_card:saved", ranks=1, folder=str(folder))
    told = {
        name: (folder / name / "README.md").read_text("utf-8")
        for name in ("compact", "dense", "plain", "tuned", "stock")
    }
    return folder, kept, told


def metadata(page):
    return yaml.safe_load(page.split("---\n")[1])


@pytest.mark.parametrize("name", ["compact", "dense", "plain", "tuned", "stock"])
def test_the_lines_of_a_card_load_what_it_describes(pages, name, monkeypatch, tmp_path):
    for key, value in environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    folder, _, told = pages
    snippets = re.findall(r"^```python\n(.*?)^```", told[name], re.M | re.S)
    assert len(snippets) == (2 if name in ("plain", "tuned") else 1)
    for snippet in snippets:
        names = {}
        exec(snippet.replace("path/of/this/folder", str(folder / name)), names)
        count = sum(p.numel() for n, p in names["model"].named_parameters() if not n.endswith("coefficients"))
        assert f"The file has {count:,} parameters." in told[name]
    assert ("stand in it as zeros" in told[name]) == (name in ("dense", "stock"))
    assert name != "stock" or type(names["model"]) is transformers.BertForMaskedLM


def test_a_card_has_the_ticket_layer_by_layer_and_nothing_that_the_engine_does_not_know(pages):
    _, kept, told = pages
    for form in ("compact", "dense"):
        page = told[form]
        for layer, heads in enumerate(kept):
            assert f"| {layer} | 3 of 4 ({', '.join(map(str, heads))}) |" in page
        assert (
            "cut to its early-bird lottery ticket at step 2." in page
            and "| attention heads | 8 | 6 |" in page
        )
        assert metadata(page) == {
            "library_name": "transformers", "pipeline_tag": "text-classification",
            "tags": ["bert", "earlybert", "lottery-ticket"],
        }  # fmt: skip
    assert ("as zeros" in told["dense"], "as zeros" in told["compact"]) == (True, False)
    assert "\n2 layers, 8 attention heads, 96 FFN neurons.\n" in told["plain"]
    assert "## Ticket" not in told["plain"] and "Nothing was evaluated" in told["plain"]


def test_a_tuned_model_has_its_scores_in_the_page_and_in_the_metadata(pages):
    _, _, told = pages
    page = told["tuned"]
    assert "GLUE STS-B, from `models/a\\_b\\|c`, seed 3" in page
    assert "| dev | pearson | 81.00 |" in page and "| dev | spearman | 80.00 |" in page
    assert "1m42s of training steps, 12s of them up to the draw" in page
    assert "its pretraining, optimizer steps: 1,200" in page and "bf16, 2 processes" in page
    (row,) = metadata(page)["model-index"][0]["results"]
    assert row["dataset"]["config"] == "stsb" and row["dataset"]["type"] == "nyu-mll/glue"
    assert {found["type"]: found["value"] for found in row["metrics"]} == {
        "pearsonr": 81.0,
        "spearmanr": 80.0,
    }
