"""Linear attention that forgets: the sums of a block, forward and backward, for log-decays of any strength.

Where no chunk forgets much, as is usual, the decay between two tokens of a chunk is split at the chunk's middle token,
one part is multiplied into the query, the other into the key, and what is left is linear attention without decay. Where
one does, `plain.chunk_with_decay`, several times slower, takes its place.

`ops.linear.blocks` calls the functions here, or those of the same names in `ops.linear.powers`; nothing is recorded.
Shapes: features `[B, H, T, F]`, values `[B, H, T, D]`, log-decays `[B, H, T, F or 1]`, all of one dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.linear import chunks, layout
from hf_linear_attn.ops.linear.layout import Call, Keys, relative_to_peaks
from hf_linear_attn.ops.linear.plain import LEAST, chunk_with_decay

__all__ = ["Sums", "attend", "attend_backward", "before_first", "end", "start_backward"]

# What either half of a chunk may decay, in each feature, to be computed with one split for all its pairs of tokens:
# e^40 and e^-40 are the largest and smallest factors.
_MOST_IN_HALF = 40.0


class Sums(NamedTuple):
    """Sums over the keys so far, relative to exp(peak).

    Attributes:
        kv: of phi(k) v^T, `[B, H, F, D]`.
        z: of phi(k), `[B, H, F]`; None without a normalizer.
        peak: `[B, H]`, `LOG_ZERO` without a key; None where no key has a weight.
    """

    kv: torch.Tensor
    z: torch.Tensor | None
    peak: torch.Tensor | None


def before_first(call: Call, keys: Keys, now: slice) -> Sums:
    """The sums before the call."""
    k = keys.features
    if call.kv is None:
        kv = k.new_zeros(*k.shape[:2], k.shape[-1], call.v.shape[-1])
        z = torch.zeros_like(kv[..., 0]) if call.options.normalized else None
        return Sums(kv, z, None if keys.log_weight is None else kv.new_full(kv.shape[:2], LOG_ZERO))
    if call.z is None:
        return Sums(call.kv, None, None)
    valid = _valid(call.log_scale)
    return Sums(call.kv * valid[..., None], call.z * valid, call.log_scale)


def _valid(log_scale: torch.Tensor) -> torch.Tensor:
    """1 where a state has seen a key, else 0: `[B, H, 1]`."""
    return (log_scale > LOG_ZERO / 2).to(log_scale.dtype)[..., None]


def end(sums: Sums) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """kv, z and log scale of a state; the latter two None without a normalizer."""
    if sums.z is None:
        return sums.kv, None, None
    return sums.kv, sums.z, sums.kv.new_zeros(sums.kv.shape[:2]) if sums.peak is None else sums.peak


def start_backward(call: Call, first: Sums, d_sums: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a state's kv and z, from those of the first sums."""
    if call.z is None:
        return d_sums
    valid = _valid(call.log_scale)
    return d_sums[0] * valid[..., None], d_sums[1] * valid


def attend(
    call: Call, q: torch.Tensor, keys: Keys, now: slice, sums: Sums
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Sums, bool]:
    """One block.

    Args:
        q: features of the queries.
        keys: theirs, at the positions `now`.
        sums: those before the block.

    Returns:
        numerators `[B, H, T, D]`, denominators `[B, H, T]` (None without a normalizer) and the log scale of both,
        `[B, H, T]` (None where no key has a weight); the sums after the block; and whether some chunk forgets too
        much to be split.
    """
    weight, decay, peaks = _relative(call, keys, now, sums.peak)
    own, split = call.options.own, _split(q, keys.features, decay, weight)
    if split is None:
        k = keys.features if weight is None else keys.features * weight[..., None]
        numerator, den, kv, z = _steep(q, k, call.values(now), decay, sums.kv, sums.z, own)
    else:
        numerator, den, kv, z = chunks.causal(
            split.q, split.k, call.values(now), sums.kv, sums.z, layout.CHUNK, split.kept, own
        )
    # A view would keep all of them in a state.
    return numerator, den, peaks, Sums(kv, z, None if peaks is None else peaks[..., -1].clone()), split is None


def attend_backward(
    call: Call,
    q: torch.Tensor,
    keys: Keys,
    now: slice,
    borders: list[Sums],
    steep: bool,
    d_num: torch.Tensor,
    d_den: Any,
    d_sums: Any,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...], torch.Tensor, Any]:
    """Gradients of `attend`, from those of numerators and denominators and of the sums after the block.

    Args:
        borders: the sums before the block, and after it.

    Returns:
        those of q, of the keys (features, log weights, decays), of the values, and of the sums before the block.
    """
    (before, after), k, v = borders, keys.features, call.values(now)
    weight, decay, _ = _relative(call, keys, now, before.peak)
    end = (d_sums[0] * after.kv).sum(-1)
    if after.z is not None:
        end.addcmul_(d_sums[1], after.z)
    split = None if steep else _split(q, k, decay, weight)
    if split is None:
        given = [d_num, d_den, *d_sums]
        d_q, d_k, d_v, *d_sums = _steep_backward(q, k, v, decay, weight, before.kv, before.z, given, call.options.own)
    else:
        d_kv, d_z = d_sums
        d_q, d_k, d_v, *d_sums = chunks.causal_backward(
            *(split.q, split.k, v, before.kv, before.z, d_num, d_den, d_kv, d_z),
            *(layout.CHUNK, split.kept, call.options.own),
        )
        d_q, d_k = d_q.mul_(split.q_factor), d_k.mul_(split.k_factor)
    d_decay = None
    if keys.decay is not None and keys.decay.requires_grad:
        d_decay = _decay_gradient(q, k, d_q, d_k, end, scalar=decay.shape[-1] == 1)
    d_weight = None if keys.log_weight is None else (d_k * k).sum(-1)
    return d_q, (d_k, d_weight, d_decay), d_v, d_sums


def _relative(
    call: Call, keys: Keys, now: slice, peak: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """A block's weights (None for 1), 0 at padded keys, log-decays relative to the peaks, and these, `[B, H, T]`."""
    real, decay = call.real(now), keys.decay
    assert decay is not None
    if keys.log_weight is None:
        return None if real is None else real.to(decay.dtype).expand(decay.shape[:3]), decay, None
    log_weight = keys.log_weight if real is None else keys.log_weight.masked_fill(~real, LOG_ZERO)
    weight, shift, peaks = relative_to_peaks(log_weight, decay, peak)
    weight = weight if real is None else weight.masked_fill_(~real, 0)
    return weight, decay + shift[..., None], peaks


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


def _decay_gradient(
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
    length, pieces = change.shape[2], _cut(change)
    later = torch.ones(pieces.shape[3], pieces.shape[3], dtype=q.dtype, device=q.device).triu()
    # Inside a chunk by a product, cumsum over a dimension that is not the last being slow; then the chunks after it.
    inside = _times(later, pieces)
    total = inside[..., 0, :]
    beyond = total.flip(2).cumsum(2).flip(2) - total + end[:, :, None]
    return inside.add_(beyond[..., None, :]).flatten(2, 3)[:, :, :length]


def _cut(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, T, X]` as chunks `[B, H, N, C, X]`, zeros after the end: they neither decay nor add."""
    size = min(layout.CHUNK, x.shape[2])
    missing = -x.shape[2] % size
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, size))


def _times(matrix: torch.Tensor, pieces: torch.Tensor) -> torch.Tensor:
    """`matrix @ pieces`; a single column as a row, which is many times faster."""
    if pieces.shape[-1] == 1:
        return (pieces.squeeze(-1) @ matrix.mT)[..., None]
    return matrix @ pieces


def _split(q: torch.Tensor, k: torch.Tensor, decay: torch.Tensor, weight: torch.Tensor | None) -> _Split | None:
    """The tokens with their decays split; None where some chunk forgets too much."""
    length, pieces = q.shape[2], _cut(decay)
    size = pieces.shape[3]
    token, middle = torch.arange(size, device=q.device), size // 2
    # Log-decays from the middle to each token: of the tokens after it up to this one, or less those in between.
    after = ((token > middle) & (token <= token[:, None])).to(q.dtype)
    between = ((token <= middle) & (token > token[:, None])).to(q.dtype)
    reach = _times(after - between, pieces)
    first, last = pieces[..., 0, :] - reach[..., 0, :], reach[..., -1, :]  # up to the middle, and from there
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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    kv: torch.Tensor,
    z: torch.Tensor | None,
    own: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """`chunks.causal` for decays of any strength; autograd may record it."""
    decay = decay.clamp(min=LEAST)
    if z is None:
        found, kv = chunk_with_decay(q, k, v, decay, kv, layout.CHUNK, own)
        return found, None, kv, None
    carry = torch.cat([kv, z[..., None]], -1)
    found, carry = chunk_with_decay(q, k, F.pad(v, (0, 1), value=1.0), decay, carry, layout.CHUNK, own)
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
    own: bool,
) -> tuple[Any, ...]:
    """`chunks.causal_backward` for `_steep`: rare enough to leave to autograd."""
    scale = torch.ones_like(decay[..., :1]) if weight is None else weight[..., None]
    with torch.enable_grad():
        q, k, v, kv = leaves = [x.detach().requires_grad_() for x in (q, k * scale, v, kv)]
        if z is not None:
            leaves.append(z := z.detach().requires_grad_())
        outputs = _steep(q, k, v, decay, kv, z, own)
    pairs = [(x, g) for x, g in zip(outputs, given, strict=True) if x is not None]
    d_q, d_k, d_v, d_kv, *d_z = torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs])
    return d_q, d_k * scale, d_v, d_kv, d_z[0] if d_z else None
