"""Weights of keys as powers of two: the sums of blocks of linear attention without decay, forward and backward.

The weight exp(a_j) of a key is split into 2^(n_j) and a factor from 1 to 2, which is multiplied into its features. Sums
are relative to 2^P, with one P for all rows of a block, at least every n_j; where a row's own maximum lies far below it
(`_MOST_RISE`), with one P per row. Powers of two round nothing, so rows do not depend on P: no later key, however
large, changes a bit of them.

`ops.linear.blocks` calls the functions here, or those of the same names in `ops.linear.decay`; nothing is recorded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.linear import chunks, layout
from hf_linear_attn.ops.linear.layout import Call, Keys

__all__ = ["Sums", "add", "attend", "attend_backward", "before_first", "end", "start_backward", "weigh"]

# How far the largest n that a row may see can lie below the P of its block: 2^-30 leaves float32 room.
_MOST_RISE = 30.0
_LOG2 = math.log(2.0)

_Tensors = tuple[torch.Tensor, ...]
# Of a block's weights, n and the factor, each [B, H, block]; `LOG_ZERO` and 0 for padded keys and those of weight 0.
# None for all 0 and for all 1.
_Weight = tuple[torch.Tensor | None, torch.Tensor | None]


class Sums(NamedTuple):
    """Sums over the keys so far.

    Attributes:
        kv: of phi(k) v^T, `[B, H, F, D]`.
        z: of phi(k), `[B, H, F]`; None without a normalizer.
        power: the whole P that both are relative to, `[B, H]`; `LOG_ZERO` without a key.
        base: what log weights are relative to, `[B, H]`: the scale of a state, or the first one.
    """

    kv: torch.Tensor
    z: torch.Tensor | None
    power: torch.Tensor
    base: torch.Tensor


def before_first(call: Call, keys: Keys, now: slice) -> Sums:
    """The sums before the call; relative to the base, a state has the scale 1."""
    shape = keys.features.shape
    base = keys.features.new_zeros(shape[:2])
    if keys.log_weight is not None:
        base = _base(call, keys.log_weight, now)
    if call.kv is not None:
        power = torch.zeros_like(base) if call.log_scale is None else _power_of_state(call)
        return Sums(call.kv, call.z, power, base)
    kv = keys.features.new_zeros(*shape[:2], shape[-1], call.v.shape[-1])
    z = torch.zeros_like(kv[..., 0]) if call.options.normalized else None
    return Sums(kv, z, torch.full_like(base, 0.0 if keys.log_weight is None else LOG_ZERO), base)


def _power_of_state(call: Call) -> torch.Tensor:
    return torch.where(call.log_scale > LOG_ZERO / 2, 0.0, LOG_ZERO).to(call.dtype)


def _base(call: Call, log_weight: torch.Tensor, now: slice) -> torch.Tensor:
    """The scale of a state, or the log weight of the first key that has one."""
    given, real = log_weight.detach(), call.real(now)
    weighs = given > LOG_ZERO / 2
    weighs = weighs if real is None else weighs & real
    index = weighs.to(torch.uint8).argmax(-1, keepdim=True)
    first = torch.where(weighs.any(-1), given.gather(-1, index)[..., 0], 0.0)
    return first if call.log_scale is None else torch.where(call.log_scale > LOG_ZERO / 2, call.log_scale, first)


def end(sums: Sums) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """kv, z and log scale of a state."""
    return sums.kv, sums.z, sums.power * _LOG2 + sums.base


def start_backward(call: Call, first: Sums, d_sums: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of a state's kv and z, from those of the first sums."""
    if call.log_scale is None:
        return d_sums
    kept = (_power_of_state(call) - first.power).exp2()[..., None]
    return d_sums[0] * kept[..., None], d_sums[1] * kept


def add(call: Call, keys: Keys, now: slice, sums: Sums) -> Sums:
    """The sums with further keys."""
    weight = _split(call, keys.log_weight, now, sums.base)
    sums = _rescaled(sums, weight[0])
    kv, z = chunks.key_sums(_weighted(call, keys.features, weight, sums.power), call.values(now))
    return sums._replace(kv=sums.kv + kv, z=None if sums.z is None else sums.z + z)


def weigh(call: Call, keys: Keys, now: slice, sums: Sums) -> torch.Tensor | None:
    """Weights of keys relative to the power of sums that hold them, `[B, H, block]`, or None for 1."""
    return _scale(_split(call, keys.log_weight, now, sums.base), sums.power)


def attend(
    call: Call, q: torch.Tensor, keys: Keys, now: slice, sums: Sums
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Sums, bool]:
    """One block of causal attention.

    Args:
        q: features of the queries.
        keys: theirs, at the positions `now`.
        sums: those before the block.

    Returns:
        numerators `[B, H, T, D]`, denominators `[B, H, T]` (None without a normalizer) and the log scale of both,
        `[B, H, T or 1]`; the sums after the block; and whether it is steep.
    """
    weight = _split(call, keys.log_weight, now, sums.base)
    power, factor = weight
    seen, steep = _rows(power, sums.power)
    if steep:
        assert power is not None
        assert factor is not None
        k = keys.features * factor[..., None]
        assert sums.z is not None
        numerator, den, peak, after = chunks.steep(
            q, k, call.values(now), power, sums.kv, sums.z, sums.power, layout.CHUNK
        )
        sums = Sums(*after, sums.base)
    else:
        sums = _rescaled(sums, power)
        k = _weighted(call, keys.features, weight, sums.power)
        numerator, den, kv, z = chunks.causal(q, k, call.values(now), sums.kv, sums.z, layout.CHUNK)
        peak = sums.power[..., None] if seen is None else torch.where(seen, sums.power[..., None], LOG_ZERO)
        sums = sums._replace(kv=kv, z=z)
    return numerator, den, peak * _LOG2 + sums.base[..., None], sums, steep


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
        borders: the sums before the block, and after it where they are kept.

    Returns:
        those of q, of the keys (features, log weights, decays), of the values, and of the sums before the block.
    """
    sums = borders[0]
    weight = _split(call, keys.log_weight, now, sums.base)
    power, scale = weight
    d_kv, d_z = d_sums
    if steep:
        assert power is not None
        assert scale is not None
        assert sums.z is not None
        k = keys.features * scale[..., None]
        d_q, d_k, d_v, d_kv, d_z = chunks.steep_backward(
            q, k, call.values(now), power, sums.kv, sums.z, sums.power, d_num, d_den, d_kv, d_z, layout.CHUNK
        )
    else:
        before, sums = sums.power, _rescaled(sums, power)
        scale = _scale(weight, sums.power)
        k = keys.features if scale is None else keys.features * scale[..., None]
        d_q, d_k, d_v, d_kv, d_z = chunks.causal_backward(
            q, k, call.values(now), sums.kv, sums.z, d_num, d_den, d_kv, d_z, layout.CHUNK
        )
        if power is not None:
            kept = (before - sums.power).exp2()[..., None]
            d_kv, d_z = d_kv * kept[..., None], d_z * kept
    d_weight = None if keys.log_weight is None else (d_k * k).sum(-1)
    return d_q, (d_k if scale is None else d_k.mul_(scale[..., None]), d_weight, None), d_v, (d_kv, d_z)


def _split(call: Call, log_weight: torch.Tensor | None, now: slice, base: torch.Tensor) -> _Weight:
    """Powers and factors of a block's weights, given by their logs."""
    real = call.real(now)
    if log_weight is None:
        return None, None if real is None else real.to(call.dtype)
    octaves = (log_weight.detach() - base[..., None]) / _LOG2
    power = octaves.floor()
    factor = (octaves - power).exp2_()
    nothing = log_weight.detach() <= LOG_ZERO / 2
    nothing = nothing if real is None else nothing | ~real
    return power.masked_fill_(nothing, LOG_ZERO), factor.masked_fill_(nothing, 0)


def _rescaled(sums: Sums, power: torch.Tensor | None) -> Sums:
    """The sums so far, relative to the largest of their own power and those of a block."""
    if power is None:
        return sums
    assert sums.z is not None
    peak = torch.maximum(sums.power, power.amax(-1))
    kept = (sums.power - peak).exp2()[..., None]
    return Sums(sums.kv * kept[..., None], sums.z * kept, peak, sums.base)


def _scale(weight: _Weight, peak: torch.Tensor) -> torch.Tensor | None:
    """A block's weights relative to 2^peak, `[B, H, block]`, or None for 1."""
    power, factor = weight
    return factor if power is None else factor * (power - peak[..., None]).exp2()  # type: ignore[operator]


def _weighted(call: Call, k: torch.Tensor, weight: _Weight, peak: torch.Tensor) -> torch.Tensor:
    """Weighted features of keys, written over them unless they are the call's own keys."""
    scale = _scale(weight, peak)
    if scale is None:
        return k
    given = k.untyped_storage().data_ptr() == call.k.untyped_storage().data_ptr()
    return k * scale[..., None] if given else k.mul_(scale[..., None])


def _rows(power: torch.Tensor | None, start: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
    """Which rows of a block see a key that weighs anything, `[B, H, block]`, None for all, where powers do not tell.

    And whether the largest power of some such row lies far below that of the block.
    """
    if power is None:
        return None, False
    highest = torch.maximum(power.amax(-1), start)[..., None]
    row = torch.maximum(power.cummax(-1).values, start[..., None])
    seen = row > LOG_ZERO / 2
    return seen, bool(((highest - row > _MOST_RISE) & seen).any())
