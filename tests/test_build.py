"""Claims about building a corpus folder."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import build as room
from data_prep import duplicates, executors, folders, steps, vocab
from data_prep.build import BuildSettings, build
from data_prep.report import report
from earlybert.config import EarlyBertError
from earlybert.shards import Corpus, Manifest
from texts import content, prose, quiet, settings, write_texts


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def test_every_sentence_comes_back_from_the_shards(texts: Path, tmp_path: Path) -> None:
    build(settings(texts), tmp_path / "out", tell=quiet)
    corpus = Corpus.open(tmp_path / "out", verify="checksum")
    tokenizer = vocab.load(corpus.tokenizer_folder)
    found = {}
    for i in range(len(corpus)):
        tokens, starts = corpus.document(i)
        assert corpus.origin(i)[0] == "text"
        found[corpus.origin(i)[1]] = [part.tolist() for part in np.split(tokens, starts[1:])]
    assert sorted(found) == [f"{i:02d}.txt" for i in range(12)]
    for i in range(12):
        sentences = [s + "." for s in prose(i).removesuffix(".").split(". The ")]
        sentences = [s if s.startswith("The ") else f"The {s}" for s in sentences]
        expected = [tokenizer.encode(s, add_special_tokens=False).ids for s in sentences]
        assert found[f"{i:02d}.txt"] == expected


def test_statistics_say_what_was_dropped_and_why(texts: Path, tmp_path: Path) -> None:
    manifest = build(settings(texts), tmp_path / "out", tell=quiet)
    row = manifest.statistics["sources"][0]
    assert row["documents_read"] == 14 and row["documents"] == manifest.documents == 12
    assert row["dropped"] == {"empty after cleaning": 1, "fewer than 15 words": 1}
    assert row["sentences"] == manifest.sentences == 144
    assert row["tokens"] == manifest.tokens == sum(s.tokens for s in manifest.shards)
    assert manifest.sources == {"text": {"documents": 12, "tokens": manifest.tokens}}
    said = "\n".join(report(manifest))
    assert "dropped 1: fewer than 15 words" in said and "kept 12 documents" in said


def test_long_documents_go_where_that_is_asked_for(texts: Path, tmp_path: Path) -> None:
    (texts / "97.txt").write_text(prose(97, sentences=40))
    manifest = build(settings(texts, max_words=200, reserved=70), tmp_path / "out", tell=quiet)
    row = manifest.statistics["sources"][0]
    assert row["dropped"]["more than 200 words"] == 1 and manifest.documents == 12
    assert row["examples"]["more than 200 words"] == ["97.txt"]
    assert manifest.vocab_size == 320  # 192 and 70 reserved, to a multiple of 64


def test_the_number_of_processes_does_not_change_a_byte(texts: Path, tmp_path: Path) -> None:
    build(settings(texts, workers=1), tmp_path / "one", tell=quiet)
    build(settings(texts, workers=3), tmp_path / "three", tell=quiet)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert len(list((tmp_path / "one").glob("shard-*-of-00003.arrow"))) == 3


@pytest.mark.parametrize("tasks", [1, 5, 40])
def test_documents_and_vocabulary_are_the_same_for_any_number_of_tasks(
    tasks: int, texts: Path, tmp_path: Path
) -> None:
    many = build(settings(texts, tasks=tasks), tmp_path / "many", tell=quiet)
    three = build(settings(texts), tmp_path / "three", tell=quiet)
    assert many.tokenizer_sha256 == three.tokenizer_sha256
    assert many.statistics == three.statistics
    assert many.fingerprint != three.fingerprint
    assert len(Corpus.open(tmp_path / "many")) == 12


def test_the_same_command_again_does_nothing(texts: Path, tmp_path: Path) -> None:
    first = build(settings(texts), tmp_path / "out", tell=quiet)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    said: list[str] = []
    assert build(settings(texts, workers=2), tmp_path / "out", tell=said.append) == first
    assert len(said) == 1 and "already prepared" in said[0]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_other_settings_are_refused_and_overwrite_replaces(texts: Path, tmp_path: Path) -> None:
    build(settings(texts), tmp_path / "out", tell=quiet)
    before = content(tmp_path / "out")
    with pytest.raises(
        EarlyBertError, match=r"other settings \(vocab_size 192 there, 200 asked\).*--overwrite"
    ):
        build(settings(texts, vocab_size=200), tmp_path / "out", tell=quiet)
    assert content(tmp_path / "out") == before
    manifest = build(settings(texts, vocab_size=200, tasks=2), tmp_path / "out", overwrite=True, tell=quiet)
    assert manifest.vocab_size == 256
    assert sorted(content(tmp_path / "out")) == [
        "manifest.json",
        "shard-00000-of-00002.arrow",
        "shard-00001-of-00002.arrow",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.txt",
    ]


def test_a_changed_source_is_another_corpus(texts: Path, tmp_path: Path) -> None:
    build(settings(texts), tmp_path / "out", tell=quiet)
    (texts / "00.txt").write_text(prose(100))
    with pytest.raises(EarlyBertError, match=r"other settings .another source"):
        build(settings(texts), tmp_path / "out", tell=quiet)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_leaves_nothing_and_says_what_it_was(workers: int, texts: Path, tmp_path: Path) -> None:
    (texts / "50.txt").write_bytes(b"caf\xe9")
    with pytest.raises(EarlyBertError, match=r"50\.txt: not UTF-8: byte 0xe9 at offset 3"):
        build(settings(texts, workers=workers), tmp_path / "out", tell=quiet)
    assert not (tmp_path / "out").exists()


def test_bad_input_leaves_an_older_corpus_alone(texts: Path, tmp_path: Path) -> None:
    build(settings(texts), tmp_path / "out", tell=quiet)
    before = content(tmp_path / "out")
    with pytest.raises(EarlyBertError, match="too little text for --vocab-size 8192"):
        build(settings(texts, vocab_size=8192), tmp_path / "out", overwrite=True, tell=quiet)
    assert content(tmp_path / "out") == before


def test_a_source_that_gives_no_text_is_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words only.")
    words = (f"text:{texts}/*.txt", f"text:{tmp_path}/short.txt")
    with pytest.raises(EarlyBertError, match=r"short\.txt' is empty: .*1 fewer than 15 words.*--min-words"):
        build(settings(texts, sources=words), tmp_path / "out", tell=quiet)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").touch()
    with pytest.raises(EarlyBertError, match=r"holds 'thesis\.doc', which is no part of a corpus"):
        build(settings(texts), tmp_path / "out", tell=quiet)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "thesis.doc"]


def test_two_runs_at_once_are_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        folders.locked(tmp_path / "out"),
        pytest.raises(EarlyBertError, match="being prepared by another process"),
    ):
        build(settings(texts), tmp_path / "out", tell=quiet)


class _Interruption(BaseException):
    """As Ctrl-C: no error of the program."""


@pytest.mark.parametrize("stage", ["Stage", "Signature", "Unique", "Tokenize", "Shard"])
def test_an_interrupted_build_goes_on_and_ends_the_same(
    stage: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(settings(texts), tmp_path / "whole", tell=quiet)
    step = getattr(steps, stage, None) or getattr(duplicates, stage)
    original = step.run
    ran = []

    def run(self: Any, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        ran.append(rank)
        if len(ran) == 2:
            raise _Interruption
        return original(self, data, rank, world_size)

    monkeypatch.setattr(step, "run", run)
    with pytest.raises(_Interruption):
        build(settings(texts), tmp_path / "out", tell=quiet)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert build(settings(texts), tmp_path / "out", tell=quiet) == whole
    assert ran[:4] == [0, 1, 1, 2]  # task 0 was not done again
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_crash_while_publishing_is_mended(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(settings(texts), tmp_path / "whole", tell=quiet)

    def crash(*_: Any) -> None:
        raise _Interruption

    with monkeypatch.context() as patch:
        patch.setattr(room, "write_manifest", crash)
        with pytest.raises(_Interruption):
            build(settings(texts), tmp_path / "out", tell=quiet)
    build(settings(texts), tmp_path / "out", tell=quiet)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


class _Dies(steps.PipelineStep):
    """A step whose process the kernel kills."""

    name, type = "dies", "0"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return data


class _Waits(_Dies):
    """A step that says which process it is in and then takes for ever."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        (Path(self.folder) / f"worker-{os.getpid()}").touch()
        time.sleep(600)
        return data


class _Breaks(_Dies):
    """A step with an error of our own making."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        raise OSError(28, "No space left on device")


def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    executor = executors.LocalExecutor(pipeline=[_Dies()], tasks=4, workers=2, logging_dir=str(tmp_path))
    with pytest.raises(executors.TaskError, match=r"ended with code -9 .*--workers"):
        executor.run()


def _runs(process: int) -> bool:
    """Whether a process is there and no zombie that nobody has reaped."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_worker_outlives_a_killed_command(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]; import test_build as t; from data_prep import executors\n"
        "if __name__ == '__main__':\n"
        "    wait = t._Waits(sys.argv[1])\n"
        "    executors.LocalExecutor(pipeline=[wait], tasks=2, workers=2, logging_dir=sys.argv[1]).run()\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    here = Path(__file__).resolve().parent
    command = subprocess.Popen([sys.executable, str(script), str(tmp_path), str(here), str(here.parent)])
    deadline = time.monotonic() + 60
    while len(workers := list(tmp_path.glob("worker-*"))) < 2:
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    command.kill()
    command.wait()
    while any(_runs(int(worker.name.removeprefix("worker-"))) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_other_error_is_one_message_that_names_the_log(
    workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    executor = executors.LocalExecutor(
        pipeline=[_Breaks()], tasks=2, workers=workers, logging_dir=str(tmp_path)
    )
    with pytest.raises(
        executors.TaskError, match=r"failed: OSError: .*No space left.*its log is .*task_0000"
    ) as caught:
        executor.run()
    log = str(caught.value).split("its log is ")[1].split(",")[0]
    assert "Traceback" in Path(log).read_text()
    assert "Traceback" not in capfd.readouterr().err


def test_a_given_tokenizer_is_used_as_it_is(texts: Path, tmp_path: Path) -> None:
    first = build(settings(texts), tmp_path / "first", tell=quiet)
    given = settings(texts, vocab_size=None, tokenizer=str(tmp_path / "first" / "tokenizer"))
    second = build(given, tmp_path / "second", tell=quiet)
    assert second.tokenizer_sha256 == first.tokenizer_sha256
    assert second.fingerprint != first.fingerprint
    assert [s.sha256 for s in second.shards] == [s.sha256 for s in first.shards]
    with pytest.raises(EarlyBertError, match=r"tokenizer\.json says what becomes of upper case"):
        build(dataclasses.replace(given, letters=vocab.Letters(cased=True)), tmp_path / "third", tell=quiet)


def test_the_vocabulary_sample_is_chosen_by_the_seed(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_VOCABULARY_CHARACTERS", 4000)
    hashes = [
        build(settings(texts, seed=seed), tmp_path / name, tell=quiet).tokenizer_sha256
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "no source"),
        ({"sources": ("python-docs", "python-docs")}, "given twice"),
        ({"tokenizer": "x"}, "both given"),
        ({"tasks": 0}, "--tasks 0"),
        ({"workers": 0}, "--workers 0"),
        ({"min_words": -1}, "--min-words -1"),
        ({"max_words": 7}, "--max-words 7: at least --min-words"),
        ({"reserved": -1}, "--reserved -1"),
        (
            {"reserved": 9, "vocab_size": None, "tokenizer": "x"},
            "--tokenizer and --reserved 9 are both given",
        ),
        ({"vocab_size": 7}, "--vocab-size 7"),
        ({"language": "English"}, "--language 'English'"),
    ],
)
def test_settings_check_themselves(changes: dict[str, Any], message: str, texts: Path) -> None:
    with pytest.raises(EarlyBertError, match=message):
        settings(texts, **changes)


def test_the_manifest_is_a_plain_value(texts: Path, tmp_path: Path) -> None:
    manifest = build(settings(texts), tmp_path / "out", tell=quiet)
    assert isinstance(manifest, Manifest) and str(tmp_path) not in str(dataclasses.asdict(manifest))


@pytest.mark.thorough
def test_documents_in_another_language_go_where_that_is_asked_for(tmp_path: Path) -> None:
    english = (
        "The committee of the museum decided in the spring that the old house by the river would be kept."
    )
    german = (
        "Der Ausschuss des Museums beschloss im Frühling, dass das alte Haus am Fluss erhalten bleiben soll."
    )
    rows = [{"id": f"en{i}", "text": f"{english} It was house number {i}. " * 3} for i in range(20)]
    rows += [{"id": f"de{i}", "text": f"{german} Es war das Haus mit der Nummer {i}. " * 3} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    manifests = [
        build(
            BuildSettings(
                sources=(f"jsonl:{tmp_path}/a.jsonl",), vocab_size=128, deduplicate="none", only_language=only
            ),
            tmp_path / str(only), tell=quiet,
        )
        for only in (False, True)
    ]  # fmt: skip
    assert [manifest.documents for manifest in manifests] == [25, 20]
    (row,) = manifests[1].statistics["sources"]
    assert row["dropped"] == {"in de, not en": 5}
    assert set(row["examples"]["in de, not en"]) <= {f"de{i}" for i in range(5)}
    assert "  dropped 5: in de, not en (such as 'de" in "\n".join(report(manifests[1]))
