"""The house's rule: imports point down, and heavy packages stay in their rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    0: {"config", "dist", "shards", "mechanics", "faults", "arithmetic", "configuration", "hub",
        "probe_process"},
    1: {
        "schedule", "data", "loader", "order", "masking", "packing", "mixing", "model", "encoder", "ticket",
        "search", "penalty", "optim", "adapters", "targets", "rates", "watch", "initial", "glue", "squad",
        "squad_files", "downstream",
    },
    2: {
        "shrink", "state", "layouts", "experiment", "cutting", "progress", "plan", "loader_server",
        "baselines", "state_files", "guard", "shortcuts", "ops", "recipes", "tasks",
        "scores",
    },
    3: {"engine", "lifecycle", "checkpoint", "monitor", "report", "run", "account", "assembly",
        "probes", "stock"},
    4: {"trainer", "tuned", "judging"},
    5: {"card", "export", "saved_card", "pretrained", "origin", "tuning", "finetune"},
}  # fmt: skip
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
ONLY_IN = {
    "deepspeed": {"engine", "lifecycle", "checkpoint", "ops"},
    "tensorboard": {"monitor"},
    "matplotlib": {"report", "scores"},
}
GROUND = "config"
# A floor has an order inside it where one room stands on another.
SAME_FLOOR = {
    ("configuration", "arithmetic"), ("progress", "shrink"),
    ("state", "shrink"), ("checkpoint", "engine"), ("engine", "lifecycle"), ("data", "order"),
    ("data", "masking"), ("data", "packing"), ("packing", "order"), ("packing", "masking"),
    ("data", "mixing"), ("mixing", "order"), ("loader", "data"), ("loader", "masking"),
    ("masking", "order"), ("adapters", "model"), ("initial", "model"), ("search", "ticket"),
    ("targets", "ticket"),
    ("adapters", "targets"), ("baselines", "state"), ("cutting", "shrink"),
    ("cutting", "state"), ("state", "layouts"), ("state_files", "state"), ("state_files", "shrink"),
    ("faults", "dist"), ("plan", "experiment"), ("plan", "state"), ("experiment", "guard"),
    ("account", "checkpoint"), ("account", "engine"), ("assembly", "checkpoint"), ("assembly", "run"),
    ("assembly", "engine"), ("assembly", "lifecycle"),
    ("export", "card"), ("saved_card", "card"), ("saved_card", "export"), ("pretrained", "saved_card"),
    ("assembly", "probes"), ("probes", "checkpoint"), ("probes", "lifecycle"), ("probes", "monitor"),
    ("probes", "run"),
    ("pretrained", "export"), ("downstream", "model"), ("downstream", "encoder"), ("model", "encoder"),
    ("tasks", "recipes"), ("squad", "squad_files"), ("scores", "recipes"),
    ("recipes", "experiment"),
    ("origin", "export"), ("finetune", "origin"), ("finetune", "pretrained"), ("finetune", "tuning"),
    ("tuning", "origin"), ("tuning", "pretrained"),
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            room = f"earlybert.{node.module}" if node.level else node.module
            yield from [f"{room}.{alias.name}" for alias in node.names]


@pytest.mark.parametrize("path", sorted((ROOT / "earlybert").glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_down(path):
    room = path.stem
    if room == "__init__":
        return
    assert room in FLOOR_OF, f"{room} has no floor: give it one"
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] != "data_prep", f"{room} imports {name}"
        for heavy, rooms in ONLY_IN.items():
            assert heavy not in parts or room in rooms, f"{room} imports {name}"
        if parts[0] == "earlybert" and len(parts) > 1 and parts[1] in FLOOR_OF:
            lower = FLOOR_OF[parts[1]] < FLOOR_OF[room] or parts[1] == GROUND
            below = lower or (room, parts[1]) in SAME_FLOOR
            assert below, f"{room} (floor {FLOOR_OF[room]}) imports {name} (floor {FLOOR_OF[parts[1]]})"


@pytest.mark.parametrize("path", sorted((ROOT / "data_prep").glob("*.py")), ids=lambda path: path.stem)
def test_data_preparation_stands_on_the_ground_floor_only(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "earlybert":
            assert parts[1] in {"config", "shards"}, f"{path.stem} imports {name}"
        assert parts[0] not in {"torch", "deepspeed"}, f"{path.stem} imports {name}"
