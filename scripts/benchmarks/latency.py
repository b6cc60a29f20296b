"""Milliseconds of one forward pass of the encoder, compact beside dense, in PyTorch and ONNX Runtime.

Exports, or random weights of a shape and of its ticket: dense as the stock BERT that a dense export loads as.
All take turns, so that each sees the machine at the same moments. Rows are full and carry the mask that a
tokenizer gives. On a CPU in fp32; on a GPU, where there is one, in bf16 and PyTorch alone.

B rows, T tokens.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.engines import SHAPES, VOCABULARY

RUNTIMES = ("pytorch", "onnxruntime")
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LEAST = 5
"""Rounds that are taken even where the time is up."""
Figures = dict[str, Any]
Pass = Callable[[], object]


def measure(arguments: argparse.Namespace) -> Figures:
    """JSON types; times in milliseconds. Raises SettingsError for what cannot be measured."""
    import torch

    from earlybert.config import SettingsError

    for name in ("batch", "length", "rounds", "threads"):
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise SettingsError(f"--{name} {value}: choose at least 1")
    missing = [package for package in _NEEDED if machine.version(package) is None]
    runtimes = arguments.runtime or [r for r in RUNTIMES if r == "pytorch" or not missing]
    if "onnxruntime" in runtimes and missing:
        raise SettingsError(f"--runtime onnxruntime needs {missing[0]}: pip install {' '.join(missing)}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    models = opened(arguments.export) if arguments.export else made(arguments)
    for name, model in models.items():
        most = model.config.max_position_embeddings
        if max(arguments.length) > most:
            raise SettingsError(f"--length {max(arguments.length)}: {name} has {most} positions")
    rows: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            for model in models.values():
                model.to(device, dtype)
            for runtime in runtimes if device == "cpu" else ["pytorch"]:
                passes = {
                    name: in_pytorch(model, device=device)
                    if runtime == "pytorch"
                    else in_onnxruntime(model, Path(folder) / f"{number}.onnx")
                    for number, (name, model) in enumerate(models.items())
                }
                for length in arguments.length:
                    for batch in arguments.batch:
                        place = {"device": device, "runtime": runtime, "batch": batch, "length": length}
                        ids_BT = torch.randint(5, models_vocabulary(models), (batch, length), device=device)
                        times = in_turn(
                            {name: bind(ids_BT) for name, bind in passes.items()},
                            rounds=arguments.rounds,
                            seconds=arguments.seconds,
                        )
                        rows.append({**place, "milliseconds": {n: spread(t) for n, t in times.items()}})
    return {
        "machine": machine.processor(), "gpu": machine.device() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": machine.versions("torch", "transformers", "onnxruntime"),
        "models": {name: described(model, arguments.length) for name, model in models.items()},
        "rows": rows,
    }  # fmt: skip


def tell(figures: Figures) -> None:
    """Print the table; each model beside the first."""
    gpu = f"; {figures['gpu']}" if figures["gpu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    print(f"{figures['machine']}, {figures['threads']} threads{gpu}; {versions}")
    for name, model in figures["models"].items():
        print(
            f"{name}: {model['parameters']:,} parameters, {sum(model['heads'])} heads, "
            f"{sum(model['neurons']):,} neurons in {len(model['heads'])} layers"
        )
    base = next(iter(figures["models"]))
    print(f"\n| device, runtime | rows | tokens | model | ms (middle half) | of {base} | promised by FLOPs |")
    print("|---|---|---|---|---|---|---|")
    for row in figures["rows"]:
        first = row["milliseconds"][base]["median"]
        promised = {name: model["flops"][str(row["length"])] for name, model in figures["models"].items()}
        for name, told in row["milliseconds"].items():
            print(
                f"| {row['device']}, {row['runtime']} | {row['batch']} | {row['length']} | {name} "
                f"| {told['median']:.2f} ({told['low']:.2f} to {told['high']:.2f}) "
                f"| {told['median'] / first:.3f} | {promised[name] / promised[base]:.3f} |"
            )


def made(arguments: argparse.Namespace) -> dict[str, Any]:
    """Random weights of the shape: dense in stock BERT, and what a ticket of these ratios leaves."""
    import torch
    from transformers import BertConfig, BertModel

    from earlybert.downstream import EarlyBertModel
    from earlybert.model import EarlyBertConfig
    from earlybert.targets import Widths, kept_widths
    from earlybert.ticket import TicketSettings

    shape = SHAPES[arguments.shape]
    ratios = {"head_ratio": arguments.head_ratio, "neuron_ratio": arguments.neuron_ratio}
    ticket = TicketSettings(**{k: v for k, v in ratios.items() if v is not None}, neuron_scope="layer")
    layers, wide = shape["layers"], 4 * shape["hidden"]
    small = kept_widths(ticket, Widths((shape["heads"],) * layers, (wide,) * layers))
    values = {
        "vocab_size": VOCABULARY, "hidden_size": shape["hidden"], "num_hidden_layers": layers,
        "num_attention_heads": shape["heads"], "intermediate_size": wide,
        "max_position_embeddings": max(arguments.length),
    }  # fmt: skip
    torch.manual_seed(0)
    compact = EarlyBertConfig(
        **values, heads_per_layer=list(small.heads), neurons_per_layer=list(small.neurons)
    )
    return {"dense": BertModel(BertConfig(**values)).eval(), "compact": EarlyBertModel(compact).eval()}


def opened(folders: list[Path]) -> dict[str, Any]:
    """The encoders of exports, by their folders' names; the first is what the others are held against."""
    from safetensors import SafetensorError
    from transformers import AutoModel

    from earlybert import downstream  # noqa: F401 - registers EarlyBERT, so that no code of a folder runs
    from earlybert.config import SettingsError
    from earlybert.export import quiet_transformers

    found: dict[str, Any] = {}
    for folder in folders:
        name = folder.name if folder.name not in found else str(folder)
        if not (folder / "config.json").is_file():
            raise SettingsError(f"--export {folder}: no export is there; give what scripts/export.py wrote")
        try:
            with quiet_transformers():
                found[name] = AutoModel.from_pretrained(folder).eval()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise SettingsError(
                f"--export {folder}: its encoder cannot be read ({reason}); give what scripts/export.py wrote"
            ) from error
    return found


def in_pytorch(model: Any, *, device: str) -> Callable[[Any], Pass]:
    """From input ids to a forward pass that has ended when it returns."""
    import torch

    def bind(ids_BT: Any) -> Pass:
        mask_BT = torch.ones_like(ids_BT)

        def forward() -> object:
            with torch.inference_mode():
                found = model(input_ids=ids_BT, attention_mask=mask_BT)[0]
            if device == "cuda":
                torch.cuda.synchronize()
            return found

        return forward

    return bind


def in_onnxruntime(model: Any, path: Path) -> Callable[[Any], Pass]:
    """The same by ONNX Runtime, from a file that is written to `path`."""
    import onnxruntime
    import torch

    ids_BT = torch.ones(2, 8, dtype=torch.long)
    batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings(action="ignore"):  # and notes that two inputs share their axes
        torch.onnx.export(
            model, kwargs=batch, f=path, dynamo=True, verbose=False, input_names=list(batch),
            output_names=["hidden"], dynamic_shapes={name: {0: "batch", 1: "length"} for name in batch},
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Each session has threads of its own: they would spin on into the other model's turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def bind(ids_BT: Any) -> Pass:
        feed = {"input_ids": ids_BT.numpy(), "attention_mask": torch.ones_like(ids_BT).numpy()}
        return lambda: session.run(["hidden"], feed)[0]

    return bind


def in_turn(passes: Mapping[str, Pass], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each pass, A B A B, after one that warms up: `rounds` of them, or at least five and as
    many as `seconds` allow."""
    for forward in passes.values():
        forward()
    times: dict[str, list[float]] = {name: [] for name in passes}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= _LEAST and time.perf_counter() - start > seconds:
            break
        for name, forward in passes.items():
            began = time.perf_counter()
            forward()
            times[name].append(1000 * (time.perf_counter() - began))
    return times


def spread(times: list[float]) -> Figures:
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": statistics.median(times), "low": low, "high": high, "rounds": len(times)}


def models_vocabulary(models: Mapping[str, Any]) -> int:
    """Ids that all models know."""
    return min(model.config.vocab_size for model in models.values())


def described(model: Any, lengths: list[int]) -> Figures:
    """Shape, and FLOPs of a token's pass through the encoder at each length."""
    from earlybert.targets import bert_work

    config = model.config
    layers = config.num_hidden_layers
    heads = getattr(config, "heads_per_layer", [config.num_attention_heads] * layers)
    neurons = getattr(config, "neurons_per_layer", [config.intermediate_size] * layers)

    def flops(length: int) -> float:
        size = {"hidden": config.hidden_size, "heads": config.num_attention_heads}
        return bert_work(**size, vocabulary=0, sequence_length=length, predicted=0).of(heads, neurons)

    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "heads": list(heads), "neurons": list(neurons),
        "flops": {str(length): flops(length) for length in lengths},
    }  # fmt: skip
