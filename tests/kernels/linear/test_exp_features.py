"""Exponential features against the formula in float64, with gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn.kernels.linear.exp_features import exp_features


def _compare(dtype: torch.dtype, device: str, limit: float, length: int, dim: int, features: int, shared: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, length, 2, dim).transpose(1, 2).to(dtype)
    weight, bias = torch.randn(1 if shared else 2, dim, features) * dim**-0.5, torch.randn(2, features)
    exact = [y.double().requires_grad_() for y in (x, weight, bias)]
    given = [y.to(device).requires_grad_() for y in (x, weight, bias)]
    u = exact[0] @ exact[1] + exact[2][:, None]
    peak = u.detach().amax(-1)
    wanted = (u - peak[..., None]).exp()
    found, found_peak = exp_features(*given)
    assert found.dtype == dtype
    torch.testing.assert_close(found_peak.cpu().double(), peak, atol=limit * 5, rtol=limit)
    factor = torch.randn_like(wanted)
    expected = [wanted, *torch.autograd.grad((wanted * factor).sum(), exact)]
    actual = [found, *torch.autograd.grad((found * factor.to(found)).sum(), given)]
    for right, other in zip(expected, actual, strict=True):
        assert other.shape == right.shape
        assert (other.cpu() - right).square().mean().sqrt() < limit * right.square().mean().sqrt()


@pytest.mark.parametrize(("length", "dim", "features"), [(1, 16, 16), (70, 20, 40)])
@pytest.mark.parametrize("shared", [False, True], ids=["per-head", "shared"])
def test_features_and_gradients(length: int, dim: int, features: int, shared: bool) -> None:
    _compare(torch.float32, "cpu", 1e-4, length, dim, features, shared)


def test_large_inputs_do_not_overflow() -> None:
    features, peak = exp_features(torch.full((1, 1, 3, 16), 1e4), torch.ones(1, 16, 16))
    assert (features == 1).all()
    assert (peak == 1.6e5).all()


def test_operator() -> None:
    x, weight, bias = torch.randn(1, 2, 5, 16), torch.randn(1, 16, 16), torch.randn(2, 16)
    given = tuple(y.requires_grad_() for y in (x, weight, bias))
    torch.library.opcheck(torch.ops.hf_linear_attn.exp_features, given)


def test_bad_input() -> None:
    x = torch.ones(1, 2, 5, 16)
    with pytest.raises(ValueError, match="weight must be float32"):
        exp_features(x, torch.ones(3, 16, 16))
    with pytest.raises(ValueError, match="bias must be float32"):
        exp_features(x, torch.ones(2, 16, 16), torch.ones(2, 15))
    with pytest.raises(ValueError, match="x must be"):
        exp_features(x.double(), torch.ones(2, 16, 16))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-3), (torch.float16, 3e-3), (torch.bfloat16, 1e-2)],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize(("length", "dim", "features"), [(1, 64, 64), (500, 60, 100), (1000, 64, 256)])
def test_gpu_features_and_gradients(dtype: torch.dtype, limit: float, length: int, dim: int, features: int) -> None:
    _compare(dtype, "cuda", limit, length, dim, features, shared=False)
