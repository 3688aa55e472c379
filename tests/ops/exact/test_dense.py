"""Attention in chunks of queries."""

import pytest
import torch

from hf_linear_attn.ops.base.compaction import compact
from hf_linear_attn.ops.exact.dense import attend_in_chunks, masked_softmax


@pytest.mark.parametrize("is_causal", [False, True])
def test_chunks_of_queries_change_nothing(is_causal, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (9, 11, 11))
    call = compact(q, k, v, None)
    largest = []

    def weights(rows, allowed):
        logits = call.q[:, :, rows] @ call.k.mT
        largest.append(logits.shape[2])
        return masked_softmax(logits, allowed)

    whole = attend_in_chunks(call, weights, is_causal=is_causal)
    assert largest == [9]
    monkeypatch.setattr("hf_linear_attn.ops.exact.dense.CPU_CHUNK_ELEMENTS", 2 * 3 * 11 * 4)
    torch.testing.assert_close(attend_in_chunks(call, weights, is_causal=is_causal), whole)
    assert largest[1:] == [4, 4, 1]
    mask = torch.ones(9, 11, dtype=torch.bool).tril(2) if is_causal else None
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    torch.testing.assert_close(whole, exact)
