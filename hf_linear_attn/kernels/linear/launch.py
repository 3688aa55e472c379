"""The launches of the linear attention kernels: what a forward and a backward pass run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_linear_attn.kernels.launch import on_device
from hf_linear_attn.kernels.linear import bwd, fwd
from hf_linear_attn.kernels.linear import tiles as config
from hf_linear_attn.kernels.linear.tiles import Tiles

__all__ = ["Options", "backward", "forward"]

Optional = torch.Tensor | None


@dataclass(frozen=True)
class Options:
    """What a call computes, beside its tensors.

    Attributes:
        is_causal: queries at the last positions, each sees the keys up to its own.
        normalized: divide by the denominator.
        feature_map: code of phi, a value of `FEATURE_MAPS`.
        q_multiplier, k_multiplier: factors inside phi.
    """

    is_causal: bool
    normalized: bool = True
    feature_map: int = 0
    q_multiplier: float = 1.0
    k_multiplier: float = 1.0


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _empty_heads(x: torch.Tensor, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """`[B, H, T, dim]` that lies `[B, T, H, dim]` in memory, as the output projection reads it."""
    batch, _, length = x.shape[:3]
    return torch.empty(batch, length, heads, dim, dtype=dtype, device=x.device).transpose(1, 2)


def _float(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _launch(kernel: Any, programs: int, constants: dict[str, Any], tiles: Tiles | None, *args: Any) -> None:
    options = {} if tiles is None else {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    kernel[(programs,)](*args, **constants, **options)


def _segment_sums(
    b: torch.Tensor,
    c: torch.Tensor,
    factor: Optional,
    extra: Optional,
    decay: Optional,
    options: Options,
    heads: int,
    lengths: tuple[int, int],
    segments: tuple[int, int],
    *,
    reverse: bool,
    guard: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of each segment `[B, H, N, F, D]` and `[B, H, N, F]`, and its total log-decay in base 2 `[B, H, N]`."""
    batch, features = b.shape[0], b.shape[-1]
    dim, (count, size) = c.shape[-1], segments
    state, vector = _float(b, batch, heads, count, features, dim), _float(b, batch, heads, count, features)
    total = _float(b, batch, heads, count)
    precision = config.precision_of(b.dtype, c.dtype)
    tiles = config.sums_tiles_for(features, dim, precision, config.device_limits(b.device)[0])
    constants = config.sums_constants(
        features,
        dim,
        tiles,
        GROUP=heads // b.shape[1],
        REVERSE=reverse,
        CAUSAL=options.is_causal,
        MAP=options.feature_map,
        HAS_FACTOR=factor is not None,
        GUARD=guard,
        HAS_DECAY=decay is not None,
        **config.dot_constants(precision),
    )
    programs = batch * heads * count * -(-features // tiles.features) * -(-dim // tiles.values)
    multiplier = options.q_multiplier if reverse else options.k_multiplier
    _launch(
        fwd.linear_attention_sums_kernel,
        programs,
        constants,
        tiles,
        *(b, c, _or(factor, total), _or(extra, total), _or(decay, total), total, state, vector),
        *(*_strides(b), *_strides(c), *_strides(_or(factor, total)), multiplier, heads, *lengths, count, size),
    )
    return state, vector, total


def _or(x: Optional, other: torch.Tensor) -> torch.Tensor:
    """A tensor in place of one that the call does not have; the kernel never reads it."""
    return other if x is None else x


def _scan(
    state: torch.Tensor,
    vector: torch.Tensor,
    before: tuple[Optional, Optional],
    total_decay: Optional,
    *,
    reverse: bool,
    exclusive: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state before each segment (after, if reverse) in place, or the total `[B, H, F, D]` and `[B, H, F]`."""
    batch, heads, count, features, dim = state.shape
    total, total_vector = state, vector
    if not exclusive:
        total, total_vector = _float(state, batch, heads, features, dim), _float(state, batch, heads, features)
    constants = {
        "SIZE_STATE": features * dim,
        "SIZE_VECTOR": features,
        "BLOCK": config.SCAN_BLOCK,
        "REVERSE": reverse,
        "EXCLUSIVE": exclusive,
        "HAS_BEFORE": before[0] is not None,
        "HAS_DECAY": total_decay is not None,
    }
    programs = batch * heads * (-(-features * dim // config.SCAN_BLOCK) + -(-features // config.SCAN_BLOCK))
    first, first_vector = _or(before[0], state), _or(before[1], vector)
    args = (state, vector, first, first_vector, total, total_vector, _or(total_decay, vector), count)
    _launch(fwd.linear_attention_scan_kernel, programs, constants, None, *args)
    return total, total_vector


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: Optional,
    keep: Optional,
    decay: Optional,
    before: tuple[Optional, Optional],
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, denominator and final state; the tensors as `linear_attention` checked them."""
    (batch, heads, q_len, features), k_len, dim = q.shape, k.shape[2], v.shape[-1]
    shared, processors = config.device_limits(q.device)
    precision = config.precision_of(q.dtype, v.dtype)
    tiles = config.tiles_for(
        features,
        dim,
        precision,
        shared,
        is_causal=options.is_causal,
        backward=False,
        has_decay=decay is not None,
    )
    out, den = _empty_heads(q, heads, dim, v.dtype), _float(q, batch, heads, q_len)
    with on_device(q.device):
        state, vector, count, size = _states(q, k, v, scale, decay, before, options, tiles, processors)
        if options.is_causal:
            last, last_vector = _float(q, batch, heads, features, dim), _float(q, batch, heads, features)
        else:
            assert state is not None
            assert vector is not None
            last, last_vector = state, vector
            programs = batch * heads * -(-dim // tiles.values)
            count, size = config.segments_for(q_len, programs, tiles, processors, has_decay=False)
        constants = config.forward_constants(
            features,
            dim,
            tiles,
            GROUP=heads // k.shape[1],
            CAUSAL=options.is_causal,
            NORMALIZED=options.normalized,
            HAS_STATE=state is not None,
            MAP=options.feature_map,
            HAS_SCALE=scale is not None,
            HAS_KEEP=keep is not None,
            HAS_DECAY=decay is not None,
            **config.dot_constants(precision),
        )
        keys, values = (k, v) if options.is_causal else (q, q)  # read by the sums alone
        _launch(
            fwd.linear_attention_fwd_kernel,
            batch * heads * count * -(-dim // tiles.values),
            constants,
            tiles,
            *(q, keys, values, out, den, _or(scale, den), _or(keep, den), _or(decay, den)),
            *(
                _or(state, den),
                _or(vector, den),
                last,
                last_vector,
                *_strides(q),
                *_strides(keys),
                *_strides(values),
                *_strides(out),
            ),
            *(*_strides(_or(scale, den)), options.q_multiplier, options.k_multiplier, heads, q_len, k_len, count, size),
        )
    return out, den, last, last_vector


def _states(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: Optional,
    decay: Optional,
    before: tuple[Optional, Optional],
    options: Options,
    tiles: Tiles,
    processors: int,
) -> tuple[Optional, Optional, int, int]:
    """The state before each segment (of all keys if bidirectional), and the segments."""
    (batch, heads), k_len = q.shape[:2], k.shape[2]
    programs = batch * heads * -(-v.shape[-1] // tiles.values)
    if options.is_causal:
        count, size = config.forward_segments_for(k_len, programs, tiles, processors)
        if count == 1:
            return *before, count, size
    else:
        count, size = config.segments_for(k_len, programs, tiles, processors, has_decay=False)
    lengths = (q.shape[2], k_len)
    state, vector, total = _segment_sums(
        *(k, v, scale, None, decay, options, heads, lengths, (count, size)), reverse=False, guard=scale is not None
    )
    carried = total if decay is not None else None
    if not options.is_causal and count == 1:
        return state.squeeze(2), vector.squeeze(2), count, size
    return *_scan(state, vector, before, carried, reverse=False, exclusive=options.is_causal), count, size


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: Optional,
    keep: Optional,
    decay: Optional,
    before: tuple[Optional, Optional],
    out: torch.Tensor,
    den: torch.Tensor,
    after: tuple[torch.Tensor, torch.Tensor],
    d_out: torch.Tensor,
    d_den: Optional,
    d_after: tuple[Optional, Optional],
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Optional, Optional, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, scale `[B, H, Tk]`, log-decay, and of the state before."""
    (batch, heads, q_len, features), k_len, dim = q.shape, k.shape[2], v.shape[-1]
    shared, processors = config.device_limits(q.device)
    precision = config.precision_of(q.dtype, v.dtype)
    tiles = config.tiles_for(
        features,
        dim,
        precision,
        shared,
        is_causal=options.is_causal,
        backward=True,
        has_decay=decay is not None,
    )
    f_tiles, d_tiles = -(-features // tiles.features), -(-dim // tiles.values)
    causal = options.is_causal
    d_q, d_k = _empty_heads(q, heads, features, q.dtype), _empty_heads(k, heads, features, k.dtype)
    d_v = _empty_heads(v, heads, dim, v.dtype)
    inverse, below = torch.empty_like(den), torch.empty_like(den)
    with on_device(q.device):
        _launch(
            bwd.linear_attention_delta_kernel,
            batch * heads * -(-q_len // config.DELTA_ROWS),
            {
                "D": dim,
                "BT": config.DELTA_ROWS,
                "BD": config.block_of(dim),
                "NORMALIZED": options.normalized,
                "HAS_MORE": d_den is not None,
                "HAS_KEEP": keep is not None,
            },
            None,
            *(d_out, out, den, _or(d_den, den), _or(keep, den), inverse, below),
            *(*_strides(d_out), *_strides(out), heads, q_len),
        )
        lengths = (q_len, k_len)
        length = k_len if causal else max(q_len, k_len)
        programs = batch * heads * (2 * f_tiles + d_tiles)
        count, size = config.segments_for(length, programs, tiles, processors, has_decay=decay is not None)
        state, vector, d_state, d_vector = *before, *d_after
        carried = None
        if not causal:
            state, vector = after
        elif count > 1:
            state, vector, total = _segment_sums(
                *(k, v, scale, None, decay, options, heads, lengths, (count, size)),
                reverse=False,
                guard=scale is not None,
            )
            carried = total if decay is not None else None
            _scan(state, vector, before, carried, reverse=False, exclusive=True)
        if not causal or count > 1:
            d_state, d_vector, _ = _segment_sums(
                *(q, d_out, inverse, below, decay, options, heads, lengths, (count, size)),
                reverse=True,
                guard=keep is not None,
            )
            if count > 1 or d_after[0] is not None:
                d_state, d_vector = _scan(d_state, d_vector, d_after, carried, reverse=True, exclusive=causal)
        first, first_vector = _float(q, batch, heads, features, dim), _float(q, batch, heads, features)
        want_d_scale = scale is not None or decay is not None
        d_scale = _float(q, f_tiles, batch, heads, k_len) if want_d_scale else None
        constants = config.backward_constants(
            features,
            dim,
            tiles,
            GROUP=heads // k.shape[1],
            CAUSAL=causal,
            HAS_STATE=state is not None,
            HAS_D_STATE=d_state is not None,
            MAP=options.feature_map,
            HAS_SCALE=scale is not None,
            HAS_KEEP=keep is not None,
            HAS_DECAY=decay is not None,
            WANT_D_SCALE=want_d_scale,
            **config.dot_constants(precision),
        )
        _launch(
            bwd.linear_attention_bwd_kernel,
            batch * heads * count * (2 * f_tiles + d_tiles),
            constants,
            tiles,
            *(q, k, v, d_out, d_q, d_k, d_v, _or(d_scale, den), _or(scale, den), inverse, below, _or(decay, den)),
            *(_or(state, den), _or(vector, den), _or(d_state, den), _or(d_vector, den), first, first_vector),
            *(*_strides(q), *_strides(k), *_strides(v), *_strides(d_out)),
            *(*_strides(d_q), *_strides(d_k), *_strides(d_v), *_strides(_or(scale, den))),
            *(options.q_multiplier, options.k_multiplier, heads, q_len, k_len, count, size, batch * heads),
        )
    if d_scale is not None:
        d_scale = d_scale[0] if f_tiles == 1 else d_scale.sum(0)
    d_decay = None
    if decay is not None:
        assert d_scale is not None
        reached = _row_products(out, den, d_out, d_den, keep, options, k_len)
        reached -= d_scale if scale is None else d_scale * scale
        boundaries = _boundary_products((state, vector), (d_state, d_vector), after, d_after, count)
        d_decay = _decay_gradient(reached, boundaries, decay, size)
    if not causal:
        first, first_vector = first.zero_(), first_vector.zero_()
    d_k, d_v = _summed_over_groups(d_k, k.shape[1]), _summed_over_groups(d_v, v.shape[1])
    return d_q, d_k, d_v, d_scale if scale is not None else None, d_decay, first, first_vector


def _summed_over_groups(gradient: torch.Tensor, heads: int) -> torch.Tensor:
    """Gradient of what serves a group of heads, `[B, H / group, T, dim]`, from those of the heads; as they lie."""
    if gradient.shape[1] == heads:
        return gradient
    return gradient.transpose(1, 2).unflatten(2, (heads, -1)).sum(3).transpose(1, 2)


def _row_products(
    out: torch.Tensor,
    den: torch.Tensor,
    d_out: torch.Tensor,
    d_den: Optional,
    keep: Optional,
    options: Options,
    k_len: int,
) -> torch.Tensor:
    """What each query's sums contribute to the loss to first order, `[B, H, Tk]` (0 before the first query).

    A quotient does not change when numerator and denominator are scaled alike, so normalized rows contribute by
    the denominator's own gradient alone.
    """
    rows = torch.zeros_like(den)
    if not options.normalized:
        rows += (d_out.float() * out.float()).sum(-1)
    if d_den is not None:
        rows += d_den * den
    if keep is not None:
        rows = torch.where(keep != 0, rows, 0.0)
    return torch.nn.functional.pad(rows, (k_len - den.shape[-1], 0))


def _boundary_products(
    states: tuple[Optional, Optional],
    d_states: tuple[Optional, Optional],
    after: tuple[torch.Tensor, torch.Tensor],
    d_after: tuple[Optional, Optional],
    count: int,
) -> torch.Tensor:
    """<state, its gradient> at the end of each segment, `[B, H, N]`."""
    last = torch.zeros_like(after[1][..., 0])
    if d_after[0] is not None and d_after[1] is not None:
        last = (after[0] * d_after[0]).sum((-1, -2)) + (after[1] * d_after[1]).sum(-1)
    if count == 1:
        return last[..., None]
    (state, vector), (d_state, d_vector) = states, d_states
    assert state is not None
    assert vector is not None
    assert d_state is not None
    assert d_vector is not None
    inner = (state[:, :, 1:] * d_state[:, :, :-1]).sum((-1, -2)) + (vector[:, :, 1:] * d_vector[:, :, :-1]).sum(-1)
    return torch.cat([inner, last[..., None]], -1)


def _decay_gradient(reached: torch.Tensor, boundaries: torch.Tensor, decay: torch.Tensor, size: int) -> torch.Tensor:
    """Gradient of the log-decays: at token t, everything that crosses from before t to t or later.

    That is the sum over tokens from t to its segment's end of (row - column products), plus what crosses the end.
    """
    missing = boundaries.shape[-1] * size - reached.shape[-1]
    sums = torch.nn.functional.pad(reached, (0, missing)).unflatten(-1, (-1, size))
    sums = sums.flip(-1).cumsum(-1).flip(-1) + boundaries[..., None]
    return torch.where(decay > fwd.LEAST_LOG_DECAY.value, sums.flatten(-2)[..., : reached.shape[-1]], 0.0)
