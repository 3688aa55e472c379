"""Groups of blocks and the round by position against the dense form, gradients included."""

import pytest
import torch

from hf_linear_attn.ops.base import pieces
from hf_linear_attn.ops.lsh import blocks as chunk_attention
from hf_linear_attn.ops.lsh.attention import naive_round_attention, round_attention
from tests.ops.lsh.calls import draw, outcome, rotations, where_to_look


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("group", [1, 1 << 20])
def test_kernels_matmuls_and_groups_agree(is_causal, fused, group, monkeypatch):
    monkeypatch.setattr(pieces, "serves", lambda q, v: fused)
    monkeypatch.setattr(chunk_attention, "GROUP_ELEMENTS", group)
    monkeypatch.setattr(chunk_attention, "HEAD_ELEMENTS", 1500 * group)  # 1 or 2 of 4 heads at a time, or all
    q, k, v = draw(90, 90)
    real = torch.arange(90) >= torch.tensor([[7], [0]])
    where = where_to_look(q, k, rotations(6, 3), real, 8, is_causal)
    expected = outcome(naive_round_attention, (q, k, v), where, scaling=0.7)

    for actual, wanted in zip(outcome(round_attention, (q, k, v), where, scaling=0.7), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("length", [33, 64])
def test_the_round_by_position_gathers_nothing_and_is_the_same(length):
    q, k, v = draw(length, length)
    given = rotations(4, 2)
    results = []
    for real in (None, torch.ones(1, length, dtype=torch.bool)):
        where = where_to_look(q, k, given, real, 8, True)
        assert where.by_position == (real is None)
        results.append(outcome(round_attention, (q, k, v), where, scaling=1.0))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_values_may_have_a_width_of_their_own():
    q, k, v = draw(40, 40)
    where = where_to_look(q, k, rotations(4, 2), None, 8, False)
    v = torch.cat([v, v[..., :2]], -1)
    actual = outcome(round_attention, (q, k, v), where, scaling=1.0)
    for x, y in zip(actual, outcome(naive_round_attention, (q, k, v), where, scaling=1.0), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("chunks", [200, 300])
def test_many_chunks_are_told_apart(chunks):
    """Above 255 of them their numbers no longer fit a byte."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2 * chunks, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    where = where_to_look(q, k, rotations(4, 3, heads=1, dim=4), None, 2, False)
    actual = round_attention(q, k, v, where, scaling=1.0)
    torch.testing.assert_close(actual, naive_round_attention(q, k, v, where, scaling=1.0))


@pytest.mark.parametrize(
    ("num_chunks", "k_len", "of_positions", "kind"),
    [
        (255, 9000, False, torch.uint8),
        (256, 9000, False, torch.int16),
        (20, 16383, True, torch.int16),
        (20, 16384, True, torch.int32),
    ],
)
def test_distances_of_chunks_are_told_apart_in_their_type(num_chunks, k_len, of_positions, kind):
    assert chunk_attention._kind(num_chunks, k_len, of_positions) == kind
    chunks = torch.arange(1, num_chunks)
    distance = chunks[:, None] - chunks
    found = chunk_attention._distance(chunks[:, None].to(kind), chunks.to(kind))
    assert torch.equal((found >= 0) & (found <= 1), (distance == 0) | (distance == 1))
    assert (found >= 0).all()
