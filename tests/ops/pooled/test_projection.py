"""E K and F V, against the matrix that a row of n tokens is multiplied with."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from hf_linear_attn.ops.pooled.projection import SequenceProjection, check_projection_options

F64 = torch.float64


@dataclass(frozen=True)
class Options:
    k: int | tuple[int, ...] = 4
    sharing: str = "headwise"
    projection: str = "linear"
    init: str = "mean_pool"
    seed: int = 0


def project(options, length, mask=None, max_length=12):
    projection = SequenceProjection(options, 0, 2, 3, 5, max_length)
    g = torch.Generator().manual_seed(length)
    key, value = torch.randn(2, 2, 3, length, 5, generator=g, dtype=F64)
    weights = [None, None]
    if projection.weight_shape is not None:
        weights = [torch.randn(projection.weight_shape, generator=g, dtype=F64) for _ in range(2)]
    return key, value, weights, projection(key, value, mask, *weights)


@pytest.mark.parametrize("sharing", ["none", "headwise"])
def test_the_longest_input_meets_the_paper_s_matrices(sharing):
    key, value, weights, (k, v, in_use) = project(Options(sharing=sharing), 12)
    torch.testing.assert_close(k, weights[0] @ key)
    torch.testing.assert_close(v, weights[1] @ value)
    assert in_use is None


@pytest.mark.parametrize("length", [1, 3, 5, 8, 12])
@pytest.mark.parametrize("projection", ["mean_pool", "linear", "conv"])
def test_starts_are_means_of_even_segments_at_every_length(projection, length):
    options = Options(projection=projection)
    of = SequenceProjection(options, 0, 2, 3, 5, 12)
    key, value = torch.randn(2, 2, 3, length, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    weight = None if of.weight_shape is None else of.start(of.generator()).double()
    k, v, _ = of(key, value, None, weight, None)
    slots = min(4, length)
    ends = [-(-i * length // slots) for i in range(slots + 1)]
    for x, found in ((key, k), (value, v)):
        means = [x[:, :, a:b].mean(2) for a, b in itertools.pairwise(ends)]
        torch.testing.assert_close(found, torch.stack(means, 2), atol=1e-6, rtol=1e-6)  # E starts in float32


@pytest.mark.parametrize("projection", ["linear", "conv", "mean_pool", "max_pool"])
def test_padding_is_not_there(projection):
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1, 0]], dtype=torch.bool).expand(2, -1)
    options = Options(projection=projection)
    key, value, weights, (k, v, in_use) = project(options, 10, mask)
    of = SequenceProjection(options, 0, 2, 3, 5, 12)
    alone = of(key[:, :, mask[0]], value[:, :, mask[0]], None, *weights)
    torch.testing.assert_close(k[:, :, in_use[0]], alone[0])
    torch.testing.assert_close(v[:, :, in_use[0]], alone[1])


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"one k for all layers, got k=\[4, 8\]"):
        check_projection_options(Options(k=(4, 8), sharing="layerwise"))
    with pytest.raises(ValueError, match="needs projection='linear' or 'conv', got 'max_pool'"):
        check_projection_options(Options(projection="max_pool", init="random"))
    with pytest.raises(ValueError, match="3 entries for 2 layers"):
        SequenceProjection(Options(k=(4, 8, 4)), 0, 2, 3, 5, 12)
    with pytest.raises(ValueError, match="has no weights"):
        SequenceProjection(Options(projection="mean_pool"), 0, 2, 3, 5, 12).start(torch.Generator())
    with pytest.raises(ValueError, match=r"at most 12 tokens and got 13. Convert with max_length=13"):
        project(Options(), 13)
