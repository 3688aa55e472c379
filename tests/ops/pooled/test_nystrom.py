"""Landmarks, the iterated inverse and the convolution, against torch's own and loops."""

import pytest
import torch

from hf_linear_attn.ops.pooled.nystrom import (
    CENTROIDS,
    OWN_QUERIES,
    SEGMENT_MEANS,
    iterative_pinv,
    nystrom_attention,
    rank_convolution,
)

F64 = torch.float64


def test_the_iteration_converges_to_the_inverse():
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    matrix = (logits + 3 * torch.eye(8, dtype=F64)).softmax(-1)
    torch.testing.assert_close(iterative_pinv(matrix, 30), torch.linalg.pinv(matrix), atol=1e-9, rtol=1e-9)
    error = [(iterative_pinv(matrix, n) - matrix.inverse()).norm().item() for n in (2, 6, 10)]
    assert error == sorted(error, reverse=True)


def dense(q, k, v, m, iterations):
    """The paper's formula for a length that m divides, without padding."""
    q_marks, k_marks = (x.unflatten(2, (m, -1)).mean(3) for x in (q, k))
    first, last = (q @ k_marks.mT / 2).softmax(-1), (q_marks @ k.mT / 2).softmax(-1)
    return first @ iterative_pinv((q_marks @ k_marks.mT / 2).softmax(-1), iterations) @ last @ v


def test_is_the_formula_whatever_is_padded():
    q, k, v = torch.randn(3, 1, 2, 24, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    options = {"num_landmarks": 6, "num_iterations": 6, "scaling": 0.5}
    expected = dense(q, k, v, 6, 6)
    torch.testing.assert_close(nystrom_attention(q, k, v, **options), expected)
    mask = torch.ones(1, 33, dtype=torch.bool)
    mask[0, [0, 1, 5, 9, 17, 18, 31, 32, 30]] = False
    padded = [torch.full((1, 2, 33, 4), torch.nan, dtype=F64) for _ in range(3)]
    for x, given in zip(padded, (q, k, v), strict=True):
        x[:, :, mask[0]] = given
    found = nystrom_attention(*padded, token_mask=mask, **options)
    torch.testing.assert_close(found[:, :, mask[0]], expected)


@pytest.mark.parametrize("short", [False, True])
def test_landmarks_of_each_head_are_its_own_whatever_is_padded(short):
    """By loops: a head with means of segments, one with means of its queries, one with given points, among padding."""
    g = torch.Generator().manual_seed(0)
    length, m, scaling = 4 if short else 24, 6, 0.5
    q, k, v = torch.randn(3, 1, 3, length, 4, generator=g, dtype=F64)
    points = torch.randn(3, m, 4, generator=g, dtype=F64)
    rows = []
    for head, form in enumerate((SEGMENT_MEANS, OWN_QUERIES, CENTROIDS)):
        query, key, value = q[0, head], k[0, head], v[0, head]
        if short:
            rows.append((query @ key.T * scaling).softmax(-1) @ value)
            continue
        own = query.unflatten(0, (m, -1)).mean(1)
        q_marks = points[head] if form == CENTROIDS else own
        k_marks = key.unflatten(0, (m, -1)).mean(1) if form == SEGMENT_MEANS else q_marks
        size = 0 if form == SEGMENT_MEANS else k_marks.square().sum(-1) / 2
        near, core = (((x @ k_marks.T - size) * scaling).softmax(-1) for x in (query, q_marks))
        rows.append(near @ iterative_pinv(core, 6) @ (q_marks @ key.T * scaling).softmax(-1) @ value)
    real = torch.rand(length + 12, generator=g).argsort() < length
    mask = torch.stack([real, torch.ones_like(real)])  # a row that is long beside it
    padded = [torch.full((2, 3, len(real), 4), torch.nan, dtype=F64) for _ in range(3)]
    for x, given in zip(padded, (q, k, v), strict=True):
        x[1] = torch.randn(3, len(real), 4, generator=g, dtype=F64)
        x[0][:, real] = given[0]
    forms = {"form": torch.tensor([SEGMENT_MEANS, OWN_QUERIES, CENTROIDS]), "centroids": points}
    options = {"num_landmarks": m, "num_iterations": 6, "scaling": scaling, **forms}
    found = nystrom_attention(*padded, token_mask=mask, **options)
    torch.testing.assert_close(found[0][:, real], torch.stack(rows))
    torch.testing.assert_close(nystrom_attention(q, k, v, **options)[0], torch.stack(rows))


@pytest.mark.parametrize("length", [3, 6])
def test_short_rows_are_exact(length):
    q, k, v = torch.randn(3, 2, 2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    mask = torch.arange(9) < torch.tensor([[length], [9]])
    found = nystrom_attention(q, k, v, num_landmarks=6, num_iterations=6, scaling=0.5, token_mask=mask)
    part = [x[:1, :, :length] for x in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(*part, scale=0.5)
    torch.testing.assert_close(found[:1, :, :length], exact)


def test_more_queries_than_keys_are_refused():
    x = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="got Tq=4 and Tk=3"):
        nystrom_attention(x, x[:, :, :3], x[:, :, :3], num_landmarks=2, num_iterations=6, scaling=1.0)


@pytest.mark.parametrize("padded", [False, True])
def test_convolution_runs_along_real_tokens(padded):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 10, 4, generator=g, dtype=F64), torch.randn(3, 5, generator=g, dtype=F64)
    mask = torch.rand(2, 10, generator=g) < 0.7 if padded else torch.ones(2, 10, dtype=torch.bool)
    found = rank_convolution(x, weight, mask if padded else None)
    expected = torch.zeros_like(x)
    for b in range(2):
        places = mask[b].nonzero()[:, 0].tolist()
        for i, place in enumerate(places):
            for tap in range(5):
                if 0 <= i + tap - 2 < len(places):
                    expected[b, :, place] += weight[:, tap, None] * x[b, :, places[i + tap - 2]]
    torch.testing.assert_close(found, expected)
