"""Tiles of queries over listed blocks on a CPU: gradients, and what is kept for them."""

import pytest
import torch

from hf_linear_attn.ops.sparse import attention as block_sparse
from hf_linear_attn.ops.sparse.attention import block_sparse_attention
from hf_linear_attn.ops.sparse.layout import ANYONE, NOBODY, BlockGrid, Extra
from hf_linear_attn.ops.sparse.patterns import (
    BlockLists,
)
from tests.ops.references import naive_block_sparse_attention
from tests.ops.sparse.calls import DIM, HEADS, draw, drawn_lists, make_call


@pytest.mark.parametrize("trains_shift", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [1, HEADS], ids=["shared lists", "lists per head"])
@pytest.mark.parametrize(("kind", "in_heads"), [(None, True), (None, False), ("left", True), ("interior", True)])
def test_gradients_of_segments_and_columns(kind, in_heads, heads, is_causal, trains_shift, monkeypatch):
    """Of q, k, v, of the columns and of their shift, however the segments are cut and the keys lie."""
    block = torch.tensor([[0, 2, 3, ANYONE, NOBODY]])
    pair = draw(2, HEADS, 5, DIM, seed=7).requires_grad_(), draw(2, HEADS, 5, DIM, seed=8).requires_grad_()
    shift = torch.tensor([-1.5, 0.5, 2.0], dtype=torch.float64, requires_grad=trains_shift)
    call = make_call(kind, 30, 30)
    leaves = [x.clone(memory_format=torch.contiguous_format) for x in (call.q, call.k, call.v)]
    if not in_heads:  # the heads of a token together, as projections leave them
        leaves = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves]
    call.q, call.k, call.v = (x.requires_grad_() for x in leaves)
    wanted = (call.q, call.k, call.v, *pair, *((shift,) if trains_shift else ()))
    grid = BlockGrid(call, 4, aligned=kind is None)
    lists = drawn_lists(grid, heads, is_causal)
    if not is_causal:
        full = torch.stack([grid.blocks - 1, torch.ones_like(grid.blocks)], dim=1)
        lists = BlockLists(lists.columns, lists.kind, False, full)
    real = (call.rank >= 0).expand(2, -1)[:, None, :, None]
    weight = draw(2, HEADS, 30, DIM, seed=5).masked_fill(~real, 0)

    def gradients(function):
        out = function(call, grid, lists, scaling=0.7, extra=Extra(*pair, block, shift))
        return torch.autograd.grad((out * weight).sum(), wanted)

    expected = gradients(naive_block_sparse_attention)
    for segment in (1, 2000, 1 << 22):
        monkeypatch.setattr(block_sparse, "SEGMENT_ELEMENTS", segment)
        for actual, dense in zip(gradients(block_sparse_attention), expected, strict=True):
            torch.testing.assert_close(actual, dense)


@pytest.mark.parametrize("heads", [1, HEADS], ids=["shared lists", "lists per head"])
def test_gathered_keys_are_not_kept(heads):
    """What is kept for the backward pass is the inputs, the output and a number per row, whatever the lists hold."""
    call = make_call(None, 200, 200)
    call.q, call.k, call.v = (x.requires_grad_() for x in (call.q, call.k, call.v))
    grid = BlockGrid(call, 4, aligned=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
        block_sparse_attention(call, grid, drawn_lists(grid, heads, True), scaling=0.7)
    assert sum(kept.values()) <= 5 * call.q.numel()
