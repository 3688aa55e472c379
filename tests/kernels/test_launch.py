"""Kernels where they cannot start."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn.kernels.gated.op import gated_linear_attention
from hf_linear_attn.kernels.linear.exp_features import exp_features
from hf_linear_attn.kernels.linear.op import linear_attention
from hf_linear_attn.kernels.sparse.launch import tiles_for
from hf_linear_attn.kernels.sparse.op import block_sparse_attention
from hf_linear_attn.ops.window.csr import window_csr

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreter() -> None:
    """None: these tests ask what happens without it."""


@pytest.mark.parametrize(
    "call",
    [
        lambda q: linear_attention(q, q, q, is_causal=True),
        lambda q: gated_linear_attention(q, q, q, -q),
        lambda q: exp_features(q, torch.rand(2, 16, 32)),
        lambda q: block_sparse_attention(
            q, q, q, window_csr(20, 20, 3, 0, CPU, tiles=tiles_for(q.dtype, 16)), scaling=0.25
        ),
    ],
    ids=["linear", "gated", "exp features", "block-sparse"],
)
def test_a_device_without_kernels_is_named(call: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"need a CUDA device \(or TRITON_INTERPRET=1 on the CPU\), got cpu"):
        call(torch.rand(1, 2, 20, 16))
