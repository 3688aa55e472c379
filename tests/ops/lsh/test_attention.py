"""LSH attention: hashes, what is visible, and the blocked form against the dense one, gradients included."""

import pytest
import torch

from hf_linear_attn.ops.base import pieces
from hf_linear_attn.ops.lsh import blocks as chunk_attention
from hf_linear_attn.ops.lsh.attention import hash_buckets, naive_round_attention, round_attention, visible


def draw(q_len, k_len, heads=2, dim=5):
    generator = torch.Generator().manual_seed(k_len)
    k, v = (torch.randn(2, heads, k_len, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.randn(2, heads, q_len, dim, generator=generator, dtype=torch.float64), k, v


def rotations(buckets, rounds, heads=2, dim=5):
    return torch.randn(heads, dim, rounds, buckets // 2, generator=torch.Generator().manual_seed(1))


def test_a_bucket_is_the_nearest_of_the_directions_and_their_opposites():
    x, given = draw(9, 9)[1], rotations(6, 3)
    found = hash_buckets(x, given)
    assert found.shape == (2, 2, 9, 3)
    for head in range(2):
        for number in range(3):
            directions = torch.cat([given[head, :, number], -given[head, :, number]], -1).double()
            assert torch.equal(found[:, head, :, number], (x[:, head] @ directions).argmax(-1))
    torch.testing.assert_close(hash_buckets(-x, given), (found + 3) % 6)


def test_hashes_are_of_full_precision_under_autocast():
    x, given = draw(200, 200)[1].float(), rotations(16, 4)
    expected = hash_buckets(x, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hash_buckets(x, given), expected)


def test_no_direction_is_a_single_bucket():
    assert (hash_buckets(draw(4, 4)[1], rotations(1, 2)) == 0).all()


CASES = [
    (50, 50, 8, 8, 3),
    (17, 50, 8, 4, 2),
    (1, 30, 4, 2, 2),
    (7, 7, 64, 6, 4),
    (64, 64, 8, 1, 1),
    (33, 33, 16, 4, 5),
    (300, 300, 40, 4, 2),
]


def where_to_look(q, k, given, real, chunk_size, is_causal):
    buckets = max(1, 2 * given.shape[3])
    return visible(hash_buckets(q, given), hash_buckets(k, given), real, chunk_size, buckets, is_causal=is_causal)


def outcome(function, leaves, *args, **options):
    """Output and gradients."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    output = function(*leaves, *args, **options)
    output.sin().sum().backward()
    return [output.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("q_len", "k_len", "chunk_size", "buckets", "rounds"), CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_equal_the_dense_form(is_causal, share, q_len, k_len, chunk_size, buckets, rounds, padded):
    q, k, v = draw(q_len, k_len)
    q = k[:, :, k_len - q_len :].clone() if share else q
    real = torch.arange(k_len) >= torch.tensor([[k_len // 3], [k_len]]) if padded else None
    where = where_to_look(q, k, rotations(buckets, rounds), real, chunk_size, is_causal)
    results = [
        outcome(function, (q, k, v), where, scaling=0.7, self_penalty=share)
        for function in (round_attention, naive_round_attention)
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("group", [1, 1 << 20])
def test_kernels_matmuls_and_groups_agree(is_causal, fused, group, monkeypatch):
    monkeypatch.setattr(pieces, "serves", lambda q, v: fused)
    monkeypatch.setattr(chunk_attention, "GROUP_ELEMENTS", group)
    monkeypatch.setattr(chunk_attention, "HEAD_ELEMENTS", 1500 * group)  # 1 or 2 of 4 heads at a time, or all
    q, k, v = draw(90, 90)
    real = torch.arange(90) >= torch.tensor([[7], [0]])
    where = where_to_look(q, k, rotations(6, 3), real, 8, is_causal)
    expected = outcome(naive_round_attention, (q, k, v), where, scaling=0.7)

    for actual, wanted in zip(outcome(round_attention, (q, k, v), where, scaling=0.7), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("length", [33, 64])
def test_the_round_by_position_gathers_nothing_and_is_the_same(length):
    q, k, v = draw(length, length)
    given = rotations(4, 2)
    results = []
    for real in (None, torch.ones(1, length, dtype=torch.bool)):
        where = where_to_look(q, k, given, real, 8, True)
        assert where.by_position == (real is None)
        results.append(outcome(round_attention, (q, k, v), where, scaling=1.0))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_values_may_have_a_width_of_their_own():
    q, k, v = draw(40, 40)
    where = where_to_look(q, k, rotations(4, 2), None, 8, False)
    v = torch.cat([v, v[..., :2]], -1)
    actual = outcome(round_attention, (q, k, v), where, scaling=1.0)
    for x, y in zip(actual, outcome(naive_round_attention, (q, k, v), where, scaling=1.0), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("chunks", [200, 300])
def test_many_chunks_are_told_apart(chunks):
    """Above 255 of them their numbers no longer fit a byte."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2 * chunks, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    where = where_to_look(q, k, rotations(4, 3, heads=1, dim=4), None, 2, False)
    actual = round_attention(q, k, v, where, scaling=1.0)
    torch.testing.assert_close(actual, naive_round_attention(q, k, v, where, scaling=1.0))


@pytest.mark.parametrize("rounds", [1, 4, 32])
def test_rounds_that_show_the_same_keys_count_them_once(rounds):
    """With as many rounds as we like, a key shown by all of them weighs as much as one shown by a single round."""
    q, k, v = draw(40, 40)
    where = where_to_look(q, k, rotations(2, rounds), None, 16, False)
    distance = where.q_chunk[..., None] - where.k_chunk[..., None, :]
    union = ((distance == 0) | (distance == 1)).any(0).unflatten(0, (2, 2))
    expected = (q @ k.mT).masked_fill(~union, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(round_attention(q, k, v, where, scaling=1.0), expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_all_queries_may_want_the_same_chunk(is_causal):
    q, k, v = draw(64, 64)
    q = q[:, :, :1].expand(-1, -1, 64, -1).contiguous()
    where = where_to_look(q, k, rotations(8, 2), None, 4, is_causal)
    actual = round_attention(q, k, v, where, scaling=1.0)
    torch.testing.assert_close(actual, naive_round_attention(q, k, v, where, scaling=1.0))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "chunk_size"), [(256, 64), (201, 64), (50, 8)])
def test_queries_with_the_buckets_of_their_keys_take_the_order_of_the_keys(is_causal, length, chunk_size):
    q, k, v = draw(length, length)
    bucket = hash_buckets(k, rotations(6, 3))
    results = []
    for of_queries in (bucket, bucket.clone()):
        where = visible(of_queries, bucket, None, chunk_size, 6, is_causal=is_causal)
        assert where.same == (of_queries is bucket)
        for function in (round_attention, naive_round_attention):
            results.append(outcome(function, (q, k, v), where, scaling=0.7, self_penalty=True))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("num_chunks", "k_len", "of_positions", "kind"),
    [
        (255, 9000, False, torch.uint8),
        (256, 9000, False, torch.int16),
        (20, 16383, True, torch.int16),
        (20, 16384, True, torch.int32),
    ],
)
def test_distances_of_chunks_are_told_apart_in_their_type(num_chunks, k_len, of_positions, kind):
    assert chunk_attention._kind(num_chunks, k_len, of_positions) == kind
    chunks = torch.arange(1, num_chunks)
    distance = chunks[:, None] - chunks
    found = chunk_attention._distance(chunks[:, None].to(kind), chunks.to(kind))
    assert torch.equal((found >= 0) & (found <= 1), (distance == 0) | (distance == 1))
    assert (found >= 0).all()
