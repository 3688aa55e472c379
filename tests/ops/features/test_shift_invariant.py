"""Random features of Gaussian and Laplace kernels against the kernels."""

from __future__ import annotations

import math

import pytest
import torch

from hf_linear_attn.ops.features.shift_invariant import (
    FEATURES,
    SHIFT_INVARIANT,
    draw_frequencies,
    mean_distance,
    shift_invariant_features,
)


def kernel_of(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.exp(-torch.cdist(x, y, p=1) if name == "laplace" else -torch.cdist(x, y).square() / 2)


def test_the_laplace_kernel_is_that_mixture_of_gaussians() -> None:
    """exp(-|t|) = E exp(-t^2 / 2 n^2), by quadrature over the normal n."""
    n = torch.linspace(1e-4, 12, 400_000, dtype=torch.float64)
    density = 2 * torch.exp(-n.square() / 2) / math.sqrt(2 * math.pi)
    for t in (0.01, 0.3, 1.0, 4.0):
        found = torch.trapezoid(density * torch.exp(-(t**2) / (2 * n.square())), n).item()
        assert found == pytest.approx(math.exp(-t), rel=1e-3)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kernel", SHIFT_INVARIANT)
def test_features_estimate_the_kernel(kernel: str, features: str) -> None:
    count, generator = 40_000, torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20, 3, generator=generator, dtype=torch.float64) * 0.4
    # Where coordinates have opposite signs; elsewhere the variance of positive Laplace features has no bound.
    x, y = x.abs(), -y.abs()
    omega, width = draw_frequencies(kernel, count, 3, generator)
    (phi_x, scale_x), (phi_y, scale_y) = (shift_invariant_features(z, omega, width, features) for z in (x, y))
    estimate = phi_x @ phi_y.mT
    if features == "positive":
        assert (phi_x >= 0).all()
        estimate = estimate * (scale_x[:, None] + scale_y).exp() / count
    assert (estimate - kernel_of(kernel, x, y)).abs().max() < 0.03


def test_widths_fit_into_half_precision() -> None:
    omega, width = draw_frequencies("laplace", 65_536, 4, torch.Generator().manual_seed(0))
    assert width is not None
    assert omega.half().isfinite().all()
    assert (width.half() > 0).all()
    features, scale = shift_invariant_features(torch.randn(5, 4).half() * 30, omega.half(), width.half(), "positive")
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert scale is not None
    assert scale.isfinite().all()


@pytest.mark.parametrize("kernel", SHIFT_INVARIANT)
def test_draws_depend_on_the_generator_alone(kernel: str) -> None:
    first, again = (draw_frequencies(kernel, 20, 8, torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw_frequencies(kernel, 20, 8, torch.Generator().manual_seed(4))[0])


@pytest.mark.parametrize("tokens", [1, 40, 1000])
def test_the_mean_distance_is_that_of_all_pairs(tokens: int) -> None:
    x, y = torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(0))
    y = y + 1
    for kernel, p in (("laplace", 1), ("rbf", 2)):
        expected = torch.cdist(x, y, p=p).mean((1, 2))
        torch.testing.assert_close(mean_distance(x, y, kernel), expected, rtol=0.05, atol=0)
