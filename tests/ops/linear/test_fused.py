"""What the kernels are handed: factors of keys and log-decays that stand for weights, decays and padding."""

import pytest
import torch

from hf_linear_attn.ops.linear import fused


def test_refusals_name_what_is_given():
    v = torch.zeros(1, 1, 4, 64)
    assert fused.refusal(256, v) is None
    assert "got 257, 64" in str(fused.refusal(257, v))
    assert "got 129, 64" in str(fused.refusal(129, v, gated=True))
    assert "got torch.float64" in str(fused.refusal(16, v.double()))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("causal", "decayed"), [(False, False), (True, False), (True, True)])
def test_factors_stand_for_the_weights(causal, decayed, padded):
    g = torch.Generator().manual_seed(0)
    log_weight = 30 * torch.randn(2, 3, 9, generator=g)
    log_decay = -torch.rand(2, 3, 9, generator=g) if decayed else None
    mask = torch.rand(2, 9, generator=g) < 0.6 if padded else None
    real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask
    scale, decay, peaks = fused._factors(log_weight, log_decay, mask, None, causal)
    assert (scale <= 1).all()
    assert not scale[~real[:, None].expand_as(scale)].any()
    last = 8 if causal else 0
    for j in range(9):
        passed = decay[:, :, j + 1 :].sum((2, 3)) if causal else 0.0
        reached = scale[..., j] * torch.as_tensor(passed).exp()
        expected = log_weight[..., j] - peaks[..., last]
        if decayed:
            expected = expected + (log_decay * real[:, None])[..., j + 1 :].sum(-1)
        expected = expected.exp() * real[:, None, j]
        torch.testing.assert_close(reached, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_factors_of_keys_of_weight_0_are_0(causal, padded):
    g = torch.Generator().manual_seed(0)
    log_weight = torch.randn(2, 3, 9, generator=g)
    gone = torch.rand(2, 3, 9, generator=g) < 0.4
    gone[0, 0, :5], gone[1, 1] = True, True
    mask = torch.rand(2, 9, generator=g) < 0.6 if padded else None
    given = log_weight.masked_fill(gone, -torch.inf).requires_grad_()
    scale, decay, peaks = fused._factors(given, None, mask, None, causal)
    assert (scale[gone] == 0).all()
    assert all(x.isfinite().all() for x in (scale, peaks) if x is not None)
    assert decay is None or decay.isfinite().all()
    scale.sum().backward()
    assert given.grad.isfinite().all()
