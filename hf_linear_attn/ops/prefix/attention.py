"""Attention through feature-wise softmax over positions: o_i = sum_f a_if sum_j softmax_j(l_jf) v_j.

a_i = softmax(W_q q_i + b) are the shares of the features, l_j = W_k k_j the logits of the keys.
Every feature f is a query shared by all rows: its attention over the keys has its own normalizer. Bidirectional rows
see all keys; causal rows see the keys up to their own, so that each feature needs a normalizer per prefix. Sums are
kept relative to a maximum of each feature: no exponential overflows, and no later key reaches a row.

blocks.py computes causal calls and full_blocks.py bidirectional ones, both in blocks of tokens; what
stands here is a decode step, short bidirectional calls, and the form that torch.compile traces.

Shapes: tokens `[B, H, T, D]`, shares and logits `[B, H, T, F]`, token_mask bool `[B, T]`. Sums are float32
(float64 for float64 input); the output has the dtype of `v`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.masking import query_mask_of, safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, TINY, accumulation_dtype, full_precision
from hf_linear_attn.ops.linear.layout import State, block_size
from hf_linear_attn.ops.prefix.blocks import prefix_block_attention
from hf_linear_attn.ops.prefix.full_blocks import context_block_attention
from hf_linear_attn.ops.prefix.shares import ShareInputs

__all__ = [
    "State",
    "init_prefix_softmax_state",
    "prefix_softmax_attention",
]

_CHUNK = 8  # tokens: all pairs of a chunk are held for every feature, and a state of F x D per chunk
_BLOCK = 128  # tokens held at once; all pairs of its chunks are held for every feature
_WHOLE = 2  # blocks up to which bidirectional attention is faster as a whole
_ALL = slice(0, None)

_Carry = tuple[torch.Tensor, torch.Tensor]  # sums [B, H, F, D+1] with z as last column, log scale [B, H, F]


def init_prefix_softmax_state(
    batch_size: int, num_heads: int, num_features: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> State:
    """The state before any token: F (D + 2) numbers a head; float32 unless `dtype` is float64."""
    shape, dtype = (batch_size, num_heads, num_features), accumulation_dtype(dtype)
    return {
        "kv": torch.zeros(*shape, head_dim, dtype=dtype, device=device),
        "z": torch.zeros(shape, dtype=dtype, device=device),
        "log_scale": torch.full(shape, LOG_ZERO, dtype=dtype, device=device),
    }


def prefix_softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    query_weight: torch.Tensor | None = None,
    query_bias: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool,
    state: State | None = None,
) -> tuple[torch.Tensor, State | None]:
    """Softmax over positions, feature by feature, in time and memory linear in the length.

    Args:
        q: `[B, H, Tq, D]`.
        k: `[B, H, Tk, D]`.
        v: `[B, H, Tk, D]`.
        query_weight: W_q `[H, F, D]`; None for the identity.
        query_bias: b `[H, F]`, or None.
        key_weight: W_k `[H, F, D]`; None for the identity.
        token_mask: bool `[B, Tk]`, True for a real key. Padded tokens may hold anything, nan too; their
            queries count as 0.
        is_causal: query row r sees keys up to position Tk - Tq + r, and the whole state.
        state: sums over earlier keys; needs is_causal and Tq == Tk.

    Returns:
        output `[B, H, Tq, D]`, 0 in rows that see no key, and the state after these keys (None if none came).

    Raises:
        ValueError: for causal attention with more queries than keys, or a state that does not fit the call.
    """
    q_len, k_len = q.shape[2], v.shape[2]
    if is_causal and q_len > k_len:
        raise ValueError(f"Causal attention needs at least as many keys as queries, got {q_len} > {k_len}.")
    if state is not None and (not is_causal or q_len != k_len):
        raise ValueError(
            "A decode state needs causal attention over the new tokens only, got "
            f"is_causal={is_causal}, {q_len} queries and {k_len} keys."
        )
    dtype, query_mask = accumulation_dtype(v.dtype), query_mask_of(token_mask, q_len, is_causal)
    weights = (None if x is None else x.to(dtype) for x in (query_weight, query_bias, key_weight))
    given = ShareInputs(q, k, v, token_mask, query_mask, *weights)
    in_blocks = not torch.compiler.is_compiling()
    if in_blocks and not is_causal and max(q_len, k_len) > _WHOLE * block_size(v):
        return context_block_attention(given), None
    if in_blocks and is_causal and q_len > 1:
        output, after = prefix_block_attention(given, state)
        return output, None if state is None else after
    with full_precision(v):
        found = _attend(given, is_causal, state)
    return found[0].to(v.dtype), found[1]


def _attend(given: ShareInputs, is_causal: bool, state: State | None) -> tuple[torch.Tensor, State | None]:
    """As a whole, in operations that autograd and torch.compile trace."""
    a = given.share_logits(given.queries(_ALL)).softmax(-1)
    logits, v = given.logits(given.keys(_ALL), _ALL), given.values(_ALL)
    if not is_causal:
        return a @ (logits.softmax(2).mT @ v), None  # without a key all values are 0
    v1 = safe_masked_fill(F.pad(v, (0, 1), value=1.0), given.token_mask)  # [B, H, T, D+1]
    carry = _start(v1, logits) if state is None else _pack(state)
    past = v.shape[2] - a.shape[2]
    if past:
        carry = _accumulate(carry, logits[:, :, :past], v1[:, :, :past])
    outputs = []
    for start in range(0, a.shape[2], _BLOCK):
        rows, keys = slice(start, start + _BLOCK), slice(past + start, past + start + _BLOCK)
        output, carry = _causal_block(a[:, :, rows], logits[:, :, keys], v1[:, :, keys], carry)
        outputs.append(output)
    return torch.cat(outputs, 2), None if state is None else _unpack(carry)


def _start(v1: torch.Tensor, logits: torch.Tensor) -> _Carry:
    batch, heads, _, num_features = logits.shape
    sums = v1.new_zeros(batch, heads, num_features, v1.shape[-1])
    return sums, torch.full_like(sums[..., 0], LOG_ZERO)


def _accumulate(carry: _Carry, logits: torch.Tensor, v1: torch.Tensor) -> _Carry:
    """The sums after more keys, relative to the new maximum of each feature."""
    peak = torch.maximum(carry[1], logits.detach().amax(2))  # [B, H, F]
    new = (logits - peak[:, :, None]).exp().mT @ v1
    return carry[0] * (carry[1] - peak).exp()[..., None] + new, peak


def _causal_block(
    a: torch.Tensor, logits: torch.Tensor, v1: torch.Tensor, carry: _Carry
) -> tuple[torch.Tensor, _Carry]:
    """Causal outputs `[B, H, T, D]` of a block after the keys in `carry`, and the carry after it."""
    batch, heads, length, _ = logits.shape
    size = min(_CHUNK, length)
    chunks = -(-length // size)
    missing = chunks * size - length
    if missing:
        a, v1 = (F.pad(x, (0, 0, 0, missing)) for x in (a, v1))
        logits = F.pad(logits, (0, 0, 0, missing), value=LOG_ZERO)
    peak = torch.maximum(logits.detach().cummax(2).values, carry[1][:, :, None])  # of each row, [B, H, N*C, F]
    a, logits, v1, peak = (x.reshape(batch, heads, chunks, size, -1) for x in (a, logits, v1, peak))  # [B, H, N, C, *]
    last = peak[:, :, :, -1]  # [B, H, N, F]

    # Sums up to the end of each chunk, relative to the maximum there, the carry first.
    sums = (logits - last[:, :, :, None]).exp().mT @ v1  # [B, H, N, F, D+1]
    sums, scale = torch.cat([carry[0][:, :, None], sums], 2), torch.cat([carry[1][:, :, None], last], 2)
    later = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=a.device).triu(1)[..., None]
    mixing = (scale[:, :, None] - scale[:, :, :, None]).masked_fill(later, LOG_ZERO).exp()  # [B, H, N+1, N+1, F]
    sums = torch.einsum("bhncf,bhcfd->bhnfd", mixing, sums)
    after = sums[:, :, -1], scale[:, :, -1]

    # Each row: its own chunk pair by pair, everything before through the sums.
    pairs = logits[:, :, :, None] - peak[:, :, :, :, None]  # [B, H, N, C (row), C (key), F], at most 0 where visible
    future = torch.ones(size, size, dtype=torch.bool, device=a.device).triu(1)[..., None]
    pairs = pairs.masked_fill(future, LOG_ZERO).exp() * v1[:, :, :, None, :, -1:]
    before = (scale[:, :, :-1, None] - peak).exp()  # [B, H, N, C, F]
    z = pairs.sum(4) + before * sums[:, :, :-1, None, :, -1]
    weight = a / z.clamp(min=TINY)
    output = (pairs @ weight[..., None])[..., 0] @ v1[..., :-1]
    output = output + (weight * before) @ sums[:, :, :-1, :, :-1]
    return output.reshape(batch, heads, chunks * size, -1)[:, :, :length], after


def _pack(state: State) -> _Carry:
    return torch.cat([state["kv"], state["z"][..., None]], -1), state["log_scale"]


def _unpack(carry: _Carry) -> State:
    return {"kv": carry[0][..., :-1], "z": carry[0][..., -1], "log_scale": carry[1]}
