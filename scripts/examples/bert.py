"""Stock BertForMaskedLM, its ticket drawn while it trains.

    deepspeed --num_accelerators 2 scripts/examples/bert.py [TEXT] [--steps N] [--draw STEP]

Lines marked (1) to (3) are what earlybert adds to a script that trains with DeepSpeed.
"""

import torch
import transformers
from text_batches import VOCABULARY, arguments, masked

import earlybert  # (1)

CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000},
}
MODEL = transformers.BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=512,
)


def main() -> None:
    asked = arguments("bert")
    torch.manual_seed(0)
    ticket = earlybert.TicketSettings(minimum_step=asked.draw, latest_step=asked.draw, every=5)
    engine = earlybert.initialize(  # (2) in place of deepspeed.initialize
        model=transformers.BertForMaskedLM(MODEL),
        config=CONFIG,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        early_bird=earlybert.EarlyBird(ticket),
    )
    batches = masked(asked.text, steps=asked.steps, rank=engine.global_rank)
    for step, batch in enumerate(batches, start=1):
        loss = engine(**batch).loss
        engine.backward(loss)
        told = loss.item()
        del loss  # it holds the engine, whose memory the draw wants back
        engine.step()
        if engine.global_rank == 0 and (step % 20 == 0 or step == asked.steps):
            print(f"step {step} loss {told:.3f} {engine.ticket or 'searching'}", flush=True)
    difference = earlybert.save(engine, asked.out)  # (3)
    if engine.global_rank == 0:
        count = sum(p.numel() for p in earlybert.load(asked.out).parameters())
        print(f"{asked.out}: {count:,} parameters; loaded again, logits differ by {difference:.2g}")
    earlybert.end_ranks()


if __name__ == "__main__":
    main()
