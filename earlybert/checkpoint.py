"""Checkpoints that are whole or not there: DeepSpeed's own ZeRO shards in a folder whose manifest is written
last.

DeepSpeed writes its files in place and moves `latest` before the other ranks have finished. So a save goes
into a hidden folder; when all ranks are done each file is made durable and hashed, the manifest is written,
and the folder gets its name in one rename. A folder under a good name without a valid manifest was not made
here and is never used.

After a load the logits of a fixed input are compared with those of the save, so a checkpoint that loads into
something else is noticed before a step is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from earlybert import dist, state
from earlybert.config import EarlyBertError, sync_folder, write_atomically
from earlybert.engine import Engine, parameter_groups
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining

FORMAT_VERSION = 1
log = logging.getLogger(__name__)
PROBE_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference of the probe's logits, relative to the largest, that other arithmetic may make."""
_NAME = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself; JSON beside DeepSpeed's files."""

    step: int
    """Optimizer steps taken."""
    experiment: str
    """Fingerprint of the experiment."""
    corpus: str
    """Fingerprint of the corpus."""
    world_size: int
    stage: int
    precision: str
    model: dict[str, Any]
    """The model's configuration at this step: its true shape."""
    progress: dict[str, Any]
    """Search and tickets (`engine.Progress`)."""
    trainer: dict[str, Any]
    """The trainer's position and the sums of the progress line that is still open."""
    logits: list[float]
    """A few logits of a fixed input, compared after loading."""
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    """{name: {"bytes", "sha256"}} of every file of the folder."""
    random_numbers: str = "keyed by (seed, step, micro-batch, rank): nothing to store"
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: Manifest


def save(
    engine: Engine,
    folder: Path,
    *,
    step: int,
    experiment: str,
    corpus: str,
    stage: int,
    precision: str,
    trainer: dict[str, Any],
    keep: int,
) -> Path:
    """Save under `folder`/step-NNNNNNN and return that path. Collective; call at an optimizer-step boundary.

    The `keep` newest checkpoints stay; older ones go only after this one is complete.
    """
    logits = probe(engine)
    if not dist.from_rank_0(all(map(math.isfinite, logits))):
        raise EarlyBertError(
            f"the model's logits are not finite after step {step}: nothing was saved, the checkpoint before "
            "this one stays. Start again under another name= with a lower phases.learning_rate, a longer "
            "warmup, or bf16 instead of fp16"
        )
    tag = f"step-{step:07d}"
    hidden, final = folder / f".partial-{tag}", folder / tag
    if dist.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".partial-*"):  # of saves that a crash cut short
            shutil.rmtree(left, ignore_errors=True)
    dist.barrier()
    if engine.anchor is not None:
        hidden.mkdir(exist_ok=True)
        torch.save(state.to_tensors(engine.anchor), _anchor(hidden))
    engine.inner.save_checkpoint(str(folder), tag=hidden.name, client_state={}, save_latest=False)
    dist.barrier()
    files = _hash_files(hidden)
    manifest = Manifest(
        step=step,
        experiment=experiment,
        corpus=corpus,
        world_size=dist.world_size(),
        stage=stage,
        precision=precision,
        model=engine.module.config.to_dict(),
        progress=engine.progress.to_json(),
        trainer=trainer,
        logits=logits,
        versions={
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
        },
        files=files,
    )
    if dist.rank() == 0:
        write_atomically(hidden / "manifest.json", json.dumps(asdict(manifest), indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.rename(hidden, final)
        sync_folder(folder)
        write_atomically(folder / "latest", tag)
        # A name past this step was broken when this run resumed before it: it is not one of the newest good.
        past = [name for name in names(folder) if name > tag]
        for old in [*past, *names(folder)[len(past) + keep :]]:
            shutil.rmtree(folder / old)
    dist.barrier()
    return final


def names(folder: Path) -> list[str]:
    """Names of the checkpoints under `folder`, newest first; whether they are good is for `newest_good` to
    say."""
    found = (
        [entry.name for entry in folder.iterdir() if _NAME.fullmatch(entry.name)] if folder.is_dir() else []
    )
    return sorted(found, reverse=True)


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest; raises EarlyBertError naming the folder where it is missing or of another
    format."""
    try:
        values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if values["version"] != FORMAT_VERSION:
            raise EarlyBertError(
                f"{folder}: checkpoint format {values['version']}, this program reads {FORMAT_VERSION}; "
                "use the program version that wrote it"
            )
        return Manifest(**values)
    except OSError as error:
        raise EarlyBertError(
            f"{folder}: no manifest.json, so not a complete checkpoint; use another one"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, EarlyBertError):
            raise
        raise EarlyBertError(
            f"{folder}: manifest.json cannot be read ({error}); use another checkpoint"
        ) from error


def flaws(folder: Path, manifest: Manifest, *, only: slice | None = None) -> list[str]:
    """What is wrong with the checkpoint's files, in words; `only` checks a share of them."""
    wrong = []
    for name in sorted(manifest.files)[only or slice(None)]:
        stated = manifest.files[name]
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != stated["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, the manifest says {stated['bytes']}")
        elif _sha256(path) != stated["sha256"]:
            wrong.append(f"{name} does not match its sha256")
    return wrong


def newest_good(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint whose files match their checksums; the broken ones are named in the log.

    Collective: the ranks share the hashing. None where there is none at all.
    """
    for name in dist.from_rank_0(names(folder)):
        path = folder / name
        try:
            manifest = read_manifest(path)
            wrong = flaws(path, manifest, only=slice(dist.rank(), None, dist.world_size()))
        except EarlyBertError as error:
            manifest, wrong = None, [str(error)]
        everywhere = [flaw for found in dist.gather_objects(wrong) for flaw in found]
        if not everywhere and manifest is not None:
            return Checkpoint(path, manifest)
        if dist.rank() == 0:
            log.warning(
                "checkpoint %s is broken and not used: %s", name, "; ".join(dict.fromkeys(everywhere))
            )
    return None


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Load DeepSpeed's shards into an engine of the same shape, stage and world size. Collective.

    Raises EarlyBertError on every rank where DeepSpeed finds nothing to load, or where the fixed input's
    logits differ from the save's by more than the precision explains; a smaller difference is a warning.
    """
    folder = checkpoint.folder
    path, _ = engine.inner.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise EarlyBertError(
            f"{folder}: DeepSpeed could not load it; see its message above, or remove the folder"
        )
    anchor = _anchor(folder)
    engine.anchor = state.from_tensors(torch.load(anchor)) if anchor.is_file() else None
    now, then = probe(engine), checkpoint.manifest.logits
    own = max(abs(a - b) for a, b in zip(now, then, strict=True))
    worst = max(dist.gather_objects(own if math.isfinite(own) else math.inf))
    bound = PROBE_TOLERANCE[checkpoint.manifest.precision] * max(1.0, *map(abs, then))
    if worst > bound:
        raise EarlyBertError(
            f"{folder}: after loading, the logits of the fixed input differ by up to {worst:.3g} from "
            f"those at the save (at most {bound:.3g} is rounding); the code or the device's arithmetic "
            f"changed: use the versions in its manifest ({checkpoint.manifest.versions})"
        )
    if worst and dist.rank() == 0:
        log.warning(
            "%s: after loading, the logits of the fixed input differ by up to %.3g from those at the save: "
            "versions or machine differ, so the run goes on, but not bit for bit",
            folder,
            worst,
        )


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The fp32 master weights of a checkpoint by parameter name, on the host, put together from the ranks'
    shards.

    Tied names stand once for each name. One process reads all shards: twice the model's fp32 size in memory.
    """
    folder, stage = checkpoint.folder, checkpoint.manifest.stage
    if stage:
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints each of its steps
            found = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
        return {name: value.float() for name, value in found.items()}
    # ZeRO-0 keeps the module's own weights; where those are 16 bits wide its optimizer has the masters, in
    # the order of the parameter groups, which is that of the names the group order follows.
    stored = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    module, optimizer = stored["module"], stored["optimizer"]
    result = {name: value.float() for name, value in module.items()}
    if optimizer is not None and "fp32_groups" in optimizer:
        with torch.device("meta"):
            model = EarlyBertForPreTraining(EarlyBertConfig.from_dict(checkpoint.manifest.model))
        names = {id(p): name for name, p in model.named_parameters()}
        groups = parameter_groups(model, weight_decay=0.0)
        for group, masters in zip(groups, optimizer["fp32_groups"], strict=True):
            for parameter, master in zip(group["params"], masters, strict=True):
                result[names[id(parameter)]] = master.detach().float()
        for tied, source in (model._tied_weights_keys or {}).items():
            if tied in result:
                result[tied] = result[source]
    return result


def probe(engine: Engine) -> list[float]:
    """A few logits of a fixed input, in eval mode, the same on every rank. Collective under ZeRO-3."""
    config = engine.module.config
    length = min(16, config.max_position_embeddings)
    device = next(engine.module.parameters()).device
    ids = (torch.arange(length, device=device) * 7919 % config.vocab_size)[None]
    positions = torch.arange(0, length, 4, device=device)[None]
    training = engine.module.training
    engine.inner.eval()
    with torch.no_grad():
        logits = engine.inner(input_ids=ids, masked_positions=positions).prediction_logits
    engine.inner.train(training)
    return logits.float().flatten()[:: max(1, logits.numel() // 8)][:8].tolist()


def _anchor(folder: Path) -> Path:
    """This rank's part of the weights that a rewind brings back, where a draw is still to come."""
    return folder / f"anchor-rank-{dist.rank():05d}.pt"


def same_layout(manifest: Manifest, *, stage: int, precision: str) -> None:
    """Raise EarlyBertError where the checkpoint was written by other ranks or another ZeRO stage than now."""
    pairs: Sequence[tuple[str, Any, Any, str]] = (
        ("ranks", manifest.world_size, dist.world_size(), "start as many processes"),
        ("ZeRO stage", manifest.stage, stage, "use a DeepSpeed JSON of that stage"),
        ("precision", manifest.precision, precision, "use a DeepSpeed JSON of that precision"),
    )
    for what, then, now, remedy in pairs:
        if then != now:
            raise EarlyBertError(
                f"the checkpoint of step {manifest.step} has {what} {then}, this start {now}; {remedy}"
            )


def _hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Make every file durable and hash it, the ranks taking turns at the files. Collective."""
    # Rank 0's list: on a shared file system the others may not see a new name yet.
    paths = dist.from_rank_0(sorted(path for path in folder.rglob("*") if path.is_file()))
    own = {}
    for path in paths[dist.rank() :: dist.world_size()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        own[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return {name: entry for part in dist.gather_objects(own) for name, entry in part.items()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
