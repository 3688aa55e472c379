"""Softmax over a window and linear attention over every other key, in one normalizer (LoLCATs, arXiv:2410.10254).

    o_i = (sum_{j in W(i)} g e^{l_ij} v_j + sum_{j not in W(i)} phi(q_i) . phi(k_j) v_j)
        / (sum_{j in W(i)} g e^{l_ij}     + sum_{j not in W(i)} phi(q_i) . phi(k_j))

l_ij are the softmax logits, W(i) the keys i - left .. i + right; causal attention has no keys after i. Each part
returns its output and the log of its denominator, by which they are merged: no weight is ever formed outside a
logarithm. A tail before the window is causal linear attention over keys that come `left + 1` tokens late; one
after the window is the same in reverse. Cost n (w + F) D. `ops.window.taylor` and `taylor_causal` do without the parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.backend import use_triton
from hf_linear_attn.ops.base.masking import causal_mask
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.features.gradients import trains_unnamed
from hf_linear_attn.ops.features.maps import FeatureMap, Features, ParametricMap, TaylorMap, mean_logit
from hf_linear_attn.ops.linear.attention import State, feature_map_attention_with_normalizer
from hf_linear_attn.ops.window.tail_blocks import window_block_softmax
from hf_linear_attn.ops.window.tail_step import decode_step
from hf_linear_attn.ops.window.taylor import taylor_window_attention
from hf_linear_attn.ops.window.taylor_causal import causal_taylor_window_attention

__all__ = ["centered_features", "naive_window_tail_attention", "window_softmax", "window_tail_attention"]

_Part = tuple[torch.Tensor, torch.Tensor]  # output [B, H, Tq, D], log of its denominator [B, H, Tq]

_BLOCK = 64  # queries per block of the window
# Upper bound on the elements of the key blocks gathered at once (16 MiB in fp32).
_SEGMENT_ELEMENTS = 1 << 22


def window_tail_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    left: int,
    right: int,
    is_causal: bool,
    scaling: float,
    window_log_factor: torch.Tensor,
    relative: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    """Attend. Query row r sits at position Tk - Tq + r; padded keys come before all real ones.

    Args:
        q: `[B, H, Tq, D]`, Tq <= Tk.
        k: `[B, H, Tk, D]`.
        v: `[B, H, Tk, D]`.
        q_map, k_map: features with positive products and their log scales, as for `feature_map_attention`; here
            the query's scale counts.
        left: keys of the window before the query's own.
        right: keys of the window after it; 0 when causal.
        is_causal: keys after the window are not seen at all.
        scaling: factor of the logits.
        window_log_factor: log g, `[H]`.
        relative: bool `[H]`: heads whose tail is relative to the largest term of the query's window, as LoLCATs
            defines it; the features of the others, or of all heads without it, estimate e^{l_ij} itself.
        token_mask: bool `[B or 1, Tk]`, or None when all keys are real.
        state: linear attention's state over keys older than `k`; then Tk = Tq + left + 1, causal.
        backend: what runs the linear attention, see `ops.base.backend`.

    Returns:
        `[B, H, Tq, D]`, and the state with the keys that the last query's window has left (None if none came).
    """
    q_len, k_len = q.shape[2], k.shape[2]
    dtype = accumulation_dtype(v.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q, k, wide = q.to(dtype), k.to(dtype), v.to(dtype)
        if is_exported() and state is None:
            window: dict[str, Any] = {"left": left, "right": right, "is_causal": is_causal, "scaling": scaling}
            window |= {"window_log_factor": window_log_factor, "relative": relative, "token_mask": token_mask}
            return naive_window_tail_attention(q, k, wide, q_map, k_map, **window), None
        if isinstance(q_map, TaylorMap) and isinstance(k_map, TaylorMap):
            if relative is None and not torch.compiler.is_compiling() and not use_triton(backend, v):
                own: dict[str, Any] = {"left": left, "scaling": scaling, "window_log_factor": window_log_factor}
                own["token_mask"] = token_mask
                if not is_causal and q_len == k_len:
                    coordinates = q_map.coordinates(q), k_map.coordinates(k)
                    return taylor_window_attention(q, k, wide, *coordinates, right=right, **own), None
                maps, has_tail = (q_map.coordinates, k_map.coordinates), state is not None or k_len - left - 1 > 0
                # A decode step has no use for blocks, and a map's unnamed tensors train by autograd alone.
                if is_causal and q_len > 1 and has_tail and not trains_unnamed((maps[0], q), (maps[1], k)):
                    output, after = causal_taylor_window_attention(q, k, wide, *maps, state=state, **own)
                    return output, None if state is None else after
            q_map, k_map = q_map.expanded(), k_map.expanded()
        if state is not None and q_len == 1:
            step: dict[str, Any] = {"scaling": scaling, "window_log_factor": window_log_factor, "relative": relative}
            step |= {"token_mask": token_mask, "state": state, "backend": backend}
            return decode_step(q, k, wide, q_map, k_map, **step)
        output, normalizer, peak = window_softmax(
            q, k, wide, left=left, right=right, scaling=scaling, key_allowed=token_mask
        )
        part = output, normalizer + window_log_factor.to(dtype)[:, None]
        shift = None if relative is None else torch.where(relative[:, None], peak, 0.0)
        if state is not None or k_len - left - 1 > 0:
            # Rows whose window reaches the first key have no tail.
            first = 0 if state is not None or token_mask is not None else max(q_len - (k_len - left - 1), 0)
            late = _late(k, wide, token_mask, q_len - first, left + 1)
            out, log, state = feature_map_attention_with_normalizer(
                q[:, :, first:],
                late[0],
                late[1],
                q_map,
                k_map,
                token_mask=late[2],
                is_causal=True,
                state=state,
                backend=backend,
            )
            part = _merge(part, out, log, shift, slice(first, q_len))
        if not is_causal and q_len - right - 1 > 0:
            real = None if token_mask is None else token_mask[:, k_len - q_len :].flip(1)
            count = q_len if real is not None else q_len - right - 1
            late = _late(k[:, :, k_len - q_len :].flip(2), wide[:, :, k_len - q_len :].flip(2), real, count, right + 1)
            out, log, _ = feature_map_attention_with_normalizer(
                q[:, :, :count].flip(2),
                late[0],
                late[1],
                q_map,
                k_map,
                token_mask=late[2],
                is_causal=True,
                backend=backend,
            )
            part = _merge(part, out.flip(2), log.flip(2), shift, slice(0, count))
        return part[0], state


def naive_window_tail_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    left: int,
    right: int,
    is_causal: bool,
    scaling: float,
    window_log_factor: torch.Tensor,
    relative: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense O(n^2) evaluation of `window_tail_attention`, for exported programs and tests; same arguments."""
    q_len, k_len = q.shape[2], k.shape[2]
    logits = q @ k.mT * scaling
    distance = torch.arange(k_len, device=q.device) - torch.arange(k_len - q_len, k_len, device=q.device)[:, None]
    inside = (distance >= -left) & (distance <= right)
    seen = causal_mask(q_len, k_len, q.device) if is_causal else torch.ones_like(inside)
    if token_mask is not None:
        inside, seen = inside & token_mask[:, None, None], seen & token_mask[:, None, None]
    peak = logits.masked_fill(~inside, LOG_ZERO).amax(-1, keepdim=True)
    (q_features, q_scale), (k_features, k_scale) = q_map(q), k_map(k)
    tail = (q_features @ k_features.mT).clamp(min=1e-30).log()
    tail = tail if relative is None else tail + torch.where(relative[:, None, None], peak, 0.0)
    tail = tail if q_scale is None else tail + q_scale[..., None]
    tail = tail if k_scale is None else tail + k_scale[..., None, :]
    scores = torch.where(inside, logits + window_log_factor[:, None, None], tail).masked_fill(~seen, LOG_ZERO)
    return scores.softmax(-1) @ v


def window_softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    left: int,
    right: int,
    scaling: float,
    key_allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention of a sliding window that also gives its denominator.

    Arguments as `window_tail_attention`.

    Returns:
        output `[B, H, Tq, D]`, log of the sum of e^l over the window, and the largest l in it, both `[B, H, Tq]`
        and about `LOG_ZERO` in rows that see no key.
    """
    (B, H, q_len, D), k_len = q.shape, k.shape[2]
    left, right = min(left, k_len - 1), min(right, q_len - 1)
    if not torch.compiler.is_compiling():
        return window_block_softmax(q, k, v, left=left, right=right, scaling=scaling, key_allowed=key_allowed)
    block = min(_BLOCK, q_len)
    num_blocks, width = -(-q_len // block), block + left + right
    first = k_len - q_len - left  # position of the first key of the first block
    start, front, back = max(first, 0), max(-first, 0), num_blocks * block - q_len + right
    allowed = torch.ones(1, k_len, dtype=torch.bool, device=q.device) if key_allowed is None else key_allowed
    allowed = F.pad(allowed[:, start:], (front, back)).unfold(1, width, block)[:, None, :, None]  # [B, 1, N, 1, W]
    q = F.pad(q, (0, 0, 0, num_blocks * block - q_len)).unflatten(2, (num_blocks, block))
    k, v = (F.pad(x[:, :, start:], (0, 0, front, back)).unfold(2, width, block) for x in (k, v))  # [B, H, N, D, W]
    step = torch.arange(width, device=q.device) - torch.arange(block, device=q.device)[:, None]
    band = (step >= 0) & (step <= left + right)

    segment = max(1, _SEGMENT_ELEMENTS // (B * H * width * D))
    parts = []
    for begin in range(0, num_blocks, segment):
        part = slice(begin, min(begin + segment, num_blocks))
        logits = (q[:, :, part] @ k[:, :, part] * scaling).masked_fill(~(band & allowed[:, :, part]), LOG_ZERO)
        normalizer = logits.logsumexp(-1)
        output = (logits - normalizer[..., None]).exp() @ v[:, :, part].mT
        parts.append((output, normalizer, logits.amax(-1)))
    output, normalizer, peak = (torch.cat(same, 2).flatten(2, 3)[:, :, :q_len] for same in zip(*parts, strict=True))
    return output, normalizer, peak


def centered_features(
    feature_map: FeatureMap, center: torch.Tensor, other: torch.Tensor, scaling: float, *, raw: bool = False
) -> FeatureMap:
    """Features of x - center whose log scale restores what centering takes out of the logits.

    q . k = (q - a) . (k - c) + a . k + (q - a) . c: the keys carry scaling * a . k, the queries the last term.

    Args:
        feature_map: of the centered tokens `[B, H, T, D]`.
        center: what is taken off, a or c, `[H, D]`.
        other: the center of the other side, `[H, D]`.
        scaling: factor of the logits.
        raw: whether x is multiplied by `other` before it is centered: once in the pair, here for the keys.
    """

    given = feature_map.parameters if isinstance(feature_map, ParametricMap) else ()
    function = feature_map.function if isinstance(feature_map, ParametricMap) else feature_map

    def features(x: torch.Tensor, center: torch.Tensor, other: torch.Tensor, *parameters: torch.Tensor) -> Features:
        x = x.to(accumulation_dtype(x.dtype))
        centered = x - center.to(x.dtype)[:, None]
        shared = mean_logit(x if raw else centered, other, scaling)  # [B, H, T]
        phi, log_scale = function(centered, *parameters)
        return phi, shared if log_scale is None else shared + log_scale

    return ParametricMap(features, (center, other, *given))


def _late(
    k: torch.Tensor, v: torch.Tensor, real: torch.Tensor | None, q_len: int, delay: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, values and their mask without the last `delay` tokens: right-aligned, each comes so much later.

    Where that leaves fewer keys than queries, padding goes in front.
    """
    k, v = k[:, :, : max(k.shape[2] - delay, 0)], v[:, :, : max(v.shape[2] - delay, 0)]
    missing = q_len - k.shape[2]
    if real is not None:
        real = real[:, : k.shape[2]].expand(k.shape[0], -1)
    if missing <= 0:
        return k, v, real
    if real is None:
        real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    return F.pad(k, (0, 0, missing, 0)), F.pad(v, (0, 0, missing, 0)), F.pad(real, (missing, 0))


def _merge(part: _Part, output: torch.Tensor, log: torch.Tensor, shift: torch.Tensor | None, rows: slice) -> _Part:
    """The attention over the keys of a part and those of another `output` of these rows, its log raised by `shift`."""
    mine, my_log = part[0][:, :, rows], part[1][:, :, rows]
    if shift is not None:
        log = log + shift[:, :, rows]
    both = torch.lerp(output, mine, (my_log - log).sigmoid()[..., None]), torch.logaddexp(my_log, log)
    first, second = (
        torch.cat([x[:, :, : rows.start], y, x[:, :, rows.stop :]], 2) for x, y in zip(part, both, strict=True)
    )
    return first, second
