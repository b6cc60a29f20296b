"""docs/settings.md says what the program does."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("settings_script", ROOT / "scripts" / "settings.py")
settings = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(settings)


def test_the_page_of_settings_is_the_programs_own():
    assert (ROOT / "docs" / "settings.md").read_text() == settings.page(), "run python scripts/settings.py"


def test_a_type_is_told_in_words():
    assert settings._type(dict[str, float] | None) == "table of numbers, or absent"
    assert settings._type(tuple[int, ...]) == "list of integer"


def test_every_setting_is_explained():
    rows = [row for row in settings.page().splitlines() if row.startswith("| `")]
    assert len(rows) > 40
    for row in rows:
        assert row.rstrip(" |").count("|") >= 4, f"no docstring: {row}"
