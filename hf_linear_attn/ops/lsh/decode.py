"""One token after the other with locality-sensitive hashes: what a causal query sees, in constant time.

Of each bucket a query sees the members since the start of the chunk before its own, fewer than 2 c of them. The state
therefore knows the last 2 c members of every bucket beside all keys and values. New tokens wait in tensors of their
own, so that a step copies these alone, and earlier keys and the lists of members stay as they are; no state is changed
in place. Where buckets grow, the state keeps every token's bucket at all levels, and the members at the level of the
next token: they are found anew at the few tokens that begin a level. At a whole level a query sees all keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.compaction import CompactedCall, init_kv_state, kv_state_after
from hf_linear_attn.ops.lsh.levels import Level, at_level, levels_up_to, read_whole, whole_length

__all__ = ["decode_token", "init_lsh_state", "lsh_past", "lsh_state_after"]

# New tokens are joined to the earlier ones when they are this many: a step then copies half of them, and in the mean
# 1 / 256 of the earlier ones.
MOST_RECENT = 256
_KEPT = ("key", "value", "bucket")  # of every token

_State = dict[str, torch.Tensor]


def init_lsh_state(
    batch_size: int,
    num_heads: int,
    head_dim: int,
    rounds: int,
    chunk_size: int,
    levels: Sequence[Level],
    dtype: torch.dtype,
    device: torch.device,
) -> _State:
    """The decode state before any token, N tokens real or padding being 0 so far, padding in front.

    Returns:
        key, value `[B, H, N, D]`, bucket `[B, H, N, levels * rounds]`, their continuations recent_key, recent_value and
        recent_bucket, all of them real, and count `[B]` of real tokens. Of every bucket, at the level of the next
        token, the number of its keys without the recent ones, filled `[B, H, rounds, num_buckets]`, and member
        `[B, H, rounds, num_buckets, 2 * chunk_size]`: the key of number i in its bucket is the real token
        `member[..., i % (2 * chunk_size)]`, counted from 0, for the last of them.
    """
    state = init_kv_state(batch_size, num_heads, head_dim, dtype, device)
    integers = {"dtype": torch.int32, "device": device}
    state["bucket"] = torch.zeros(batch_size, num_heads, 0, len(levels) * rounds, **integers)  # type: ignore[call-overload]
    filled = torch.zeros(batch_size, num_heads, rounds, levels[0].buckets, **integers)  # type: ignore[call-overload]
    member = filled[..., None].repeat(1, 1, 1, 1, 2 * chunk_size)
    return {**_nothing_recent(state), "filled": filled, "member": member}


def _nothing_recent(state: _State) -> _State:
    return {**state, **{f"recent_{name}": state[name][:, :, :0].clone() for name in _KEPT}}


def lsh_past(state: _State) -> list[torch.Tensor]:
    """Keys, values and buckets of all tokens so far, padding in front."""
    pairs = ((state[name], state[f"recent_{name}"]) for name in _KEPT)
    return [torch.cat([old, recent], 2) if recent.shape[2] else old for old, recent in pairs]


@torch.no_grad()
def _members(bucket: torch.Tensor, rank: torch.Tensor, num_buckets: int, slots: int) -> _State:
    """`filled` and `member` of a state with these buckets `[B, H, T, rounds]`, token j being number `rank[b, j]`."""
    length = bucket.shape[2]
    place = torch.arange(length, device=bucket.device)
    bucket = bucket.mT.contiguous().long()  # [B, H, rounds, T]
    code = torch.where(rank[:, None, None] >= 0, bucket * length, num_buckets * length) + place
    code = code.sort(-1).values
    edge = (torch.arange(num_buckets + 1, device=code.device) * length).expand(*code.shape[:-1], -1).contiguous()
    end = torch.searchsorted(code, edge)
    filled = end.diff()
    number = _number_in(filled, slots)
    index = (end[..., :-1, None] + number).clamp_(0, length - 1)
    taken = code.gather(-1, index.flatten(-2)) % length
    member = rank[:, None, None].expand(*taken.shape[:-1], -1).gather(-1, taken).view_as(index)
    return {"filled": filled.int(), "member": member.masked_fill_(number < 0, 0).int()}


def _number_in(filled: torch.Tensor, slots: int) -> torch.Tensor:
    """The number in its bucket of what each slot holds, negative for nothing: `[..., slots]`."""
    last = filled[..., None] - 1
    return last - (last - torch.arange(slots, device=filled.device)) % slots


def lsh_state_after(call: CompactedCall, bucket: torch.Tensor, chunk_size: int, levels: Sequence[Level]) -> _State:
    """The state of `init_lsh_state` after a call of any length.

    Args:
        call: compacted.
        bucket: long `[B, H, Tk, levels * rounds]`, compacted too.
        chunk_size: keys per chunk.
        levels: all that a token may be at.
    """
    state = {**kv_state_after(call), "bucket": bucket.int()}
    return {**_nothing_recent(state), **_members_at(bucket, call.rank, 2 * chunk_size, levels)}


def _members_at(bucket: torch.Tensor, rank: torch.Tensor, slots: int, levels: Sequence[Level]) -> _State:
    """`_members` at the level of the next token."""
    most = levels_up_to(levels, rank.shape[1])[-1].buckets
    return _members(at_level(bucket, rank[:, -1] + 1, levels), rank, most, slots)


def decode_token(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_bucket: torch.Tensor,
    k_bucket: torch.Tensor,
    state: _State,
    levels: Sequence[Level],
    *,
    scaling: float,
    self_bias: float,
) -> tuple[torch.Tensor, _State]:
    """Attention of one new token per sequence, as by `ops.lsh.attention` with all earlier ones.

    Where there are several levels, numbers of the state decide which way to go: such a call cannot be traced.

    Args:
        q: `[B, H, 1, D]`.
        k: `[B, H, 1, D]`.
        v: `[B, H, 1, D]`.
        q_bucket: long `[B, H, 1, levels * rounds]`.
        k_bucket: long `[B, H, 1, levels * rounds]`.
        state: of `init_lsh_state`, `lsh_state_after` or this.
        levels: as for that state.
        scaling: factor of the logits.
        self_bias: added to the logit of the token with itself.

    Returns:
        output `[B, H, 1, D]` and the new state.
    """
    new = {"key": k, "value": v, "bucket": k_bucket.int()}
    recent = {name: torch.cat([state[f"recent_{name}"].to(x.dtype), x], 2) for name, x in new.items()}
    reached = levels_up_to(levels, state["key"].shape[2] + recent["key"].shape[2])
    used = q_bucket.shape[-1] // len(levels) * len(reached)
    q_own, recent_own = (at_level(x[..., :used], state["count"], reached) for x in (q_bucket, recent["bucket"]))
    token, lately = _tokens_seen(q_own[:, :, 0], recent_own[:, :, :-1], state, levels)
    place, seen = _places(token, lately, state["count"], state["key"].shape[2])
    keys, values = (torch.cat([_take(state[x].to(k.dtype), place), recent[x]], 2) for x in ("key", "value"))
    logits = (q @ keys.mT).to(torch.promote_types(q.dtype, torch.float32)) * scaling
    if self_bias:
        logits = torch.cat([logits[..., :-1], logits[..., -1:] + self_bias], -1)
    weights = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    return weights.to(values.dtype) @ values, _state_with(state, recent, levels)


@torch.no_grad()
def _tokens_seen(
    q_bucket: torch.Tensor, recent: torch.Tensor, state: _State, levels: Sequence[Level]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a new query of buckets `[B, H, rounds]` sees; those of the recent tokens before it are `[B, H, T, rounds]`.

    Returns:
        tokens by position or from `member`, each once, -1 in other places, `[B, H, S]`, and which of the recent ones
        are seen for their bucket, bool `[B, H, T]`.
    """
    slots = state["member"].shape[-1]
    chunk, own = slots // 2, state["count"][:, None, None]
    filled = state["filled"].gather(-1, q_bucket[..., None]).long()
    token = state["member"].gather(-2, q_bucket[..., None, None].expand(-1, -1, -1, -1, slots))[..., 0, :].long()
    shared = recent.mT == q_bucket[..., None]  # [B, H, rounds, T]
    number = filled + shared.long().cumsum(-1)  # one more than that of each shared one in its bucket
    first = _first_seen(filled + shared.sum(-1, keepdim=True), chunk)
    token = token.masked_fill(_number_in(filled[..., 0], slots) < first, -1).flatten(2)
    start, whole = _first_seen(own, chunk), read_whole(own, levels)
    if whole is not None and whole.any():
        start = start.masked_fill(whole, 0)
        slots = max(slots, whole_length(state["key"].shape[2] + recent.shape[2] + 1, levels))
    by_position = own - torch.arange(slots, device=own.device)
    by_position = by_position.masked_fill(by_position < start, -1)
    token = torch.cat([token, by_position.expand(*token.shape[:2], -1)], -1).sort(-1).values
    again = token[..., 1:] == token[..., :-1]
    token[..., 1:].masked_fill_(again, -1)
    return token, (shared & (number > first)).any(2)


def _first_seen(number: torch.Tensor, chunk: int) -> torch.Tensor:
    """Where the chunk before that of `number` starts."""
    return (number // chunk - 1).clamp(min=0) * chunk


@torch.no_grad()
def _places(
    token: torch.Tensor, lately: torch.Tensor, count: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where these tokens (-1: none) stand among `length` earlier ones, and which of them and the recent ones are seen.

    Returns:
        place long `[B, H, S]`, any place for tokens that are not among the earlier ones, S = 0 if there are none, and
        seen bool `[B, H, S + T + 1]`, the new token being the last.
    """
    first = (count - lately.shape[2])[:, None, None]  # of the recent ones
    new = F.pad(lately, (1, 1)).scatter_(-1, (token - first + 1).clamp_(min=0), True)[..., 1:]
    token = token if length else token[..., :0]
    place = (token + length - first).clamp_(0, max(length - 1, 0))
    return place, torch.cat([(token >= 0) & (token < first), new], -1)


def _take(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Tokens at `place` `[B, H, S]` of `x` `[B, H, N, D]`: `[B, H, S, D]`."""
    B, H, length, D = x.shape
    head = torch.arange(B * H, device=x.device).view(B, H, 1)
    return x.flatten(0, 2).index_select(0, (place + head * length).flatten()).view(B, H, -1, D)


def _state_with(state: _State, recent: _State, levels: Sequence[Level]) -> _State:
    count, length = state["count"] + 1, state["key"].shape[2] + recent["key"].shape[2]
    after = {**state, **{f"recent_{name}": x for name, x in recent.items()}, "count": count}
    starts = [level.start for level in levels_up_to(levels, length)[1:]]
    begins = bool(starts) and not set(starts).isdisjoint(count.tolist())
    if not begins and recent["key"].shape[2] < MOST_RECENT:
        return after
    after |= dict(zip(_KEPT, lsh_past(after), strict=True))
    rank = torch.arange(length, device=count.device) - length + count[:, None]
    return {**_nothing_recent(after), **_members_at(after["bucket"], rank, state["member"].shape[-1], levels)}
