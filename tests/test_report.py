"""The heat map and the page of a search, from the run folder alone."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from earlybert import report
from earlybert.config import EarlyBertError
from earlybert.monitor import Monitor
from earlybert.search import Search
from earlybert.ticket import TicketSettings, distance

SETTINGS = TicketSettings(
    every=10, minimum_step=50, latest_step=80, neuron_multiple=1, minimum_neurons=1, window=3
)


def searched():
    """Heads that settle at step 50, neurons that never do."""
    search = Search()
    for step in range(10, 90, 10):
        generator = torch.Generator().manual_seed(max(0, 40 - step))
        heads = [torch.rand(6, generator=generator) for _ in range(2)]
        neurons = [torch.rand(40, generator=torch.Generator().manual_seed(step)) for _ in range(2)]
        search = search.observe(step, heads, neurons, settings=SETTINGS)
    return search


def test_the_report_of_a_run_has_the_whole_matrix_and_the_settling_steps(tmp_path):
    search = searched()
    ticket = search.ticket(settings=SETTINGS)
    ticket.save(tmp_path / "ticket.json")
    lines = [
        {"step": 0, "eval_loss": 9.5},
        {"step": 70, "step_seconds": 0.5},
        {"step": 80, "step_seconds": 0.6, "draw_seconds": {"read": 1.0, "initialize": 0.25}},
        {"step": 90, "step_seconds": 0.4, "eval_loss": 3.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = report.write(tmp_path)
    numbers = json.loads((folder / "distances.json").read_text())
    assert numbers["steps"] == list(range(10, 90, 10)) and numbers["drawn_at"] == 80
    assert numbers["settled_since"] == {"heads": 60, "neurons": None}
    first, last = (search.neurons.kept(look) for look in (0, 7))
    assert numbers["distances"]["neurons"][0][7] == pytest.approx(
        distance(first, last, widths=[40, 40]), abs=1e-5
    )
    assert np.diag(numbers["distances"]["heads"]).tolist() == [0] * 8
    page = (folder / "report.md").read_text()
    assert "| heads | 60 |" in page and "| neurons | not settled |" in page
    assert "paused training for 1.25 s: read 1.00 s, initialize 0.25 s" in page
    assert "0.500 s before the draw and 0.400 s after it (0.80)" in page and "| 90 | 3.2500 |" in page
    assert "| 0 | 4 of 6 | 28 of 40 |" in page or "of 40" in page


def test_the_picture_is_one_and_goes_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    png = report.picture(searched(), drawn=80)
    with Image.open(io.BytesIO(png)) as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50, "a heat map has many colours"
    monitor = Monitor(tmp_path, resume_step=None)
    monitor.picture("search/masks", png, step=80)
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Images("search/masks")] == [80]


def test_a_run_without_a_search_is_named(tmp_path):
    with pytest.raises(EarlyBertError, match="no ticket and no checkpoint with a search"):
        report.write(tmp_path)
