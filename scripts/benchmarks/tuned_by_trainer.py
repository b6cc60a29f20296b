"""Fine-tune stock BERT by Hugging Face's Trainer as `scripts/finetune.py` would: a program of its own.

    python scripts/benchmarks/tuned_by_trainer.py EXPERIMENT.toml TASK FOLDER

The experiment, the files, the rows of each step, the learning rates and the first values of the head are
those of the fine-tuning experiment; model, loss, optimizer, clipping and loop are transformers' own. Each
seed leaves FOLDER/seed-N.json; what is there is not done again.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import transformers

from earlybert import mechanics, recipes, tasks
from earlybert.config import run_command, write_atomically
from earlybert.origin import Origin
from earlybert.tuning import Plan


class Steps(torch.utils.data.Dataset):
    """The rows of each optimizer step, in the order of a plan."""

    def __init__(self, rows: tasks.Rows, plan: Plan, *, pad: int) -> None:
        self.rows, self.plan, self.pad = rows, plan, pad

    def __len__(self) -> int:
        return self.plan.total

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return self.rows.collate(self.plan.batch(step).tolist(), pad=self.pad)


class PlannedTrainer(transformers.Trainer):
    """A Trainer whose batches and learning rates follow a plan, and which remembers each step's loss."""

    def __init__(self, *, steps: Steps, **options: Any) -> None:
        super().__init__(train_dataset=steps, **options)
        self.steps, self.losses = steps, list[float]()
        self.began = 0.0

    def seconds(self) -> float:
        """Since the first step began, its rows included."""
        return time.perf_counter() - self.began

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self.steps, batch_size=None)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        plan, tuned = self.steps.plan, optimizer or self.optimizer
        assert tuned is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            tuned,
            # Asked once more after the last step.
            lambda step: plan.learning_rate(min(step, plan.total - 1)) / plan.recipe.learning_rate,
        )
        return self.lr_scheduler

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        self.losses.append(loss.item())
        return loss


class _Begin(transformers.TrainerCallback):
    """Notes when the loop begins: what Trainer does before is no training."""

    def __init__(self, trainer: PlannedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.began = time.perf_counter()


def tune(experiment: Path, name: str, to: Path) -> None:
    """Train and judge each seed of a task that is not done."""
    settings, values = recipes.load(experiment, [f'tasks=["{name}"]'], kind="glue")
    recipe, origin = settings.of(name), Origin.read(settings.model)
    task = tasks.load(recipe, data=settings.data, tokenizer=origin.tokenizer)
    to.mkdir(parents=True, exist_ok=True)
    for seed in settings.seeds:
        path = to / f"seed-{seed}.json"
        if not path.exists():
            told = _tuned(settings, task, origin, seed=seed, precision=mechanics.precision_of(values))
            write_atomically(path, json.dumps(told) + "\n")


def _tuned(
    settings: recipes.Finetuning, task: tasks.Task, origin: Origin, *, seed: int, precision: str
) -> dict[str, Any]:
    assert isinstance(task, tasks.GlueTask)
    recipe, optimizer = settings.of(task.task.name), settings.optimizer
    plan = Plan(recipe, len(task.train), 0, False, seed)
    config = transformers.BertConfig.from_pretrained(
        settings.model, **task.model_settings, classifier_dropout=None
    )
    model = transformers.BertForSequenceClassification(config)
    first = origin.model(task.model_class, task.model_settings, coefficients="none", seed=seed)
    model.load_state_dict(first.state_dict(), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=plan.total, seed=seed, bf16=precision == "bf16",
            per_device_train_batch_size=recipe.batch, learning_rate=recipe.learning_rate,
            weight_decay=optimizer.weight_decay, adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1], adam_epsilon=optimizer.epsilon,
            max_grad_norm=optimizer.clipping, optim="adamw_torch_fused", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = PlannedTrainer(model=model, args=arguments, steps=Steps(task.train, plan, pad=origin.pad))
        trainer.add_callback(_Begin(trainer))
        trainer.train()
        seconds = trainer.seconds()
    scores = {
        split: task.judge(split, _logits(model, rows, task, size=4 * recipe.batch, pad=origin.pad), to=None)
        for split, rows in task.evaluations.items()
    }
    score = sum(found["score"] for found in scores.values()) / len(scores)
    return {"score": score, "scores": scores, "seconds": seconds, "losses": trainer.losses}


def _logits(model: Any, rows: tasks.Rows, task: tasks.Task, *, size: int, pad: int) -> list[tasks.Logits]:
    """What the model says to each row."""
    told: list[tasks.Logits] = []
    model.eval()
    with torch.no_grad():
        for first in range(0, len(rows), size):
            which = range(first, min(first + size, len(rows)))
            batch = rows.collate(which, pad=pad, targets=False)
            output = model(**{name: value.to(model.device) for name, value in batch.items()})
            told += task.logits(output, batch["attention_mask"])
    return told


def main() -> None:
    experiment, name, to = sys.argv[1:]
    tune(Path(experiment), name, Path(to))


if __name__ == "__main__":
    run_command(main)
