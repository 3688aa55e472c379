"""Block-sparse attention and the strided pattern against their dense forms; the lists of blocks."""

import pytest
import torch

from hf_linear_attn.ops.base.compaction import compact
from hf_linear_attn.ops.sparse import attention as block_sparse
from hf_linear_attn.ops.sparse.attention import block_sparse_attention
from hf_linear_attn.ops.sparse.layout import ANYONE, NOBODY, Extra, block_grid
from hf_linear_attn.ops.sparse.patterns import (
    CAUSAL,
    EMPTY,
    FULL,
    TAIL,
    BlockLists,
    bigbird_lists,
    hashed,
    own_block_lists,
    random_blocks,
    sample_distinct,
)
from hf_linear_attn.ops.sparse.strided import column_attention, naive_strided_attention, strided_attention
from tests.ops.references import naive_block_sparse_attention

HEADS, DIM = 3, 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padding_of(kind, batch, length):
    places, number = torch.arange(length).expand(batch, -1), torch.arange(batch)[:, None] * 5 + 3
    masks = {"left": places >= number, "right": places < length - number, "interior": places % (number + 1) != 1}
    return masks.get(kind)


def make_call(kind, q_len, k_len, past=None, batch=2):
    q, k, v = (draw(batch, HEADS, n, DIM, seed=s) for s, n in enumerate((q_len, k_len, k_len)))
    return compact(q, k, v, padding_of(kind, batch, k_len), past)


def drawn_lists(grid, heads, is_causal):
    """Blocks drawn without any pattern, other ones for each head, with empty slots."""
    row, blocks = grid.row, grid.blocks
    code = hashed(hashed(torch.arange(heads))[:, None] + row[:, None])
    size = row if is_causal else (blocks[:, None] - 1).expand_as(row)  # the last block has its own kind below
    columns = sample_distinct(code, size[:, None], 3)
    there = torch.arange(3) < size[..., None]
    own = own_block_lists(row, blocks, is_causal)
    if not is_causal:  # its tail for everybody instead of the own block
        own = BlockLists((blocks[:, None] - 1).expand_as(row)[:, None, :, None], torch.full_like(own.kind, TAIL), False)
    columns = torch.cat([columns, own.columns.expand(columns.shape[0], heads, -1, -1)], dim=-1)
    return BlockLists(columns, torch.cat([torch.where(there, FULL, EMPTY), own.kind], dim=-1), is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [1, HEADS], ids=["shared lists", "lists per head"])
@pytest.mark.parametrize("kind", [None, "left", "right", "interior"])
@pytest.mark.parametrize(("q_len", "k_len", "block"), [(33, 33, 4), (32, 32, 8), (11, 33, 4), (1, 33, 4), (5, 5, 8)])
def test_equals_the_dense_form(is_causal, heads, kind, q_len, k_len, block):
    call = make_call(kind, q_len, k_len)
    grid = block_grid(call, block, aligned=kind is None and q_len == k_len)
    lists = drawn_lists(grid, heads, is_causal)
    actual, expected = (
        f(call, grid, lists, scaling=0.7) for f in (block_sparse_attention, naive_block_sparse_attention)
    )
    real = call.rank[:, k_len - q_len :].expand(2, -1) >= 0
    torch.testing.assert_close(actual.transpose(1, 2)[real], expected.transpose(1, 2)[real])
    assert actual.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("segment", [1, 2000])
@pytest.mark.parametrize("kind", [None, "left"])
def test_columns_full_rows_and_segments(is_causal, segment, kind, monkeypatch):
    """Columns with a shift, for other blocks, for all and for nobody; rows that see everything; pieces of any size."""
    monkeypatch.setattr(block_sparse, "SEGMENT_ELEMENTS", segment)
    call = make_call(kind, 30, 30)
    grid = block_grid(call, 4, aligned=kind is None)
    lists = drawn_lists(grid, HEADS, is_causal)
    full = None if is_causal else torch.stack([grid.blocks - 1, torch.ones_like(grid.blocks)], dim=1)
    lists = BlockLists(lists.columns, lists.kind, is_causal, full)
    block = torch.tensor([[0, 2, 3, ANYONE, NOBODY]])
    extra = Extra(draw(2, HEADS, 5, DIM, seed=7), draw(2, HEADS, 5, DIM, seed=8), block, torch.tensor([-1.5, 0.5, 2.0]))
    actual, expected = (
        f(call, grid, lists, scaling=0.7, extra=extra) for f in (block_sparse_attention, naive_block_sparse_attention)
    )
    real = call.rank.expand(2, -1) >= 0
    torch.testing.assert_close(actual.transpose(1, 2)[real], expected.transpose(1, 2)[real])
    without = block_sparse_attention(call, grid, lists, scaling=0.7)
    assert not torch.allclose(actual, without)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_equal_those_of_the_dense_form(is_causal):
    results = []
    for function in (block_sparse_attention, naive_block_sparse_attention):
        call = make_call(None, 22, 22)
        call.q, call.k, call.v = (x.requires_grad_() for x in (call.q, call.k, call.v))
        grid = block_grid(call, 4, aligned=True)
        out = function(call, grid, drawn_lists(grid, HEADS, is_causal), scaling=0.7)
        results.append(torch.autograd.grad((out * draw(*out.shape, seed=5)).sum(), (call.q, call.k, call.v)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


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
    grid = block_grid(call, 4, aligned=kind is None)
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
    grid = block_grid(call, 4, aligned=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
        block_sparse_attention(call, grid, drawn_lists(grid, heads, True), scaling=0.7)
    assert sum(kept.values()) <= 5 * call.q.numel()


def test_earlier_keys_shift_the_grid():
    """7 and 10 real tokens came before, 9 come now: blocks are counted from each row's first token."""
    past = draw(2, HEADS, 10, DIM, seed=3), draw(2, HEADS, 10, DIM, seed=4), torch.tensor([7, 10])
    call = make_call(None, 9, 9, past)
    grid = block_grid(call, 4, aligned=False)
    assert grid.row[:, 0].tolist() == [1, 2]
    assert grid.start.tolist() == [3, 0]
    assert grid.count.tolist() == [16, 19]
    assert grid.blocks.tolist() == [4, 5]
    torch.testing.assert_close(grid.untile(grid.tiles(call.q), 9), call.q)
    lists = drawn_lists(grid, HEADS, True)
    actual, expected = (
        f(call, grid, lists, scaling=0.7) for f in (block_sparse_attention, naive_block_sparse_attention)
    )
    torch.testing.assert_close(actual, expected)


def test_samples_are_distinct_in_range_and_even():
    code = hashed(torch.arange(6000))
    for size, number in ((1, 1), (5, 3), (4, 4), (40, 3)):
        drawn = sample_distinct(code, torch.full((6000,), size), number)
        assert drawn.min() >= 0
        assert drawn.max() < size
        assert (drawn.diff(dim=-1) > 0).all()
        share = drawn.flatten().bincount(minlength=size) / (6000 * number / size)
        assert (share - 1).abs().max() < 0.2
    drawn = sample_distinct(code, torch.full((6000,), 2), 4)
    assert (drawn[:, :2] == torch.tensor([0, 1])).all()  # both there are; the other two entries mean nothing


def test_the_hash_is_the_same_everywhere():
    """Saved models depend on these numbers."""
    assert hashed(torch.tensor([0, 1, 2, 123456789])).tolist() == [0, 824515495, 1722258072, 1952335732]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_random_blocks_are_outside_of_what_is_seen_anyway(is_causal, window):
    blocks = torch.tensor([3, 9, 20])
    row = torch.arange(20)[None]
    codes = hashed(torch.arange(4))
    given = {"codes": codes, "number": 3, "num_window_blocks": window, "is_causal": is_causal}
    columns, there = random_blocks(row, blocks, **given)
    for b in range(3):
        for i in range(int(blocks[b])):
            near = set(range(i - window // 2, i + 1 if is_causal else i + window // 2 + 1))
            allowed = set(range(i if is_causal else int(blocks[b]))) - near - {0}
            allowed -= set() if is_causal else {int(blocks[b]) - 1}
            number = there[b if there.shape[0] > 1 else 0, i].sum()
            assert number == min(3, len(allowed))
            for h in range(4):
                chosen = columns[b if columns.shape[0] > 1 else 0, h, i, :number].tolist()
                assert len(set(chosen)) == number
                assert set(chosen) <= allowed
    heads = columns[-1].flatten(1)
    assert all((heads[a] != heads[b]).any() for a in range(4) for b in range(a))
    # A longer call, other rows beside it, and later blocks change nothing.
    some, _ = random_blocks(row[:, 7:9], blocks[1:2], **given)
    torch.testing.assert_close(some[0], columns[1 if columns.shape[0] > 1 else 0, :, 7:9])
    if is_causal:
        torch.testing.assert_close(random_blocks(row, blocks + 30, **given)[0], columns)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7])
def test_no_block_is_listed_twice(blocks):
    """A block of both window and ends counts once, or softmax would count its keys twice."""
    row, number = torch.arange(blocks)[None], torch.tensor([blocks])
    for is_causal in (False, True):
        given = {"codes": hashed(torch.arange(2)), "number": 3, "num_window_blocks": 3, "is_causal": is_causal}
        lists = bigbird_lists(row, number, random_blocks(row, number, **given), 3, is_causal)
        for i in range(blocks):
            columns = lists.columns[0, 0, i][lists.kind[0, i] != EMPTY].tolist()
            assert sorted(columns) == list(range(i + 1 if is_causal and blocks <= 6 else blocks)) or blocks > 6
            assert len(columns) == len(set(columns))
        kinds = lists.kind[0].flatten().unique().tolist()
        assert (CAUSAL in kinds) == is_causal
        assert (TAIL in kinds) != is_causal


STRIDED = pytest.mark.parametrize("stride", [1, 3, 8, 40])
SHAPES = pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (37, 37), (64, 64), (20, 37), (1, 37), (2, 37)])


@STRIDED
@SHAPES
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("segment", [1, 1 << 22])
def test_strided_equals_the_dense_form(stride, q_len, k_len, is_causal, segment, monkeypatch):
    monkeypatch.setattr(block_sparse, "SEGMENT_ELEMENTS", segment)
    q, k, v = (draw(2, HEADS, n, DIM, seed=s) for s, n in enumerate((q_len, k_len, k_len)))
    allowed = torch.arange(k_len) >= torch.tensor([[0], [min(5, k_len - 1)]])
    for mask in (None, allowed):
        given = {"stride": stride, "scaling": 0.7, "is_causal": is_causal, "key_allowed": mask}
        actual, expected = strided_attention(q, k, v, **given), naive_strided_attention(q, k, v, **given)
        seen = torch.ones(2, q_len, dtype=torch.bool) if mask is None else allowed[:, k_len - q_len :]
        torch.testing.assert_close(actual.transpose(1, 2)[seen], expected.transpose(1, 2)[seen])


@STRIDED
@SHAPES
@pytest.mark.parametrize("is_causal", [False, True])
def test_columns_of_the_stride(stride, q_len, k_len, is_causal):
    q, k, v = (draw(2, HEADS, n, DIM, seed=s) for s, n in enumerate((q_len, k_len, k_len)))
    distance = torch.arange(k_len - q_len, k_len)[:, None] - torch.arange(k_len)
    seen = (distance % stride == 0) & ((distance >= 0) | (not is_causal))
    logits = (q @ k.transpose(-1, -2) * 0.7).masked_fill(~seen, float("-inf"))
    actual = column_attention(q, k, v, stride=stride, scaling=0.7, is_causal=is_causal)
    torch.testing.assert_close(actual, logits.softmax(-1) @ v)


@pytest.mark.parametrize("heads", [1, HEADS], ids=["shared lists", "lists per head"])
@pytest.mark.parametrize("kind", [None, "left", "right", "interior"])
@pytest.mark.parametrize(("q_len", "k_len"), [(33, 33), (11, 33)])
@pytest.mark.parametrize("factor", [0.0, 100.0], ids=["gathered", "behind a mask"])
def test_gathered_keys_and_all_keys_behind_a_mask_are_the_same(heads, kind, q_len, k_len, factor, monkeypatch):
    monkeypatch.setattr(block_sparse, "DENSE_FACTOR", factor)
    results = []
    for function in (block_sparse_attention, naive_block_sparse_attention):
        call = make_call(kind, q_len, k_len)
        leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
        call.q, call.k, call.v = leaves
        grid = block_grid(call, 4, aligned=kind is None and q_len == k_len)
        lists = drawn_lists(grid, heads, False)
        full = torch.stack([grid.blocks - 1, torch.ones_like(grid.blocks)], dim=1)
        out = function(call, grid, BlockLists(lists.columns, lists.kind, False, full), scaling=0.7)
        real = call.rank[:, k_len - q_len :].expand(2, -1) >= 0
        loss = (out.transpose(1, 2)[real].sin()).sum()
        results.append([out.transpose(1, 2)[real], *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("blocks", "behind_a_mask"), [(8, True), (11, True), (12, False), (64, False)])
def test_all_keys_are_read_while_the_lists_name_most_of_them(blocks, behind_a_mask):
    """BigBird's lists: a window of 3, the first and the last block, 3 random ones; two rows see everything."""
    call = make_call(None, 2 * blocks, 2 * blocks)
    grid = block_grid(call, 2, aligned=True)
    given = {"codes": hashed(torch.arange(HEADS)), "number": 3, "num_window_blocks": 3, "is_causal": False}
    lists = bigbird_lists(grid.row, grid.blocks, random_blocks(grid.row, grid.blocks, **given), 3, False)
    assert block_sparse._dense_is_cheaper(lists, blocks, blocks) == behind_a_mask
    actual, expected = (
        f(call, grid, lists, scaling=0.7) for f in (block_sparse_attention, naive_block_sparse_attention)
    )
    torch.testing.assert_close(actual, expected)
