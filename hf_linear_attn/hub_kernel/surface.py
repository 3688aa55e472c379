"""Linear attention, with decay too, and attention in a sliding window: Triton kernels, and plain PyTorch elsewhere.

`layers` holds the same as modules without weights, for `kernelize`.
"""

from __future__ import annotations

from hf_linear_attn.hub_kernel import layers
from hf_linear_attn.ops.features.maps import ScaledMap
from hf_linear_attn.ops.linear.attention import feature_map_attention, init_linear_state, linear_attention
from hf_linear_attn.ops.window.attention import sliding_window_attention

__all__ = [
    "ScaledMap",
    "feature_map_attention",
    "init_linear_state",
    "layers",
    "linear_attention",
    "sliding_window_attention",
]
