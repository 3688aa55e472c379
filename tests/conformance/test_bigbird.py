"""BigBird's block-sparse attention as in Transformers: same weights, same inputs, its random blocks fed in."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BigBirdConfig as UpstreamConfig
from transformers import BigBirdModel
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.bigbird import BigBirdAttention, BigBirdConfig

pytestmark = pytest.mark.conformance

HEADS, DIM, BLOCK = 3, 8, 4


def upstream_config(**options):
    given = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "num_hidden_layers": 1, "vocab_size": 50}
    given |= {"intermediate_size": 8, "block_size": BLOCK, "num_random_blocks": 2, "max_position_embeddings": 256}
    return UpstreamConfig(**given | options)


def pair(monkeypatch, training=True):
    """Their layer, ours with the blocks that theirs drew last, and a function that runs theirs on `[B, T, C]`."""
    torch.manual_seed(0)
    theirs = BigBirdBlockSparseAttention(upstream_config(), seed=3).train(training)
    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, 256, is_causal=False)
    ours = BigBirdAttention(BigBirdConfig(block_size=BLOCK, num_random_blocks=2), context)
    drawn = []
    draw = theirs._bigbird_block_rand_mask_with_head

    def recorded(*args, **kwargs):
        drawn[:] = [draw(*args, **kwargs)]
        return drawn[0]

    def fed(row, blocks):
        """Their list leaves out the first and the last block, which see everything."""
        table = F.pad(torch.from_numpy(np.stack(drawn[0])).long(), (0, 0, 1, 1))
        columns = table[:, row[0].clamp(max=table.shape[1] - 1)][None]
        return columns, torch.ones(columns[:, 0].shape, dtype=torch.bool)

    monkeypatch.setattr(theirs, "_bigbird_block_rand_mask_with_head", recorded)
    monkeypatch.setattr(ours, "random_blocks", fed)

    def run(hidden, padding):
        blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(padding.float(), BLOCK)
        return theirs(hidden, band, rows, columns, blocked, blocked)[0]

    return theirs, ours, run


def inputs_of(theirs, hidden, padding=None):
    q, k, v = (f(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (theirs.query, theirs.key, theirs.value))
    return AttentionInputs(q, k, v, padding, False, DIM**-0.5, hidden)


@pytest.mark.parametrize("length", [48, 60, 128])
def test_equals_transformers_bigbird(length, monkeypatch):
    theirs, ours, run = pair(monkeypatch)
    hidden = torch.randn(2, length, HEADS * DIM)
    expected = run(hidden, torch.ones(2, length))
    actual = ours(inputs_of(theirs, hidden))[0].transpose(1, 2).flatten(2)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_theirs_takes_the_last_block_of_the_batch_where_ours_takes_each_rows_own(monkeypatch):
    """Padding a row from 56 to 64 tokens takes its last global block away in theirs; ours gives the same outputs."""
    theirs, ours, run = pair(monkeypatch)
    hidden = torch.randn(1, 64, HEADS * DIM)
    padding = torch.arange(64)[None] < 56
    name = "_bigbird_block_rand_mask_with_head"
    drawn = np.stack(getattr(theirs, name)(56, 56, BLOCK, BLOCK, HEADS, [56], [2]))  # [H, 12, 2]: both runs take these
    longer = {56: drawn, 64: np.pad(drawn, ((0, 0), (0, 2), (0, 0)))}
    monkeypatch.setattr(theirs, name, lambda from_seq_length, **kwargs: list(longer[from_seq_length]))
    alone, padded = run(hidden[:, :56], torch.ones(1, 56))[0], run(hidden, padding)[0]
    middle = slice(2 * BLOCK, 48)
    assert (alone[middle] - padded[:56][middle]).abs().max() > 1e-2
    mine = ours(inputs_of(theirs, hidden[:, :56]))[0][0].transpose(0, 1).flatten(1)
    mine_padded = ours(inputs_of(theirs, hidden, padding))[0][0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(mine, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine_padded[:56], mine, atol=1e-5, rtol=1e-5)


def test_theirs_draws_no_blocks_in_eval_and_counts_the_first_one_several_times(monkeypatch):
    """In eval mode every random block of theirs is block 0, whose keys then have three times their weight."""
    theirs, ours, run = pair(monkeypatch, training=False)
    hidden = torch.randn(1, 64, HEADS * DIM)
    evaluated = run(hidden, torch.ones(1, 64))[0]
    inputs = inputs_of(theirs, hidden)
    i = 8 * BLOCK
    columns = [0, 0, 0, 7, 8, 9, 15]
    keys = torch.cat([torch.arange(c * BLOCK, (c + 1) * BLOCK) for c in columns])
    logits = inputs.query[0, :, i : i + 1] @ inputs.key[0][:, keys].transpose(-1, -2) * DIM**-0.5
    tripled = (logits.softmax(-1) @ inputs.value[0][:, keys]).flatten()
    torch.testing.assert_close(evaluated[i], tripled, atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    before = ours.train()(inputs)[0]
    assert torch.equal(ours.eval()(inputs)[0], before)  # ours: the same blocks in training and evaluation


def test_theirs_stays_on_full_attention_after_one_short_call_and_ours_does_not():
    """https://github.com/huggingface/transformers/issues/20031"""
    torch.manual_seed(0)
    model = BigBirdModel(upstream_config()).eval()
    long, short = torch.arange(64)[None] % 50, torch.arange(16)[None]
    with torch.no_grad():
        before = model(long).last_hidden_state
        model(short)
        after = model(long).last_hidden_state
    assert model.config.attention_type == "block_sparse"
    assert model.encoder.layer[0].attention.attention_type == "original_full"
    assert (before - after).abs().max() > 1e-3

    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, 256, is_causal=False)
    ours = BigBirdAttention(BigBirdConfig(block_size=BLOCK), context)
    q, k, v = torch.randn(3, 1, HEADS, 64, DIM)
    expected = ours(AttentionInputs(q, k, v, scaling=DIM**-0.5))[0]
    ours(AttentionInputs(q[:, :, :16], k[:, :, :16], v[:, :, :16], scaling=DIM**-0.5))
    assert torch.equal(ours(AttentionInputs(q, k, v, scaling=DIM**-0.5))[0], expected)
