"""Attention layers of one shape with one call, hidden states to hidden states: what peers and ours are built as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hf_linear_attn.ops.exact.softmax import softmax_attention
from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext

__all__ = [
    "Attend",
    "LayerShape",
    "ProjectedAttention",
    "Sharing",
    "VariantCore",
    "build_variant",
    "our_layer",
    "softmax_layer",
]

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query, key, value `[B, H, T, D]`, hidden states `[B, T, C]`) to `[B, H, T, D]`."""

Sharing = Literal["none", "query_key", "key_value"]
"""Which projections a method has in common: its queries are its keys, or its keys are its values."""


@dataclass(frozen=True)
class LayerShape:
    """One self-attention layer at one length.

    Attributes:
        batch: sequences.
        length: tokens of each.
        hidden_size: width C of the hidden states, `num_heads` times the width of a head.
        num_heads: H.
        is_causal: causal (decoder) or bidirectional (encoder).

    Raises:
        ValueError: for a number below 1, or a width that the heads do not divide.
    """

    batch: int
    length: int
    hidden_size: int
    num_heads: int
    is_causal: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "length", "hidden_size", "num_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; allowed: an integer of at least 1.")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size}; allowed: a multiple of num_heads={self.num_heads}.")

    @property
    def head_dim(self) -> int:
        """Width D of a head."""
        return self.hidden_size // self.num_heads

    def context(self) -> LayerContext:
        """The place of a variant in a model of one such layer."""
        return LayerContext(
            0, 1, self.hidden_size, self.num_heads, self.head_dim, max_length=self.length, is_causal=self.is_causal
        )

    def example(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Hidden states `[B, T, C]` of unit variance, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(self.batch, self.length, self.hidden_size, generator=generator)
        return drawn.to(device=device, dtype=dtype)


class ProjectedAttention(nn.Module):
    """Query, key, value and output projections around an attention of `[B, H, T, D]` tensors.

    Args:
        shape: of the layer.
        attend: the attention; one that is an `nn.Module` becomes a submodule.
        sharing: which projections are one.
        bias: whether query, key and value projections have a bias; the output projection always has.
    """

    def __init__(self, shape: LayerShape, attend: Attend, *, sharing: Sharing = "none", bias: bool = True) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.num_heads * shape.head_dim
        self.head_dim, self.sharing = shape.head_dim, sharing
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = None if sharing == "query_key" else nn.Linear(width, inner, bias=bias)
        self.value = None if sharing == "key_value" else nn.Linear(width, inner, bias=bias)
        self.output = nn.Linear(inner, width)
        self.attend = attend

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, D]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query = self._split(self.query(hidden))
        key = query if self.key is None else self._split(self.key(hidden))
        value = key if self.value is None else self._split(self.value(hidden))
        return self.output(self.attend(query, key, value, hidden).transpose(1, 2).flatten(2))


class VariantCore(nn.Module):
    """One of our variants as an attention of `[B, H, T, D]` tensors."""

    def __init__(self, variant: AttentionVariant) -> None:
        super().__init__()
        self.variant = variant

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        is_causal = self.variant.context.is_causal
        inputs = AttentionInputs(q, k, v, None, is_causal, q.shape[-1] ** -0.5, hidden_states=hidden)
        return self.variant(inputs)[0]


class _Softmax(nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return softmax_attention(q, k, v, None, self.is_causal, q.shape[-1] ** -0.5, 0.0)


def build_variant(shape: LayerShape, key: str, options: dict[str, Any]) -> AttentionVariant:
    """The variant `key` for a layer of this shape; `ValueError` for one that does not serve it or a bad option."""
    spec = get_variant(key)
    if not (spec.decoder if shape.is_causal else spec.encoder):
        raise ValueError(f"{key!r} does not serve is_causal={shape.is_causal}: {spec.refusal}")
    config = spec.config_class.from_dict(options)  # type: ignore[attr-defined]
    return spec.module_class(config, shape.context())


def our_layer(
    shape: LayerShape, key: str, options: dict[str, Any], *, sharing: Sharing = "none", bias: bool = True
) -> ProjectedAttention:
    """A layer of this shape with our variant `key`, in evaluation mode."""
    variant = build_variant(shape, key, options)
    layer = ProjectedAttention(shape, VariantCore(variant), sharing=sharing, bias=bias)
    key_projection = layer.query if layer.key is None else layer.key
    value = key_projection if layer.value is None else layer.value
    query, keys, values = ((x.weight, x.bias) for x in (layer.query, key_projection, value))
    with torch.no_grad():
        variant.load_projections(query, keys, values)
    return layer.eval()


def softmax_layer(shape: LayerShape) -> ProjectedAttention:
    """What our converted models run in a layer that keeps softmax (SDPA), in evaluation mode."""
    return ProjectedAttention(shape, _Softmax(shape.is_causal)).eval()
