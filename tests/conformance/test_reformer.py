"""Reformer with shared queries and keys against Transformers' and lucidrains' classes, and what theirs get wrong.

Both let the first chunk wrap around to the last one (of the round before); ours does not, so rows of the first chunk
differ on purpose. Both sort the whole sequence before they mask the future; ours cannot see it.
"""

import pytest
import torch
from transformers import ReformerConfig as UpstreamConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from hf_linear_attn.ops.lsh.attention import hash_buckets, visible
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.reformer import ReformerAttention, ReformerConfig

pytestmark = pytest.mark.conformance

HEADS, DIM, WIDTH, CHUNK, BUCKETS = 2, 8, 12, 8, 6


def hidden_states(length, seed=0):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def upstream(is_causal, rounds=1):
    torch.manual_seed(0)
    config = UpstreamConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=DIM,
        attn_layers=["lsh"],
        num_hashes=rounds,
        num_buckets=BUCKETS,
        lsh_attn_chunk_length=CHUNK,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        is_decoder=is_causal,
        hash_seed=7,
    )
    return LSHSelfAttention(config, layer_idx=0).eval()


def ours(rotations, is_causal, chunk_size=CHUNK):
    config = ReformerConfig(
        num_hashes=rotations.shape[2], num_buckets=2 * rotations.shape[3], chunk_size=chunk_size, share_qk=True
    )
    context = LayerContext(0, 1, WIDTH, rotations.shape[0], rotations.shape[1], 64, is_causal)
    module = ReformerAttention(config, context)
    module.rotations.copy_(rotations)
    return module


def same_rotations(rounds=1):
    """What Transformers draws from `hash_seed`."""
    return torch.randn(HEADS, DIM, rounds, BUCKETS // 2, generator=torch.Generator().manual_seed(7))


def inputs_of(layer, hidden, padding=None, is_causal=False):
    qk, v = (f(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (layer.query_key, layer.value))
    return AttentionInputs(qk, qk, v, padding, is_causal, DIM**-0.5)


def beyond_the_first_chunk(x, rotations, chunk=CHUNK):
    """Which tokens are past the first chunk in every round: bool `[B, H, T]`."""
    found = hash_buckets(x, rotations)
    where = visible(found, found, None, chunk, 2 * rotations.shape[3], is_causal=False)
    return (where.k_chunk > 1).all(0).view(x.shape[:3])


@torch.no_grad()
def test_transformers_layer_where_its_chunks_do_not_wrap():
    layer, hidden, rotations = upstream(False), hidden_states(48), same_rotations()
    inputs = inputs_of(layer, hidden)
    theirs = layer(hidden).hidden_states.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    mine = ours(rotations, False)(inputs)[0]
    beyond = beyond_the_first_chunk(inputs.key, rotations)
    assert beyond.sum() == 2 * HEADS * (48 - CHUNK)
    torch.testing.assert_close(mine[beyond], theirs[beyond], rtol=1e-4, atol=1e-4)
    assert (mine[~beyond] - theirs[~beyond]).abs().max() > 0.01  # theirs attend to the last chunk as well


@torch.no_grad()
def test_transformers_layer_on_one_chunk():
    layer, hidden = upstream(False), hidden_states(CHUNK)
    mine = ours(same_rotations(), False)(inputs_of(layer, hidden))[0]
    theirs = layer(hidden).hidden_states.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_changes_their_real_tokens_and_not_ours():
    layer, rotations = upstream(False), same_rotations()
    short, long = hidden_states(32), hidden_states(48)
    long[:, :32] = short
    padding = torch.arange(48).expand(2, -1) < 32
    theirs = layer(long, attention_mask=padding).hidden_states[:, :32]
    assert (theirs - layer(short).hidden_states).abs().max() > 0.01
    module = ours(rotations, False)
    padded = module(inputs_of(layer, long, padding))[0][:, :, :32]
    torch.testing.assert_close(padded, module(inputs_of(layer, short))[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_their_decoder_sees_the_future_and_ours_does_not():
    layer, rotations = upstream(True), same_rotations()
    hidden = hidden_states(48)
    changed = hidden.clone()
    changed[:, -8:] = hidden_states(8, seed=5)
    theirs = [layer(x).hidden_states[:, :40] for x in (hidden, changed)]
    assert (theirs[0] - theirs[1]).abs().max() > 0.01
    module = ours(rotations, True, chunk_size=2)
    mine = [module(inputs_of(layer, x, is_causal=True))[0][:, :, :40] for x in (hidden, changed)]
    torch.testing.assert_close(*mine, rtol=1e-5, atol=1e-5)


def lucidrains(qk, v, rounds, seed, duplicates):
    """`reformer_pytorch.LSHAttention` and the rotations that it draws. It scales logits by D ** -0.5 once more."""
    from reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=CHUNK, n_hashes=rounds, allow_duplicate_attention=duplicates).eval()
    torch.manual_seed(seed)
    output = layer(qk.flatten(0, 1) * DIM**0.5, v.flatten(0, 1))[0].view_as(v)
    torch.manual_seed(seed)
    return output, torch.randn(1, DIM, rounds, qk.shape[2] // CHUNK // 2).expand(qk.shape[1], -1, -1, -1)


@torch.no_grad()
@pytest.mark.parametrize("rounds", [1, 3])
def test_reformer_pytorch_with_keys_of_several_rounds_counted_once(rounds):
    generator = torch.Generator().manual_seed(0)
    qk, v = (torch.randn(2, HEADS, 64, DIM, generator=generator) for _ in range(2))
    theirs, rotations = lucidrains(qk, v, rounds, 3, duplicates=False)
    mine = ours(rotations, False)(AttentionInputs(qk, qk, v, None, False, DIM**-0.5))[0]
    beyond = beyond_the_first_chunk(qk, rotations)
    assert beyond.float().mean() > 0.5
    torch.testing.assert_close(mine[beyond], theirs[beyond], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_reformer_pytorch_by_default_counts_a_key_once_per_round():
    """More rounds then do not converge to attention over the union of what they show."""
    generator = torch.Generator().manual_seed(0)
    qk, v = (torch.randn(2, HEADS, 64, DIM, generator=generator) for _ in range(2))
    often, rotations = lucidrains(qk, v, 32, 3, duplicates=True)
    logits = qk @ torch.nn.functional.normalize(qk, dim=-1).mT
    everything = logits.masked_fill(torch.eye(64, dtype=torch.bool), -torch.inf).softmax(-1) @ v
    mine = ours(rotations, False)(AttentionInputs(qk, qk, v, None, False, DIM**-0.5))[0]
    error = {name: (x - everything).norm() / everything.norm() for name, x in {"mine": mine, "often": often}.items()}
    assert error["mine"] < 0.1 * error["often"]
