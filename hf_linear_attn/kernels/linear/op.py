"""Linear attention by Triton kernels, with gradients, as custom operators that torch.compile traces.

    S_t = exp(g_t) S_{t-1} + w_t phi(k_t) v_t^T,   z_t = exp(g_t) z_{t-1} + w_t phi(k_t),
    o_t = phi(q_t) S_t / (phi(q_t) . z_t),

with key scales w, log-decays g and a feature map phi that the kernels apply as they read. Sums and states are
float32; products have the precision of their inputs, and float32 inputs that of three tf32 products. Every result is
deterministic: no program adds to what another wrote.

Sources: "Transformers are RNNs", arXiv:2006.16236; decay and chunks as in retention, arXiv:2307.08621.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_linear_attn.kernels.launch import NAMESPACE, check_launches, readable
from hf_linear_attn.kernels.linear import launch as run
from hf_linear_attn.kernels.linear.tiles import FEATURE_MAPS

__all__ = ["linear_attention"]

Optional = torch.Tensor | None
State = tuple[torch.Tensor, torch.Tensor]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = {"features": 256, "head_dim": 128}


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    key_scale: Optional = None,
    query_keep: Optional = None,
    log_decay: Optional = None,
    initial_state: State | None = None,
    is_causal: bool,
    normalized: bool = True,
    feature_map: str = "identity",
    q_multiplier: float = 1.0,
    k_multiplier: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Linear attention over a whole sequence, differentiable in every tensor but `query_keep`.

    Args:
        q: `[B, H, Tq, F]`, features or what the feature map takes; F at most 256. Any strides.
        k: `[B, H / group, Tk, F]`, of q's dtype, each for a group of heads side by side.
        v: `[B, H / group, Tk, D]`, D at most 128.
        key_scale: w, float32 `[B or 1, H or 1, Tk]`, may be expanded. A key of scale 0 is padding: it and its value
            count for nothing whatever they hold, nan included, and get no gradient.
        query_keep: bool `[B or 1, H or 1, Tq]`, False for a query whose output is 0 whatever it holds.
        log_decay: g, float32 `[B, H, Tk]`, at most 0, causal only: what happens to the sums over earlier keys when
            token t comes. Below -110 everything is forgotten.
        initial_state: (kv `[B, H, F, D]`, z `[B, H, F]`), float32 sums over earlier keys, causal with Tq == Tk only.
        is_causal: query r sees keys up to position Tk - Tq + r.
        normalized: False gives phi(q) S as it is.
        feature_map: `"identity"`, `"elu"` (elu(x) + 1) or `"relu"`, of x times the multipliers.
        q_multiplier, k_multiplier: factors inside phi; 1 for `"identity"`.

    Returns:
        output `[B, H, Tq, D]` in v's dtype, `[B, T, H, D]` in memory, 0 in rows that see no key; denominator
        `[B, H, Tq]` float32, 0 in such rows (computed also if not normalized); and the sums kv and z after all keys.

    Raises:
        ValueError: for shapes, dtypes, devices or options that do not fit as said above.
    """
    _check(q, k, v, key_scale, log_decay, initial_state, feature_map, q_multiplier, k_multiplier)
    if query_keep is not None:
        _check_rows("query_keep", query_keep, tuple(q.shape[:3]), (torch.bool,))
    if is_causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"Causal attention needs at least as many keys as queries, got {q.shape[2]} > {k.shape[2]}.")
    if log_decay is not None and not is_causal:
        raise ValueError("log_decay has a direction: is_causal must be True, got False.")
    if initial_state is not None and (not is_causal or q.shape[2] != k.shape[2]):
        raise ValueError(
            "initial_state needs causal attention over the new tokens only, got "
            f"is_causal={is_causal}, {q.shape[2]} queries and {k.shape[2]} keys."
        )
    kv, z = (None, None) if initial_state is None else initial_state
    return _forward(
        *(q, k, v, key_scale, query_keep, log_decay, kv, z, is_causal, normalized),
        *(FEATURE_MAPS[feature_map], float(q_multiplier), float(k_multiplier)),
    )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_scale: Optional,
    log_decay: Optional,
    state: State | None,
    feature_map: str,
    q_multiplier: float,
    k_multiplier: float,
) -> None:
    fits = q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[-1] == k.shape[-1]
    if not fits or k.shape[:3] != v.shape[:3] or 0 in (*q.shape, *k.shape, *v.shape) or q.shape[1] % k.shape[1]:
        raise ValueError(
            "Allowed: q [B, H, Tq, F], k [B, H / group, Tk, F], v [B, H / group, Tk, D], none of them empty; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if q.shape[-1] > _LARGEST["features"] or v.shape[-1] > _LARGEST["head_dim"]:
        raise ValueError(f"At most 256 features and 128 values a head, got {q.shape[-1]} and {v.shape[-1]}.")
    if q.dtype != k.dtype or q.dtype not in _DTYPES or v.dtype not in _DTYPES:
        raise ValueError(
            "Allowed: q and k of one dtype, and v, in float32, float16 or bfloat16; got "
            f"{q.dtype}, {k.dtype}, {v.dtype}."
        )
    others = [x for x in (k, v, key_scale, log_decay, *(state or ())) if x is not None]
    if any(x.device != q.device for x in others):
        raise ValueError(f"All tensors must be on {q.device}, got {', '.join(str(x.device) for x in others)}.")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map={feature_map!r}; allowed: {', '.join(map(repr, FEATURE_MAPS))}.")
    if feature_map == "identity" and not q_multiplier == k_multiplier == 1.0:
        raise ValueError(f"Multipliers need a feature map, got {q_multiplier} and {k_multiplier} with 'identity'.")
    keys = *q.shape[:2], k.shape[2]
    if key_scale is not None:
        _check_rows("key_scale", key_scale, keys, (torch.float32,))
    if log_decay is not None and (log_decay.shape != keys or log_decay.dtype != torch.float32):
        raise ValueError(f"log_decay must be float32 {keys}, got {log_decay.dtype} {tuple(log_decay.shape)}.")
    if state is not None:
        wanted = [(*q.shape[:2], q.shape[-1], v.shape[-1]), (*q.shape[:2], q.shape[-1])]
        if [tuple(x.shape) for x in state] != wanted or any(x.dtype != torch.float32 for x in state):
            raise ValueError(
                f"A state is (kv, z), float32 {wanted[0]} and {wanted[1]}; got "
                f"{', '.join(f'{x.dtype} {tuple(x.shape)}' for x in state)}."
            )


def _check_rows(name: str, x: torch.Tensor, wanted: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> None:
    if x.ndim != 3 or x.shape[2] != wanted[2] or any(a not in (1, b) for a, b in zip(x.shape, wanted, strict=True)):
        raise ValueError(f"{name} must be [{wanted[0]} or 1, {wanted[1]} or 1, {wanted[2]}], got {tuple(x.shape)}.")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}.")


def _or_zeros(x: Optional, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if x is None else x.contiguous()


def _inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_scale: Optional,
    query_keep: Optional,
    log_decay: Optional,
    kv: Optional,
    z: Optional,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Optional, Optional, Optional, tuple[Optional, Optional]]:
    """The tensors as the kernels read them."""
    check_launches(q.device)
    keep = None if query_keep is None else query_keep.expand(q.shape[:3]).to(torch.float32).contiguous()
    decay = None if log_decay is None else log_decay.contiguous()
    before = (None, None) if kv is None or z is None else (kv.contiguous(), z.contiguous())
    scale = None if key_scale is None else key_scale.expand(*q.shape[:2], k.shape[2])
    return readable(q), readable(k), readable(v), scale, keep, decay, before


@torch.library.custom_op(f"{NAMESPACE}::linear_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_scale: torch.Tensor | None,
    query_keep: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    kv: torch.Tensor | None,
    z: torch.Tensor | None,
    is_causal: bool,
    normalized: bool,
    feature_map: int,
    q_multiplier: float,
    k_multiplier: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = run.Options(is_causal, normalized, feature_map, q_multiplier, k_multiplier)
    return run.forward(*_inputs(q, k, v, key_scale, query_keep, log_decay, kv, z), options)


@_forward.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fake_results(q, v)


def _fake_results(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (batch, heads, length, features), dim = q.shape, v.shape[-1]
    out = v.new_empty(batch, length, heads, dim).transpose(1, 2)
    den = q.new_empty(batch, heads, length, dtype=torch.float32)
    kv = q.new_empty(batch, heads, features, dim, dtype=torch.float32)
    return out, den, kv, q.new_empty(batch, heads, features, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::linear_attention_backward", mutates_args=())
def _backward(
    d_out: torch.Tensor,
    d_den: torch.Tensor | None,
    d_kv: torch.Tensor | None,
    d_z: torch.Tensor | None,
    out: torch.Tensor,
    den: torch.Tensor,
    kv_after: torch.Tensor,
    z_after: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_scale: torch.Tensor | None,
    query_keep: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    kv: torch.Tensor | None,
    z: torch.Tensor | None,
    is_causal: bool,
    normalized: bool,
    feature_map: int,
    q_multiplier: float,
    k_multiplier: float,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, key_scale, log_decay, kv and z; an empty tensor for an input that is None."""
    options = run.Options(is_causal, normalized, feature_map, q_multiplier, k_multiplier)
    d_after: tuple[Optional, Optional] = (None, None)
    if d_kv is not None or d_z is not None:  # one of them alone may have a gradient
        d_after = _or_zeros(d_kv, kv_after), _or_zeros(d_z, z_after)
    d_q, d_k, d_v, d_scale, d_decay, d_first, d_first_z = run.backward(
        *_inputs(q, k, v, key_scale, query_keep, log_decay, kv, z),
        *(out, den, (kv_after, z_after), readable(d_out.to(v.dtype))),
        *(None if d_den is None else d_den.contiguous(), d_after, options),
    )
    nothing = q.new_empty(0, dtype=torch.float32)
    if key_scale is not None and d_scale is not None:
        d_scale = d_scale.sum_to_size(key_scale.shape)
    gradients = [d_q, d_k, d_v, d_scale, d_decay]
    gradients += [None, None] if kv is None else [d_first, d_first_z]
    # What has one batch or head may come out as a view of what the kernels wrote; results are tensors of their own.
    return [nothing.clone() if x is None else x for x in gradients]


@_backward.register_fake
def _(
    d_out: torch.Tensor,
    d_den: torch.Tensor | None,
    d_kv: torch.Tensor | None,
    d_z: torch.Tensor | None,
    out: torch.Tensor,
    den: torch.Tensor,
    kv_after: torch.Tensor,
    z_after: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_scale: torch.Tensor | None,
    query_keep: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    kv: torch.Tensor | None,
    z: torch.Tensor | None,
    *options: Any,
) -> list[torch.Tensor]:
    def like(x: torch.Tensor) -> torch.Tensor:
        batch, heads, length, dim = x.shape
        return x.new_empty(batch, length, heads, dim).transpose(1, 2)

    def whole(x: Optional) -> torch.Tensor:
        return q.new_empty(0 if x is None else x.shape, dtype=torch.float32)

    return [like(q), like(k), like(v), whole(key_scale), whole(log_decay), whole(kv), whole(z)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *gradients: Optional) -> tuple[Any, ...]:
    out, den, kv_after, z_after, *tensors = ctx.saved_tensors
    d_out, *others = gradients
    found = _backward(
        torch.zeros_like(out) if d_out is None else d_out, *others, out, den, kv_after, z_after, *tensors, *ctx.options
    )
    d_q, d_k, d_v, *found = found
    d_scale, d_decay, d_kv, d_z = (
        None if x is None else d for x, d in zip((tensors[3], *tensors[5:]), found, strict=True)
    )
    return (d_q, d_k, d_v, d_scale, None, d_decay, d_kv, d_z, *(None for _ in ctx.options))


_forward.register_autograd(_differentiate, setup_context=_setup)
