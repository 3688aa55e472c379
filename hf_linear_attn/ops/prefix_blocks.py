"""Causal feature-wise softmax over positions in blocks of tokens, with a backward pass of its own.

o_i = sum_f a_if sum_{j<=i} e^{l_jf} v_j / z_if with z_if = sum_{j<=i} e^{l_jf} is linear attention whose queries are
a_if / z_if. e^{l_jf} is split into 2^(n_jf) and a factor from 1 to 2; sums of feature f are relative to 2^(P_f), P_f at
least every n of a block. Powers of two round nothing, so no later key, however large, changes a bit of a row. Where a
row's own maximum lies far below P (`_MOST_RISE`), the rows of a block are computed in several passes, each with a P of
its own and without the keys after its rows.

Shapes as in `ops.prefix_softmax`. Not differentiable twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_linear_attn.ops import linear_chunks as chunks
from hf_linear_attn.ops import linear_sums as sums
from hf_linear_attn.ops.masking import safe_masked_fill

__all__ = ["prefix_block_attention"]

_MOST_RISE = 30.0  # octaves that a row's largest key may lie below P: 2^-30 leaves float32 room
_LOG2 = math.log(2.0)

_Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # [B, H, F, D], [B, H, F], and P [B, H, F]
_Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]  # a, logits, v, key_real


def prefix_block_attention(
    a: torch.Tensor, logits: torch.Tensor, v: torch.Tensor, key_real: torch.Tensor | None, state: sums.State | None
) -> tuple[torch.Tensor, sums.State]:
    """Causal attention, checked arguments given.

    Args:
        a: `[B, H, Tq, F]`, the shares of the features, for the last Tq keys.
        logits: `[B, H, Tk, F]`, of a's dtype.
        v: `[B, H, Tk, D]`.
        key_real: bool `[B, Tk]`, or None.
        state: sums over earlier keys, or None.

    Returns:
        output `[B, H, Tq, D]`, and the state after these keys.
    """
    start = (None, None, None) if state is None else (state["kv"], state["z"], state["log_scale"])
    output, kv, z, log_scale = _PrefixAttention.apply(a, logits, v, key_real, *start)
    return output, {"kv": kv, "z": z, "log_scale": log_scale}


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        a, logits, v, real, kv, z, log_scale = arguments
        given = (a, logits, v, real)
        past, block = logits.shape[2] - a.shape[2], sums.block_size(v)
        base = _first(logits, real)
        if kv is None:
            kv = a.new_zeros(*a.shape[:2], a.shape[-1], v.shape[-1])
            z, peak = torch.zeros_like(kv[..., 0]), torch.full_like(kv[..., 0], sums.LOG_ZERO)
        else:
            valid = log_scale > sums.LOG_ZERO / 2
            base = torch.where(valid, log_scale, base)
            peak = torch.where(valid, 0.0, sums.LOG_ZERO).to(a.dtype)
        carry: _Sums = (kv, z, peak)
        saved: list[torch.Tensor] = []
        ctx.layout = [slice(i, min(i + block, past)) for i in range(0, past, block)]
        ctx.layout += [slice(i, min(i + block, past + a.shape[2])) for i in range(past, past + a.shape[2], block)]
        output = v.new_empty(v.shape[0], a.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)
        with sums.full_precision(v):
            for now in ctx.layout:
                power, factor, values = _keys(given, base, now)
                saved += carry
                if now.stop <= past:  # keys before the first query are only summed
                    carry = _rescaled(carry, power.amax(2))
                    kv, z = chunks.key_sums(_weights(power, factor, carry[2]), values)
                    carry = carry[0] + kv, carry[1] + z, carry[2]
                    continue
                rows = slice(now.start - past, now.stop - past)
                for part in _passes(power, carry[2], real is not None):
                    moved, k = _moved(power, factor, carry, part)
                    out, kv, z = chunks.prefix(a[:, :, rows], k, values, *moved[:2], sums.CHUNK)
                    output[:, :, rows][:, :, part] = out[:, :, part]
                carry = kv, z, moved[2]  # of the last pass, which has all keys
        ctx.save_for_backward(*arguments, base, *saved)
        ctx.set_materialize_grads(False)
        log_scale = carry[2] * _LOG2 + base
        ctx.mark_non_differentiable(log_scale)
        return output, carry[0].clone(), carry[1].clone(), log_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        a, logits, v, real, kv, _, _, base, *saved = ctx.saved_tensors
        given, past = (a, logits, v, real), logits.shape[2] - a.shape[2]
        d_output, d_kv, d_z, _ = gradients
        d_a, d_logits, d_v = (torch.empty_like(x) for x in (a, logits, v))
        with sums.full_precision(v):
            d_kv = torch.zeros_like(saved[0]) if d_kv is None else d_kv.to(a.dtype)
            d_z = torch.zeros_like(saved[1]) if d_z is None else d_z.to(a.dtype)
            for i in reversed(range(len(ctx.layout))):
                now, carry = ctx.layout[i], tuple(saved[3 * i : 3 * i + 3])
                power, factor, values = _keys(given, base, now)
                if now.stop <= past:
                    moved = _rescaled(carry, power.amax(2))
                    k = _weights(power, factor, moved[2])
                    d_k = (values @ d_kv.mT).add_(d_z[:, :, None])
                    d_v[:, :, now], d_logits[:, :, now] = k @ d_kv, d_k.mul_(k)
                    kept = (carry[2] - moved[2]).exp2()
                    d_kv, d_z = d_kv * kept[..., None], d_z * kept
                    continue
                rows = slice(now.start - past, now.stop - past)
                d_rows = torch.zeros_like(values) if d_output is None else d_output[:, :, rows].to(a.dtype)
                parts = _passes(power, carry[2], real is not None)
                found: list[torch.Tensor] = []
                for number, part in enumerate(parts):
                    moved, k = _moved(power, factor, carry, part)
                    mine, end = d_rows, (d_kv, d_z)
                    if len(parts) > 1:
                        mine = torch.zeros_like(d_rows)
                        mine[:, :, part] = d_rows[:, :, part]
                    if number + 1 < len(parts):
                        end = torch.zeros_like(d_kv), torch.zeros_like(d_z)
                    parts_of_a, d_k, d_values, before, z_before = chunks.prefix_backward(
                        a[:, :, rows], k, values, *moved[:2], mine, *end, sums.CHUNK
                    )
                    kept = (carry[2] - moved[2]).exp2()
                    change = [parts_of_a, d_k.mul_(k), d_values, before * kept[..., None], z_before * kept]
                    found = change if not found else [x + y for x, y in zip(found, change, strict=True)]
                d_a[:, :, rows], d_logits[:, :, now], d_v[:, :, now] = found[:3]
                d_kv, d_z = found[3:]
        d_v = safe_masked_fill(d_v, real)
        start = (None, None) if kv is None else (d_kv, d_z)
        found_all = (d_a, d_logits, d_v, None, *start, None)
        return tuple(x if wanted else None for x, wanted in zip(found_all, ctx.needs_input_grad, strict=True))


def _first(logits: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Logits of the first real key, 0 where there is none: `[B, H, F]`."""
    if real is None:
        return logits[:, :, 0]
    index = real.to(torch.uint8).argmax(-1)[:, None, None, None].expand(*logits.shape[:2], 1, logits.shape[-1])
    return logits.gather(2, index)[:, :, 0].masked_fill(~real.any(-1)[:, None, None], 0)


def _keys(given: _Given, base: torch.Tensor, now: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Powers and factors of a block's e^{l} `[B, H, block, F]`, and its values; 0 at padded keys."""
    a, logits, v, real = given
    octaves = (logits[:, :, now] - base[:, :, None]).div_(_LOG2)
    power = octaves.floor()
    factor = octaves.sub_(power).exp2_()
    values = v[:, :, now].to(a.dtype)
    if real is not None:
        pads = ~real[:, None, now, None]
        power, factor, values = power.masked_fill_(pads, sums.LOG_ZERO), factor.masked_fill_(pads, 0), values
        values = values.masked_fill(pads, 0)
    return power, factor, values.contiguous()


def _weights(power: torch.Tensor, factor: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    return (power - peak[:, :, None]).exp2_().mul_(factor)


def _rescaled(carry: _Sums, highest: torch.Tensor) -> _Sums:
    peak = torch.maximum(carry[2], highest)
    kept = (carry[2] - peak).exp2()
    return carry[0] * kept[..., None], carry[1] * kept, peak


def _moved(power: torch.Tensor, factor: torch.Tensor, carry: _Sums, part: slice) -> tuple[_Sums, torch.Tensor]:
    """Earlier sums and a block's weights relative to the P of one pass, without the keys after its rows."""
    if part.stop == power.shape[2]:
        moved = _rescaled(carry, power.amax(2))
        return moved, _weights(power, factor, moved[2])
    moved = _rescaled(carry, power[:, :, : part.stop].amax(2))
    k = torch.zeros_like(power)
    k[:, :, : part.stop] = _weights(power[:, :, : part.stop], factor[:, :, : part.stop], moved[2])
    return moved, k


def _passes(power: torch.Tensor, start: torch.Tensor, padded: bool) -> list[slice]:
    """Ranges of a block's rows inside which no feature's running maximum rises far: mostly all rows at once."""
    length = power.shape[2]
    if not padded:
        rise = torch.maximum(power.amax(2), start) - torch.maximum(power[:, :, 0], start)
        if not bool((rise > _MOST_RISE).any()):
            return [slice(0, length)]
    row = torch.maximum(power.cummax(2).values, start[:, :, None])
    # Rows that see no key do not count: give them what the first key will bring.
    seen = row > sums.LOG_ZERO / 2
    row = torch.maximum(row, torch.where(seen, row, torch.inf).amin(2, keepdim=True).nan_to_num(posinf=0.0))
    parts, first = [], 0
    while first < length:
        far = (row[:, :, first:] - row[:, :, first : first + 1] > _MOST_RISE).flatten(0, 1).transpose(0, 1).flatten(1)
        wrong = far.any(1)
        stop = first + int(wrong.to(torch.uint8).argmax()) if bool(wrong.any()) else length
        parts.append(slice(first, stop))
        first = stop
    return parts
