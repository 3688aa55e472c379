"""The Synthesizer's four forms against a dense float64 evaluation; starts, options, decode state."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.synthesizer import SynthesizerAttention, SynthesizerConfig

HEADS, DIM, WIDTH, LONGEST = 3, 4, 10, 24
COMPONENTS = ("dense", "random", "factorized_random")
FORMS = [{"form": form} for form in COMPONENTS] + [{"form": "mixture", "component": form} for form in COMPONENTS]


def build(is_causal=False, trained=False, dtype=torch.float64, max_length=LONGEST, **options):
    context = LayerContext(0, 2, WIDTH, HEADS, DIM, max_length, is_causal)
    module = SynthesizerAttention(SynthesizerConfig(**options), context).to(dtype)
    if trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += torch.randn(parameter.shape, generator=generator).to(dtype)
    return module


def draw(length=LONGEST, is_causal=False, padding=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, HEADS, length, DIM, generator=generator, dtype=dtype) for _ in range(3))
    hidden = torch.randn(2, length, WIDTH, generator=generator, dtype=dtype)
    return AttentionInputs(q, k, v, padding, is_causal, DIM**-0.5, hidden)


def synthetic_logit(module, name, h, x, i, j):
    """Z_ij of head h for the token x at rank i and the key at rank j."""
    if name == "random":
        return module.table[h, i, j]
    if name == "factorized_random":
        return module.query_table[h, i] @ module.key_table[h, j]
    rows = slice(h * DIM, (h + 1) * DIM)
    hidden = (module.hidden_weight[rows] @ x + module.hidden_bias[rows]).clamp(min=0)
    return module.output_weight[h, j] @ hidden + module.output_bias[h, j]


@pytest.mark.parametrize("options", FORMS, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_dense_formula(options, is_causal, padded):
    module = build(is_causal, trained=True, rank=2, **options)
    real = torch.rand(2, 13, generator=torch.Generator().manual_seed(1)) < (0.6 if padded else 2)
    inputs = draw(13, is_causal, real if padded else None)
    with torch.no_grad():
        output = module(inputs)[0]
        for b in range(2):
            tokens = real[b].nonzero()[:, 0].tolist()
            for h in range(HEADS):
                for i, query in enumerate(tokens):
                    seen = range(i + 1) if is_causal else range(len(tokens))
                    name = options.get("component", options["form"])
                    logits = [synthetic_logit(module, name, h, inputs.hidden_states[b, query], i, j) for j in seen]
                    logits = torch.stack(logits)
                    keys = [tokens[j] for j in seen]
                    if options["form"] == "mixture":
                        logits = logits + inputs.key[b, h, keys] @ inputs.query[b, h, query] * DIM**-0.5
                    torch.testing.assert_close(output[b, h, query], logits.softmax(0) @ inputs.value[b, h, keys])


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_a_mixture_starts_as_the_checkpoint_exactly_calibrated_or_not(component, is_causal):
    module = build(is_causal, dtype=torch.float32, component=component)
    inputs = draw(is_causal=is_causal, dtype=torch.float32)
    softmax = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=is_causal)
    torch.testing.assert_close(module(inputs)[0], softmax, rtol=1e-5, atol=1e-6)
    module.calibrate([inputs])
    torch.testing.assert_close(module(inputs)[0], softmax, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", COMPONENTS)
def test_a_purely_synthetic_form_starts_as_uniform_attention(form):
    inputs = draw()
    mean = inputs.value.mean(2, keepdim=True).expand_as(inputs.value)
    torch.testing.assert_close(build(form=form)(inputs)[0], mean)


@pytest.mark.parametrize("options", FORMS, ids=lambda options: "-".join(options.values()))
def test_learns_from_its_start(options):
    module = build(**options)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in module.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        module(draw())[0].square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_the_dense_form_starts_from_the_query_projection():
    module = build(form="dense")
    weight, bias = torch.randn(HEADS * DIM, WIDTH).double(), torch.randn(HEADS * DIM).double()
    module.load_projections((weight, bias), (weight, bias), (weight, bias))
    assert torch.equal(module.hidden_weight, weight)
    assert torch.equal(module.hidden_bias, bias)
    module.load_projections((weight, None), (weight, None), (weight, None))
    assert (module.hidden_bias == 0).all()


@pytest.mark.parametrize("form", ["random", "factorized_random"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_calibration_finds_heads_that_attend_by_position(form, is_causal):
    """Head 0 looks at its neighbors whatever they are; head 1 at tokens; head 2 at all alike."""
    inputs = draw(is_causal=is_causal, dtype=torch.float32)
    turn = torch.arange(LONGEST)[:, None] * torch.tensor([0.3, 0.9])
    circle = torch.cat([turn.cos(), turn.sin()], -1) * 3
    inputs.query[:, 0] = inputs.key[:, 0] = circle
    inputs.query[:, 2] = 0
    module = build(is_causal, dtype=torch.float32, form=form, rank=16)
    module.calibrate([inputs])
    fresh = draw(is_causal=is_causal, dtype=torch.float32, seed=5)
    fresh.query[:, 0] = fresh.key[:, 0] = circle
    softmax = F.scaled_dot_product_attention(fresh.query, fresh.key, fresh.value, is_causal=is_causal)

    def error(module):
        return (module(fresh)[0] - softmax)[:, 0].norm() / softmax[:, 0].norm()

    assert error(module) < 0.35 * error(build(is_causal, dtype=torch.float32, form=form, rank=16))
    uniform = build(is_causal, dtype=torch.float32, form=form, rank=16)
    inputs.query[:, 2] = 0
    torch.testing.assert_close(module(inputs)[0][:, 2], uniform(inputs)[0][:, 2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("options", "width"), [({"form": "random"}, 0), ({"form": "dense"}, 0), ({}, DIM)])
def test_the_decode_state_holds_keys_only_where_they_are_compared(options, width):
    module = build(True, **options)
    state = module(draw(9, True), module.init_state(2, torch.float64, torch.device("cpu")))[1]
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        "key": (2, HEADS, 9, width),
        "value": (2, HEADS, 9, DIM),
        "count": (2,),
    }


def test_too_long_inputs_and_missing_hidden_states_are_errors():
    with pytest.raises(ValueError, match="built for 5 tokens and got 6"):
        build(max_length=5)(draw(6))
    inputs = draw(6)
    inputs.hidden_states = None
    build(form="random")(inputs)
    with pytest.raises(ValueError, match="dense synthesizer needs hidden_states"):
        build(form="dense")(inputs)


def test_it_says_that_it_is_quadratic():
    spec = get_variant("synthesizer")
    assert spec.quadratic == "always"
    assert not spec.claims_linear_cost({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "sparse"}, "form='sparse'; allowed: dense, random, factorized_random, mixture"),
        ({"component": "mixture"}, "component='mixture'; allowed: dense, random, factorized_random"),
        ({"rank": 0}, "rank=0; allowed: an integer of at least 1"),
        ({"seed": -1}, "seed=-1; allowed: an integer of at least 0"),
        ({"rank": True}, "rank=True; allowed"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SynthesizerConfig.from_dict(options)
