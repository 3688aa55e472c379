"""The lists of key tiles of a window, by rows and by columns, show what its dense form sees, each pair once."""

import pytest
import torch

from hf_linear_attn.ops.base.memo import kept_lists
from hf_linear_attn.ops.window.attention import naive_sliding_window_attention
from hf_linear_attn.ops.window.csr import window_csr
from tests.kernels.sparse.reference import seen_by_lists

CPU = torch.device("cpu")


TILES = ((16, 8), (8, 16)), ((8, 8), (8, 8))


def seen_of(attend, q_len, k_len):
    """What a twin sees: the keys whose values, unit vectors, show in the output."""
    return attend(torch.zeros(1, 1, q_len, 4), torch.zeros(1, 1, k_len, 4), torch.eye(k_len)[None, None]) > 0


@pytest.mark.parametrize("tiles", TILES, ids=["wide", "square"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (9, 20), (100, 0), (3, 100), (100, 100)])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 40), (16, 16), (37, 37), (9, 50)])
def test_windows(q_len, k_len, left, right, tiles):
    lists = window_csr(q_len, k_len, left, right, CPU, tiles=tiles)

    def twin(q, k, v):
        return naive_sliding_window_attention(q, k, v, left=left, right=right, scaling=1.0)

    expected = seen_of(twin, q_len, k_len)
    for transposed in (False, True):
        assert torch.equal(seen_by_lists(lists, q_len, k_len, transposed=transposed), expected)


@pytest.mark.parametrize("hole", [(-1, 1), (0, 0), (-20, 3)])
def test_holes(hole):
    distance = torch.arange(11, 40)[:, None] - torch.arange(40)
    expected = (distance <= 30) & (distance >= -7) & ((distance < hole[0]) | (distance > hole[1]))
    for tiles in TILES:
        lists = window_csr(29, 40, 30, 7, CPU, tiles=tiles, hole=hole)
        for transposed in (False, True):
            assert torch.equal(seen_by_lists(lists, 29, 40, transposed=transposed)[0, 0], expected)


def test_a_wide_window_is_mostly_full():
    lists = window_csr(256, 256, 128, 128, CPU, tiles=((16, 8), (8, 16)))
    for pointers in (lists.rows, lists.cols):
        masked, full = (pointers[0, 0, 8, 1] - pointers[0, 0, 8, 0]), (pointers[0, 0, 8, 2] - pointers[0, 0, 8, 1])
        assert int(masked) <= 6
        assert int(full) >= 14 if pointers is lists.cols else int(full) >= 28


def test_lists_are_kept_per_pattern_and_length():
    made = [window_csr(n, 32, left, 2, CPU, tiles=TILES[0]) for n, left in ((32, 5), (32, 5), (32, 6), (16, 5))]
    assert made[0] is made[1]
    assert len({id(x) for x in made}) == 3
    with torch.inference_mode():
        lists = kept_lists(("of this test",), CPU, lambda: torch.zeros(1))
    assert not lists.is_inference()
