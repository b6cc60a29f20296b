import datetime
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from typing import Literal

import pytest

from earlybert.config import (
    EarlyBertError,
    SettingsError,
    as_dict,
    override,
    parse,
    read_json,
    read_json_lines,
    read_toml,
    to_toml,
    write_atomically,
)


@dataclass(frozen=True)
class Inner:
    size: int
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    rate: float = 1.0
    many: tuple[Inner, ...] = ()
    name: str | None = None
    flags: tuple[float, ...] = field(default=(1.0,))
    own: Inner = field(default_factory=lambda: Inner(7, "b"))


GOOD = {"inner": {"size": 3}, "rate": 2, "many": [{"size": 1}, {"size": 2, "kind": "b"}], "name": "x"}


def test_settings_survive_toml():
    settings = parse(Outer, GOOD, where="f")
    assert settings.rate == 2.0 and settings.many[1].kind == "b"
    assert parse(Outer, tomllib.loads(to_toml(as_dict(settings))), where="again") == settings


@pytest.mark.parametrize("given", [{"own": {"size": 3}}, {"own": {}}, {}])
def test_a_table_given_in_part_keeps_the_rest_of_what_its_place_has_as_default(given):
    settings = parse(Outer, {"inner": {"size": 1}, **given}, where="f")
    assert settings.own == Inner(given.get("own", {}).get("size", 7), "b")
    assert settings.inner.kind == "a"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rat": 1}, "f: unknown setting 'rat'; did you mean 'rate'"),
        ({"inner": {"sise": 1, "size": 1}}, "f: inner: unknown setting 'sise'; did you mean 'size'"),
        ({"inner": {}}, "the setting 'size' is missing"),
        ({"inner": {"size": "3"}}, "size = '3': expected a whole number"),
        ({"inner": {"size": True}}, "expected a whole number"),
        ({"rate": float("inf")}, "rate = inf: expected a finite number"),
        ({"flags": [float("nan")]}, "nan: expected a finite number"),
        ({"name": datetime.date(2025, 6, 1)}, "expected a text, got date"),
        ({"inner": {"size": 1, "kind": "c"}}, "choose one of 'a', 'b'"),
        ({"many": {"size": 1}}, "expected a list"),
    ],
)
def test_a_mistake_names_the_place_the_value_and_the_remedy(change, says):
    with pytest.raises(SettingsError, match=says):
        parse(Outer, {**GOOD, **change}, where="f")


def test_overrides_reach_into_tables_and_arrays():
    values = override(GOOD, ["inner.size=9", "many.0.kind=b", "name=2025-06-01", "rate=1e-3"])
    assert values["inner"]["size"] == 9 and values["many"][0]["kind"] == "b"
    assert values["name"] == "2025-06-01" and values["rate"] == 1e-3
    assert GOOD["inner"]["size"] == 3
    assert override(GOOD, ["name=some text"])["name"] == "some text"
    with pytest.raises(SettingsError, match="many.7"):
        override(GOOD, ["many.7.size=1"])
    with pytest.raises(SettingsError, match="key=value"):
        override(GOOD, ["steps"])


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(SettingsError, match="missing.toml"):
        read_toml(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(SettingsError, match="bad.toml: not valid TOML"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(SettingsError, match="'a' stands twice"):
        read_json(tmp_path / "twice.json")


def test_json_lines_leave_out_one_that_is_being_written_and_name_a_damaged_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    for damaged in (b'{"step": 1}\n{"st\n{"step": 3}\n', b'{"step": 1}\n\xff\n', b'{"step": 1}\n7\n'):
        path.write_bytes(damaged)
        with pytest.raises(EarlyBertError, match="metrics.jsonl, line 2 is"):
            read_json_lines(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def ended(body):
    """(exit status, stderr) of a command with this body."""
    program = f"from earlybert.config import run_command\ndef main():\n    {body}\nrun_command(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_path_that_is_wrong_is_one_line_that_names_it_and_our_line(tmp_path):
    body = f"from earlybert.config import write_atomically; write_atomically('{tmp_path}/no/x', '')"
    code, said = ended(body)
    assert code == 2 and re.fullmatch(
        rf"error: {tmp_path}/no/\.x\.\d+\.tmp: No such file or directory "
        r"\(earlybert/config\.py, line \d+\)\n",
        said,
    )
    code, said = ended(f"from pathlib import Path; (Path('/dev/null') / 'x').mkdir()  # {tmp_path}")
    assert code == 2 and said == "error: /dev/null/x: Not a directory\n"


@pytest.mark.parametrize("body", ["raise OSError(5, 'lost', 'x')", "raise FileNotFoundError('x')", "{}['x']"])
def test_other_failures_keep_their_traceback(body):
    code, said = ended(body)
    assert code == 1 and said.startswith("Traceback")


def test_an_error_is_the_last_line_of_a_log_whatever_libraries_printed_before_it():
    program = (
        "import sys; from earlybert.config import EarlyBertError, run_command\n"
        "def main():\n    print('from a library')\n    raise EarlyBertError('no corpus')\n"
        "run_command(main)"
    )
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "from a library\nerror: no corpus\n"
