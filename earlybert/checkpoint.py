"""Checkpoints that are whole or not there: one file of numbers a rank, in a folder whose manifest is written
last.

A save copies what each rank owns to host memory (`Saver.begin`), writes it from a thread while training goes
on, and is committed at a later step, when every rank's file is durable (`Saver.commit`): a hidden folder gets
its manifest and then, in one rename, its name. A folder under a good name without a valid manifest was not
made here and is never used.

A checkpoint is loaded by any number of ranks at any ZeRO stage (`state_files`). After a load the logits of a
fixed input are compared with those of the save, so one that loads into something else is noticed before a
step is taken.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers

from earlybert import dist, faults, state, state_files
from earlybert.config import EarlyBertError, sync_folder, write_atomically
from earlybert.engine import Engine
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining
from earlybert.shards import file_sha256

FORMAT_VERSION = 2
log = logging.getLogger(__name__)
PROBE_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference of the probe's logits, relative to the largest, that other arithmetic may make."""
_NAME = re.compile(r"step-(\d{7,})")
_PARTIAL, _BROKEN = ".partial-", "broken-"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself; JSON beside the ranks' files."""

    step: int
    """Optimizer steps taken."""
    experiment: str
    """Fingerprint of the experiment."""
    corpus: str
    """Fingerprint of the corpus."""
    world_size: int
    """Ranks that wrote it."""
    stage: int
    """Their ZeRO stage."""
    precision: str
    model: dict[str, Any]
    """The model's configuration at this step: its true shape."""
    progress: dict[str, Any]
    """Search and tickets (`engine.Progress`)."""
    trainer: dict[str, Any]
    """The trainer's position and the sums of the progress line that is still open."""
    state: dict[str, Any]
    """Shapes, counters and names of the moments (`state_files.describe`)."""
    logits: list[float]
    """A few logits of a fixed input, compared after loading."""
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    """{name: {"bytes", "sha256"}} of every file of the folder."""
    random_numbers: str = "keyed by (seed, step, micro-batch of the global batch): nothing to store"
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: Manifest


class Saver:
    """Writes the checkpoints of one run, one at a time, and keeps the newest good ones."""

    def __init__(
        self,
        folder: Path,
        *,
        experiment: str,
        corpus: str,
        stage: int,
        precision: str,
        keep: int,
        good: Sequence[str] = (),
        published: Callable[[Path], None] | None = None,
    ) -> None:
        """`good`: names, oldest first, of what lies in `folder` and is known to be good; `published` is
        called on rank 0 with each new checkpoint, before older ones go; the rest as in `Manifest`."""
        self.folder = folder
        self.failed: str | None = None
        """Why the last save came to nothing; None where it did not."""
        self._what: dict[str, Any] = {
            "experiment": experiment, "corpus": corpus, "stage": stage, "precision": precision,
        }  # fmt: skip
        self._keep, self._announce = keep, published
        self._good = list(good)
        self._pending: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._written: tuple[str, dict[str, Any]] | str = ""
        if dist.rank() == 0:
            for left in folder.glob(_PARTIAL + "*"):  # of saves that a crash cut short
                shutil.rmtree(left, ignore_errors=True)

    @property
    def pending(self) -> bool:
        """True from `begin` to `commit`, on all ranks alike."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """True while this rank's file is not yet durable."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, engine: Engine, *, step: int, trainer: dict[str, Any]) -> None:
        """Copy the state to host memory and start to write it as step-NNNNNNN. Collective; call at an
        optimizer-step boundary.

        A save that is still being written is committed first. Raises EarlyBertError where the model's logits
        are not finite: nothing is saved then.
        """
        if self.pending:
            self.commit()
        logits = probe(engine)
        if not dist.from_rank_0(all(map(math.isfinite, logits))):
            raise EarlyBertError(
                f"the model's logits are not finite after step {step}: nothing was saved, the checkpoint "
                "before this one stays. Start again under another name= with a lower learning_rate, a longer "
                "warmup, or bf16 instead of fp16"
            )
        own, anchor = state.read(engine.inner), engine.anchor
        faults.point("save.snapshot")
        self._pending = {
            "step": step,
            **self._what,
            "world_size": dist.world_size(),
            "model": engine.module.config.to_dict(),
            "progress": engine.progress.to_json(),
            "trainer": trainer,
            "state": state_files.describe(own, anchor),
            "logits": logits,
            "versions": {
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "transformers": transformers.__version__,
            },
        }
        name = state_files.file_name(dist.rank(), dist.world_size())

        def write() -> None:
            try:
                self._written = name, state_files.write(self._hidden / name, own, anchor)
            except Exception as error:  # reported at the commit, on all ranks
                self._written = f"rank {dist.rank()} could not write {self._hidden / name}: {error}"

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def commit(self) -> Path | None:
        """Wait for every rank's file and give the checkpoint its name; its path, or None where it failed.

        Collective. A failure (no space left) is a warning and `failed`: the hidden folder goes, the
        checkpoints before it stay.
        """
        assert self._pending is not None and self._thread is not None, "nothing was begun"
        self._thread.join()
        pending, self._thread = self._pending, None
        written = dist.gather_objects(self._written)
        wrong = [part for part in written if isinstance(part, str)]
        problem = "; ".join(wrong) or None
        if dist.rank() == 0:
            if problem is None:
                try:
                    self._publish(Manifest(**pending, files=dict(written)))  # type: ignore[arg-type]
                except OSError as error:
                    problem = f"rank 0 could not write the manifest of step {pending['step']}: {error}"
            if problem is not None:
                shutil.rmtree(self._hidden, ignore_errors=True)
        self.failed = dist.from_rank_0(problem)
        tag, self._pending = _tag(pending["step"]), None
        if self.failed is not None:
            if dist.rank() == 0:
                log.warning("checkpoint %s was not saved: %s", tag, self.failed)
            return None
        self._good.append(tag)
        if dist.rank() == 0:
            if self._announce is not None:
                self._announce(self.folder / tag)
            self._retain()
        return self.folder / tag

    def check(self, *, step: int) -> None:
        """Raise EarlyBertError, on all ranks, where the save of `step`, the last one, came to nothing: for
        whoever ends with it."""
        if self.failed is not None:
            raise EarlyBertError(
                f"the checkpoint of step {step} could not be saved ({self.failed}); make room, then start "
                "the same command again: it goes on from the checkpoint before"
            )

    @property
    def _hidden(self) -> Path:
        assert self._pending is not None
        return self.folder / (_PARTIAL + _tag(self._pending["step"]))

    def _publish(self, manifest: Manifest) -> None:
        """Rank 0 only."""
        tag = _tag(manifest.step)
        faults.point("save.manifest")
        write_atomically(self._hidden / "manifest.json", _sealed(manifest))
        # A name at or past this step was not good when this run resumed before it: its files may tell why.
        for name in [name for name in names(self.folder) if name >= tag]:
            shutil.rmtree(self.folder / (_BROKEN + name), ignore_errors=True)
            os.rename(self.folder / name, self.folder / (_BROKEN + name))
        faults.point("save.rename")
        os.rename(self._hidden, self.folder / tag)
        sync_folder(self.folder)
        faults.point("save.latest")
        write_atomically(self.folder / "latest", tag)

    def _retain(self) -> None:
        """Remove what is older than the newest `keep` that are known to be good; rank 0 only.

        A name that this run has not written or loaded may be broken, so it counts for nothing.
        """
        if len(self._good) < self._keep:
            return
        kept = set(self._good[-self._keep :])
        for old in [name for name in names(self.folder) if name not in kept]:
            faults.point("save.retention")
            shutil.rmtree(self.folder / old, ignore_errors=True)


def save(
    engine: Engine, folder: Path, *, step: int, trainer: dict[str, Any] | None = None, keep: int, **what: Any
) -> Path:
    """Save once and wait for it; arguments as `Saver`'s. Collective. Raises EarlyBertError where it fails."""
    there = [name for name in dist.from_rank_0(names(folder))[::-1] if name < _tag(step)]
    saver = Saver(folder, keep=keep, good=there, **what)  # nobody has said that they are not
    saver.begin(engine, step=step, trainer=trainer or {})
    path = saver.commit()
    if path is None:
        raise EarlyBertError(f"{folder}: {saver.failed}")
    return path


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
        seal = values.pop("sha256", None)
        if values["version"] != FORMAT_VERSION:
            raise EarlyBertError(
                f"{folder}: checkpoint format {values['version']}, this program reads {FORMAT_VERSION}; "
                "use the program version that wrote it"
            )
        if seal != _seal(values):
            raise ValueError("it does not match the sha256 at its end")
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
        if name != path.name:
            wrong.append(f"{name!r} is no name of a file in this folder")
        elif not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != stated["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, the manifest says {stated['bytes']}")
        elif file_sha256(path) != stated["sha256"]:
            wrong.append(f"{name} does not match its sha256")
    return wrong


def newest_good(folder: Path, *, of: tuple[str, str] | None = None) -> Checkpoint | None:
    """The newest complete checkpoint whose files match their checksums; the others are named in the log.

    `of`: the fingerprints of the experiment and the corpus that it must belong to. Collective: the ranks
    share the hashing. None where there is none at all.
    """
    for name in dist.from_rank_0(names(folder)):
        path = folder / name
        manifest, wrong = None, []
        try:
            manifest = read_manifest(path)
            if of is not None and (manifest.experiment, manifest.corpus) != of:
                wrong.append("its manifest is of another experiment or corpus")
            else:
                wrong += flaws(path, manifest, only=slice(dist.rank(), None, dist.world_size()))
        except (EarlyBertError, OSError) as error:  # a disk that fails; the others wait to hear of it
            wrong.append(str(error))
        told = dist.told_by_host(wrong)
        if manifest is not None and not told:
            return Checkpoint(path, manifest)
        if dist.rank() == 0:
            log.warning("checkpoint %s is not used: %s", path, "; ".join(told))
    return None


def read(checkpoint: Checkpoint) -> tuple[state.State, state.State | None]:
    """This rank's share of a checkpoint's state, and of the anchor to rewind to. EarlyBertError on every rank
    where the files do not hold together. Collective."""
    manifest = checkpoint.manifest
    try:
        found, wrong = state_files.read(checkpoint.folder, list(manifest.files), manifest.state), None
    except EarlyBertError as error:
        found, wrong = None, str(error)
    problems = [problem for problem in dist.gather_objects(wrong) if problem is not None]
    if problems or found is None:
        raise EarlyBertError("; ".join(dict.fromkeys(problems)))
    return found


def load(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put a checkpoint into an engine of the same shape; its ZeRO stage and its ranks may be others.

    Collective. Errors as `read` and `verify`.
    """
    engine.restore(*read(checkpoint))
    verify(engine, checkpoint)


def verify(engine: Engine, checkpoint: Checkpoint) -> None:
    """Compare the fixed input's logits with those of the save. Collective.

    Raises EarlyBertError on every rank where they differ by more than the precision explains; a smaller
    difference is a warning, unless other ranks or another stage explain it.
    """
    folder, manifest = checkpoint.folder, checkpoint.manifest
    now, then = probe(engine), manifest.logits
    own = max(abs(a - b) for a, b in zip(now, then, strict=True))
    worst = max(dist.gather_objects(own if math.isfinite(own) else math.inf))
    bound = PROBE_TOLERANCE[manifest.precision] * max(1.0, *map(abs, then))
    if worst > bound:
        raise EarlyBertError(
            f"{folder}: after loading, the logits of the fixed input differ by up to {worst:.3g} from "
            f"those at the save (at most {bound:.3g} is rounding); the code or the device's arithmetic "
            f"changed: use the versions in its manifest ({manifest.versions})"
        )
    if worst and dist.rank() == 0:
        log.warning(
            "%s: after loading, the logits of the fixed input differ by up to %.3g from those at the save: "
            "versions or machine differ, so the run goes on, but not bit for bit",
            folder,
            worst,
        )


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The fp32 master weights of a checkpoint by parameter name, on the host; tied names stand once for each
    name. EarlyBertError as `read`."""
    manifest = checkpoint.manifest
    found = state_files.masters(checkpoint.folder, list(manifest.files), manifest.state)
    with torch.device("meta"):
        model = EarlyBertForPreTraining(EarlyBertConfig.from_dict(manifest.model))
    for tied, source in (model._tied_weights_keys or {}).items():
        found[tied] = found[source]
    return found


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
        masked = {"masked_positions": positions} if hasattr(engine.module, "cls") else {}
        logits = next(iter(engine(input_ids=ids, **masked).values()))
    engine.inner.train(training)
    return logits.float().flatten()[:: max(1, logits.numel() // 8)][:8].tolist()


def same_precision(manifest: Manifest, *, precision: str) -> None:
    """Raise EarlyBertError where the checkpoint was trained in another precision than now."""
    if manifest.precision != precision:
        raise EarlyBertError(
            f"the checkpoint of step {manifest.step} has precision {manifest.precision}, this start "
            f"{precision}; use a DeepSpeed JSON of that precision"
        )


def _tag(step: int) -> str:
    return f"step-{step:07d}"


def _seal(values: dict[str, Any]) -> str:
    """sha256 of a manifest's values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sealed(manifest: Manifest) -> str:
    """A manifest as JSON with its own sha256 at the end."""
    values = json.loads(json.dumps(asdict(manifest)))
    return json.dumps({**values, "sha256": _seal(values)}, indent=1) + "\n"
