"""Causal feature-wise softmax over positions in blocks of tokens, with a backward pass of its own.

o_i = sum_f a_if sum_{j<=i} e^{l_jf} v_j / z_if with z_if = sum_{j<=i} e^{l_jf} is linear attention whose queries are
a_if / z_if. e^{l_jf} is split into 2^(n_jf) and a factor from 1 to 2; sums of feature f are relative to 2^(P_f), P_f at
least every n of a block. Powers of two round nothing, so no later key, however large, changes a bit of a row. Where a
row's own maximum lies far below P (`_MOST_RISE`), the rows of a block are computed in several passes, each with a P of
its own and without the keys after its rows.

Shapes as in `ops.prefix.attention`. Not differentiable twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.base.numerics import LOG2_E, LOG_ZERO, full_precision
from hf_linear_attn.ops.linear import chunks, layout
from hf_linear_attn.ops.prefix.shares import ShareGradients, ShareInputs

__all__ = ["prefix_block_attention"]

_MOST_RISE = 30.0  # octaves that a row's largest key may lie below P: 2^-30 leaves float32 room

_Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # [B, H, F, D], [B, H, F], and P [B, H, F]


def prefix_block_attention(inputs: ShareInputs, state: layout.State | None) -> tuple[torch.Tensor, layout.State]:
    """Causal attention, checked arguments given.

    Args:
        inputs: of the last Tq of Tk tokens' queries.
        state: sums over earlier keys, or None.

    Returns:
        output `[B, H, Tq, D]`, and the state after these keys.
    """
    start = (None, None, None) if state is None else (state["kv"], state["z"], state["log_scale"])
    output, kv, z, log_scale = _PrefixAttention.apply(*inputs.arguments(), *start)
    return output, {"kv": kv, "z": z, "log_scale": log_scale}


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *tensors, kv, z, log_scale = arguments
        given = ShareInputs(*tensors)
        v, real, dtype, rows_count = given.v, given.token_mask, given.dtype, given.q.shape[2]
        past, block = v.shape[2] - rows_count, layout.block_size(v)
        with full_precision(v):
            base = _first(given)
        if kv is None:
            kv = v.new_zeros(*v.shape[:2], given.num_features, v.shape[-1], dtype=dtype)
            z, peak = torch.zeros_like(kv[..., 0]), torch.full_like(kv[..., 0], LOG_ZERO)
        else:
            valid = log_scale > LOG_ZERO / 2
            base = torch.where(valid, log_scale, base)
            peak = torch.where(valid, 0.0, LOG_ZERO).to(dtype)
        carry: _Sums = (kv, z, peak)
        saved: list[torch.Tensor] = []
        ctx.layout = [slice(i, min(i + block, past)) for i in range(0, past, block)]
        ctx.layout += [slice(i, min(i + block, v.shape[2])) for i in range(past, v.shape[2], block)]
        output = v.new_empty(v.shape[0], rows_count, v.shape[1], v.shape[3]).transpose(1, 2)
        with full_precision(v):
            for now in ctx.layout:
                power, factor, values = _keys(given, given.keys(now), base, now)
                saved += carry
                if now.stop <= past:  # keys before the first query are only summed
                    carry = _rescaled(carry, power.amax(2))
                    kv, z = chunks.key_sums(_weights(power, factor, carry[2]), values)
                    carry = carry[0] + kv, carry[1] + z, carry[2]
                    continue
                rows = slice(now.start - past, now.stop - past)
                a = given.shares(given.queries(rows))
                for part in _passes(power, carry[2], real is not None):
                    moved, k = _moved(power, factor, carry, part)
                    out, kv, z = chunks.prefix(a, k, values, *moved[:2], layout.CHUNK)
                    output[:, :, rows][:, :, part] = out[:, :, part]
                carry = kv, z, moved[2]  # of the last pass, which has all keys
        ctx.save_for_backward(*arguments, base, *saved)
        ctx.set_materialize_grads(False)
        log_scale = carry[2] / LOG2_E + base
        ctx.mark_non_differentiable(log_scale)
        return output, carry[0].clone(), carry[1].clone(), log_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        held = ctx.saved_tensors  # once: gradient checkpointing computes them again
        tensors, kv, base, saved = held[:8], held[8], held[11], held[12:]
        given = ShareInputs(*tensors)
        found, dtype, past = ShareGradients(given), given.dtype, given.v.shape[2] - given.q.shape[2]
        d_output, d_kv, d_z, _ = gradients
        d_kv = torch.zeros_like(saved[0]) if d_kv is None else d_kv.to(dtype)
        d_z = torch.zeros_like(saved[1]) if d_z is None else d_z.to(dtype)
        for i in reversed(range(len(ctx.layout))):
            now, carry = ctx.layout[i], tuple(saved[3 * i : 3 * i + 3])
            keys = given.keys(now)
            power, factor, values = _keys(given, keys, base, now)
            if now.stop <= past:
                moved = _rescaled(carry, power.amax(2))
                k = _weights(power, factor, moved[2])
                d_k = (values @ d_kv.mT).add_(d_z[:, :, None])
                found.of_values(now, k @ d_kv)
                found.of_logits(now, d_k.mul_(k), keys)
                kept = (carry[2] - moved[2]).exp2()
                d_kv, d_z = d_kv * kept[..., None], d_z * kept
                continue
            rows = slice(now.start - past, now.stop - past)
            q = given.queries(rows)
            a = given.shares(q)
            d_rows = torch.zeros_like(values) if d_output is None else d_output[:, :, rows].to(dtype)
            parts = _passes(power, carry[2], given.token_mask is not None)
            total: list[torch.Tensor] = []
            for number, part in enumerate(parts):
                moved, k = _moved(power, factor, carry, part)
                mine, end = d_rows, (d_kv, d_z)
                if len(parts) > 1:
                    mine = torch.zeros_like(d_rows)
                    mine[:, :, part] = d_rows[:, :, part]
                if number + 1 < len(parts):
                    end = torch.zeros_like(d_kv), torch.zeros_like(d_z)
                d_a, d_k, d_values, before, z_before = chunks.prefix_backward(
                    a, k, values, *moved[:2], mine, *end, layout.CHUNK
                )
                kept = (carry[2] - moved[2]).exp2()
                change = [d_a, d_k.mul_(k), d_values, before * kept[..., None], z_before * kept]
                total = change if not total else [x + y for x, y in zip(total, change, strict=True)]
            found.of_shares(rows, total[0], a, q)
            found.of_logits(now, total[1], keys)
            found.of_values(now, total[2])
            d_kv, d_z = total[3:]
        start = (None, None) if kv is None else (d_kv, d_z)
        found_all = (*found.arguments(), *start, None)
        return tuple(x if wanted else None for x, wanted in zip(found_all, ctx.needs_input_grad, strict=True))


def _first(given: ShareInputs) -> torch.Tensor:
    """Logits of the first real key, 0 where there is none: `[B, H, F]`."""
    if given.token_mask is None:
        return given.logits(given.keys(slice(0, 1)), slice(0, 1))[:, :, 0]
    # Of each sequence, as a call of one key.
    index = given.token_mask.to(torch.uint8).argmax(-1)[:, None]
    first = given.k.gather(2, index[:, None, :, None].expand(*given.k.shape[:2], 1, given.k.shape[-1]))
    alone = replace(given, k=first, token_mask=given.token_mask.gather(1, index))
    found = alone.logits(alone.keys(slice(0, 1)), slice(0, 1))[:, :, 0]
    return found.masked_fill(~given.token_mask.any(-1)[:, None, None], 0)


def _keys(
    given: ShareInputs, k: torch.Tensor, base: torch.Tensor, now: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Powers and factors of a block's e^{l} `[B, H, block, F]`, powers below `LOG_ZERO` at padded keys; its values."""
    octaves = (given.logits(k, now) - base[:, :, None]).mul_(LOG2_E)
    power = octaves.floor()
    factor = octaves.sub_(power).exp2_()
    return power, factor, given.values(now).contiguous()


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
    seen = row > LOG_ZERO / 2
    row = torch.maximum(row, torch.where(seen, row, torch.inf).amin(2, keepdim=True).nan_to_num(posinf=0.0))
    parts, first = [], 0
    while first < length:
        far = (row[:, :, first:] - row[:, :, first : first + 1] > _MOST_RISE).flatten(0, 1).transpose(0, 1).flatten(1)
        wrong = far.any(1)
        stop = first + int(wrong.to(torch.uint8).argmax()) if bool(wrong.any()) else length
        parts.append(slice(first, stop))
        first = stop
    return parts
