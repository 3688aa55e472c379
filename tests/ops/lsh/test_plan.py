"""How rounds are cut into blocks: many queries of one chunk, and the order of the keys for queries."""

import pytest
import torch

from hf_linear_attn.ops.lsh.attention import hash_buckets, naive_round_attention, round_attention, visible
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
