"""Windows in blocks, whose backward pass is their own, against autograd."""

import pytest
import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
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


def test_equal_largest_logits_share_the_gradient():
    q, k = torch.ones(1, 1, 90, 2, dtype=torch.float64), torch.ones(1, 1, 90, 2, dtype=torch.float64).requires_grad_()
    _, _, peak = window_block_softmax(q, k, k.detach(), left=89, right=0, scaling=1.0)
    (gradient,) = torch.autograd.grad(peak[..., 79], k)
    torch.testing.assert_close(gradient[0, 0, :80], torch.full_like(gradient[0, 0, :80], 1 / 80))
    assert (gradient[0, 0, 80:] == 0).all()


def test_a_row_that_sees_no_key():
    q = torch.randn(1, 1, 70, 4).requires_grad_()
    allowed = torch.arange(70)[None] >= 66
    output, log_sum, peak = window_block_softmax(q, q, q, left=3, right=0, scaling=1.0, key_allowed=allowed)
    assert (output[:, :, :66] == 0).all()
    assert (log_sum[..., :66] == LOG_ZERO).all()
    assert (peak[..., :66] == LOG_ZERO).all()
    (gradient,) = torch.autograd.grad(output.sum() + log_sum[..., 60:].sum() + peak.sum(), q)
    assert (gradient[:, :, :66] == 0).all()
    assert gradient.isfinite().all()
