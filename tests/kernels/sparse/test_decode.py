"""Decode steps by the block-sparse kernels: lists kept from token to token, against softmax over what is seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn.bench.peers.layers import LayerShape, build_variant
from hf_linear_attn.kernels.sparse.launch import tiles_for
from hf_linear_attn.ops.sparse import fused
from hf_linear_attn.ops.sparse.strided import attend_all, column_attention, strided_attention
from hf_linear_attn.ops.window.csr import window_csr
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200])
def test_one_query_sees_all_keys_of_any_length(length: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 20) for n in (1, length, length))
    found = attend_all(q, k, v, scaling=0.3, backend="triton")
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, scale=0.3))


def test_lengths_of_as_many_tiles_share_their_lists() -> None:
    tiles = tiles_for(torch.float32, 20)
    size = min(n for _, n in tiles)
    given = torch.device("cpu"), tiles
    lists = [window_csr(1, n, n, 0, given[0], tiles=given[1]) for n in (size + 1, size + 7, 2 * size, 2 * size + 1)]
    assert lists[0].col_idx is lists[1].col_idx is lists[2].col_idx is not lists[3].col_idx
    assert [x.q_start.item() for x in lists if x.q_start is not None] == [size, size + 6, 2 * size - 1, 2 * size]


@pytest.mark.parametrize("attend", [strided_attention, column_attention])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 8, 9, 30, 31])
def test_the_last_row_of_a_strided_pattern(attend, backend: str, length: int) -> None:
    """The same as in a call of all rows, whose form is another."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 20) for _ in range(3))
    given = {"stride": 4, "scaling": 0.3, "is_causal": True}
    whole = attend(q, k, v, **given, backend="torch", key_allowed=torch.ones(1, length, dtype=torch.bool))
    found = attend(q[:, :, -1:], k, v, **given, backend=backend)
    torch.testing.assert_close(found, whole[:, :, -1:])


def _layer(key: str, options: dict[str, object]) -> AttentionVariant:
    layer = build_variant(LayerShape(1, 128, 32, 2, is_causal=True), key, options)
    layer.backend = "triton"
    return layer


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("bigbird", {"block_size": 8, "num_random_blocks": 1}),
        ("sparse", {"pattern": "fixed", "stride": 8, "num_summary_tokens": 2}),
        ("sparse", {"pattern": "fixed", "stride": 8, "num_summary_tokens": 2, "heads": "split"}),
        ("sparse", {"pattern": "block_local", "stride": 8}),
        ("sparse", {"pattern": "strided", "stride": 8, "heads": "split"}),
    ],
)
@torch.no_grad()
def test_token_by_token_is_the_whole_call(key: str, options: dict[str, object]) -> None:
    """Past the ends of blocks; with rows reordered on the way, of which less is known."""
    torch.manual_seed(0)
    layer = _layer(key, options)
    q, k, v = (torch.randn(2, 2, 90, 16) for _ in range(3))

    def inputs(tokens: slice) -> AttentionInputs:
        return AttentionInputs(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], None, True, 0.25)

    whole = layer(inputs(slice(None)))[0]
    state = layer.init_state(2, torch.float32, torch.device("cpu"))
    _, state = layer(inputs(slice(0, 50)), state)
    for t in range(50, 90):
        if t == 70:
            state = {name: x[[0, 1]] for name, x in state.items()}
        output, state = layer(inputs(slice(t, t + 1)), state)
        torch.testing.assert_close(output, whole[:, :, t : t + 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_block_of_bigbird_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, made = _layer("bigbird", {"block_size": 8, "num_random_blocks": 1}), []
    make = fused.blocks_csr
    monkeypatch.setattr(fused, "blocks_csr", lambda *args, **given: made.append(args) or make(*args, **given))
    x = torch.randn(1, 2, 80, 16)
    state = layer(AttentionInputs(x, x, x, None, True, 0.25), layer.init_state(1, torch.float32, x.device))[1]
    made.clear()
    for _ in range(16):
        token = torch.randn(1, 2, 1, 16)
        state = layer(AttentionInputs(token, token, token, None, True, 0.25), state)[1]
    assert len(made) == 2
