"""Chunks of linear attention with decay: what decay.py and decay_blocks.py compute a run of tokens by.

`chunk_block` takes decays of any strength, and autograd records it. Where no chunk forgets much, as is usual, `causal`
is several times faster: the decay between two tokens of a chunk is split at the chunk's middle token, one part is
multiplied into the query, the other into the key, and what is left is linear attention without decay.

Shapes: features `[B, H, T, F]`, values `[B, H, T, D]`, log-decays `[B, H, T, F or 1]`, all of one dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.linear import chunks as linear_chunks
from hf_linear_attn.ops.linear import sums

__all__ = ["LEAST", "accumulate", "causal", "causal_backward", "chunk_block", "decay_gradient", "relative_to_peaks"]

# Log-decay below which nothing is left of the sums even in float64. A bound keeps the running sums inside a chunk
# small, and so their differences accurate.
LEAST = -120.0
# What either half of a chunk may decay, in each feature, to be computed with one split for all its pairs of tokens:
# e^40 and e^-40 are the largest and smallest factors.
_MOST_IN_HALF = 40.0


def relative_to_peaks(
    log_weight: torch.Tensor, decay: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights exp(log_weight) that never overflow, made relative to a peak that decays along with the sums.

    Sums are kept relative to p_t = max(p_{t-1} + max_f g_tf, log w_t), which bounds every weight that row t sees.
    Relative to it key t has weight exp(log w_t - p_t) and the log-decay is g_t + p_{t-1} - p_t: neither exceeds 1, and
    the peak cancels in the quotient. The largest weight is at the peak when features decay alike; when they are reset
    one by one it may fall below it, so weights per key should then stay within e^80 of each other.

    Args:
        log_weight: `[B, H, T]`, `LOG_ZERO` at padded keys.
        start: the peak before, `[B, H]`, `LOG_ZERO` before the first key.

    Returns:
        the weights and what is to be added to the log-decays, `[B, H, T]` each; the last peak `[B, H]`. Only the
        weights are differentiable.
    """
    elapsed = decay.detach().amax(-1).cumsum(-1)
    latest = torch.maximum((log_weight.detach() - elapsed).cummax(-1).values, start[..., None])
    peaks = elapsed + latest
    before = torch.cat([start[..., None], peaks[..., :-1]], -1)
    shift = torch.where(before > LOG_ZERO / 2, before - peaks, 0.0)  # nothing decays before the first key
    return (log_weight - peaks).exp(), shift, peaks[..., -1].clone()  # a view would keep all of them in a state


class _Split(NamedTuple):
    """A run of T tokens cut into N chunks, with the decays inside them split.

    Attributes:
        q, k: queries, and weighted keys, times their factors; contiguous.
        q_factor: exp of the log-decay from the chunk's middle to the token, `[B, H, T, F or 1]`, above 1 before it.
        k_factor: the key's weight over that.
        kept: exp of the log-decays between middles, and before the first and after the last one:
            `[B, H, N + 1, F or 1]`.
    """

    q: torch.Tensor
    k: torch.Tensor
    q_factor: torch.Tensor
    k_factor: torch.Tensor
    kept: torch.Tensor


def causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    weight: torch.Tensor | None,
    kv: torch.Tensor,
    z: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Numerators `[B, H, T, D]`, denominators `[B, H, T]` and the sums after these tokens; nothing is recorded.

    Args:
        q, k, v: of T tokens.
        decay: at most 0.
        weight: of the keys, `[B, H, T]`; None for 1.
        kv, z: sums over all earlier keys, `[B, H, F, D]` and `[B, H, F]`; without z there are no denominators.
    """
    split = _split(q, k, decay, weight)
    if split is None:
        return _steep(q, k if weight is None else k * weight[..., None], v, decay, kv, z)
    return linear_chunks.causal(split.q, split.k, v, kv, z, sums.CHUNK, split.kept)


def causal_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    weight: torch.Tensor | None,
    kv: torch.Tensor,
    z: torch.Tensor | None,
    d_num: torch.Tensor,
    d_den: torch.Tensor | None,
    d_kv: torch.Tensor,
    d_z: torch.Tensor | None,
) -> tuple[Any, ...]:
    """Gradients of q, k, v, kv and z, from those of what `causal` returns."""
    split = _split(q, k, decay, weight)
    if split is None:
        return _steep_backward(q, k, v, decay, weight, kv, z, [d_num, d_den, d_kv, d_z])
    d_q, d_k, *rest = linear_chunks.causal_backward(
        split.q, split.k, v, kv, z, d_num, d_den, d_kv, d_z, sums.CHUNK, split.kept
    )
    return d_q.mul_(split.q_factor), d_k.mul_(split.k_factor), *rest


def decay_gradient(
    q: torch.Tensor, k: torch.Tensor, d_q: torch.Tensor, d_k: torch.Tensor, end: torch.Tensor, *, scalar: bool
) -> torch.Tensor:
    """Gradients of the log-decays `[B, H, T, F or 1]`, from those of all that they multiply.

    Scaling q_i by e^r and k_i by e^-r is what a decay of r at token i and its contrary after it would do: so the
    gradient of g_t is the sum of <q_i, dq_i> - <k_i, dk_i> over i >= t, plus <S, dS> for the sums S after the tokens.

    Args:
        end: <S, dS>, `[B, H, F]`, z with them.
        scalar: whether all features decay alike.
    """
    change = (q * d_q).sub_(d_k * k)
    if scalar:
        change, end = change.sum(-1, keepdim=True), end.sum(-1, keepdim=True)
    length, chunks = change.shape[2], _cut(change)
    later = torch.ones(chunks.shape[3], chunks.shape[3], dtype=q.dtype, device=q.device).triu()
    # Inside a chunk by a product, cumsum over a dimension that is not the last being slow; then the chunks after it.
    inside = _times(later, chunks)
    total = inside[..., 0, :]
    beyond = total.flip(2).cumsum(2).flip(2) - total + end[:, :, None]
    return inside.add_(beyond[..., None, :]).flatten(2, 3)[:, :, :length]


def _cut(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, T, X]` as chunks `[B, H, N, C, X]`, zeros after the end: they neither decay nor add."""
    size = min(sums.CHUNK, x.shape[2])
    missing = -x.shape[2] % size
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, size))


def _times(matrix: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    """`matrix @ chunks`; a single column as a row, which is many times faster."""
    if chunks.shape[-1] == 1:
        return (chunks.squeeze(-1) @ matrix.mT)[..., None]
    return matrix @ chunks


def _split(q: torch.Tensor, k: torch.Tensor, decay: torch.Tensor, weight: torch.Tensor | None) -> _Split | None:
    """The tokens with their decays split; None where some chunk forgets too much."""
    length, chunks = q.shape[2], _cut(decay)
    size = chunks.shape[3]
    token, middle = torch.arange(size, device=q.device), size // 2
    # Log-decays from the middle to each token: of the tokens after it up to this one, or less those in between.
    after = ((token > middle) & (token <= token[:, None])).to(q.dtype)
    between = ((token <= middle) & (token > token[:, None])).to(q.dtype)
    reach = _times(after - between, chunks)
    first, last = chunks[..., 0, :] - reach[..., 0, :], reach[..., -1, :]  # up to the middle, and from there
    if bool((torch.minimum(first, last) < -_MOST_IN_HALF).any()):
        return None
    kept = torch.cat([first[:, :, :1], last[:, :, :-1] + first[:, :, 1:], last[:, :, -1:]], 2).exp_()
    q_factor = reach.exp_().flatten(2, 3)[:, :, :length]
    k_factor = q_factor.reciprocal() if weight is None else weight[..., None] / q_factor
    q_split, k_split = q.new_empty(q.shape), k.new_empty(k.shape)  # contiguous, whatever the strides were
    torch.mul(q, q_factor, out=q_split)
    torch.mul(k, k_factor, out=k_split)
    return _Split(q_split, k_split, q_factor, k_factor, kept)


def _steep(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, kv: torch.Tensor, z: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """`causal` for decays of any strength; autograd may record it."""
    decay = decay.clamp(min=LEAST)
    if z is None:
        found, kv = chunk_block(q, k, v, decay, kv, sums.CHUNK)
        return found, None, kv, None
    carry = torch.cat([kv, z[..., None]], -1)
    found, carry = chunk_block(q, k, F.pad(v, (0, 1), value=1.0), decay, carry, sums.CHUNK)
    return found[..., :-1], found[..., -1], carry[..., :-1], carry[..., -1]


def _steep_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    weight: torch.Tensor | None,
    kv: torch.Tensor,
    z: torch.Tensor | None,
    given: list[torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """`causal_backward` for `_steep`: rare enough to leave to autograd."""
    scale = torch.ones_like(decay[..., :1]) if weight is None else weight[..., None]
    with torch.enable_grad():
        q, k, v, kv = leaves = [x.detach().requires_grad_() for x in (q, k * scale, v, kv)]
        if z is not None:
            leaves.append(z := z.detach().requires_grad_())
        outputs = _steep(q, k, v, decay, kv, z)
    pairs = [(x, g) for x, g in zip(outputs, given, strict=True) if x is not None]
    d_q, d_k, d_v, d_kv, *d_z = torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs])
    return d_q, d_k * scale, d_v, d_kv, d_z[0] if d_z else None


def accumulate(carry: torch.Tensor, k: torch.Tensor, v1: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """The sums `[B, H, F, D + 1]` after further keys; `v1` are values with a column of ones, as in `chunk_block`."""
    kept = carry * decay.sum(-2)[..., None].exp()
    return kept + ((k * _after(decay).exp()).mT @ v1 if k.shape[2] > 1 else k.mT * v1)


def chunk_block(
    q: torch.Tensor, k: torch.Tensor, v1: torch.Tensor, decay: torch.Tensor, carry: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal sums `[B, H, T, D + 1]` of a block after the keys in `carry`, and the carry after the block.

    Args:
        v1: values, with a column of ones where sums have one, whose sum is the denominator.
        carry: sums over all earlier keys, `[B, H, F, D + 1]`.
        chunk_size: a power of two.
    """
    length = k.shape[2]
    size = min(chunk_size, 1 << (length - 1).bit_length())
    chunks = -(-length // size)
    missing = chunks * size - length
    if missing:  # zeros: they neither decay nor add
        q, k, v1, decay = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v1, decay))
    q, k, v1, decay = (x.unflatten(2, (chunks, size)) for x in (q, k, v1, decay))  # [B, H, N, C, *]
    reach = decay.cumsum(-2)  # from before the chunk to each token
    states = (k * _after(decay).exp()).mT @ v1  # [B, H, N, F, D+1]
    before = []
    for state, left in zip(states.unbind(2), reach[..., -1, :, None].exp().unbind(2), strict=True):
        before.append(carry)
        carry = carry * left + state
    found = (q * reach.exp()) @ torch.stack(before, 2)
    if decay.shape[-1] == 1:
        # Sums from key to query, not differences of running sums, which strong decays would leave few digits of.
        later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        between = torch.where(later, decay.mT, 0).cumsum(-1).mT
        found = found + (q @ k.mT * between.exp().tril()) @ v1
    else:
        found = found + _inside_chunks(q, k, v1, decay)
    return found.flatten(2, 3)[:, :, :length], carry


def _after(decay: torch.Tensor) -> torch.Tensor:
    """Log-decay from each token to the last one: the sum over later tokens, in the dimension before the last."""
    return F.pad(decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _inside_chunks(q: torch.Tensor, k: torch.Tensor, v1: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Causal sums inside chunks of C tokens (a power of two) with a decay per feature: [..., C, D+1].

    The decay between two tokens is no single number, so it is split between query and key at a token between
    them: the middle of the smallest block (of 2, 4, .. C tokens) that holds both.
    """
    found = (q * k).sum(-1, keepdim=True) * v1  # each token's own key
    half = 1
    while half < q.shape[-2]:
        _, q_right = q.unflatten(-2, (-1, 2, half)).unbind(-3)
        (k_left, _), (v_left, _) = (x.unflatten(-2, (-1, 2, half)).unbind(-3) for x in (k, v1))
        left, right = decay.unflatten(-2, (-1, 2, half)).unbind(-3)
        scores = (q_right * right.cumsum(-2).exp()) @ (k_left * _after(left).exp()).mT
        part = scores @ v_left
        found = found + torch.stack([torch.zeros_like(part), part], -3).flatten(-4, -2)
        half *= 2
    return found
