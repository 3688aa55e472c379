"""How rounds are cut into blocks: many queries of one chunk, and the order of the keys for queries."""

import pytest
import torch

from hf_linear_attn.ops.lsh.attention import hash_buckets, naive_round_attention, round_attention, visible
from hf_linear_attn.ops.lsh.plan import plan_round
from tests.ops.lsh.calls import draw, outcome, rotations, where_to_look


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


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_empty_chunks_are_left_out_and_nothing_changes(share, padded):
    """A decoder's 16 buckets leave more chunks empty than they fill: a key stands where `place` says all the same."""
    q, k, v = draw(90, 90)
    q = k.clone() if share else q
    real = torch.arange(90) >= torch.tensor([[30], [0]]) if padded else None
    where = where_to_look(q, k, rotations(16, 2), real, 8, True)
    plan = plan_round(where.q_chunk[1], where.k_chunk[1], where.k_place[1], where.real, where.num_chunks, 8, False)
    held = (plan.key < 4 * 90).sum(-1)
    assert int(held[0]) == 0
    assert (held[1:] > 0).all()
    assert len(held) < 0.75 * 4 * where.num_chunks
    seen = where.real.flatten()
    assert torch.equal(plan.key.flatten()[plan.place[seen]], torch.arange(4 * 90)[seen])
    results = [
        outcome(function, (q, k, v), where, scaling=0.7, self_penalty=share)
        for function in (round_attention, naive_round_attention)
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
