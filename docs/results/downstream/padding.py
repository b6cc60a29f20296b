"""Seconds of a classifier's forward and backward pass on a task's own batches, padding computed and not.

python docs/results/downstream/padding.py MODEL GLUE
"""

import statistics
import sys
import time

from earlybert import recipes, tasks
from earlybert.finetune import Plan
from earlybert.origin import Origin

model, data = sys.argv[1:]
settings, _ = recipes.load("scripts/experiments/finetune/glue.toml", [f"model={model}"], kind="glue")
origin = Origin.read(model)
for name in ("rte", "cola", "sst2", "stsb"):
    recipe = settings.of(name)
    task = tasks.load(recipe, data=data, tokenizer=origin.tokenizer)
    plan = Plan(recipe, len(task.train), 0, False, 1)
    module = origin.model(task.model_class, task.model_settings, coefficients="none", seed=1).train()
    seconds, real, tokens = {False: [], True: []}, 0, 0
    for step in range(8):
        batch = task.train.collate(plan.batch(step).tolist(), pad=origin.pad)
        real += int(batch["attention_mask"].sum())
        tokens += batch["attention_mask"].numel()
        for skips in seconds:
            module.bert.skips_padding = skips
            module.zero_grad()
            began = time.perf_counter()
            module(**batch).loss.backward()
            seconds[skips].append(time.perf_counter() - began)
    computed, skipped = (statistics.median(times[1:]) for times in seconds.values())
    real /= tokens
    print(f"{name}: {real:.2f} of the tokens are real; {computed:.2f} s, {skipped:.2f} s without padding")
