"""Settings that check themselves: a strict reader from TOML and `key=value` words into frozen dataclasses.

The surprise: an unknown key is an error, never ignored, and the message suggests the nearest known one. A
dataclass field may be a nested dataclass, a tuple of dataclasses (TOML's array of tables), a scalar, a tuple
of scalars, or any of those `| None`. Settings classes live beside the code that they steer; this module only
reads.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import difflib
import errno
import gc
import json
import math
import os
import sys
import tomllib
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_ROOT = Path(__file__).resolve().parent.parent


_OF_PATHS = frozenset(
    {
        errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EACCES, errno.EPERM,
        errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP,
    }
)  # fmt: skip
"""What is wrong with a path, and is for the user to mend."""


class EarlyBertError(ValueError):
    """A mistake that the user can mend: the message names the thing, the value and the remedy."""

    exit_code = 2
    """Of a command that it ends."""


class SettingsError(EarlyBertError):
    """A setting that is unknown, of the wrong type or out of range."""


def parse(cls: type[T], values: Mapping[str, Any], *, where: str, base: T | None = None) -> T:
    """Build the dataclass `cls` from nested mappings; what they leave out is as in `base`, or as its default.

    `where` names the origin (a file, a section) in messages. Raises SettingsError for an unknown key, a value
    of the wrong type, a missing required key, and passes on what the class's own `__post_init__` raises,
    prefixed by `where`.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where}: expected a table of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    refuse_unknown(values, fields, where=where)
    built = {} if base is None else {name: getattr(base, name) for name in fields}
    for key, value in values.items():
        built[key] = _field(fields[key], hints[key], value, where=f"{where}: {key}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in built:
            raise SettingsError(f"{where}: the setting {name!r} is missing; add it")
    try:
        return cls(**built)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error


def refuse_unknown(values: Iterable[str], known: Iterable[str], *, where: str) -> None:
    """Raise SettingsError for the first key of `values` that is not in `known`, suggesting the nearest."""
    names = sorted(known)
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(names)}"
            raise SettingsError(f"{where}: unknown setting {key!r}; {hint}")


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file; raises SettingsError naming the file where it is missing or malformed."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError(
            f"{path}: {error.strerror or error}; give the path of an experiment file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object; raises SettingsError for a missing file, bad syntax or a key given twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise SettingsError(f"{path}: the key {key!r} stands twice; keep one")
            seen[key] = value
        return seen

    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file, object_pairs_hook=once)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}; give the path of a JSON file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def override(values: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Apply dotted `key=value` words (`model.layers=4`, `phases.0.steps=100`) to a copy of nested settings.

    A value is read as TOML where it is TOML (numbers, booleans, quoted strings, arrays) and as a bare string
    otherwise.
    """
    result = copy.deepcopy(dict(values))
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise SettingsError(f"override {word!r}: expected key=value, such as model.layers=4")
        _place(result, key.split("."), _scalar(text), word=word)
    return result


def as_dict(settings: Any) -> Any:
    """Turn settings back into plain dictionaries and lists; `None` fields are left out (TOML has no null)."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        pairs = ((f.name, getattr(settings, f.name)) for f in dataclasses.fields(settings) if f.init)
        return {name: as_dict(value) for name, value in pairs if value is not None}
    if isinstance(settings, (list, tuple)):
        return [as_dict(item) for item in settings]
    return settings


def to_toml(values: Mapping[str, Any]) -> str:
    """Write nested settings as TOML: scalars first, then tables, then arrays of tables."""
    lines: list[str] = []
    _toml_table(values, (), lines)
    return "\n".join(lines).strip() + "\n"


def write_atomically(path: str | os.PathLike[str], text: str | bytes) -> None:
    """Write a file so that it appears whole or not at all: temporary name, flush, fsync, rename."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    data = text.encode("utf-8") if isinstance(text, str) else text
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    sync_folder(target.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable (fsync of the directory)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit: one message and its `exit_code` for the user's mistakes, never a
    traceback for those. A path that is missing or cannot be written is one of them."""
    try:
        code = main()
    except EarlyBertError as error:
        _say_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in _OF_PATHS or not isinstance(error.filename, (str, os.PathLike)):
            raise
        _say_error(f"{os.fspath(error.filename)}: {error.strerror}{_place_of(error)}")
        sys.exit(EarlyBertError.exit_code)
    sys.exit(code or 0)


def _say_error(message: str) -> None:
    # What libraries print to a log would come after it otherwise, when the program ends.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)


def _place_of(error: OSError) -> str:
    """Where in our own code it came up, in brackets: the path may be one that no user has given."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_ROOT) and "site-packages" not in frame.filename
    ]
    return f" ({Path(ours[-1].filename).relative_to(_ROOT)}, line {ours[-1].lineno})" if ours else ""


@contextlib.contextmanager
def settled_imports() -> Iterator[None]:
    """Import a program's heavy packages inside, before its first model: no garbage collection looks at them.

    They leave some 400,000 objects that stay. While they come Python would look through them again and again,
    an eighth of the time; later in every tear-down, and in whatever step of whatever rank it happens to
    collect, half a second on a slow core. (What a model of before leaves in a cycle would never be freed.)
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _field(field: dataclasses.Field[Any], hint: Any, value: Any, *, where: str) -> Any:
    """Check the value of a field. A table that is given in part keeps the rest of the field's own default,
    which need not be that of the table's class."""
    make = field.default_factory
    if make is not dataclasses.MISSING and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return parse(hint, value, where=where, base=make())  # type: ignore[arg-type]
    return _value(hint, value, where=where)


def _value(hint: Any, value: Any, *, where: str) -> Any:
    """Check one value against its type hint; lists become tuples, mappings the hinted dataclass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        options = [a for a in arguments if a is not type(None)]
        failures = []
        for option in options:
            try:
                return _value(option, value, where=where)
            except SettingsError as error:
                failures.append(error)
        raise failures[0]
    if origin is typing.Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise SettingsError(f"{where} = {value!r}: choose one of {', '.join(map(repr, arguments))}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else parse(hint, value, where=where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{where} = {value!r}: expected a list")
        return tuple(_value(arguments[0], item, where=f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise SettingsError(f"{where} = {value!r}: expected a table")
        return {key: _value(arguments[1], item, where=f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{where} = {value!r}: expected a finite number")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (hint is not bool and isinstance(value, bool))):
        return value
    raise SettingsError(f"{where} = {value!r}: expected {_plain(hint)}, got {type(value).__name__}")


def _plain(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return words.get(hint, str(hint))


def _scalar(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return (
        text if isinstance(value, (datetime.date, datetime.time)) else value
    )  # none is a date, a name may be


def _place(node: Any, path: list[str], value: Any, *, word: str) -> None:
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise SettingsError(f"override {word!r}: {key!r} is not an index below {len(node)}")
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, {})
        else:
            raise SettingsError(f"override {word!r}: {'.'.join(path[:depth])} is a value, not a table")


def _toml_table(values: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    def tables(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)

    for key, value in values.items():
        if not isinstance(value, Mapping) and not tables(value):
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines.extend(["", f"[{'.'.join((*path, key))}]"])
            _toml_table(value, (*path, key), lines)
        elif tables(value):
            for item in value:
                lines.extend(["", f"[[{'.'.join((*path, key))}]]"])
                _toml_table(item, (*path, key), lines)
