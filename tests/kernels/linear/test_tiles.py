"""Segments by occupancy."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn.kernels.linear import tiles as config


@pytest.mark.parametrize(
    ("length", "programs", "segments"), [(65_536, 96, 1), (2048, 1, 1), (2049, 12, 7), (16_384, 48, 9), (600, 400, 1)]
)
def test_the_forward_pass_is_one_launch_where_heads_fill_a_gpu_or_few_tokens_come(
    length: int, programs: int, segments: int
) -> None:
    tiles = config.Tiles(64, 64, 64, 8, 3)
    count, size = config.forward_segments_for(length, programs, tiles, 132)
    assert count == segments
    assert (count - 1) * size < length <= count * size
    assert size % tiles.tokens == 0
