"""Linformer: keys and values are projected along the sequence to k slots (arXiv:2006.04768).

    y_i = softmax(s q_i (E K)^T) (F V),    E, F: k x n_max

Cost n k d, encoders only. Column j of E belongs to the j-th *real* token of a row, wherever the padding is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_linear_attn.ops.masking import gather_tokens, pads_first_permutation, safe_masked_fill
from hf_linear_attn.ops.pooling import attend_segments, even_segment_starts, segment_max, segment_mean
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["LinformerAttention", "LinformerConfig"]

SHARING = ("none", "headwise", "key_value", "layerwise")
PROJECTIONS = ("linear", "mean_pool", "max_pool", "conv")
INITS = ("mean_pool", "random")
REFUSAL = (
    "Linformer's projection E mixes every position into every slot, the future included, and a triangular "
    "n x k mask still leaks. For a decoder use 'longformer' (local) or 'performer' (global)."
)


@dataclass(frozen=True)
class LinformerConfig(VariantConfig):
    """Options of Linformer.

    Attributes:
        k: slots; one int, or one per layer of the model. More than the model's `max_length` acts as that.
        sharing: `"none"` E and F per head and layer (2 h L matrices), `"headwise"` per layer (2 L),
            `"key_value"` E = F (L), `"layerwise"` one matrix for the whole model (1).
        projection: `"linear"` learned k x n_max; `"conv"` learned, kernel = stride = n_max / k (rounded up);
            `"mean_pool"`, `"max_pool"` no parameters, slots spread over the real tokens of each row.
        init: `"mean_pool"` starts learned projections as means of segments of n_max / k tokens; shorter
            inputs fill the first slots only. `"random"` is the paper's N(0, 1/k), far from the checkpoint.
        seed: of `init="random"`.
    """

    k: int | tuple[int, ...] = 128
    sharing: str = "headwise"
    projection: str = "linear"
    init: str = "mean_pool"
    seed: int = 0

    def validate(self) -> None:
        sizes = self.k if isinstance(self.k, tuple) else (self.k,)
        if not sizes or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in sizes):
            raise ValueError(f"k={self.k!r}: must be a positive int, or a tuple with one per layer.")
        for name, allowed in (("sharing", SHARING), ("projection", PROJECTIONS), ("init", INITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r}: must be an int of at least 0.")
        if self.sharing == "layerwise" and len(set(sizes)) > 1:
            raise ValueError(f"sharing='layerwise' needs one k for all layers, got k={list(sizes)}.")
        if self.init == "random" and self.projection.endswith("pool"):
            raise ValueError(f"init='random' needs projection='linear' or 'conv', got {self.projection!r}.")


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    # Pooling over the real tokens has segments of one token for k >= n whatever the model's max_length is.
    return {"k": length, "projection": "mean_pool"}


@register_variant(
    "linformer",
    config=LinformerConfig,
    title="Linformer",
    paper="Linformer: Self-Attention with Linear Complexity (arXiv:2006.04768)",
    cost="n k d",
    state="none",
    decoder=False,
    refusal=REFUSAL,
    exact_limit=_exact_limit,
    test_options=(
        {"k": 16, "sharing": "none"},
        {"k": [8, 12], "sharing": "key_value"},
        {"k": 24, "sharing": "layerwise", "init": "random", "seed": 3},
        *({"k": 16, "projection": pool} for pool in ("mean_pool", "max_pool")),
        {"k": 16, "projection": "conv", "sharing": "none"},
        {"k": 14, "projection": "conv", "sharing": "layerwise", "init": "random"},
    ),
)
class LinformerAttention(AttentionVariant):
    """Softmax attention over k projected keys and values; see `LinformerConfig`.

    Raises:
        ValueError: for a causal layer, or a list of k that has not one entry per layer of the model.
    """

    key_projection: nn.Parameter | None
    value_projection: nn.Parameter | None

    def __init__(self, config: LinformerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        if context.is_causal:
            raise ValueError(REFUSAL)
        sizes = config.k
        if isinstance(sizes, tuple) and len(sizes) != context.num_layers:
            raise ValueError(f"k={list(sizes)} has {len(sizes)} entries for {context.num_layers} layers.")
        k = sizes[context.layer_idx] if isinstance(sizes, tuple) else sizes
        self.k = min(k, context.max_length)
        self.kernel_size = -(-context.max_length // self.k)
        heads = context.num_heads if config.sharing == "none" else 1
        shape: tuple[int, ...] | None = None
        if config.projection == "linear":
            shape = (heads, self.k, context.max_length)
        elif config.projection == "conv":
            shape = (heads, self.kernel_size, context.head_dim, context.head_dim)
        one_matrix = config.sharing in ("key_value", "layerwise")
        self.key_projection = None if shape is None else nn.Parameter(torch.empty(shape))
        self.value_projection = None if shape is None or one_matrix else nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        layer = 0 if self.config.sharing == "layerwise" else self.context.layer_idx
        generator = torch.Generator(device="cpu").manual_seed(self.config.seed * 100_003 + layer)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(self._start(tuple(parameter.shape), generator))

    def _start(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        if self.config.init == "random":
            # Variance 1/k in the paper's E; for the convolution one over the terms of its sum.
            terms = self.k if self.config.projection == "linear" else self.kernel_size * self.context.head_dim
            return torch.randn(shape, generator=generator, device="cpu") * terms**-0.5
        if self.config.projection == "conv":
            return (torch.eye(shape[-1], device="cpu") / self.kernel_size).expand(shape)
        segment = torch.arange(shape[2], device="cpu") * self.k // shape[2]
        member = (segment == torch.arange(self.k, device="cpu")[:, None]).float()
        return (member / member.sum(-1, keepdim=True)).expand(shape)

    def shared_parameters(self) -> tuple[str, ...]:
        names = tuple(name for name, _ in self.named_parameters())
        return names if self.config.sharing == "layerwise" else ()

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        """See `AttentionVariant.forward`.

        Raises:
            ValueError: for causal inputs, for a decode state, and for more keys than `context.max_length`.
        """
        if inputs.is_causal or state is not None:
            raise ValueError(REFUSAL)
        batch, _, length, _ = inputs.key.shape
        if length > self.context.max_length:
            limit = f"Linformer was built for at most {self.context.max_length} tokens and got {length}."
            raise ValueError(f"{limit} Convert with max_length={length} or more.")
        key, value, padding = inputs.key, inputs.value, inputs.key_padding
        if padding is None:
            n_real = torch.full((batch,), length, device=key.device)
        else:
            # Real tokens to the front: a token's place is then its rank, the column of E.
            order = pads_first_permutation(~padding)
            key = gather_tokens(safe_masked_fill(key, padding), order)
            value = gather_tokens(safe_masked_fill(value, padding), order)
            n_real = padding.sum(-1)

        slots = -(-length // self.kernel_size) if self.config.projection == "conv" else self.k
        starts = self._segment_starts(n_real, slots)  # [B, slots + 1]
        counts = starts.minimum(n_real[:, None]).diff()  # real tokens per slot
        if self.key_projection is None:
            pool = segment_mean if self.config.projection == "mean_pool" else segment_max
            key, value = pool(key, starts), pool(value, starts)
        else:
            value_projection = self.key_projection if self.value_projection is None else self.value_projection
            key = self._project(key, self.key_projection, slots)
            value = self._project(value, value_projection, slots)
            if self.config.init == "mean_pool":
                # The last slot in use may be half full: its mean is over the tokens that are there.
                fill = (starts.diff() / counts.clamp(min=1))[:, None, :, None].to(key.dtype)
                key, value = key * fill, value * fill
            elif self.config.projection == "linear":
                counts = n_real[:, None].expand_as(counts)  # slots have no segments: all are in use
        return attend_segments(inputs.query, key, value, counts > 0, inputs.scaling), None

    def _segment_starts(self, n_real: torch.Tensor, slots: int) -> torch.Tensor:
        """First rank of each slot's segment, and the end of the last: `[B, slots + 1]`."""
        if self.config.projection.endswith("pool"):
            return even_segment_starts(n_real, slots)
        slot = torch.arange(slots + 1, device=n_real.device).expand(n_real.shape[0], -1)
        conv = self.config.projection == "conv"
        return slot * self.kernel_size if conv else -(-slot * self.context.max_length // self.k)

    def _project(self, x: torch.Tensor, weight: torch.Tensor, slots: int) -> torch.Tensor:
        weight = weight.to(x.dtype)
        if self.config.projection == "linear":
            return weight[:, :, : x.shape[2]] @ x  # [h, k, n] @ [B, H, n, D]
        x = nn.functional.pad(x, (0, 0, 0, slots * self.kernel_size - x.shape[2]))
        return x.unflatten(2, (slots, self.kernel_size)).flatten(3) @ weight.flatten(1, 2)
