"""Linformer: keys and values are projected along the sequence to k slots (arXiv:2006.04768).

    y_i = softmax(s q_i (E K)^T) (F V),    E, F: k x n_max

Cost n k d, encoders only. A row of fewer tokens than n_max spreads over all columns of E, wherever its padding is: its
tokens share all k slots, see `ops.pooled.projection`.

`k="auto"` asks calibration how many singular values of the layer's softmax attention, over the first 1,024 tokens of
each sequence, hold a share `energy` of their sum, head by head; d ln d is the most that it takes. It becomes an option
of the layer, `head_k`, so that a checkpoint says of which shape its E is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_linear_attn.ops.pooled.head_slots import HeadSlots
from hf_linear_attn.ops.pooled.projection import PROJECTION_CHOICES, SequenceProjection, check_projection_options
from hf_linear_attn.ops.starts.calibration import collect_rows
from hf_linear_attn.ops.starts.spectrum import SPECTRUM_TOKENS, linformer_bound, rank_for_energy
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["LinformerAttention", "LinformerConfig"]

REFUSAL = (
    "Linformer's projection E mixes every position into every slot, the future included, and a triangular "
    "n x k mask still leaks. For a decoder use 'longformer' (local) or 'performer' (global)."
)
VALUE_POOLS = ("max", "mean")


@dataclass(frozen=True)
class LinformerConfig(VariantConfig):
    """Options of Linformer.

    Attributes:
        k: slots; one int, or one per layer of the model. More than the model's `max_length` acts as that. `"auto"`
            lets calibration choose them in each layer, and in each head where heads have an E of their own (`sharing`
            `"none"`, and pooling); heads that share E have what the most demanding of them needs. At most d ln d, and
            that without calibration.
        energy: of `k="auto"`, the share of the sum of singular values that k of them hold.
        head_k: what `k="auto"` came to in a layer: one int, or one per head. Conversion and calibration write it.
        sharing: `"none"` E and F per head and layer (2 h L matrices), `"headwise"` per layer (2 L),
            `"key_value"` E = F (L), `"layerwise"` one matrix for the whole model (1).
        projection: `"linear"` learned k x n_max; `"conv"` learned, kernel = stride = n_max / k (rounded up);
            `"mean_pool"`, `"max_pool"` no parameters, slots spread over the real tokens of each row.
        value_pool: what `projection="max_pool"` makes of the values of a segment: `"max"` as published, or `"mean"`.
            Softmax attention averages values, and maxima lie above averages, the more the longer a segment is: it
            starts farther from softmax than uniform attention does (docs/methods.md). Calibration takes what is closer.
        init: `"mean_pool"` starts learned projections as `projection="mean_pool"`, at every length. `"random"` is the
            paper's N(0, 1/k), far from the checkpoint; a linear E that starts so keeps the paper's columns as well,
            shorter inputs use the first ones.
        seed: of `init="random"`.
    """

    k: int | str | tuple[int, ...] = 128
    sharing: str = "headwise"
    projection: str = "linear"
    init: str = "mean_pool"
    seed: int = 0
    energy: float = 0.9
    head_k: int | tuple[int, ...] | None = None
    value_pool: str = "max"

    def validate(self) -> None:
        for name, allowed in PROJECTION_CHOICES.items():
            self.require_choice(name, allowed)
        self.require_choice("value_pool", VALUE_POOLS)
        self.require_integer("seed", at_least=0)
        self.require_integer("k", each="layer", word="auto")
        self.require_integer("head_k", each="head", optional=True)
        self.require_number("energy", at_least=0, at_most=1)
        check_projection_options(self)
        if self.head_k is not None and self.k != "auto":
            raise ValueError(f"head_k={self.head_k!r}; allowed: None with k={self.k!r}, which k='auto' would choose.")
        if self.value_pool != "max" and self.projection != "max_pool":
            raise ValueError(f"value_pool='mean'; allowed: 'max' with projection={self.projection!r}.")
        if isinstance(self.head_k, tuple) and self.shares_heads:
            raise ValueError(f"head_k={self.head_k!r}; allowed: one integer, or None, with sharing={self.sharing!r}.")

    @property
    def shares_heads(self) -> bool:
        """Whether all heads of a layer are projected by one matrix."""
        return self.sharing != "none" and not self.projection.endswith("pool")


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    # Pooling over the real tokens has segments of one token for k >= n whatever the model's max_length is.
    return {"k": length, "projection": "mean_pool"}


@register_variant(
    "linformer",
    config=LinformerConfig,
    title="Linformer",
    paper="Linformer: Self-Attention with Linear Complexity (arXiv:2006.04768)",
    cost="n k d",
    guide=("low-rank", "encoders of one fixed length, cheap at any"),
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
        {"k": "auto", "energy": 0.7},
        {"k": "auto", "sharing": "none", "head_k": [5, 9, 9, 16]},
        {"k": "auto", "projection": "max_pool", "energy": 0.6},
    ),
)
class LinformerAttention(AttentionVariant):
    """Softmax attention over k projected keys and values; see `LinformerConfig`.

    Parameters: `key_projection` and `value_projection`, as the sharing says; where heads have slots of their own, as
    large as the largest, of which the others use the first rows.

    Raises:
        ValueError: for a causal layer, or a list of k that has not one entry per layer of the model, or per head.
    """

    key_projection: nn.Parameter | None
    value_projection: nn.Parameter | None

    def __init__(self, config: LinformerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        if context.is_causal:
            raise ValueError(REFUSAL)
        if config.k == "auto" and config.head_k is None:
            most = self._most()
            config = replace(config, head_k=most if config.shares_heads else (most,) * context.num_heads)
        self._plan(config)
        shape, one = self.slots.weight_shape, self.projection.one_matrix
        self.key_projection = None if shape is None else nn.Parameter(torch.empty(shape))
        self.value_projection = None if shape is None or one else nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def _most(self) -> int:
        """The most slots that `k="auto"` takes."""
        return min(max(1, int(linformer_bound(self.context.head_dim))), self.context.max_length)

    def _plan(self, config: LinformerConfig) -> None:
        """Let `config` be this layer's, parameters apart."""
        at, self.config = self.context, config
        place = at.layer_idx, at.num_layers, at.num_heads, at.head_dim, at.max_length
        self.projection = SequenceProjection(config, *place, value_pool=config.value_pool)
        self.slots = HeadSlots.of(self.projection, config.head_k)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        generator = self.projection.generator()
        for parameter in self.parameters():
            self.slots.start(parameter, generator)

    def shared_parameters(self) -> tuple[str, ...]:
        names = tuple(name for name, _ in self.named_parameters())
        return names if self.config.sharing == "layerwise" else ()

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose `head_k` for `k="auto"`, with E anew, and `value_pool` for `projection="max_pool"`."""
        length, scaling = self.context.max_length, batches[0].scaling
        if self.config.k == "auto":
            rows = collect_rows(batches, min(SPECTRUM_TOKENS, length))
            sizes = rank_for_energy(rows, self.config.energy, scaling=scaling).clamp(max=self._most()).tolist()
            self._plan(replace(self.config, head_k=max(sizes) if self.config.shares_heads else tuple(sizes)))
            for parameter in self.parameters():  # the same one in another shape: its marks stay
                parameter.data = parameter.new_empty(self.slots.weight_shape or ())
            self.reset_parameters()
        if self.config.projection == "max_pool":
            measure, errors = self.error_meter(collect_rows(batches, length), scaling), {}
            for pool in VALUE_POOLS:
                self._plan(replace(self.config, value_pool=pool))
                errors[pool] = measure().mean().item()
            self._plan(replace(self.config, value_pool=min(VALUE_POOLS, key=errors.__getitem__)))

    def chosen(self) -> dict[str, Any]:
        slots = {"k": self.config.to_dict()["head_k"]} if self.config.k == "auto" else {}
        return slots | ({"value_pool": self.config.value_pool} if self.config.projection == "max_pool" else {})

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        """See `AttentionVariant.forward`.

        Raises:
            ValueError: for causal inputs, for a decode state, and for more keys than `context.max_length`.
        """
        if inputs.is_causal or state is not None:
            raise ValueError(REFUSAL)
        weights = self.key_projection, self.value_projection
        given = inputs.query, inputs.key, inputs.value, inputs.token_mask
        return self.slots.attend(*given, weights, inputs.scaling), None
