"""scripts/pretrain.py with a sample whose loss is not finite, or far too large: POISON_ROW holds its tokens
as JSON, POISON_FACTOR what its loss is multiplied by."""

import json
import os
import runpy
from pathlib import Path

import torch

from earlybert.model import EarlyBertForPreTraining

ROW = torch.tensor(json.loads(os.environ["POISON_ROW"]))
FACTOR = float(os.environ["POISON_FACTOR"])
forward = EarlyBertForPreTraining.forward


def poisoned(self, input_ids=None, **others):
    output = forward(self, input_ids=input_ids, **others)
    if input_ids.shape[1] == len(ROW) and (input_ids == ROW).all(dim=1).any():
        output.loss = output.loss * FACTOR
    return output


EarlyBertForPreTraining.forward = poisoned
runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "pretrain.py"), run_name="__main__")
