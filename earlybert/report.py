"""The search as a picture and a page: `runs/NAME/report/`, made from the run folder alone.

`masks.png` is the paper's figure: the distance between any two masks of the search, for heads and for
neurons. A block of dark squares along the diagonal is a ticket that has settled; a light corner is one that
fell apart. `distances.json` has the numbers, `report.md` the words.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from earlybert.config import EarlyBertError, read_json_lines, write_atomically
from earlybert.search import FAMILIES, Search
from earlybert.ticket import Ticket

PAPER = {
    "heads": "settled from step 250 to 300 on",
    "neurons": "stable from about step 50 to 550, broken down near step 570",
}
"""What the paper's heat maps of pretraining show (docs/method.md section 2)."""


def write(run: Path) -> Path:
    """Write the report of a run folder and return its folder. Raises EarlyBertError where no search is
    stored."""
    ticket, search = _search(run)
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    drawn = None if ticket is None else ticket.step
    write_atomically(folder / "masks.png", picture(search, drawn=drawn))
    matrices = {name: _family(search, name).matrix() for name in FAMILIES}
    numbers = {
        "steps": list(search.steps),
        "distances": {name: np.round(matrix, 5).tolist() for name, matrix in matrices.items()},
        "settled_since": dict(zip(FAMILIES, search.settled, strict=True)),
        "broken_down": list(search.broken),
        "drawn_at": drawn,
        "unit": "normalised Hamming distance over its chance level: 0 the same mask, 1 independent masks",
    }
    write_atomically(folder / "distances.json", json.dumps(numbers, indent=1) + "\n")
    write_atomically(folder / "report.md", _page(run, search, ticket, matrices))
    return folder


def picture(search: Search, *, drawn: int | None) -> bytes:
    """Both heat maps side by side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    edges = _edges(search.steps)
    for axis, name, settled in zip(axes, FAMILIES, search.settled, strict=True):
        matrix = _family(search, name).matrix()
        mesh = axis.pcolormesh(edges, edges, matrix, vmin=0, vmax=1, cmap="viridis", rasterized=True)
        axis.set_aspect("equal")
        axis.invert_yaxis()
        axis.set(title=f"{name}: distance between masks", xlabel="step", ylabel="step")
        for step, style, label in ((settled, "w--", "settled"), (drawn, "r-", "drawn")):
            if step is not None:
                axis.axvline(step, color=style[0], linestyle=style[1:], linewidth=1, label=f"{label}: {step}")
        if settled is not None or drawn is not None:
            axis.legend(loc="lower left", fontsize="small")
    figure.colorbar(mesh, ax=list(axes), label="0 same, 1 chance", shrink=0.85)
    box = io.BytesIO()
    canvas.print_png(box)
    return box.getvalue()


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last one that is still being written is left out."""
    return read_json_lines(run / "metrics.jsonl")


def _search(run: Path) -> tuple[Ticket | None, Search]:
    """The ticket and the search that led to it, or the search so far of the newest checkpoint."""
    if (run / "ticket.json").is_file():
        ticket = Ticket.load(run / "ticket.json")
        if ticket.search is None:
            raise EarlyBertError(f"{run}: its ticket ({ticket.reason}) came without a search to report")
        return ticket, Search.from_json(ticket.search, where=str(run / "ticket.json"))
    for manifest in sorted((run / "checkpoints").glob("step-*/manifest.json"), reverse=True):
        values = json.loads(manifest.read_text(encoding="utf-8"))
        search = Search.from_json(values["progress"]["search"], where=str(manifest))
        if search.steps:
            return None, search
    raise EarlyBertError(
        f"{run}: no ticket and no checkpoint with a search; give runs/NAME after its first look"
    )


def _page(run: Path, search: Search, ticket: Ticket | None, matrices: Mapping[str, np.ndarray]) -> str:
    lines = [f"# The search of {run.name}", "", "![distance between masks](masks.png)", ""]
    lines.append("| family | settled since step | largest distance of the last window | in the paper |")
    lines.append("|---|---|---|---|")
    far = search.distances[-1][1:]
    for name, settled, distance in zip(FAMILIES, search.settled, far, strict=True):
        told = "not settled" if settled is None else f"{settled:,}"
        if name in search.broken:
            told = "broken down"
        lines.append(
            f"| {name} | {told} | {'-' if distance is None else f'{distance:.3f}'} | {PAPER[name]} |"
        )
    first, last = search.steps[0], search.steps[-1]
    lines += [
        "",
        f"{len(search.steps)} looks from step {first:,} to {last:,}. Between the first and the last:",
    ]
    lines.append(", ".join(f"{name} {matrix[0, -1]:.3f}" for name, matrix in matrices.items()) + ".")
    if ticket is None:
        lines += ["", "No ticket has been drawn."]
    else:
        lines += ["", f"Drawn at {ticket}.", "", "| layer | heads kept | neurons kept |", "|---|---|---|"]
        shapes = zip(ticket.heads, ticket.head_widths, ticket.neurons, ticket.neuron_widths, strict=True)
        for layer, (heads, of_heads, neurons, of_neurons) in enumerate(shapes):
            lines.append(f"| {layer} | {len(heads)} of {of_heads} | {len(neurons):,} of {of_neurons:,} |")
    logged = metrics(run)
    losses = [(m["step"], m["eval_loss"]) for m in logged if "eval_loss" in m]
    if losses:
        lines += ["", "| step | held-out loss |", "|---|---|"]
        lines += [f"| {step:,} | {loss:.4f} |" for step, loss in losses]
    lines += _times(logged, drawn=None if ticket is None else ticket.step)
    return "\n".join(lines) + "\n"


def _times(logged: Sequence[Mapping[str, Any]], *, drawn: int | None) -> list[str]:
    """The pause of the draw and the step before and after it, where the run has them."""
    lines = []
    for line in logged:
        if line.get("draw_seconds"):
            parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in line["draw_seconds"].items())
            total = sum(line["draw_seconds"].values())
            lines += ["", f"The draw at step {line['step']:,} paused training for {total:.2f} s: {parts}."]
    if drawn is not None:
        before = [m["step_seconds"] for m in logged if m["step"] < drawn and "step_seconds" in m]
        after = [m["step_seconds"] for m in logged if m["step"] > drawn and "step_seconds" in m]
        if before and after:
            one, two = float(np.median(before)), float(np.median(after))
            lines += [
                "",
                f"A step took {one:.3f} s before the draw and {two:.3f} s after it ({two / one:.2f}).",
            ]
    return lines


def _family(search: Search, name: str) -> Any:
    return getattr(search, name)


def _edges(steps: Sequence[int]) -> list[float]:
    """Borders of the cells that stand at `steps`."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]
