"""Nystromformer against its formula written densely here in float64, its starts and its options."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.ops.pooled.nystrom import CENTROIDS, OWN_QUERIES, SEGMENT_MEANS, iterative_pinv
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.nystromformer import NystromformerAttention, NystromformerConfig

HEADS, DIM = 3, 8


def build(**options):
    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, 64, is_causal=False)
    return NystromformerAttention(NystromformerConfig.from_dict(options), context).double()


def draw(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, length, DIM, generator=generator, dtype=torch.float64) for _ in range(3)]


def attend(module, q, k, v, padding=None):
    with torch.no_grad():
        return module(AttentionInputs(q, k, v, token_mask=padding, scaling=DIM**-0.5))[0]


def segment_means(x, m):
    """Token of rank r belongs to segment r m // n; one row without padding."""
    n = x.shape[2]
    return torch.stack([x[:, :, [r for r in range(n) if r * m // n == j]].mean(2) for j in range(m)], 2)


def pinv_six(a):
    identity = torch.eye(a.shape[-1], dtype=a.dtype)
    z = a.mT / a.sum(-2).amax(-1)[..., None, None]  # the rows of a softmax sum to 1
    for _ in range(6):
        az = a @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


def formula(q, k, v, m):
    q_marks, k_marks = segment_means(q, m), segment_means(k, m)
    left, middle, right = (
        torch.softmax(x @ y.mT / math.sqrt(DIM), -1) for x, y in ((q, k_marks), (q_marks, k_marks), (q_marks, k))
    )
    return left @ pinv_six(middle) @ right @ v


@pytest.mark.parametrize("length", [7, 23, 60])
def test_is_the_formula_of_the_paper(length):
    q, k, v = draw(2, length)
    torch.testing.assert_close(attend(build(num_landmarks=6), q, k, v), formula(q, k, v, 6))


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_segments_are_of_real_tokens(side):
    place = torch.arange(40)
    real = {"left": place >= 11, "right": place < 29, "holes": place % 3 != 1}[side]
    q, k, v = draw(1, 40)
    output = attend(build(num_landmarks=6), q, k, v, real[None])
    expected = formula(*(x[:, :, real] for x in (q, k, v)), 6)
    torch.testing.assert_close(output[:, :, real], expected)


def test_short_rows_are_exact_beside_long_ones():
    q, k, v = draw(3, 40)
    real = torch.arange(40) >= torch.tensor([0, 30, 35])[:, None]  # 40, 10 and 5 tokens
    output = attend(build(num_landmarks=10), q, k, v, real)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
    torch.testing.assert_close(output[1, :, 30:], exact[1, :, 30:])
    torch.testing.assert_close(output[2, :, 35:], exact[2, :, 35:])
    torch.testing.assert_close(output[:1], formula(q[:1], k[:1], v[:1], 10))


def test_six_iterations_alone_are_not_softmax():
    """What the exact branch is for: m = n through the iteration is far off."""
    q, k, v = draw(1, 24)
    q = 3 * q
    exact = F.scaled_dot_product_attention(q, k, v)
    assert (formula(q, k, v, 24) - exact).norm() > 0.01 * exact.norm()
    torch.testing.assert_close(attend(build(num_landmarks=24), q, k, v), exact)


def test_convolution_runs_over_the_ranks_of_real_tokens():
    q, k, v = draw(1, 30)
    real = torch.arange(30) % 4 != 2
    module = build(num_landmarks=6, conv_kernel_size=5)
    torch.testing.assert_close(
        attend(module, q, k, v, real[None])[:, :, real], formula(*(x[:, :, real] for x in (q, k, v)), 6)
    )
    with torch.no_grad():
        module.conv_weight.normal_(generator=torch.Generator().manual_seed(1))
    values = F.pad(v[:, :, real], (0, 0, 2, 2))
    n = int(real.sum())
    extra = sum(module.conv_weight[None, :, t, None, None] * values[:, :, t : t + n] for t in range(5))
    output = attend(module, q, k, v, real[None])[:, :, real]
    torch.testing.assert_close(output, formula(*(x[:, :, real] for x in (q, k, v)), 6) + extra)


@pytest.mark.parametrize("form", [OWN_QUERIES, CENTROIDS])
def test_landmarks_among_queries_are_their_formula(form):
    q, k, v = draw(2, 33)
    module = build(num_landmarks=6)
    module.form.fill_(form)
    module.centroids.copy_(draw(1, 6, seed=5)[0][0])
    marks = segment_means(q, 6) if form == OWN_QUERIES else module.centroids.expand(2, -1, -1, -1)

    def kernel(x):
        return torch.softmax((x @ marks.mT - marks.square().sum(-1)[:, :, None] / 2) / math.sqrt(DIM), -1)

    exact_at_marks = torch.softmax(marks @ k.mT / math.sqrt(DIM), -1) @ v
    torch.testing.assert_close(attend(module, q, k, v), kernel(q) @ pinv_six(kernel(marks)) @ exact_at_marks)


def test_calibration_keeps_the_best_landmarks_of_each_head():
    generator = torch.Generator().manual_seed(3)
    topics = 2 * torch.randn(HEADS, 5, DIM, generator=generator, dtype=torch.float64)

    def text(seed):  # queries in five clusters, shuffled: segments mix them, centroids do not
        q, k, v = draw(1, 64, seed)
        topic = torch.randint(5, (64,), generator=torch.Generator().manual_seed(seed))
        return AttentionInputs((0.1 * q + topics[None, :, topic]).float(), k.float(), v.float(), scaling=DIM**-0.5)

    module, published = build(num_landmarks=8).float(), build(num_landmarks=8).float()
    module.calibrate([text(1), text(2)])
    assert module.form.tolist() == [CENTROIDS] * HEADS
    held_out = text(3)
    exact = F.scaled_dot_product_attention(held_out.query, held_out.key, held_out.value)
    errors = [(m(held_out)[0] - exact).norm() / exact.norm() for m in (module, published)]
    assert errors[0] < 0.7 * errors[1]
    module.reset_parameters()
    assert module.form.tolist() == [SEGMENT_MEANS] * HEADS


def test_rows_that_are_exact_anyway_leave_the_published_form():
    module = build(num_landmarks=32)
    q, k, v = draw(1, 20)
    module.calibrate([AttentionInputs(q, k, v, scaling=DIM**-0.5)])
    assert module.form.tolist() == [SEGMENT_MEANS] * HEADS


def test_pinv_converges_and_each_matrix_has_its_own_scale():
    matrices = torch.softmax(draw(1, 8)[0][0], -1)  # [H, 8, 8]
    alone = torch.cat([iterative_pinv(x[None], 6) for x in matrices])
    torch.testing.assert_close(iterative_pinv(matrices, 6), alone, rtol=0, atol=0)
    torch.testing.assert_close(iterative_pinv(matrices, 25), torch.linalg.pinv(matrices))
    assert iterative_pinv(matrices.bfloat16(), 6).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_landmarks": 0}, "num_landmarks=0"),
        ({"num_iterations": True}, "num_iterations=True"),
        ({"seed": -1}, "seed=-1"),
        ({"conv_kernel_size": 4}, "conv_kernel_size=4; allowed: an odd integer"),
        ({"conv_kernel_size": 0}, "conv_kernel_size=0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NystromformerConfig(**options)


def test_decoders_are_refused_with_the_nearest_method():
    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, 24, is_causal=True)
    with pytest.raises(ValueError, match="'long_short'"):
        NystromformerAttention(NystromformerConfig(), context)
    q, k, v = draw(1, 8)
    with pytest.raises(ValueError, match="'performer'"):
        build()(AttentionInputs(q, k, v, is_causal=True))
