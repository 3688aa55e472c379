"""Rows of global tokens over everything, against softmax written out."""

import pytest
import torch
from torch import nn

from hf_linear_attn.ops.base.compaction import compact, first_tokens
from hf_linear_attn.ops.window.global_rows import affine, check_hidden, keep_old, rows_over_all

F64 = torch.float64


class Wrapped(nn.Module):
    """A linear layer and a low-rank change, as LoRA has it."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 6), nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), Wrapped])
def test_weight_and_bias_are_what_the_layer_applies(make):
    layer, x = make().double(), torch.randn(4, 6, dtype=F64)
    weight, bias = affine(layer, x)
    torch.testing.assert_close(x @ weight.mT + bias, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_large_bias_leaves_of_a_wrapped_weight_what_the_dtype_can_hold(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    nn.init.normal_(layer.weight, std=0.04)
    nn.init.constant_(layer.bias, 1.0)
    found, bias = affine(nn.Sequential(layer.to(dtype)), torch.zeros(1, 16, dtype=dtype))
    assert torch.equal(bias, layer.bias)
    torch.testing.assert_close(found, layer.weight, rtol=0, atol=0.2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_over_all_tokens(padded, causal):
    torch.manual_seed(0)
    hidden, layers = torch.randn(2, 9, 6, dtype=F64), [nn.Linear(6, 6).double() for _ in range(3)]
    mask = torch.ones(2, 9, dtype=torch.bool)
    if padded:
        mask[0, :2], mask[1, 4], mask[1, 8] = False, False, False
    q, k, v = torch.randn(3, 2, 3, 9, 2, dtype=F64)
    call = compact(q, k, v, mask if padded else None)
    dirty = hidden.masked_fill(~mask[..., None], torch.nan)
    found = rows_over_all(call, first_tokens(2, call), dirty, layers, 0.5, causal)
    query, key, value = (layer(hidden).unflatten(-1, (3, 2)).transpose(1, 2) for layer in layers)
    for b in range(2):
        for i, place in enumerate(mask[b].nonzero()[:2, 0].tolist()):
            seen = mask[b] & (torch.arange(9) <= place) if causal else mask[b]
            logits = (query[b, :, place, None] @ key[b].mT * 0.5).masked_fill(~seen, -torch.inf)
            torch.testing.assert_close(found[b, :, i], (logits.softmax(-1) @ value[b])[:, 0])


def test_calls_that_lack_hidden_states_are_refused():
    mask = torch.ones(2, 9, dtype=torch.bool)
    check_hidden(9, mask, 9, 2, True)
    check_hidden(4, mask, 9, 2, False)
    check_hidden(4, None, 9, 2, False)
    with pytest.raises(ValueError, match="hidden states of all 9 keys, got those of 4 queries"):
        check_hidden(4, None, 9, 2, True)
    with pytest.raises(ValueError, match="none or all of the first 6 tokens"):
        check_hidden(4, None, 9, 6, False)
    mask[0, :4] = False  # one of two global tokens is before the queries, the other among them
    with pytest.raises(ValueError, match="first 2 tokens"):
        check_hidden(4, mask, 9, 2, False)


def test_new_tokens_replace_those_of_the_state():
    call = compact(*torch.zeros(3, 1, 1, 3, 2), None, (*torch.zeros(2, 1, 1, 1, 2), torch.tensor([1])))
    tokens = first_tokens(2, call)  # the first came before the call
    kept = keep_old({"x": torch.ones(1, 1, 2, 2)}, tokens, {"x": torch.full((1, 1, 2, 2), 5.0)})
    assert kept["x"][0, 0, :, 0].tolist() == [5.0, 1.0]
