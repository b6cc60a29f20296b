"""Nothing that is loaded can run code: a pickle planted anywhere is refused, whoever wrote its checksum."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

import earlybert
import ranks
import tiny
from corpora import random_documents, write_corpus
from data_prep import vocab
from earlybert import checkpoint
from earlybert.config import EarlyBertError
from earlybert.masking import read_vocabulary
from earlybert.shards import Corpus, file_sha256, read_manifest, tokenizer_sha256
from earlybert.ticket import Ticket

ROOT = Path(__file__).parent.parent
WHAT = {"experiment": "e", "corpus": "c", "precision": "fp32"}


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def bomb(tmp_path):
    """Bytes that make a folder when they are unpickled; no test may leave it behind."""
    mark = tmp_path / "it-ran"
    content = pickle.dumps(Bomb(mark))
    pickle.loads(content)
    assert mark.is_dir(), "the bomb works"
    mark.rmdir()
    yield content
    assert not mark.exists(), "code from a file was run"


def saved(folder):
    engine = tiny.engine(1, "fp32", tiny.settings())
    tiny.train(engine, range(2))
    checkpoint.save(engine, Path(folder), step=2, stage=1, keep=1, **WHAT)
    earlybert.save(engine, Path(folder) / "model", form="compact")
    engine.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ranks.run("test_no_code:saved", ranks=1, folder=str(folder))
    return folder


def test_a_pickle_in_place_of_a_rank_s_file_is_refused_although_its_checksum_agrees(run, tmp_path, bomb):
    folder = shutil.copytree(run / "step-0000002", tmp_path / "step-0000002")
    manifest = checkpoint.read_manifest(folder)
    (name,) = manifest.files
    (folder / name).write_bytes(bomb)
    manifest.files[name].update(bytes=len(bomb), sha256=file_sha256(folder / name))
    (folder / "manifest.json").write_text(checkpoint._sealed(manifest))
    found = checkpoint.newest_good(tmp_path)
    assert found is not None, "by its checksums it is good"
    with pytest.raises(EarlyBertError, match="not a file that a checkpoint has"):
        checkpoint.read(found)
    with pytest.raises(EarlyBertError, match="not a file that a checkpoint has"):
        checkpoint.weights(found)


def test_a_manifest_cannot_name_files_elsewhere(run, tmp_path, bomb):
    folder = shutil.copytree(run / "step-0000002", tmp_path / "step-0000002")
    (tmp_path / "outside").write_bytes(bomb)
    manifest = checkpoint.read_manifest(folder)
    entry = {"bytes": len(bomb), "sha256": file_sha256(tmp_path / "outside")}
    manifest.files["../outside"] = entry
    (folder / "manifest.json").write_text(checkpoint._sealed(manifest))
    assert checkpoint.flaws(folder, manifest) == ["'../outside' is no name of a file in this folder"]
    assert checkpoint.newest_good(tmp_path) is None


def test_a_pickle_as_manifest_or_ticket_is_refused(run, tmp_path, bomb):
    folder = shutil.copytree(run / "step-0000002", tmp_path / "step-0000002")
    (folder / "manifest.json").write_bytes(bomb)
    assert checkpoint.newest_good(tmp_path) is None
    (tmp_path / "ticket.json").write_bytes(bomb)
    with pytest.raises(EarlyBertError, match=r"ticket\.json: cannot be read as a ticket"):
        Ticket.load(tmp_path / "ticket.json")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_as_a_model_s_weights_is_refused(run, tmp_path, bomb, name):
    folder = shutil.copytree(run / "model", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(bomb)
    with pytest.raises(EarlyBertError, match="model"):
        earlybert.load(folder)


def test_modelling_code_beside_a_model_is_not_run(run, tmp_path, bomb):
    folder = shutil.copytree(run / "model", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForPreTraining": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "evil.py").write_text(f"import pickle\npickle.loads({bomb!r})\n")
    assert type(earlybert.load(folder)).__module__ == "earlybert.model"


def test_a_pickle_as_a_shard_of_a_corpus_is_refused_although_its_checksum_agrees(tmp_path, bomb):
    corpus = write_corpus(tmp_path / "corpus", random_documents(12, longest=60))
    shard = corpus.folder / corpus.manifest.shards[0].name
    del corpus
    shard.write_bytes(bomb)
    text = (tmp_path / "corpus" / "manifest.json").read_text()
    stated = read_manifest(tmp_path / "corpus").shards[0]
    text = text.replace(stated.sha256, file_sha256(shard)).replace(
        f'"bytes": {stated.bytes}', f'"bytes": {len(bomb)}'
    )
    (tmp_path / "corpus" / "manifest.json").write_text(text)
    with pytest.raises(EarlyBertError, match="not a readable Arrow stream"):
        Corpus.open(tmp_path / "corpus", verify="checksum")


def test_a_pickle_as_a_tokenizer_is_refused(tmp_path, bomb):
    corpus = write_corpus(tmp_path / "corpus", random_documents(12, longest=60))
    before = corpus.manifest.tokenizer_sha256
    (corpus.folder / "tokenizer" / "tokenizer.json").write_bytes(bomb)
    with pytest.raises(EarlyBertError, match="the shards were written with"):
        Corpus.open(corpus.folder)
    text = (corpus.folder / "manifest.json").read_text()
    text = text.replace(before, tokenizer_sha256(corpus.folder / "tokenizer"))
    (corpus.folder / "manifest.json").write_text(text)
    with pytest.raises(EarlyBertError, match=r"tokenizer\.json"):
        read_vocabulary(corpus.folder / "tokenizer")
    with pytest.raises(EarlyBertError, match=r"tokenizer\.json"):
        vocab.load(corpus.folder / "tokenizer")


def test_no_module_unpickles_a_file_or_trusts_a_folder_s_code():
    """`export` alone trusts code: its own, which it has just written, to compare the logits."""
    paths = [path for room in ("earlybert", "data_prep", "scripts") for path in (ROOT / room).rglob("*.py")]
    assert len(paths) > 50
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "np.load", "eval", "exec", "yaml.load"), (
                    f"{path}: {called}"
                )
                trusted = [k for k in node.keywords if k.arg in ("trust_remote_code", "allow_pickle")]
                false = all(isinstance(k.value, ast.Constant) and k.value.value is False for k in trusted)
                assert false or path.name == "export.py", f"{path}:{node.lineno} trusts code"
