"""Softmax attention of layers that keep it, against a loop over rows; keys of groups against repeated ones."""

from __future__ import annotations

import pytest
import torch

from hf_linear_attn.ops.base.groups import of_each_head
from hf_linear_attn.ops.exact.softmax import softmax_attention

BATCH, HEADS, DIM = 2, 6, 8


def by_rows(q, k, v, mask, is_causal, scaling, window):
    output = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    ahead = k.shape[2] - q.shape[2]
    for b in range(BATCH):
        for row in range(q.shape[2]):
            seen = [
                t
                for t in range(k.shape[2])
                if (mask is None or mask[b, t])
                and (not is_causal or t <= row + ahead)
                and (not is_causal or window is None or t > row + ahead - window)
            ]
            for h in range(HEADS):
                group = h // (HEADS // k.shape[1])
                if seen:
                    weights = (scaling * k[b, group, seen] @ q[b, h, row]).softmax(-1)
                    output[b, h, row] = weights @ v[b, group, seen]
    return output


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_is_the_loop_over_rows(key_heads, queries, padded, is_causal, window):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, n, t, DIM, generator=g, dtype=torch.float64)
        for n, t in ((HEADS, queries), (key_heads, 9), (key_heads, 9))
    )
    mask = torch.arange(9) >= torch.tensor([[9], [2]]) if padded else None  # a row without keys
    given = mask, is_causal, 0.3
    found = softmax_attention(q, k, v, *given, 0.0, window)
    torch.testing.assert_close(found, by_rows(q, k, v, *given, window))


@pytest.mark.parametrize("shape", [(0, 1), (0, 3), (2, 0)])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_gives_nothing(shape, padded):
    batch, queries = shape
    mask = torch.ones(batch, 5, dtype=torch.bool) if padded else None
    key = torch.zeros(batch, 2, 5, DIM)
    found = softmax_attention(torch.zeros(batch, HEADS, queries, DIM), key, key[..., :3], mask, True, 1.0, 0.0)
    assert found.shape == (batch, HEADS, queries, 3)


def test_heads_that_are_no_groups_are_refused():
    with pytest.raises(ValueError, match="3 heads of queries are no groups of as many for 2 heads of keys"):
        of_each_head(torch.zeros(1, 2, 3, 4), 3)
