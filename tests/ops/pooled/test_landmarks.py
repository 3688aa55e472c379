"""Attention over a window and landmarks against its dense form; landmarks of a sequence."""

import pytest
import torch

from hf_linear_attn.ops.pooled import landmarks
from hf_linear_attn.ops.pooled.landmarks import attend_window_and_segments, pool_sequence


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("from_start", [True, False])
@pytest.mark.parametrize(("q_len", "k_len"), [(150, 150), (70, 150), (1, 40)])
def test_window_and_segments_are_one_softmax(q_len, k_len, from_start, kernels, monkeypatch):
    monkeypatch.setattr(landmarks, "serves", lambda q, v: kernels)
    size, per, window = 16, 2, 20
    q, k, v = draw(2, 2, q_len, 6), draw(2, 2, k_len, 6, seed=1), draw(2, 2, k_len, 6, seed=2)
    marks = [draw(2, 2, k_len // size * per, 6, seed=s) for s in (3, 4)]
    rank = torch.arange(k_len) - torch.tensor([[0], [13]])
    where = {"window_size": window, "segment_size": size, "per_segment": per, "scaling": 0.4}

    def dense(q, k, v, *marks):
        own = rank[:, k_len - q_len :, None]
        distance = own - rank[:, None]
        near = (distance >= 0) & (distance < window) & (rank[:, None] >= 0)
        past = torch.arange(marks[0].shape[2]) // per < own.div(size, rounding_mode="floor")
        seen = torch.cat([near, past], -1)[:, None]
        logits = q @ torch.cat([k, marks[0]], 2).mT * 0.4
        weights = logits.masked_fill(~seen, -1e30).softmax(-1) * (own >= 0)[:, None]
        return weights @ torch.cat([v, marks[1]], 2)

    def blocks(q, k, v, *marks):
        return attend_window_and_segments(q, k, v, rank, marks, **where, from_start=from_start)

    results = []
    for function in (blocks, dense):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, *marks)]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_landmarks_of_segments_are_pooled_from_their_own_tokens():
    """A head that is cut: 3 of its 4 landmarks hold a token each of the three; one that is not pools all for each."""
    k, v, weight = draw(1, 2, 5, 4), draw(1, 2, 5, 4, seed=1), draw(2, 4, 4, seed=2)
    rank = torch.arange(5)[None] - 2
    (keys, values, lack), used = pool_sequence(k, v, rank, weight, torch.tensor([True, False]))
    assert used.tolist() == [[True, True, True, False]]
    torch.testing.assert_close(keys[:, 0, :3], k[:, 0, 2:])
    torch.testing.assert_close(values[:, 0, :3], v[:, 0, 2:])
    torch.testing.assert_close(lack[:, 0, :3], torch.zeros(1, 3).double())
    p = (k[0, 1, 2:] @ weight[1]).softmax(0)
    torch.testing.assert_close(keys[0, 1], p.T @ k[0, 1, 2:])
    entropy = -(p * p.log()).sum(0)
    torch.testing.assert_close(lack[0, 1], entropy - torch.tensor(3.0).double().log())
