"""The DeepSpeed JSON: engine mechanics only (ZeRO stage, precision, offload, communication), checked before
it is used.

DeepSpeed ignores an unknown top-level key, so `zero_optimisation` trains at stage 0 without a word, and it
reads "auto" as the default. Both are refused here. What the experiment owns (batch, optimizer, learning rate,
clipping) may not stand in the JSON as well: no number twice.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from earlybert.config import SettingsError, read_json, refuse_unknown

MECHANICS = frozenset(
    {
        "activation_checkpointing", "aio", "bf16", "comet", "comms_logger", "communication_data_type",
        "compile", "data_types", "disable_allgather", "dump_state", "flops_profiler", "fp16",
        "gradient_predivide_factor", "memory_breakdown", "prescale_gradients", "steps_per_print",
        "torch_autocast", "timers", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer", "zero_optimization",
    }
)  # fmt: skip
"""Top-level keys of DeepSpeed 0.19 that are mechanics."""

OWNED = {
    "train_batch_size": "phases.batch",
    "train_micro_batch_size_per_gpu": "phases.micro_batch",
    "gradient_accumulation_steps": "phases.batch and phases.micro_batch",
    "optimizer": "the [optimizer] table",
    "scheduler": "phases.learning_rate, warmup and decay",
    "gradient_clipping": "optimizer.clipping",
    "tensorboard": "the run folder (TensorBoard is always written there)",
    "csv_monitor": "the run folder (metrics.jsonl is always written there)",
    "checkpoint": "the [checkpoint] table",
}
"""Top-level keys whose content the experiment owns, and where it stands there."""

_TABLES = {
    "activation_checkpointing", "aio", "bf16", "comms_logger", "compile", "data_types", "flops_profiler",
    "fp16", "timers", "torch_autocast", "zero_optimization",
}  # fmt: skip
"""Keys whose value is an object."""

_SECTIONS: dict[str, frozenset[str]] = {
    "data_types": frozenset({"grad_accum_dtype", "buffer_dtype"}),
    "flops_profiler": frozenset(
        {
            "enabled",
            "profile_step",
            "module_depth",
            "top_modules",
            "detailed",
            "output_file",
            "recompute_fwd_factor",
        }
    ),
    "torch_autocast": frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
}
"""Sections that DeepSpeed itself does not check for unknown keys."""


def load(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return (settings, name for messages) of a DeepSpeed JSON given as a path or as a mapping."""
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source)), "DeepSpeed config"
    return read_json(source), str(source)


def load_beside(name: str, *, experiment: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check the JSON that an experiment file names, relative to the working folder or to the file's
    own; raises SettingsError for what it must not say."""
    path, beside = Path(name), Path(experiment).parent / name
    values, where = load(beside if not path.exists() and beside.exists() else path)
    check(values, where=where, experiment=str(experiment))
    return values


def check(values: Mapping[str, Any], *, where: str, experiment: str | None = None) -> None:
    """Raise SettingsError for an unknown key, a value "auto", fp16 with bf16, state that a draw cannot reach,
    or, when `experiment` names the file of an experiment, a key that the experiment owns."""
    if experiment is not None:
        for key, owner in OWNED.items():
            if key in values:
                raise SettingsError(
                    f"{where}: {key} = {values[key]!r} is owned by the experiment; remove it there and "
                    f"set {owner} in {experiment}"
                )
    refuse_unknown(values, MECHANICS | set(OWNED), where=where)
    for path, value in leaves(values):
        if isinstance(value, str) and value.lower() == "auto":
            raise SettingsError(f'{where}: {path} = "auto" means nothing without a Trainer; write the value')
    for section in _TABLES & values.keys():
        if not isinstance(values[section], Mapping):
            inside = '{"stage": 2}' if section == "zero_optimization" else '{"enabled": true}'
            raise SettingsError(
                f"{where}: {section} = {json.dumps(values[section])}: must be an object, such as {inside}"
            )
    zero = values.get("zero_optimization") or {}
    for place, found in (
        *((f"zero_optimization.{key}", zero.get(key)) for key in ("offload_optimizer", "offload_param")),
        ("optimizer", values.get("optimizer")),
    ):
        if found is not None and not isinstance(found, Mapping):
            inside = '{"type": "AdamW"}' if place == "optimizer" else '{"device": "cpu"}'
            raise SettingsError(
                f"{where}: {place} = {json.dumps(found)}: must be an object, such as {inside}"
            )
    for section, known in _SECTIONS.items():
        if isinstance(values.get(section), Mapping):
            refuse_unknown(values[section], known, where=f"{where}: {section}")
    enabled = [key for key in ("fp16", "bf16", "torch_autocast") if (values.get(key) or {}).get("enabled")]
    if len(enabled) > 1:
        raise SettingsError(f"{where}: {' and '.join(enabled)} are both enabled; enable one")
    stage = stage_of(values)
    if stage not in (0, 1, 2, 3):
        raise SettingsError(f"{where}: zero_optimization.stage = {stage!r}: choose 0, 1, 2 or 3")
    for refused, reason in (
        (
            stage == 0 and precision_of(values) == "fp16",
            "fp16 at ZeRO stage 0: DeepSpeed 0.19.8 divides the gradients of a torch optimizer by a loss "
            "scale that the loss never had; use stage 1, which shards the optimizer and nothing else",
        ),
        (
            stage == 0 and "offload_optimizer" in zero,
            "offload_optimizer at ZeRO stage 0: there are no shards to offload; use stage 1, 2 or 3",
        ),
        (
            stage < 3 and "offload_param" in zero,
            f"offload_param at ZeRO stage {stage}: only stage 3 shards the parameters; use stage 3",
        ),
        (
            any(
                (zero.get(key) or {}).get("device") == "nvme"
                for key in ("offload_optimizer", "offload_param")
            ),
            "offload to nvme: what lies on disk cannot be read for a draw or a save; offload to cpu",
        ),
        (
            bool(zero.get("zenflow")) or bool((zero.get("offload_optimizer") or {}).get("super_offload")),
            "zenflow or super_offload: they keep optimizer states of their own, which a draw does not reach; "
            'use {"device": "cpu"} alone',
        ),
        (
            any((values.get(key) or {}).get(f"{key}_master_weights_and_grads") for key in ("bf16", "fp16")),
            "master weights in 16 bits: checkpoints and draws keep them in fp32, and a ticket is ranked by "
            "fp32 coefficients; leave it out",
        ),
        (
            str((values.get("optimizer") or {}).get("type", "")).lower() == "muon",
            "Muon: under ZeRO, DeepSpeed 0.19.8 keeps its momentum for whole matrices beside partitions that "
            "end inside of them, so a draw cannot cut it; use AdamW or LAMB",
        ),
    ):
        if refused:
            raise SettingsError(f"{where}: {reason}")


def stage_of(values: Mapping[str, Any]) -> Any:
    """The ZeRO stage of a DeepSpeed config."""
    return (values.get("zero_optimization") or {}).get("stage", 0)


def precision_of(values: Mapping[str, Any]) -> str:
    """ "bf16", "fp16" or "fp32": the type of the model's parameters."""
    return next((key for key in ("bf16", "fp16") if (values.get(key) or {}).get("enabled")), "fp32")


def complete(
    values: Mapping[str, Any], *, micro_batch: int, accumulation: int, clipping: float | None
) -> dict[str, Any]:
    """The JSON that DeepSpeed gets: mechanics plus the experiment's numbers, with the traps closed."""
    full = copy.deepcopy(dict(values))
    full["train_micro_batch_size_per_gpu"] = micro_batch
    full["gradient_accumulation_steps"] = accumulation
    if clipping is not None:
        full["gradient_clipping"] = clipping
    return close_traps(full)


def close_traps(values: Mapping[str, Any]) -> dict[str, Any]:
    """Set what this project needs where the JSON is silent: no process-wide patch of F.linear, no chatter, no
    timer."""
    full = copy.deepcopy(dict(values))
    full.setdefault("steps_per_print", 10**9)
    # DeepSpeed's timer of samples a second waits for the device twice a micro-batch, and nobody reads it.
    full.setdefault("timers", {"throughput": {"enabled": False}})
    # DeepSpeed knows its own optimizers by their exact type; optim.Lamb is tested under every stage here.
    full.setdefault("zero_allow_untested_optimizer", True)
    # With an optimizer offloaded to the CPU it asks for its own Adam, which an exact resume rules out.
    full.setdefault("zero_force_ds_cpu_optimizer", False)
    zero = full.setdefault("zero_optimization", {"stage": 0})
    # ZeRO-3 replaces torch.nn.functional.linear for the whole process otherwise, and never undoes it.
    zero.setdefault("memory_efficient_linear", False)
    return full


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of all that is no table and no list."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from leaves(value, f"{path}.{index}")
    else:
        yield path, values
