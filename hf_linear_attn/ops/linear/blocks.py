"""Linear attention in blocks of tokens with a backward pass of its own, which recomputes what it needs block by block.

The forward pass keeps the inputs, the output, the denominators and the sums before each block; the backward pass
recomputes features and scores of one block at a time. So training holds neither the features of a long sequence nor a
state per chunk, and a block fits a CPU's cache.

The weight exp(a_j) of a key is split into 2^(n_j) and a factor from 1 to 2, which is multiplied into its features. Sums
are relative to 2^P, with one P for all rows of a block, at least every n_j; where a row's own maximum lies far below it
(`_MOST_RISE`), with one P per row. Powers of two round nothing, so rows do not depend on P: no later key, however
large, changes a bit of them.

Shapes as in `ops.linear.attention`. Not differentiable twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_linear_attn.ops.base.masking import safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, TINY, accumulation_dtype, full_precision
from hf_linear_attn.ops.features.gradients import MapGradients, divide_into, leaf, map_parts, quotient_backward
from hf_linear_attn.ops.features.maps import FeatureMap, Features
from hf_linear_attn.ops.linear import chunks, sums

__all__ = ["block_linear_attention"]

# How far the largest n that a row may see can lie below the P of its block: 2^-30 leaves float32 room.
_MOST_RISE = 30.0
_LOG2 = math.log(2.0)

# phi(k) v^T [B, H, F, D] and phi(k) [B, H, F] summed, relative to 2^P with whole P [B, H]; P = LOG_ZERO without a key.
_Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Of a block's weights, n and the factor, each [B, H, block], 0 at padded keys; None for all 0 and for all 1.
_Weight = tuple[torch.Tensor | None, torch.Tensor | None]
_Tensors = tuple[torch.Tensor, ...]


@dataclass
class _Call:
    """One call: its options, and the tensors that every block takes a slice of.

    Attributes:
        q_map, k_map: feature maps, of tokens and the parameters that follow them.
        q_count: how many of the parameters are those of `q_map`.
        q: `[B, H, Tq, D]`; k, v: `[B, H, Tk, D]`.
        log_weight: `[B, H, Tk]`, added to that of `k_map`, or None.
        token_mask, query_mask: bool `[B, Tk]` and `[B, Tq]`, or None.
        is_causal: whether query row r sees keys up to position Tk - Tq + r only.
        weighted: whether keys have weights even where `k_map` gives none: a state may hold weighted ones.
        parameters: of both maps, those of the queries' first.
        base: what log weights are relative to, `[B, H]`: the scale of a state, or the first one; set on the way.
    """

    q_map: Any
    k_map: Any
    q_count: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_weight: torch.Tensor | None
    token_mask: torch.Tensor | None
    query_mask: torch.Tensor | None
    is_causal: bool
    weighted: bool
    parameters: _Tensors
    base: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.dtype = accumulation_dtype(self.v.dtype)
        # Keys that come before the first query, or all of them, are only summed.
        self.offset = self.k.shape[2] - self.q.shape[2] if self.is_causal else self.k.shape[2]
        self.block = sums.block_size(self.v)

    def key_blocks(self) -> list[slice]:
        """Blocks of the keys that are only summed."""
        return [slice(i, min(i + self.block, self.offset)) for i in range(0, self.offset, self.block)]

    def query_blocks(self) -> list[slice]:
        length = self.q.shape[2]
        return [slice(i, min(i + self.block, length)) for i in range(0, length, self.block)]

    def own_keys(self, rows: slice) -> slice:
        """Positions of these query rows among the keys."""
        return slice(self.offset + rows.start, self.offset + rows.stop)

    def real(self, now: slice) -> torch.Tensor | None:
        """bool `[B, 1, block]`, whether a key is a token; None if all are."""
        return None if self.token_mask is None else self.token_mask[:, None, now]

    def queries(self, q: torch.Tensor, rows: slice, parameters: _Tensors) -> Features:
        """Features of a block of queries, and their log scale."""
        real = None if self.query_mask is None else self.query_mask[:, rows]
        features, log_scale = self.q_map(safe_masked_fill(q, real), *parameters[: self.q_count])
        return features.to(self.dtype), log_scale

    def keys(self, k: torch.Tensor, extra: torch.Tensor | None, now: slice, parameters: _Tensors) -> Features:
        """Features of a block of keys, and their log weights without regard to padding."""
        real = None if self.token_mask is None else self.token_mask[:, now]
        features, weight = self.k_map(safe_masked_fill(k, real), *parameters[self.q_count :])
        if extra is not None:
            weight = extra if weight is None else weight + extra
        if weight is None and self.weighted:
            weight = torch.zeros_like(features[..., 0])
        return features.to(self.dtype), None if weight is None else weight.to(self.dtype)

    def values(self, now: slice) -> torch.Tensor:
        real = None if self.token_mask is None else self.token_mask[:, now]
        return safe_masked_fill(self.v[:, :, now].to(self.dtype), real).contiguous()

    def extra(self, now: slice) -> torch.Tensor | None:
        return None if self.log_weight is None else self.log_weight[:, :, now]

    def split(self, weight: torch.Tensor | None, now: slice) -> _Weight:
        """Powers and factors of a block's weights, given by their logs."""
        real = self.real(now)
        if weight is None:
            return None, None if real is None else real.to(self.dtype)
        octaves = (weight.detach() - self.base[..., None]) / _LOG2  # type: ignore[index]
        power = octaves.floor()
        factor = (octaves - power).exp2_()
        if real is None:
            return power, factor
        return power.masked_fill_(~real, LOG_ZERO), factor.masked_fill_(~real, 0)

    def set_base(self, weight: torch.Tensor, now: slice, start: torch.Tensor | None) -> None:
        """Make log weights relative to the scale of a state, or to the first key."""
        real, first = self.real(now), weight.detach()[..., 0]
        if real is not None:
            index = real.to(torch.uint8).argmax(-1, keepdim=True).expand(*weight.shape[:2], 1)
            first = torch.where(real.any(-1), weight.detach().gather(-1, index)[..., 0], 0.0)
        self.base = first if start is None else torch.where(start > LOG_ZERO / 2, start, first)


def block_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    log_weight: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    is_causal: bool,
    state: sums.State | None,
) -> tuple[torch.Tensor, torch.Tensor, sums.State]:
    """Attend, checked arguments given: those of `feature_map_attention`.

    Args:
        q_map, k_map: their parameters, if they train any, are those of a `ParametricMap`.
        log_weight: `[B, H, Tk]`, added to that of `k_map`, or None.
        token_mask: bool `[B, Tk]`, or None when all keys are tokens.
        query_mask: bool `[B, Tq]`, or None when all queries are, or may be.

    Returns:
        output `[B, H, Tq, D]` (`[B, T, H, D]` in memory, what the output projection reads next), log denominator
        `[B, H, Tq]`, and the state after these keys.
    """
    (q_function, q_parameters), (k_function, k_parameters) = map_parts(q_map), map_parts(k_map)
    start = (None, None, None) if state is None else (state["kv"], state["z"], state["log_scale"])
    options = q_function, k_function, len(q_parameters), is_causal
    arguments = q, k, v, log_weight, token_mask, query_mask, *start, *q_parameters, *k_parameters
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments):
        output, normalizer, kv, z, log_scale = _BlockAttention.apply(options, *arguments)
    else:
        output, _, normalizer, _, (kv, z, log_scale) = _forward(*_read(options, arguments))
    return output, normalizer, {"kv": kv, "z": z, "log_scale": log_scale}


def _read(options: Any, arguments: Any) -> tuple[_Call, _Sums | None]:
    """A call, and the state before it as it came: with its log scale."""
    q_map, k_map, q_count, is_causal = options
    q, k, v, log_weight, token_mask, query_mask, kv, z, log_scale, *parameters = arguments
    call = _Call(
        q_map, k_map, q_count, q, k, v, log_weight, token_mask, query_mask, is_causal, kv is not None, tuple(parameters)
    )
    return call, None if kv is None else (kv, z, log_scale)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, *arguments: torch.Tensor | None) -> Any:
        call, start = _read(options, arguments)
        output, denominator, normalizer, before, after = _forward(call, start)
        ctx.options, ctx.count, ctx.steep = options, len(arguments), [steep for _, steep in before]
        ctx.save_for_backward(*arguments, output, denominator, call.base, *(x for state, _ in before for x in state))
        ctx.mark_non_differentiable(after[2])
        ctx.set_materialize_grads(False)
        return output, normalizer, *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        tensors = ctx.saved_tensors  # once: under activation checkpointing every reading recomputes
        arguments, (output, denominator, base, *saved) = tensors[: ctx.count], tensors[ctx.count :]
        call, start = _read(ctx.options, arguments)
        call.base = base
        states = [tuple(saved[i : i + 3]) for i in range(0, len(saved), 3)]
        before = list(zip(states, ctx.steep, strict=True))
        found = _backward(call, start, output, denominator, before, gradients)
        return None, *(x if wanted else None for x, wanted in zip(found, ctx.needs_input_grad[1:], strict=True))


def _forward(call: _Call, start: _Sums | None) -> Any:
    """Output, denominators, log denominators, the sums before each block, and the state after the call.

    The sums before the blocks, and whether a block is steep, are those of each block of queries in causal attention,
    and the final ones alone otherwise.
    """
    (batch, heads, q_len, _), dtype = call.q.shape, call.dtype
    peak: torch.Tensor
    with torch.no_grad(), full_precision(call.v):
        output = call.v.new_empty(batch, q_len, heads, call.v.shape[-1]).transpose(1, 2)
        denominator = call.v.new_empty(batch, heads, q_len, dtype=dtype)
        normalizer = torch.empty_like(denominator)
        carry: _Sums | None = None
        before: list[tuple[_Sums, bool]] = []

        def keys(now: slice) -> tuple[torch.Tensor, _Weight, _Sums]:
            features, weight = call.keys(call.k[:, :, now], call.extra(now), now, call.parameters)
            if carry is not None:
                return features, call.split(weight, now), carry
            call.base = features.new_zeros(batch, heads)
            if weight is not None:
                call.set_base(weight, now, None if start is None else start[2])
            return features, call.split(weight, now), _first_sums(call, features, start, weight is not None)

        for now in call.key_blocks():
            k, weight, carry = keys(now)
            carry = _rescaled(carry, weight[0])
            k = _weighted(call, k, weight, carry[2])
            kv, z = chunks.key_sums(k, call.values(now))
            carry = carry[0] + kv, carry[1] + z, carry[2]
        if not call.is_causal:
            assert carry is not None
            before.append((carry, False))
        for rows in call.query_blocks():
            q, log_scale = call.queries(call.q[:, :, rows], rows, call.parameters)
            if call.is_causal:
                now = call.own_keys(rows)
                k, weight, carry = keys(now)
                before.append((carry, _is_steep(weight[0], carry[2])))
                if before[-1][1]:
                    power, factor = weight
                    assert power is not None
                    assert factor is not None
                    k = k * factor[..., None]
                    numerator, den, peak, carry = chunks.steep(q, k, call.values(now), power, *carry, sums.CHUNK)
                else:
                    seen = _seen(call, weight[0], carry[2])
                    carry = _rescaled(carry, weight[0])
                    k = _weighted(call, k, weight, carry[2])
                    numerator, den, *after = chunks.causal(q, k, call.values(now), *carry[:2], sums.CHUNK)
                    peak = carry[2][..., None] if seen is None else torch.where(seen, carry[2][..., None], LOG_ZERO)
                    carry = after[0], after[1], carry[2]
            else:
                assert carry is not None
                numerator, den, peak = q @ carry[0], (carry[1][:, :, None] @ q.mT)[:, :, 0], carry[2][..., None]
            denominator[:, :, rows] = den
            log = den.clamp(min=TINY).log_().add_(peak * _LOG2 + call.base[..., None])  # type: ignore[index]
            normalizer[:, :, rows] = log if log_scale is None else log + log_scale
            divide_into(output[:, :, rows], numerator, den)
        assert carry is not None
        assert call.base is not None
        return output, denominator, normalizer, before, (*carry[:2], carry[2] * _LOG2 + call.base)


def _first_sums(call: _Call, features: torch.Tensor, start: _Sums | None, weighted: bool) -> _Sums:
    """The sums before the call; relative to the base, a state has the scale 1."""
    if start is not None:
        valid = start[2] > LOG_ZERO / 2
        return start[0].to(call.dtype), start[1].to(call.dtype), torch.where(valid, 0.0, LOG_ZERO).to(call.dtype)
    kv = features.new_zeros(*features.shape[:2], features.shape[-1], call.v.shape[-1])
    return kv, torch.zeros_like(kv[..., 0]), kv.new_full(kv.shape[:2], LOG_ZERO if weighted else 0.0)


def _rescaled(carry: _Sums, power: torch.Tensor | None) -> _Sums:
    """The sums so far, relative to the largest of their own power and those of a block."""
    if power is None:
        return carry
    peak = torch.maximum(carry[2], power.amax(-1))
    kept = (carry[2] - peak).exp2()[..., None]
    return carry[0] * kept[..., None], carry[1] * kept, peak


def _scale(weight: _Weight, peak: torch.Tensor) -> torch.Tensor | None:
    """A block's weights relative to 2^peak, `[B, H, block]`, or None for 1."""
    power, factor = weight
    return factor if power is None else factor * (power - peak[..., None]).exp2()  # type: ignore[operator]


def _weighted(call: _Call, k: torch.Tensor, weight: _Weight, peak: torch.Tensor) -> torch.Tensor:
    """Weighted features of keys, written over them unless they are the call's own keys."""
    scale = _scale(weight, peak)
    if scale is None:
        return k
    given = k.untyped_storage().data_ptr() == call.k.untyped_storage().data_ptr()
    return k * scale[..., None] if given else k.mul_(scale[..., None])


def _is_steep(power: torch.Tensor | None, start: torch.Tensor) -> bool:
    """Whether some row's largest power lies far below that of the block; rows without a key do not count."""
    if power is None:
        return False
    highest = torch.maximum(power.amax(-1), start)[..., None]
    row = torch.maximum(power.cummax(-1).values, start[..., None])
    return bool(((highest - row > _MOST_RISE) & (row > LOG_ZERO / 2)).any())


def _seen(call: _Call, power: torch.Tensor | None, start: torch.Tensor) -> torch.Tensor | None:
    """Which rows of a block see a key, `[B, H, block]`, where powers tell; None for all."""
    if power is None or call.token_mask is None:
        return None
    return (torch.maximum(power, start[..., None]) > LOG_ZERO / 2).cumsum(-1) > 0


class _Gradients(MapGradients):
    """Where the gradients of a call are collected: of its tensors by slices, of parameters by sums."""

    def __init__(self, call: _Call) -> None:
        super().__init__(call.parameters)
        self.q, self.k, self.v = (torch.empty_like(x) for x in (call.q, call.k, call.v))
        self.log_weight = None if call.log_weight is None else torch.empty_like(call.log_weight)


def _backward(
    call: _Call, start: _Sums | None, output: torch.Tensor, denominator: torch.Tensor, before: Any, given: Any
) -> list[Any]:
    """Gradients of the arguments of `_BlockAttention.forward`, in their order."""
    d_output, d_normalizer, d_kv, d_z, _ = given
    found, dtype = _Gradients(call), call.dtype
    leaves = tuple(leaf(x, x.requires_grad) for x in call.parameters)
    first, last = before[0][0], before[-1][0]  # first: the sums of the keys that are only summed
    with torch.no_grad(), full_precision(call.v):
        # Gradients of the sums after the block in work.
        carry = (
            torch.zeros_like(last[0]) if d_kv is None else d_kv.to(dtype),
            torch.zeros_like(last[1]) if d_z is None else d_z.to(dtype),
        )
        blocks = call.query_blocks()
        for i in reversed(range(len(blocks))):
            rows = blocks[i]
            den, d_log = denominator[:, :, rows], None if d_normalizer is None else d_normalizer[:, :, rows].to(dtype)
            d_num, d_den = quotient_backward(d_output, output, den, d_log, rows)
            with torch.enable_grad():
                x = leaf(call.q[:, :, rows])
                outputs = call.queries(x, rows, leaves)
            q = outputs[0].detach()
            if call.is_causal:
                carry, d_q = _causal_backward(call, found, leaves, rows, before[i], q, (d_num, d_den), carry)
            else:
                d_q = (d_num @ last[0].mT).addcmul_(d_den[..., None], last[1][:, :, None])
                carry = carry[0] + q.mT @ d_num, carry[1] + (d_den[:, :, None] @ q)[:, :, 0]
            d_scale = torch.zeros_like(den) if d_log is None else d_log
            found.q[:, :, rows] = found.through(outputs, (d_q, d_scale), [x], leaves)[0]
        for now in call.key_blocks():
            inputs, outputs, weight = _mapped_keys(call, leaves, now)
            scale = _scale(weight, first[2])
            k = outputs[0].detach() if scale is None else outputs[0].detach() * scale[..., None]
            d_k = (call.values(now) @ carry[0].mT).add_(carry[1][:, :, None])
            found.v[:, :, now] = k @ carry[0]
            _keys_backward(found, leaves, now, inputs, outputs, scale, k, d_k)
        d_start: tuple[Any, ...] = (None, None, None)
        if start is not None:
            valid = torch.where(start[2] > LOG_ZERO / 2, 0.0, LOG_ZERO).to(dtype)
            kept = (valid - first[2]).exp2()[..., None]
            d_start = carry[0] * kept[..., None], carry[1] * kept, None
    return [found.q, found.k, found.v, found.log_weight, None, None, *d_start, *found.parameters]


def _mapped_keys(call: _Call, leaves: _Tensors, now: slice) -> tuple[list[torch.Tensor], Features, _Weight]:
    """Leaves of a block's keys and given log weights, their features and log weights with a graph, and these split."""
    with torch.enable_grad():
        inputs = [leaf(call.k[:, :, now])]
        if call.log_weight is not None:
            inputs.append(leaf(call.log_weight[:, :, now]))
        outputs = call.keys(inputs[0], inputs[1] if len(inputs) > 1 else None, now, leaves)
    return inputs, outputs, call.split(outputs[1], now)


def _causal_backward(
    call: _Call,
    found: _Gradients,
    leaves: _Tensors,
    rows: slice,
    before: tuple[_Sums, bool],
    q: torch.Tensor,
    given: tuple[torch.Tensor, torch.Tensor],
    carry: tuple[torch.Tensor, torch.Tensor],
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One block of causal attention: the gradients of the sums before it and of the queries' features."""
    now, (start, is_steep) = call.own_keys(rows), before
    inputs, outputs, weight = _mapped_keys(call, leaves, now)
    k, v = outputs[0].detach(), call.values(now)
    scale: torch.Tensor | None
    if is_steep:
        power, scale = weight
        assert power is not None
        assert scale is not None
        k = k * scale[..., None]
        d_q, d_k, d_v, d_kv, d_z = chunks.steep_backward(q, k, v, power, *start, *given, *carry, sums.CHUNK)
    else:
        kv, z, peak = _rescaled(start, weight[0])
        scale = _scale(weight, peak)
        k = k if scale is None else k * scale[..., None]
        d_q, d_k, d_v, d_kv, d_z = chunks.causal_backward(q, k, v, kv, z, *given, *carry, sums.CHUNK)
        if weight[0] is not None:
            kept = (start[2] - peak).exp2()[..., None]
            d_kv, d_z = d_kv * kept[..., None], d_z * kept
    found.v[:, :, now] = d_v
    _keys_backward(found, leaves, now, inputs, outputs, scale, k, d_k)
    return (d_kv, d_z), d_q


def _keys_backward(
    found: _Gradients,
    leaves: _Tensors,
    now: slice,
    inputs: list[torch.Tensor],
    outputs: Features,
    scale: torch.Tensor | None,
    k: torch.Tensor,
    d_k: torch.Tensor,
) -> None:
    """From the gradient of the weighted features `k` to that of the keys, their weights and the parameters."""
    d_weight = None if outputs[1] is None else (d_k * k).sum(-1)
    d_features = d_k if scale is None else d_k.mul_(scale[..., None])
    d_x, *d_extra = found.through(outputs, (d_features, d_weight), inputs, leaves)
    found.k[:, :, now] = d_x
    if found.log_weight is not None:
        found.log_weight[:, :, now] = d_extra[0]
