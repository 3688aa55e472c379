"""Decoding with hashes in constant time: against the dense form, wherever the tokens of the state came from."""

import pytest
import torch

from hf_linear_attn.ops.base.compaction import compact
from hf_linear_attn.ops.lsh import decode as lsh_decode
from hf_linear_attn.ops.lsh.attention import SELF_LOGIT, naive_round_attention, visible
from hf_linear_attn.ops.lsh.decode import decode_token, init_lsh_state, lsh_past, lsh_state_after
from hf_linear_attn.ops.lsh.levels import Level

HEADS, DIM, ROUNDS = 2, 5, 3


def draw(length, buckets):
    generator = torch.Generator().manual_seed(length)
    tokens = [torch.randn(2, HEADS, length, DIM, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [*tokens, *(torch.randint(buckets, (2, HEADS, length, ROUNDS), generator=generator) for _ in range(2))]


def read(tokens, real, state, sizes):
    """The state after more tokens at once."""
    q, k, v, q_bucket, k_bucket = tokens
    chunk_size, buckets = sizes
    *past, bucket = lsh_past(state)
    call = compact(q, k, v, real, (*past, state["count"]))
    return lsh_state_after(
        call,
        compact(q_bucket, k_bucket, k_bucket, real, (bucket, bucket, state["count"])).k,
        chunk_size,
        (Level(0, buckets),),
    )


def decode(tokens, prompt, real, sizes, **options):
    """Outputs after the prompt, token by token, and the last state."""
    levels = (Level(0, sizes[1]),)
    state = init_lsh_state(2, HEADS, DIM, ROUNDS, sizes[0], levels, torch.float64, torch.device("cpu"))
    if prompt:
        state = read([x[:, :, :prompt] for x in tokens], real, state, sizes)
    outputs = []
    for token in range(prompt, tokens[0].shape[2]):
        given = {name: x.clone() for name, x in state.items()}
        out, after = decode_token(*(x[:, :, token : token + 1] for x in tokens), state, levels, **options)
        assert all(torch.equal(state[name], x) for name, x in given.items())
        outputs.append(out)
        state = after
    return torch.cat(outputs, 2), state


@pytest.mark.parametrize("self_bias", [0.0, SELF_LOGIT])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prompt", [0, 1, 37])
@pytest.mark.parametrize(("chunk_size", "buckets"), [(1, 2), (3, 4), (8, 1), (64, 6)])
def test_tokens_one_by_one_equal_the_dense_form(self_bias, padded, prompt, chunk_size, buckets, monkeypatch):
    monkeypatch.setattr(lsh_decode, "MOST_RECENT", 7)
    tokens, length = draw(70, buckets), 70
    hidden = torch.tensor([[prompt * 2 // 3], [0]]) if padded else torch.zeros(2, 1, dtype=torch.long)
    real = torch.arange(length) >= hidden
    given = {"scaling": 0.7, "self_bias": self_bias}
    outputs, _ = decode(tokens, prompt, real[:, :prompt] if padded else None, (chunk_size, buckets), **given)
    where = visible(tokens[3], tokens[4], real, chunk_size, buckets, is_causal=True)
    expected = naive_round_attention(*tokens[:3], where, scaling=0.7, self_penalty=self_bias != 0)
    torch.testing.assert_close(outputs, expected[:, :, prompt:])


def test_a_state_is_the_same_however_its_tokens_came(monkeypatch):
    monkeypatch.setattr(lsh_decode, "MOST_RECENT", 1)
    tokens, sizes = draw(60, 4), (3, 4)
    one_by_one = decode(tokens, 20, None, sizes, scaling=1.0, self_bias=0.0)[1]
    at_once = decode(tokens, 59, None, sizes, scaling=1.0, self_bias=0.0)[1]
    for x, y in zip(lsh_past(one_by_one), lsh_past(at_once), strict=True):
        assert torch.equal(x, y)
    for name in ("count", "filled"):
        assert torch.equal(one_by_one[name], at_once[name])
    held = lsh_decode._number_in(one_by_one["filled"], 6) >= 0
    assert torch.equal(one_by_one["member"][held], at_once["member"][held])


def test_a_step_leaves_the_tokens_of_the_prompt_where_they_are(monkeypatch):
    monkeypatch.setattr(lsh_decode, "MOST_RECENT", 4)
    tokens, sizes = draw(40, 4), (3, 4)
    state = read(
        [x[:, :, :30] for x in tokens], None, decode(draw(1, 4), 0, None, sizes, scaling=1.0, self_bias=0.0)[1], sizes
    )
    for token in range(30, 34):
        key, member = state["key"], state["member"]
        state = decode_token(
            *(x[:, :, token : token + 1] for x in tokens), state, (Level(0, 4),), scaling=1.0, self_bias=0.0
        )[1]
        assert (state["key"] is key) == (state["member"] is member) == (token < 33)
    assert state["key"].shape[2] == 35
    assert state["recent_key"].shape[2] == 0


def test_gradients_reach_the_tokens_of_the_state():
    tokens, sizes = draw(30, 4), (3, 4)
    leaves = [x.clone().requires_grad_() for x in tokens[:3]]
    outputs, _ = decode([*leaves, *tokens[3:]], 12, None, sizes, scaling=1.0, self_bias=0.0)
    found = torch.autograd.grad(outputs.sin().sum(), leaves)
    where = visible(*tokens[3:], None, *sizes, is_causal=True)
    expected = naive_round_attention(*leaves, where, scaling=1.0)[:, :, 12:]
    for actual, wanted in zip(found, torch.autograd.grad(expected.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(actual, wanted)
