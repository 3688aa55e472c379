"""Sparse Transformer against a dense float64 formula written pair by pair, its exact limits and its options."""

import pytest
import torch
import torch.nn.functional as F

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
