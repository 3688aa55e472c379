"""Pieces of softmax attention against all of it at once, and their gradients."""

import pytest
import torch

from hf_linear_attn.ops.base import pieces
from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.base.pieces import Piece, attend_pieces, merge

SCALING = 0.3


def draw(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def logits_of(q, k, seen):
    return (q @ k.mT * SCALING).masked_fill(~seen, -torch.inf)


def dense(q, k, v, seen):
    return logits_of(q, k, seen).softmax(-1).nan_to_num(0) @ v


class Split(Piece):
    """Four queries over some of the keys, whose gradients are made three keys at a time."""

    def __init__(self, of, tokens, columns):
        self.of, self.tokens, self.columns, self.again = of, tokens, columns, columns.start > 0
        self.parts = tuple(slice(i, i + 3) for i in range(0, columns.stop - columns.start, 3))

    def rows(self, x, fill=None):
        return x[:, :, self.tokens]

    def place(self, total, x):
        total[:, :, self.tokens] = x

    def keys(self):
        return self.of.k[:, :, self.columns], self.of.v[:, :, self.columns]

    def bias(self):
        seen = self.of.seen[self.tokens, self.columns]
        return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, LOG_ZERO)[None, None]

    def add(self, part, d_keys, d_values):
        for total, x in zip(self.of.grads, (d_keys, d_values), strict=True):
            total[:, :, self.columns][:, :, part] += x


class Quarters:
    def __init__(self, q, k, v, seen):
        self.k, self.v, self.seen = k, v, seen

    def __iter__(self):
        for start in range(0, 8, 4):
            for columns in (slice(0, 5), slice(5, 11)):
                yield Split(self, slice(start, start + 4), columns)

    def zero_gradients(self):
        self.grads = [torch.zeros_like(x) for x in (self.k, self.v)]

    def gradients(self):
        return tuple(self.grads)


@pytest.mark.parametrize("kernels", [True, False])
def test_pieces_are_one_softmax_and_rows_without_a_key_are_zero(kernels, monkeypatch):
    monkeypatch.setattr(pieces, "serves", lambda q, v: kernels)
    tensors = draw((2, 2, 8, 6), (2, 2, 11, 6), (2, 2, 11, 6))
    seen = torch.rand(8, 11, generator=torch.Generator().manual_seed(4)) > 0.5
    seen[2], seen[3, :5], seen[4, 5:] = False, False, False
    results = []
    for function in (lambda *x: attend_pieces(Quarters, *x, scaling=SCALING, may_be_blind=True), dense):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = function(*leaves, seen)
        out.sin().sum().backward()
        results.append([out.detach(), *(x.grad.nan_to_num(0) for x in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert (results[0][0][:, :, 2] == 0).all()


def test_merging_by_log_sum_exp_is_one_softmax():
    q, k, v = draw((2, 2, 6, 8), (2, 2, 10, 8), (2, 2, 10, 8))
    seen = torch.rand(6, 10, generator=torch.Generator().manual_seed(4)) > 0.5
    seen[2], seen[3, :4], seen[4, 4:] = False, False, False

    def part(s):
        return dense(q, k[:, :, s], v[:, :, s], seen[:, s]), logits_of(q, k[:, :, s], seen[:, s]).logsumexp(-1)

    cut = ((out, lse.clamp(min=LOG_ZERO)) for out, lse in (part(slice(4)), part(slice(4, None))))
    merged, expected = merge(*cut), part(slice(None))
    torch.testing.assert_close(merged[0], expected[0])
    torch.testing.assert_close(merged[1].clamp(min=-1e29), expected[1].clamp(min=-1e29))
