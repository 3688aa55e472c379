"""Segments of real tokens: their boundaries, what is pooled from them, and attention over them."""

import pytest
import torch

from hf_linear_attn.ops.pooled.pooling import (
    attend_segments,
    even_segment_mean,
    even_segment_starts,
    segment_max,
    segment_mean,
    segment_of_rank,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_segments_are_even_and_hold_every_rank_once(slots):
    n_real = torch.tensor([0, 1, 5, 8, 20])
    starts, found = even_segment_starts(n_real, slots), []
    for n, row in zip(n_real.tolist(), starts, strict=True):
        sizes = [size for size in row.diff().tolist() if size]
        assert len(sizes) == min(slots, n)
        assert sum(sizes) == n
        assert not sizes or max(sizes) - min(sizes) <= 1
        found.append([segment for segment, size in enumerate(row.diff().tolist()) for _ in range(size)])
    for segments, expected in zip(segment_of_rank(starts, 20).tolist(), found, strict=True):
        assert segments[: len(expected)] == expected
        assert set(segments[len(expected) :]) <= {slots}


@pytest.mark.parametrize("length", [12, 13])
def test_means_and_maxima_are_those_of_the_tokens(length):
    x, starts = draw(2, 3, length, 4), even_segment_starts(torch.tensor([length, 2]), 3)
    means, maxima = segment_mean(x, starts), segment_max(x, starts)
    for b in range(2):
        for slot, (begin, end) in enumerate(zip(starts[b, :-1].tolist(), starts[b, 1:].tolist(), strict=True)):
            tokens = x[b, :, begin:end]
            expected = (tokens.mean(1), tokens.amax(1)) if end > begin else [torch.zeros(3, 4).double()] * 2
            torch.testing.assert_close((means[b, :, slot], maxima[b, :, slot]), tuple(expected))


@pytest.mark.parametrize("length", [12, 13])
def test_even_means_leave_padding_out_wherever_it_is(length):
    x = draw(1, 2, length, 4)
    real = torch.arange(length)[None] % 4 != 1
    expected = segment_mean(x[:, :, real[0]], even_segment_starts(real.sum(-1), 3))
    torch.testing.assert_close(even_segment_mean(x, 3, real), expected)
    whole = torch.ones_like(real)
    torch.testing.assert_close(even_segment_mean(x, 3), even_segment_mean(x, 3, whole))


def test_a_row_without_segments_is_zero_with_finite_gradients():
    q, k, v = (draw(2, 2, n, 4, seed=n).requires_grad_() for n in (5, 3, 4))
    v = v[:, :, :3]
    in_use = torch.tensor([[True, True, False], [False, False, False]])
    out = attend_segments(q, k, v, in_use, 0.5)
    expected = (q[:1] @ k[:1, :, :2].mT * 0.5).softmax(-1) @ v[:1, :, :2]
    torch.testing.assert_close(out[:1], expected)
    assert (out[1] == 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k)))
