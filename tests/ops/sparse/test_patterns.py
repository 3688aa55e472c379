"""The lists of blocks, and how random ones are drawn."""

import pytest
import torch

from hf_linear_attn.ops.sparse.patterns import (
    CAUSAL,
    EMPTY,
    TAIL,
    bigbird_lists,
    hashed,
    random_blocks,
    sample_distinct,
)


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
