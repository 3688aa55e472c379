"""`lolcats` beside other people's parts: its window is Transformers' sliding window, its tail fla's linear attention.

The authors' package is not on the index. Where the tail has no keys the whole is their window alone; where the
window's factor vanishes, what lies beyond it is linear attention of keys that come `window_size` tokens late.
"""

from __future__ import annotations

import pytest
import torch
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from transformers.masking_utils import sliding_window_causal_mask_function

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.lolcats import LolcatsAttention, LolcatsConfig

pytestmark = pytest.mark.conformance

HEADS, DIM, LENGTH, WINDOW = 3, 16, 100, 12


def ours(log_factor: float) -> LolcatsAttention:
    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, LENGTH, True)
    module = LolcatsAttention(LolcatsConfig(window_size=WINDOW, tail="hedgehog"), context)
    with torch.no_grad():
        module.window_log_factor.fill_(log_factor)
    return module


def inputs() -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, LENGTH, DIM, generator=generator).unbind(0)
    return AttentionInputs(q, k, v, None, True, DIM**-0.5)


def test_a_window_that_outweighs_the_tail_is_transformers_sliding_window() -> None:
    call = inputs()
    visible = sliding_window_causal_mask_function(WINDOW)
    place, zero = torch.arange(LENGTH), torch.tensor(0)
    mask = visible(zero, zero, place[:, None], place[None, :])
    expected = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, attn_mask=mask)
    torch.testing.assert_close(ours(30.0)(call)[0], expected, atol=1e-4, rtol=1e-4)


def test_a_tail_that_outweighs_the_window_is_linear_attention_of_late_keys() -> None:
    call = inputs()

    def phi(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    late = (phi(call.query[:, :, WINDOW:]), phi(call.key[:, :, :-WINDOW]), call.value[:, :, :-WINDOW])
    expected, _ = naive_recurrent_linear_attn(*(x.transpose(1, 2) for x in late), scale=1.0, normalize=True)
    with torch.no_grad():
        output = ours(-40.0)(call)[0][:, :, WINDOW:]
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-4, rtol=1e-4)
