"""`window_tail_attention` against a plain loop over the definition, in float64."""

import pytest
import torch

from hf_linear_attn.ops.features.maps import taylor_features
from hf_linear_attn.ops.linear.attention import init_linear_state
from hf_linear_attn.ops.window.tail import (
    centered_features,
    naive_window_tail_attention,
    window_softmax,
    window_tail_attention,
)

SCALING = 0.4


def draw(length, *, queries=None, heads=2, dim=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, heads, length, dim, generator=g, dtype=torch.float64).unbind(0)
    return q[:, :, length - (queries or length) :], k, v


def weighted(x):
    """Positive features with a log scale of their own."""
    return (0.3 * x).exp(), x.sum(-1)


def by_loop(q, k, v, *, left, right, is_causal, log_factor, relative, token_mask):
    """The definition, one query at a time."""
    out = torch.zeros_like(q)
    (phi_q, scale_q), (phi_k, scale_k) = weighted(q), weighted(k)
    offset = k.shape[2] - q.shape[2]
    for b, h, r in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        i = offset + r
        keys = [j for j in range(i + 1 if is_causal else k.shape[2]) if token_mask[b, j]]
        window = [j for j in keys if i - left <= j <= i + right]
        if not window:
            continue
        logit = {j: (q[b, h, r] @ k[b, h, j] * SCALING).item() for j in window}
        unit = max(logit.values()) if relative[h] else 0.0
        weight = {j: log_factor[h] + logit[j] for j in window}
        for j in set(keys) - set(window):
            weight[j] = (phi_q[b, h, r] @ phi_k[b, h, j]).log() + scale_q[b, h, r] + scale_k[b, h, j] + unit
        share = torch.stack([torch.as_tensor(weight[j]) for j in keys]).softmax(0)
        out[b, h, r] = sum(p * v[b, h, j] for p, j in zip(share, keys, strict=True))
    return out


@pytest.mark.parametrize("pads", [0, 5], ids=["real", "padded"])
@pytest.mark.parametrize("queries", [20, 9])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_is_its_definition(side, queries, pads):
    q, k, v = draw(20, queries=queries)
    token_mask = torch.ones(2, 20, dtype=torch.bool)
    token_mask[1, :pads] = False
    log_factor, relative = torch.tensor([0.3, -1.0], dtype=torch.float64), torch.tensor([False, True])
    where = {"left": 3, "right": 0 if side == "decoder" else 2, "is_causal": side == "decoder"}
    expected = by_loop(q, k, v, **where, log_factor=log_factor, relative=relative, token_mask=token_mask)
    given = {
        **where,
        "scaling": SCALING,
        "window_log_factor": log_factor,
        "relative": relative,
        "token_mask": token_mask,
    }
    seen = torch.ones(2, queries, dtype=torch.bool) if pads == 0 else token_mask[:, 20 - queries :]
    for attend in (naive_window_tail_attention, lambda *a, **o: window_tail_attention(*a, **o)[0]):
        output = attend(q, k, v, weighted, weighted, **given)
        torch.testing.assert_close(output.transpose(1, 2)[seen], expected.transpose(1, 2)[seen])


@pytest.mark.parametrize("length", [1, 63, 200])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_blocks_and_chunks_agree_with_the_dense_form(side, length):
    q, k, v = draw(length)
    where = {"left": 40, "right": 0 if side == "decoder" else 40, "is_causal": side == "decoder"}
    given = {**where, "scaling": SCALING, "window_log_factor": torch.zeros(2, dtype=torch.float64)}
    expected = naive_window_tail_attention(q, k, v, weighted, weighted, **given)
    torch.testing.assert_close(window_tail_attention(q, k, v, weighted, weighted, **given)[0], expected)


def test_segments_of_blocks_change_nothing(monkeypatch):
    q, k, v = draw(300)
    whole = window_softmax(q, k, v, left=9, right=9, scaling=SCALING)
    monkeypatch.setattr("hf_linear_attn.ops.linear.layout._CPU_BLOCK_ROWS", 1)
    for actual, expected in zip(window_softmax(q, k, v, left=9, right=9, scaling=SCALING), whole, strict=True):
        torch.testing.assert_close(actual, expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the form that is traced
    monkeypatch.setattr("hf_linear_attn.ops.window.tail._SEGMENT_ELEMENTS", 1)
    for actual, expected in zip(window_softmax(q, k, v, left=9, right=9, scaling=SCALING), whole, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_window_gives_its_denominator():
    q, k, v = draw(30)
    _, normalizer, peak = window_softmax(q, k, v, left=29, right=29, scaling=SCALING)
    logits = q @ k.mT * SCALING
    torch.testing.assert_close(normalizer, logits.logsumexp(-1))
    torch.testing.assert_close(peak, logits.amax(-1))


def test_a_state_continues_the_call():
    window, (q, k, v) = 6, draw(40)
    given = {"left": window - 1, "right": 0, "is_causal": True, "scaling": SCALING}
    given["window_log_factor"] = torch.zeros(2, dtype=torch.float64)
    expected, _ = window_tail_attention(q, k, v, weighted, weighted, **given)
    state, outputs = init_linear_state(2, 2, 4, 4, torch.float64, "cpu"), []
    k, v = (torch.nn.functional.pad(x, (0, 0, window, 0)) for x in (k, v))
    for start, stop in ((0, 25), (25, 26), (26, 40)):
        held = slice(start, stop + window)  # the window before the new tokens, and they
        real = (torch.arange(start, stop + window) >= window)[None]
        call = q[:, :, start:stop], k[:, :, held], v[:, :, held]
        output, state = window_tail_attention(*call, weighted, weighted, **given, token_mask=real, state=state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 2), expected)


def test_logits_of_hundreds_do_not_overflow():
    q, k, v = (x.float() for x in draw(50))
    zero = torch.zeros(2)
    given = {"left": 3, "right": 0, "is_causal": True, "scaling": 300.0, "window_log_factor": zero}
    output = window_tail_attention(q, k, v, weighted, lambda x: (x.exp(), 300 * x.sum(-1)), **given)[0]
    assert output.isfinite().all()
    assert (output.abs() <= v.abs().amax() + 1e-4).all()


def test_centering_restores_the_logits():
    """With e^u itself as kernel, centered features give e^{s q.k} again."""
    q, k, _ = draw(10)
    a, c = torch.randn(2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind(0)

    def linear(x):
        return x, x.new_zeros(x.shape[:-1])

    q_centered, q_scale = centered_features(linear, a, c, SCALING)(q)
    k_centered, k_scale = centered_features(linear, c, a, SCALING, raw=True)(k)
    restored = q_centered @ k_centered.mT * SCALING + q_scale[..., None] + k_scale[..., None, :]
    torch.testing.assert_close(restored, q @ k.mT * SCALING)


def test_gradients():
    q, k, v = (x.requires_grad_() for x in draw(9))
    factor = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for side in (True, False):
        given = {"left": 2, "right": 0 if side else 2, "is_causal": side, "scaling": SCALING}

        def run(q, k, v, factor, given=given):
            def features(x):
                return taylor_features(x, 2)

            relative = torch.tensor([True, False])
            return window_tail_attention(
                q, k, v, features, features, **given, window_log_factor=factor, relative=relative
            )[0]

        assert torch.autograd.gradcheck(run, (q, k, v, factor), fast_mode=True)
