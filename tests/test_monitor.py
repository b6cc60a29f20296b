"""What a run shows: metrics that a resume can cut, lines of fixed columns."""

import json
import time

import pytest

from earlybert.monitor import Monitor, cut_metrics, duration, progress_line


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resume_cuts_what_it_does_again_and_a_half_written_line(tmp_path):
    monitor = Monitor(tmp_path, resume_step=None)
    for step in range(5):
        monitor.record({"step": step, "loss": step / 3})
    monitor.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    monitor = Monitor(tmp_path, resume_step=3)
    monitor.record({"step": 4, "loss": 9.0})
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert lines(tmp_path)[4]["loss"] == 9.0


def test_a_start_without_a_checkpoint_starts_the_metrics_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    cut_metrics(tmp_path / "metrics.jsonl", last_step=None)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_start_anew_hides_what_a_start_before_it_had_drawn(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for loss in (1.0, 2.0):  # the first died before its first checkpoint
        monitor = Monitor(tmp_path, resume_step=None)
        for step in range(0, 6 if loss == 1.0 else 3):
            monitor.record({"step": step, "loss": loss})
        monitor.close()
        time.sleep(1.1)  # the files' names have seconds
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_floats_are_written_to_the_last_bit(tmp_path):
    value = 0.1 + 0.2
    monitor = Monitor(tmp_path, resume_step=None)
    monitor.record({"step": 1, "loss": value})
    monitor.close()
    assert lines(tmp_path)[0]["loss"] == value


def test_tensorboard_has_the_names_of_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = Monitor(tmp_path, resume_step=None)
    monitor.record({"step": 3, "loss": 1.5, "mask_distance_heads": None, "grad_norm": float("inf")})
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"], "what is absent or not finite is not drawn"
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 1.5)]


def test_the_progress_line_has_fixed_columns():
    values = {
        "step": 7000,
        "loss": 2.3141,
        "mlm_accuracy": 0.5,
        "grad_norm": 0.82,
        "lr": 9.3e-4,
        "tokens_per_second": 412_000,
        "mask_distance_heads": 0.011,
        "mask_distance_neurons": 0.2,
    }
    assert progress_line(values, total_steps=100_000, eta_seconds=22_320) == (
        "step   7,000/100,000  loss 2.314  acc 0.500  grad 0.82  lr 9.3e-04  412.0k tok/s  eta 6h12m  "
        "search d=0.011/0.200"
    )
    values["grad_norm"] = values["mask_distance_heads"] = None
    assert "grad    -" in progress_line(values, total_steps=9, eta_seconds=None)


@pytest.mark.parametrize(("seconds", "told"), [(9.4, "9s"), (185, "3m05s"), (22_320, "6h12m")])
def test_durations_read_as_people_write_them(seconds, told):
    assert duration(seconds) == told
