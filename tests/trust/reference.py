"""What a model should give: the same weights in a new model, one row at a time, without padding and without a cache."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_linear_attn.registry import get_patcher

__all__ = ["Reference", "family_of", "first_position", "is_decoder", "rebuilt"]

FACTOR = 8  # a result may be this much farther from the exact one than the reference is
ROUNDINGS = 64  # and this many roundings of the largest value
SINGLE = torch.finfo(torch.float32).eps  # in which rotary angles and logits of fp64 models are computed too


def family_of(model: PreTrainedModel) -> str:
    return getattr(model.config, "base_model_type", model.config.model_type)


def is_decoder(model: PreTrainedModel) -> bool:
    return get_patcher(family_of(model)).is_causal(model.config)


def first_position(model: PreTrainedModel) -> int:
    return get_patcher(family_of(model)).position_offset(model.config)


def rebuilt(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same class that knows nothing of `model` but its config and its state dict."""
    config = copy.deepcopy(model.config)
    with torch.random.fork_rng(devices=[]):
        new = type(model)(config)
    new.load_state_dict(model.state_dict())
    new.set_attn_implementation(model.config._attn_implementation)
    rotary = {name: x.clone() for name, x in new.named_buffers() if name.endswith("inv_freq")}
    new.to(dtype)
    for name, x in rotary.items():  # never rounded
        new.get_buffer(name).data = x
    return new.eval()


@contextmanager
def _forward_only() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


@dataclass
class Reference:
    """Answers of the weights as they are at one moment, in their own dtype and in fp64."""

    own: PreTrainedModel
    exact: PreTrainedModel

    @classmethod
    def of(cls, model: PreTrainedModel) -> Reference:
        return cls(rebuilt(model, model.dtype), rebuilt(model, torch.float64))

    def row(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Output `[T, C]` of the tokens `[T]` alone."""
        if not len(ids):
            return torch.zeros(0, 1)
        positions = torch.arange(len(ids))[None] + first_position(model)
        extra: dict[str, Any] = {"use_cache": False} if is_decoder(model) else {}
        return model(input_ids=ids[None], position_ids=positions, **extra)[0][0]

    def check(
        self,
        what: str,
        outputs: Iterable[torch.Tensor],
        rows: list[torch.Tensor],
        autocast: bool = False,
        factor: float = FACTOR,
    ) -> None:
        """Assert that `outputs`, `[n, C]` of the last n tokens of each row, are those of `rows`, token ids `[T]`.

        They may be `factor` times as far from the exact ones as the reference is.
        """
        with _forward_only():
            exact = [self.row(self.exact, ids) for ids in rows]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            own = [self.row(self.own, ids) for ids in rows]
        eps = torch.finfo(torch.bfloat16 if autocast else self.own.dtype).eps
        scale = max((float(x.abs().max()) for x in exact if x.numel()), default=0.0)
        off = [float((a.double() - b).abs().max()) for a, b in zip(own, exact, strict=True) if a.numel()]
        noise = max(off, default=0.0)
        allowed = factor * noise + ROUNDINGS * max(eps, SINGLE) * scale
        for number, (output, expected) in enumerate(zip(outputs, own, strict=True)):
            expected = expected[len(expected) - len(output) :]
            if not output.numel():
                continue
            assert bool(output.isfinite().all()), f"{what}: row {number} is not finite"
            each = (output.double() - expected.double()).abs().amax(-1)
            assert float(each.max()) <= allowed, (
                f"{what}: row {number}, token {int(each.argmax())} of the last {len(output)} is off by "
                f"{float(each.max()):.3g}, allowed {allowed:.3g} (largest value {scale:.3g})"
            )
