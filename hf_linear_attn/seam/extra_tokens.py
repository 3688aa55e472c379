"""Extra tokens: learned ones in front of an encoder's input, which travel through its layers, hidden from the caller.

A variant asks for G of them by its attribute `num_extra_tokens`. They are put in front of the hidden states where the
embeddings enter the stack of layers, and taken off where its last layer is done, so that heads, pooler, position ids
and padding masks know nothing of them: a learned row is token and position in one. In every layer they read all real
tokens and one another by softmax. Who reads them is the layer's affair: variants that ask are given their keys and
values, the other variants and the layers that keep softmax read the text alone, as they would without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from hf_linear_attn.patchers.base import ModelPatcher
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.initialization import mark_initialized
from hf_linear_attn.seam.names import IMPLEMENTATION
from hf_linear_attn.seam.sharing import variants_of
from hf_linear_attn.variants.base import AttentionVariant

__all__ = [
    "EXTRA_TOKENS",
    "PACKED_WITH_EXTRA_TOKENS",
    "ExtraTokens",
    "WithExtraTokens",
    "check_asked",
    "extra_tokens_of",
    "fit_extra_tokens",
    "without_extra_tokens",
]

EXTRA_TOKENS = "linear_attn_extra_tokens"
"""Keyword by which attention learns how many of its first hidden states are extra tokens."""

PACKED_WITH_EXTRA_TOKENS = (
    "Packed sequences (cu_seq_lens_q or seq_idx) would see one another through the tokens that travel in front of "
    "their row. Pad the batch instead and pass its attention_mask, or convert with options without such tokens."
)


class ExtraTokens(nn.Module):
    """G learned tokens.

    Attributes:
        tokens: `[G, hidden_size]`, what enters the first layer.
        config: the model's.
    """

    def __init__(self, count: int, config: PreTrainedConfig, like: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Parameter(like.new_empty(count, config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02), the same at every call."""
        if not self.tokens.is_meta:
            noise = torch.randn(self.tokens.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
            with torch.no_grad():
                self.tokens.copy_(0.02 * noise)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, T, hidden_size]` to `[B, G + T, hidden_size]`."""
        tokens = self.tokens.to(hidden_states).expand(hidden_states.shape[0], -1, -1)
        return torch.cat([tokens, hidden_states], dim=1)

    def extra_repr(self) -> str:
        return f"count={self.tokens.shape[0]}"


class WithExtraTokens:
    """Mixin put before the class of a stack of layers that has extra tokens."""

    linear_attn: Any
    """`ExtraTokens`, or what PEFT wraps around them."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        extra = self.linear_attn
        if extra.config._attn_implementation != IMPLEMENTATION:  # the checkpoint's own function
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        longer = extra(hidden_states)
        count = extra.tokens.shape[0]
        outputs = super().forward(longer, *args, **kwargs, **{EXTRA_TOKENS: count})  # type: ignore[misc]
        outputs.last_hidden_state = outputs.last_hidden_state[:, count:]
        return outputs

    def __reduce__(self) -> Any:
        # Families have stacks of the same name, so that the class cannot be found by it.
        return _of_class, (type(self).__bases__[1],), self.__dict__


@cache
def _with_extra_tokens(upstream: type) -> type:
    return type(f"{upstream.__name__}WithExtraTokens", (WithExtraTokens, upstream), {"__module__": __name__})


def _of_class(upstream: type) -> Any:
    cls: Any = _with_extra_tokens(upstream)
    return cls.__new__(cls)


def extra_tokens_of(model: nn.Module) -> ExtraTokens | None:
    """The extra tokens of a converted model; None without."""
    return next((module for module in model.modules() if isinstance(module, ExtraTokens)), None)


def check_asked(variants: Iterable[AttentionVariant], is_causal: bool) -> int:
    """How many extra tokens the layers of one model ask for, 0 without.

    Raises:
        ValueError: on a decoder, or if layers ask for different numbers of them.
    """
    asked = {variant.context.layer_idx: variant.num_extra_tokens for variant in variants if variant.num_extra_tokens}
    if asked and is_causal:
        raise ValueError("Tokens that travel in front of the sequence read all of it: they are for encoders.")
    if len(set(asked.values())) > 1:
        named = ", ".join(f"layer {layer}: {count}" for layer, count in asked.items())
        raise ValueError(f"The tokens that travel through the layers are the same in all of them; asked for: {named}.")
    return max(asked.values(), default=0)


def fit_extra_tokens(patcher: ModelPatcher, model: nn.Module, config: PreTrainedConfig) -> None:
    """Give the stack of layers in `model` the extra tokens that its variants ask for, or take away what none asks for.

    Those that are there stay.
    """
    variants = list(variants_of(model).values())
    count, stack = check_asked(variants, patcher.is_causal(config)), patcher.stack(model)
    if count and not isinstance(stack, WithExtraTokens):
        asking = next(a for a in patcher.self_attentions(model) if _asks(a.module))
        stack.linear_attn = ExtraTokens(count, config, patcher.projections(asking.module)[0].weight)
        stack.linear_attn.train(stack.training)
        mark_initialized(stack.linear_attn)
        upstream: Any = type(stack)
        stack.__class__ = _with_extra_tokens(upstream)
    elif not count and isinstance(stack, WithExtraTokens):
        stack.__class__ = type(stack).__bases__[1]
        del stack.linear_attn


def _asks(module: Any) -> bool:
    return bool(getattr(getattr(module, "linear_attn", None), "num_extra_tokens", 0))


def without_extra_tokens(model: Any, outputs: Any) -> Any:
    """What the base model `model` returned, with its extra tokens taken off the hidden states between its layers.

    A forward hook may have put the outputs beside something else, in a tuple.
    """
    if not isinstance(get_patcher(model.config.base_model_type).stack(model), WithExtraTokens):
        return outputs
    if isinstance(outputs, tuple) and any(isinstance(part, ModelOutput) for part in outputs):
        return tuple(_cut(part) if isinstance(part, ModelOutput) else part for part in outputs)
    return _cut(outputs)


def _cut(outputs: Any) -> Any:
    length = outputs[0].shape[1]

    def cut(states: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(None if x is None else x[:, x.shape[1] - length :] for x in states)

    if not isinstance(outputs, ModelOutput):
        return tuple(cut(part) if isinstance(part, tuple) else part for part in outputs)
    if outputs.get("hidden_states") is not None:
        outputs["hidden_states"] = cut(outputs["hidden_states"])
    return outputs
