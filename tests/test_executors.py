"""The same steps on other executors give the same corpus."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import slurm
from data_prep import executors
from data_prep.build import build
from data_prep.executors import Where
from earlybert.config import EarlyBertError
from texts import content, quiet, settings, write_texts

SMALL = {"tasks": 2, "deduplicate": "exact"}
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "prepare.py"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


@pytest.fixture(autouse=True)
def _all_stages_on_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.build._SMALL", 0)


@pytest.fixture(scope="module")
def ray_of_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": f"{SCRIPT.parent.parent}:{SCRIPT.parent.parent / 'tests'}"}},
    )
    yield
    ray.shutdown()


@pytest.mark.thorough
def test_ray_with_two_workers_gives_the_same_bytes(ray_of_two: None, texts: Path, tmp_path: Path) -> None:
    build(settings(texts, **SMALL), tmp_path / "local", tell=quiet)
    where = Where(kind="ray", workers=2, memory=0.1)
    build(settings(texts, where=where, **SMALL), tmp_path / "ray", tell=quiet)
    assert content(tmp_path / "ray") == content(tmp_path / "local")


@pytest.mark.thorough
def test_an_error_on_ray_is_the_same_one_line(ray_of_two: None, texts: Path, tmp_path: Path) -> None:
    (texts / "50.txt").write_bytes(b"caf\xe9")
    where = Where(kind="ray", workers=2, memory=0.1)
    with pytest.raises(EarlyBertError, match=r"50\.txt: not UTF-8: byte 0xe9 at offset 3") as caught:
        build(settings(texts, where=where), tmp_path / "out", tell=quiet)
    assert not isinstance(caught.value, executors.TaskError)
    assert not (tmp_path / "out").exists()


SBATCH = """#!/bin/bash
# Keeps the job file and runs its array at once, as a cluster of one host would.
script="${@: -1}"; count=$(ls {folder}/*.job 2>/dev/null | wc -l); cp "$script" {folder}/$count.job
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for i in $(seq 0 $last); do
  SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash "$script" > {folder}/$count-$i.out 2>&1
done
echo "Submitted batch job $((100 + count))"
"""


@pytest.fixture
def pretended_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    programs = {"sbatch": SBATCH.replace("{folder}", str(folder)), "scontrol": "#!/bin/sh\necho here\n"}
    for name, text in (programs | {"squeue": "#!/bin/sh\n"}).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


@pytest.mark.thorough
def test_the_job_files_for_slurm_say_what_was_asked_and_give_the_same_bytes(
    pretended_slurm: Path, texts: Path, tmp_path: Path
) -> None:
    build(settings(texts, **SMALL), tmp_path / "local", tell=quiet)
    where = Where(kind="slurm", workers=2, memory=1.5, sbatch={"time": "1:00:00", "account": "we"})
    build(settings(texts, where=where, **SMALL), tmp_path / "out", tell=quiet)
    assert content(tmp_path / "out") == content(tmp_path / "local")
    jobs = {path.read_text() for path in pretended_slurm.glob("*.job")}
    first = next(job for job in jobs if "--job-name=earlybert-clean" in job)
    for line in ("--array=0-1%2", "--time=1:00:00", "--account=we", "--mem-per-cpu=1536M", "--requeue"):
        assert f"#SBATCH {line}\n" in first
    assert "--partition" not in first and "launch_pickled_pipeline" in first


def test_an_error_on_slurm_is_the_same_one_line(pretended_slurm: Path, texts: Path, tmp_path: Path) -> None:
    (texts / "50.txt").write_bytes(b"caf\xe9")
    with pytest.raises(EarlyBertError, match=r"50\.txt: not UTF-8: byte 0xe9 at offset 3"):
        build(settings(texts, where=Where(kind="slurm")), tmp_path / "out", tell=quiet)


def test_a_job_that_slurm_refuses_is_one_line(pretended_slurm: Path, texts: Path, tmp_path: Path) -> None:
    (pretended_slurm / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(
        EarlyBertError, match=r"sbatch refused the job.*launch_script\.slurm.*--sbatch KEY=VALUE"
    ):
        build(settings(texts, where=Where(kind="slurm")), tmp_path / "out", tell=quiet)


@pytest.mark.multinode
@pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))
def test_a_real_slurm_gives_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    build(settings(texts, **SMALL), tmp_path / "local", tell=quiet)
    (tmp_path / "slurm").mkdir()
    command = [
        sys.executable,
        SCRIPT,
        f"text:{texts}/*.txt",
        "--out",
        tmp_path / "out",
        "--vocab-size",
        "192",
    ]
    command += ["--tasks", "2", "--deduplicate", "exact", "--executor", "slurm", "--memory", "0.3"]
    with slurm.Slurm(tmp_path / "slurm") as cluster:
        said = cluster.run(*map(str, command))
    assert "is ready after" in said, said
    assert content(tmp_path / "out") == content(tmp_path / "local")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "spark"}, "--executor spark"),
        ({"workers": 0}, "--workers 0"),
        ({"memory": 0.0}, "--memory 0.0"),
        ({"memory": float("nan")}, "--memory nan"),
        ({"sbatch": {"a": "b"}}, "--sbatch is for --executor slurm"),
    ],
)
def test_settings_check_themselves(values: dict[str, Any], message: str) -> None:
    with pytest.raises(EarlyBertError, match=message):
        Where(**values)


def test_without_slurm_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EarlyBertError, match="no program sbatch here"):
        Where(kind="slurm")
