"""Linear attention that autograd records: for traced graphs and for maps that train unnamed tensors.

A carry holds the sums phi(k) [v, 1]^T over earlier keys, relative to exp(log scale). `ops.linear.blocks` has the same
sums with a backward pass of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.masking import causal_mask, safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, TINY, full_precision
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.linear import layout
from hf_linear_attn.ops.linear.layout import Call, State, relative_to_peaks

__all__ = ["LEAST", "attend", "chunk_with_decay", "quotient"]

# Log-decay below which nothing is left of the sums even in float64. A bound keeps the running sums inside a chunk
# small, and so their differences accurate.
LEAST = -120.0

# Sums [B, H, F, D + 1] with z as last column, [B, H, F, D] without a normalizer; their log scale [B, H], None for 0.
_Carry = tuple[torch.Tensor, torch.Tensor | None]
# Of a block of keys: features; values with a column of ones if normalized, 0 at padded keys; log weights [B, H, T],
# LOG_ZERO at padded keys, or None; log-decays [B, H, T, F or 1] or None.
_Keys = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor | None, State | None]:
    """Attend, checked arguments given.

    Returns:
        output `[B, H, Tq, D]`; log denominator `[B, H, Tq]`, None with decay or without a normalizer; the state after
        these keys, None if none came.
    """
    options, q_len, k_len = call.options, call.q.shape[2], call.k.shape[2]
    with full_precision(call.v):
        carry = None if call.kv is None else _start(call)
        if is_exported() and not options.is_causal:  # in one piece: no block depends on the length
            whole = slice(0, k_len)
            carry = _accumulate(None, *_keys(call, call.key_inputs(), call.v, whole))
            queries, log_scale = call.queries(call.q, slice(0, q_len), call.parameters)
            return *_finish(call, queries @ carry[0], _of_rows(carry), log_scale), None
        # Splits, not slices: their gradients are joined, not added up.
        past, blocks = call.key_blocks(), call.query_blocks()
        keys = [*past, *map(call.own_keys, blocks)] if options.is_causal else past
        parts = zip(*(x.split([_length(s) for s in keys], 2) for x in (call.v, *call.key_inputs())), strict=True)
        mapped = (_keys(call, list(inputs), v, now) for (v, *inputs), now in zip(parts, keys, strict=True))
        for _ in past:
            carry = _accumulate(carry, *next(mapped))
        outputs, normalizers = [], []
        for rows, q in zip(blocks, call.q.split([_length(s) for s in blocks], 2), strict=True):
            queries, log_scale = call.queries(q, rows, call.parameters)
            if options.is_causal and (_length(rows) > 1 or carry is None or not options.own):
                sums, peak, carry = _causal(queries, *next(mapped), carry, options.own)
            else:
                carry = _accumulate(carry, *next(mapped)) if options.is_causal else carry
                assert carry is not None
                sums, peak = queries @ carry[0], _of_rows(carry)
            output, normalizer = _finish(call, sums, peak, log_scale)
            outputs.append(output)
            normalizers.append(normalizer)
    output, normalizer = outputs[0], normalizers[0]
    if len(outputs) > 1:
        # [B, T, H, D] in memory: what the output projection reads next
        output = torch.cat([o.transpose(1, 2) for o in outputs], 1).transpose(1, 2)
        normalizer = None if normalizer is None else torch.cat([x for x in normalizers if x is not None], 2)
    return output, normalizer, None if call.kv is None or carry is None else _end(call, carry)


def _length(part: slice) -> int:
    return part.stop - part.start


def _of_rows(carry: _Carry) -> torch.Tensor | None:
    """The log scale of sums, for all rows that take them: `[B, H, 1]`."""
    return None if carry[1] is None else carry[1][..., None]


def _start(call: Call) -> _Carry:
    """The sums before the call."""
    if call.z is None:
        return call.kv, None
    return torch.cat([call.kv, call.z[..., None]], -1), call.log_scale


def _end(call: Call, carry: _Carry) -> State:
    sums, peak = carry
    if not call.options.normalized:
        return {"kv": sums}
    peak = sums.new_zeros(sums.shape[:2]) if peak is None else peak
    return {"kv": sums[..., :-1], "z": sums[..., -1], "log_scale": peak}


def _keys(call: Call, inputs: list[torch.Tensor], v: torch.Tensor, now: slice) -> _Keys:
    features, log_weight, decay = call.keys(inputs, now, call.parameters)
    mask = None if call.token_mask is None else call.token_mask[:, now]
    values = v.to(call.dtype)
    if call.options.normalized:
        values = F.pad(values, (0, 1), value=1.0)
    if log_weight is not None and mask is not None:
        log_weight = log_weight.masked_fill(~mask[:, None], LOG_ZERO)
    return features, safe_masked_fill(values, mask), log_weight, decay


def _finish(
    call: Call, sums: torch.Tensor, peak: torch.Tensor | None, log_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not call.options.divided:
        return sums, peak
    if not call.options.normalized:
        return sums.to(call.v.dtype), None
    return quotient(call, sums[..., :-1], sums[..., -1:], peak, log_scale)


def quotient(
    call: Call,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    peak: torch.Tensor | None,
    log_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Numerators over denominators, the latter kept away from 0 with their signs (Fourier features have both).

    Args:
        call: the call.
        numerator: `[B, H, T, D]`.
        denominator: `[B, H, T, 1]`.
        peak: log scale of both, `[B, H, T or 1]`; None for 0.
        log_scale: of the queries' features, `[B, H, T]`; None for 0.

    Returns:
        output `[B, H, T, D]`; log denominator `[B, H, T]`, None with decay.
    """
    tiny = torch.where(denominator < 0, -TINY, TINY)
    output = (numerator / torch.where(denominator.abs() < TINY, tiny, denominator)).to(call.v.dtype)
    if call.options.decay is not None:
        return output, None
    normalizer = denominator[..., 0].clamp(min=TINY).log()
    for shift in (peak, log_scale):
        normalizer = normalizer if shift is None else normalizer + shift
    return output, normalizer


def _accumulate(
    carry: _Carry | None,
    k: torch.Tensor,
    values: torch.Tensor,
    log_weight: torch.Tensor | None,
    decay: torch.Tensor | None,
) -> _Carry:
    """Add keys to the sums, kept relative to the largest weight so far (1 for unweighted keys)."""
    left = None if decay is None else decay.sum(2)  # [B, H, F or 1], of the sums before
    exponent = None if log_weight is None else log_weight[..., None]
    if decay is not None and k.shape[2] > 1:
        exponent = _after(decay) if exponent is None else exponent + _after(decay)
    peak = None
    if log_weight is not None:
        assert exponent is not None
        peak = exponent.detach().amax((2, 3))
        before = None if carry is None else carry[1]
        if before is None:
            peak = peak.clamp(min=LOG_ZERO)  # finite, also where all keys have weight 0
        else:
            latest = before if left is None else before + left.detach().amax(-1)
            peak = torch.maximum(peak, latest)
            shift = (before - peak)[..., None]
            left = shift if left is None else left + shift
        exponent = exponent - peak[..., None, None]
    if exponent is not None:
        weight = exponent.exp()
        k, values = (k, values * weight) if weight.shape[-1] == 1 else (k * weight, values)
    # v^T k: its long dimension is F, which suits matrix products better than D + 1
    sums = (values.mT @ k).mT
    if carry is not None:
        sums = sums + (carry[0] if left is None else carry[0] * left.exp()[..., None])
    return sums, peak


def _causal(
    q: torch.Tensor,
    k: torch.Tensor,
    values: torch.Tensor,
    log_weight: torch.Tensor | None,
    decay: torch.Tensor | None,
    carry: _Carry | None,
    own: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, _Carry]:
    """Sums `[B, H, T, D + 1]` of a causal block, their log scales `[B, H, T or 1]` or None for 0, the carry after."""
    if decay is None:
        return _chunks(q, k, values, log_weight, carry)
    before, start = (None, None) if carry is None else carry
    if before is None:
        before = values.new_zeros(*k.shape[:2], k.shape[-1], values.shape[-1])
    peaks = None
    if log_weight is not None:
        if start is not None:
            before = before.masked_fill((start <= LOG_ZERO / 2)[..., None, None], 0)
        weight, shift, peaks = relative_to_peaks(log_weight, decay, start)
        values, decay = values * weight[..., None], decay + shift[..., None]
    sums, after = chunk_with_decay(q, k, values, decay.clamp(min=LEAST), before, layout.CHUNK, own)
    return sums, peaks, (after, None if peaks is None else peaks[..., -1].clone())


def _chunks(
    q: torch.Tensor, k: torch.Tensor, v1: torch.Tensor, log_weight: torch.Tensor | None, carry: _Carry | None
) -> tuple[torch.Tensor, torch.Tensor | None, _Carry]:
    """`_causal` without decay."""
    batch, heads, length, num_features = k.shape
    size = min(layout.CHUNK, length)
    chunks = -(-length // size)
    missing = chunks * size - length
    if missing:
        q, k, v1 = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v1))
        log_weight = None if log_weight is None else F.pad(log_weight, (0, missing), value=LOG_ZERO)
    q, k, v1 = (x.reshape(batch, heads, chunks, size, -1) for x in (q, k, v1))  # [B, H, N, C, *]
    scores = q @ k.mT  # [B, H, N, C, C]
    if log_weight is None:
        sums = scores.tril() @ v1
        states = (v1.mT @ k).mT  # [B, H, N, F, D+1]
        before = F.pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))  # [B, H, N+1, F, D+1]
        if carry is not None:
            before = before + carry[0][:, :, None]
        sums = sums + q @ before[:, :, :-1]
        return sums.reshape(batch, heads, chunks * size, -1)[:, :, :length], None, (before[:, :, -1], None)

    # Running maxima: of each row, and of everything before each chunk.
    start = None if carry is None else carry[1]
    start = log_weight.new_full((batch, heads), LOG_ZERO) if start is None else start
    row_peak = torch.maximum(log_weight.detach().cummax(-1).values, start[..., None])
    row_peak = row_peak.reshape(batch, heads, chunks, size)
    log_weight = log_weight.reshape(batch, heads, chunks, size)
    chunk_peak = row_peak[..., -1]  # [B, H, N]
    peak_before = torch.cat([start[..., None], chunk_peak[..., :-1]], -1)

    future = causal_mask(size, size, q.device).logical_not()
    weight = log_weight[..., None, :] - row_peak[..., :, None]  # at most 0 where visible
    sums = (scores * weight.masked_fill(future, LOG_ZERO).exp()) @ v1
    states = ((v1 * (log_weight - chunk_peak[..., None]).exp()[..., None]).mT @ k).mT
    # Sums before chunk c: earlier chunks rescaled from their own running maximum to that of chunk c - 1.
    earlier = torch.ones(chunks, chunks, dtype=torch.bool, device=q.device).tril(-1)
    mixing = (chunk_peak[..., None, :] - peak_before[..., :, None]).masked_fill(~earlier, LOG_ZERO).exp()
    before = (mixing @ states.flatten(3)).unflatten(3, (num_features, -1))
    if carry is not None:
        before = before + carry[0][:, :, None] * (start[..., None] - peak_before).exp()[..., None, None]
    sums = sums + (q @ before) * (peak_before[..., None] - row_peak).exp()[..., None]
    left = (peak_before[..., -1] - chunk_peak[..., -1]).exp()[..., None, None]
    last = before[:, :, -1] * left + states[:, :, -1]
    sums = sums.reshape(batch, heads, chunks * size, -1)[:, :, :length]
    return sums, row_peak.flatten(2)[..., :length], (last, chunk_peak[..., -1])


def chunk_with_decay(
    q: torch.Tensor,
    k: torch.Tensor,
    v1: torch.Tensor,
    decay: torch.Tensor,
    carry: torch.Tensor,
    chunk_size: int,
    own: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal sums `[B, H, T, D + 1]` of a block after the keys in `carry`, and the carry after the block.

    Args:
        v1: values, with a column of ones where sums have one, whose sum is the denominator.
        carry: sums over all earlier keys, `[B, H, F, D + 1]`.
        chunk_size: a power of two.
        own: whether a row counts its own key.
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
        found = found + (q @ k.mT * between.exp().tril(0 if own else -1)) @ v1
    else:
        found = found + _inside_chunks(q, k, v1, decay, own)
    return found.flatten(2, 3)[:, :, :length], carry


def _after(decay: torch.Tensor) -> torch.Tensor:
    """Log-decay from each token to the last one: the sum over later tokens, in the dimension before the last."""
    return F.pad(decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _inside_chunks(q: torch.Tensor, k: torch.Tensor, v1: torch.Tensor, decay: torch.Tensor, own: bool) -> torch.Tensor:
    """Causal sums inside chunks of C tokens (a power of two) with a decay per feature: [..., C, D+1].

    The decay between two tokens is no single number, so it is split between query and key at a token between
    them: the middle of the smallest block (of 2, 4, .. C tokens) that holds both.
    """
    found = (q * k).sum(-1, keepdim=True) * v1 if own else torch.zeros_like(v1)  # each token's own key
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
