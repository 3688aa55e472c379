"""What the tests of the sliding window draw, and how they make it take small blocks."""

import torch

from hf_linear_attn.ops.window import attention


def set_block_size(monkeypatch, size):
    monkeypatch.setattr(attention, "_block_size", lambda *_: size)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
