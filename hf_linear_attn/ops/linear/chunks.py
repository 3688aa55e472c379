"""Causal sums of linear attention in chunks, forward and backward written out: no autograd, few passes.

Every sum is a batched matrix product over chunks of C tokens: scores inside a chunk, and the sums of all earlier chunks
beyond. The denominators are summed beside the products instead of as a column of ones on the values, whose width of
D + 1 matrix products dislike.

Shapes: features `[B, H, T, F]`, values `[B, H, T, D]`, sums `[B, H, F, D]` and `[B, H, F]`, all of one dtype. Nothing
here records gradients; `ops.linear.blocks` does that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.numerics import LOG_ZERO, TINY

__all__ = ["causal", "causal_backward", "key_sums", "prefix", "prefix_backward", "steep", "steep_backward"]

_Pair = tuple[torch.Tensor, torch.Tensor]


def key_sums(k: torch.Tensor, v: torch.Tensor) -> _Pair:
    """phi(k)^T v and the sum of phi(k) over tokens."""
    return k.mT @ v, k.sum(2)


def causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    z: torch.Tensor | None,
    chunk: int,
    kept: torch.Tensor | None = None,
    own: bool = True,
) -> tuple[torch.Tensor, Any, torch.Tensor, Any]:
    """Numerators `[B, H, T, D]`, denominators `[B, H, T]` and the sums after these tokens.

    Args:
        q, k, v: of T tokens.
        kv, z: sums over all earlier keys; without z there are no denominators.
        chunk: tokens C of a chunk.
        kept: `[B, H, N + 1, F or 1]`, what is left of the sums at the borders of the N chunks; None for all.
        own: whether a row counts its own key.
    """
    shape, length = q.shape[:2], q.shape[2]
    q, k, v, count = _cut(q, k, v, chunk=chunk)
    scores = torch.bmm(q, k.mT).tril_(0 if own else -1)
    before, after = _earlier(torch.bmm(k.mT, v), kv, count, kept)
    # Two sums, not baddbmm: rounded as in `steep`, so that no later key changes a bit of a row.
    numerator = torch.bmm(scores, v).add_(torch.bmm(q, before))
    if z is None:
        return _whole(numerator, shape, length), None, after, None
    z_before, z_after = _earlier(k.sum(1), z, count, kept)
    denominator = scores.sum(-1).add_(_times(q, z_before))
    return _whole(numerator, shape, length), _whole(denominator, shape, length), after, z_after


def causal_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    z: torch.Tensor | None,
    d_num: torch.Tensor,
    d_den: torch.Tensor | None,
    d_kv: torch.Tensor,
    d_z: torch.Tensor | None,
    chunk: int,
    kept: torch.Tensor | None = None,
    own: bool = True,
) -> tuple[Any, ...]:
    """Gradients of q, k, v, kv and z, from those of the numerators, the denominators and the sums after the tokens."""
    shape, length, last = q.shape[:2], q.shape[2], 0 if own else -1
    q, k, v, d_num, count = _cut(q, k, v, d_num, chunk=chunk)
    before, _ = _earlier(torch.bmm(k.mT, v), kv, count, kept)
    later, d_kv = _earlier(torch.bmm(q.mT, d_num), d_kv, count, kept, reverse=True)
    scores = torch.bmm(q, k.mT).tril_(last)
    d_v = torch.bmm(scores.mT, d_num).baddbmm_(k, later)
    d_scores = torch.bmm(d_num, v.mT, out=scores)
    if z is None or d_den is None or d_z is None:
        d_scores.tril_(last)
        d_q = torch.bmm(d_scores, k).baddbmm_(d_num, before.mT)
        d_k = torch.bmm(d_scores.mT, q).baddbmm_(v, later.mT)
    else:
        d_den, _ = _cut(d_den[..., None], chunk=chunk)
        z_before, _ = _earlier(k.sum(1), z, count, kept)
        z_later, d_z = _earlier(torch.bmm(d_den.mT, q)[:, 0], d_z, count, kept, reverse=True)
        d_scores.add_(d_den).tril_(last)
        d_q = torch.bmm(d_scores, k).baddbmm_(d_num, before.mT).addcmul_(d_den, z_before[:, None])
        d_k = torch.bmm(d_scores.mT, q).baddbmm_(v, later.mT).add_(z_later[:, None])
    return *(_whole(x, shape, length) for x in (d_q, d_k, d_v)), d_kv, d_z


def steep(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    power: torch.Tensor,
    kv: torch.Tensor,
    z: torch.Tensor,
    peak: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`causal` for keys with weights 2^power of any spread, each row's sums relative to the largest power it sees.

    Args:
        power: whole, `[B, H, T]`.
        peak: power that `kv` and `z` are relative to, `[B, H]`.

    Returns:
        numerators, denominators and their powers `[B, H, T]`; the sums after these tokens and their power.
    """
    shape, length = q.shape[:2], q.shape[2]
    row = torch.maximum(power.cummax(-1).values, peak[..., None])
    q, k, v, count = _cut(q, k, v, chunk=chunk)
    size = q.shape[1]
    missing = count * size - length
    power = F.pad(power, (0, missing), value=LOG_ZERO).reshape(-1, size)
    row_peak = torch.cat([row, row[..., -1:].expand(*shape, missing)], -1).reshape(-1, size)
    last = row_peak[:, -1]  # [B H N]
    first = torch.cat([peak[..., None], last.view(*shape, count)[..., :-1]], -1).reshape(-1)
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    scale = (power[:, None] - row_peak[..., None]).masked_fill(future, LOG_ZERO).exp2()
    scores = torch.bmm(q, k.mT).masked_fill(future, 0) * scale
    k = k * (power - last[:, None]).exp2()[..., None]
    left = (first - last).exp2()
    before, after = _rescaled_earlier(torch.bmm(k.mT, v), kv, count, left)
    z_before, z_after = _rescaled_earlier(k.sum(1), z, count, left)
    earlier = (first[:, None] - row_peak).exp2()
    numerator = torch.bmm(scores, v) + torch.bmm(q, before) * earlier[..., None]
    denominator = scores.sum(-1) + _times(q, z_before) * earlier
    end = after, z_after, last.view(*shape, count)[..., -1]
    return _whole(numerator, shape, length), _whole(denominator, shape, length), row, end


def steep_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    power: torch.Tensor,
    kv: torch.Tensor,
    z: torch.Tensor,
    peak: torch.Tensor,
    d_num: torch.Tensor,
    d_den: torch.Tensor,
    d_kv: torch.Tensor,
    d_z: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, ...]:
    """As `causal_backward`, for `steep`: rare enough to leave to autograd."""
    with torch.enable_grad():
        inputs = q, k, v, kv, z = tuple(x.detach().requires_grad_() for x in (q, k, v, kv, z))
        numerator, denominator, _, after = steep(q, k, v, power, kv, z, peak, chunk)
    return torch.autograd.grad([numerator, denominator, *after[:2]], inputs, [d_num, d_den, d_kv, d_z])


def prefix(
    a: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, z: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums with a denominator for each feature, a_if / z_if in place of queries, and the sums after the tokens.

    z_if is the sum of k_jf over the keys up to row i. Arguments as for `causal`; a are the shares of the features.
    """
    shape, length = a.shape[:2], a.shape[2]
    a, k, v, count = _cut(a, k, v, chunk=chunk)
    before, after = _earlier(torch.bmm(k.mT, v), kv, count)
    z_before, z_after = _earlier(k.sum(1), z, count)
    q = a / _running(k, z_before)
    output = torch.bmm(torch.bmm(q, k.mT).tril_(), v).add_(torch.bmm(q, before))
    return _whole(output, shape, length), after, z_after


def prefix_backward(
    a: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    z: torch.Tensor,
    d_output: torch.Tensor,
    d_kv: torch.Tensor,
    d_z: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, ...]:
    """Gradients of a, k, v, kv and z of `prefix`."""
    shape, length = a.shape[:2], a.shape[2]
    a, k, v, d_output, count = _cut(a, k, v, d_output, chunk=chunk)
    before, _ = _earlier(torch.bmm(k.mT, v), kv, count)
    z_before, _ = _earlier(k.sum(1), z, count)
    running = _running(k, z_before)
    q = a / running
    d_scores = torch.bmm(d_output, v.mT).tril_()
    d_a = torch.bmm(d_scores, k).baddbmm_(d_output, before.mT).div_(running)
    d_running = (d_a * q).neg_()  # where no key is seen q is an unused number and d_a is 0
    later, d_kv = _earlier(torch.bmm(q.mT, d_output), d_kv, count, reverse=True)
    z_later, d_z = _earlier(d_running.sum(1), d_z, count, reverse=True)
    d_v = torch.bmm(torch.bmm(q, k.mT).tril_().mT, d_output).baddbmm_(k, later)
    d_k = torch.bmm(d_scores.mT, q).baddbmm_(v, later.mT).add_(z_later[:, None])
    d_k.baddbmm_(_lower(k).mT.expand(k.shape[0], -1, -1), d_running)
    return *(_whole(x, shape, length) for x in (d_a, d_k, d_v)), d_kv, d_z


def _lower(k: torch.Tensor) -> torch.Tensor:
    return torch.ones(k.shape[1], k.shape[1], dtype=k.dtype, device=k.device).tril()


def _running(k: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Sums up to each token of chunks `[B H N, C, F]`, after `before`, kept above 0."""
    # A product with a triangle of ones: cumsum over a dimension that is not the last is several times slower.
    running = torch.bmm(_lower(k).expand(k.shape[0], -1, -1), k)
    return running.add_(before[:, None]).clamp_(min=TINY)


def _times(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Products of the rows of `x` `[N, C, F]` with `y` `[N, F]`: `[N, C]`. A row is faster than a column."""
    return torch.bmm(y[:, None], x.mT)[:, 0]


def _cut(*tensors: torch.Tensor, chunk: int) -> Any:
    """Tensors `[B, H, T, X]` as chunks `[B H N, C, X]`, zeros after the end, and the number N of chunks (last)."""
    length = tensors[0].shape[2]
    size = min(chunk, length)
    count = -(-length // size)
    missing = count * size - length
    if missing:
        tensors = tuple(F.pad(x, (0, 0, 0, missing)) for x in tensors)
    return *(x.reshape(-1, size, x.shape[-1]) for x in tensors), count


def _whole(x: torch.Tensor, shape: torch.Size, length: int) -> torch.Tensor:
    """Chunks `[B H N, C, ...]` as `[B, H, T, ...]`."""
    return x.reshape(*shape, -1, *x.shape[2:])[:, :, :length]


def _earlier(
    states: torch.Tensor, total: torch.Tensor, count: int, kept: torch.Tensor | None = None, *, reverse: bool = False
) -> _Pair:
    """Sums before each chunk (after it if `reverse`), and those over all chunks.

    Args:
        states: sums of each chunk, `[B H N, F, D]` or `[B H N, F]`; overwritten.
        total: sums over all chunks before (after), `[B, H, F, D]` or `[B, H, F]`.
        count: chunks N.
        kept: see `causal`.
    """
    # A loop over chunks: additions of whole states, several times faster than cumsum over an outer dimension, and
    # written over the states: memory that was not touched before costs more than the additions.
    order = range(count - 1, -1, -1) if reverse else range(count)
    steps = states.view(*total.shape[:2], count, *total.shape[2:])
    if kept is None:
        for n in order:
            after = total + steps[:, :, n]
            steps[:, :, n], total = total, after
        return steps.flatten(0, 2), total
    before = torch.empty_like(steps)
    borders = (kept[..., None] if total.ndim == 4 else kept).unbind(2)
    if reverse:
        borders = borders[1:] + borders[:1]
    for n in order:
        torch.mul(total, borders[n], out=before[:, :, n])
        total = steps[:, :, n].add_(before[:, :, n])
    return before.flatten(0, 2), total * borders[-1]


def _rescaled_earlier(states: torch.Tensor, total: torch.Tensor, count: int, left: torch.Tensor) -> _Pair:
    """As `_earlier`; `left`, `[B H N]`, is the factor of earlier sums after a chunk, and autograd may record."""
    steps = states.view(*total.shape[:2], count, *total.shape[2:])
    factors = left.view(*total.shape[:2], count, *[1] * (total.ndim - 2))
    before = []
    for n in range(count):
        before.append(total)
        total = total * factors[:, :, n] + steps[:, :, n]
    return torch.stack(before, 2).flatten(0, 2), total
