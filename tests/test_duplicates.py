"""Documents that are there twice go, over sources and tasks; what is only alike in subject stays."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from data_prep import duplicates
from data_prep.build import BuildSettings, build
from data_prep.executors import Where
from earlybert.shards import Corpus

SYLLABLES = ("ka", "lo", "mi", "nu", "pe", "ra", "so", "tu", "ve", "zi")
WORDS = [first + second + last for first in SYLLABLES for second in SYLLABLES for last in "bdgkmt"]


def article(seed: int, *, words: int = 120) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) + (". " if i % 12 == 11 else "") for i in range(words)) + "."


def changed(text: str, share: float, seed: int) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) if chance.random() < share else word for word in text.split())


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the runs of five words."""
    runs = [{tuple(t.lower().split()[i : i + 5]) for i in range(len(t.split()) - 4)} for t in (a, b)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def corpus_of(tmp_path: Path, first: list[str], second: list[str], **settings) -> tuple[set[str], list[str]]:
    """Prepare two sources; ids that are left, and what was told."""
    for name, texts in (("a", first), ("b", second)):
        rows = [json.dumps({"id": f"{name}{i}", "text": text}) for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    told: list[str] = []
    out = tmp_path / "out"
    build(
        BuildSettings(
            sources=(f"jsonl:{tmp_path}/a.jsonl", f"jsonl:{tmp_path}/b.jsonl"), vocab_size=200, **settings
        ),
        out, tell=told.append,
    )  # fmt: skip
    corpus = Corpus.open(out, verify="checksum")
    return {id for shard in range(1) for id in ids_of(corpus)}, told


def ids_of(corpus: Corpus) -> list[str]:
    import pyarrow as pa

    found: list[str] = []
    for shard in corpus.manifest.shards:
        with pa.memory_map(str(corpus.folder / shard.name)) as file:
            for batch in pa.ipc.open_stream(file):
                found += batch.column("id").to_pylist()
    return found


def test_near_duplicates_go_over_sources_and_tasks_and_the_rest_stays(tmp_path):
    articles = [article(seed) for seed in range(40)]
    copies = [articles[i].replace(articles[i].split()[60], "another", 1) for i in range(10)]
    cousins = [changed(articles[i], 0.5, i) for i in range(10, 20)]  # nothing like them
    assert min(map(similarity, articles, copies)) > 0.8
    assert max(map(similarity, articles[10:20], cousins)) < 0.1
    left, told = corpus_of(tmp_path, articles, [*copies, *cousins, articles[30]], tasks=3)
    for i in range(10):
        assert len({f"a{i}", f"b{i}"} & left) == 1, "one of each pair stays"
    assert {f"a{i}" for i in range(10, 30)} <= left and {f"b{i}" for i in range(10, 20)} <= left
    assert len({"a30", "b20"} & left) == 1 and len(left) == 40 + 10
    assert sum(line.startswith("  a duplicate: ") for line in told) == 3, "examples are shown"
    statistics = json.loads((tmp_path / "out" / "manifest.json").read_text())["statistics"]["sources"]
    assert sum(row["dropped"].get("near duplicate", 0) for row in statistics) == 11
    assert any(row["examples"].get("near duplicate") for row in statistics)
    kept = sum(len(text.split()) for text in articles) + sum(len(text.split()) for text in cousins)
    assert abs(sum(row["words"] for row in statistics) - kept) < 40, "what went is not counted"


def test_exact_takes_only_what_is_equal_but_for_case_and_signs(tmp_path):
    articles = [article(seed) for seed in range(6)]
    second = [articles[0].upper(), f"{articles[1]} More.", articles[2].replace(".", " ;")]
    left, _ = corpus_of(tmp_path, articles, second, tasks=2, deduplicate="exact")
    assert len({"a0", "b0"} & left) == 1 and {"a1", "b1"} <= left and len({"a2", "b2"} & left) == 1


def test_none_keeps_everything(tmp_path):
    left, _ = corpus_of(tmp_path, [article(1)] * 3, [article(1), article(2)], tasks=2, deduplicate="none")
    assert left == {"a0", "a1", "a2", "b0", "b1"}


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path):
    texts = [article(seed % 7) for seed in range(21)]
    manifests = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        corpus_of(folder, texts, [article(100)], tasks=3, where=Where(workers=workers))
        manifests.append(json.loads((folder / "out" / "manifest.json").read_text())["shards"])
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("kind", ["near", "exact"])
def test_the_hashes_of_a_long_document_are_those_of_its_pieces_together(tmp_path, kind, monkeypatch):
    """And the probability that a group agrees is that of the similarity, by simulation."""
    step = duplicates.Signature(tmp_path, kind=kind)
    shingles = step.get_shingles(article(3, words=5000))
    whole = step.get_signature(shingles)
    monkeypatch.setattr(duplicates, "_PIECE", 7)
    assert step.get_signature(shingles) == whole


def test_minimal_hashes_agree_as_often_as_documents_are_alike(tmp_path):
    step = duplicates.Signature(tmp_path, kind="near")
    base = article(5, words=2000)
    for share in (0.005, 0.02, 0.1):
        other = changed(base, share, 6)
        a, b = (np.concatenate(step.get_signature(step.get_shingles(text))) for text in (base, other))
        expected = similarity(base.replace(".", ""), other.replace(".", ""))
        assert abs((a == b).mean() - expected) < 0.15, "112 draws"
