"""Softmax over a window and linear attention with Taylor features over every other key, bidirectional, in chunks.

The same as `ops.window.tail` for products of features that are 1 + u + u^2 / 2, u the dot product of two tokens' few
coordinates. A chunk of C rows takes the W keys of its neighborhood, all windows of the chunk among them, as one matrix
of weights: softmax terms inside the windows, products of features, from u, outside. The keys before and after the
neighborhood come in as two sums over chunks, added up from either end: nothing is ever taken off a sum.

Weights are powers of two (see `ops.base.numerics`), relative to the largest of their row; sums are relative to the
largest of their keys. Heads are worked off in groups that fit a CPU's cache, and computed again in the backward pass:
training holds chunks of the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.base.numerics import LOG2_E, LOG_ZERO
from hf_linear_attn.ops.features.maps import Features

__all__ = ["expand", "expand_backward", "taylor_window_attention", "with_one"]

_CHUNK = 64  # rows of a chunk: fewer cost more for the sums, more cost more for the matrix of weights
# Rows of the heads that are worked off together.
_CPU_ROWS = 6144
_ROWS = 1 << 19
# Elements of a matrix of weights: a bound on the memory that wide windows take (16 MiB in float32 on a CPU).
_CPU_ELEMENTS = 1 << 22
_ELEMENTS = 1 << 26
_NO_WEIGHT = LOG_ZERO / 2  # logs of weights up to it are those of nothing
_HALF_ROOT = 0.5**0.5


def taylor_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_coordinates: Features,
    k_coordinates: Features,
    *,
    left: int,
    right: int,
    scaling: float,
    window_log_factor: torch.Tensor,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend. Not differentiable twice.

    Args:
        q, k, v: `[B, H, T, D]` of one dtype, float32 or float64, finite at padding too.
        q_coordinates, k_coordinates: `[B, H, T, R]`, and log scales of their features, `[B, H, T]` or None.
        left, right: keys of the window before and after a query's own.
        scaling: factor of the logits.
        window_log_factor: log of what the window's terms are multiplied by, `[H]`.
        token_mask: bool `[B or 1, T]`, or None when all keys are real.

    Returns:
        `[B, H, T, D]`, 0 in rows that see no key.
    """
    (batch, heads, length, _), device = q.shape, q.device
    left, right = min(left, length - 1), min(right, length - 1)
    size = min(_CHUNK, length)
    steps = -(-(size + left + right) // size)  # chunks of a neighborhood
    count = -(-length // size)

    def rows(x: torch.Tensor) -> torch.Tensor:  # chunks [B * H, N, C, X]
        return F.pad(x, (0, 0, 0, count * size - length)).reshape(batch * heads, count, size, -1)

    def keys(x: torch.Tensor, value: float = 0.0, width: int = 0) -> torch.Tensor:
        # Chunks [B * H, M, C, X + width], `left` places late: the neighborhood of n is chunks n .. n + steps - 1.
        total = count + steps - 1  # M
        padded = F.pad(x, (0, width, left, total * size - length - left), value=value)
        return padded.reshape(batch * heads, total, size, -1)

    (q_rank, q_log), (k_rank, k_log) = q_coordinates, k_coordinates
    k_log = torch.zeros_like(k[..., 0]) if k_log is None else k_log * LOG2_E
    if token_mask is not None:
        k_log = k_log.masked_fill(~token_mask[:, None], LOG_ZERO)
    # A query's scale multiplies the tail: what is the same for a whole row cancels, so it is taken off the window.
    balance = window_log_factor.to(q.dtype)[:, None].expand(q.shape[:3])
    balance = balance if q_log is None else balance - q_log
    q = torch.cat([q * (scaling * LOG2_E), balance[..., None] * LOG2_E], -1)
    tensors = (
        rows(q),
        keys(k, value=1.0, width=1),
        keys(v, value=1.0, width=1),  # the ones add up to the denominator
        rows(q_rank),
        keys(k_rank),
        keys(k_log[..., None], value=LOG_ZERO)[..., 0],
    )
    step = torch.arange(steps * size, device=device) - torch.arange(size, device=device)[:, None]
    attend = _computed_again(partial(_attend, inside=(step >= 0) & (step <= left + right)))
    group = max(1, (_CPU_ROWS if device.type == "cpu" else _ROWS) // length)
    groups = zip(*(x.split(group) for x in tensors), strict=True)
    output = torch.cat([attend(*some) for some in groups])
    return output.view(batch, heads, count * size, -1)[:, :, :length]


def _computed_again(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function` of tensors, of which training keeps nothing else until the backward pass."""
    if not torch.is_grad_enabled():
        return function
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rank: torch.Tensor,
    k_rank: torch.Tensor,
    k_log: torch.Tensor,
    *,
    inside: torch.Tensor,
) -> torch.Tensor:
    """Output `[G, N, C, D]` of G heads.

    Args:
        q: queries and the balance, times log2 e, `[G, N, C, D + 1]`.
        k, v: keys and values with a column of ones, `[G, M, C, D + 1]`; M - N + 1 chunks make a neighborhood.
        q_rank, k_rank: coordinates, `[G, N, C, R]` and `[G, M, C, R]`.
        k_log: log scales of the keys to the base 2, `LOG_ZERO` where there is no key, `[G, M, C]`.
        inside: which keys of its chunk's neighborhood are in a row's window, bool `[C, W]`.
    """
    (group, count), extra = q.shape[:2], k.shape[1] - q.shape[1]
    far, far_log = _far_sums(k_rank, v, k_log, count)
    elements = _CPU_ELEMENTS if q.device.type == "cpu" else _ELEMENTS
    step = max(1, elements // (group * inside.numel()))
    weigh: Callable[..., torch.Tensor] = partial(_weigh, inside=inside)
    if step < count:
        weigh = _computed_again(weigh)
    parts = []
    for start in range(0, count, step):
        rows, keys = slice(start, start + step), slice(start, start + step + extra)
        near = k[:, keys], v[:, keys], q_rank[:, rows], k_rank[:, keys], k_log[:, keys]
        parts.append(weigh(q[:, rows], *near, far[:, rows], far_log[:, rows]))
    return torch.cat(parts, 1)


def _weigh(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rank: torch.Tensor,
    k_rank: torch.Tensor,
    k_log: torch.Tensor,
    far: torch.Tensor,
    far_log: torch.Tensor,
    *,
    inside: torch.Tensor,
) -> torch.Tensor:
    """Output of some chunks of rows: arguments of `_attend`, and what `_far_sums` gives for them."""
    (group, count), steps = q.shape[:2], k.shape[1] - q.shape[1] + 1

    def near(x: torch.Tensor) -> torch.Tensor:  # neighborhoods [G * N, W, X]
        return torch.cat([x[:, i : i + count] for i in range(steps)], 2).flatten(0, 1)

    q, q_rank, far, far_log = (x.flatten(0, 1) for x in (q, q_rank, far, far_log[..., None]))
    log = near(k_log)[:, None]
    hidden = torch.zeros_like(log).masked_fill_(log < _NO_WEIGHT, LOG_ZERO)
    # Logs of weights but for products of features, [G * N, C, W].
    log = torch.where(inside, torch.baddbmm(hidden, q, near(k).mT), log)
    peak = torch.maximum(log.detach().amax(-1), far_log)
    u = torch.bmm(q_rank, near(k_rank).mT) * ~inside
    weights = (log - peak[..., None]).exp2() * torch.addcmul(u + 1, u, u, value=0.5)
    sums = torch.bmm(near(v).mT, weights.mT)  # [G * N, D + 1, C]: fast on a CPU, where [G * N, C, D + 1] is not
    sums = sums + torch.bmm(far, _TaylorFeatures.apply(q_rank)) * (far_log - peak).exp2()[:, None]
    total = sums[:, -1:]
    output = sums[:, :-1] / torch.where(total > 0, total, 1.0)
    return output.mT.unflatten(0, (group, count))


def _far_sums(
    k_rank: torch.Tensor, v: torch.Tensor, k_log: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the keys outside each chunk's neighborhood, `[G, N, D + 1, F]`, relative to 2^log `[G, N]`."""
    peak = k_log.detach().amax(-1).clamp(min=_NO_WEIGHT)  # [G, M]
    weighted = v * (k_log - peak[..., None]).exp2()[..., None]
    features = _TaylorFeatures.apply(k_rank.flatten(0, 1))
    sums = torch.bmm(weighted.flatten(0, 1).mT, features.mT).unflatten(0, peak.shape)
    before, log_before = _sums_before(sums[:, :count], peak[:, :count])
    after, log_after = (x.flip(1) for x in _sums_before(sums[:, -count:].flip(1), peak[:, -count:].flip(1)))
    log = torch.maximum(log_before, log_after)
    before = before * (log_before - log).exp2()[..., None, None]
    return torch.addcmul(before, after, (log_after - log).exp2()[..., None, None]), log


def _sums_before(sums: torch.Tensor, log: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums `[G, N, D + 1, F]` over all chunks before each, relative to the largest of their logs `[G, N]`."""
    tops = F.pad(log.cummax(1).values[:, :-1], (1, 0), value=_NO_WEIGHT)
    taken = sums[:, :-1] * (log[:, :-1] - tops[:, 1:]).exp2()[..., None, None]
    kept = (tops[:, :-1] - tops[:, 1:]).exp2()[..., None, None]
    found = [torch.zeros_like(sums[:, 0])]
    for chunk, factor in zip(taken.unbind(1), kept.unbind(1), strict=True):
        found.append(torch.addcmul(chunk, found[-1], factor))
    return torch.stack(found, 1), tops


class _TaylorFeatures(torch.autograd.Function):
    """Coordinates `[N, C, R]` to the features `[N, F, C]` of 1 + u + u^2 / 2: token-last, whole rows are multiplied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        rows = with_one(x)
        ctx.save_for_backward(rows)
        return expand(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_features: torch.Tensor) -> torch.Tensor:
        (rows,) = ctx.saved_tensors
        return expand_backward(rows, d_features)


def with_one(x: torch.Tensor) -> torch.Tensor:
    """Coordinates `[N, C, R]` as `[N, 1 + R, C]`, 1 before the first."""
    return F.pad(x.mT, (0, 0, 1, 0), value=1.0)


def expand(rows: torch.Tensor) -> torch.Tensor:
    """Features `[N, F, C]` of `with_one`'s rows: products of rows with those `gap` places on, for every gap."""
    size = rows.shape[1]
    features = rows.new_empty(len(rows), size * (size + 1) // 2, rows.shape[2])
    for gap, part in _by_gap(features, size):
        torch.mul(rows[:, gap:], rows[:, : size - gap], out=part)
    features[:, 1:size] *= _HALF_ROOT
    return features


def expand_backward(rows: torch.Tensor, d_features: torch.Tensor) -> torch.Tensor:
    """Gradient of the coordinates `[N, C, R]`."""
    size = rows.shape[1]
    d_rows = torch.zeros_like(rows)
    for gap, part in _by_gap(d_features, size):
        factor = 1.0 if gap else _HALF_ROOT
        d_rows[:, gap:].addcmul_(part, rows[:, : size - gap], value=factor)
        d_rows[:, : size - gap].addcmul_(part, rows[:, gap:], value=factor)
    return d_rows[:, 1:].mT


def _by_gap(features: torch.Tensor, size: int) -> list[tuple[int, torch.Tensor]]:
    """Every gap and its `size - gap` features of `[N, F, C]`."""
    return list(enumerate(features.split(list(range(size, 0, -1)), 1)))
