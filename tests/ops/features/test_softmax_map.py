"""Hedgehog's feature map in its three forms, and what starts read off softmax's own weights."""

import pytest
import torch

from hf_linear_attn.ops.features import softmax_map as maps
from hf_linear_attn.ops.starts.attention_rows import attended_share
from hf_linear_attn.ops.starts.calibration import centroid_starts

HEADS, DIM = 3, 4


def draw(length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, HEADS, length, DIM, generator=g, dtype=torch.float64).unbind(0)


def test_features_are_normalized_by_form():
    x = draw(7)[0]
    g = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(HEADS, 6, DIM, generator=g).double(), torch.randn(HEADS, 6, generator=g).double()
    form = torch.tensor([maps.PUBLISHED, maps.KEY_CENTROIDS, maps.QUERY_CENTROIDS])
    features, log_scale = maps.softmax_map(x, weight, bias, form, maps.QUERY_CENTROIDS)
    u = x @ weight.mT + bias[:, None]
    torch.testing.assert_close(features[:, 0, :, :3], u[:, 0, :, :3].softmax(-1))
    torch.testing.assert_close(features[:, 0, :, 3:], u[:, 0, :, 3:].softmax(-1))
    torch.testing.assert_close(features[:, 1], u[:, 1].softmax(-1))
    torch.testing.assert_close(features[:, 2] * log_scale[:, 2, :, None].exp(), u[:, 2].exp())
    assert not log_scale[:, :2].any()


def test_huge_inputs_stay_finite():
    x = 1e4 * draw(5)[0].float()
    weight, bias = maps.published_map(HEADS, 2 * DIM, DIM, 0)
    for form in (maps.PUBLISHED, maps.KEY_CENTROIDS, maps.QUERY_CENTROIDS):
        features, _ = maps.softmax_map(x, weight, bias, torch.full((HEADS,), form), maps.KEY_CENTROIDS)
        assert features.isfinite().all()


def test_centroids_estimate_the_kernel():
    """Tokens that are centroids: both forms give e^{s q.k} itself."""
    kinds = 6 * torch.randn(HEADS, 5, DIM, generator=torch.Generator().manual_seed(2))
    few = kinds[:, torch.arange(60) % 5]
    other = torch.randn(HEADS, 60, DIM, generator=torch.Generator().manual_seed(3))
    for place, (q, k) in enumerate(((other, few), (few, other))):
        start = centroid_starts(q, k, 6, 0.2)[place]
        phi_q, scale_q = maps.softmax_map(
            q[None], start["query_weight"], start["query_bias"], start["form"], maps.KEY_CENTROIDS
        )
        phi_k, scale_k = maps.softmax_map(
            k[None], start["key_weight"], start["key_bias"], start["form"], maps.QUERY_CENTROIDS
        )
        estimate = (phi_q @ phi_k.mT).log() + scale_q[..., None] + scale_k[..., None, :]
        torch.testing.assert_close(estimate[0], 0.2 * q @ k.mT, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_the_share_of_a_key_is_its_share_of_all_attention(causal):
    rows = [draw(50, seed) for seed in (0, 1)]
    dense = []
    for q, k, _ in rows:
        logits = (q @ k.mT * 0.5).masked_fill(causal & ~torch.ones(50, 50).tril().bool(), -torch.inf)
        dense.append(logits.softmax(-1).sum(2)[0])
    expected = torch.cat(dense, -1) / 100
    torch.testing.assert_close(attended_share(rows, is_causal=causal, scaling=0.5), expected)
