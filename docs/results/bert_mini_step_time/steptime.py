"""Step time of BERT-Mini dense, searching and shrunken, taken in turn in one process. Prints JSON.

python docs/results/bert_mini_step_time/steptime.py docs/results/bert_mini/ticket.json ROUNDS
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from earlybert import mechanics
from earlybert.engine import EarlyBird, initialize
from earlybert.initial import encoder_flops_per_token, seeded_model
from earlybert.lifecycle import end_ranks, start_ranks
from earlybert.model import EarlyBertConfig
from earlybert.ticket import Ticket, TicketSettings

ROWS, LENGTH, MASKED, WORDS = 16, 128, 20, 16384
TICKET, ROUNDS = Ticket.load(Path(sys.argv[1])), int(sys.argv[2])


def config(**changes):
    return EarlyBertConfig(
        vocab_size=WORDS,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **changes,
    )


def engine(shape, *, search):
    never = TicketSettings(enabled=search, minimum_step=10**6, latest_step=10**6, every=20)
    values, _ = mechanics.load("ds_configs/zero2_bf16.json")
    return initialize(
        model=seeded_model(shape, seed=1),
        config=mechanics.complete(values, micro_batch=ROWS, accumulation=2, clipping=1.0),
        early_bird=EarlyBird(never, seed=1),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-4, fused=True),
    )


def seconds(engine, batch):
    began = time.perf_counter()
    for _ in range(2):
        output = engine(**batch)
        engine.backward(output.loss)
        del output
        engine.step()
    return time.perf_counter() - began


start_ranks()
torch.set_num_threads(1)
kept = {
    "heads_per_layer": [len(layer) for layer in TICKET.heads],
    "neurons_per_layer": [len(layer) for layer in TICKET.neurons],
}
shapes = {
    "dense": config(coefficients="none"),
    "search": config(coefficients="train"),
    "shrunken": config(coefficients="none", **kept),
}
generator = torch.Generator().manual_seed(0)
batch = {
    "input_ids": torch.randint(5, WORDS, (ROWS, LENGTH), generator=generator),
    "masked_positions": torch.stack(
        [torch.randperm(LENGTH, generator=generator)[:MASKED] for _ in range(ROWS)]
    ),
    "masked_labels": torch.randint(5, WORDS, (ROWS, MASKED), generator=generator),
}
engines = {name: engine(shape, search=name == "search") for name, shape in shapes.items()}
times: dict[str, list[float]] = {name: [] for name in engines}
for _ in range(ROUNDS):
    for name, one in engines.items():
        times[name] += [seconds(one, batch) for _ in range(6)][1:]  # the first after a change warms up
medians = {name: statistics.median(taken) for name, taken in times.items()}
result = {
    "median_seconds": medians,
    "relative": {name: value / medians["dense"] for name, value in medians.items()},
    "quartiles": {name: statistics.quantiles(taken, n=4) for name, taken in times.items()},
    "flops": {name: encoder_flops_per_token(s, sequence_length=LENGTH) for name, s in shapes.items()},
}
print(json.dumps(result, indent=1))
end_ranks()
