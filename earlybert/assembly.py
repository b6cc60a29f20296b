"""From an experiment to what trains it: the corpus and its samples, DeepSpeed's config, the optimizer, the
engine. All that can be wrong with them is found here, before a run folder is made.
"""

from __future__ import annotations

import logging
import socket
from typing import Any

import torch

from earlybert import checkpoint, dist, mechanics, probes, run, schedule, targets
from earlybert.adapters import enable_checkpointing
from earlybert.checkpoint import Checkpoint
from earlybert.config import EarlyBertError
from earlybert.data import PackedSamples, check_vocabulary
from earlybert.engine import Engine, initialize
from earlybert.experiment import Experiment
from earlybert.initial import seeded_model
from earlybert.lifecycle import check_config, empty_module
from earlybert.loader import Loader, prepare_workers
from earlybert.model import EarlyBertConfig, EarlyBertForPreTraining
from earlybert.progress import EarlyBird, Progress
from earlybert.schedule import At
from earlybert.shards import Corpus, tokenizer_sha256

log = logging.getLogger(__name__)

_MANY_ADDITIONS = 32
"""A sum in bf16 has 8 bits; that of 32 equal addends is 2**5 times each, so of the next it takes three."""


class Assembly:
    """The parts of a run. Collective; raises EarlyBertError for what the user can mend."""

    def __init__(self, experiment: Experiment, mechanics_values: dict[str, Any]) -> None:
        self.experiment, self.mechanics = experiment, mechanics_values
        run.check_alike(experiment, mechanics_values)
        self.stage = mechanics.stage_of(mechanics_values)
        self.precision = mechanics.precision_of(mechanics_values)
        if experiment.data.workers:
            prepare_workers()
        run.check_cores(precision=self.precision)
        for phase in range(len(experiment.phases)):
            check_config(self.deepspeed_config(phase), where=experiment.deepspeed)
        self._warn_of_rounding()
        self.corpus = _opened(experiment.data.corpus)
        run.check_same({"the corpus": self.corpus.manifest.content})
        self._check_shards()
        vocabulary = self.corpus.manifest.vocab_size
        check_vocabulary(
            self.corpus,
            vocab_size=vocabulary,
            tokenizer_sha256=tokenizer_sha256(self.corpus.tokenizer_folder),
        )
        self.samples = {
            (split, length): PackedSamples(
                self.corpus,
                settings=experiment.data if split == "train" else experiment.held_out,
                sequence_length=length,
                seed=experiment.seed,
                split=split,
            )
            for split in ("train", "held_out")
            for length in sorted({phase.sequence_length for phase in experiment.phases})
        }
        if experiment.ticket.enabled:
            targets.check(experiment.ticket, dense=experiment.dense_widths, work=self.work())
        probes.check(experiment, tokenizer=self.corpus.tokenizer_folder)

    def engine(self, found: Checkpoint | None, *, phase: int) -> Engine:
        """The dense model from its seed, or the shape and state of a checkpoint. Collective."""
        settings = self.experiment
        if found is None:
            dense = settings.model.config(
                vocab_size=self.corpus.manifest.vocab_size,
                next_sentence=settings.data.objective != "mlm",
                coefficients="train" if settings.ticket.enabled and settings.ticket.searches else "none",
            )
            model: torch.nn.Module = seeded_model(dense, seed=settings.seed)
            progress, restored = Progress(), None
        else:
            # The true shape stands in the manifest.
            shape = EarlyBertConfig.from_dict(found.manifest.model)
            model = empty_module(lambda: EarlyBertForPreTraining(shape), config=self.deepspeed_config(phase))
            progress = Progress.from_json(found.manifest.progress, where=str(found.folder))
            restored = checkpoint.read(found)
        if settings.model.checkpointing:
            enable_checkpointing(model)
        engine = initialize(
            model=model,
            config=self.deepspeed_config(phase),
            early_bird=EarlyBird(settings=settings.ticket, seed=settings.seed, work=self.work()),
            optimizer=settings.optimizer.build,
            weight_decay=settings.optimizer.weight_decay,
            progress=progress,
            restored=restored,
        )
        if found is not None:
            checkpoint.verify(engine, found)
        if settings.model.compile:
            engine.compile()
        return engine

    def loader(self, at: At, *, first: int) -> Loader:
        """This rank's micro-batches from position `first` on."""
        samples = self.samples["train", at.settings.sequence_length]
        return Loader(
            samples,
            micro_batch=at.settings.micro_batch,
            micro_batches=at.settings.micro_batches,
            accumulation=at.settings.accumulation(world_size=dist.world_size()),
            rank=dist.rank(),
            world_size=dist.world_size(),
            position=samples.position(first),
            workers=self.experiment.data.workers,
            pin_memory=torch.cuda.is_available(),
        )

    def work(self) -> targets.Work:
        """What a step costs, for budgets and for what is told of a draw."""
        return targets.bert_work(
            hidden=self.experiment.model.hidden,
            heads=self.experiment.model.heads,
            vocabulary=self.corpus.manifest.vocab_size,
            sequence_length=schedule.mean_length(self.experiment.phases),
            predicted=self.experiment.data.mask_probability,
        )

    def deepspeed_config(self, phase: int) -> dict[str, Any]:
        """The JSON that DeepSpeed gets in a phase."""
        settings = self.experiment.phases[phase]
        return mechanics.complete(
            self.mechanics,
            micro_batch=settings.micro_batch,
            accumulation=settings.accumulation(world_size=dist.world_size()),
            clipping=self.experiment.optimizer.clipping,
        )

    def _warn_of_rounding(self) -> None:
        """Below ZeRO-2 DeepSpeed adds the gradients of micro-batches up in bf16, and a small one is lost in a
        large sum."""
        asked = self.mechanics.get("data_types", {}).get("grad_accum_dtype")
        world_size = dist.world_size()
        most = max(phase.accumulation(world_size=world_size) for phase in self.experiment.phases)
        rounded = self.stage < 2 and self.precision == "bf16" and asked != "fp32"
        if rounded and most >= _MANY_ADDITIONS and dist.rank() == 0:
            log.warning(
                f"each rank adds up {most} micro-batches in bf16, rounding every sum to 8 bits; use "
                "ds_configs/zero2_bf16.json, which adds in fp32, or a larger micro_batch in [[phases]]"
            )

    def _check_shards(self) -> None:
        """Raise EarlyBertError on every rank where a shard's checksum is off. The ranks of a machine share
        the hashing: each machine may have a copy of its own."""
        hosts = dist.gather_objects(socket.gethostname())
        beside = [rank for rank, host in enumerate(hosts) if host == hosts[dist.rank()]]
        own = self.corpus.flaws(only=slice(beside.index(dist.rank()), None, len(beside)))
        if wrong := dist.told_by_host(own):
            raise EarlyBertError("; ".join(wrong))


def _opened(folder: str) -> Corpus:
    """The corpus; EarlyBertError on every rank where one of them cannot open it. Collective."""
    found: Corpus | None = None
    wrong = []
    try:
        found = Corpus.open(folder, verify="size")
    except (EarlyBertError, OSError) as error:  # the others wait to hear of it
        wrong.append(str(error))
    told = dist.told_by_host(wrong)
    if told or found is None:
        raise EarlyBertError("; ".join(told))
    return found
