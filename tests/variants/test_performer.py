"""`performer` against dense float64 formulas of its features, softmax attention, and the theory of FAVOR+."""

import math
import warnings

import pytest
import torch

from hf_linear_attn.registry import get_variant
from hf_linear_attn.testing import Subject, applicable_laws
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.performer import PerformerAttention, PerformerConfig

DIM, HEADS, SCALING = 8, 3, 8**-0.5


def build(causal=False, *, dim=DIM, heads=HEADS, layer_idx=0, **options):
    context = LayerContext(layer_idx, 6, heads * dim, heads, dim, 512, causal)
    return PerformerAttention(PerformerConfig(**options), context)


def draw(length, *, batch=2, heads=HEADS, dim=DIM, seed=0, size=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, dim, generator=g, dtype=dtype).unbind(0)
    return size * q, size * k, v


def attend(module, q, k, v, padding=None, causal=False):
    return module(AttentionInputs(q, k, v, padding, causal, SCALING))[0]


def softmax_attention(q, k, v, causal=False):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALING)


def paper_features(x, omega, kernel):
    """The feature maps as the paper writes them, no stabilizer, in float64."""
    x = x * SCALING**0.5
    projected, half = x @ omega.T, x.square().sum(-1, keepdim=True) / 2
    count = len(omega)
    if kernel == "positive":
        return (projected - half).exp() / math.sqrt(count)
    if kernel == "hyperbolic":
        return torch.cat([(projected - half).exp(), (-projected - half).exp()], -1) / math.sqrt(2 * count)
    if kernel == "trig":
        return half.exp() * torch.cat([projected.cos(), projected.sin()], -1) / math.sqrt(count)
    return projected.clamp(min=0) + 1e-3


def set_start(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    dtype = module.omega.dtype
    a, c = 0.3 * torch.randn(2, HEADS, DIM, generator=g, dtype=dtype)
    query_map = torch.eye(DIM, dtype=dtype) + 0.1 * torch.randn(HEADS, DIM, DIM, generator=g, dtype=dtype)
    start = {"query_mean": a, "key_mean": c, "query_map": query_map, "key_map": torch.linalg.inv(query_map).mT}
    for name, value in start.items():
        module.get_buffer(name).copy_(value)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "trig", "relu"])
def test_is_the_dense_formula_of_its_features(kernel, causal):
    for reducer in (True, False):  # uncalibrated, the reducer changes nothing
        module = build(causal, kernel=kernel, num_features=40, variance_reducer=reducer).double()
        for length in (1, 7, 36, 65, 130):
            q, k, v = draw(length)
            scores = paper_features(q, module.omega, kernel) @ paper_features(k, module.omega, kernel).mT
            scores = scores.tril() if causal else scores
            expected = scores @ v / scores.sum(-1, keepdim=True)
            torch.testing.assert_close(attend(module, q, k, v, causal=causal), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "trig"])
def test_a_calibrated_start_is_the_dense_formula_of_the_moved_inputs(kernel):
    module = build(kernel=kernel, num_features=40).double()
    set_start(module)
    q, k, v = draw(60)
    moved_q = (q - module.query_mean[:, None]) @ module.query_map
    moved_k = (k - module.key_mean[:, None]) @ module.key_map
    scores = paper_features(moved_q, module.omega, kernel) @ paper_features(moved_k, module.omega, kernel).mT
    scores = scores * (SCALING * torch.einsum("hd,bhtd->bht", module.query_mean, k)).exp()[:, :, None]
    torch.testing.assert_close(attend(module, q, k, v), scores @ v / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize("moved", [False, True], ids=["published", "calibrated"])
@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "trig"])
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_many_features_give_softmax_attention(kernel, causal, moved):
    module = build(causal, kernel=kernel, num_features=20_000).double()
    if moved:
        set_start(module)
    q, k, v = draw(40, size=0.7)
    exact = softmax_attention(q, k, v, causal)
    uniform = softmax_attention(0 * q, k, v, causal)
    assert (attend(module, q, k, v, causal=causal) - exact).norm() < 0.2 * (uniform - exact).norm()


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "trig"])
def test_kernel_estimates_are_unbiased(kernel):
    """Averaged over independent draws, phi(q) . phi(k) is exp(scaling q . k) within four standard errors."""
    q, k, _ = draw(6, batch=1, heads=1, size=0.6)
    module = build(kernel=kernel, num_features=DIM, heads=1).double()
    estimates = []
    for seed in range(3000):
        module.redraw(seed)
        features_q, features_k = (paper_features(x, module.omega, kernel) for x in (q, k))
        estimates.append((features_q @ features_k.mT)[0, 0])
    estimates = torch.stack(estimates)
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    exact = (SCALING * q @ k.mT).exp()[0, 0]
    assert ((estimates.mean(0) - exact).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "trig"])
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_error_falls_as_the_square_root_of_num_features(kernel, causal):
    q, k, v = draw(64, size=0.5)
    exact = softmax_attention(q, k, v, causal)
    counts, errors = (32, 128, 512, 2048), []
    for count in counts:
        module = build(causal, kernel=kernel, num_features=count).double()
        total = 0.0
        for seed in range(12):
            module.redraw(seed)
            total += ((attend(module, q, k, v, causal=causal) - exact).norm() / exact.norm()).item() ** 2
        errors.append(math.sqrt(total / 12))
    x, y = torch.tensor(counts).log2(), torch.tensor(errors).log2()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope.item() == pytest.approx(-0.5, abs=0.1)


def test_orthogonal_directions_beat_independent_ones():
    q, k, v = draw(64, size=0.7)
    exact = softmax_attention(q, k, v)
    errors = {}
    for orthogonal in (True, False):
        module = build(num_features=DIM, orthogonal=orthogonal).double()
        errors[orthogonal] = 0.0
        for seed in range(40):
            module.redraw(seed)
            errors[orthogonal] += (attend(module, q, k, v) - exact).square().sum().item()
    assert errors[True] < 0.95 * errors[False]


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic"])
@pytest.mark.parametrize("size", [10.0, 1e3])
def test_any_norm_is_finite(kernel, size):
    for causal in (False, True):
        q, k, v = draw(70, size=size, dtype=torch.float32)
        q, k, v = (x.requires_grad_() for x in (q.clone(), k.clone(), v))
        output = attend(build(causal, kernel=kernel, num_features=32), q, k, v, causal=causal)
        output.square().sum().backward()
        assert all(x.isfinite().all() for x in (output, q.grad, k.grad, v.grad))


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "trig", "relu"])
def test_a_huge_later_key_leaks_nothing(kernel):
    module = build(True, kernel=kernel, num_features=32)
    set_start(module)
    q, k, v = draw(100, dtype=torch.float32)
    before = attend(module, q, k, v, causal=True)
    for position in (1, 63, 64, 90):
        changed = k.clone()
        changed[:, :, position] *= 1e3
        after = attend(module, q, changed, v, causal=True)
        assert torch.equal(after[:, :, :position], before[:, :, :position])
        assert after.isfinite().all()


def test_directions_are_saved_seeded_and_per_layer():
    module = build()
    torch.manual_seed(9)
    assert torch.equal(build().omega, module.omega)
    assert not torch.equal(build(layer_idx=1).omega, module.omega)
    assert not torch.equal(build(seed=1).omega, module.omega)
    saved = module.state_dict()
    module.redraw(7)
    assert not torch.equal(build().omega, module.omega)
    other = build(seed=3)
    other.load_state_dict(saved)
    q, k, v = draw(30, dtype=torch.float32)
    assert torch.equal(attend(other, q, k, v), attend(module, q, k, v))


def real_looking(length=160, size=0.8):
    """Head 0: queries and keys with common parts. Head 1: unbalanced spectra. Head 2: plain."""
    q, k, v = draw(length, batch=3, size=size, dtype=torch.float32)
    q[:, 0] += torch.linspace(-2, 2, DIM)
    k[:, 0] += torch.linspace(2, -1, DIM)
    stretch = torch.logspace(0.6, -0.6, DIM)
    q[:, 1] *= stretch
    k[:, 1] /= stretch
    return q, k, v


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "trig", "relu"])
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.filterwarnings("ignore:performer, layer")
def test_calibration_is_never_worse_and_helps_where_it_should(kernel, causal):
    q, k, v = real_looking()
    exact = softmax_attention(q, k, v, causal)
    module = build(causal, kernel=kernel)

    def errors():
        return (attend(module, q, k, v, causal=causal) - exact).square().sum((0, 2, 3))

    before = errors()
    module.calibrate([AttentionInputs(q, k, v, None, causal, SCALING)])
    after = errors()
    assert (after <= before * 1.0001).all()
    if kernel != "relu":
        assert after[0] < 0.8 * before[0]
        product = module.query_map @ module.key_map.mT
        torch.testing.assert_close(product, torch.eye(DIM).expand_as(product), atol=1e-4, rtol=0)
    if kernel in ("positive", "hyperbolic"):
        assert after[1] < 0.8 * before[1]
        assert not torch.equal(module.query_map[1], torch.eye(DIM))


def test_calibration_ignores_padding():
    q, k, v = real_looking()
    padding = torch.ones(3, 160, dtype=torch.bool)
    padding[0, 100:] = False
    padding[2, :40] = False
    results = []
    for value in (0.0, 1e9):
        module = build()
        filled = [x.masked_fill(~padding[:, None, :, None], value) for x in (q, k, v)]
        module.calibrate([AttentionInputs(*filled, padding, False, SCALING)])
        results.append(module.state_dict())
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())


def test_a_hopeless_spread_is_warned_about_with_its_number():
    q, k, v = draw(50, size=4.0, dtype=torch.float32)
    inputs = AttentionInputs(q, k, v, None, False, SCALING)
    expected = SCALING * (q.square().sum(-1).mean() + k.square().sum(-1).mean())
    with pytest.warns(UserWarning, match=r"layer 2: mean \|q' \+ k'\|\^2 is") as caught:
        build(layer_idx=2).calibrate([inputs])
    assert len(caught) == 1
    number = float(str(caught[0].message).split("^2 is ")[1].split(",")[0])
    assert number == pytest.approx(expected.item(), rel=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q, k, v = draw(50, size=0.3, dtype=torch.float32)
        build().calibrate([AttentionInputs(q, k, v, None, False, SCALING)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "exp"}, "kernel='exp'; allowed: positive, hyperbolic, trig, relu"),
        ({"num_features": 0}, "num_features=0"),
        ({"seed": -1}, "seed=-1"),
        ({"orthogonal": "yes"}, "orthogonal='yes'"),
        ({"variance_reducer": None}, "variance_reducer=None"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PerformerConfig(**options)


def test_is_registered_for_both_sides():
    spec = get_variant("performer")
    assert spec.encoder
    assert spec.decoder
    assert spec.state == "constant"


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "trig", "relu"])
def test_state_size_is_constant(kernel):
    module = build(True, kernel=kernel, num_features=16)
    state = module.init_state(2, torch.float16, torch.device("cpu"))
    features = 32 if kernel in ("hyperbolic", "trig") else 16
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    assert shapes == {"kv": (2, HEADS, features, DIM), "z": (2, HEADS, features), "log_scale": (2, HEADS)}
    q, k, v = draw(9, dtype=torch.float32)
    _, state = module(AttentionInputs(q, k, v, None, True, SCALING), state)
    assert {name: tuple(x.shape) for name, x in state.items()} == shapes
    assert all(x.dtype == torch.float32 for x in state.values())


# Trigonometric features have denominators of both signs: at the contract's norms they come near 0, where
# rounding the inputs alone changes the output at will. So half precision is tested where the estimate means
# something.
TRIG = [Subject(get_variant("performer"), causal, {"kernel": "trig"}) for causal in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "subject"),
    [
        pytest.param(law, subject, id=f"{law.name}-{'decoder' if subject.is_causal else 'encoder'}")
        for subject in TRIG
        for law in applicable_laws(subject)
        # Tested below where denominators are positive.
        if law.name not in ("low_precision", "half_precision", "compile_full_graph")
    ],
)
def test_contract_with_trigonometric_features(law, subject):
    law(subject)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trigonometric_features_in_half_precision(dtype):
    q, k, v = draw(130, size=0.4, dtype=torch.float32)
    module = build(kernel="trig")
    expected = attend(module, q, k, v)
    with torch.autocast("cpu", dtype=dtype):
        output = attend(module, q.to(dtype), k.to(dtype), v.to(dtype))
    assert output.dtype == dtype
    assert (output - expected).norm() / expected.norm() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_trigonometric_features_compile(causal):
    module, results = build(causal, kernel="trig").float(), []
    for forward in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        inputs = [x.requires_grad_() for x in draw(36, size=0.4, dtype=torch.float32)]
        output = attend(forward, *inputs, causal=causal)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
