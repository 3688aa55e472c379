"""Long-Short Transformer beside the long-short-transformer package, same weights and inputs.

Its keys are its values; its DualLN is not gated and its landmarks have no bias: ours are set so. Its windows are
blocks that look one block around, which at these lengths is everything (encoder) or the whole past (decoder).
"""

import math

import pytest
import torch
from long_short_transformer.long_short_transformer import LongShortAttention as Theirs
from torch import nn

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.long_short import LongShortAttention, LongShortConfig

pytestmark = pytest.mark.conformance

HEADS, DIM, WINDOW, SEGMENT, LENGTH = 3, 16, 16, 4, 32
WIDTH = HEADS * DIM


class NoRotation(nn.Module):
    """In place of its rotary embeddings: angle 0."""

    def forward(self, positions, cache_key=None):
        return torch.zeros(len(positions), DIM)


def their_layer(causal, r):
    torch.manual_seed(0)
    layer = Theirs(
        dim=WIDTH, heads=HEADS, dim_head=DIM, causal=causal, window_size=WINDOW, segment_size=SEGMENT, r=r,
        pos_emb=NoRotation(),
    ).eval()  # fmt: skip
    for norm in (layer.local_norm, layer.global_norm):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias, 0.0, 0.2)
    layer.to_out = nn.Identity()
    return layer


def our_layer(theirs, r):
    """The package's weights for all heads."""
    window = LENGTH if theirs.causal else 2 * LENGTH
    config = LongShortConfig(window, r, SEGMENT if theirs.causal else None, norm_gate=1.0)
    ours = LongShortAttention(config, LayerContext(0, 1, WIDTH, HEADS, DIM, LENGTH, theirs.causal))
    for mine, norm in ((ours.window_norm, theirs.local_norm), (ours.landmark_norm, theirs.global_norm)):
        mine.weight.copy_(norm.weight.expand(HEADS, -1))
        mine.bias.copy_(norm.bias.expand(HEADS, -1))
    # Equal weights over n tokens have entropy log n, which ours adds, less log r: taken back by the learned bias.
    theirs.to_dynamic_proj.weight.zero_()
    ours.projection.zero_()
    return ours


def run_ours(ours, theirs, hidden, padding=None):
    q, kv = (f(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (theirs.to_q, theirs.to_kv))
    call = AttentionInputs(q, kv, kv, padding, is_causal=theirs.causal, scaling=DIM**-0.5)
    return ours(call)[0].transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize(("length", "batch"), [(LENGTH, 2), (27, 1)])
def test_encoder(r, length, batch):
    """Where a length needs padding the package takes one row only."""
    theirs = their_layer(False, r)
    ours = our_layer(theirs, r)
    ours.landmark_bias.fill_(-math.log(length / r))
    hidden = 2 * torch.randn(batch, length, WIDTH)
    torch.testing.assert_close(run_ours(ours, theirs, hidden), theirs(hidden), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [LENGTH, 27])
def test_decoder_on_rows_before_the_end_of_a_segment(length):
    """At a segment's last row theirs sees that segment's landmark as well: causal, but not "ended before".

    With r = 1: its mask of several landmarks a segment does not fit their number.
    """
    theirs = their_layer(True, 1)
    ours = our_layer(theirs, 1)
    ours.landmark_bias.fill_(-math.log(SEGMENT))
    hidden = 2 * torch.randn(2, length, WIDTH)
    output, expected = run_ours(ours, theirs, hidden), theirs(hidden)
    last = torch.arange(length) % SEGMENT == SEGMENT - 1
    torch.testing.assert_close(output[:, ~last], expected[:, ~last], rtol=1e-4, atol=1e-4)
    assert (output[:, last] - expected[:, last]).norm() > 1e-3 * expected[:, last].norm()


@torch.no_grad()
def test_learned_pooling():
    """With weights of its own each landmark's entropy differs; ours with one landmark takes it back by the bias."""
    theirs = their_layer(False, 1)
    ours = our_layer(theirs, 1)
    hidden = 2 * torch.randn(1, LENGTH, WIDTH)
    nn.init.normal_(theirs.to_dynamic_proj.weight)
    ours.projection.copy_(theirs.to_dynamic_proj.weight.T.expand(HEADS, -1, -1))
    keys = theirs.to_kv(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    p = torch.softmax(theirs.to_dynamic_proj(keys)[..., 0], -1)
    ours.landmark_bias.copy_((p * p.log()).sum(-1)[0])
    torch.testing.assert_close(run_ours(ours, theirs, hidden), theirs(hidden), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_on_purpose_segments_are_of_real_tokens():
    """Theirs segments places: with padding in front a decoder's real rows come out otherwise. Ours do not."""
    theirs = their_layer(True, 1)
    ours = our_layer(theirs, 1)
    ours.landmark_bias.fill_(-math.log(SEGMENT))
    hidden = 2 * torch.randn(1, LENGTH, WIDTH)
    pads = 6
    mask = torch.arange(LENGTH)[None] >= pads
    padded, alone = run_ours(ours, theirs, hidden, mask)[:, pads:], run_ours(ours, theirs, hidden[:, pads:])
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)
    padded, alone = theirs(hidden, mask=mask)[:, pads:], theirs(hidden[:, pads:])
    assert (padded - alone).norm() > 1e-2 * alone.norm()
