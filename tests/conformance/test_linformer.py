"""Linformer beside the linformer package, same weights and inputs."""

import pytest
import torch
from linformer import LinformerSelfAttention
from torch import nn

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.linformer import LinformerAttention, LinformerConfig

pytestmark = pytest.mark.conformance

HEADS, DIM, SLOTS, MAX_LENGTH = 4, 8, 6, 32
WIDTH = HEADS * DIM


def their_layer(share_kv=False):
    torch.manual_seed(0)
    layer = LinformerSelfAttention(WIDTH, MAX_LENGTH, k=SLOTS, heads=HEADS, dim_head=DIM, share_kv=share_kv).eval()
    layer.to_out = nn.Identity()
    return layer


def run_ours(theirs, hidden, padding=None):
    """Their weights in ours: E = proj_k^T and F = proj_v^T for all heads; `init="random"` uses E as it is."""
    sharing = "key_value" if theirs.share_kv else "headwise"
    config = LinformerConfig(k=SLOTS, sharing=sharing, init="random")
    ours = LinformerAttention(config, LayerContext(0, 1, WIDTH, HEADS, DIM, MAX_LENGTH, is_causal=False))
    ours.key_projection.copy_(theirs.proj_k.T)
    if not theirs.share_kv:
        ours.value_projection.copy_(theirs.proj_v.T)
    to_value = theirs.to_k if theirs.share_kv else theirs.to_v
    q, k, v = (f(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (theirs.to_q, theirs.to_k, to_value))
    output = ours(AttentionInputs(q, k, v, token_mask=padding, scaling=DIM**-0.5))[0]
    return output.transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("length", [MAX_LENGTH, 19, 1])
def test_package(share_kv, length):
    """Shorter inputs use the first columns of E in both."""
    theirs = their_layer(share_kv)
    hidden = 2 * torch.randn(3, length, WIDTH)
    torch.testing.assert_close(run_ours(theirs, hidden), theirs(hidden), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_on_purpose_padding_has_no_part_in_the_slots():
    """The package ignores a padding mask: what stands in padded places changes the real rows. In ours it does not."""
    theirs, n_real = their_layer(), 19
    hidden = 2 * torch.randn(1, MAX_LENGTH, WIDTH)
    other = torch.cat([hidden[:, :n_real], 2 * torch.randn(1, MAX_LENGTH - n_real, WIDTH)], 1)
    mask = torch.arange(MAX_LENGTH)[None] < n_real
    unpadded = theirs(hidden[:, :n_real])
    for padded in (hidden, other):
        torch.testing.assert_close(run_ours(theirs, padded, mask)[:, :n_real], unpadded, rtol=1e-4, atol=1e-4)
    first, second = (theirs(x)[:, :n_real] for x in (hidden, other))
    assert (first - second).norm() > 0.1 * first.norm()
    torch.testing.assert_close(theirs(hidden, mask=mask), theirs(hidden), rtol=0, atol=0)  # accepted and ignored
