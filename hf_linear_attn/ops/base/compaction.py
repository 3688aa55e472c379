"""Padding moved to the front, and where the global tokens of a call stand then.

With padding in front, the real tokens of every row are contiguous and right-aligned: a distance of places is
a distance of ranks, wherever the padding was. The Tq query rows are the last Tq places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_linear_attn.ops.base.growing import append_tokens, last_tokens, may_grow
from hf_linear_attn.ops.base.masking import invert_permutation, pads_first_permutation, safe_masked_fill
from hf_linear_attn.ops.base.memo import known_number, lazy, note_number
from hf_linear_attn.ops.base.tracing import is_exported

__all__ = [
    "CompactedCall",
    "GlobalTokens",
    "compact",
    "first_tokens",
    "global_tokens",
    "heads_apart",
    "init_count",
    "init_kv_state",
    "kv_state_after",
    "marked_tokens",
    "take_tokens",
    "window_state_after",
]


def take_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `index` (long `[B, G]`) of `x` `[B, H, T, D]`, as `[B, H, G, D]`.

    Whole rows are copied: on CPU an order of magnitude faster than `gather` with an expanded index, forward and
    backward. They hold H * D numbers, or D where the heads do not lie together (keys of a decode state): to bring
    them together would copy all of `x`.
    """
    B, H, T, D = x.shape
    apart = heads_apart(x) if not torch.compiler.is_compiling() and index.shape[1] <= T else None
    if apart is not None:
        matrix, first = apart
        return matrix.index_select(0, (first + index[:, None]).flatten()).view(B, H, index.shape[1], D)
    rows = (index + torch.arange(B, device=x.device)[:, None] * T).flatten()
    taken = x.transpose(1, 2).reshape(B * T, H * D).index_select(0, rows)
    return taken.view(B, index.shape[1], H, D).transpose(1, 2)


def heads_apart(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`x` `[B, H, T, D]` as a matrix of tokens `[rows, D]`, without a copy, and the row of each head's first token.

    Returns:
        the matrix and long `[B, H, 1]`; None where the tokens of a head do not lie one after the other.
    """
    B, H, T, D = x.shape
    heads = torch.arange(B * H, device=x.device).view(B, H, 1)
    if x.is_contiguous():
        return x.view(B * H * T, D), heads * T
    if torch.is_grad_enabled() or x.stride()[2:] != (D, 1) or x.stride(0) % D or x.stride(1) % D:
        return None
    of_row, of_head = x.stride(0) // D, x.stride(1) // D  # a view with room behind its tokens
    matrix = x.as_strided(((B - 1) * of_row + (H - 1) * of_head + T, D), (D, 1))
    return matrix, heads // H * of_row + heads % H * of_head


@dataclass
class CompactedCall:
    """One attention call with its padding in front and earlier keys before the new ones.

    Attributes:
        q: `[B, H, Tq, D]`, 0 at padding.
        k: `[B, H, Tk, D]`, 0 at padding.
        v: `[B, H, Tk, D]`, 0 at padding.
        perm: long `[B, Tq]`, row i was token `perm[b, i]` of the call; None without a padding mask.
        query_mask: bool `[B, Tq]` in the call's own order, or None.
        past: long `[B or 1]`, real tokens before the call.
        new: real tokens of the call, one number or long `[B]`.
        tokens: `past + new`, if all rows are known to have as many.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    perm: torch.Tensor | None
    query_mask: torch.Tensor | None
    past: torch.Tensor
    new: int | torch.Tensor
    tokens: int | None

    @lazy
    def rank(self) -> torch.Tensor:
        """Rank of each key among all real tokens, long `[B or 1, Tk]`; negative where there is no token."""
        length = self.k.shape[2]
        return torch.arange(length, device=self.k.device) + (self.past + (self.new - length))[:, None]

    @property
    def real(self) -> torch.Tensor | None:
        """Which keys are tokens, bool `[B or 1, Tk]`; None if all are known to be."""
        return None if self.tokens is not None and self.tokens >= self.k.shape[2] else self.rank >= 0

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Bring an output `[B, H, Tq, D]` back to the call's order, 0 at padding."""
        if self.perm is None:
            return x
        return safe_masked_fill(take_tokens(x, invert_permutation(self.perm)), self.query_mask)

    def origin(self, position: torch.Tensor) -> torch.Tensor:
        """Which token of the call stands at key `position` `[B or 1, G]` (clamped): long `[B, G]`."""
        B, _, q_len, _ = self.q.shape
        row = (position - self.k.shape[2] + q_len).clamp(0, q_len - 1).expand(B, -1)
        return row if self.perm is None else self.perm.gather(1, row)


def compact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    token_mask: torch.Tensor | None,
    past: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> CompactedCall:
    """Move the padding of a call to the front.

    Args:
        q: `[B, H, Tq, D]`; row r is token Tk - Tq + r.
        k: `[B, H, Tk, D]`.
        v: `[B, H, Tk, D]`.
        token_mask: bool `[B, Tk]`, True for a real token, or None.
        past: the last W keys and values before the call `[B, H, W, D]`, right-aligned, and the number of real
            tokens so far, long `[B]` (it may be more or less than W).
    """
    q_len, device = q.shape[2], q.device
    new: int | torch.Tensor = k.shape[2]
    query_mask = perm = None
    real = token_mask
    if real is not None:
        query_mask, new = real[:, k.shape[2] - q_len :], real.sum(-1)
        perm = pads_first_permutation(query_mask)
        q = take_tokens(safe_masked_fill(q, query_mask), perm)
        k, v = safe_masked_fill(k, real), safe_masked_fill(v, real)
    tokens = k.shape[2] if past is None and real is None else None
    if past is None:
        count = torch.zeros(1, dtype=torch.long, device=device)
    else:
        past_key, past_value, count = past
        known = known_number(count) if real is None else None
        if known is not None:
            count, tokens = count[:1], known + k.shape[2]
        k, v = append_tokens(past_key.to(k.dtype), k), append_tokens(past_value.to(v.dtype), v)
        if real is not None:
            window = past_key.shape[2]
            held = torch.arange(window, device=device) >= window - count[:, None]
            real = torch.cat([held, real], dim=1)
    if real is not None:
        order = pads_first_permutation(real)
        k, v = take_tokens(k, order), take_tokens(v, order)
    return CompactedCall(q, k, v, perm, query_mask, count, new, tokens)


def init_kv_state(
    batch_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """The decode state of a variant that keeps every key and value: none of them yet.

    Pass `(state["key"], state["value"], state["count"])` to `compact` as the past.
    """
    shape = (batch_size, num_heads, 0, head_dim)
    return {
        "key": torch.zeros(shape, dtype=dtype, device=device),
        "value": torch.zeros(shape, dtype=dtype, device=device),
        "count": init_count(batch_size, device),
    }


def init_count(batch_size: int, device: torch.device) -> torch.Tensor:
    """The count of a state that has seen no token: long `[B]`."""
    return note_number(torch.zeros(batch_size, dtype=torch.long, device=device), 0)


def kv_state_after(call: CompactedCall) -> dict[str, torch.Tensor]:
    """The state of `init_kv_state` after a call: all keys and values so far, padding in front, and their count."""
    return {"key": may_grow(call.k), "value": may_grow(call.v), "count": _count_after(call)}


def window_state_after(call: CompactedCall, size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state of a window after a call: the last `size` keys and values, `[B, H, size, D]` in `dtype`, and the count.

    The count is that of all real tokens so far, long `[B]`.
    """
    key, value = (last_tokens(x.to(dtype), size) for x in (call.k, call.v))
    return {"key": key, "value": value, "count": _count_after(call)}


def _count_after(call: CompactedCall) -> torch.Tensor:
    count = (call.past + call.new).expand(call.k.shape[0]).contiguous()
    return count if call.tokens is None else note_number(count, call.tokens)


@dataclass
class GlobalTokens:
    """G global tokens per batch row of a compacted call.

    Attributes:
        position: long `[B or 1, G]`, place among the keys; outside 0..Tk-1 when the token is not among them.
        valid: bool `[B or 1, G]`, whether the token exists.
        is_new: bool `[B or 1, G]`, whether it came with this call.
        slot: long `[B or 1, Tq]`, the query row's place among the global tokens, -1 for a local row.
        in_window: bool `[B or 1, Tk]`, keys that windows may contain: real and not global.
    """

    position: torch.Tensor
    valid: torch.Tensor
    is_new: torch.Tensor
    slot: torch.Tensor
    in_window: torch.Tensor

    def seen_by(self, q_len: int, k_len: int, is_causal: bool) -> torch.Tensor:
        """Which row may see which global token: bool, broadcastable to `[B, Tq, G]`."""
        seen = self.valid[:, None, :]
        if is_causal:
            rows = torch.arange(k_len - q_len, k_len, device=seen.device)
            seen = seen & (self.position[:, None, :] <= rows[:, None])
        return seen

    def place_rows(self, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` `[B, H, Tq, D]` with the rows of the global tokens taken from `rows` `[B, H, G, D]`."""
        slot = self.slot.expand(rows.shape[0], -1)
        if rows.shape[2] > 1:
            rows = take_tokens(rows, slot.clamp(min=0))
        return torch.where((slot >= 0)[:, None, :, None], rows.to(out.dtype), out)


def first_tokens(count: int, call: CompactedCall) -> GlobalTokens:
    """The first `count` real tokens of each sequence, no matter in which call they came."""
    rank, past = call.rank, call.past[:, None]
    number = torch.arange(count, device=rank.device)
    last, row = rank[:, -1:], rank[:, rank.shape[1] - call.q.shape[2] :]
    valid = number <= last
    return GlobalTokens(
        position=number - last + rank.shape[1] - 1,
        valid=valid,
        is_new=valid & (number >= past),
        slot=torch.where((row >= past) & (row < count), row, -1),
        in_window=rank >= count,
    )


def global_tokens(mask: torch.Tensor | None, count: int, call: CompactedCall) -> GlobalTokens | None:
    """The tokens that `mask` marks (`marked_tokens`); without one the first `count`, or None for no such token."""
    if mask is not None:
        return marked_tokens(mask.bool(), call)
    return first_tokens(count, call) if count > 0 else None


def marked_tokens(mask: torch.Tensor, call: CompactedCall) -> GlobalTokens | None:
    """The real tokens that `mask` (bool `[B, T]`, in the call's order) marks, or None when it marks none.

    How many they are is read from the device: this path cannot be compiled into one graph.

    Raises:
        ValueError: in an exported program.
    """
    if is_exported():
        raise ValueError(
            "Global tokens by global_attention_mask, by id or by the head's task in an exported program: how many they "
            "are decides the size of tensors. Allowed there: the first tokens (num_global_tokens=1), without a mask."
        )
    if call.perm is not None and call.query_mask is not None:
        mask = (mask & call.query_mask).gather(1, call.perm)
    number = mask.sum(-1)
    most = int(number.max().item())
    if most == 0:
        return None
    valid = torch.arange(most, device=mask.device) < number[:, None]
    return GlobalTokens(
        position=torch.sort(~mask, dim=-1, stable=True).indices[:, :most],
        valid=valid,
        is_new=valid,
        slot=torch.where(mask, mask.long().cumsum(-1) - 1, -1),
        in_window=(call.rank >= 0) & ~mask,
    )
