"""Statistics of softmax attention against whole matrices of weights."""

import pytest
import torch

from hf_linear_attn.ops.features.maps import exp_features
from hf_linear_attn.ops.starts.attention_rows import attended_share, attention_cross_entropy

F64 = torch.float64
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def draw(length):
    return torch.randn(3, 2, 3, length, 4, generator=torch.Generator().manual_seed(length), dtype=F64).unbind(0)


def weights(q, k, causal, mask=None):
    logits = q @ k.mT / 2
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        logits = logits.masked_fill(~seen, -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    return logits.softmax(-1)


@CAUSAL
def test_shares_are_the_columns_of_the_weights(causal):
    rows = [tuple(x[:1, :, :n] for x in draw(40)) for n in (40, 17)]
    expected = torch.cat([weights(q, k, causal)[0].mean(1) * k.shape[2] for q, k, _ in rows], -1) / 57
    found = attended_share(rows, is_causal=causal, scaling=0.5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=F64))


@CAUSAL
@pytest.mark.parametrize("queries", [30, 12])
def test_cross_entropy_is_that_of_two_matrices(queries, causal):
    q, k, _ = draw(30)
    q = q[:, :, -queries:]
    if causal or queries == 30:
        mask = torch.ones(2, 30, dtype=torch.bool)
        mask[1, :5] = False
    else:
        mask = None
    found = attention_cross_entropy(q, k, exp_features, exp_features, token_mask=mask, is_causal=causal, scaling=0.5)
    target = weights(q, k, causal, mask)
    ours = (q.exp() @ k.exp().mT) * (target > 0)
    ours = ours / ours.sum(-1, keepdim=True)
    row = -(target * ours.clamp(min=1e-30).log()).sum(-1)
    real = torch.ones_like(row, dtype=torch.bool) if mask is None else mask[:, None, -queries:].expand_as(row)
    expected = row[real].mean()
    torch.testing.assert_close(found, expected)
    entropy = -(target * target.clamp(min=1e-30).log()).sum(-1)[real].mean()
    assert found > entropy
