"""One model in a user's hands: what all actions share."""

from __future__ import annotations

import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_linear_attn.auto import LinearAttnPreTrainedModel
from hf_linear_attn.auto_config import IMPLEMENTATION
from hf_linear_attn.ops.base import packing
from tests.tiny import PAD, VOCAB, option_sets, variants_of_side
from tests.trust.reference import Reference, first_position

LAYERS = 3
LONGEST = 150  # tokens, of 160 positions (RoBERTa's begin at 1)
PACKAGE = "hf_linear_attn/"
seeds = st.integers(0, 2**16)
lengths = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 48)), min_size=1, max_size=4)


def random_ids(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(5, VOCAB, shape, generator=generator)


@dataclass
class Batch:
    """Rows of tokens `[B, T]` and which of them are real."""

    ids: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def draw(cls, row_lengths: list[int], where: str, seed: int) -> Batch:
        """Rows of these lengths, padded `left`, `right`, or with `holes` anywhere."""
        generator, most = torch.Generator().manual_seed(seed), max(row_lengths)
        ids, mask = torch.full((len(row_lengths), most), PAD), torch.zeros(len(row_lengths), most, dtype=torch.long)
        for row, length in enumerate(row_lengths):
            places = {
                "left": torch.arange(most - length, most),
                "right": torch.arange(length),
                "holes": torch.randperm(most, generator=generator)[:length].sort().values,
            }[where]
            mask[row, places] = 1
            ids[row, places] = random_ids(generator, length)
        return cls(ids, mask)

    def rows(self) -> list[torch.Tensor]:
        return [ids[mask.bool()] for ids, mask in zip(self.ids, self.mask, strict=True)]

    def positions(self, first: int) -> torch.Tensor:
        return (self.mask.cumsum(-1) - 1).clamp(min=0) + first

    def real_outputs(self, output: torch.Tensor) -> list[torch.Tensor]:
        """Of an output `[B, n, C]` of the last n places, what belongs to real tokens, row by row."""
        here = self.mask[:, -output.shape[1] :].bool()
        return [row[real] for row, real in zip(output, here, strict=True)]


@dataclass
class Conversation:
    """A cache and the tokens that went into it."""

    batch: Batch
    cache: Cache
    version: int  # of the weights
    kinds: list[Any]  # what each layer ran
    broken: bool = False  # a call on it was refused: it may only be refused again, or right


class User(RuleBasedStateMachine):
    """One model, what was done to it, and the answers it owes."""

    refused: ClassVar[Counter[str]] = Counter()  # what was refused in this process, and how often
    tried: ClassVar[Counter[str]] = Counter()  # sequences and actions in this process

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.saves = 0
        self.version = 0
        self.talks: list[Conversation] = []
        self.twins: list[tuple[PreTrainedModel, Batch, torch.Tensor]] = []
        self._reference: tuple[int, Any, Reference] | None = None
        self.tokens_per_call = dict(packing.CALL_TOKENS)
        packing.CALL_TOKENS["cpu"] = 1  # short rows have buckets of their own too

    @invariant()
    def _count(self) -> None:
        self.tried["actions"] += 1

    def teardown(self) -> None:
        self.tried["sequences"] += 1
        packing.CALL_TOKENS.update(self.tokens_per_call)
        self.folder.cleanup()

    @property
    def converted(self) -> bool:
        return isinstance(self.model, LinearAttnPreTrainedModel)

    @property
    def runs_variants(self) -> bool:
        return self.converted and self.model.config._attn_implementation == IMPLEMENTATION

    @property
    def vocabulary(self) -> int:
        return self.model.config.vocab_size

    def layers(self) -> nn.ModuleList:
        return next(module for module in self.model.modules() if isinstance(module, nn.ModuleList))

    def kinds(self) -> list[Any]:
        """What each layer runs."""
        if not self.runs_variants:
            return [None] * len(self.layers())
        layers = self.model.config.linear_attn["layers"]
        return [None if layer is None else (layer["variant"], layer["options"]) for layer in layers]

    def reference(self) -> Reference:
        key = self.version, self.model.config._attn_implementation
        if self._reference is None or self._reference[:2] != key:
            self._reference = (*key, Reference.of(self.model))
        return self._reference[2]

    def changed(self) -> None:
        """The weights are others now."""
        self.version += 1

    @contextmanager
    def may_refuse(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.refusal(what, error)

    def refusal(self, what: str, error: Exception) -> None:
        """Count an error that the package raises on purpose; raise any other."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        if PACKAGE not in last.filename or not isinstance(error, ValueError):
            raise error
        self.refused[f"{what}: {str(error)[:90]}"] += 1

    def call(self, batch: Batch, new: int, plain: bool, **kwargs: Any) -> torch.Tensor:
        """Output `[B, new, C]` of the last `new` places of a batch; `plain` gives no mask where there is no padding."""
        mask = None if plain and bool(batch.mask.all()) else batch.mask
        positions = batch.positions(first_position(self.model))[:, -new:]
        return self.model(input_ids=batch.ids[:, -new:], attention_mask=mask, position_ids=positions, **kwargs)[0]

    def options_of(self, seed: int) -> tuple[str, dict[str, Any]]:
        draw = random.Random(seed)
        variant = draw.choice(variants_of_side(self.decoder))
        return variant, draw.choice(option_sets(variant, self.family, self.decoder))
