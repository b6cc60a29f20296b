"""What is fine-tuned: the encoder of a run, of a checkpoint, of an export or of a stock BERT, with its
tokenizer.

The surprise: only the encoder (and its pooler) is taken. A head that a checkpoint brings was trained for
something else; the task's own starts fresh, from its seed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from earlybert import export, tasks
from earlybert.adapters import bert_layers
from earlybert.config import EarlyBertError
from earlybert.downstream import EarlyBertModel
from earlybert.model import EarlyBertConfig
from earlybert.recipes import Recipe
from earlybert.shrink import without_coefficients

_BODY, _POOLER = "bert.", "bert.pooler."
_NO_SHAPE = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"})
"""Of a configuration what says where it comes from."""
_PADDING = 1024
"""Rows of embeddings that a model may have above its vocabulary, to round it up."""


@dataclass(frozen=True)
class Origin:
    """A pretrained encoder on the host, in fp32."""

    name: str
    """As it was given."""
    config: EarlyBertConfig
    weights: Mapping[str, torch.Tensor]
    """By parameter name; those of the pooler only where it was trained."""
    tokenizer: Any
    facts: Mapping[str, Any]
    """Figures of the run that it comes from, where it comes from one."""

    @staticmethod
    def read(name: str) -> Origin:
        """Read a run folder (its newest good checkpoint), a checkpoint, an export, or a stock BERT by folder
        or hub name.

        Raises EarlyBertError where it is none of these, of another architecture, or has another vocabulary
        than its tokenizer.
        """
        path = Path(name)
        place: str | Path
        if (path / "checkpoints").is_dir() or (path / "manifest.json").exists():
            source = export.read_run(path)
            config, place = source.config, source.tokenizer
            facts = {} if source.training is None else source.training.headline
            weights = without_coefficients(bert_layers(config.num_hidden_layers), source.weights)
        else:
            config, weights = _stock(name)
            place, facts = name, {}
        found = Origin(
            name,
            config,
            {key: value.float() for key, value in weights.items() if key.startswith(_BODY)},
            tasks.tokenizer(place, of=name),
            facts,
        )
        # A tuned model's tokenizer cuts where its positions end, as an export's.
        longest = min(found.tokenizer.model_max_length, config.max_position_embeddings)
        found.tokenizer.model_max_length = longest
        largest = max(found.tokenizer.get_vocab().values())
        if not config.vocab_size - _PADDING <= largest + 1 <= config.vocab_size:
            raise EarlyBertError(
                f"{name}: its tokenizer goes up to id {largest}, its embeddings have {config.vocab_size} "
                "rows: they are of different vocabularies; put the tokenizer there that it was trained with"
            )
        return found

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of shape and weights, wherever they lie and whatever wrote them."""
        shape = {name: value for name, value in self.config.to_dict().items() if name not in _NO_SHAPE}
        told = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
        for key in sorted(self.weights):
            told.update(key.encode())
            told.update(self.weights[key].contiguous().numpy().tobytes())
        return told.hexdigest()

    def check(self, recipe: Recipe) -> None:
        """Raise EarlyBertError where a recipe asks for longer rows than there are positions."""
        if recipe.sequence_length > self.config.max_position_embeddings:
            raise EarlyBertError(
                f"{recipe.task}: sequence_length = {recipe.sequence_length}, but {self.name} has "
                f"{self.config.max_position_embeddings} positions; set recipe.sequence_length (or that of "
                "its [[recipes]]) to at most that"
            )

    def model(self, kind: Any, settings: Mapping[str, Any], *, coefficients: str, seed: int) -> Any:
        """A `kind` of `downstream` with this encoder; what it has beside it is initialised from `seed`."""
        values = {**self.config.to_dict(), **settings, "coefficients": coefficients}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = kind(type(self.config).from_dict(values))
        missing, unexpected = model.load_state_dict(dict(self.weights), strict=False)
        fresh = [key for key in missing if key.startswith(_BODY) and not key.startswith(_POOLER)]
        lost = [key for key in unexpected if not key.startswith(_POOLER)]
        assert not lost and all(key.endswith(".coefficients") for key in fresh), (lost, fresh)
        return model


def _stock(name: str) -> tuple[EarlyBertConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of what transformers finds under a folder or on the hub."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise EarlyBertError(
            f"{name}: no such folder; give a run folder, an export, or a BERT's folder or hub name"
        )
    try:
        found: Any = transformers.AutoConfig.from_pretrained(name)
        if found.model_type not in ("bert", "earlybert"):
            raise EarlyBertError(
                f"{name} is a {found.model_type}: scripts/finetune.py tunes BERTs; earlybert.initialize "
                "takes others in a script of your own"
            )
        config = EarlyBertConfig.from_dict({**found.to_dict(), "coefficients": "none"})
        with export.quiet_transformers():  # a pooler that is missing, a head that is too much: all is well
            loaded: Any = EarlyBertModel.from_pretrained(name, config=config, output_loading_info=True)
    except EarlyBertError:
        raise
    except Exception as error:  # a configuration's wrong values end in errors of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EarlyBertError(
            f"{name}: no model could be read there ({reason}); give a run folder, an export, or a folder or "
            "hub name of a BERT"
        ) from error
    model, told = loaded
    absent = set(told["missing_keys"])
    if lost := sorted(key for key in absent if not key.startswith(_POOLER)):
        raise EarlyBertError(
            f"{name}: the model has no {lost[0]} and {len(lost) - 1} more; give a whole BERT"
        )
    weights = {key: value for key, value in model.state_dict().items() if key not in absent}
    return config, weights
