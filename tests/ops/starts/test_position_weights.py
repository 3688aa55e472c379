"""Mean softmax weight by distance: against loops, and its low-rank factors."""

import pytest
import torch

from hf_linear_attn.ops.starts.position_weights import low_rank_factors, position_log_weights


@pytest.mark.parametrize("is_causal", [False, True])
def test_mean_weight_by_distance_with_the_first_token_apart(is_causal):
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randn(1, 2, n, 4, generator=generator) for _ in range(3)) for n in (5, 7)]
    table = position_log_weights(rows, 9, is_causal=is_causal, scaling=0.7)
    weights = []
    for q, k, _ in rows:
        logits = q[0] @ k[0].mT * 0.7
        if is_causal:
            logits = logits.masked_fill(~torch.ones(logits.shape[1:], dtype=torch.bool).tril(), -torch.inf)
        weights.append(logits.softmax(-1))
    for head in range(2):
        first = torch.stack([w[head, :, 0].mean() for w in weights]).mean()
        by_distance = {}
        for w in weights:
            for i in range(w.shape[1]):
                for j in range(1, i + 1 if is_causal else w.shape[1]):
                    by_distance.setdefault(j - i, []).append(w[head, i, j])
        for i in range(9):
            for j in range(i + 1 if is_causal else 9):
                nearest = min(max(j - i, min(by_distance)), max(by_distance))
                expected = torch.stack(by_distance[nearest]).mean() if j else first
                torch.testing.assert_close(table[head, i, j], expected.log())
    if is_causal:
        assert (table.triu(1) == 0).all()


def test_single_tokens_say_nothing():
    row = tuple(torch.ones(1, 2, 1, 4) for _ in range(3))
    assert (position_log_weights([row], 3, is_causal=False, scaling=1.0) == 0).all()


@pytest.mark.parametrize("rank", [2, 6, 8])
def test_low_rank_factors(rank):
    table = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    left, right = low_rank_factors(table, rank)
    assert left.shape == right.shape == (3, 6, rank)
    values = torch.linalg.svdvals(table)
    error = (left @ right.mT - table).square().sum((1, 2))
    torch.testing.assert_close(error, values[:, rank:].square().sum(-1), rtol=1e-4, atol=1e-6)
