"""Claims about `scripts/prepare.py` and `scripts/show.py` as a user runs them."""

import contextlib
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import ranks
import texts
from earlybert.shards import Corpus

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def prose(lines: int = 60) -> str:
    words = ["the", "old", "captain", "walked", "along", "river", "wrote", "quiet", "letters", "winter"]
    return "".join(
        f"On {hashlib.sha256(str(i % 20).encode()).hexdigest()[:8]} "
        + " ".join(words[(i * k + k) % len(words)] for k in range(1, 15))
        + ".\n"
        for i in range(lines)
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object], str]:
    """A prepared corpus, the arguments that made it, and what the command said."""
    folder = tmp_path_factory.mktemp("prepared")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"Number {i}.\n" + prose())
    arguments: list[object] = [
        f"text:{folder}/*.txt",
        "--out",
        folder / "corpora" / "c",
        "--deduplicate",
        "none",
        "--vocab-size",
        128,
    ]
    arguments += ["--tasks", 2]
    done = run("prepare.py", *arguments)
    assert done.returncode == 0, done.stderr
    return folder / "corpora" / "c", arguments, done.stdout


def test_prepare_reports_what_went_in_and_came_out(corpus: tuple[Path, list[object], str]) -> None:
    folder, _, said = corpus
    assert len(Corpus.open(folder, verify="checksum")) == 4
    assert "kept 4 documents" in said and "vocabulary 128" in said and "is ready after" in said
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "shard-00000-of-00002.arrow",
        "shard-00001-of-00002.arrow",
        "tokenizer",
    ]


def test_the_same_command_again_is_done_at_once(corpus: tuple[Path, list[object], str]) -> None:
    done = run("prepare.py", *corpus[1])
    assert done.returncode == 0 and "already prepared" in done.stdout


def test_other_settings_are_refused_with_the_remedy(corpus: tuple[Path, list[object], str]) -> None:
    done = run("prepare.py", *corpus[1], "--min-words", "3")
    assert done.returncode == 2
    assert "min_words 15 there, 3 asked" in done.stderr and "--overwrite" in done.stderr


def test_show_describes_a_corpus(corpus: tuple[Path, list[object], str]) -> None:
    done = run("show.py", corpus[0], "--verify", "--document", "1")
    assert done.returncode == 0, done.stderr
    for part in (
        "kept 4 documents",
        "share of text: 100.0% of the tokens, 100.0% of the documents",
        "WordPieces a word: ",
        " tokens and more:           4 ########################################",
        "every checksum is right",
        "document 1 (text, ",
    ):
        assert part in done.stdout
    assert "  | number " in done.stdout and "captain" in done.stdout


def test_datasets_opens_a_shard(corpus: tuple[Path, list[object], str]) -> None:
    from datasets import Dataset

    rows = Dataset.from_file(str(corpus[0] / "shard-00000-of-00002.arrow"))
    assert rows.column_names == ["tokens", "sentence_starts", "source", "id"] and len(rows) == 2


def test_an_error_in_a_worker_process_is_one_line_too(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(prose())
    (tmp_path / "3.txt").write_bytes(b"na\xefve")
    arguments = ["--out", tmp_path / "out", "--vocab-size", "8192", "--tasks", "2", "--workers", "2"]
    done = run("prepare.py", f"text:{tmp_path}/*.txt", *arguments)
    assert done.returncode == 2 and "3.txt: not UTF-8: byte 0xef at offset 2" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_show_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert "no such file" in run("show.py", tmp_path / "none").stderr
    done = run("show.py", tmp_path)
    assert done.returncode == 2 and "is none of: checkpoint, run, corpus, ticket" in done.stderr


@pytest.mark.thorough
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not on this machine")
def test_a_real_dump_becomes_a_corpus(tmp_path: Path) -> None:
    dump = SHARED / "wikipedia" / "enwiki-201605-206-pages.xml.bz2"
    arguments = ["--out", tmp_path / "out", "--vocab-size", "8000", "--tasks", "2"]
    done = run("prepare.py", f"wikipedia:{dump}", *arguments)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    row = manifest["statistics"]["sources"][0]
    assert row["documents_read"] == 206
    assert (row["dropped"]["redirect"], row["dropped"]["other namespace"]) == (99, 1)
    assert manifest["documents"] >= 95 and manifest["tokens"] > 400_000
    assert manifest["sources"].keys() == {"wikipedia"}


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [1])
def test_a_command_killed_at_any_moments_ends_with_the_same_bytes(seed: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(6):
        (source / f"{i}.txt").write_text("\n\n".join(texts.prose(100 * i + j) for j in range(150)))
    words = [f"text:{source}/*.txt", "--vocab-size", "256", "--tasks", "3", "--workers", "2"]
    script = str(ROOT / "scripts" / "prepare.py")

    def start(out: str) -> ranks.Rank:
        (process,) = ranks.launch(script, [*words, "--out", str(tmp_path / out)], ranks=1, logs=tmp_path)
        return process

    assert start("whole").wait(timeout=120) == 0
    chance = random.Random(seed)
    kills = 0
    for _ in range(6):
        process = start("out")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=chance.uniform(0, 0.8))  # of about two
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 2
    assert start("out").wait(timeout=120) == 0
    assert texts.content(tmp_path / "out") == texts.content(tmp_path / "whole")
