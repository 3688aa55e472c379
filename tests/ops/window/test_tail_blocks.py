"""Windows in blocks, whose backward pass is their own, against autograd."""

import pytest
import torch

from hf_linear_attn.ops.window import tail_blocks
from hf_linear_attn.ops.window.tail_blocks import window_block_softmax

F64 = torch.float64


@pytest.mark.parametrize(("left", "right"), [(5, 0), (3, 3), (40, 0), (0, 0)])
def test_window_gradients(left, right, small_blocks, monkeypatch):
    """Of outputs, log denominators and largest logits; more keys than queries, some of them hidden."""
    monkeypatch.setattr(tail_blocks, "_CHUNK", 4)
    q, k, v = torch.randn(3, 2, 2, 26, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    allowed = torch.ones(2, 26, dtype=torch.bool)
    allowed[0, :3], allowed[1, 24:], allowed[1, 5] = False, False, False
    inputs = [x.requires_grad_() for x in (q[:, :, 5:].clone(), k.clone(), v.clone())]
    distance = torch.arange(26) - torch.arange(5, 26)[:, None]
    seen = (distance >= -left) & (distance <= right) & allowed[:, None, None]
    blind = ~seen.any(-1)

    def blocks(q, k, v):
        found = window_block_softmax(q, k, v, left=left, right=min(right, 20), scaling=0.7, key_allowed=allowed)
        return found[0], *(x.masked_fill(blind, 0) for x in found[1:])

    def dense(q, k, v):
        logits = (q @ k.mT * 0.7).masked_fill(~seen, -1e30)
        output = (logits.softmax(-1) @ v).masked_fill(blind[..., None], 0)
        return output, *(x.masked_fill(blind, 0) for x in (logits.logsumexp(-1), logits.amax(-1)))

    results = []
    for attend in (blocks, dense):
        outputs = attend(*inputs)
        loss = sum((i + 1) * x.square().sum() for i, x in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
