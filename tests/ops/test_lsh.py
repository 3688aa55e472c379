"""LSH attention: hashes, what is visible, and the blocked form against the dense one, gradients included."""

import pytest
import torch

from hf_linear_attn.ops.lsh import hash_buckets, interval_attention, naive_interval_attention, visible


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
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("q_len", "k_len", "chunk_size", "buckets", "rounds"), CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_equal_the_dense_form(is_causal, share, q_len, k_len, chunk_size, buckets, rounds, padded):
    q, k, v = draw(q_len, k_len)
    q = k[:, :, k_len - q_len :].clone() if share else q
    given = rotations(buckets, rounds)
    real = torch.arange(k_len) >= torch.tensor([[k_len // 3], [k_len]]) if padded else torch.ones(1, k_len).bool()
    where = visible(hash_buckets(q, given), hash_buckets(k, given), real, chunk_size, is_causal=is_causal)
    results = []
    for function in (interval_attention, naive_interval_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = function(*leaves, where, scaling=0.7, self_penalty=share)
        output.sin().sum().backward()
        results.append([output.detach(), *(x.grad for x in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rounds", [1, 4, 32])
def test_rounds_that_show_the_same_keys_count_them_once(rounds):
    """With as many rounds as we like, a key shown by all of them weighs as much as one shown by a single round."""
    q, k, v = draw(40, 40)
    given = rotations(2, rounds)
    real = torch.ones(1, 40, dtype=torch.bool)
    where = visible(hash_buckets(q, given), hash_buckets(k, given), real, 16, is_causal=False)
    places = where.order.argsort(-1)
    seen = [
        (places[:, r, None] >= where.low[:, r, :, None]) & (places[:, r, None] < where.high[:, r, :, None])
        for r in range(rounds)
    ]
    union = torch.stack(seen).any(0).unflatten(0, (2, 2))
    expected = (q @ k.mT).masked_fill(~union, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(interval_attention(q, k, v, where, scaling=1.0), expected)


def test_all_queries_may_want_the_same_chunk():
    q, k, v = draw(64, 64)
    q = q[:, :, :1].expand(-1, -1, 64, -1).contiguous()
    given = rotations(8, 2)
    real = torch.ones(1, 64, dtype=torch.bool)
    where = visible(hash_buckets(q, given), hash_buckets(k, given), real, 4, is_causal=False)
    actual = interval_attention(q, k, v, where, scaling=1.0)
    torch.testing.assert_close(actual, naive_interval_attention(q, k, v, where, scaling=1.0))
