"""Write docs/settings.md from the settings dataclasses: names, types, defaults and their docstrings.

    python scripts/settings.py            write it
    python scripts/settings.py --print    only print it

A setting is documented where it is defined, so the page cannot say something else than the program.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "settings.md"
sys.path.insert(0, str(ROOT))


def page() -> str:
    """The whole page as Markdown."""
    from earlybert.data import DataSettings
    from earlybert.experiment import (
        CheckpointSettings,
        EvaluateSettings,
        Experiment,
        ModelSettings,
        OptimizerSettings,
    )
    from earlybert.guard import GuardSettings
    from earlybert.recipes import Finetuning, RecipeSettings
    from earlybert.schedule import PhaseSettings
    from earlybert.ticket import TicketSettings

    tables = [
        ("Top of the file", Experiment),
        ("`[model]`", ModelSettings),
        ("`[data]`", DataSettings),
        ("`[[phases]]`, one table a phase", PhaseSettings),
        ("`[optimizer]`", OptimizerSettings),
        ("`[ticket]`", TicketSettings),
        ("`[evaluate]`", EvaluateSettings),
        ("`[checkpoint]`", CheckpointSettings),
        ("`[guard]`", GuardSettings),
    ]
    lines = [
        "# Settings of an experiment",
        "",
        "Made by `python scripts/settings.py` from the dataclasses that read them; do not edit by hand.",
        "An experiment is a TOML file such as those in [scripts/experiments](../scripts/experiments). Any",
        "setting can be changed on the command line by its dotted name: `model.layers=4 ticket.every=20",
        "phases.0.steps=500`. Engine mechanics (ZeRO stage, precision, offload) stand in a DeepSpeed JSON",
        "([ds_configs](../ds_configs)), which may not set anything of this page. Experiments of",
        "scripts/finetune.py ([scripts/experiments/finetune](../scripts/experiments/finetune)) have",
        "`[optimizer]` and `[ticket]` beside tables of their own; their defaults of those are",
        f"{_differing(Finetuning)}.",
    ]
    tables.append(("Fine-tuning: top of the file", Finetuning))
    tables.append(("Fine-tuning: `[recipe]`, and one `[[recipes]]` a task", RecipeSettings))
    for title, cls in tables:
        lines += ["", f"## {title}", "", "| setting | type | default | |", "|---|---|---|---|"]
        lines += list(_rows(cls))
    return "\n".join(lines) + "\n"


def _differing(cls: type) -> str:
    """The defaults of a class' tables that are not those of the tables' own classes."""
    told = []
    for field in dataclasses.fields(cls):
        if field.default_factory is dataclasses.MISSING:
            continue
        table = field.default_factory()
        if dataclasses.is_dataclass(table):
            told += [
                f"`{field.name}.{own.name}` {_shown(getattr(table, own.name))}"
                for own in dataclasses.fields(table)
                if own.default is not dataclasses.MISSING and getattr(table, own.name) != own.default
            ]
    return ", ".join(told)


def _rows(cls: type) -> Iterator[str]:
    told = _docstrings(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if dataclasses.is_dataclass(inner):
            continue  # a table of its own
        missing = field.default is dataclasses.MISSING
        default = "required" if missing else f"`{_shown(field.default)}`"
        text = told.get(field.name, "").replace("|", "\\|")
        yield f"| `{field.name}` | {_type(hint)} | {default} | {text} |"


def _docstrings(cls: type) -> dict[str, str]:
    """{field: the string directly beneath it}."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[statement.target.id] = " ".join(value.value.split())
    return found


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return repr(value).replace("'", '"').replace("None", "none")


def _type(hint: object) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f'`"{x}"`' for x in typing.get_args(hint))
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is tuple:
        return f"list of {_type(arguments[0])}"
    if typing.get_origin(hint) is dict:
        return f"table of {_type(arguments[1])}s"
    if arguments:
        return f"{_type(arguments[0])}, or absent"
    names = {int: "integer", float: "number", bool: "true or false", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))  # type: ignore[call-overload]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="print the page and write nothing")
    arguments = parser.parse_args()

    from earlybert.config import write_atomically

    if arguments.print:
        print(page(), end="")
    else:
        write_atomically(PAGE, page())
    return 0


if __name__ == "__main__":
    from earlybert.config import run_command

    run_command(main)
