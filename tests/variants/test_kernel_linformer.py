"""Kernel Linformer against its formula written densely here in float64, its limit, starts and options."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.kernel_linformer import KernelLinformerAttention, KernelLinformerConfig

HEADS, DIM = 3, 8

FORMULAS = {
    "elu": lambda x: F.elu(x) + 1,
    "exp": torch.exp,
    "relu": F.relu,
    "softmax": lambda x: x.softmax(-1),
    "squared_relu": lambda x: F.relu(x) ** 2,
}


def build(max_length=24, layer_idx=0, **options):
    context = LayerContext(layer_idx, 2, HEADS * DIM, HEADS, DIM, max_length, is_causal=False)
    return KernelLinformerAttention(KernelLinformerConfig.from_dict(options), context).double()


def draw(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, length, DIM, generator=generator, dtype=torch.float64) for _ in range(3)]


def attend(module, q, k, v, padding=None):
    with torch.no_grad():
        return module(AttentionInputs(q, k, v, token_mask=padding, scaling=DIM**-0.5))[0]


def kernel_attention(phi, q, k, v, weight=1.0):
    scores = phi(q * DIM**-0.25) @ phi(k * DIM**-0.25).mT * weight
    return scores @ v / scores.sum(-1, keepdim=True).clamp(min=1e-30)


@pytest.mark.parametrize("feature_map", FORMULAS)
@pytest.mark.parametrize("sharing", ["none", "key_value"])
def test_is_kernel_attention_over_projected_keys(feature_map, sharing):
    module = build(k=6, feature_map=feature_map, sharing=sharing)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    q, k, v = draw(2, 24)
    E = module.key_projection
    F_ = E if sharing == "key_value" else module.value_projection
    keys, values = E @ k, F_ @ v
    torch.testing.assert_close(attend(module, q, k, v), kernel_attention(FORMULAS[feature_map], q, keys, values))


@pytest.mark.parametrize("feature_map", FORMULAS)
@pytest.mark.parametrize("side", ["none", "left", "holes"])
def test_without_projection_it_is_the_kernel_form(feature_map, side):
    """E = I; empty slots count for nothing, though phi(0) is 1."""
    q, k, v = draw(1, 20)
    place = torch.arange(20)
    real = {"none": place >= 0, "left": place >= 13, "holes": place % 3 != 1}[side]
    module = build(k=20, feature_map=feature_map, projection="mean_pool")
    output = attend(module, q, k, v, real[None])[:, :, real]
    expected = kernel_attention(FORMULAS[feature_map], *(x[:, :, real] for x in (q, k, v)))
    torch.testing.assert_close(output, expected)


def test_as_many_queries_as_slots_are_no_slots():
    """A row whose tokens fill few of k = T slots keeps all of its queries."""
    q, k, v = draw(2, 12)
    real = torch.arange(12) < torch.tensor([12, 5])[:, None]
    output = attend(build(k=12, projection="mean_pool"), q, k, v, real)
    alone = attend(build(k=12, projection="mean_pool"), *(x[1:, :, :5] for x in (q, k, v)))
    torch.testing.assert_close(output[1:, :, :5], alone)


def test_calibrated_buffers_are_the_documented_formula():
    module = build(k=6, projection="mean_pool", feature_map="exp")
    a, c, _ = (x[0, :, 0] for x in draw(1, 1, seed=3))
    module.query_mean.copy_(a)
    module.key_mean.copy_(c)
    module.sharpness.fill_(2.0)
    q, k, v = draw(2, 18)
    keys, values = (x.unflatten(2, (6, 3)).mean(3) for x in (k, v))
    weight = (keys @ a[:, :, None] * DIM**-0.5).exp().mT
    expected = kernel_attention(torch.exp, 2 * (q - a[:, None]), 2 * (keys - c[:, None]), values, weight)
    torch.testing.assert_close(attend(module, q, k, v), expected)


def test_calibration_lowers_the_error_where_queries_share_a_direction():
    def text(seed):
        q, k, v = (x.float() for x in draw(2, 24, seed))
        return AttentionInputs(q + 3, k, v, scaling=DIM**-0.5)

    errors = []
    for calibration in ([], [text(1)]):
        module = build(k=24).float()
        if calibration:
            module.calibrate(calibration)
            assert (module.sharpness >= 1).all()
            assert module.query_mean.any()
        held_out = text(2)
        exact = F.scaled_dot_product_attention(held_out.query, held_out.key, held_out.value)
        errors.append((module(held_out)[0] - exact).norm() / exact.norm())
    assert errors[1] < 0.8 * errors[0]
    module.reset_parameters()
    assert not module.query_mean.any()
    assert (module.sharpness == 1).all()


def test_layerwise_sharing_names_its_one_matrix():
    module = build(k=6, sharing="layerwise")
    assert module.shared_parameters() == ("key_projection",) == tuple(dict(module.named_parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"feature_map": "cosine"}, "feature_map='cosine'; allowed: elu, exp, relu, softmax, squared_relu"),
        ({"variance_reducer": 1}, "variance_reducer=1"),
        ({"projection": "fft"}, "linear, mean_pool, max_pool, conv"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        KernelLinformerConfig(**options)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match=r"at most 24 tokens and got 25.*max_length=25"):
        attend(build(k=6), *draw(1, 25))
    with pytest.raises(ValueError, match="3 entries for 2 layers"):
        build(24, k=[6, 3, 2])
    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, 24, is_causal=True)
    with pytest.raises(ValueError, match="'linear'"):
        KernelLinformerAttention(KernelLinformerConfig(), context)
