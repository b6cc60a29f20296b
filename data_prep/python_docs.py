"""The embedded corpus: the English prose that every Python installation carries.

Help topics (pydoc's) and the docstrings of the standard library's modules, read as source text by `ast`:
nothing is imported. The surprise: only what reads like sentences is kept, about 1.8 MB; doctests,
signatures and tables are not prose.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep import clean
from earlybert.config import EarlyBertError


def standard_library() -> Path:
    """Find the standard library's folder; raises EarlyBertError where it has no sources."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "pydoc_data" / "topics.py").is_file():
        raise EarlyBertError(
            f"source 'python-docs': {root} has no pydoc_data/topics.py; this Python was installed without "
            "its sources; use a full installation or another source"
        )
    return root


_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def modules(root: Path) -> list[Path]:
    """The standard library's own modules: no tests, no packages that were installed into it."""
    found = []
    for path in root.rglob("*.py"):
        inner = path.relative_to(root).parts
        if not _SKIPPED_FOLDERS.intersection(inner) and not inner[0].startswith("config-"):
            found.append((inner, path))
    return [path for _, path in sorted(found)]


def documents(root: Path, *, progress: Callable[[int], None]) -> Iterator[tuple[str, str | None]]:
    """Stream (id, prose) of each help topic and module; None for a file that is no Python.

    A paragraph that stood in an earlier document is left out. `progress` gets the bytes read so far.
    """
    seen: set[bytes] = set()
    done = 0
    for path in modules(root):
        source = path.read_bytes()
        done += len(source)
        progress(done)
        inner = path.relative_to(root)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # lib2to3 and friends keep files that are wrong on purpose
            yield str(inner), None
            continue
        if inner.parts[0] == "pydoc_data":
            for topic, text in _topics(tree):
                yield f"topic:{topic}", _new_paragraphs(text, seen)
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
        yield str(inner), _new_paragraphs("\n\n".join(t for t in texts if t), seen)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in ast.literal_eval(node.value).items():
                yield str(topic), str(text)


def _new_paragraphs(text: str, seen: set[bytes]) -> str:
    kept = []
    for paragraph in prose(text).split("\n\n"):
        key = hashlib.blake2b(paragraph.encode("utf-8", "replace"), digest_size=16).digest()
        if paragraph and key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def prose(text: str) -> str:
    """Keep the prose of a docstring or help page: no doctests, directives, tables or indented code."""
    blocks = []
    for block in re.split(r"\n[^\S\n]*\n", text):
        lines = _before_example([line for line in block.split("\n") if line.strip()])
        joined = " ".join(line.strip() for line in lines)
        if _reads_like_prose(joined):
            blocks.append(clean.prose(_ROLE.sub(r"\1", joined).replace("``", "").replace("**", "")))
    return "\n\n".join(blocks)


_ROLE = re.compile(r":[a-z]+(?::[a-z]+)*:`~?([^`<>]+?)(?:\s*<[^`>]*>)?`")
_WORD = re.compile(r"[A-Za-z][a-z'-]*[.,;:!?)\"']*(?:\s|$)")


def _reads_like_prose(text: str) -> bool:
    """Tell sentences from code, grammars and tables: mostly plain words, and at least four of them."""
    words = text.split()
    return len(words) >= 4 and len(_WORD.findall(text)) >= 0.6 * len(words)


def _before_example(lines: list[str]) -> list[str]:
    example = (i for i, line in enumerate(lines) if line.lstrip().startswith((">>>", "... ", "$ ", "% ")))
    return lines[: next(example, len(lines))]
