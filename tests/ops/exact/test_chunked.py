"""Chunked softmax attention: exact in outputs and gradients, and never an n x n tensor."""

import pytest
import torch

from hf_linear_attn.ops.exact.chunked import chunked_softmax_attention
from hf_linear_attn.testing.tools import AllocationRecorder

F64 = torch.float64


def draw(q_len, k_len, dtype=F64, scale=1.0):
    g = torch.Generator().manual_seed(q_len)
    q = torch.randn(2, 3, q_len, 8, generator=g, dtype=F64) * scale
    k, v = torch.randn(2, 2, 3, k_len, 8, generator=g, dtype=F64)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def dense(q, k, v, padding=None, causal=False, scaling=0.3):
    logits = q @ k.mT * scaling
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(k.shape[2] - q.shape[2])
    if padding is not None:
        allowed = allowed & padding[:, None, None]
    # Gradients pass through rows with a key only; the others are 0.
    empty = ~allowed.any(-1, keepdim=True)
    weights = logits.masked_fill(~allowed & ~empty, -torch.inf).softmax(-1)
    return (weights @ v).masked_fill(empty, 0)


def padding_of(k_len):
    padding = torch.rand(2, k_len, generator=torch.Generator().manual_seed(k_len)) < 0.6
    padding[0, : k_len // 3] = False
    return padding


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("chunk_size", [1, 16, 50, None])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (37, 37), (5, 37), (64, 64)])
def test_outputs_and_gradients_are_those_of_softmax(q_len, k_len, chunk_size, causal, padded):
    q, k, v = draw(q_len, k_len)
    padding = padding_of(k_len) if padded else None
    given = {"token_mask": padding, "is_causal": causal, "scaling": 0.3, "chunk_size": chunk_size}
    output, expected = chunked_softmax_attention(q, k, v, **given), dense(q, k, v, padding, causal)
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(output)
    found = torch.autograd.grad(output, (q, k, v), gradient)
    for actual, wanted in zip(found, torch.autograd.grad(expected, (q, k, v), gradient), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_more_queries_than_keys():
    q, k, v = draw(40, 10)
    output = chunked_softmax_attention(q, k, v, is_causal=False, scaling=0.3, chunk_size=8)
    torch.testing.assert_close(output, dense(q, k, v))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_gradcheck(causal):
    padding = padding_of(9)

    def run(q, k, v):
        given = {"token_mask": padding, "is_causal": causal, "scaling": 0.3, "chunk_size": 4}
        return chunked_softmax_attention(q, k, v, **given)

    assert torch.autograd.gradcheck(run, draw(9, 9), fast_mode=True)


def test_logits_of_any_size_are_exact():
    q, k, v = draw(70, 70, scale=1e3)
    given = {"is_causal": True, "scaling": 0.3, "chunk_size": 16}
    output = chunked_softmax_attention(q, k, v, **given)
    torch.testing.assert_close(output, dense(q, k, v, causal=True))


def test_padded_keys_have_no_effect_be_they_nan():
    q, k, v = (x.detach() for x in draw(40, 40))
    padding = padding_of(40)
    given = {"token_mask": padding, "is_causal": True, "scaling": 0.3, "chunk_size": 16}
    expected = chunked_softmax_attention(q, k, v, **given)
    pads = ~padding[:, None, :, None]
    k, v = k.masked_fill(pads, torch.nan).requires_grad_(), v.masked_fill(pads, torch.inf).requires_grad_()
    output = chunked_softmax_attention(q, k, v, **given)
    assert torch.equal(output, expected)
    assert not output[0, :, :13].any()  # rows before the first real token
    output.sum().backward()
    assert k.grad.isfinite().all()
    assert not v.grad.masked_select(pads).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(dtype):
    q, k, v = (x.detach() for x in draw(100, 100, dtype))
    given = {"is_causal": True, "scaling": 0.3, "chunk_size": 32}
    with torch.autocast("cpu", dtype=dtype):
        output = chunked_softmax_attention(q, k, v, **given)
    assert output.dtype == dtype
    torch.testing.assert_close(output, dense(q.double(), k.double(), v.double(), causal=True).to(dtype))


def test_memory_is_that_of_chunks_in_both_directions():
    """Rabe and Staats' claim: nothing n x n, and beside tensors of the inputs' size only chunk x chunk ones."""
    n, chunk = 2048, 64
    q, k, v = (torch.randn(1, 1, n, 4, requires_grad=True) for _ in range(3))
    with AllocationRecorder() as recorder:
        output = chunked_softmax_attention(q, k, v, is_causal=True, scaling=0.5, chunk_size=chunk)
        output.sum().backward()
    assert max(size for _, size in recorder.seen) <= max(n * 4, chunk * chunk)


def test_bad_calls_say_so():
    q, k, v = draw(9, 5)
    with pytest.raises(ValueError, match="Tq=9 and Tk=5"):
        chunked_softmax_attention(q, k, v, is_causal=True, scaling=1.0)
    with pytest.raises(ValueError, match="chunk_size must be None or an int >= 1, got 0"):
        chunked_softmax_attention(q, k, v, is_causal=False, scaling=1.0, chunk_size=0)
