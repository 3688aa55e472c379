"""Feature maps phi of kernel attention, phi(q) . phi(k) in place of exp(q . k).

A feature map takes `x [..., D]` and returns `(features [..., F], log_scale [...] or None)`: the true features
are `features * exp(log_scale)`. A query's scale cancels in the quotient and is dropped; a key's goes into
`key_log_weight` of `linear_attention`, which applies it without overflow. So no feature map needs an epsilon.
Features are float32 (float64 for float64 input) whatever the input's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.memo import kept_lists
from hf_linear_attn.ops.base.numerics import accumulation_dtype, exp_

__all__ = [
    "FEATURE_MAPS",
    "RANDOM_FEATURE_KERNELS",
    "ExponentialMap",
    "FeatureMap",
    "Features",
    "KeyWeights",
    "ParametricMap",
    "ScaledMap",
    "Spelled",
    "SpelledMap",
    "TaylorMap",
    "TokenMap",
    "elu_features",
    "exp_features",
    "fourier_features",
    "gaussian_orthogonal",
    "key_random_features",
    "mean_logit",
    "query_random_features",
    "relu_features",
    "softmax_features",
    "squared_relu_features",
    "taylor_features",
    "weighted_by_mean_logit",
]

Features = tuple[torch.Tensor, torch.Tensor | None]
FeatureMap = Callable[[torch.Tensor], Features]


class TokenMap(NamedTuple):
    """phi of a token x: of m x, or of u = m ((x - c) W + b), or of u = m (x - c) W / |x - c|.

    Attributes:
        kind: `"elu"`, elu(m x) + 1; `"relu"`, max(m x, 0); `"projected_relu"`, max(u, 0); `"projected_exp"`, exp(u);
            `"projected_softmax"`, that of `softmax_map`. Of decode steps alone: `"identity"`, x, the features;
            `"projected_pairs"`, `taylor_features(u, 2)`; `"turned_relu"`, max(x - c, 0) [cos, sin](m r), r the last
            coordinate of the token and x the others, m r from 0 to pi / 2. Kernels know no others.
        multiplier: m.
        weight: W `[H or 1, D, F]`, any strides.
        center, bias: c `[H, D]` and b `[H, F]`, or None.
        normalized: whether x - c is divided by its norm; without a bias.
        form, exp_form: of `"projected_softmax"`: `[H]`, and the form whose features are exponentials.
    """

    kind: str
    multiplier: float = 1.0
    weight: torch.Tensor | None = None
    center: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    normalized: bool = False
    form: torch.Tensor | None = None
    exp_form: int = -1


class KeyWeights(NamedTuple):
    """Log weights of keys x beside the log scale of their features: s (a . x - |(x - c) A|^2 / 2), c that of their map.

    Attributes:
        scaling: s.
        mean: a `[H, D]`, or None.
        square: A `[H or 1, D, D]`, or None.
    """

    scaling: float = 1.0
    mean: torch.Tensor | None = None
    square: torch.Tensor | None = None


Spelled = tuple[TokenMap, KeyWeights]  # a map in tensors, so that kernels can compute it as they read tokens

# The classes of maps are not frozen: layers make them in each call, and torch.compile of PyTorch 2.11 loses the
# attributes of a frozen dataclass that traced code makes and a nested function uses.


@dataclass(eq=False)
class ParametricMap:
    """The feature map `function(x, *parameters)`, whose trained tensors an op can see.

    An op that computes features again in its backward pass hands gradients to these tensors only: whatever trains
    belongs among them, not into the closure of `function`.
    """

    function: Callable[..., Features]
    parameters: tuple[torch.Tensor, ...] = ()

    def __call__(self, x: torch.Tensor) -> Features:
        return self.function(x, *self.parameters)


@dataclass(eq=False, kw_only=True)
class SpelledMap(ParametricMap):
    """A parametric map that kernels can compute too.

    Attributes:
        spelled: `() -> (map, weights of keys)`, the same in tensors; called only where it is used.
    """

    spelled: Callable[[], Spelled]


def _full(x: torch.Tensor) -> torch.Tensor:
    return x.to(accumulation_dtype(x.dtype))


def elu_features(x: torch.Tensor) -> Features:
    """elu(x) + 1, "Transformers are RNNs", arXiv:2006.16236."""
    return F.elu(_full(x)).add_(1.0), None


def relu_features(x: torch.Tensor) -> Features:
    """max(x, 0); a row of negative values has no features and attends to nothing."""
    return F.relu(_full(x)), None


def squared_relu_features(x: torch.Tensor) -> Features:
    """max(x, 0)^2."""
    return F.relu(_full(x)).square(), None


def exp_features(x: torch.Tensor) -> Features:
    """exp(x), returned as exp(x - max x) and log scale max x, so that no input overflows."""
    x = _full(x)
    peak = x.detach().amax(-1)
    return (x - peak[..., None]).exp(), peak


def softmax_features(x: torch.Tensor) -> Features:
    """softmax over the features of each token."""
    return _full(x).softmax(-1), None


def taylor_features(x: torch.Tensor, order: int) -> Features:
    """Features of 1 + q . k (order 1) or 1 + q . k + (q . k)^2 / 2 (order 2, Based, arXiv:2402.18668).

    Args:
        x: `[..., D]`.
        order: 1 or 2.

    Returns:
        `[..., 1 + D]`, or `[..., 1 + D + D (D + 1) / 2]` (each pair of coordinates once), and None.
    """
    x = _full(x)
    if order == 1:
        return torch.cat([torch.ones_like(x[..., :1]), x], -1), None
    # Every feature is a product of two coordinates, 1 being one: picked by matrix products, several times faster on a
    # CPU, forward and backward, than by indices.
    dim = x.shape[-1]
    first, second = kept_lists(("pairs", dim, x.dtype, x.device), x.device, partial(_pairs, dim, x.dtype, x.device))
    return F.linear(x, first[1:].mT, first[0]) * F.linear(x, second[1:].mT, second[0]), None


def _pairs(dim: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second coordinate of each pair, `[1 + D, F]`: row 0 stands for the 1, a square counts half."""
    row, column = torch.triu_indices(dim + 1, dim + 1, device=device)
    picks = torch.arange(dim + 1, device=device)[:, None]
    first, second = (picks == row).to(dtype), (picks == column).to(dtype)
    return first * torch.ones_like(first[0]).masked_fill_((row == column) & (row > 0), 0.5**0.5), second


def weighted_by_mean_logit(features: Features, k: torch.Tensor, query_mean: torch.Tensor, scaling: float) -> Features:
    """Key features times exp(scaling * a . k): the variance reducer, exact for what all queries share.

    Args:
        features: of the keys.
        k: `[B, H, T, D]`, the keys themselves.
        query_mean: a, `[H, D]`.
        scaling: factor of the logits.
    """
    shared, (phi, log_scale) = mean_logit(k, query_mean, scaling), features
    return phi, shared if log_scale is None else log_scale + shared


def mean_logit(x: torch.Tensor, other: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * other . x for each token, `[B, H, T]`, with `other` `[H, D]`."""
    x = _full(x)
    # As a row of products: matrix products with a single column are several times slower.
    return ((other.to(x.dtype) * scaling)[:, None] @ x.mT)[..., 0, :]


def fourier_features(projected: torch.Tensor) -> torch.Tensor:
    """[cos, sin] / sqrt(m) of `projected [..., m]`; a product of two averages cos of the difference."""
    return torch.cat([projected.cos(), projected.sin()], -1) * projected.shape[-1] ** -0.5


RANDOM_FEATURE_KERNELS = ("positive", "hyperbolic", "trig", "relu")

_RELU_EPSILON = 1e-3  # `kernel_epsilon` of the FAVOR+ authors' code: added to every relu feature


def query_random_features(projected: torch.Tensor, kernel: str) -> torch.Tensor:
    """FAVOR+ features (arXiv:2009.14794) of queries, up to a factor of each query, which cancels.

    Args:
        projected: `[..., m]`, the queries on the random directions; overwritten.
        kernel: one of `RANDOM_FEATURE_KERNELS`.

    Returns:
        `[..., m]`, or `[..., 2m]` for hyperbolic and trig.
    """
    if kernel == "trig":
        return fourier_features(projected)
    if kernel == "relu":
        return projected.relu() + _RELU_EPSILON
    if kernel == "hyperbolic":
        projected = torch.cat([projected, -projected], -1)
    return _relative_exponentials(projected)[0]  # the largest is a factor of the query, as exp(-|q|^2 / 2) is


def key_random_features(projected: torch.Tensor, x: torch.Tensor, scaling: float, kernel: str) -> Features:
    """FAVOR+ features of keys, the rest of their scale as a log weight.

    Args:
        projected: `[..., m]`, sqrt(scaling) x on the random directions; overwritten.
        x: `[..., D]`, the keys.
        scaling: factor of the logits.
        kernel: one of `RANDOM_FEATURE_KERNELS`.

    Returns:
        features as for queries, and the log weight `[...]` (None for relu).
    """
    if kernel == "relu":
        return projected.relu() + _RELU_EPSILON, None
    half_norm = 0.5 * scaling * x.square().sum(-1)
    if kernel == "trig":
        return fourier_features(projected), half_norm
    if kernel == "hyperbolic":
        projected = torch.cat([projected, -projected], -1)
    features, peak = _relative_exponentials(projected)
    return features, peak - half_norm


def _relative_exponentials(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(x - max x) along the last dimension, written over x, and max x: no overflow."""
    peak = x.detach().amax(-1)
    return exp_(x.sub_(peak[..., None])), peak


FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu": elu_features,
    "exp": exp_features,
    "relu": relu_features,
    "softmax": softmax_features,
    "squared_relu": squared_relu_features,
}


@dataclass(eq=False)
class ExponentialMap:
    """The feature map exp(m ((x - c) W + b)), spelled out so that a kernel can compute it as it reads x.

    Attributes:
        function: the same in plain PyTorch.
        spelled: `() -> (map, weights of keys)`, the same in tensors, W float32; called only where it is used.
        rest: `x -> [B, H, T]`, these weights in plain PyTorch; None for queries.
    """

    function: FeatureMap
    spelled: Callable[[], Spelled]
    rest: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> Features:
        return self.function(x)

    def exponent(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W' `[H or 1, D, F]` and b' `[H, F]` or None of exp(x W' + b'), float32."""
        (_, multiplier, weight, center, bias, *_), _ = self.spelled()
        assert weight is not None
        weight = weight * multiplier
        bias = None if bias is None else bias.float() * multiplier
        if center is not None:
            moved = (center.float()[:, None] @ weight)[:, 0]
            bias = -moved if bias is None else bias - moved
        return weight, bias


@dataclass(eq=False)
class ScaledMap:
    """The feature map phi(x * multiplier) of `FEATURE_MAPS`, with an optional weight exp(scaling * a . x) of keys.

    Spelled out so that kernels can apply it as they read x, where they know phi.

    Attributes:
        name: of phi.
        multiplier: factor inside phi.
        query_mean: a, `[H, D]`; None for no weight.
        scaling: factor of the logits.
    """

    name: str
    multiplier: float
    query_mean: torch.Tensor | None = None
    scaling: float = 1.0

    def __call__(self, x: torch.Tensor) -> Features:
        features = FEATURE_MAPS[self.name](_full(x) * self.multiplier)
        if self.query_mean is None:
            return features
        return weighted_by_mean_logit(features, x, self.query_mean, self.scaling)

    def spelled(self) -> Spelled:
        """The map in tensors."""
        return TokenMap(self.name, self.multiplier), KeyWeights(self.scaling, self.query_mean)

    def log_weight(self, x: torch.Tensor) -> torch.Tensor | None:
        """scaling * a . x, `[B, H, T]`, or None."""
        return None if self.query_mean is None else mean_logit(x, self.query_mean, self.scaling)


@dataclass(eq=False)
class TaylorMap:
    """The feature map `taylor_features(x, 2)` of a token's coordinates x, spelled out for ops that need no features.

    Attributes:
        coordinates: a token to x and a log scale.
    """

    coordinates: FeatureMap

    def __call__(self, x: torch.Tensor) -> Features:
        return self.expanded()(x)

    def expanded(self) -> ParametricMap:
        """The same as a map whose parameters an op sees."""
        given = self.coordinates
        function = given.function if isinstance(given, ParametricMap) else given

        def features(x: torch.Tensor, *parameters: torch.Tensor) -> Features:
            coordinates, log_scale = function(x, *parameters)
            return taylor_features(coordinates, order=2)[0], log_scale

        return ParametricMap(features, given.parameters if isinstance(given, ParametricMap) else ())


def gaussian_orthogonal(
    num_features: int, dim: int, generator: torch.Generator, *, orthogonal: bool = True
) -> torch.Tensor:
    """Gaussian directions for random features, orthogonal within blocks of `dim` rows.

    Every row has the norm of a Gaussian vector (chi distributed with `dim` degrees of freedom), drawn
    independently of its direction, so each row on its own is exactly Gaussian and estimates stay unbiased.

    Args:
        num_features: rows m.
        dim: columns D.
        generator: a CPU generator; it alone decides the result.
        orthogonal: False gives independent rows.

    Returns:
        float32 `[m, D]` on the CPU. Source: FAVOR+, arXiv:2009.14794, section 2.4.
    """
    if not orthogonal:
        return torch.randn(num_features, dim, generator=generator, device="cpu")
    blocks = []
    for _ in range(math.ceil(num_features / dim)):
        basis, upper = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu"))
        # QR leaves the signs to the implementation; with these it is uniform over rotations.
        blocks.append((basis * upper.diagonal().sign()).mT)
    norms = torch.randn(num_features, dim, generator=generator, device="cpu").norm(dim=-1, keepdim=True)
    return torch.cat(blocks)[:num_features].float() * norms
