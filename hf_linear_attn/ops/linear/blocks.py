"""Linear attention in blocks of tokens with a backward pass of its own, which recomputes what it needs block by block.

The forward pass keeps the inputs, the output, the denominators and the sums before each block; the backward pass
recomputes features, log-decays and scores of one block at a time. So training holds neither the features of a long
sequence nor a state per chunk, and a block fits a CPU's cache.

What a block of causal attention computes is in `ops.linear.powers`, and with decay in `ops.linear.decay`.

Shapes as in `ops.linear.attention`. Not differentiable twice.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.base.numerics import TINY, full_precision
from hf_linear_attn.ops.features.gradients import MapGradients, divide_into, leaf, quotient_backward
from hf_linear_attn.ops.linear import decay, powers
from hf_linear_attn.ops.linear.layout import Call, Keys, Options, State

__all__ = ["attend"]

_Tensors = tuple[torch.Tensor, ...]


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor | None, State]:
    """Attend, checked arguments given; with decay, as many queries as keys.

    Returns:
        output `[B, H, Tq, D]` (`[B, T, H, D]` in memory, what the output projection reads next); log denominator
        `[B, H, Tq]`, None with decay or without a normalizer; and the state after these keys. If not `divided`,
        numerators in the dtype of sums, with the denominators as last column, and the log scale of both or None.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.tensors):
        output, normalizer, *after = _BlockAttention.apply(call.options, *call.tensors)
    else:
        output, _, normalizer, borders, _ = _forward(call)
        after = _scheme(call.options).end(borders[-1])
    names = ("kv", "z", "log_scale") if call.options.normalized else ("kv",)
    return output, normalizer, dict(zip(names, after, strict=False))


def _scheme(options: Options) -> Any:
    """The module that computes a block: how weights and decays are kept in range."""
    return powers if options.decay is None else decay


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: torch.Tensor | None) -> Any:
        output, denominator, normalizer, borders, ctx.steep = _forward(Call(options, tensors))
        ctx.options, ctx.count, ctx.kind = options, len(tensors), type(borders[-1])
        after = _scheme(options).end(borders[-1])
        if options.decay is not None:  # needs the sums after the last block too; what is returned is a copy
            after = tuple(None if x is None else x.clone() for x in after)
        elif options.is_causal:
            borders.pop()
        kept = output if options.divided else None, denominator
        ctx.save_for_backward(*tensors, *kept, *(x for sums in borders for x in sums))
        scales = after[2], None if options.divided else normalizer
        ctx.mark_non_differentiable(*(x for x in scales if x is not None))
        ctx.set_materialize_grads(False)
        return output, normalizer, *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        saved = ctx.saved_tensors  # once: under activation checkpointing every reading recomputes
        tensors, (output, denominator, *sums) = saved[: ctx.count], saved[ctx.count :]
        size = len(ctx.kind._fields)
        borders = [ctx.kind(*sums[i : i + size]) for i in range(0, len(sums), size)]
        call = Call(ctx.options, tensors)
        found = _backward(call, output, denominator, borders, ctx.steep, gradients)
        return None, *(x if wanted else None for x, wanted in zip(found, ctx.needs_input_grad[1:], strict=True))


def _forward(call: Call) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, list[Any], list[bool]]:
    """Output, denominators, log denominators (log scales if not `divided`), sums, and whether blocks are steep.

    The sums are those before each block of queries, and after the last one; without causality the final ones alone.
    """
    (batch, heads, q_len, _), options = call.q.shape, call.options
    scheme, sums, borders, steep = _scheme(options), None, [], []
    with torch.no_grad(), full_precision(call.v):
        columns, dtype = _columns(call), call.v.dtype if options.divided else call.dtype
        output = call.v.new_empty(batch, q_len, heads, columns, dtype=dtype).transpose(1, 2)
        denominator = normalizer = None
        scales: list[Any] = []
        if options.normalized and options.divided:
            denominator = call.v.new_empty(batch, heads, q_len, dtype=call.dtype)
            normalizer = torch.empty_like(denominator) if options.decay is None else None

        def keys_of(now: slice) -> tuple[Keys, Any]:
            keys = call.keys([x[:, :, now] for x in call.key_inputs()], now, call.parameters)
            return keys, scheme.before_first(call, keys, now) if sums is None else sums

        for now in call.key_blocks():
            keys, sums = keys_of(now)
            sums = scheme.add(call, keys, now, sums)
        for rows in call.query_blocks():
            q, log_scale = call.queries(call.q[:, :, rows], rows, call.parameters)
            if options.is_causal:
                now = call.own_keys(rows)
                keys, sums = keys_of(now)
                borders.append(sums)
                numerator, den, peak, sums, is_steep = scheme.attend(call, q, keys, now, sums)
                steep.append(is_steep)
            else:
                assert sums is not None
                numerator, den = q @ sums.kv, (sums.z[:, :, None] @ q.mT)[:, :, 0]
                peak = scheme.end(sums)[2][..., None]
            if denominator is None:
                output[:, :, rows, : numerator.shape[-1]] = numerator
                if options.normalized:
                    output[:, :, rows, -1] = den
                scales.append(peak)
                continue
            denominator[:, :, rows] = den
            divide_into(output[:, :, rows], numerator, den)
            if normalizer is not None:
                log = den.clamp(min=TINY).log_().add_(peak)
                normalizer[:, :, rows] = log if log_scale is None else log + log_scale
        if not options.divided and scales[0] is not None:
            normalizer = torch.cat(scales, 2)
        return output, denominator, normalizer, [*borders, sums], steep


def _columns(call: Call) -> int:
    """Of the output: of the values, and of the denominators where they stand beside the numerators."""
    return call.v.shape[-1] + int(call.options.normalized and not call.options.divided)


class _Gradients(MapGradients):
    """Where the gradients of a call are collected: of its tensors by slices, of parameters by sums."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.parameters)
        self.q, self.v = torch.empty_like(call.q), torch.empty_like(call.v)
        self.keys = [torch.empty_like(x) for x in call.key_inputs()]

    def in_order(self, call: Call, start: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """Those of the tensors of a `Call`."""
        k, *rest = self.keys
        log_weight = None if call.log_weight is None else rest.pop(0)
        tokens = None if call.decay_tokens is None else rest.pop(0)
        return [self.q, k, self.v, log_weight, tokens, None, None, *start, None, *self.parameters]


def _backward(
    call: Call, output: torch.Tensor, denominator: torch.Tensor | None, borders: Any, steep: list[bool], given: Any
) -> list[torch.Tensor | None]:
    """Gradients of the tensors of a call, in their order."""
    d_output, d_normalizer, d_kv, d_z, _ = given
    scheme, found = _scheme(call.options), _Gradients(call)
    leaves = tuple(leaf(x, x.requires_grad) for x in call.parameters)
    last = borders[-1]
    # Gradients of the sums after the block in work.
    d_sums: Any = [torch.zeros_like(last.kv) if d_kv is None else d_kv.to(call.dtype), None]
    if last.z is not None:
        d_sums[1] = torch.zeros_like(last.z) if d_z is None else d_z.to(call.dtype)
    for i, rows in reversed(list(enumerate(call.query_blocks()))):
        d_log = None if d_normalizer is None else d_normalizer[:, :, rows].to(call.dtype)
        d_den: Any = None
        if denominator is not None:
            d_num, d_den = quotient_backward(d_output, output, denominator[:, :, rows], d_log, rows)
        else:
            shape = *call.q.shape[:2], rows.stop - rows.start, _columns(call)
            d_num = call.v.new_zeros(shape) if d_output is None else d_output[:, :, rows]
            d_num = d_num.to(call.dtype)
            if shape[-1] > call.v.shape[-1]:
                d_num, d_den = d_num[..., :-1], d_num[..., -1]
        with torch.enable_grad():
            x = leaf(call.q[:, :, rows], call.q.requires_grad)
            outputs = call.queries(x, rows, leaves)
        q = outputs[0].detach()
        if call.options.is_causal:
            now = call.own_keys(rows)
            inputs, keys = _mapped(call, leaves, now)
            d_q, d_keys, found.v[:, :, now], d_sums = scheme.attend_backward(
                call, q, keys, now, borders[i : i + 2], steep[i], d_num, d_den, d_sums
            )
            _collect(found, leaves, now, inputs, keys, d_keys)
        else:
            d_q = (d_num @ last.kv.mT).addcmul_(d_den[..., None], last.z[:, :, None])
            d_sums = d_sums[0] + q.mT @ d_num, d_sums[1] + (d_den[:, :, None] @ q)[:, :, 0]
        d_scale = torch.zeros_like(q[..., 0]) if d_log is None else d_log
        found.q[:, :, rows] = found.through(outputs, (d_q, d_scale), [x], leaves)[0]
    for now in call.key_blocks():
        inputs, keys = _mapped(call, leaves, now)
        scale = scheme.weigh(call, keys, now, borders[0])
        k = keys.features.detach() if scale is None else keys.features.detach() * scale[..., None]
        d_k = call.values(now) @ d_sums[0].mT
        if d_sums[1] is not None:
            d_k.add_(d_sums[1][:, :, None])
        found.v[:, :, now] = k @ d_sums[0]
        d_weight = None if keys.log_weight is None else (d_k * k).sum(-1)
        d_features = d_k if scale is None else d_k.mul_(scale[..., None])
        _collect(found, leaves, now, inputs, keys, (d_features, d_weight, None))
    d_start = (None, None) if call.kv is None else scheme.start_backward(call, borders[0], d_sums)
    return found.in_order(call, d_start)


def _mapped(call: Call, leaves: _Tensors, now: slice) -> tuple[list[torch.Tensor], Keys]:
    """Leaves of what a block of keys is computed from, and the block with a graph."""
    with torch.enable_grad():
        inputs = [leaf(x[:, :, now], x.requires_grad) for x in call.key_inputs()]
        return inputs, call.keys(inputs, now, leaves)


def _collect(
    found: _Gradients, leaves: _Tensors, now: slice, inputs: list[torch.Tensor], keys: Keys, d_keys: Any
) -> None:
    """From the gradients of a block of keys to those of what it was computed from."""
    changes = found.through(keys, d_keys, inputs, leaves)
    for whole, change in zip(found.keys, changes, strict=True):
        whole[:, :, now] = change
