"""Sums of linear attention that its forms share: what a chunk and a carry are, weights relative to a running maximum.

A carry holds the sums phi(k) [v, 1]^T over earlier keys, relative to exp(log scale). Everything here is differentiable
and traceable by torch.compile; `ops.linear.blocks` has the same sums with a backward pass of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.masking import causal_mask
from hf_linear_attn.ops.base.numerics import LOG_ZERO, TINY

__all__ = [
    "CHUNK",
    "Carry",
    "State",
    "accumulate",
    "block_size",
    "chunk_block",
    "divide",
    "pack_state",
    "prepare_keys",
    "unpack_state",
]

# {"kv": [B, H, F, D], "z": [B, H, F], "log_scale": [B, H]}: sums over past keys / exp(log_scale).
State = dict[str, torch.Tensor]

CHUNK = 64  # tokens per causal chunk
# Tokens x heads x batch whose features are held at once: small enough for a CPU cache, which at long lengths
# is nearly twice as fast as whole sequences, and keeps memory small.
_CPU_BLOCK_ROWS = 6144
_BLOCK_ROWS = 1 << 19
_MIN_BLOCK = 256

Carry = tuple[torch.Tensor, torch.Tensor]  # sums [B, H, F, D+1] with z as last column, their log scale [B, H]


def block_size(v: torch.Tensor) -> int:
    """Tokens of a block, whole chunks."""
    rows = _CPU_BLOCK_ROWS if v.device.type == "cpu" else _BLOCK_ROWS
    return max(_MIN_BLOCK, rows // (v.shape[0] * v.shape[1]) // CHUNK * CHUNK)


def prepare_keys(
    v: torch.Tensor, log_weight: torch.Tensor | None, token_mask: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values with a column of ones, whose sum is the denominator; 0 and weight nothing at padded keys."""
    v1 = F.pad(v.to(dtype), (0, 1), value=1.0)  # [B, H, T, D+1]
    if log_weight is not None:
        log_weight = log_weight.to(dtype)
    if token_mask is not None:
        v1 = v1.masked_fill(~token_mask[:, None, :, None], 0)
        if log_weight is not None:
            log_weight = log_weight.masked_fill(~token_mask[:, None, :], LOG_ZERO)
    return v1, log_weight


def accumulate(carry: Carry | None, k: torch.Tensor, v1: torch.Tensor, log_weight: torch.Tensor | None) -> Carry:
    """Add keys to the sums, kept relative to the largest log weight so far (0 for unweighted keys)."""
    if log_weight is None:
        # v^T k: its long dimension is F, which suits matrix products better than D + 1
        sums = (v1.mT @ k).mT
        return (sums if carry is None else carry[0] + sums), sums.new_zeros(sums.shape[:2])
    peak = log_weight.detach().amax(-1)  # [B, H]
    if carry is not None:
        peak = torch.maximum(peak, carry[1])
    sums = ((v1 * (log_weight - peak[..., None]).exp()[..., None]).mT @ k).mT
    if carry is not None:
        sums = sums + carry[0] * (carry[1] - peak).exp()[..., None, None]
    return sums, peak


def chunk_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v1: torch.Tensor,
    log_weight: torch.Tensor | None,
    carry: Carry | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, Carry]:
    """Causal sums [B, H, T, D+1] of a block after the keys in `carry`, their log scale [B, H, T], the carry after."""
    batch, heads, length, num_features = k.shape
    size = min(chunk_size, length)
    chunks = -(-length // size)
    missing = chunks * size - length
    if missing:
        q, k, v1 = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v1))
        log_weight = None if log_weight is None else F.pad(log_weight, (0, missing), value=LOG_ZERO)
    q, k, v1 = (x.reshape(batch, heads, chunks, size, -1) for x in (q, k, v1))  # [B, H, N, C, *]
    scores = q @ k.mT  # [B, H, N, C, C]
    if log_weight is None:
        sums = scores.tril() @ v1
        states = (v1.mT @ k).mT  # [B, H, N, F, D+1]
        before = F.pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))  # [B, H, N+1, F, D+1]
        if carry is not None:
            before = before + carry[0][:, :, None]
        sums = sums + q @ before[:, :, :-1]
        last: Carry = (before[:, :, -1], before.new_zeros(batch, heads))
        return sums.reshape(batch, heads, chunks * size, -1)[:, :, :length], last[1][..., None], last

    # Running maxima: of each row, and of everything before each chunk.
    start = log_weight.new_full((batch, heads), LOG_ZERO) if carry is None else carry[1]
    row_peak = torch.maximum(log_weight.detach().cummax(-1).values, start[..., None])
    row_peak = row_peak.reshape(batch, heads, chunks, size)
    log_weight = log_weight.reshape(batch, heads, chunks, size)
    chunk_peak = row_peak[..., -1]  # [B, H, N]
    peak_before = torch.cat([start[..., None], chunk_peak[..., :-1]], -1)

    future = causal_mask(size, size, q.device).logical_not()
    weight = log_weight[..., None, :] - row_peak[..., :, None]  # at most 0 where visible
    sums = (scores * weight.masked_fill(future, LOG_ZERO).exp()) @ v1
    states = ((v1 * (log_weight - chunk_peak[..., None]).exp()[..., None]).mT @ k).mT
    # Sums before chunk c: earlier chunks rescaled from their own running maximum to that of chunk c - 1.
    earlier = torch.ones(chunks, chunks, dtype=torch.bool, device=q.device).tril(-1)
    mixing = (chunk_peak[..., None, :] - peak_before[..., :, None]).masked_fill(~earlier, LOG_ZERO).exp()
    before = (mixing @ states.flatten(3)).unflatten(3, (num_features, -1))
    if carry is not None:
        before = before + carry[0][:, :, None] * (start[..., None] - peak_before).exp()[..., None, None]
    sums = sums + (q @ before) * (peak_before[..., None] - row_peak).exp()[..., None]
    decay = (peak_before[..., -1] - chunk_peak[..., -1]).exp()[..., None, None]
    last = (before[:, :, -1] * decay + states[:, :, -1], chunk_peak[..., -1])
    return sums.reshape(batch, heads, chunks * size, -1)[:, :, :length], row_peak.flatten(2)[..., :length], last


def divide(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numerator over denominator, the latter kept away from 0 with its sign (Fourier features have both)."""
    numerator, denominator = sums[..., :-1], sums[..., -1:]
    tiny = torch.where(denominator < 0, -TINY, TINY)
    return (numerator / torch.where(denominator.abs() < TINY, tiny, denominator)).to(dtype)


def pack_state(state: State) -> Carry:
    return torch.cat([state["kv"], state["z"][..., None]], -1), state["log_scale"]


def unpack_state(carry: Carry) -> State:
    return {"kv": carry[0][..., :-1], "z": carry[0][..., -1], "log_scale": carry[1]}
