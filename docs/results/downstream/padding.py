"""Seconds of a forward and backward pass on a task's own batches, padding computed and not.

python docs/results/downstream/padding.py MODEL GLUE [SQUAD]
"""

import statistics
import sys
import time

from earlybert import recipes, tasks
from earlybert.finetune import Plan
from earlybert.origin import Origin

model, *folders = sys.argv[1:]
origin = Origin.read(model)
length = min(384, origin.config.max_position_embeddings)
KINDS = {"glue": ("rte", "cola", "sst2", "stsb"), "squad": ("squad",)}
for (kind, names), data in zip(KINDS.items(), folders, strict=False):
    words = [f"model={model}"] + ([f"recipe.sequence_length={length}"] if kind == "squad" else [])
    settings, _ = recipes.load(f"scripts/experiments/finetune/{kind}.toml", words, kind=kind)
    for name in names:
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
                module.bert.skips_padding = module.ignores_padding = skips
                module.zero_grad()
                began = time.perf_counter()
                module(**batch).loss.backward()
                seconds[skips].append(time.perf_counter() - began)
        computed, skipped = (statistics.median(times[1:]) for times in seconds.values())
        print(
            f"{name}: {real / tokens:.2f} of the tokens are real; {computed:.2f} s, {skipped:.2f} s without "
            f"padding, rows of at most {recipe.sequence_length}"
        )
