"""Choosing starts: rows without padding, errors per head, centroids, principal maps."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.ops.features.maps import taylor_features, weighted_by_mean_logit
from hf_linear_attn.ops.starts.calibration import (
    _argmin,
    balancing_maps,
    choose_start,
    collect_rows,
    error_meter,
    head_errors,
    head_tokens,
    kmeans,
    nonpositive_share,
    principal_maps,
    reducer_starts,
)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_rows_are_the_real_tokens_of_every_call():
    q, k, v = draw(3, 2, 4, 10, 5).unbind(0)
    padding = torch.arange(10) >= torch.tensor([[3], [10]])
    calls = [
        SimpleNamespace(query=x, key=k, value=v, token_mask=p, softmax_output=None)
        for x, p in ((q, padding), (2 * q, None))
    ]
    rows = collect_rows(calls)
    assert [row[0].shape for row in rows] == [(1, 4, 7, 5), (1, 4, 10, 5), (1, 4, 10, 5)]
    torch.testing.assert_close(rows[0][0], q[:1, :, 3:])
    queries, keys = head_tokens(rows)
    assert queries.shape == keys.shape == (4, 27, 5)
    torch.testing.assert_close(queries[:, 7:17], 2 * q[0])
    assert [row[1].shape[2] for row in collect_rows(calls, max_tokens=8)] == [7, 8, 8]


def test_a_row_is_as_long_as_most_decoders_read():
    """A start that saw 1,024 tokens was far off at 2,048."""
    q, k, v = draw(3, 1, 1, 5000, 2).unbind(0)
    call = SimpleNamespace(query=q, key=k, value=v, token_mask=None, softmax_output=v)
    rows = collect_rows([call])
    assert [x.shape[2] for x in rows[0]] == [4096] * 3
    assert rows.outputs == [None], "softmax of all tokens is not that of these"


def test_softmax_that_was_recorded_is_not_computed_again(monkeypatch):
    q, k, v = draw(3, 2, 4, 10, 5).unbind(0)
    real = torch.arange(10) < torch.tensor([[7], [10]])
    allowed = real[:, None, None, :] & torch.ones(10, 10, dtype=torch.bool).tril()
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.5)
    call = SimpleNamespace(query=q, key=k, value=v, token_mask=real, softmax_output=output)
    rows = collect_rows([call])

    def attend(row):
        return F.scaled_dot_product_attention(*row, is_causal=True, scale=0.5) * 3

    with monkeypatch.context() as patch:
        patch.setattr("hf_linear_attn.ops.starts.calibration.F.scaled_dot_product_attention", None)
        measure = error_meter(attend, rows, is_causal=True, scaling=0.5)
    torch.testing.assert_close(measure(), torch.full((4,), 4.0))
    call.softmax_output = 2 * output  # what cannot serve is not taken: other tokens, and rounded numbers
    cut = error_meter(attend, collect_rows([call], max_tokens=6), is_causal=True, scaling=0.5)()
    call.softmax_output = 2 * output.bfloat16()
    rounded = error_meter(attend, collect_rows([call]), is_causal=True, scaling=0.5)()
    for found in (cut, rounded):
        torch.testing.assert_close(found, torch.full((4,), 4.0))


@pytest.mark.parametrize("causal", [False, True])
def test_errors_are_relative_to_softmax_and_per_head(causal):
    rows = [tuple(draw(3, 1, 4, 12, 5, seed=seed).unbind(0)) for seed in range(2)]
    factor = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None]

    def attend(row):
        return factor * F.scaled_dot_product_attention(*row, is_causal=causal, scale=0.5)

    expected = torch.tensor([1.0, 0.0, 1.0, 4.0])
    torch.testing.assert_close(head_errors(attend, rows, is_causal=causal, scaling=0.5), expected)
    measure = error_meter(attend, rows, is_causal=causal, scaling=0.5)
    factor *= 0
    torch.testing.assert_close(measure(), torch.ones(4))


def test_every_head_keeps_its_best_start():
    present = {"weight": torch.full((3, 2), 9.0), "bias": torch.full((3,), 9.0)}
    target = torch.tensor([0.0, 1.0, 2.0])

    def errors():
        return (present["weight"][:, 0] - target).abs() + (present["bias"] - target).abs()

    starts = [{"weight": torch.full((3, 2), x), "bias": torch.full((3,), x)} for x in (0.0, 2.0, float("nan"), 1.0)]
    choose_start(present, starts, errors)
    torch.testing.assert_close(present["bias"], target)
    torch.testing.assert_close(present["weight"], target[:, None].expand(3, 2))


def test_the_first_start_wins_ties_and_what_a_start_leaves_out_stays():
    present = {"weight": torch.full((2,), 7.0), "bias": torch.full((2,), 5.0)}
    starts = [{"weight": torch.full((2,), x)} for x in (1.0, 2.0)]
    choose_start(present, starts, lambda: torch.ones(2))
    assert present["weight"].tolist() == [1.0, 1.0]
    assert present["bias"].tolist() == [5.0, 5.0]


def test_a_first_start_that_was_measured_is_not_measured_again():
    present, measured = {"weight": torch.tensor([5.0, 7.0])}, []

    def errors():
        measured.append(present["weight"].clone())
        return present["weight"].abs()

    smallest = choose_start(present, [{}, {"weight": torch.tensor([6.0, 2.0])}], errors, torch.tensor([5.0, 7.0]))
    assert [x.tolist() for x in measured] == [[6.0, 2.0]]
    assert present["weight"].tolist() == smallest.tolist() == [5.0, 2.0]


@pytest.mark.parametrize("width", [1, 3, 128])
def test_the_place_of_the_smallest_number_is_the_first_one(width):
    x = draw(2, 500, width).mul(3).round().div(3)  # with ties, zeros of both signs and negative numbers
    x[0, 0] = -0.0
    x[0, 1], x[1, 1] = 1e-42, float(torch.finfo(torch.float32).max)
    x[0, 3] = float("nan")
    x[0, 2, -1] = torch.nextafter(x[0, 2].min(), torch.tensor(-torch.inf))
    assert torch.equal(_argmin(x.clone()), x.argmin(-1))


@pytest.mark.parametrize("centered", [True, False])
def test_the_reducer_tries_shares_of_the_mean_query_with_and_without_centering(centered):
    q, k = draw(2, 3, 20, 4).unbind(0)
    starts = reducer_starts(q, k, centered=centered)
    assert not any(x.any() for x in starts[0])
    assert len(starts) == (7 if centered else 4)
    for a, q_center, k_center in starts[1:]:
        share = (a / q.mean(1)).mean()
        torch.testing.assert_close(a, share * q.mean(1))
        assert 0 < share <= 1
        for center, x in ((q_center, q), (k_center, k)):
            assert not center.any() or torch.equal(center, x.mean(1))


def test_centroids_of_separated_clusters_are_their_means():
    centers = 20 * draw(2, 5, 3, seed=1)
    x = torch.cat([centers + 0.1 * draw(2, 5, 3, seed=seed) for seed in range(2, 22)], 1)  # token t in cluster t % 5
    found = kmeans(x, 5, seed=0)
    means = torch.stack([x[:, c::5].mean(1) for c in range(5)], 1)
    nearest = torch.cdist(means, found).argmin(-1)
    assert all(sorted(row) == list(range(5)) for row in nearest.tolist())
    torch.testing.assert_close(found.gather(1, nearest[..., None].expand(-1, -1, 3)), means)


def test_centroids_are_deterministic_and_take_any_number_of_tokens():
    x = draw(2, 50, 3)
    torch.manual_seed(3)
    assert torch.equal(kmeans(x, 8, seed=1), kmeans(x.clone(), 8, seed=1))
    assert not torch.equal(kmeans(x, 8, seed=1), kmeans(x, 8, seed=2))
    assert kmeans(x.half(), 8, seed=1).dtype == torch.float32
    few = kmeans(x[:, :3], 8, seed=0)
    assert few.shape == (2, 8, 3)
    assert torch.cdist(x[:, :3], few).amin(-1).max() < 1e-3  # every token has a centroid on it
    many = draw(1, 9000, 2)
    assert kmeans(many, 4, seed=0).isfinite().all()
    assert kmeans(0 * x, 4, seed=0).eq(0).all()


def slow_kmeans(x, k, seed, rounds=10):
    """The same by one formula a step, each in memory of its own."""
    draws = torch.rand(k, x.shape[0], 1, generator=torch.Generator().manual_seed(seed))
    squared, centroids = torch.ones(x.shape[:2]), []
    for draw in draws:
        reached = squared.cumsum(-1)
        index = torch.searchsorted(reached, draw * reached[:, -1:]).clamp(max=x.shape[1] - 1)
        centroids.append(x.gather(1, index[..., None].expand(-1, -1, x.shape[2])))
        squared = torch.stack([(x - c).square().sum(-1) for c in centroids]).amin(0)
    centroids = torch.cat(centroids, 1)
    for _ in range(rounds):
        label = torch.cdist(x, centroids).argmin(-1)
        for head in range(x.shape[0]):
            for c in set(label[head].tolist()):
                centroids[head, c] = x[head, label[head] == c].mean(0)
    return centroids


@pytest.mark.parametrize(("tokens", "k"), [(600, 64), (37, 5), (5, 8)])
def test_centroids_are_those_of_the_slow_formula(tokens, k):
    x = draw(3, tokens, 16)
    torch.testing.assert_close(kmeans(x, k, seed=3), slow_kmeans(x, k, seed=3))


def test_principal_maps_keep_products_and_order_coordinates():
    mixing = draw(2, 6, 6, seed=2, dtype=torch.float64)
    q, k = draw(2, 2, 400, 6, dtype=torch.float64).unbind(0)
    q, k = q @ mixing, k @ mixing.mT
    p, r = principal_maps(q, k)
    torch.testing.assert_close((q @ p.mT) @ (k @ r.mT).mT, q @ k.mT)
    moments = [x.mT @ x / 400 for x in (q @ p.mT, k @ r.mT)]
    for moment in moments:  # diagonal, falling, the same on both sides, up to the ridge
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(moment, torch.diag_embed(diagonal), atol=0.02 * diagonal.max().item(), rtol=0)
        assert (diagonal.diff(dim=-1) < 0.02 * diagonal.amax(-1, keepdim=True)).all()
    torch.testing.assert_close(*moments, atol=0.02 * moments[0].max().item(), rtol=0)


def test_two_principal_coordinates_beat_any_two_of_the_given_ones():
    q, k = draw(2, 1, 500, 6, dtype=torch.float64).unbind(0)
    q = q * torch.tensor([1, 1, 3, 1, 1, 4.0])
    k = k @ torch.linalg.qr(draw(6, 6, seed=5, dtype=torch.float64))[0]
    p, r = principal_maps(q, k)
    exact = q @ k.mT
    best = (exact - (q @ p[:, :2].mT) @ (k @ r[:, :2].mT).mT).norm()
    for i in range(6):
        for j in range(i):
            assert best < (exact - q[..., [i, j]] @ k[..., [i, j]].mT).norm()


def test_balancing_maps_keep_products():
    q, k = draw(2, 2, 100, 4, dtype=torch.float64).unbind(0)
    m, m_inverse = balancing_maps(q * 5, k)
    torch.testing.assert_close((5 * q @ m) @ (k @ m_inverse).mT, 5 * q @ k.mT)


def test_share_of_denominators_that_are_not_positive():
    q = torch.ones(1, 1, 4, 1)
    k = torch.tensor([1.0, -3.0, 1.0, 2.0])[None, None, :, None]
    assert nonpositive_share([(q, k, None)], is_causal=False) == 0.0  # 1 - 3 + 1 + 2 > 0
    assert nonpositive_share([(q, k, None)], is_causal=True) == 0.5  # 1, -2, -1, 1
    light = torch.tensor([[[0.0, -300.0, 0.0, 0.0]]])
    assert nonpositive_share([(q, k, light)], is_causal=True) == 0.0
    assert nonpositive_share([(q, k, None), (-q, k, None)], is_causal=False) == 0.5


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_features_are_the_series(order):
    q, k = draw(2, 3, 7, 5, dtype=torch.float64).unbind(0)
    u = q @ k.mT
    expected = 1 + u if order == 1 else 1 + u + u * u / 2
    features = [taylor_features(x, order)[0] for x in (q, k)]
    torch.testing.assert_close(features[0] @ features[1].mT, expected)
    assert features[0].shape[-1] == (6 if order == 1 else 21)
    assert taylor_features(q.half(), order)[0].dtype == torch.float32


def test_weights_by_the_mean_logit_add_to_a_log_scale():
    k, a = draw(2, 3, 7, 5), draw(3, 5, seed=1)
    expected = 0.5 * torch.einsum("hd,bhtd->bht", a, k)
    phi = k.relu()
    features, weight = weighted_by_mean_logit((phi, None), k, a, 0.5)
    assert features is phi
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(weighted_by_mean_logit((phi, expected), k, a, 0.5)[1], 2 * expected)
