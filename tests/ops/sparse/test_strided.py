"""The strided pattern and its columns against their dense forms."""

import pytest
import torch

from hf_linear_attn.ops.sparse import attention as block_sparse
from hf_linear_attn.ops.sparse.strided import column_attention, naive_strided_attention, strided_attention
from tests.ops.sparse.calls import DIM, HEADS, draw

STRIDED = pytest.mark.parametrize("stride", [1, 3, 8, 40])


SHAPES = pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (37, 37), (64, 64), (20, 37), (1, 37), (2, 37)])


@STRIDED
@SHAPES
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("segment", [1, 1 << 22])
def test_strided_equals_the_dense_form(stride, q_len, k_len, is_causal, segment, monkeypatch):
    monkeypatch.setattr(block_sparse, "SEGMENT_ELEMENTS", segment)
    q, k, v = (draw(2, HEADS, n, DIM, seed=s) for s, n in enumerate((q_len, k_len, k_len)))
    allowed = torch.arange(k_len) >= torch.tensor([[0], [min(5, k_len - 1)]])
    for mask in (None, allowed):
        given = {"stride": stride, "scaling": 0.7, "is_causal": is_causal, "key_allowed": mask}
        actual, expected = strided_attention(q, k, v, **given), naive_strided_attention(q, k, v, **given)
        seen = torch.ones(2, q_len, dtype=torch.bool) if mask is None else allowed[:, k_len - q_len :]
        torch.testing.assert_close(actual.transpose(1, 2)[seen], expected.transpose(1, 2)[seen])


@STRIDED
@SHAPES
@pytest.mark.parametrize("is_causal", [False, True])
def test_columns_of_the_stride(stride, q_len, k_len, is_causal):
    q, k, v = (draw(2, HEADS, n, DIM, seed=s) for s, n in enumerate((q_len, k_len, k_len)))
    distance = torch.arange(k_len - q_len, k_len)[:, None] - torch.arange(k_len)
    seen = (distance % stride == 0) & ((distance >= 0) | (not is_causal))
    logits = (q @ k.transpose(-1, -2) * 0.7).masked_fill(~seen, float("-inf"))
    actual = column_attention(q, k, v, stride=stride, scaling=0.7, is_causal=is_causal)
    torch.testing.assert_close(actual, logits.softmax(-1) @ v)
