"""Linformer against dense float64 formulas written here, and its promises on length, padding, sharing."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.linformer import LinformerAttention, LinformerConfig

HEADS, DIM = 3, 8


def build(max_length=24, layer_idx=0, num_layers=2, **options):
    context = LayerContext(layer_idx, num_layers, HEADS * DIM, HEADS, DIM, max_length, is_causal=False)
    return LinformerAttention(LinformerConfig.from_dict(options), context).double()


def draw(batch, length, queries=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, HEADS, queries or length, DIM),
        (batch, HEADS, length, DIM),
        (batch, HEADS, length, DIM),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attend(module, q, k, v, padding=None):
    return module(AttentionInputs(q, k, v, token_mask=padding, scaling=DIM**-0.5))[0]


def randomize(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return module


@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value", "layerwise"])
def test_full_length_is_the_formula_of_the_paper(sharing):
    module = randomize(build(24, k=6, sharing=sharing))
    q, k, v = draw(2, 24)
    E = module.key_projection
    F_ = E if sharing in ("key_value", "layerwise") else module.value_projection
    assert E.shape == (HEADS if sharing == "none" else 1, 6, 24)
    expected = torch.softmax(q @ (E @ k).transpose(-1, -2) / math.sqrt(DIM), -1) @ (F_ @ v)
    torch.testing.assert_close(attend(module, q, k, v), expected)


def test_random_init_on_short_inputs_uses_the_first_columns():
    module = build(24, k=6, init="random", seed=3)
    q, k, v = draw(2, 11, queries=4)
    E, F_ = module.key_projection[:, :, :11], module.value_projection[:, :, :11]
    expected = torch.softmax(q @ (E @ k).transpose(-1, -2) / math.sqrt(DIM), -1) @ (F_ @ v)
    torch.testing.assert_close(attend(module, q, k, v), expected)


POOLS = {
    "mean": ({"projection": "mean_pool"}, torch.mean, torch.mean),
    "max": ({"projection": "max_pool"}, torch.amax, torch.amax),
    "max of keys": ({"projection": "max_pool", "value_pool": "mean"}, torch.amax, torch.mean),
}


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("n_real", [3, 7, 20])
def test_pooling_spreads_the_slots_over_the_real_tokens(case, n_real):
    options, *pools = POOLS[case]
    module = build(64, k=6, **options)
    q, k, v = draw(1, 20)
    padding = torch.arange(20)[None] >= 20 - n_real  # left padding
    slots = min(6, n_real)
    segment = [rank * slots // n_real for rank in range(n_real)]
    groups = [[20 - n_real + r for r in range(n_real) if segment[r] == slot] for slot in range(slots)]
    pooled_k, pooled_v = (
        torch.stack([pool(x[:, :, g], dim=2) for g in groups], 2) for pool, x in zip(pools, (k, v), strict=True)
    )
    expected = torch.softmax(q @ pooled_k.transpose(-1, -2) / math.sqrt(DIM), -1) @ pooled_v
    real = padding[0]
    torch.testing.assert_close(attend(module, q, k, v, padding)[:, :, real], expected[:, :, real])


@pytest.mark.parametrize("projection", ["linear", "conv"])
@pytest.mark.parametrize("n_real", [1, 5, 6, 13, 20, 64])
def test_learned_projections_start_as_means_at_every_length(projection, n_real):
    """A short text in a model for long ones has all slots, and as many slots as tokens are softmax attention."""
    module, pooled = (build(64, k=6, projection=choice) for choice in (projection, "mean_pool"))
    q, k, v = draw(2, 64)
    padding = torch.arange(64).expand(2, -1) >= 64 - n_real
    output = attend(module, q, k, v, padding)
    torch.testing.assert_close(output, attend(pooled, q, k, v, padding), rtol=1e-5, atol=1e-6)
    alone = [x[:, :, 64 - n_real :] for x in (q, k, v)]
    torch.testing.assert_close(output[:, :, 64 - n_real :], attend(module, *alone))
    if n_real <= 6:
        torch.testing.assert_close(attend(module, *alone), F.scaled_dot_product_attention(*alone), rtol=1e-5, atol=1e-6)


def dense_columns(n, k, max_length):
    """How much of each column of E each of n tokens takes `[n, max_length]`, token by token."""
    slots = min(k, n)
    slot_of = [rank * slots // n for rank in range(n)]
    column_slot = [column * k // max_length for column in range(max_length)]
    share = torch.zeros(n, max_length, dtype=torch.float64)
    for slot in range(slots):
        tokens = [rank for rank in range(n) if slot_of[rank] == slot]
        columns = [column for column in range(max_length) if column_slot[column] == slot]
        width = len(columns) / len(tokens)
        for place, rank in enumerate(tokens):
            for number, column in enumerate(columns):
                share[rank, column] = max(0, min(number + 1, (place + 1) * width) - max(number, place * width))
    return share, slots


@pytest.mark.parametrize("n", [1, 3, 7, 13, 22, 23])
@pytest.mark.parametrize("sharing", ["none", "headwise"])
def test_a_trained_projection_stretches_over_the_tokens_that_are_there(n, sharing):
    module = randomize(build(23, k=7, sharing=sharing))
    q, k, v = draw(2, n)
    share, slots = dense_columns(n, 7, 23)
    E, F_ = (w[:, :slots] @ share.T for w in (module.key_projection, module.value_projection))
    expected = torch.softmax(q @ (E @ k).transpose(-1, -2) / math.sqrt(DIM), -1) @ (F_ @ v)
    torch.testing.assert_close(attend(module, q, k, v), expected)


def test_a_convolution_stretches_over_the_tokens_that_are_there():
    module = randomize(build(24, k=6, projection="conv", sharing="key_value"))
    q, k, v = draw(2, 12)  # two tokens a slot, the kernel has four columns
    kernel = module.key_projection[0].unflatten(0, (2, 2)).sum(1)  # [2, D, D]
    pooled_k, pooled_v = (x.unflatten(2, (6, 2)).flatten(3) @ kernel.flatten(0, 1) for x in (k, v))
    expected = torch.softmax(q @ pooled_k.transpose(-1, -2) / math.sqrt(DIM), -1) @ pooled_v
    torch.testing.assert_close(attend(module, q, k, v), expected)


def test_convolution_is_torch_conv1d():
    module = randomize(build(24, k=6, projection="conv", sharing="key_value"))
    q, k, v = draw(2, 24)
    kernel = module.key_projection[0].permute(2, 1, 0)  # [D_out, D_in, kernel]
    assert kernel.shape == (DIM, DIM, 4)
    conv_k, conv_v = (
        F.conv1d(x.flatten(0, 1).transpose(1, 2), kernel, stride=4).transpose(1, 2).unflatten(0, (2, HEADS))
        for x in (k, v)
    )
    expected = torch.softmax(q @ conv_k.transpose(-1, -2) / math.sqrt(DIM), -1) @ conv_v
    torch.testing.assert_close(attend(module, q, k, v), expected)


@pytest.mark.parametrize("projection", ["linear", "conv", "mean_pool", "max_pool"])
@pytest.mark.parametrize("side", ["left", "right", "holes", "none"])
def test_k_of_the_whole_length_is_softmax(projection, side):
    module = build(20, k=20, projection=projection).float()
    q, k, v = (x.float() for x in draw(2, 20))
    padding = {
        "left": torch.arange(20) >= 9,
        "right": torch.arange(20) < 9,
        "holes": torch.arange(20) % 3 != 1,
        "none": torch.ones(20, dtype=torch.bool),
    }[side].expand(2, -1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=padding[:, None, None, :])
    output, real = attend(module, q, k, v, padding), padding[0]
    torch.testing.assert_close(output[:, :, real], expected[:, :, real], rtol=1e-5, atol=1e-5)


def test_registered_limit_is_softmax_below_max_length():
    options = get_variant("linformer").exact_limit(13, False)
    module = build(24, **options)
    q, k, v = draw(2, 13)
    torch.testing.assert_close(attend(module, q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(("sharing", "per_layer"), [("none", 2 * HEADS), ("headwise", 2), ("key_value", 1)])
def test_sharing_counts_the_matrices_of_the_paper(sharing, per_layer):
    module = build(24, k=6, sharing=sharing)
    assert sum(p.numel() for p in module.parameters()) == per_layer * 6 * 24
    assert module.shared_parameters() == ()


def test_layerwise_sharing_names_its_one_matrix_and_starts_equal_in_all_layers():
    layers = [build(24, layer_idx=i, k=6, sharing="layerwise", init="random") for i in range(2)]
    assert [layer.shared_parameters() for layer in layers] == [("key_projection",)] * 2
    assert all(list(dict(layer.named_parameters())) == ["key_projection"] for layer in layers)
    torch.testing.assert_close(layers[0].key_projection, layers[1].key_projection, rtol=0, atol=0)


def test_k_per_layer():
    assert [build(24, layer_idx=i, k=[6, 3]).key_projection.shape[1] for i in range(2)] == [6, 3]
    assert LinformerConfig(k=(6, 3)).to_dict()["k"] == [6, 3]
    assert LinformerConfig.from_dict({"k": [6, 3]}) == LinformerConfig(k=(6, 3))
    with pytest.raises(ValueError, match="3 entries for 2 layers"):
        build(24, k=[6, 3, 2])


def test_random_start_depends_on_seed_and_layer():
    starts = [build(24, layer_idx=i, k=6, init="random", seed=s).key_projection for i, s in [(0, 0), (1, 0), (0, 1)]]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert torch.equal(starts[0], build(24, k=6, init="random").key_projection)
    wide = build(1000, k=100, init="random").key_projection
    assert abs(wide.std().item() - 0.1) < 0.002  # N(0, 1/k)


def test_too_long_an_input_names_both_lengths():
    with pytest.raises(ValueError, match=r"at most 24 tokens and got 25.*max_length=25"):
        attend(build(24, k=6), *draw(1, 25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": True}, "k=True"),
        ({"k": (4, -1)}, "k="),
        ({"k": ()}, "k="),
        ({"sharing": "all"}, "none, headwise, key_value, layerwise"),
        ({"projection": "fft"}, "linear, mean_pool, max_pool, conv"),
        ({"init": "zeros"}, "mean_pool, random"),
        ({"seed": -1}, "seed=-1"),
        ({"k": (4, 8), "sharing": "layerwise"}, "one k for all layers"),
        ({"init": "random", "projection": "max_pool"}, "needs projection='linear' or 'conv'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LinformerConfig(**options)


def test_decoders_are_refused_with_the_nearest_method():
    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, 24, is_causal=True)
    with pytest.raises(ValueError, match="'longformer'"):
        LinformerAttention(LinformerConfig(), context)
    q, k, v = draw(1, 8)
    with pytest.raises(ValueError, match="'performer'"):
        build()(AttentionInputs(q, k, v, is_causal=True))


# ---- slots by the spectrum ---------------------------------------------------------------------------------------


def ranks_for(energy, *calls):
    """The rule written anew: singular values by the eigenvalues of A A^T in float64, shares averaged over texts."""
    found = []
    longest = max(call.query.shape[2] for call in calls)
    for head in range(HEADS):
        curves = []
        for call in calls:
            a = torch.softmax(call.query[0, head] @ call.key[0, head].T * call.scaling, -1).double()
            values = torch.linalg.eigvalsh(a @ a.T).clamp(min=0).sqrt().flip(0)
            curves.append([float(values[: i + 1].sum() / values.sum()) for i in range(longest)])
        means = [sum(column) / len(calls) for column in zip(*curves, strict=True)]
        found.append(next(i + 1 for i, share in enumerate(means) if share >= energy))
    return found


def call_of(length, seed=0, sharpness=(1.0, 3.0, 9.0), padding=None):
    q, k, v = draw(1, length, seed=seed)
    q = q * torch.tensor(sharpness, dtype=q.dtype)[:, None, None]
    return AttentionInputs(q, k, v, token_mask=padding, scaling=DIM**-0.5)


@pytest.mark.parametrize("options", [{"sharing": "none"}, {"projection": "mean_pool"}], ids=["linear", "pool"])
def test_auto_keeps_the_energy_in_every_head(options):
    module, calls = build(64, k="auto", energy=0.6, **options), [call_of(24), call_of(17, seed=1)]
    assert module.chosen() == {"k": [16] * HEADS}  # floor(8 ln 8), until there is something to measure
    module.calibrate(calls)
    expected = [min(16, rank) for rank in ranks_for(0.6, *calls)]
    assert len(set(expected)) > 1
    assert module.config.head_k == tuple(expected)
    assert module.chosen() == {"k": expected}


def test_heads_that_share_a_matrix_have_what_the_most_demanding_one_needs():
    module, call = build(64, k="auto", energy=0.5), call_of(24)
    module.calibrate([call])
    assert module.config.head_k == max(ranks_for(0.5, call))
    assert module.key_projection.shape == (1, module.config.head_k, 64)
    assert module.key_projection.dtype == torch.float64


def test_auto_stays_within_d_log_d_and_the_models_length():
    module = build(64, k="auto", energy=1.0)
    module.calibrate([call_of(40)])
    assert module.config.head_k == int(DIM * math.log(DIM)) == 16
    assert build(9, k="auto").config.head_k == 9


def test_auto_does_not_look_at_padding():
    padding = torch.arange(24)[None] >= 7
    module, alone = (build(64, k="auto", energy=0.6, sharing="none") for _ in range(2))
    call = call_of(24, padding=padding)
    call.key[:, :, :7] = float("nan")
    module.calibrate([call])
    q, k, v = (x[:, :, 7:] for x in (call.query, call.key, call.value))
    alone.calibrate([AttentionInputs(q, k, v, scaling=DIM**-0.5)])
    assert module.config.head_k == alone.config.head_k


SLOTS = (5, 3, 9)


@pytest.mark.parametrize("side", ["left", "none"])
@pytest.mark.parametrize("projection", ["linear", "conv", "mean_pool", "max_pool"])
def test_heads_with_slots_of_their_own_are_layers_of_one_head_each(projection, side):
    """Also trained, on inputs shorter than E, and whatever stands in rows that a head does not use."""
    module = randomize(build(24, k="auto", head_k=SLOTS, sharing="none", projection=projection))
    q, k, v = draw(2, 20)
    padding = None if side == "none" else torch.arange(20).expand(2, -1) >= torch.tensor([[4], [12]])
    output = attend(module, q, k, v, padding)
    for head, size in enumerate(SLOTS):
        context = LayerContext(0, 2, DIM, 1, DIM, 24, is_causal=False)
        options = LinformerConfig(k=size, sharing="none", projection=projection)
        alone = LinformerAttention(options, context).double()
        for own, whole in zip(alone.parameters(), module.parameters(), strict=True):
            own.data.copy_(whole[head : head + 1, : own.shape[1]])
        expected = attend(alone, *(x[:, head : head + 1] for x in (q, k, v)), padding)[:, 0]
        real = torch.ones(2, 20, dtype=torch.bool) if padding is None else padding
        torch.testing.assert_close(output[:, head][real], expected[real])


def test_a_calibrated_start_is_that_of_the_chosen_slots():
    module = build(64, k="auto", energy=0.6, sharing="none")
    module.calibrate([call_of(24)])
    pooled = build(64, k="auto", head_k=module.config.head_k, projection="mean_pool")
    q, k, v = draw(2, 50)
    torch.testing.assert_close(attend(module, q, k, v), attend(pooled, q, k, v), rtol=1e-5, atol=1e-6)


def test_calibration_of_given_slots_changes_nothing():
    module = build(24, k=6)
    before = module.key_projection.detach().clone()
    module.calibrate([call_of(24)])
    assert module.chosen() == {}
    assert torch.equal(module.key_projection, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": "most"}, "k='most'; allowed: an integer of at least 1, or a list with one per layer, or 'auto'"),
        ({"k": ("auto", 4)}, "or 'auto'"),
        ({"k": "auto", "energy": 1.5}, "energy=1.5; allowed: a number from 0 to 1"),
        ({"k": "auto", "sharing": "layerwise"}, "one k for all layers, got k='auto'"),
        ({"k": 4, "head_k": 4}, "head_k=4; allowed: None with k=4"),
        ({"k": "auto", "head_k": (4, 5, 6)}, "head_k=(4, 5, 6); allowed: one integer, or None"),
        ({"k": "auto", "head_k": (4, 0, 6), "sharing": "none"}, "head_k="),
        ({"k": "auto", "head_k": (4, 5), "sharing": "none"}, "2 entries for 3 heads"),
        ({"value_pool": "min"}, "value_pool='min'; allowed: max, mean"),
        ({"value_pool": "mean"}, "value_pool='mean'; allowed: 'max' with projection='linear'"),
    ],
)
def test_bad_options_of_calibration_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


def errors_of(module, call):
    exact = F.scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scaling)
    return ((module(call)[0] - exact).norm() / exact.norm()).item()


def test_maxima_of_values_are_what_is_wrong_with_max_pooling():
    """Softmax averages values, and their maximum is above all of them: calibration finds that means are closer."""
    module, call = build(64, k=8, projection="max_pool"), call_of(48, sharpness=(1.0, 1.0, 1.0))
    uniform = call.value.mean(2, keepdim=True).expand_as(call.value)
    exact = F.scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scaling)
    published = errors_of(module, call)
    assert published > 3 * (uniform - exact).norm() / exact.norm()
    module.calibrate([call])
    assert module.config.value_pool == "mean"
    assert module.chosen() == {"value_pool": "mean"}
    assert errors_of(module, call) < 0.5 * published


def test_calibration_leaves_maxima_where_means_are_no_closer():
    module, call = build(64, k=8, projection="max_pool"), call_of(48)
    flat = torch.full_like(call.value, 2.0)  # what is the same everywhere is its own maximum
    module.calibrate([replace(call, value=flat)])
    assert module.config.value_pool == "max"
