"""Kernel Linformer against its formula written densely here in float64, its limit, starts and options."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.kernel_linformer import KernelLinformerAttention, KernelLinformerConfig
from hf_linear_attn.variants.linear import LinearAttention, LinearConfig
from tests.variants.kernels import errors_before_and_after_calibration

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


KERNELS = ("rbf", "laplace")


def random_features(module, x):
    """exp(omega x - |x|^2), and of Laplace's kernel, a mixture, exp(omega x - |x / width|^2), written out."""
    width = getattr(module, "width", torch.ones(()).double())
    return (module.omega * x[..., None, :] - (x[..., None, :] / width) ** 2).sum(-1).exp()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_compares_queries_with_projected_keys(kernel, normalize):
    options = {"feature_map": kernel, "normalize": normalize, "num_features": 40, "bandwidth": 2.0, "k": 6}
    module = build(sharing="none", **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    q, k, v = draw(2, 24)
    keys, values = module.key_projection @ k, module.value_projection @ v
    compared = [F.normalize(x, dim=-1) if normalize else x * DIM**-0.25 for x in (q, keys)]
    phi_q, phi_k = (random_features(module, x / 2) for x in compared)
    scores = phi_q @ phi_k.mT
    torch.testing.assert_close(attend(module, q, k, v), scores @ values / scores.sum(-1, keepdim=True))


def test_many_features_give_the_kernel_itself():
    module = build(k=6, projection="mean_pool", feature_map="rbf", num_features=20_000)
    q, k, v = draw(2, 24)
    q, k = q / 2, k / 2
    keys, values = (x.unflatten(2, (6, 4)).mean(3) for x in (k, v))  # segments of 4 of 24 tokens
    scores = (-0.5 * torch.cdist(q * DIM**-0.25, keys * DIM**-0.25).square()).exp()
    expected = scores @ values / scores.sum(-1, keepdim=True)
    uniform = values.mean(2, keepdim=True)
    assert (attend(module, q, k, v) - expected).norm() < 0.1 * (uniform - expected).norm()


@pytest.mark.parametrize("side", ["none", "left", "holes"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_without_projection_a_kernel_is_that_of_linear(kernel, side):
    """E = I, and the calibrated tensors moved to those of the other class."""
    options = {"feature_map": kernel, "num_features": 32}
    module = build(k=20, projection="mean_pool", **options)
    other = LinearAttention(LinearConfig.from_dict(options), module.context).double()
    a, c, _ = (0.3 * x[0, :, 0] for x in draw(1, 1, seed=3))
    module.query_mean.copy_(a)
    module.key_mean.copy_(c)
    module.sharpness.copy_(1 / torch.tensor([0.7, 1.0, 3.0]))
    tensors = {"query_mean": a, "query_center": a, "key_center": c, "bandwidth": 1 / module.sharpness}
    state = {**tensors, **{name: x for name, x in module.state_dict().items() if name in ("omega", "width")}}
    other.load_state_dict(state)
    q, k, v = draw(1, 20)
    place = torch.arange(20)
    real = {"none": place >= 0, "left": place >= 13, "holes": place % 3 != 1}[side]
    got, expected = (attend(x, q, k, v, real[None])[:, :, real] for x in (module, other))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reducer", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_calibration_chooses_the_sharpness_of_a_kernel(kernel, reducer):
    module = build(k=8, max_length=120, feature_map=kernel, variance_reducer=reducer)
    before, after = errors_before_and_after_calibration(module.float())
    assert (after <= before + 1e-6).all()
    assert (after < before).any()
    assert not torch.equal(module.sharpness, torch.ones(HEADS))


def test_a_kernel_draws_its_directions_from_the_seed_and_the_layer():
    options = {"feature_map": "laplace", "num_features": 16}
    module = build(**options)
    assert set(module.state_dict()) >= {"omega", "width", "sharpness"}
    assert torch.equal(build(**options).omega, module.omega)
    assert not torch.equal(build(**options, layer_idx=1).omega, module.omega)
    projection = module.key_projection.clone()
    module.redraw(3)
    assert torch.equal(module.omega, build(**options, seed=3).omega)
    assert torch.equal(module.key_projection, projection)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bandwidth": 2.0}, "bandwidth=2.0; allowed with feature_map='elu': 1.0"),
        ({"normalize": True}, "normalize=True; allowed with feature_map='elu': False"),
        ({"feature_map": "rbf", "bandwidth": 0}, "bandwidth=0; allowed: a number from 0.001"),
        ({"feature_map": "rbf", "num_features": 0}, "num_features=0; allowed: an integer of at least 1"),
        ({"feature_map": "gauss"}, "feature_map='gauss'; allowed: .*laplace, rbf"),
        ({"feature_map": "rbf", "random_features": "fourier"}, "Unknown option.*'random_features'"),
    ],
)
def test_bad_options_of_a_kernel_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        build(**options)
