"""Linear attention with decay in blocks of tokens, with a backward pass that computes features and decays again.

As `ops.linear.blocks`: the forward pass keeps the inputs, the output, the denominators and the sums before each block,
so neither features nor log-decays of a long sequence are ever held at once, and a block fits a CPU's cache.

Shapes as in `ops.linear.decay`. Not differentiable twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_linear_attn.ops.base.masking import safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype, full_precision
from hf_linear_attn.ops.features.gradients import MapGradients, divide_into, leaf, map_parts, quotient_backward
from hf_linear_attn.ops.features.maps import FeatureMap
from hf_linear_attn.ops.linear import decay_chunks as chunks
from hf_linear_attn.ops.linear import sums

__all__ = ["LEAST_GIVEN", "LogDecay", "block_decay_attention", "require_no_weight"]

LEAST_GIVEN = -1e4  # log-decay in place of -inf: finite, so that sums and differences are numbers

# Sums over keys, [B, H, F, D] and [B, H, F], the latter None without a normaliser; and their log scale [B, H], None
# where no key has a weight.
_Sums = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
# The same of a state, as it came; all None without one.
_Start = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
_Tensors = tuple[torch.Tensor, ...]
# Features of queries and of keys, log weights of keys [B, H, block] or None, log-decays [B, H, block, F or 1].
_Mapped = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]


@dataclass(eq=False)  # not frozen, for the reason that `feature_maps` gives
class LogDecay:
    """Log-decays computed from tokens, a block of them at a time.

    Attributes:
        function: `(tokens, *parameters) -> [B, H, T, F]`, or `[B, H, T, 1]` where all features decay alike.
        tokens: `[B, H or 1, T, X]`; what stands at padded tokens has no effect.
        parameters: every tensor of `function` that trains.
    """

    function: Callable[..., torch.Tensor]
    tokens: torch.Tensor
    parameters: tuple[torch.Tensor, ...] = ()

    def __call__(self, token_mask: torch.Tensor | None) -> torch.Tensor:
        """The log-decays of all tokens."""
        return self.function(safe_masked_fill(self.tokens, token_mask), *self.parameters)


@dataclass
class _Call:
    """One call: its functions, and the tensors that every block takes a slice of.

    Attributes:
        functions: feature maps of queries and keys, and the log-decay, of tokens and parameters.
        counts: how many of `parameters` the feature map of queries takes, and that of keys; the log-decay has the rest.
        inputs: q, k `[B, H, T, D]`, the tokens of the log-decay, and log weights `[B, H, T]` added to those of keys.
        real: bool `[B, T]`, of keys and log-decays, or None.
        query_mask: bool `[B, T]`, of queries, or None.
        weighted: whether keys have weights even where their map gives none: a state may hold weighted ones.
    """

    functions: tuple[Any, Any, Any]
    counts: tuple[int, int]
    normalised: bool
    inputs: list[torch.Tensor]
    v: torch.Tensor
    real: torch.Tensor | None
    query_mask: torch.Tensor | None
    weighted: bool
    parameters: _Tensors

    def blocks(self) -> list[slice]:
        size, length = sums.block_size(self.v), self.v.shape[2]
        return [slice(i, min(i + size, length)) for i in range(0, length, size)]

    def mapped(self, inputs: list[torch.Tensor], now: slice, parameters: _Tensors) -> _Mapped:
        """Of a block's inputs: features, log weights of keys without regard to padding, and log-decays."""
        real, dtype = _part(self.real, now), accumulation_dtype(self.v.dtype)
        q, k, tokens = inputs[:3]
        first, second = self.counts[0], sum(self.counts)
        q_features, _ = self.functions[0](safe_masked_fill(q, _part(self.query_mask, now)), *parameters[:first])
        k_features, weight = self.functions[1](safe_masked_fill(k, real), *parameters[first:second])
        decay = self.functions[2](safe_masked_fill(tokens, real), *parameters[second:])
        if len(inputs) > 3:
            weight = inputs[3] if weight is None else weight + inputs[3]
        require_no_weight(self.normalised, weight)
        if weight is None and self.weighted:
            weight = torch.zeros_like(k_features[..., 0])
        decay = safe_masked_fill(decay.to(dtype), real).clamp(min=LEAST_GIVEN)
        return q_features.to(dtype), k_features.to(dtype), None if weight is None else weight.to(dtype), decay

    def values(self, now: slice) -> torch.Tensor:
        values = self.v[:, :, now].to(accumulation_dtype(self.v.dtype))
        return safe_masked_fill(values, _part(self.real, now)).contiguous()

    def relative(
        self, log_weight: torch.Tensor | None, decay: torch.Tensor, now: slice, peak: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """A block's weights (None for 1), 0 at padded keys, and log-decays relative to the peak, and the last peak."""
        pads = None if self.real is None else ~self.real[:, None, now]
        if log_weight is None:
            return None if pads is None else (~pads).to(decay.dtype).expand(decay.shape[:3]), decay, None
        assert peak is not None
        if pads is not None:
            log_weight = log_weight.masked_fill(pads, LOG_ZERO)
        weight, shift, peak = chunks.relative_to_peaks(log_weight, decay, peak)
        return weight if pads is None else weight.masked_fill_(pads, 0), decay + shift[..., None], peak


def require_no_weight(normalised: bool, log_weight: torch.Tensor | None) -> None:
    """`ValueError` for weights of keys without a normaliser."""
    if not normalised and log_weight is not None:
        raise ValueError("key_log_weight needs normalised=True: without a normaliser its scale does not cancel.")


def _part(real: torch.Tensor | None, now: slice) -> torch.Tensor | None:
    return None if real is None else real[:, now]


def block_decay_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: LogDecay,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    key_log_weight: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    normalised: bool,
    state: sums.State | None,
) -> tuple[torch.Tensor, sums.State]:
    """Attend, checked arguments given: those of `feature_map_decay_attention`, with as many queries as keys.

    Args:
        q_map, k_map: their parameters, if they train any, are those of a `ParametricMap`.

    Returns:
        output `[B, H, T, D]` (`[B, T, H, D]` in memory, what the output projection reads next), and the state after
        these keys.
    """
    (q_function, q_parameters), (k_function, k_parameters) = map_parts(q_map), map_parts(k_map)
    functions, counts = (q_function, k_function, log_decay.function), (len(q_parameters), len(k_parameters))
    start = (None, None, None) if state is None else (state["kv"], state.get("z"), state.get("log_scale"))
    parameters = *q_parameters, *k_parameters, *log_decay.parameters
    arguments = q, k, log_decay.tokens, key_log_weight, v, token_mask, query_mask, *start, *parameters
    options = functions, counts, normalised
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments):
        output, kv, z, log_scale = _BlockDecayAttention.apply(options, *arguments)
    else:
        output, _, before = _forward(*_read(options, arguments))
        kv, z, log_scale = before[-1]
    if not normalised:
        return output, {"kv": kv}
    return output, {"kv": kv, "z": z, "log_scale": kv.new_zeros(kv.shape[:2]) if log_scale is None else log_scale}


def _read(options: Any, arguments: Any) -> tuple[_Call, _Start]:
    """A call, and the state before it."""
    functions, counts, normalised = options
    q, k, tokens, log_weight, v, real, query_mask, kv, z, log_scale, *parameters = arguments
    inputs = [q, k, tokens] if log_weight is None else [q, k, tokens, log_weight]
    weighted = normalised and kv is not None
    call = _Call(functions, counts, normalised, inputs, v, real, query_mask, weighted, tuple(parameters))
    return call, (kv, z, log_scale)


class _BlockDecayAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, *arguments: torch.Tensor | None) -> Any:
        output, denominator, before = _forward(*_read(options, arguments))
        ctx.options, ctx.count = options, len(arguments)
        ctx.save_for_backward(*arguments, output, denominator, *(x for carry in before for x in carry))
        kv, z, log_scale = before[-1]
        if log_scale is not None:
            ctx.mark_non_differentiable(log_scale)
        ctx.set_materialize_grads(False)
        # Copies: the sums themselves are saved.
        return output, kv.clone(), None if z is None else z.clone(), log_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        tensors = ctx.saved_tensors  # once: under activation checkpointing every reading recomputes
        arguments, (output, denominator, *saved) = tensors[: ctx.count], tensors[ctx.count :]
        before = [tuple(saved[i : i + 3]) for i in range(0, len(saved), 3)]
        found = _backward(*_read(ctx.options, arguments), output, denominator, before, gradients)
        return None, *(x if wanted else None for x, wanted in zip(found, ctx.needs_input_grad[1:], strict=True))


def _forward(call: _Call, start: _Start) -> tuple[torch.Tensor, torch.Tensor | None, list[_Sums]]:
    """Output, denominators, and the sums before each block and after the last one."""
    batch, heads, length, dim = call.v.shape
    with torch.no_grad(), full_precision(call.v):
        output = call.v.new_empty(batch, length, heads, dim).transpose(1, 2)
        denominator = None
        if call.normalised:
            denominator = call.v.new_empty(batch, heads, length, dtype=accumulation_dtype(call.v.dtype))
        before: list[_Sums] = []
        for now in call.blocks():
            q, k, log_weight, decay = call.mapped([x[:, :, now] for x in call.inputs], now, call.parameters)
            if not before:
                before.append(_first_sums(call, k, start, log_weight is not None))
            weight, decay, peak = call.relative(log_weight, decay, now, before[-1][2])
            numerator, den, kv, z = chunks.causal(q, k, call.values(now), decay, weight, *before[-1][:2])
            before.append((kv, z, peak))
            if denominator is None or den is None:
                output[:, :, now] = numerator
            else:
                denominator[:, :, now] = den
                divide_into(output[:, :, now], numerator, den)
    return output, denominator, before


def _first_sums(call: _Call, k: torch.Tensor, start: _Start, weighted: bool) -> _Sums:
    """The sums before the call."""
    kv, z, log_scale = start
    if kv is None:
        kv = k.new_zeros(*k.shape[:2], k.shape[-1], call.v.shape[-1])
        z = torch.zeros_like(kv[..., 0]) if call.normalised else None
        return kv, z, kv.new_full(kv.shape[:2], LOG_ZERO) if weighted else None
    if z is None:
        return kv, None, None
    valid = _valid(log_scale)
    return kv * valid[..., None], z * valid, log_scale


def _valid(log_scale: Any) -> torch.Tensor:
    """1 where a state has seen a key, else 0: `[B, H, 1]`."""
    return (log_scale > LOG_ZERO / 2).to(log_scale.dtype)[..., None]


def _backward(
    call: _Call, start: _Start, output: torch.Tensor, denominator: torch.Tensor | None, before: Any, given: Any
) -> list[Any]:
    """Gradients of the arguments of `_BlockDecayAttention.forward`, in their order."""
    d_output, d_kv, d_z, _ = given
    gradients = MapGradients(call.parameters)
    found, d_v = [torch.empty_like(x) for x in call.inputs], torch.empty_like(call.v)
    leaves = tuple(leaf(x, x.requires_grad) for x in call.parameters)
    with torch.no_grad(), full_precision(call.v):
        d_kv = torch.zeros_like(before[-1][0]) if d_kv is None else d_kv
        d_z = torch.zeros_like(before[-1][1]) if d_z is None and denominator is not None else d_z
        blocks = call.blocks()
        for i in reversed(range(len(blocks))):
            now, (kv, z, peak) = blocks[i], before[i]
            with torch.enable_grad():
                inputs = [leaf(x[:, :, now], x.requires_grad) for x in call.inputs]
                mapped = call.mapped(inputs, now, leaves)
            q, k, decay = mapped[0].detach(), mapped[1].detach(), mapped[3].detach()
            log_weight = None if mapped[2] is None else mapped[2].detach()
            weight, decay, _ = call.relative(log_weight, decay, now, peak)
            if denominator is not None:
                d_num, d_den = quotient_backward(d_output, output, denominator[:, :, now], None, now)
            else:
                d_num = torch.zeros_like(output[:, :, now]) if d_output is None else d_output[:, :, now]
                d_num, d_den = d_num.to(kv.dtype), None
            end = (d_kv * before[i + 1][0]).sum(-1)
            if d_z is not None:
                end.addcmul_(d_z, before[i + 1][1])
            d_q, d_k, d_values, d_kv, d_z = chunks.causal_backward(
                q, k, call.values(now), decay, weight, kv, z, d_num, d_den, d_kv, d_z
            )
            d_decay = None
            if mapped[3].requires_grad:
                d_decay = chunks.decay_gradient(q, k, d_q, d_k, end, scalar=decay.shape[-1] == 1)
            d_weight = None if log_weight is None else (d_k * k).sum(-1)
            changes = gradients.through(mapped, (d_q, d_k, d_weight, d_decay), inputs, leaves)
            d_v[:, :, now] = d_values
            for whole, change in zip(found, changes, strict=True):
                whole[:, :, now] = change
    d_start = [None, None, None]
    if start[0] is not None:
        d_start[:2] = d_kv, None
        if start[1] is not None:
            valid = _valid(start[2])
            d_start[:2] = d_kv * valid[..., None], d_z * valid
    log_weight = found[3] if len(found) > 3 else None
    return [*found[:3], log_weight, d_v, None, None, *d_start, *gradients.parameters]
