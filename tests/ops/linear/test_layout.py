"""Weights relative to peaks, and the blocks of a call."""

import pytest
import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.features.maps import ParametricMap
from hf_linear_attn.ops.linear import layout
from hf_linear_attn.ops.linear.attention import feature_map_attention, init_linear_state
from hf_linear_attn.ops.linear.layout import Call, LogDecay, Options, relative_to_peaks

F64 = torch.float64


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("start", [None, LOG_ZERO, 7.0])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_weights_relative_to_peaks_are_the_weights(spread, start, decayed):
    """w_j exp(g_{j+1} + .. + g_i), from factors that never exceed 1, and the peak of row i."""
    g = torch.Generator().manual_seed(0)
    log_weight = spread * torch.randn(2, 3, 12, generator=g, dtype=F64)
    decay = -torch.rand(2, 3, 12, 1, generator=g, dtype=F64) if decayed else None
    first = None if start is None else torch.full((2, 3), start, dtype=F64)
    weight, shift, peaks = relative_to_peaks(log_weight, decay, first)
    total = shift if decay is None else shift + decay[..., 0]
    assert (weight <= 1 + 1e-12).all()
    assert (total <= 1e-12).all()
    for i in range(12):
        for j in range(i + 1):
            reached = weight[..., j].log() + total[..., j + 1 : i + 1].sum(-1) + peaks[..., i]
            given = log_weight[..., j] + (0 if decay is None else decay[..., j + 1 : i + 1, 0].sum(-1))
            seen = weight[..., j] > 0  # others are e^-745 of the peak
            torch.testing.assert_close(reached[seen], given[seen])
    if start == 7.0:  # what came before decays as the peak says
        elapsed = total.cumsum(-1) + peaks - 7.0
        torch.testing.assert_close(elapsed, torch.zeros_like(elapsed) if decay is None else decay[..., 0].cumsum(-1))


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_cover_keys_and_queries_once(causal, small_blocks):
    q, k = torch.zeros(1, 1, 37, 2), torch.zeros(1, 1, 90, 2)
    options = Options(lambda x: (x, None), lambda x: (x, None), None, (0, 0), causal, True)
    call = Call(options, (q, k, k, *[None] * 7))
    past, rows = call.key_blocks(), call.query_blocks()
    keys = [*past, *map(call.own_keys, rows)] if causal else past
    assert [i for s in keys for i in range(s.start, s.stop)] == list(range(90))
    assert [i for s in rows for i in range(s.start, s.stop)] == list(range(37))
    assert max(s.stop - s.start for s in (*past, *rows)) == layout.block_size(k) == 16


def test_a_block_is_whole_chunks_and_fits_the_budget():
    for batch, heads in ((1, 1), (1, 12), (8, 12), (64, 16)):
        size = layout.block_size(torch.empty(batch, heads, 1, 1))
        assert size % layout.CHUNK == 0
        assert size == layout._MIN_BLOCK or size * batch * heads <= layout._CPU_BLOCK_ROWS


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("pieces", [(11,), (6, 5), (9, 1, 1)], ids=str)
def test_padded_tokens_may_hold_anything(pieces, decayed):
    """Queries, keys, values and the tokens of a decay, before their maps, whole and after a state."""
    g = torch.Generator().manual_seed(0)
    clean = [torch.randn(2, 3, 11, size, generator=g, dtype=F64) for size in (4, 4, 5, 2)]
    mask = torch.arange(11) % torch.tensor([[3], [4]]) != 1
    poisoned = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in clean]

    def features(x, scale):
        return (x * scale).exp(), x.sum(-1)

    def run(given):
        state, outputs = init_linear_state(2, 3, 4, 5, F64, torch.device("cpu")), []
        split = [x.split(pieces, 2) for x in given]
        for q, k, v, tokens, real in zip(*split, mask.split(pieces, 1), strict=True):
            maps = [ParametricMap(features, (torch.tensor(0.3, dtype=F64),)) for _ in range(2)]
            decay = LogDecay(lambda x: -x.square().sum(-1, keepdim=True), tokens) if decayed else None
            options = {"log_decay": decay, "token_mask": real, "is_causal": True, "state": state}
            output, state = feature_map_attention(q, k, v, *maps, **options)
            outputs.append(output)
        return torch.cat(outputs, 2).transpose(1, 2)[mask], state

    (found, after), (expected, expected_after) = run(poisoned), run(clean)
    torch.testing.assert_close(found, expected)
    for name, x in expected_after.items():
        torch.testing.assert_close(after[name], x)


def test_log_decays_of_all_tokens():
    tokens = torch.randn(2, 1, 6, 3, dtype=F64)
    mask = torch.arange(6) != torch.tensor([[2], [5]])
    decay = LogDecay(lambda x, rate: -rate * x.square(), tokens.masked_fill(~mask[:, None, :, None], torch.nan), (2.0,))
    torch.testing.assert_close(decay(mask), (-2 * tokens.square()).masked_fill(~mask[:, None, :, None], 0))
