"""Padding and ranks, row by row in Python."""

import pytest
import torch

from hf_linear_attn.ops.base import masking


def masks(rows=20, length=13):
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, rows)[:, None]
    assert not mask[0].any()
    assert mask[-1].any()
    return mask


def test_what_stands_at_padding_vanishes_in_values_and_gradients():
    x = torch.full((20, 2, 13, 3), torch.nan).masked_fill(masks()[:, None, :, None], 2.0).requires_grad_()
    found = masking.safe_masked_fill(x, masks())
    assert torch.equal(found, 2.0 * masks()[:, None, :, None].expand_as(x))
    found.square().sum().backward()
    assert torch.equal(x.grad, 4.0 * masks()[:, None, :, None].expand_as(x))
    assert masking.safe_masked_fill(x, None) is x


def test_queries_are_the_last_keys():
    mask = masks()
    assert masking.query_mask_of(mask, 13, False) is mask
    assert torch.equal(masking.query_mask_of(mask, 4, True), mask[:, -4:])
    assert masking.query_mask_of(mask, 4, False) is None  # other tokens than the keys
    assert masking.query_mask_of(mask, 14, True) is None
    assert masking.query_mask_of(None, 4, True) is None


def test_ranks_count_real_tokens():
    for row, ranks in zip(masks().tolist(), masking.real_token_rank(masks()).tolist(), strict=True):
        assert ranks == [max(sum(row[: i + 1]) - 1, 0) for i in range(13)]
    with pytest.raises(ValueError, match="covers 13 tokens, the sequence has 12"):
        masking.real_token_rank(masks(), 12)


def test_padding_goes_to_the_front_and_back():
    mask, perm = masks(), masking.pads_first_permutation(masks())
    for row, places in zip(mask.tolist(), perm.tolist(), strict=True):
        assert places == [i for i in range(13) if not row[i]] + [i for i in range(13) if row[i]]
    for shape in ((20, 13), (20, 13, 3), (20, 2, 13, 3)):
        x = torch.randn(shape)
        there = masking.gather_tokens(x, perm)
        assert torch.equal(masking.gather_tokens(there, masking.invert_permutation(perm)), x)
    with pytest.raises(ValueError, match=r"got shape \(13,\)"):
        masking.gather_tokens(torch.zeros(13), perm)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (3, 7), (1, 7)])
def test_causal_rows_are_right_aligned(queries, keys):
    expected = [[j <= keys - queries + i for j in range(keys)] for i in range(queries)]
    assert masking.causal_mask(queries, keys).tolist() == expected
    with pytest.raises(ValueError, match=f"q_len={keys + 1} and k_len={keys}"):
        masking.causal_mask(keys + 1, keys)
