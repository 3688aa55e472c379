"""`linear` against its dense float64 formula, and its calibrated start."""

import warnings

import pytest
import torch

from hf_linear_attn.registry import get_variant
from hf_linear_attn.testing import Subject, applicable_laws
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.linear import LinearAttention, LinearConfig

PHI = {
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "exp": torch.exp,
    "relu": torch.relu,
    "softmax": lambda x: torch.softmax(x, -1),
    "squared_relu": lambda x: torch.relu(x) ** 2,
}


def build(causal=False, *, heads=3, dim=8, layer_idx=0, **options):
    return LinearAttention(LinearConfig(**options), LayerContext(layer_idx, 6, heads * dim, heads, dim, 512, causal))


def draw(length, *, batch=2, heads=3, dim=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, dim, generator=g, dtype=dtype).unbind(0)


def attend(module, q, k, v, padding=None, causal=False, scaling=0.3):
    return module(AttentionInputs(q, k, v, padding, causal, scaling))[0]


def skewed(length=200, dim=8):
    """Queries with a common part, as checkpoints have: the case for the variance reducer."""
    q, k, v = draw(length, batch=3, dim=dim, dtype=torch.float32)
    q = 0.3 * q
    q[:, 0] += 2.0 * torch.linspace(-1, 1, dim)
    return q, k, v


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("feature_map", sorted(PHI))
def test_is_the_dense_formula(feature_map, causal):
    for length in (1, 7, 36, 65, 130):
        q, k, v = draw(length)
        module = build(causal, feature_map=feature_map).double()
        scores = PHI[feature_map](q * 0.3**0.5) @ PHI[feature_map](k * 0.3**0.5).mT
        scores = scores.tril() if causal else scores
        total = scores.sum(-1, keepdim=True)
        expected = torch.where(total == 0, 0.0, scores @ v / total)
        torch.testing.assert_close(attend(module, q, k, v, causal=causal), expected)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_the_variance_reducer_weights_keys_by_their_mean_logit(causal):
    q, k, v = draw(70)
    module = build(causal).double()
    module.query_mean.normal_()
    scores = PHI["elu"](q * 0.3**0.5) @ PHI["elu"](k * 0.3**0.5).mT
    scores = scores * (0.3 * torch.einsum("hd,bhtd->bht", module.query_mean, k)).exp()[:, :, None]
    scores = scores.tril() if causal else scores
    torch.testing.assert_close(attend(module, q, k, v, causal=causal), scores @ v / scores.sum(-1, keepdim=True))


def test_uncalibrated_is_the_published_form():
    q, k, v = draw(50)
    torch.testing.assert_close(
        attend(build().double(), q, k, v), attend(build(variance_reducer=False).double(), q, k, v)
    )


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_calibration_is_never_worse_in_any_head(causal):
    q, k, v = skewed()
    padding = torch.ones(3, 200, dtype=torch.bool)
    padding[0, 150:] = False
    padding[1, :30] = False
    poisoned = [x.masked_fill(~padding[:, None, :, None], 1e9) for x in (q, k, v)]
    module = build(causal)
    mask = padding[:, None, None, :] & (torch.ones(200, 200).tril().bool() if causal else True)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)

    def errors():
        difference = (attend(module, q, k, v, padding, causal) - exact) * padding[:, None, :, None]
        return difference.square().sum((0, 2, 3))

    before = errors()
    module.calibrate([AttentionInputs(*poisoned, padding, causal, 0.3)])
    after = errors()
    assert module.query_mean.isfinite().all()
    assert (after <= before * 1.0001).all()
    assert after[0] < 0.8 * before[0]  # the head with a common query gains
    assert module.query_mean[0].any()


def test_calibration_keeps_the_published_form_where_the_reducer_hurts():
    q, k, v = draw(64, dtype=torch.float32)
    module = build()
    module.calibrate([AttentionInputs(0 * q, k, v, None, False, 0.3)])
    assert not module.query_mean.any()


KERNELS = {
    "laplace": lambda x, y: torch.exp(-torch.cdist(x, y, p=1)),
    "rbf": lambda x, y: torch.exp(-torch.cdist(x, y).square() / 2),
}


def trained_kernel(feature_map, causal=False, **options):
    """A layer whose buffers all are what a calibration may choose."""
    module = build(causal, feature_map=feature_map, **options).double()
    generator = torch.Generator().manual_seed(1)
    for name, x in module.named_buffers():
        if name not in ("omega", "width"):
            x.copy_(0.5 + torch.rand(x.shape, generator=generator, dtype=x.dtype))
    return module


def dense_features(module, x, center, scaling):
    """The formula of the docstring, token by token, without any shift of exponents."""
    x = x - center[:, None]
    x = x / x.norm(dim=-1, keepdim=True) if module.config.normalize else x * scaling**0.5
    x = (x / module.bandwidth[:, None, None])[..., None, :]  # [B, H, T, 1, D]
    if module.config.random_features == "fourier":
        angle = (module.omega * x).sum(-1)
        return torch.cat([angle.cos(), angle.sin()], -1)
    width = 1.0 if module.config.feature_map == "rbf" else module.width
    return (module.omega * x - (x / width) ** 2).sum(-1).exp()


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("random_features", ["positive", "fourier"])
@pytest.mark.parametrize("feature_map", sorted(KERNELS))
def test_kernels_are_the_dense_formula(feature_map, random_features, normalize, causal):
    module = trained_kernel(feature_map, causal, random_features=random_features, normalize=normalize)
    for length in (1, 36, 70):
        q, k, v = (0.5 * x for x in draw(length))
        scores = (
            dense_features(module, q, module.query_center, 0.3) @ dense_features(module, k, module.key_center, 0.3).mT
        )
        scores = scores * (0.3 * torch.einsum("hd,bhtd->bht", module.query_mean, k)).exp()[:, :, None]
        scores = scores.tril() if causal else scores
        expected = scores @ v / scores.sum(-1, keepdim=True)
        torch.testing.assert_close(attend(module, q, k, v, causal=causal), expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("random_features", ["positive", "fourier"])
@pytest.mark.parametrize("feature_map", sorted(KERNELS))
def test_kernel_attention_tends_to_its_kernel(feature_map, random_features):
    q, k, v = (0.3 * x for x in draw(20, dim=2))
    q, k = q.abs(), -k.abs()  # elsewhere the variance of positive Laplace features has no bound
    options = {"random_features": random_features, "bandwidth": 0.5}
    module = build(feature_map=feature_map, num_features=20_000, dim=2, **options).double()
    kernel = KERNELS[feature_map](q * 0.3**0.5 / 0.5, k * 0.3**0.5 / 0.5)
    expected = kernel @ v / kernel.sum(-1, keepdim=True)
    torch.testing.assert_close(attend(module, q, k, v), expected, atol=0.015, rtol=0.05)


def test_frequencies_are_seeded_and_per_layer():
    for feature_map, quartile in (("laplace", 1.0), ("rbf", 0.6745)):  # of the Cauchy and the normal distribution
        options = {"feature_map": feature_map, "num_features": 4000}
        module = build(**options)
        omega = module.omega.flatten()
        assert omega.median().abs() < 0.03
        assert omega.abs().median().item() == pytest.approx(quartile, abs=0.05)
        torch.manual_seed(5)
        assert torch.equal(build(**options).omega, module.omega)
        assert not torch.equal(build(**options, seed=1).omega, module.omega)
        assert not torch.equal(build(**options, layer_idx=1).omega, module.omega)
        assert "omega" in module.state_dict()


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("feature_map", sorted(KERNELS))
def test_positive_features_give_means_of_values_at_the_norms_of_checkpoints(feature_map, causal):
    """Kernels of far tokens are 0 for all purposes; the error of Fourier features is not, and has either sign."""
    q, k, v = draw(200, dim=32, dtype=torch.float32)
    largest = v.abs().amax().item()
    positive = attend(build(causal, dim=32, feature_map=feature_map).float(), 3 * q, 3 * k, v, causal=causal)
    assert positive.abs().amax().item() <= 1.001 * largest
    fourier = build(causal, dim=32, feature_map=feature_map, random_features="fourier").float()
    assert attend(fourier, 3 * q, 3 * k, v, causal=causal).abs().amax().item() > 3 * largest


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("feature_map", sorted(KERNELS))
def test_a_calibrated_bandwidth_is_never_worse_in_any_head(feature_map, normalize, causal):
    q, k, v = (2 * x for x in skewed(dim=16))
    module = build(causal, dim=16, feature_map=feature_map, normalize=normalize).float()
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)

    def errors():
        return (attend(module, q, k, v, causal=causal) - exact).square().sum((0, 2, 3))

    before = errors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # positive features have nothing to warn of
        module.calibrate([AttentionInputs(q, k, v, None, causal, 0.3)])
    after = errors()
    assert (after <= before * 1.0001).all()
    assert after.sum() < 0.8 * before.sum()
    assert all(x.isfinite().all() for x in module.buffers())
    assert (module.bandwidth > 0).all()


def test_without_the_reducer_calibration_chooses_the_bandwidth_alone():
    q, k, v = skewed(dim=16)
    module = build(dim=16, feature_map="rbf", variance_reducer=False).float()
    module.calibrate([AttentionInputs(2 * q, 2 * k, v, None, False, 0.3)])
    assert set(module.state_dict()) == {"omega", "bandwidth"}
    assert not torch.equal(module.bandwidth, torch.ones(3))


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_fourier_features_that_err_warn(causal):
    q, k, v = (3 * x for x in draw(100, dim=32, dtype=torch.float32))
    options = {"feature_map": "laplace", "random_features": "fourier", "num_features": 1, "variance_reducer": False}
    module = build(causal, dim=32, layer_idx=4, **options).float()
    with pytest.warns(UserWarning, match=r"linear, layer 4: [\d.]+% of the denominators of feature_map='laplace'"):
        module.calibrate([AttentionInputs(q, k, v, None, causal, 0.3)])


def test_a_huge_later_key_leaks_nothing():
    for options in ({}, {"feature_map": "exp"}):
        module = build(True, **options)
        module.query_mean.normal_()
        q, k, v = draw(100, dtype=torch.float32)
        before = attend(module, q, k, v, causal=True)
        k = k.clone()
        k[:, :, 60] *= 1e3
        after = attend(module, q, k, v, causal=True)
        assert torch.equal(after[:, :, :60], before[:, :, :60])
        assert after.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"feature_map": "gelu"},
            "feature_map='gelu'; allowed: elu, exp, relu, softmax, squared_relu, laplace, rbf. A map of your own",
        ),
        ({"feature_map": "rbf", "bandwidth": 0.0}, "bandwidth=0.0"),
        ({"feature_map": "rbf", "random_features": "trig"}, "random_features='trig'; allowed: positive, fourier"),
        ({"normalize": True}, "normalize=True; allowed with feature_map='elu': False"),
        ({"bandwidth": 2.0}, "bandwidth=2.0; allowed with feature_map='elu': 1.0"),
        ({"num_features": 0}, "num_features=0"),
        ({"seed": -1}, "seed=-1"),
        ({"variance_reducer": 1}, "variance_reducer=1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LinearConfig(**options)


def test_is_registered_for_both_sides():
    spec = get_variant("linear")
    assert spec.encoder
    assert spec.decoder
    assert spec.state == "constant"
    assert LinearConfig.from_dict(LinearConfig(feature_map="relu").to_dict()) == LinearConfig(feature_map="relu")


# Fourier features have denominators of both signs: at the contract's norms they come near 0, where rounding
# the inputs alone changes the output at will. So half precision is tested where the estimate means something.
FOURIER = {"feature_map": "laplace", "random_features": "fourier"}
# Of a bandwidth that was not calibrated, Laplace's exponents (x / n)^2 of keys a hundred times too long are more than
# half precision can hold. (That its features pass of normalized tokens is in the contract's own options.)
RAW = {"feature_map": "laplace", "num_features": 24}
LEFT_OUT = {"half_precision": (FOURIER, RAW), "low_precision": (FOURIER,), "compile_full_graph": (FOURIER,)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "subject"),
    [
        pytest.param(law, subject, id=f"{law.name}-{'decoder' if causal else 'encoder'}-{name}")
        for name, options in (("fourier", FOURIER), ("raw", RAW))
        for causal in (False, True)
        for subject in [Subject(get_variant("linear"), causal, options)]
        for law in applicable_laws(subject)
        # Fourier features are tested below where denominators are positive.
        if options not in LEFT_OUT.get(law.name, ())
    ],
)
def test_contract_with_laplace_features(law, subject):
    law(subject)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fourier_features_in_half_precision(dtype):
    q, k, v = (0.1 * x for x in draw(130, dtype=torch.float32))
    module = build(**FOURIER)
    expected = attend(module, q, k, v)
    with torch.autocast("cpu", dtype=dtype):
        output = attend(module, q.to(dtype), k.to(dtype), v.to(dtype))
    assert output.dtype == dtype
    assert (output - expected).norm() / expected.norm() < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_fourier_features_compile(causal):
    module, results = build(causal, **FOURIER).float(), []
    for forward in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        inputs = [(0.1 * x).requires_grad_() for x in draw(36, dtype=torch.float32)]
        output = attend(forward, *inputs, causal=causal)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
