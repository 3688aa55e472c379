"""Random features of kernels of a difference: Gaussian ("rbf") exp(-|x - y|^2 / 2) and Laplace exp(-|x - y|_1).

`fourier` features [cos, sin](omega x) / sqrt(m) are those of Rahimi and Recht, "Random Features for Large-Scale Kernel
Machines": Gaussian omega for the first kernel, Cauchy omega for the second. An estimate errs by m^-1/2 whatever it
estimates. Real queries and keys lie so far apart that all kernels of a row are smaller than that, and the row's
denominator, which they sum to, has either sign.

`positive` features have no such rows. They are FAVOR+'s (arXiv:2009.14794) of exp(x . y), times what makes a Gaussian
of it: exp(-|x - y|^2 / 2) = E exp(omega x - |x|^2) exp(omega y - |y|^2). And the Laplace kernel is a mixture of
Gaussians, exp(-|t|) = E exp(-t^2 / 2 n^2) with a standard normal n for each coordinate, so that

    exp(-|x - y|_1) = E phi(x) phi(y),    phi(x) = exp(sum_d omega_d x_d / |n_d| - (x_d / n_d)^2),

where omega / |n| is a Cauchy draw: the frequencies are those of the Fourier features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.ops.base.numerics import accumulation_dtype, exp_, full_precision
from hf_linear_attn.ops.features.maps import FEATURE_MAPS, Features, fourier_features, gaussian_orthogonal
from hf_linear_attn.ops.features.named import feature_width

__all__ = [
    "FEATURES",
    "SHIFT_INVARIANT",
    "CenteredMap",
    "RandomKernel",
    "check_kernel_options",
    "draw_frequencies",
    "mean_distance",
    "shift_invariant_features",
]

SHIFT_INVARIANT = ("laplace", "rbf")
FEATURES = ("positive", "fourier")

_SMALLEST_WIDTH = 1e-4  # so that frequencies fit into float16
_PAIRED_TOKENS = 256  # of each side, whose distances are averaged
_SHARPNESS = (1.0, 2.0, 4.0)  # that calibration tries of a map that is no kernel
_BANDWIDTHS = (0.25, 0.5, 1.0)  # that calibration tries, as multiples of the mean distance of queries and keys


def check_kernel_options(options: Any) -> None:
    """Raise `ValueError` for bad options of a method that has kernels, or one of theirs beside another feature map.

    Args:
        options: a variant's, with `feature_map`, `random_features`, `num_features`, `normalize` and `bandwidth`.
    """
    options.require_feature_map("feature_map", *SHIFT_INVARIANT)
    options.require_choice("random_features", FEATURES)
    options.require_bool("normalize")
    options.require_number("bandwidth", at_least=1e-3)
    options.require_width("num_features")
    for name, default in (("random_features", "positive"), ("normalize", False), ("bandwidth", 1.0)):
        value = getattr(options, name)
        if options.feature_map not in SHIFT_INVARIANT and value != default:
            raise ValueError(f"{name}={value!r}; allowed with feature_map={options.feature_map!r}: {default!r}.")


class RandomKernel:
    """A kernel of a difference in one layer, whose tensors the layer holds: kappa((q - a) / sigma, (k - c) / sigma).

    Args:
        options: with `feature_map`, one of `SHIFT_INVARIANT`, `random_features`, `num_features` and `normalize`.
        dim: D.

    Attributes:
        num_features: F.
        directions: names of the random buffers, of `shape` `[m, D]`: omega and, of mixed Gaussians, their widths.
    """

    def __init__(self, options: Any, dim: int) -> None:
        self.kernel, self.form, self.normalize = options.feature_map, options.random_features, options.normalize
        self.shape = (options.num_features, dim)
        self.num_features = options.num_features * (1 if self.form == "positive" else 2)
        self.directions = ("omega", "width") if (self.kernel, self.form) == ("laplace", "positive") else ("omega",)

    def register(self, layer: nn.Module) -> None:
        """Give the layer the buffers `directions`, empty."""
        for name in self.directions:
            layer.register_buffer(name, torch.empty(self.shape))

    def draw(self, layer: nn.Module, generator: torch.Generator) -> None:
        """Draw the layer's buffers `directions` anew; the generator, on the CPU, alone decides them."""
        drawn = zip(("omega", "width"), draw_frequencies(self.kernel, *self.shape, generator), strict=True)
        for name, x in drawn:
            if x is not None and name in self.directions:
                layer.get_buffer(name).copy_(x)

    def compared(self, x: torch.Tensor, center: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """What is divided by sigma: tokens `[..., H, T, D]` without their center `[H, D]`, normalized or scaled."""
        x = x.to(accumulation_dtype(x.dtype))
        if center is not None:
            x = x - center.to(x.dtype)[:, None]
        return F.normalize(x, dim=-1) if self.normalize else x * scaling**0.5

    def features(
        self, layer: nn.Module, x: torch.Tensor, center: torch.Tensor | None, bandwidth: torch.Tensor, scaling: float
    ) -> Features:
        """phi(x) `[..., H, T, F]` by the layer's directions, for the bandwidth sigma `[H]`."""
        compared = self.compared(x, center, scaling)
        compared = compared / bandwidth.to(compared.dtype)[:, None, None]
        width = layer.get_buffer("width") if "width" in self.directions else None
        return shift_invariant_features(compared, layer.get_buffer("omega"), width, self.form)

    def bandwidths(self, q: torch.Tensor, k: torch.Tensor, a: Any, c: Any, scaling: float) -> list[torch.Tensor]:
        """What calibration tries for sigma `[H]`: multiples of the distance between queries and keys `[H, tokens, D]`.

        Args:
            a, c: their centers `[H, D]`, or None.
        """
        x, y = self.compared(q, a, scaling), self.compared(k, c, scaling)
        distance = mean_distance(x, y, self.kernel).clamp(min=1e-3)
        return [share * distance for share in _BANDWIDTHS]


class CenteredMap:
    """The feature map of a layer, of sharpness (x - center): a named one, or a kernel, whose sharpness is 1 / sigma.

    The layer holds `query_mean`, `key_mean` `[H, D]`, both or none, `sharpness` `[H]`, and the directions of a kernel.

    Args:
        options: a variant's, see `check_kernel_options`.
        dim: D.

    Raises:
        ValueError: for a map of one's own that does not map tokens of D numbers.
    """

    def __init__(self, options: Any, dim: int) -> None:
        self.name, self.sharpness = options.feature_map, 1 / options.bandwidth
        self.kernel = RandomKernel(options, dim) if self.name in SHIFT_INVARIANT else None
        if self.kernel is None:
            feature_width(self.name, dim)

    def register(self, layer: nn.Module) -> None:
        """Give the layer the buffers of a kernel's directions."""
        if self.kernel is not None:
            self.kernel.register(layer)

    def draw(self, layer: nn.Module, generator: torch.Generator) -> None:
        """Draw a kernel's directions anew; the generator, on the CPU, alone decides them."""
        if self.kernel is not None:
            self.kernel.draw(layer, generator)

    def features(self, layer: nn.Module, x: torch.Tensor, side: str, scaling: float) -> Features:
        """phi of the tokens `[..., H, T, D]` of a side, `"query"` or `"key"`."""
        center: torch.Tensor | None = getattr(layer, f"{side}_mean", None)
        if self.kernel is not None:
            sigma = layer.get_buffer("sharpness").to(accumulation_dtype(x.dtype)).reciprocal()
            return self.kernel.features(layer, x, center, sigma, scaling)
        if center is not None:
            x = layer.get_buffer("sharpness").to(x.dtype)[:, None, None] * (x - center.to(x.dtype)[:, None])
        return FEATURE_MAPS[self.name](x * scaling**0.5)

    def starts(self, q: torch.Tensor, k: torch.Tensor, scaling: float) -> list[dict[str, torch.Tensor]]:
        """What calibration tries, by name, the published form first; q, k are `[H, tokens, D]`."""
        means = [{"query_mean": x * q.mean(1), "key_mean": x * k.mean(1)} for x in (0, 1)]
        one = torch.ones_like(q[:, 0, 0])
        tried = [(0, self.sharpness * one)]
        if self.kernel is None:
            tried += [(1, x * one) for x in _SHARPNESS]
        else:
            for moved, mean in enumerate(means):
                sigmas = self.kernel.bandwidths(q, k, mean["query_mean"], mean["key_mean"], scaling)
                tried += [(moved, 1 / sigma) for sigma in sigmas]
        return [{**means[moved], "sharpness": sharpness} for moved, sharpness in tried]


def draw_frequencies(
    kernel: str, num_features: int, dim: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The random directions of a kernel, and the widths |n| of the Gaussians that mix to it.

    Args:
        kernel: one of `SHIFT_INVARIANT`.
        num_features: m.
        dim: D.
        generator: a CPU generator; it alone decides the result.

    Returns:
        float32 `[m, D]` on the CPU, and the same, or None for a kernel that is one Gaussian.
    """
    if kernel == "rbf":
        return gaussian_orthogonal(num_features, dim, generator), None
    gaussian, width = torch.randn(2, num_features, dim, generator=generator, device="cpu").unbind(0)
    width = width.abs().clamp(min=_SMALLEST_WIDTH)
    return gaussian / width, width


def shift_invariant_features(
    x: torch.Tensor, omega: torch.Tensor, width: torch.Tensor | None, features: str
) -> Features:
    """Random features of a kernel of `draw_frequencies`.

    Args:
        x: `[..., D]`.
        omega: `[m, D]`, its directions.
        width: `[m, D]`, its widths, or None; Fourier features need none.
        features: one of `FEATURES`.

    Returns:
        `[..., m]` and their log scale `[...]`, up to a common factor; `[..., 2m]`, of both signs, and None.
    """
    x = x.to(accumulation_dtype(x.dtype))
    square = x.square()
    with full_precision(x):  # 1 / width^2 is beyond half precision
        projected = x @ omega.to(x.dtype).mT
        if width is not None and features == "positive":
            projected = projected - square @ width.to(x.dtype).square().reciprocal().mT
    if features == "fourier":
        return fourier_features(projected), None
    peak = projected.detach().amax(-1)
    # What all features share goes into the scale: that of a query cancels, in its gradient too.
    return exp_(projected - peak[..., None]), peak - square.sum(-1) if width is None else peak


def mean_distance(x: torch.Tensor, y: torch.Tensor, kernel: str) -> torch.Tensor:
    """How far apart tokens are where the kernel measures it, `[H]`: |x - y|_1 ("laplace") or |x - y| ("rbf").

    Args:
        x, y: `[H, tokens, D]`, of which evenly spaced ones are paired.
        kernel: one of `SHIFT_INVARIANT`.
    """
    return torch.cdist(_few(x), _few(y), p=1.0 if kernel == "laplace" else 2.0).mean((1, 2))


def _few(x: torch.Tensor) -> torch.Tensor:
    tokens = x.shape[1]
    return x[:, torch.linspace(0, tokens - 1, min(_PAIRED_TOKENS, tokens), device=x.device).long()]
