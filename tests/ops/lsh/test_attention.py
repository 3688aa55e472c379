"""LSH attention: hashes, what is visible, and rounds against the dense form, gradients included."""

import pytest
import torch

from hf_linear_attn.ops.lsh.attention import hash_buckets, naive_round_attention, round_attention
from tests.ops.lsh.calls import draw, outcome, rotations, where_to_look


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


@pytest.mark.parametrize("rounds", [1, 4, 32])
def test_rounds_that_show_the_same_keys_count_them_once(rounds):
    """With as many rounds as we like, a key shown by all of them weighs as much as one shown by a single round."""
    q, k, v = draw(40, 40)
    where = where_to_look(q, k, rotations(2, rounds), None, 16, False)
    distance = where.q_chunk[..., None] - where.k_chunk[..., None, :]
    union = ((distance == 0) | (distance == 1)).any(0).unflatten(0, (2, 2))
    expected = (q @ k.mT).masked_fill(~union, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(round_attention(q, k, v, where, scaling=1.0), expected)
