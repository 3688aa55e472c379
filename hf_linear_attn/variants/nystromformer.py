"""Nystromformer: softmax attention interpolated from m landmarks (arXiv:2102.03902).

    y = softmax(s Q K~^T) pinv(softmax(s Q~ K~^T)) softmax(s Q~ K^T) V + depthwise convolution of V

Q~, K~ are means over m segments of the real tokens; six iterations stand for the pseudo-inverse. Cost
n m d + m^3, encoders only. Rows of at most m real tokens are exact softmax attention.

With calibration each head may interpolate among its queries instead, Q~ = K~ = C with the kernel
softmax_j(s q.c_j - s |c_j|^2 / 2), C its segment means of queries or centroids of the calibration queries: exact
attention of the landmarks carried over to the queries near them. Each head keeps what lowers its error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_linear_attn.ops.base.packing import is_traced
from hf_linear_attn.ops.pooled.nystrom import CENTROIDS, OWN_QUERIES, SEGMENT_MEANS, nystrom_attention, rank_convolution
from hf_linear_attn.ops.starts.calibration import choose_start, collect_rows, head_tokens, kmeans
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["NystromformerAttention", "NystromformerConfig"]

REFUSAL = (
    "Nystromformer's landmarks are means over the whole sequence, the future included. For a decoder use "
    "'long_short' (window and landmarks of finished segments) or 'performer' (global)."
)


@dataclass(frozen=True)
class NystromformerConfig(VariantConfig):
    """Options of `nystromformer`.

    Attributes:
        num_landmarks: m, in tokens; inputs up to that length are exact.
        conv_kernel_size: tokens (odd) under the convolution of the values, which starts at 0; None for none.
        num_iterations: of the pseudo-inverse. More are not better: six also regularize.
        seed: of the centroids that calibration may choose.
    """

    num_landmarks: int = 64
    conv_kernel_size: int | None = 33
    num_iterations: int = 6
    seed: int = 0

    def validate(self) -> None:
        self.require_width("num_landmarks")
        self.require_integer("num_iterations", at_most=1000)
        self.require_integer("seed", at_least=0)
        self.require_width("conv_kernel_size", optional=True)
        if self.conv_kernel_size is not None and self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size={self.conv_kernel_size}; allowed: an odd integer, or None.")


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    return {"num_landmarks": length}


@register_variant(
    "nystromformer",
    config=NystromformerConfig,
    title="Nystromformer",
    paper="Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention, arXiv:2102.03902",
    cost="n m d + m^3",
    guide=("low-rank", "encoders of any length: a few landmarks stand for all tokens"),
    state="none",
    decoder=False,
    refusal=REFUSAL,
    exact_limit=_exact_limit,
    test_options=(
        {"num_landmarks": 6, "conv_kernel_size": 5},
        {"num_landmarks": 24, "conv_kernel_size": None},
    ),
)
class NystromformerAttention(AttentionVariant):
    """Attention through landmarks; see `NystromformerConfig`.

    Parameter: `conv_weight [H, conv_kernel_size]`. Buffers (persistent): `form [H]`, the kind of landmarks of each
    head as in `ops.pooled.nystrom`, and `centroids [H, m, D]` for those that use them.

    Raises:
        ValueError: for a causal layer.
    """

    conv_weight: nn.Parameter | None
    form: torch.Tensor
    centroids: torch.Tensor

    def __init__(self, config: NystromformerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        if context.is_causal:
            raise ValueError(REFUSAL)
        heads, size = context.num_heads, config.conv_kernel_size
        self.conv_weight = None if size is None else nn.Parameter(torch.empty(heads, size))
        self.register_buffer("form", torch.empty(heads, dtype=torch.long))
        self.register_buffer("centroids", torch.empty(heads, config.num_landmarks, context.head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published landmarks in every head, and no convolution: pure Nystrom."""
        if self.conv_weight is not None:
            self.conv_weight.zero_()
        self.form.fill_(SEGMENT_MEANS)
        self.centroids.zero_()

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's landmarks by its output error against softmax on these inputs."""
        rows = collect_rows(batches)
        queries, _ = head_tokens(rows)
        self.centroids.copy_(kmeans(queries, self.config.num_landmarks, self.config.seed))
        forms = [{"form": torch.full_like(self.form, form)} for form in (SEGMENT_MEANS, OWN_QUERIES, CENTROIDS)]
        choose_start({"form": self.form}, forms, self.error_meter(rows, batches[0].scaling))

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        """See `AttentionVariant.forward`.

        Raises:
            ValueError: for causal inputs, for a decode state, and for more queries than keys.
        """
        if inputs.is_causal or state is not None:
            raise ValueError(REFUSAL)
        output = nystrom_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            num_landmarks=self.config.num_landmarks,
            num_iterations=self.config.num_iterations,
            scaling=inputs.scaling,
            token_mask=inputs.token_mask,
            form=self._form(),
            centroids=self.centroids,
        )
        if self.conv_weight is not None:
            mixed = rank_convolution(inputs.value, self.conv_weight, inputs.token_mask)
            output = output + mixed[:, :, mixed.shape[2] - output.shape[2] :].to(output.dtype)
        return output, None

    def _form(self) -> torch.Tensor | None:
        """The landmarks of each head, or None where a look at them is cheap and all are as published."""
        looked_at = self.form.device.type == "cpu" and not is_traced()
        return None if looked_at and not bool(self.form.any()) else self.form
