"""A model card says what the run says, and nothing else."""

import dataclasses
import json
import re
import shutil

import pytest
import yaml

from corpora import random_documents, write_corpus
from earlybert import card, checkpoint
from earlybert.card import Training
from earlybert.config import as_dict, to_toml
from earlybert.data import DataSettings
from earlybert.experiment import Experiment, ModelSettings
from earlybert.export import export
from earlybert.initial import seeded_model
from earlybert.progress import Progress
from earlybert.schedule import PhaseSettings
from earlybert.shards import write_manifest
from earlybert.ticket import Ticket, TicketSettings
from exports import HEADS, NEURONS, environment, trained, write_tokenizer


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return trained(write_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer"))


@pytest.fixture
def run(tmp_path):
    """A run folder of one ticket, and the manifest of its checkpoint at step 13 of 15."""
    corpus = write_corpus(tmp_path / "corpus", random_documents(20, longest=30))
    told = dataclasses.replace(
        corpus.manifest,
        settings={"language": "en", "only_language": False},
        sources={"wikipedia": {"documents": 15, "tokens": 200}, "books": {"documents": 5, "tokens": 1234}},
    )
    write_manifest(tmp_path / "corpus", told)
    phases = [
        PhaseSettings(steps=n, sequence_length=t, batch=4, micro_batch=2, learning_rate=3e-4)
        for n, t in ((10, 8), (5, 16))
    ]
    experiment = Experiment(
        name="small_one",
        deepspeed="zero.json",
        model=ModelSettings(layers=2, hidden=32, heads=4, neurons=40, positions=32),
        data=DataSettings(corpus=str(tmp_path / "corpus"), held_out=0.05),
        phases=tuple(phases),
        ticket=TicketSettings(minimum_neurons=2, neuron_multiple=1, minimum_step=4, latest_step=6),
    )
    folder = tmp_path / "runs" / "small_one"
    folder.mkdir(parents=True)
    (folder / "experiment.toml").write_text(to_toml(as_dict(experiment)))
    stamp = {"device": "cpu", "python": "3.11.9", "git_commit": "c0ffee", "command": [str(tmp_path)]}
    (folder / "environment.json").write_text(json.dumps(stamp))
    ticket = Ticket(
        6, HEADS, NEURONS, (4, 4), (40, 40), "settled: distance 0.000 heads, 0.041 neurons",
        ((4, None, None), (6, 0.0, 0.041)),
    )  # fmt: skip
    manifest = checkpoint.Manifest(
        step=13, experiment="e", corpus=told.content, world_size=2, stage=2, precision="bf16", model={},
        progress=Progress().drawn(ticket).to_json(),
        trainer={"eval_losses": {"0": 6.5, "6": 6.25, "10": 6.1, "13": 6.03125}, "trained_seconds": 188.4},
        state={}, logits=[], versions={"torch": "2.99"}, files={},
    )  # fmt: skip
    return folder, manifest


def page_of(source, training, *, form="compact", kept=(HEADS, NEURONS)):
    return card.write(source.config, form=form, kept=kept, difference=1.25e-6, training=training)


def metadata(page):
    assert page.startswith("---\n")
    return yaml.safe_load(page.split("---\n")[1])


def test_the_numbers_are_those_of_the_run(run, source, tmp_path):
    page = page_of(source, Training.read(*run))
    small = sum(v.numel() for n, v in source.weights.items() if ".decoder." not in n) - 4 - 15  # coefficients
    dense = sum(parameter.numel() for parameter in seeded_model(source.config.dense(), seed=0).parameters())
    length = (8 + 16) / 2  # both phases train on 320 tokens
    head, neuron = 2 * 4 * 32 * 8 + 2 * 2 * length * 8, 2 * 2 * 32
    fixed = 0.15 * (2 * 32 * 32 + 2 * 32 * 18)
    share = (4 * head + 15 * neuron + fixed) / (8 * head + 80 * neuron + fixed)
    for line in (
        "# small\\_one, compact export",
        "pretrained with earlybert for 13 steps of 15: its training was not finished. It was cut to its "
        "early-bird lottery ticket at step 6,",
        f"| parameters | {dense - 88:,} | {small:,} |",
        "| attention heads | 8 | 4 |",
        "| FFN neurons | 80 | 15 |",
        f"head) | 1 | {share:.3f} |",
        "trained model: 1.25e-06.",
        "- Step 6: keep 4 of 8 heads, 15 of 80 neurons (settled: distance 0.000 heads, 0.041 neurons)",
        "step 6: heads 0.000, neurons 0.041",
        "| 0 | 3 of 4 (0, 2, 3) | 13 of 40 |",
        "| 1 | 1 of 4 (1) | 2 of 40 |",
        "| books | 5 | 1,234 |",
        "In all 20 documents",
        "5.000% of the documents were held out",
        "- 13 optimizer steps, 512 tokens with padding",
        "- 3m08s of training steps and draws, evaluations and saves not counted, on 2 processes (cpu)",
        "| 0 | 6.5000 |\n| 6 (draw) | 6.2500 |\n| 13 | 6.0312 |",
        "| 5 | 16 | 4 | 0.0003 | 10% | linear |",
        "- bf16, ZeRO-2, 2 processes\n",
        "- versions: torch 2.99, python 3.11.9, earlybert commit c0ffee",
    ):
        assert line in page, line
    assert str(tmp_path) not in page
    assert metadata(page) == {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["bert", "earlybert", "lottery-ticket"],
    }


@pytest.mark.parametrize(
    ("settings", "language"),
    [
        ({"language": "it", "only_language": False}, "it"),
        ({"language": "en", "only_language": True}, "en"),
        ({"language": "no", "only_language": True}, "no"),  # in YAML a bare no is false
        ({"language": "en", "only_language": False}, None),  # what every corpus says that was told nothing
    ],
)
def test_the_language_is_said_where_the_corpus_says_it(run, source, settings, language):
    training = Training.read(*run)
    corpus = dataclasses.replace(training.corpus, settings=settings)
    page = page_of(source, dataclasses.replace(training, corpus=corpus))
    assert metadata(page).get("language") == language


def test_what_a_run_does_not_tell_is_left_out(run, source):
    folder, manifest = run
    (folder / "environment.json").unlink()
    manifest = dataclasses.replace(
        manifest, corpus="of another text", progress=Progress().to_json(), trainer={}, versions={}
    )
    page = page_of(source, Training.read(folder, manifest), kept=None)
    assert "None" not in page and "## Ticket" not in page and "## What it was trained on" not in page
    assert "held-out" not in page and "versions" not in page and "3m08s" not in page
    assert "Nothing was evaluated" in page and "- 13 optimizer steps" in page
    alone = page_of(source, None, kept=None)
    assert "## Training" not in alone and "# EarlyBERT, compact export" in alone
    assert metadata(alone)["library_name"] == "transformers"
    shutil.rmtree(folder.parent.parent / "corpus")
    assert Training.read(folder, manifest).corpus is None


def test_names_mean_nothing_to_markdown(run, source):
    training = Training.read(*run)
    corpus = dataclasses.replace(training.corpus, sources={"a|b\n---\n<img>": {"documents": 1, "tokens": 2}})
    page = page_of(source, dataclasses.replace(training, corpus=corpus))
    assert "| a\\|b --- \\<img\\> | 1 | 2 |" in page and metadata(page)


@pytest.mark.parametrize("form", ["compact", "dense"])
def test_the_lines_of_the_card_load_the_export(run, source, tmp_path, form):
    training = Training.read(*run)
    export(dataclasses.replace(source, training=training), to=tmp_path / "out", form=form)
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(lines) == (2 if form == "compact" else 1)
    for snippet in lines:
        names = {}
        exec(snippet.replace("path/of/this/folder", str(tmp_path / "out")), names)
        assert names["model"].config.hidden_size == 32
    assert ("as zeros" in page) == (form == "dense")
