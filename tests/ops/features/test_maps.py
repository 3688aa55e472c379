"""Feature maps against their formulas, and the distribution of random directions."""

import math

import pytest
import torch

from hf_linear_attn.ops.features.maps import (
    FEATURE_MAPS,
    fourier_features,
    gaussian_orthogonal,
    taylor_features,
)
from hf_linear_attn.ops.features.named import registered_names

FORMULAS = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "exp": torch.exp,
    "relu": lambda x: x.clamp(min=0),
    "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
}


def test_every_feature_map_has_a_formula_here():
    assert set(registered_names()) == set(FORMULAS)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_feature_map_is_its_formula(name):
    x = torch.randn(2, 3, 50, 8, dtype=torch.float64)
    features, log_scale = FEATURE_MAPS[name](x)
    if log_scale is not None:
        features = features * log_scale.exp()[..., None]
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, FORMULAS[name](x))


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_half_precision_are_float32_and_do_not_overflow(name, dtype):
    features, _ = FEATURE_MAPS[name]((torch.randn(4, 8) * 200).to(dtype))
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert (features >= 0).all()


@pytest.mark.parametrize(("rows", "dim"), [(128, 32), (20, 8), (5, 16), (1, 4)])
def test_directions_are_orthogonal_within_blocks(rows, dim):
    omega = gaussian_orthogonal(rows, dim, torch.Generator().manual_seed(0))
    assert omega.shape == (rows, dim)
    for start in range(0, rows, dim):
        block = omega[start : start + dim]
        gram = block @ block.T
        scale = block.norm(dim=-1)
        cosines = gram / (scale[:, None] * scale)
        torch.testing.assert_close(cosines, torch.eye(len(block)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_each_direction_alone_is_gaussian(orthogonal):
    dim = 16
    omega = gaussian_orthogonal(32_000, dim, torch.Generator().manual_seed(0), orthogonal=orthogonal)
    squared = omega.square().sum(-1)  # chi squared: mean d, variance 2 d
    assert squared.mean().item() == pytest.approx(dim, rel=0.02)
    assert squared.var().item() == pytest.approx(2 * dim, rel=0.06)
    covariance = omega.T @ omega / len(omega)
    torch.testing.assert_close(covariance, torch.eye(dim), atol=0.04, rtol=0)
    assert omega.mean(0).abs().max() < 0.03
    assert (omega**4).mean().item() == pytest.approx(3, rel=0.04)


def test_directions_depend_on_the_generator_alone():
    first = gaussian_orthogonal(20, 8, torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    assert torch.equal(first, gaussian_orthogonal(20, 8, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, gaussian_orthogonal(20, 8, torch.Generator().manual_seed(4)))


def test_fourier_features_estimate_the_gaussian_kernel():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 30, 8, generator=generator) * 0.4
    omega = gaussian_orthogonal(40_000, 8, generator)
    estimate = fourier_features(x @ omega.T) @ fourier_features(y @ omega.T).T
    exact = torch.exp(-torch.cdist(x, y).square() / 2)
    assert (estimate - exact).abs().max() < 4 / math.sqrt(40_000)


def test_taylor_features_are_exact_in_float64():
    x, y = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = x @ y.mT
    products = taylor_features(x, 2)[0] @ taylor_features(y, 2)[0].mT
    torch.testing.assert_close(products, 1 + u + u.square() / 2, atol=1e-12, rtol=1e-12)
