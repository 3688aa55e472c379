"""Sparse Transformer against a dense float64 formula written pair by pair, its exact limits and its options."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.ops.sparse.factored import FactoredPattern
from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.sparse import SparseAttention, SparseConfig

HEADS, DIM = 3, 4
SIDES = pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])


def layer(is_causal=False, max_length=512, num_heads=HEADS, dtype=torch.float64, **options):
    context = LayerContext(0, 2, 12, num_heads, DIM, max_length, is_causal)
    return SparseAttention(SparseConfig.from_dict(options), context).to(dtype)


def draw(length, batch=1, is_causal=False, padding=None, dtype=torch.float64):
    q, k, v = torch.randn(3, batch, HEADS, length, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    return AttentionInputs(q, k, v, padding, is_causal, DIM**-0.5)


def sees(pattern, part, stride, c, is_causal, i, j, length):
    """Whether token i sees token j, as the paper writes it, symmetric on encoders."""
    if is_causal and j > i:
        return False
    if pattern == "strided":
        near, far = abs(i - j) <= stride, (i - j) % stride == 0
    else:
        end = min((j // stride + 1) * stride, length)  # of j's block: the last one may be short
        near, far = i // stride == j // stride, pattern == "fixed" and j >= end - c
        far = near or far  # a query of `fixed` always keeps its own block
    return {"near": near, "far": far, "union": near or far}[part]


def dense(q, k, v, pattern, parts, stride, c, is_causal):
    """One sequence without padding `[H, T, D]`."""
    length = q.shape[1]
    seen = [
        [[sees(pattern, parts[h], stride, c, is_causal, i, j, length) for j in range(length)] for i in range(length)]
        for h in range(HEADS)
    ]
    logits = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~torch.tensor(seen), float("-inf"))
    return logits.softmax(-1) @ v


CASES = [
    ({"pattern": "strided", "stride": 5}, ("union",) * 3),
    ({"pattern": "strided", "stride": 4, "heads": "split"}, ("near", "near", "far")),
    ({"pattern": "fixed", "stride": 6, "num_summary_tokens": 2}, ("union",) * 3),
    ({"pattern": "fixed", "stride": 6, "num_summary_tokens": 9}, ("union",) * 3),
    ({"pattern": "fixed", "stride": 5, "num_summary_tokens": 1, "heads": "split"}, ("near", "near", "far")),
    ({"pattern": "fixed", "stride": 5, "heads": ["far", "union", "near"]}, ("far", "union", "near")),
    ({"pattern": "block_local", "stride": 7}, ("union",) * 3),
]


@SIDES
@pytest.mark.parametrize("length", [1, 6, 43])
@pytest.mark.parametrize(("options", "parts"), CASES, ids=str)
def test_equals_the_dense_formula(is_causal, length, options, parts):
    module, inputs = layer(is_causal, **options), draw(length, is_causal=is_causal)
    given = options["pattern"], parts, options["stride"], options.get("num_summary_tokens", 8), is_causal
    expected = dense(inputs.query[0], inputs.key[0], inputs.value[0], *given)
    torch.testing.assert_close(module(inputs)[0][0], expected)


@SIDES
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
@pytest.mark.parametrize(("options", "parts"), CASES[:1] + CASES[2:3] + CASES[5:], ids=str)
def test_positions_are_ranks_among_the_real_tokens(is_causal, kind, options, parts):
    """Rows of 40, 33 and 13 real tokens, the padding poisoned: each as if it were alone."""
    number, place = torch.tensor([[0], [7], [27]]), torch.arange(40).expand(3, -1)
    order = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)).argsort(-1)
    padding = {"left": place >= number, "right": place < 40 - number, "interior": order >= number}[kind]
    module, inputs = layer(is_causal, **options), draw(40, 3, is_causal, padding)
    for x in (inputs.query, inputs.key, inputs.value):
        x.transpose(1, 2)[~padding] = float("inf")
    out = module(inputs)[0]
    given = options["pattern"], parts, options["stride"], options.get("num_summary_tokens", 8), is_causal
    for b in range(3):
        q, k, v = (x[b][:, padding[b]] for x in (inputs.query, inputs.key, inputs.value))
        torch.testing.assert_close(out[b][:, padding[b]], dense(q, k, v, *given))


@SIDES
@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "strided", "stride": 30},
        {"pattern": "fixed", "stride": 7, "num_summary_tokens": 7},
        {"pattern": "fixed", "stride": 30},
        {"pattern": "block_local", "stride": 30},
    ],
    ids=str,
)
def test_exact_limits(is_causal, options):
    assert get_variant("sparse").exact_limit(30, is_causal) == {"pattern": "strided", "stride": 30}
    module, inputs = layer(is_causal, dtype=torch.float32, **options), draw(30, 2, is_causal, dtype=torch.float32)
    expected = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=is_causal)
    torch.testing.assert_close(module(inputs)[0], expected, atol=1e-5, rtol=1e-5)


@SIDES
@pytest.mark.parametrize("options", [case[0] for case in CASES], ids=str)
def test_every_query_keeps_itself(is_causal, options):
    """Also in split heads, of which the far ones of `fixed` would leave the first block without any key."""
    inputs = draw(40, is_causal=is_causal)
    value = torch.eye(40, dtype=torch.float64).expand(1, HEADS, -1, -1)
    weights = layer(is_causal, **options)(AttentionInputs(inputs.query, inputs.key, value, None, is_causal, 0.5))[0]
    assert (weights.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, HEADS, 40, dtype=torch.float64))


@pytest.mark.parametrize(("max_length", "stride"), [(1, 1), (128, 16), (512, 32), (2048, 64), (4096, 64), (8192, 128)])
def test_default_stride_is_near_the_root_of_the_longest_input(max_length, stride):
    assert layer(max_length=max_length).stride == stride
    assert layer(max_length=max_length, stride=5).stride == 5


@pytest.mark.parametrize("splits", [[1] * 40, [40], [13, 1, 26], [3, 30, 7]], ids=str)
@pytest.mark.parametrize("options", [CASES[0][0], CASES[5][0]], ids=str)
def test_decoding_in_pieces_equals_one_call(splits, options):
    module, inputs = layer(True, **options), draw(40, 2, True)
    expected = module(inputs)[0]
    state = module.init_state(2, torch.float64, torch.device("cpu"))
    outputs, seen = [], 0
    for q, k, v in zip(*(x.split(splits, 2) for x in (inputs.query, inputs.key, inputs.value)), strict=True):
        out, state = module(AttentionInputs(q, k, v, None, True, DIM**-0.5), state)
        outputs.append(out)
        seen += q.shape[2]
        assert state["key"].shape == state["value"].shape == (2, HEADS, seen, DIM)
    torch.testing.assert_close(torch.cat(outputs, 2), expected)


@pytest.mark.parametrize(
    ("options", "num_heads", "message"),
    [
        ({"pattern": "dense"}, 3, "pattern='dense'; allowed: strided, fixed, block_local"),
        ({"stride": 0}, 3, "stride=0; allowed: an integer of at least 1, or None"),
        ({"num_summary_tokens": True}, 3, "num_summary_tokens=True; allowed: an integer of at least 1"),
        ({"heads": "both"}, 3, "heads='both'; allowed: union, split, or a list of union, near, far"),
        ({"heads": ["near", "left"]}, 2, r"heads=\('near', 'left'\); allowed: union"),
        ({"heads": ["near", "far"]}, 3, "heads names 2 heads, the layer has 3"),
        ({"heads": "split"}, 1, "heads='split' needs at least 2 heads, the layer has 1"),
        ({"heads": "split", "factors": 4}, 3, "heads='split' needs at least 4 heads, the layer has 3"),
        ({"factors": 1}, 3, "factors=1; allowed: an integer of at least 2"),
        ({"factors": True}, 3, "factors=True; allowed: an integer of at least 2"),
        ({"factors": 17}, 3, "factors=17; allowed: an integer from 2 to 16"),
        ({"factors": 3, "heads": ["near", "far", "union"]}, 3, "allowed with factors=3: union, split"),
        (
            {"factors": 3, "pattern": "block_local"},
            3,
            "factors=3; allowed: 2, since pattern='block_local' has one part",
        ),
        (
            {"pattern": "block_local", "heads": "split"},
            3,
            "heads='split'; allowed: union, since pattern='block_local' has one part",
        ),
        ({"l": 4}, 3, "Unknown option.*'l'.*Allowed: pattern"),
    ],
)
def test_bad_options_are_named(options, num_heads, message):
    with pytest.raises(ValueError, match=message):
        layer(num_heads=num_heads, **options)


FACTORED = [
    ({"pattern": "strided", "stride": 3, "factors": 3}, "union"),
    ({"pattern": "strided", "stride": 2, "factors": 4}, "union"),
    ({"pattern": "fixed", "stride": 3, "factors": 3, "num_summary_tokens": 2}, "union"),
    ({"pattern": "fixed", "stride": 2, "factors": 4, "num_summary_tokens": 1}, "union"),
    ({"pattern": "strided", "stride": 3, "factors": 3, "heads": "split"}, "split"),
    ({"pattern": "fixed", "stride": 3, "factors": 3, "num_summary_tokens": 5, "heads": "split"}, "split"),
]


def shows(options, m, is_causal, i, j, length):
    """Whether factor m of p shows token i the token j, digit by digit."""
    stride, last = options["stride"], m == options["factors"] - 1
    if is_causal and j > i:
        return False
    if options["pattern"] == "strided":  # a l^m with a <= l, the last factor without end
        return abs(i - j) in range(0, length if last else stride ** (m + 1) + 1, stride**m)
    if not last and i // stride ** (m + 1) != j // stride ** (m + 1):
        return False
    end = (j // stride**m + 1) * stride**m  # on encoders a short last block has last tokens of its own
    number = min(options["num_summary_tokens"], stride, stride**m)
    return j >= (end if is_causal else min(end, length)) - number


def factor_masks(options, is_causal, length):
    """bool `[p, n, n]`; a query of `fixed` always keeps its own block."""
    masks = [
        [[shows(options, m, is_causal, i, j, length) for j in range(length)] for i in range(length)]
        for m in range(options["factors"])
    ]
    masks = torch.tensor(masks)
    return masks | masks[:1] if options["pattern"] == "fixed" else masks


def factored(q, k, v, options, is_causal):
    """One sequence without padding `[H, T, D]`: heads of the factors in turn, or all factors in each."""
    masks = factor_masks(options, is_causal, q.shape[1])
    masks = masks[torch.arange(HEADS) % len(masks)] if options.get("heads") == "split" else masks.any(0)
    return (q @ k.mT * DIM**-0.5).masked_fill(~masks, float("-inf")).softmax(-1) @ v


@pytest.fixture(params=[True, False], ids=["lists", "as it comes"])
def short_inputs_by_lists(request, monkeypatch):
    """Short inputs would take all pairs of tokens behind a mask."""
    if request.param:
        monkeypatch.setattr("hf_linear_attn.ops.sparse.factored._DENSE_FACTOR", 0)


@SIDES
@pytest.mark.usefixtures("short_inputs_by_lists")
@pytest.mark.parametrize(("options", "heads"), FACTORED, ids=str)
def test_more_factors_equal_the_dense_formula(is_causal, options, heads):
    module = layer(is_causal, **options)
    for length in (1, 9, 44):
        inputs = draw(length, is_causal=is_causal)
        expected = factored(inputs.query[0], inputs.key[0], inputs.value[0], options, is_causal)
        torch.testing.assert_close(module(inputs)[0][0], expected)


@SIDES
@pytest.mark.usefixtures("short_inputs_by_lists")
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
@pytest.mark.parametrize(("options", "heads"), [FACTORED[0], FACTORED[2]], ids=str)
def test_ranks_of_more_factors_are_those_of_the_real_tokens(is_causal, kind, options, heads):
    number, place = torch.tensor([[0], [7], [27]]), torch.arange(40).expand(3, -1)
    order = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)).argsort(-1)
    padding = {"left": place >= number, "right": place < 40 - number, "interior": order >= number}[kind]
    module, inputs = layer(is_causal, **options), draw(40, 3, is_causal, padding)
    for x in (inputs.query, inputs.key, inputs.value):
        x.transpose(1, 2)[~padding] = float("inf")
    out = module(inputs)[0]
    for b in range(3):
        q, k, v = (x[b][:, padding[b]] for x in (inputs.query, inputs.key, inputs.value))
        torch.testing.assert_close(out[b][:, padding[b]], factored(q, k, v, options, is_causal))


@pytest.mark.usefixtures("short_inputs_by_lists")
@pytest.mark.parametrize("splits", [[1] * 40, [13, 1, 26]], ids=["tokens", "pieces"])
@pytest.mark.parametrize(("options", "heads"), [FACTORED[0], FACTORED[2], FACTORED[5]], ids=str)
def test_decoding_with_more_factors_equals_one_call(splits, options, heads):
    module, inputs = layer(True, **options), draw(40, 2, True)
    state, outputs = module.init_state(2, torch.float64, torch.device("cpu")), []
    for q, k, v in zip(*(x.split(splits, 2) for x in (inputs.query, inputs.key, inputs.value)), strict=True):
        out, state = module(AttentionInputs(q, k, v, None, True, DIM**-0.5), state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2), module(inputs)[0])


def read_by(module, length, is_causal):
    """Which tokens each head's rows read, bool `[H, n, n]`, by what the layer does."""
    q = torch.zeros(1, HEADS, length, DIM, dtype=torch.float64)
    value = torch.eye(length, dtype=torch.float64).expand(1, HEADS, -1, -1)
    return module(AttentionInputs(q, q, value, None, is_causal, 1.0))[0][0] > 0


@SIDES
@pytest.mark.parametrize("length", [81, 70])
@pytest.mark.parametrize(("options", "heads"), FACTORED, ids=str)
def test_every_token_is_reached_within_as_many_layers_as_factors(is_causal, length, options, heads):
    """And not with one less: the paper's condition. Heads meet after each layer."""
    options = options | {"stride": 3 if options["factors"] == 4 else 4}
    hop = read_by(layer(is_causal, num_heads=HEADS, **options), length, is_causal).any(0)
    reached = [hop.double()]
    for _ in range(options["factors"] - 1):
        reached.append(((reached[-1] @ hop.double()) > 0).double())
    wanted = torch.ones(length, length, dtype=torch.bool)
    wanted = wanted.tril() if is_causal else wanted
    assert torch.equal(reached[-1] > 0, wanted)
    assert not torch.equal(reached[0] > 0, wanted)


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize("factors", [2, 3, 4])
def test_entries_grow_with_n_times_its_root(pattern, factors):
    """l = n^(1/p), twice as large: 2^p times the tokens are 2^(p + 1) times the entries."""
    entries = []
    for stride in (8, 16):
        length = stride**factors
        assert layer(max_length=length, factors=factors).stride == stride
        seen = FactoredPattern(pattern, stride, factors, 1, None, True)
        row, count = torch.arange(length)[None], torch.tensor([length])
        entries.append(int(seen.lists(row, count, length)[1].sum()))
    if factors == 2:
        options = {"pattern": pattern, "stride": 8, "num_summary_tokens": 1}
        assert entries[0] == int(read_by(layer(True, **options), 64, True)[0].sum())
    exponent = math.log(entries[1] / entries[0], 2**factors)
    assert exponent == pytest.approx(1 + 1 / factors, abs=0.06)


def test_two_factors_are_what_they_were():
    """Saved models have no `factors`."""
    assert SparseConfig().factors == 2
    assert SparseConfig.from_dict({"pattern": "strided", "stride": 5}) == SparseConfig("strided", 5, factors=2)
    for options, _ in CASES[:1] + CASES[2:3]:
        pair = options | {"factors": 2, "num_summary_tokens": options.get("num_summary_tokens", 8)}
        masks = factor_masks(pair, True, 43).any(0)
        assert torch.equal(read_by(layer(True, **options), 43, True)[0], masks)


def test_kernels_are_refused_for_more_factors_with_the_reason():
    module = layer(True, factors=3, stride=3)
    module.backend = "triton"
    with pytest.raises(RuntimeError, match="backend='triton' cannot run"):
        module(draw(30, is_causal=True))
