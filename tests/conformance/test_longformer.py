"""Longformer's window and global attention as in Transformers: same weights, same inputs."""

import pytest
import torch
from transformers import LongformerConfig as UpstreamConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.longformer import LongformerAttention, LongformerConfig

pytestmark = pytest.mark.conformance

HEADS, DIM, WIDTH, WINDOW = 3, 8, 24, 8


def pair():
    """Two functions of (hidden `[B, T, C]`, padding, global mask), theirs and ours, with the same weights."""
    config = UpstreamConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_window=[WINDOW],
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    upstream = LongformerSelfAttention(config, 0).eval()
    context = LayerContext(0, 1, WIDTH, HEADS, DIM, 512, is_causal=False)
    variant = LongformerAttention(LongformerConfig(window_size=WINDOW), context)
    variant.load_state_dict({k: v for k, v in upstream.state_dict().items() if "global" in k})

    @torch.no_grad()
    def theirs(hidden, padding, mask):
        codes = torch.zeros(mask.shape).masked_fill(~padding, -10000.0).masked_fill(mask, 10000.0)
        return upstream(
            hidden,
            attention_mask=codes,
            is_index_masked=codes < 0,
            is_index_global_attn=codes > 0,
            is_global_attn=bool((codes > 0).any()),
        )[0]

    @torch.no_grad()
    def ours(hidden, padding, mask):
        projections = upstream.query, upstream.key, upstream.value
        q, k, v = (f(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in projections)
        inputs = AttentionInputs(q, k, v, padding, False, DIM**-0.5, hidden, mask)
        return variant(inputs)[0].transpose(1, 2).flatten(2)

    return theirs, ours


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [(), (0,), (0, 7, 30), tuple(range(12))], ids=len)
def test_equals_transformers_longformer(padded, tokens):
    """Lengths are a multiple of the window, as upstream needs; float32."""
    theirs, ours = pair()
    hidden = torch.randn(2, 48, WIDTH)
    padding = torch.arange(48) < torch.tensor([[48], [37]]) if padded else torch.ones(2, 48, dtype=torch.bool)
    mask = torch.zeros(2, 48, dtype=torch.bool)
    mask[:, list(tokens)] = True
    mask[1, list(tokens)[1:2]] = False  # rows differ in how many global tokens they have
    expected, actual = theirs(hidden, padding, mask), ours(hidden, padding if padded else None, mask)
    torch.testing.assert_close(actual[padding], expected[padding], atol=1e-4, rtol=1e-4)


def test_theirs_measures_distance_over_padding_and_ours_over_real_tokens():
    """With 16 pads in the middle of 48 real tokens theirs loses keys of its window; ours gives the same outputs."""
    theirs, ours = pair()
    hidden = torch.randn(1, 64, WIDTH)
    padding = (torch.arange(64) < 24) | (torch.arange(64) >= 40)
    mask = (torch.arange(64) == 0)[None]
    bare = hidden[:, padding], torch.ones(1, 48, dtype=torch.bool), mask[:, padding]
    alone = theirs(*bare)
    assert (theirs(hidden, padding[None], mask)[:, padding] - alone).abs().max() > 1e-2
    torch.testing.assert_close(ours(*bare), alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(hidden, padding[None], mask)[:, padding], alone, atol=1e-4, rtol=1e-4)
