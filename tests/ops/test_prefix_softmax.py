"""Feature-wise softmax over positions: the linear forms against the dense formula."""

import pytest
import torch

from hf_linear_attn.ops import prefix_softmax
from hf_linear_attn.ops.prefix_softmax import (
    init_prefix_softmax_state,
    naive_prefix_softmax,
    prefix_softmax_attention,
)


def draw(length, *, features=5, dim=4, scale=1.0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 3, length, features, generator=g, dtype=dtype).softmax(-1)
    logits = torch.randn(2, 3, length, features, generator=g, dtype=dtype) * scale
    return a, logits, torch.randn(2, 3, length, dim, generator=g, dtype=dtype)


def dense(a, logits, v, causal):
    """One query per feature, in plain loops."""
    out = torch.zeros_like(v)
    for i in range(v.shape[2]):
        last = i + 1 if causal else v.shape[2]
        weights = logits[:, :, :last].softmax(2)
        out[:, :, i] = torch.einsum("bhf,bhjf,bhjd->bhd", a[:, :, i], weights, v[:, :, :last])
    return out


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("length", [1, 7, 8, 65, 130])
def test_is_the_dense_formula(length, causal):
    a, logits, v = draw(length, scale=3)
    expected = dense(a, logits, v, causal)
    torch.testing.assert_close(naive_prefix_softmax(a, logits, v, is_causal=causal), expected)
    output, state = prefix_softmax_attention(a, logits, v, is_causal=causal)
    assert state is None
    torch.testing.assert_close(output, expected)


def test_blocks_do_not_show(monkeypatch):
    a, logits, v = draw(100)
    expected = prefix_softmax_attention(a, logits, v, is_causal=True)[0]
    for form in (False, True):  # with a backward pass of its own, and as torch.compile traces it
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda form=form: form)
        torch.testing.assert_close(prefix_softmax_attention(a, logits, v, is_causal=True)[0], expected)
    monkeypatch.setattr(prefix_softmax, "_BLOCK", 24)
    torch.testing.assert_close(prefix_softmax_attention(a, logits, v, is_causal=True)[0], expected)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_padding_and_fewer_queries(causal):
    a, logits, v = draw(40)
    padding = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) > 0.4
    padding[1, :20] = False
    expected = naive_prefix_softmax(a, logits, v, key_padding=padding, is_causal=causal)
    output = prefix_softmax_attention(a, logits, v, key_padding=padding, is_causal=causal)[0]
    torch.testing.assert_close(output, expected)
    assert (output[1, :, :20] == 0).all() == causal
    some = prefix_softmax_attention(a[:, :, 29:], logits, v, key_padding=padding, is_causal=causal)[0]
    torch.testing.assert_close(some, expected[:, :, 29:])
    blind = prefix_softmax_attention(a, logits, v, key_padding=torch.zeros_like(padding), is_causal=causal)[0]
    assert (blind == 0).all()


def test_decoding_in_any_chunks():
    a, logits, v = draw(50, scale=5)
    expected = prefix_softmax_attention(a, logits, v, is_causal=True)[0]
    for sizes in ([1] * 50, [50], [33, 1, 16]):
        state, outputs, start = init_prefix_softmax_state(2, 3, 5, 4, v.dtype, v.device), [], 0
        for size in sizes:
            now = slice(start, start + size)
            output, state = prefix_softmax_attention(
                a[:, :, now], logits[:, :, now], v[:, :, now], is_causal=True, state=state
            )
            outputs.append(output)
            start += size
        torch.testing.assert_close(torch.cat(outputs, 2), expected)
    assert sum(x[0, 0].numel() for x in state.values()) == 5 * (4 + 2)


def test_huge_logits_neither_overflow_nor_reach_earlier_rows():
    a, logits, v = draw(60, dtype=torch.float32)
    before = prefix_softmax_attention(a, logits, v, is_causal=True)[0]
    logits[:, :, 30] += 1e4
    after = prefix_softmax_attention(a, logits, v, is_causal=True)[0]
    assert torch.equal(after[:, :, :30], before[:, :, :30])
    torch.testing.assert_close(after[:, :, 30:], v[:, :, 30:31].expand_as(after[:, :, 30:]))
    logits[:, :, 30] -= 2e4
    assert prefix_softmax_attention(a, logits, v, is_causal=True)[0].isfinite().all()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_gradients(causal):
    inputs = [x.requires_grad_() for x in draw(19)]
    padding = torch.arange(19).expand(2, -1) >= torch.tensor([[3], [0]])

    def run(a, logits, v):
        return prefix_softmax_attention(a, logits, v, key_padding=padding, is_causal=causal)[0]

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_calls_that_do_not_fit_are_errors():
    a, logits, v = draw(6)
    with pytest.raises(ValueError, match="got 6 > 5"):
        prefix_softmax_attention(a, logits[:, :, :5], v[:, :, :5], is_causal=True)
    state = init_prefix_softmax_state(2, 3, 5, 4, v.dtype, v.device)
    for rows, causal in ((a, False), (a[:, :, :2], True)):
        with pytest.raises(ValueError, match="decode state needs causal"):
            prefix_softmax_attention(rows, logits, v, is_causal=causal, state=state)
