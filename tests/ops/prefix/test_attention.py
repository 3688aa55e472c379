"""Feature-wise softmax over positions: the linear forms against the dense formula."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_linear_attn.ops.linear import layout
from hf_linear_attn.ops.prefix import attention as prefix_softmax
from hf_linear_attn.ops.prefix.attention import init_prefix_softmax_state, prefix_softmax_attention
from tests.ops.references import naive_prefix_softmax

CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


@pytest.fixture(params=["whole", "blocks"])
def form(request, monkeypatch):
    """Bidirectional calls as a whole or in blocks of 16 tokens; causal ones in one block or in such."""
    if request.param == "blocks":
        monkeypatch.setattr(layout, "_CPU_BLOCK_ROWS", 1)
        monkeypatch.setattr(layout, "_MIN_BLOCK", 16)
        monkeypatch.setattr(layout, "CHUNK", 4)
        monkeypatch.setattr(prefix_softmax, "_WHOLE", 0)


def draw(length, *, dim=4, value_dim=4, scale=1.0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, 3, length, dim, generator=g, dtype=dtype).unbind(0)
    return q, k * scale, torch.randn(2, 3, length, value_dim, generator=g, dtype=dtype)


def draw_weights(features=5, dim=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(9)
    query, key = torch.randn(2, 3, features, dim, generator=g, dtype=dtype).unbind(0)
    return {"query_weight": query, "query_bias": torch.randn(3, features, generator=g, dtype=dtype), "key_weight": key}


def dense(q, k, v, causal, query_weight, query_bias, key_weight):
    """One query per feature, in plain loops."""
    out = torch.zeros_like(v)
    a = (torch.einsum("bhid,hfd->bhif", q, query_weight) + query_bias[:, None]).softmax(-1)
    logits = torch.einsum("bhjd,hfd->bhjf", k, key_weight)
    for i in range(v.shape[2]):
        last = i + 1 if causal else v.shape[2]
        weights = logits[:, :, :last].softmax(2)
        out[:, :, i] = torch.einsum("bhf,bhjf,bhjd->bhd", a[:, :, i], weights, v[:, :, :last])
    return out


@CAUSAL
@pytest.mark.parametrize("length", [1, 7, 8, 65, 130])
def test_is_the_dense_formula(length, causal, form):
    tokens, weights = draw(length, value_dim=6, scale=3), draw_weights()
    expected = dense(*tokens, causal, **weights)
    torch.testing.assert_close(naive_prefix_softmax(*tokens, is_causal=causal, **weights), expected)
    output, state = prefix_softmax_attention(*tokens, is_causal=causal, **weights)
    assert state is None
    torch.testing.assert_close(output, expected)


@CAUSAL
def test_tokens_are_their_own_features_without_weights(causal, form):
    tokens = draw(50)
    eye = torch.eye(4, dtype=torch.float64).expand(3, -1, -1)
    expected = dense(*tokens, causal, eye, torch.zeros(3, 4, dtype=torch.float64), eye)
    torch.testing.assert_close(prefix_softmax_attention(*tokens, is_causal=causal)[0], expected)
    bias = draw_weights(features=4)["query_bias"]
    shifted = prefix_softmax_attention(*tokens, query_bias=bias, is_causal=causal)[0]
    torch.testing.assert_close(shifted, dense(*tokens, causal, eye, bias, eye))


@CAUSAL
def test_the_layout_of_tokens_in_memory_does_not_show(causal, form):
    tokens, weights = draw(40), draw_weights()
    for given in ({}, weights):
        expected = prefix_softmax_attention(*tokens, is_causal=causal, **given)[0]
        moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens]
        torch.testing.assert_close(prefix_softmax_attention(*moved, is_causal=causal, **given)[0], expected)


@CAUSAL
def test_blocks_do_not_show(causal, monkeypatch):
    tokens, weights = draw(100), draw_weights()
    expected = prefix_softmax_attention(*tokens, is_causal=causal, **weights)[0]
    for form in (False, True):  # with a backward pass of its own, and as torch.compile traces it
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda form=form: form)
        torch.testing.assert_close(prefix_softmax_attention(*tokens, is_causal=causal, **weights)[0], expected)
    monkeypatch.setattr(prefix_softmax, "_BLOCK", 24)
    torch.testing.assert_close(prefix_softmax_attention(*tokens, is_causal=causal, **weights)[0], expected)


@CAUSAL
def test_padding_and_fewer_queries(causal, form):
    q, k, v = draw(40)
    weights = draw_weights()
    padding = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) > 0.4
    padding[1, :20] = False
    expected = naive_prefix_softmax(q, k, v, token_mask=padding, is_causal=causal, **weights)
    # Padded tokens may hold anything.
    poisoned = [x.masked_fill(~padding[:, None, :, None], torch.nan) for x in (q, k, v)]
    output = prefix_softmax_attention(*poisoned, token_mask=padding, is_causal=causal, **weights)[0]
    torch.testing.assert_close(output, expected)
    assert (output[1, :, :20] == 0).all() == causal
    some = prefix_softmax_attention(q[:, :, 29:], k, v, token_mask=padding, is_causal=causal, **weights)[0]
    some_expected = naive_prefix_softmax(q[:, :, 29:], k, v, token_mask=padding, is_causal=causal, **weights)
    torch.testing.assert_close(some, some_expected)
    if causal:
        torch.testing.assert_close(some, expected[:, :, 29:])
    blind = prefix_softmax_attention(q, k, v, token_mask=torch.zeros_like(padding), is_causal=causal, **weights)[0]
    assert (blind == 0).all()


def test_decoding_in_any_chunks(form):
    (q, k, v), weights = draw(50, scale=5), draw_weights()
    expected = prefix_softmax_attention(q, k, v, is_causal=True, **weights)[0]
    for sizes in ([1] * 50, [50], [33, 1, 16]):
        state, outputs, start = init_prefix_softmax_state(2, 3, 5, 4, v.dtype, v.device), [], 0
        for size in sizes:
            now = slice(start, start + size)
            output, state = prefix_softmax_attention(
                q[:, :, now], k[:, :, now], v[:, :, now], is_causal=True, state=state, **weights
            )
            outputs.append(output)
            start += size
        torch.testing.assert_close(torch.cat(outputs, 2), expected)
    assert sum(x[0, 0].numel() for x in state.values()) == 5 * (4 + 2)


def test_huge_logits_neither_overflow_nor_reach_earlier_rows(form):
    q, k, v = draw(60, dtype=torch.float32)
    before = prefix_softmax_attention(q, k, v, is_causal=True)[0]
    k[:, :, 30] += 1e4
    after = prefix_softmax_attention(q, k, v, is_causal=True)[0]
    assert torch.equal(after[:, :, :30], before[:, :, :30])
    torch.testing.assert_close(after[:, :, 30:], v[:, :, 30:31].expand_as(after[:, :, 30:]))
    everywhere = prefix_softmax_attention(q, k, v, is_causal=False)[0]
    torch.testing.assert_close(everywhere, v[:, :, 30:31].expand_as(v))
    k[:, :, 30] -= 2e4
    for causal in (False, True):
        assert prefix_softmax_attention(q * 1e4, k, v, is_causal=causal)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@CAUSAL
def test_half_precision_tokens_are_summed_in_fp32(causal, dtype, form):
    tokens, weights = [x.to(dtype) for x in draw(90, scale=3)], draw_weights(dtype=torch.float32)
    expected = naive_prefix_softmax(*(x.float() for x in tokens), is_causal=causal, **weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = prefix_softmax_attention(*tokens, is_causal=causal, **weights)[0]
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@CAUSAL
@pytest.mark.parametrize("learned", [False, True], ids=["identity", "affine"])
@pytest.mark.parametrize("q_len", [37, 20])
def test_gradients(causal, learned, q_len, form):
    """Of tokens and weights, with padded keys and a sequence that starts with them, checkpointed or not."""
    q, k, v = draw(37)
    weights = draw_weights() if learned else {}
    padding = torch.arange(37).expand(2, -1) >= torch.tensor([[3], [0]])
    padding[1, 30:] = False

    def run(attend, is_checkpointed=False):
        inputs = [x.detach().requires_grad_() for x in (q[:, :, -q_len:], k, v, *weights.values())]

        def call(q, k, v, *given):
            options = dict(zip(weights, given, strict=True))
            output = attend(q, k, v, token_mask=padding, is_causal=causal, **options)
            return output if attend is naive_prefix_softmax else output[0]

        output = checkpoint(call, *inputs, use_reentrant=False) if is_checkpointed else call(*inputs)
        return torch.autograd.grad(output.square().sum(), inputs)

    expected = run(naive_prefix_softmax)
    for is_checkpointed in (False, True):
        for actual, wanted in zip(run(prefix_softmax_attention, is_checkpointed), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


def test_gradients_reach_the_state():
    """Two calls in a row train as one."""
    tokens, weights = draw(24), draw_weights()
    inputs = [x.requires_grad_() for x in (*tokens, *weights.values())]

    def gradients(sizes):
        state, outputs, start = init_prefix_softmax_state(2, 3, 5, 4, torch.float64, torch.device("cpu")), [], 0
        for size in sizes:
            part = [x[:, :, start : start + size] for x in tokens]
            output, state = prefix_softmax_attention(*part, is_causal=True, state=state, **weights)
            outputs.append(output)
            start += size
        return torch.autograd.grad(torch.cat(outputs, 2).square().sum(), inputs)

    for actual, expected in zip(gradients([15, 9]), gradients([24]), strict=True):
        torch.testing.assert_close(actual, expected)


@CAUSAL
def test_training_keeps_its_inputs_and_little_else(causal, form, monkeypatch):
    """In blocks: no shares and logits of 64 features for all tokens, nor anything of tokens times tokens."""
    monkeypatch.setattr(prefix_softmax, "_WHOLE", 0)
    monkeypatch.setattr(layout, "_MIN_BLOCK", 256)
    tokens = [x.requires_grad_() for x in draw(1024, dtype=torch.float32)]
    weights = draw_weights(features=64, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        prefix_softmax_attention(*tokens, is_causal=causal, **weights)
    shares = 2 * 3 * 1024 * 64
    assert max(x.numel() for x in saved) < shares
    assert sum(x.numel() for x in saved) < shares


def test_calls_that_do_not_fit_are_errors():
    q, k, v = draw(6)
    with pytest.raises(ValueError, match="got 6 > 5"):
        prefix_softmax_attention(q, k[:, :, :5], v[:, :, :5], is_causal=True)
    state = init_prefix_softmax_state(2, 3, 4, 4, v.dtype, v.device)
    for rows, causal in ((q, False), (q[:, :, :2], True)):
        with pytest.raises(ValueError, match="decode state needs causal"):
            prefix_softmax_attention(rows, k, v, is_causal=causal, state=state)
