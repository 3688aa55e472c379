"""Reformer against a dense float64 evaluation written from its definition; starts, options, decode state."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.config import LayerConfig
from hf_linear_attn.testing import LAWS, check_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.reformer import ReformerAttention, ReformerConfig
from tests.planted import found_by

HEADS, DIM = 2, 6


def build(is_causal=False, dtype=torch.float64, max_length=512, dim=DIM, **options):
    return ReformerAttention(ReformerConfig(**options), LayerContext(0, 2, 12, HEADS, dim, max_length, is_causal)).to(
        dtype
    )


def draw(length, is_causal=False, padding=None, dtype=torch.float64, seed=0, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, HEADS, length, dim, generator=generator, dtype=dtype) for _ in range(3))
    return AttentionInputs(q * 2, k, v, padding, is_causal, dim**-0.5)


def bucket(x, rotations):
    scores = torch.cat([x @ rotations, -(x @ rotations)])
    return int(scores.argmax()) if len(scores) else 0


def keys_seen(module, q, k, h, chunk, is_causal):
    """Ranks of the keys that each query of head h sees; q and k `[T, D]` are one sequence without padding."""
    n = len(k)
    seen = [set() for _ in range(n)]
    for r in range(module.rotations.shape[2]):
        rotations = module.rotations[h, :, r].to(k.dtype)
        if module.config.share_qk:
            q_bucket = k_bucket = [bucket(x, rotations) for x in k]
        else:
            q_bucket = [bucket((x - module.query_mean[h]) @ module.query_map[h], rotations) for x in q]
            k_bucket = [bucket((x - module.key_mean[h]) @ module.key_map[h], rotations) for x in k]
        ordered = sorted(range(n), key=lambda j: (k_bucket[j], j))
        for i in range(n):
            if is_causal:  # chunks of the bucket, cut from its first key on: the one begun last and the one before
                before = [j for j in range(i) if k_bucket[j] == q_bucket[i]]
                seen[i] |= set(before[max(0, len(before) // chunk - 1) * chunk :])
            else:
                before = sum((k_bucket[j], j) < (q_bucket[i], i) for j in range(n))
                own = min(before, n - 1) // chunk
                seen[i] |= set(ordered[max(0, own - 1) * chunk : (own + 1) * chunk])
    if is_causal:
        for i in range(n):
            seen[i] |= set(range(max(0, i // chunk - 1) * chunk, i + 1))
    return [sorted(x) for x in seen]


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("share_qk", [False, True])
@pytest.mark.parametrize(("chunk", "rounds", "buckets"), [(4, 3, 6), (8, 1, 2), (3, 2, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_dense_formula(is_causal, share_qk, chunk, rounds, buckets, padded):
    module = build(is_causal, chunk_size=chunk, num_hashes=rounds, num_buckets=buckets, share_qk=share_qk)
    if not share_qk:  # as after calibration
        generator = torch.Generator().manual_seed(3)
        for x in (module.query_mean, module.key_mean, module.query_map, module.key_map):
            x += torch.randn(x.shape, generator=generator) * 0.3
    real = torch.rand(2, 29, generator=torch.Generator().manual_seed(1)) < (0.7 if padded else 2)
    inputs = draw(29, is_causal, real if padded else None)
    output = module(inputs)[0]
    for b in range(2):
        for h in range(HEADS):
            q, k, v = (x[b, h][real[b]] for x in (inputs.query, inputs.key, inputs.value))
            for i, keys in enumerate(keys_seen(module, q, k, h, chunk, is_causal)):
                if share_qk:
                    others = [j for j in keys if j != i] or [i]
                    logits, keys = F.normalize(k[others], dim=-1) @ k[i], others
                else:
                    logits = k[keys] @ q[i] * DIM**-0.5
                torch.testing.assert_close(output[b, h][real[b]][i], logits.softmax(0) @ v[keys])


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_one_chunk_is_softmax(is_causal):
    inputs = draw(40, is_causal, dtype=torch.float32)
    exact = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=is_causal)
    module = build(is_causal, torch.float32, chunk_size=40)
    torch.testing.assert_close(module(inputs)[0], exact, rtol=1e-5, atol=1e-5)
    # Also where several chunks and rounds together show everything.
    many = build(is_causal, torch.float32, chunk_size=19, num_hashes=32, num_buckets=2)
    torch.testing.assert_close(many(inputs)[0], exact, rtol=1e-5, atol=1e-5)


def test_the_chunks_of_a_bucket_do_not_depend_on_what_follows():
    """Chunks of the sorted whole would: one token more moves every boundary after it."""
    module = build(True, chunk_size=2, num_hashes=3, num_buckets=4)
    inputs = draw(60, True)
    whole = module(inputs)[0]
    for length in (1, 9, 30, 59):
        start = AttentionInputs(
            *(x[:, :, :length] for x in (inputs.query, inputs.key, inputs.value)), None, True, DIM**-0.5
        )
        torch.testing.assert_close(module(start)[0], whole[:, :, :length])


SLOW = {"causality", "compile_full_graph", "linear_memory", "exact_limit"}


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_shared_queries_and_keys_keep_the_contract(is_causal):
    """All laws but that a row changes with its own token: the second one sees the first alone. Causality is above."""
    laws = [name for name in LAWS if name not in SLOW]
    assert check_variant("reformer", is_causal, laws=laws, share_qk=True, chunk_size=8, num_hashes=2) == []


def test_shared_queries_and_keys_are_causal():
    module = build(True, chunk_size=2, num_hashes=2, num_buckets=4, share_qk=True)
    inputs = draw(40, True)
    before = module(inputs)[0]
    for token in (1, 17, 39):
        changed = draw(40, True)
        changed.key[:, :, token:] += 3
        changed.value[:, :, token:] += 3
        torch.testing.assert_close(module(changed)[0][:, :, :token], before[:, :, :token])


def test_shared_queries_and_keys_attend_to_themselves_only_when_alone():
    inputs = draw(1, True)
    torch.testing.assert_close(build(True, share_qk=True)(inputs)[0], inputs.value)
    inputs = draw(2, True)
    torch.testing.assert_close(build(True, share_qk=True)(inputs)[0], inputs.value[:, :, :1].expand(-1, -1, 2, -1))


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_calibration_makes_no_head_worse_and_helps_off_center_keys(is_causal):
    """Keys far from 0 fall into one bucket: the hash tells them apart once they are centered."""
    inputs = draw(256, is_causal, dtype=torch.float32, dim=16)
    inputs.query, inputs.key = inputs.query * 2, inputs.key + 6
    exact = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=is_causal)
    module = build(is_causal, torch.float32, dim=16, chunk_size=8, num_hashes=4, num_buckets=16)

    def errors():
        return (module(inputs)[0] - exact).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))

    published = errors()
    module.calibrate([inputs])
    assert (errors() <= published + 1e-5).all()
    assert errors().mean() < 0.85 * published.mean()


def test_directions_are_saved_and_follow_seed_and_layer():
    first, again, other = build(), build(), build(seed=1)
    assert torch.equal(first.rotations, again.rotations)
    assert not torch.equal(first.rotations, other.rotations)
    assert "rotations" in first.state_dict()


@pytest.mark.parametrize(
    ("max_length", "chunk", "buckets"), [(512, 64, 4), (2048, 64, 16), (512, 16, 16), (100, 128, 4)]
)
def test_none_is_buckets_by_the_length_of_the_model(max_length, chunk, buckets):
    """What layers that were saved with this default are made of."""
    module = build(max_length=max_length, chunk_size=chunk, num_buckets=None)
    assert module.rotations.shape[-1] == buckets // 2


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize(
    ("length", "least"), [(2048, 0.95), (8192, 0.9), pytest.param(32768, 0.8, marks=pytest.mark.heavy)]
)
def test_finds_near_copies_far_away_at_any_length(length, least, is_causal):
    """16 buckets find half of them at 2,048 tokens on encoders, and 1 in 100 at 8,192."""
    assert found_by("reformer", length, is_causal) >= least


def test_a_short_input_to_a_long_model_is_hashed_by_its_own_length():
    for is_causal in (False, True):
        assert found_by("reformer", 1024, is_causal, max_length=32768) >= 0.9


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("share_qk", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_buckets_grow_with_the_tokens(is_causal, share_qk, padded):
    """Chunks of 2, 2 rounds: 8 tokens whole, then 8 buckets, 16, 32 and 64 from 24, 48 and 96 on, by the formula."""
    module = build(is_causal, max_length=200, chunk_size=2, num_hashes=2, share_qk=share_qk)
    real = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)) < 2
    if padded:
        real[0, ::2], real[1, 140:] = False, False
    inputs = draw(150, is_causal, real if padded else None)
    output = module(inputs)[0]
    for b in range(2):
        q, k, v = (x[b, 0][real[b]] for x in (inputs.query, inputs.key, inputs.value))
        for i in range(len(k)):
            level = sum((i if is_causal else len(k)) >= start for start in (24, 48, 96))
            keys = growing_keys_seen(module, q, k, i, 2, 8 << level, is_causal)
            if (i if is_causal else len(k)) <= 8:
                keys = list(range(i + 1 if is_causal else len(k)))
            if share_qk:
                others = [j for j in keys if j != i] or [i]
                logits, keys = F.normalize(k[others], dim=-1) @ k[i], others
            else:
                logits = k[keys] @ q[i] * DIM**-0.5
            torch.testing.assert_close(output[b, 0][real[b]][i], logits.softmax(0) @ v[keys])


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("share_qk", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_as_many_tokens_as_the_rounds_show_are_read_whole(is_causal, share_qk, padded):
    """2 rounds of 2 chunks of 4: 16 tokens, alone or in a batch with longer rows, gradients included."""
    module = build(is_causal, chunk_size=4, num_hashes=2, share_qk=share_qk)
    inputs = draw(60 if padded else 16, is_causal)
    real = torch.ones(2, inputs.key.shape[2], dtype=torch.bool)
    if padded:
        real[0] = torch.arange(60) % 4 == 1  # 15 tokens
        inputs.token_mask = real
    leaves = [inputs.query.requires_grad_(), inputs.key.requires_grad_(), inputs.value.requires_grad_()]
    output = module(inputs)[0]
    for b in range(1 if padded else 2):
        q, k, v = (x[b][:, real[b]] for x in leaves)
        if share_qk:
            q, k = k, F.normalize(k, dim=-1) * DIM**0.5
        logits, n = q @ k.mT * DIM**-0.5, k.shape[1]
        if share_qk:
            logits = logits - 1e5 * torch.eye(n, dtype=torch.float64)
        if is_causal:
            logits = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        expected, found = logits.softmax(-1) @ v, output[b][:, real[b]]
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(x.sin().sum(), leaves[share_qk:], retain_graph=True) for x in (found, expected)]
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x[b], y[b])


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_calibration_on_short_texts_still_chooses_hashes(is_causal):
    """They are read whole, where no start is better than another; longer inputs are hashed."""
    inputs = draw(100, is_causal, dtype=torch.float32, dim=16)
    inputs.query, inputs.key = inputs.query * 2, inputs.key + 6
    module = build(is_causal, torch.float32, dim=16, chunk_size=8, num_hashes=8)
    exact = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=is_causal)
    torch.testing.assert_close(module(inputs)[0], exact)
    module.calibrate([inputs])
    torch.testing.assert_close(module(inputs)[0], exact)
    assert module.key_mean.abs().max() > 1


def growing_keys_seen(module, q, k, i, chunk, buckets, is_causal):
    """Ranks of the keys that query i of head 0 sees among so many buckets."""
    seen = set(range(max(0, i // chunk - 1) * chunk, i + 1)) if is_causal else set()
    for r in range(module.rotations.shape[2]):
        rotations = module.rotations[0, :, r, : buckets // 2].double()
        k_bucket = [bucket(x, rotations) for x in k]
        own = k_bucket[i] if module.config.share_qk else bucket(q[i], rotations)
        if is_causal:
            before = [j for j in range(i) if k_bucket[j] == own]
            seen |= set(before[max(0, len(before) // chunk - 1) * chunk :])
            continue
        ordered = sorted(range(len(k)), key=lambda j: (k_bucket[j], j))
        first, size = sum(x < own for x in k_bucket), k_bucket.count(own)
        reach = min(size // 2, chunk)
        place = first + sum(x == own and j < i for j, x in enumerate(k_bucket))
        middle = min(max(place, first + reach), first + size - reach)
        last = (len(k) - 1) // chunk
        end = min(max(1, (middle + chunk // 2) // chunk), last)  # the second of the two chunks
        seen |= set(ordered[max(0, end - 1) * chunk : (end + 1) * chunk])
    return sorted(seen)


def test_every_split_into_calls_gives_the_same_result_as_buckets_grow():
    """Prompt, pieces and single tokens, over three changes of the number of buckets and for rows of other lengths."""
    module = build(True, max_length=300, chunk_size=2, num_hashes=2)
    real = torch.ones(2, 180, dtype=torch.bool)
    real[0, :41] = False  # rows begin a level at different steps
    inputs = draw(180, True, real)
    whole = module(inputs)[0].masked_fill(~real[:, None, :, None], 0)
    for cuts in (
        [3, *range(4, 20), 46, *range(47, 61), 180],
        [60, *range(61, 181)],
        [45, 46, 100, 101, 180],
        [100, *range(101, 140), 180],
    ):
        state, parts, start = module.init_state(2, torch.float64, torch.device("cpu")), [], 0
        for stop in cuts:
            call = AttentionInputs(
                *(x[:, :, start:stop] for x in (inputs.query, inputs.key, inputs.value)),
                real[:, start:stop] if start < 41 else None,
                True,
                DIM**-0.5,
            )
            out, state = module(call, state)
            parts.append(out)
            start = stop
        joined = torch.cat(parts, 2).masked_fill(~real[:, None, :, None], 0)
        torch.testing.assert_close(joined, whole)


def test_a_saved_default_of_earlier_versions_computes_what_it_did():
    """Files of earlier versions hold `num_buckets: null`."""
    old = {"num_hashes": 2, "num_buckets": None, "chunk_size": 8, "share_qk": False, "seed": 0}
    options = LayerConfig("reformer", old).to_dict()["options"]
    assert options == old
    module = build(max_length=512, **options)
    explicit = build(max_length=512, **{**options, "num_buckets": 16})
    explicit.load_state_dict(module.state_dict())
    inputs = draw(400)
    assert torch.equal(module(inputs)[0], explicit(inputs)[0])
    h, n = 0, 400
    for i, keys in list(enumerate(keys_seen(module, inputs.query[0, h], inputs.key[0, h], h, 8, False)))[:n:40]:
        logits = inputs.key[0, h][keys] @ inputs.query[0, h, i] * DIM**-0.5
        torch.testing.assert_close(module(inputs)[0][0, h, i], logits.softmax(0) @ inputs.value[0, h][keys])


def test_the_decode_state_holds_keys_values_and_buckets():
    """Tokens of a prompt, those after it one by one, and the last two chunks of each of 4 buckets."""
    module = build(True, num_hashes=3, chunk_size=5, num_buckets=4)
    state = module(draw(9, True), module.init_state(2, torch.float64, torch.device("cpu")))[1]
    for _ in range(2):
        state = module(draw(1, True), state)[1]
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        **dict.fromkeys(("key", "value"), (2, HEADS, 9, DIM)),
        **{f"recent_{name}": (2, HEADS, 2, DIM) for name in ("key", "value")},
        "bucket": (2, HEADS, 9, 3),
        "recent_bucket": (2, HEADS, 2, 3),
        "count": (2,),
        "filled": (2, HEADS, 3, 4),
        "member": (2, HEADS, 3, 4, 10),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hashes": 0}, "num_hashes=0; allowed: an integer of at least 1."),
        ({"chunk_size": 2.5}, "chunk_size=2.5; allowed"),
        ({"seed": -1}, "seed=-1; allowed: an integer of at least 0"),
        ({"num_buckets": 7}, 'num_buckets=7; allowed: None, "length", 1 or an even integer of at least 2'),
        ({"num_buckets": True}, "num_buckets=True; allowed"),
        ({"num_buckets": "many"}, "num_buckets='many'; allowed: length"),
        ({"share_qk": 1}, "share_qk=1; allowed: True or False"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ReformerConfig.from_dict(options)
