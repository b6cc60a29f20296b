"""scripts/prepare.py with little memory to spare; a source named in `WRITTEN_TO` grows while it is read."""

import os
import resource
import runpy
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "prepare.py"
GIVEN = 1 << 30
"""Bytes beside what the imported packages have mapped."""

mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + GIVEN, mapped + GIVEN))

if changing := os.environ.get("WRITTEN_TO"):
    from data_prep import build as room

    original = room.build

    def build(*arguments: Any, tell: Any, **options: Any) -> Any:
        def and_write(line: str) -> None:
            tell(line)
            if line.startswith("reading"):
                with open(changing, "a") as file:
                    file.write("One more line.\n")

        return original(*arguments, tell=and_write, **options)

    room.build = build

sys.path.insert(0, str(SCRIPT.parent))
runpy.run_path(str(SCRIPT), run_name="__main__")
