"""Golden losses: a change that should not change results does not. `python tests/integration/test_golden.py`
writes them anew, for a commit that shows why they moved."""

import json
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden" / "losses.json"
KEPT = ("step", "loss", "eval_loss", "mlm_accuracy", "grad_norm", "mask_distance_neurons", "neurons_kept")


def small_run(path):
    """Data, model, search, draw, two phases and evaluation in fp32 on one process, without dropout."""
    from test_pretrain import Folder

    folder = Folder(path, stage=2, precision="fp32")
    words = ["name=golden", "model.dropout=0.0", "model.attention_dropout=0.0", "data.objective=mlm+sop"]
    assert folder.run(*words, ranks=1) == [0], folder.log()
    return [
        {key: line[key] for key in KEPT if line.get(key) is not None} for line in folder.metrics("golden")
    ]


def test_losses_are_the_golden_ones(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    lines = small_run(tmp_path)
    assert len(lines) == len(golden) == 17
    for line, expected in zip(lines, golden, strict=True):
        # Another processor adds in another order: fp32 leaves five digits.
        assert line == pytest.approx(expected, rel=2e-5), expected["step"]


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(small_run(Path(folder)), indent=1) + "\n")
