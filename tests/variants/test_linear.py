"""`linear` against its dense float64 formula, and its calibrated start."""

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


def test_laplace_frequencies_are_cauchy_seeded_and_per_layer():
    module = build(feature_map="laplace", num_features=4000)
    omega = module.omega.flatten()
    assert omega.median().abs() < 0.03
    assert omega.abs().median().item() == pytest.approx(1.0, abs=0.05)  # quartiles of the Cauchy distribution
    torch.manual_seed(5)
    assert torch.equal(build(feature_map="laplace", num_features=4000).omega, module.omega)
    assert not torch.equal(build(feature_map="laplace", num_features=4000, seed=1).omega, module.omega)
    assert not torch.equal(build(feature_map="laplace", num_features=4000, layer_idx=1).omega, module.omega)
    assert "omega" in module.state_dict()


def test_laplace_attention_tends_to_its_kernel():
    q, k, v = (0.3 * x for x in draw(20, dim=4))
    module = build(feature_map="laplace", num_features=20_000, dim=4).double()
    kernel = torch.exp(-torch.cdist(q, k, p=1) * 0.3**0.5)
    expected = kernel @ v / kernel.sum(-1, keepdim=True)
    torch.testing.assert_close(attend(module, q, k, v), expected, atol=0.01, rtol=0.05)


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
            "feature_map='gelu'; allowed: elu, exp, relu, softmax, squared_relu, laplace",
        ),
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


# Laplace features have denominators of both signs: at the contract's norms they come near 0, where rounding
# the inputs alone changes the output at will. So half precision is tested where the estimate means something.
LAPLACE = [Subject(get_variant("linear"), causal, {"feature_map": "laplace"}) for causal in (False, True)]


@pytest.mark.parametrize(
    ("law", "subject"),
    [
        pytest.param(law, subject, id=f"{law.name}-{'decoder' if subject.is_causal else 'encoder'}")
        for subject in LAPLACE
        for law in applicable_laws(subject)
        # Tested below where denominators are positive.
        if law.name not in ("low_precision", "half_precision", "compile_full_graph")
    ],
)
def test_contract_with_laplace_features(law, subject):
    law(subject)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_laplace_features_in_half_precision(dtype):
    q, k, v = (0.1 * x for x in draw(130, dtype=torch.float32))
    module = build(feature_map="laplace")
    expected = attend(module, q, k, v)
    with torch.autocast("cpu", dtype=dtype):
        output = attend(module, q.to(dtype), k.to(dtype), v.to(dtype))
    assert output.dtype == dtype
    assert (output - expected).norm() / expected.norm() < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_laplace_features_compile(causal):
    module, results = build(causal, feature_map="laplace").float(), []
    for forward in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        inputs = [(0.1 * x).requires_grad_() for x in draw(36, dtype=torch.float32)]
        output = attend(forward, *inputs, causal=causal)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
