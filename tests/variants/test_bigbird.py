"""BigBird against a dense float64 formula written pair by pair, its exact limits, its random blocks and ETC."""

import logging

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants import bigbird
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.bigbird import BigBirdAttention, BigBirdConfig

HEADS, DIM, WIDTH = 3, 4, 12
SIDES = pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])


def layer(is_causal=False, layer_idx=0, dtype=torch.float64, **options):
    context = LayerContext(layer_idx, 2, WIDTH, HEADS, DIM, 512, is_causal)
    return BigBirdAttention(BigBirdConfig.from_dict(options), context).to(dtype)


def draw(length, batch=1, is_causal=False, padding=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, HEADS, length, DIM, generator=generator, dtype=torch.float64).to(dtype)
    return AttentionInputs(q, k, v, padding, is_causal, DIM**-0.5)


def row_of(inputs):
    return inputs.query, inputs.key, inputs.value


def chosen(module, i, blocks):
    """Random blocks of query block i: one set per head."""
    columns, there = module.random_blocks(torch.tensor([[i]]), torch.tensor([blocks]))
    return [set(columns[0, h, 0][there[0, 0]].tolist()) for h in range(HEADS)]


def keys_of(module, length, h, i):
    """Keys of query token i in head h."""
    b, half = module.config.block_size, module.config.num_window_blocks // 2
    own, last = i // b, (length - 1) // b
    if module.context.is_causal:
        blocks = {0, *range(own - half, own + 1)} | chosen(module, own, last + 1)[h]
        return [j for j in range(i + 1) if j // b in blocks]
    if own in (0, last):
        return list(range(length))
    blocks = {0, last, *range(own - half, own + half + 1)} | chosen(module, own, last + 1)[h]
    return [j for j in range(length) if j // b in blocks]


def dense(module, q, k, v, extra=None):
    """One sequence without padding `[H, T, D]`, token by token; `extra` `[H, 2, G, D]` are tokens that travel."""
    length, scaling = q.shape[1], DIM**-0.5
    out = torch.zeros_like(q)
    b, g = module.config.block_size, module.num_global_tokens
    for h in range(HEADS):
        for i in range(length):
            keys = keys_of(module, length, h, i)
            logits, values = k[h, keys] @ q[h, i] * scaling, v[h, keys]
            if g and i // b not in (0, (length - 1) // b):
                hub_q, hub_k = module.global_tokens[h]
                read = (hub_q @ k[h].T * scaling).softmax(-1) @ v[h]
                logits = torch.cat([hub_k @ q[h, i] * scaling + module.global_shift[h], logits])
                values = torch.cat([read, values])
            if extra is not None:
                logits = torch.cat([extra[h, 0] @ q[h, i] * scaling + module.global_shift[h], logits])
                values = torch.cat([extra[h, 1], values])
            out[h, i] = logits.softmax(0) @ values
    return out


OPTIONS = [
    {"block_size": 4},
    {"block_size": 3, "num_window_blocks": 1, "num_random_blocks": 0},
    {"block_size": 2, "num_window_blocks": 5, "num_random_blocks": 2, "seed": 5},
]
ETC = {"block_size": 4, "form": "etc", "num_global_tokens": 2}


@pytest.mark.parametrize("length", [1, 9, 42])
@pytest.mark.parametrize(
    ("is_causal", "options"), [*((side, o) for side in (False, True) for o in OPTIONS), (False, ETC)], ids=str
)
def test_equals_the_dense_formula(is_causal, options, length):
    module = layer(is_causal, **options)
    inputs = draw(length, is_causal=is_causal)
    torch.testing.assert_close(module(inputs)[0][0], dense(module, inputs.query[0], inputs.key[0], inputs.value[0]))


@pytest.mark.parametrize("kind", ["left", "right", "interior"])
@pytest.mark.parametrize(("is_causal", "options"), [(False, OPTIONS[0]), (True, OPTIONS[0]), (False, ETC)], ids=str)
def test_last_block_and_random_blocks_are_each_rows_own(kind, is_causal, options):
    """Rows of 40, 33 and 13 real tokens, the padding poisoned: each as if it were alone."""
    number, place = torch.tensor([[0], [7], [27]]), torch.arange(40).expand(3, -1)
    order = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)).argsort(-1)
    padding = {"left": place >= number, "right": place < 40 - number, "interior": order >= number}[kind]
    module, inputs = layer(is_causal, **options), draw(40, 3, is_causal, padding)
    for x in (inputs.query, inputs.key, inputs.value):
        x.transpose(1, 2)[~padding] = float("inf")
    out = module(inputs)[0]
    for b in range(3):
        q, k, v = (x[b][:, padding[b]] for x in (inputs.query, inputs.key, inputs.value))
        torch.testing.assert_close(out[b][:, padding[b]], dense(module, q, k, v))


@pytest.mark.parametrize("options", [{}, {"num_random_blocks": 2}], ids=str)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_every_row_sees_the_tokens_that_travel(options, with_gradients):
    """In rows of all lengths, padded on either side or not at all; without them the pattern alone."""
    module = layer(block_size=4, form="etc_traveling", num_global_tokens=3, **options)
    module.global_shift.copy_(torch.tensor([0.5, -1.0, 2.0]))
    place = torch.arange(40)
    for padding in (None, torch.stack([place >= 7, place < 31, place % 5 != 2, place < 3])):
        inputs = draw(40, 4, padding=padding)
        inputs.extra = torch.randn(4, HEADS, 2, 3, DIM, dtype=torch.float64).requires_grad_(with_gradients)
        out = module(inputs)[0]
        for b in range(4):
            real = slice(None) if padding is None else padding[b]
            row = [x[b][:, real] for x in (inputs.query, inputs.key, inputs.value)]
            torch.testing.assert_close(out[b][:, real], dense(module, *row, inputs.extra[b]))
    inputs.extra = None
    torch.testing.assert_close(
        module(inputs)[0][0][:, place >= 7], dense(module, *(x[0][:, place >= 7] for x in row_of(inputs)))
    )


@SIDES
def test_up_to_so_many_blocks_the_lists_cover_everything(is_causal, monkeypatch):
    """r = 0: 4 blocks, causal 3; r = 3: 7, causal 6. One more block is no longer softmax."""
    for number, blocks in ((0, 3 if is_causal else 4), (3, 6 if is_causal else 7)):
        module = layer(is_causal, block_size=8, num_random_blocks=number, dtype=torch.float32)
        assert module.full_blocks() == blocks
        monkeypatch.setattr(module, "full_blocks", lambda: 0)  # through the lists, however short
        for length in (1, 5, 8 * blocks - 3, 8 * blocks, 8 * blocks + 8):
            inputs = draw(length, 2, is_causal, dtype=torch.float32)
            expected = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=is_causal)
            error = (module(inputs)[0] - expected).abs().max()
            assert (error < 1e-5) == (length <= 8 * blocks)
    options = get_variant("bigbird").exact_limit(40, is_causal)
    assert options == {"block_size": 7 if is_causal else 6}


def test_short_calls_are_full_attention_and_leave_no_trace(caplog):
    module, long = layer(block_size=4), draw(60)
    before = module(long)[0]
    bigbird._note_full.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            short = draw(20)
            expected = F.scaled_dot_product_attention(short.query, short.key, short.value)
            torch.testing.assert_close(module(short)[0], expected)
    assert [record.getMessage() for record in caplog.records if "bigbird" in record.getMessage()] == [
        "bigbird: calls of up to 28 tokens are full attention, which the pattern covers there."
    ]
    assert torch.equal(module(long)[0], before)


@SIDES
def test_random_blocks_are_a_function_of_seed_layer_head_and_block(is_causal):
    def all_blocks(layer_idx=0, seed=0):
        module = layer(is_causal, layer_idx, block_size=4, seed=seed)
        return [chosen(module, i, 30) for i in range(29)]

    assert all_blocks() == all_blocks()
    assert all_blocks() != all_blocks(layer_idx=1)
    assert all_blocks() != all_blocks(seed=1)
    heads = list(zip(*all_blocks(), strict=True))
    assert heads[0] != heads[1]
    assert heads[1] != heads[2]


def test_codes_are_saved_with_the_weights():
    first, second = layer(block_size=4, seed=1), layer(block_size=4, seed=2)
    inputs = draw(50)
    assert not torch.equal(first(inputs)[0], second(inputs)[0])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(inputs)[0], second(inputs)[0])


@pytest.mark.parametrize("splits", [[1] * 40, [40], [13, 1, 26], [3, 30, 7]], ids=str)
def test_decoding_in_pieces_equals_one_call(splits):
    module, inputs = layer(True, block_size=3), draw(40, 2, True)
    expected = module(inputs)[0]
    state = module.init_state(2, torch.float64, torch.device("cpu"))
    outputs, seen = [], 0
    for q, k, v in zip(*(x.split(splits, 2) for x in (inputs.query, inputs.key, inputs.value)), strict=True):
        out, state = module(AttentionInputs(q, k, v, None, True, DIM**-0.5), state)
        outputs.append(out)
        seen += q.shape[2]
        assert state["key"].shape == state["value"].shape == (2, HEADS, seen, DIM)
    torch.testing.assert_close(torch.cat(outputs, 2), expected)


def test_global_tokens_start_from_the_projections_and_weigh_as_one_token():
    module = layer(**ETC)
    weights = [(torch.randn(HEADS * DIM, WIDTH).double(), torch.randn(HEADS * DIM).double()) for _ in range(3)]
    module.load_projections(*weights)
    for part in (0, 1):
        bias = weights[part][1].view(HEADS, 1, DIM)
        assert (module.global_tokens[:, part] - bias).abs().max() < 0.5  # embeddings of N(0, 0.02)
    assert not torch.equal(module.global_tokens[:, :, 0], module.global_tokens[:, :, 1])
    torch.testing.assert_close(module.global_shift, torch.full((HEADS,), 0.5).double().log())


def test_calibration_worsens_no_head():
    """Neither on the calibration data in any head, nor by changing heads that were best as published."""
    module = layer(**ETC)
    batches = [draw(60, 2, padding=torch.arange(60) < torch.tensor([[60], [45]]), seed=s) for s in range(2)]

    def errors():
        total = torch.zeros(HEADS, dtype=torch.float64)
        for x in batches:
            for b in range(2):
                row = [t[b : b + 1][:, :, x.token_mask[b]] for t in (x.query, x.key, x.value)]
                exact = F.scaled_dot_product_attention(*row)
                total += (module(AttentionInputs(*row, scaling=DIM**-0.5))[0] - exact).square().sum((0, 2, 3))
        return total

    before, start = errors(), module.global_tokens.detach().clone()
    module.calibrate(batches)
    after = errors()
    assert (after <= before + 1e-6).all()
    assert (after < 0.95 * before).any()
    unchanged = (module.global_tokens == start).flatten(1).all(-1)
    assert torch.equal(after[unchanged], before[unchanged])


@pytest.mark.parametrize(
    ("options", "is_causal", "message"),
    [
        ({"block_size": 0}, False, "block_size=0; allowed: an integer of at least 1"),
        ({"num_window_blocks": 4}, False, "num_window_blocks=4; allowed: an odd integer"),
        ({"num_random_blocks": -1}, True, "num_random_blocks=-1; allowed: an integer of at least 0"),
        ({"seed": "0"}, True, "seed='0'; allowed: an integer of at least 0"),
        ({"form": "full"}, False, "form='full'; allowed: itc, etc"),
        (
            {"form": "etc", "num_global_tokens": 0},
            False,
            "num_global_tokens=0; allowed: an integer of at least 1, or None",
        ),
        ({"num_global_tokens": 8}, False, "num_global_tokens=8; allowed: None with form='itc'"),
        ({"form": "etc_traveling"}, True, "form='etc_traveling' is for encoders.*Allowed here: form='itc'"),
        ({"form": "etc"}, True, "form='etc' is for encoders.*Allowed here: form='itc'"),
        ({"window": 3}, False, "Unknown option.*'window'.*Allowed: block_size"),
    ],
)
def test_bad_options_are_named(options, is_causal, message):
    with pytest.raises(ValueError, match=message):
        layer(is_causal, **options)
