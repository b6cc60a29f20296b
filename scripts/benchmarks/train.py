"""Tokens a second of whole training programs, in turn: ours; stock BERT under Hugging Face's Trainer, alone,
on all ranks and with its DeepSpeed integration; stock BERT in a plain DeepSpeed loop. On request also ours
compiled, and ours with the documents of a row kept apart.

Same shapes, rows, global batch and precision. The ceiling is the device's own matrix product in that
precision, on all ranks at once; utilisation counts the multiplications that ours needs (the head on masked
positions only), three times the forward pass.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.engines import SHAPES
from benchmarks.ranks import start

_SCRIPTS = Path(__file__).resolve().parent.parent
_WARM = 5
"""Steps before the clock counts."""
_REST = 5
"""Steps of ours after the clock has stopped: it evaluates and saves there."""
_LOADERS = min(4, os.cpu_count() or 1)
"""Processes a rank that make micro-batches; on two cores one would do, a GPU waits for less than four."""
_VOCABULARY = 30_592
KINDS = ("ours", "trainer", "trainer-ranks", "trainer-deepspeed", "deepspeed")
OWN = {
    "ours": "",
    "ours-compiled": "model.compile=true",
    "ours-boundaries": "data.boundaries=true",
    "ours-compiled-boundaries": "model.compile=true data.boundaries=true",
}
"""What each of ours sets."""
Figures = dict[str, Any]


def measure(arguments: argparse.Namespace) -> Figures:
    from earlybert.config import SettingsError

    kinds = arguments.kind or [kind for kind in KINDS if kind == "ours" or machine.version("accelerate")]
    known = [*OWN, *KINDS[1:]]
    if unknown := [kind for kind in kinds if kind not in known]:
        raise SettingsError(f"--kind {unknown[0]}: choose among {', '.join(known)}")
    folder = Path(tempfile.mkdtemp())
    try:
        job = prepare(arguments, folder)
        ceiling = run_program("ceiling", job)
        found: dict[str, list[Figures]] = {kind: [] for kind in kinds}
        for _ in range(arguments.rounds):
            for kind in kinds:
                found[kind].append(run_program(kind, job))
                print(
                    f"{kind}: {found[kind][-1]['tokens_per_second']:,.0f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
        needed = flops_per_token(arguments.shape, arguments.length)
        rows = {}
        for kind, runs in found.items():
            rates = [run["tokens_per_second"] for run in runs]
            rows[kind] = {
                "tokens_per_second": statistics.median(rates), "all": rates,
                "utilisation": statistics.median(rates) * needed / ceiling["flops"],
                "peak_mb": max(run["peak_mb"] for run in runs),
            }  # fmt: skip
            if "waiting" in runs[0]:
                rows[kind]["waiting"] = statistics.median(run["waiting"] for run in runs)
        return {**job, **about(), "folder": None, "ceiling_flops": ceiling["flops"], "kinds": rows}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Write a corpus of random tokens; what the programs are told."""
    document = arguments.document or 4 * arguments.length
    _corpus(folder, tokens=16000 * arguments.length, document=document)
    return {
        "folder": str(folder), "shape": arguments.shape, "length": arguments.length, "document": document,
        "batch": arguments.batch, "steps": arguments.steps, "ranks": arguments.ranks,
        "sizes": SHAPES[arguments.shape], "overrides": arguments.override,
    }  # fmt: skip


def tell(figures: Figures) -> None:
    print(
        f"{figures['shape']}, {figures['length']} tokens, global batch {figures['batch']}, bf16, "
        f"{figures['ranks']} ranks; {figures['machine']}; "
        f"{', '.join(f'{k} {v}' for k, v in figures['versions'].items())}; a matrix product reaches "
        f"{figures['ceiling_flops'] / 1e12:.2f} TFLOP/s\n"
    )
    print(
        "| program | tokens/s (least to most) | of ours | utilisation | largest process MB | of a step, for "
        "the loader |\n|---|---|---|---|---|---|"
    )
    ours = figures["kinds"].get("ours", {}).get("tokens_per_second")
    for kind, row in figures["kinds"].items():
        share = f"{row['tokens_per_second'] / ours:.2f}" if ours else ""
        waiting = f"{row['waiting']:.1%}" if "waiting" in row else ""
        print(
            f"| {kind} | {row['tokens_per_second']:,.0f} ({min(row['all']):,.0f} to {max(row['all']):,.0f}) "
            f"| {share} | {row['utilisation']:.1%} | {row['peak_mb']:,.0f} | {waiting} |"
        )


def about() -> Figures:
    """The device and the versions."""
    compared = machine.versions("torch", "deepspeed", "transformers", "accelerate")
    return {"machine": machine.device(), "versions": compared}


def flops_per_token(shape: str, length: int, *, widths: list[list[int]] | None = None) -> float:
    """Multiplications and additions of a training step; `widths`: heads and neurons of each layer."""
    from earlybert.initial import encoder_flops_per_token
    from earlybert.masking import predictions_a_row
    from earlybert.model import EarlyBertConfig

    sizes = SHAPES[shape]
    heads, neurons = widths or (None, None)
    config = EarlyBertConfig(
        vocab_size=_VOCABULARY, hidden_size=sizes["hidden"], num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"], intermediate_size=4 * sizes["hidden"],
        heads_per_layer=heads, neurons_per_layer=neurons,
    )  # fmt: skip
    guessed = predictions_a_row(length, probability=0.15) / length
    head = 2 * sizes["hidden"] * (_VOCABULARY + sizes["hidden"]) * guessed
    return 3 * (encoder_flops_per_token(config, sequence_length=length) + head)


def _corpus(folder: Path, *, tokens: int, document: int) -> None:
    """Random tokens in documents of half to one and a half times `document`, enough for no row to come
    twice."""
    import numpy as np

    from data_prep import vocab
    from earlybert.shards import Manifest, ShardWriter, shard_name, tokenizer_sha256, write_manifest

    corpus = folder / "corpus"
    corpus.mkdir()
    pieces = [*vocab.SPECIAL_TOKENS, *(f"w{i}" for i in range(_VOCABULARY - len(vocab.SPECIAL_TOKENS)))]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    vocab.take(folder / "vocab.txt", corpus / "tokenizer", vocab.Letters())
    rng = np.random.default_rng(0)
    with ShardWriter(corpus / shard_name(0, of=1), token_dtype="uint16") as writer:
        for number in range(-(-tokens // document)):
            length = int(rng.integers(document // 2, document + document // 2 + 1))
            writer.add(rng.integers(5, _VOCABULARY, length), [0, length // 2], "random", str(number))
    info = writer.close()
    write_manifest(
        corpus,
        Manifest(
            tokenizer_sha256=tokenizer_sha256(corpus / "tokenizer"), vocab_size=_VOCABULARY,
            token_dtype="uint16", documents=info.documents, sentences=info.sentences, tokens=info.tokens,
            shards=(info,), fingerprint="0" * 64, settings={}, sources={}, statistics={},
        ),
    )  # fmt: skip


# --- a program's processes ---------------------------------------------------------------------------------


def run_program(kind: str, job: Figures) -> Figures:
    """Start a program on its ranks; what its rank 0 has measured."""
    out = Path(job["folder"]) / "figures.json"
    out.unlink(missing_ok=True)
    ranks = 1 if kind == "trainer" else job["ranks"]
    command = [sys.executable, "-m", "benchmarks.train", kind, json.dumps(job)]
    places = [str(_SCRIPTS), str(_SCRIPTS.parent), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(place for place in places if place)
    with open(Path(job["folder"]) / "log.txt", "w+") as log:
        processes = start(command, ranks=ranks, log=log, TOKENIZERS_PARALLELISM="false", PYTHONPATH=path)
        codes = [process.wait() for process in processes]
        log.seek(0)
        if any(codes) or not out.exists():
            raise RuntimeError(f"{kind} ended with {codes}:\n{log.read()[-3000:]}")
    return json.loads(out.read_text())


class _Clock:
    """Time of all optimizer steps but the warm ones; no other is waited for, a device may lag behind."""

    def __init__(self, job: Figures) -> None:
        self._job = job
        self._step = 0
        self._marks: list[float] = []

    def step(self) -> None:
        import torch

        self._step += 1
        if self._step in (_WARM, _WARM + self._job["steps"]):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._marks.append(time.perf_counter())

    def figures(self) -> Figures:
        began, ended = self._marks
        tokens = self._job["steps"] * self._job["batch"] * self._job["length"]
        return {"tokens_per_second": tokens / (ended - began)}


def _write(job: Figures, figures: Figures) -> None:
    if os.environ.get("RANK", "0") == "0":
        (Path(job["folder"]) / "figures.json").write_text(json.dumps({**figures, "peak_mb": _peak_mb()}))


def _peak_mb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def _ceiling(job: Figures) -> None:
    """FLOP/s of a product of the feed-forward's shape, all ranks at once."""
    import torch

    from earlybert import dist
    from earlybert.lifecycle import end_ranks, start_ranks

    start_ranks()
    width = job["sizes"]["hidden"]
    own = product_flops(
        job["batch"] * job["length"] // job["ranks"], width, 4 * width,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    total = sum(dist.gather_objects(own))
    _write(job, {"flops": total})
    end_ranks()


def product_flops(rows: int, width: int, columns: int, *, device: Any) -> float:
    """FLOP/s of this rank's product of [rows, width] and [width, columns] in bf16. Collective."""
    import torch

    from earlybert import dist

    x = torch.randn(rows, width, dtype=torch.bfloat16, device=device)
    w = torch.randn(width, columns, dtype=torch.bfloat16, device=device)
    rounds, rates = 20, []
    for _ in range(6):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(rounds):
            x @ w
        if x.is_cuda:
            torch.cuda.synchronize()
        rates.append(rounds * 2 * rows * width * columns / (time.perf_counter() - began))
    return statistics.median(rates[1:])


_EXPERIMENT = """
name = "bench"
runs = "{runs}"
deepspeed = "{json}"
log_every = 5
[model]
layers = {layers}
hidden = {hidden}
heads = {heads}
positions = {length}
[data]
corpus = "{corpus}"
workers = {loaders}
[[phases]]
steps = {total}
sequence_length = {length}
batch = {batch}
micro_batch = {share}
learning_rate = 1e-4
[ticket]
enabled = false
[evaluate]
every = 100000
samples = 1
[checkpoint]
every = 100000
"""


def _ours(job: Figures, *, words: str) -> None:
    """The real command, with its logging; `words` are its overrides."""
    import runpy

    folder = Path(job["folder"])
    runs = folder / "runs"
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(runs, ignore_errors=True)
        text = _EXPERIMENT.format(
            runs=runs, json=_deepspeed_json(job), corpus=folder / "corpus",
            total=_WARM + job["steps"] + _REST, share=job["batch"] // job["ranks"], loaders=_LOADERS,
            **job["sizes"], **job,
        )  # fmt: skip
        (folder / "experiment.toml").write_text(text)
    else:
        while not (folder / "experiment.toml").exists():
            time.sleep(0.05)
    sys.argv = ["pretrain.py", str(folder / "experiment.toml"), *words.split(), *job["overrides"]]
    try:
        runpy.run_path(str(_SCRIPTS / "pretrain.py"), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    lines = [
        line
        for line in map(json.loads, (runs / "bench" / "metrics.jsonl").read_text().splitlines())
        if _WARM < line["step"] <= _WARM + job["steps"] and "step_seconds" in line
    ]
    taken = statistics.fmean(line["step_seconds"] for line in lines)
    waited = statistics.fmean(line["loader_seconds"] for line in lines)
    _write(job, {"tokens_per_second": job["batch"] * job["length"] / taken, "waiting": waited / taken})


# --- stock BERT --------------------------------------------------------------------------------------------


def _stock(job: Figures) -> tuple[Any, Any, Any]:
    """(model, rows as a torch dataset, collator)."""
    import numpy as np
    import torch
    import transformers

    from earlybert.data import DataSettings, PackedSamples
    from earlybert.shards import Corpus

    sizes = job["sizes"]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=_VOCABULARY, hidden_size=sizes["hidden"], num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"], intermediate_size=4 * sizes["hidden"],
        max_position_embeddings=job["length"],
    )  # fmt: skip
    corpus = Path(job["folder"]) / "corpus"
    samples = PackedSamples(
        Corpus.open(corpus), settings=DataSettings(corpus=str(corpus)), sequence_length=job["length"], seed=0
    )
    ids, epochs = samples.ids(np.arange(job["batch"] * (_WARM + job["steps"] + 2)))
    rows = [{"input_ids": row} for row in samples.rows(ids, epochs=epochs)["input_ids"].tolist()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus / "tokenizer")
    collate = transformers.DataCollatorForLanguageModeling(tokenizer)
    return transformers.BertForMaskedLM(config), rows, collate


def _deepspeed_json(job: Figures) -> Path:
    """ZeRO-2; on one rank, which has nobody to share gradients with, ZeRO-1."""
    return _SCRIPTS.parent / "ds_configs" / f"zero{min(2, job['ranks'])}_bf16.json"


def _zero(job: Figures) -> Figures:
    return {
        **json.loads(_deepspeed_json(job).read_text()),
        "train_micro_batch_size_per_gpu": job["batch"] // job["ranks"],
        "gradient_clipping": 1.0,
    }


def _trainer(job: Figures, *, ranks: int, deepspeed: bool) -> None:
    import torch
    import transformers

    clock = _Clock(job)

    class Told(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    settings = transformers.TrainingArguments(
        output_dir=str(Path(job["folder"]) / "trainer"), max_steps=_WARM + job["steps"], bf16=True,
        per_device_train_batch_size=job["batch"] // ranks, learning_rate=1e-4, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_num_workers=_LOADERS,
        optim="adamw_torch_fused", use_cpu=not torch.cuda.is_available(),
        deepspeed=_zero(job) if deepspeed else None,
        ddp_backend=None if ranks == 1 else "nccl" if torch.cuda.is_available() else "gloo",
    )  # fmt: skip
    model, rows, collate = _stock(job)
    transformers.Trainer(
        model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[Told()]
    ).train()
    _write(job, clock.figures())


def _plain_deepspeed(job: Figures) -> None:
    import deepspeed
    import torch

    from earlybert import ops

    ops.guard_builds()  # compiled once for all programs
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    model, rows, collate = _stock(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_zero(job))
    share, rank = job["batch"] // job["ranks"], torch.distributed.get_rank()
    clock = _Clock(job)
    for step in range(_WARM + job["steps"]):
        first = step * job["batch"] + rank * share
        batch = {k: v.to(engine.device) for k, v in collate(rows[first : first + share]).items()}
        engine.backward(engine(**batch).loss)
        engine.step()
        clock.step()
    _write(job, clock.figures())


_PROGRAMS: dict[str, Callable[[Figures], None]] = {
    "ceiling": _ceiling,
    **{kind: functools.partial(_ours, words=words) for kind, words in OWN.items()},
    "trainer": lambda job: _trainer(job, ranks=1, deepspeed=False),
    "trainer-ranks": lambda job: _trainer(job, ranks=job["ranks"], deepspeed=False),
    "trainer-deepspeed": lambda job: _trainer(job, ranks=job["ranks"], deepspeed=True),
    "deepspeed": _plain_deepspeed,
}


def _main(program: str, job: str) -> None:
    import torch

    from earlybert.lifecycle import free_port

    if "deepspeed" in program and "RANK" not in os.environ:  # it would ask MPI
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free_port())
    _PROGRAMS[program](json.loads(job))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # left to the interpreter's end, it may abort
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
