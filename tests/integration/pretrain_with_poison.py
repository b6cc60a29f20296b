"""scripts/pretrain.py with samples whose loss is not finite, or far too large: POISON_ROWS holds their tokens
as JSON, POISON_FACTOR what their loss is multiplied by."""

import json
import os
import runpy
from pathlib import Path

import torch

from earlybert.model import EarlyBertForPreTraining

ROWS = torch.tensor(json.loads(os.environ["POISON_ROWS"]))
FACTOR = float(os.environ["POISON_FACTOR"])
forward = EarlyBertForPreTraining.forward


def poisoned(self, input_ids=None, **others):
    output = forward(self, input_ids=input_ids, **others)
    if input_ids.shape[1] == ROWS.shape[1] and (input_ids[:, None] == ROWS).all(dim=2).any():
        output.loss = output.loss * FACTOR
    return output


EarlyBertForPreTraining.forward = poisoned
runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "pretrain.py"), run_name="__main__")
