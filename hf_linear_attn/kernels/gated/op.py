"""Causal linear attention with a decay per feature (gated linear attention, arXiv:2312.06635), in Triton.

S_t = diag(exp g_t) S_{t-1} + s_t k_t v_t^T, z likewise, o_t = q_t S_t / (q_t . z_t). A custom operator of PyTorch:
`torch.compile` traces it, autograd differentiates it by every tensor argument. No result depends on the order in
which programs run. Chunks are of 64 tokens (16 up to length 16), one program each, so that few heads fill a GPU too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from hf_linear_attn.kernels.gated.bwd import (
    gated_delta_kernel,
    gated_query_key_bwd_kernel,
    gated_value_bwd_kernel,
)
from hf_linear_attn.kernels.gated.device import RUNTIME
from hf_linear_attn.kernels.gated.fwd import (
    gated_fwd_kernel,
    gated_reach_kernel,
    gated_scan_kernel,
    gated_sums_kernel,
)
from hf_linear_attn.kernels.launch import NAMESPACE, Launch, check_launches, exact_products, on_device, readable

__all__ = ["MOST_FEATURES", "gated_linear_attention", "shipped_launches"]

MOST_FEATURES = 128  # features or head_dim of one program's tile
_SCAN_BLOCK = 256
_AMD = "gfx942"
# Features and values of a program beside a tile of scores [64, 64], and of the one that writes gradients of features:
# with wider tiles registers spill on one target or another.
_SCORES = {
    torch.bfloat16: {"BF": 32, "BD": 32},
    torch.float16: {"BF": 16, "BD": 16},
    torch.float32: {"BF": 16, "BD": 16},
}
_GRADIENTS = {
    torch.bfloat16: {"BF": 16, "BD": 32},
    torch.float16: {"BF": 16, "BD": 16},
    torch.float32: {"BF": 16, "BD": 16},
}
_KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    key_scale: torch.Tensor | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    normalized: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Linear attention that forgets at a rate per feature.

    Args:
        q: `[B, H, Tq, F]` features, F at most 128; row r stands at position Tk - Tq + r.
        k: `[B, H, Tk, F]` features.
        v: `[B, H, Tk, D]`, D at most 128; q, k and v have one dtype: float32, float16 or bfloat16.
        log_decay: `[B, H, Tk, F]`, at most 0, of any floating dtype: what happens to feature f of the sums before
            key t is added. 0 at padding. Below -110 nothing is left of them, and the gradient is 0.
        key_scale: float32 `[B or 1, H or 1, Tk]`, factor of k; a key of scale 0 counts for nothing, whatever it
            and its value hold.
        initial_state: sums over earlier keys, float32 `[B, H, F, D]` and `[B, H, F]`.
        normalized: False gives q_t S_t as it is.

    Returns:
        `(o, den, kv, z)`: output `[B, H, Tq, D]` in v's dtype, 0 in rows that see no key; q . z, float32
        `[B, H, Tq]`; the sums after the last key, float32. All are differentiable. Sums are float32; products are of
        bfloat16 for bfloat16 inputs, of TF32 for float16 ones, and of float32 precision for float32.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, more than 128 features, or more queries than keys.
    """
    _check(q, k, v, log_decay, key_scale, initial_state)
    kv, z = initial_state if initial_state is not None else (None, None)
    return _forward(q, k, v, log_decay, key_scale, kv, z, normalized)


def shipped_launches() -> list[Launch]:
    """The configurations that calls choose, for head dims 32 to 128 and the three dtypes, on each target.

    float32, and float16 with 128 features, are a choice for exactness, not for speed: their operands of 32 bits do not
    all fit into registers. They are listed, and not as defaults.
    """
    launches: list[Launch] = []
    for target in ("sm_80", "sm_90", _AMD):
        for dtype in _KINDS:
            for dim in (32, 64, 128) if dtype == torch.bfloat16 else (64, 128):
                launches += _launches(target, dtype, dim, 64)
        launches += _launches(target, torch.bfloat16, 64, 16)
    return launches


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    key_scale: torch.Tensor | None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    if any(x.ndim != 4 for x in (q, k, v, log_decay)):
        raise ValueError("q, k, v and log_decay have four dimensions.")
    batch, heads, q_length, features = q.shape
    k_length, dim = v.shape[2:]
    expected: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {
        "k": (k, (batch, heads, k_length, features)),
        "v": (v, (batch, heads, k_length, dim)),
        "log_decay": (log_decay, (batch, heads, k_length, features)),
    }
    if initial_state is not None:
        expected["initial_state[0]"] = (initial_state[0], (batch, heads, features, dim))
        expected["initial_state[1]"] = (initial_state[1], (batch, heads, features))
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, with q {tuple(q.shape)} it must be {shape}.")
    if key_scale is not None and (
        key_scale.ndim != 3
        or key_scale.shape[0] not in (1, batch)
        or key_scale.shape[1] not in (1, heads)
        or key_scale.shape[2] != k_length
    ):
        raise ValueError(
            f"key_scale has shape {tuple(key_scale.shape)}, allowed is ({batch} or 1, {heads} or 1, {k_length})."
        )
    if max(features, dim) > MOST_FEATURES:
        raise ValueError(f"{features} features and head_dim {dim}: at most {MOST_FEATURES} of each are supported.")
    if not 0 < q_length <= k_length:
        raise ValueError(f"From 1 to {k_length} queries are allowed, as many as there are keys; got {q_length}.")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in _KINDS):
        allowed = ", ".join(str(dtype) for dtype in _KINDS)
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; allowed is one dtype of {allowed}.")
    named: list[tuple[str, torch.Tensor | None]] = [("key_scale", key_scale)]
    named += zip(("kv", "z"), initial_state or (), strict=False)
    for name, given in named:
        if given is not None and given.dtype != torch.float32:
            raise ValueError(f"{name} is {given.dtype}, it must be torch.float32.")
    others = [x for x in (k, v, log_decay, key_scale, *(initial_state or ())) if x is not None]
    if any(x.device != q.device for x in others):
        raise ValueError(f"All tensors must be on one device, got {sorted({str(x.device) for x in (q, *others)})}.")


@torch.library.custom_op(f"{NAMESPACE}::gated_linear_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    key_scale: torch.Tensor | None,
    kv: torch.Tensor | None,
    z: torch.Tensor | None,
    normalized: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_launches(q.device)
    q, k, v, log_decay = (readable(x) for x in (q, k, v, log_decay))
    batch, heads, q_length, features = q.shape
    k_length, dim = v.shape[2:]
    out, den, _, _ = _outputs(q, v)
    shape = _shape(q.dtype, features, dim, k_length, exact_products(q.device))
    with on_device(q.device):
        reach = _reach(log_decay, shape)
        state, vector, last_kv, last_z = _states(k, v, reach, key_scale, None, kv, z, q_length, False, shape)
        blocks = batch * heads * triton.cdiv(k_length, shape["BT"])
        gated_fwd_kernel[(blocks * triton.cdiv(dim, _SCORES[q.dtype]["BD"]),)](
            *(q, k, v, reach, _or(key_scale, q), out, den, state, vector),
            *_strides(q, k, v, key_scale, out),
            *(heads, q_length, k_length, _levels(shape)),
            **_options(
                {**shape, **_SCORES[q.dtype]}, F=features, D=dim, NORMALIZED=normalized, HAS_SCALE=key_scale is not None
            ),
        )
    return out, den, last_kv, last_z


@_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    key_scale: torch.Tensor | None,
    kv: torch.Tensor | None,
    z: torch.Tensor | None,
    normalized: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(q, v)


@torch.library.custom_op(f"{NAMESPACE}::gated_linear_attention_backward", mutates_args=())
def _backward(
    d_out: torch.Tensor,
    more: torch.Tensor,
    d_kv: torch.Tensor,
    d_z: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    key_scale: torch.Tensor | None,
    kv: torch.Tensor | None,
    z: torch.Tensor | None,
    out: torch.Tensor,
    den: torch.Tensor,
    normalized: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, log_decay, d_out, out = (readable(x) for x in (q, k, v, log_decay, d_out, out))
    batch, heads, q_length, features = q.shape
    k_length, dim = v.shape[2:]
    shape = _shape(q.dtype, features, dim, k_length, exact_products(q.device))
    f_tiles, d_tiles = triton.cdiv(features, _GRADIENTS[q.dtype]["BF"]), triton.cdiv(dim, _SCORES[q.dtype]["BD"])
    inverse, d_den = torch.empty_like(den), more.contiguous()
    d_q, d_k, d_v, d_decay, d_scale = _gradients(q, k, v, key_scale, f_tiles)
    with on_device(q.device):
        if normalized:
            d_den = torch.empty_like(den)
            gated_delta_kernel[(triton.cdiv(q_length, shape["BT"]) * batch * heads,)](
                *(d_out, out, den, more.contiguous(), inverse, d_den),
                *_strides(d_out, out),
                *(heads, q_length),
                **{"D": dim, "BT": shape["BT"], "BD": _power(dim), "num_warps": 4, "num_stages": 1},
            )
        reach = _reach(log_decay, shape)
        state, vector, _, _ = _states(k, v, reach, key_scale, None, kv, z, q_length, False, shape)
        factor = inverse if normalized else None
        d_state, d_vector, d_kv0, d_z0 = _states(q, d_out, reach, factor, d_den, d_kv, d_z, q_length, True, shape)
        blocks = batch * heads * triton.cdiv(k_length, shape["BT"])
        scale = _or(key_scale, q)
        options = _options(
            {**shape, **_SCORES[q.dtype]}, F=features, D=dim, NORMALIZED=normalized, HAS_SCALE=key_scale is not None
        )
        gated_query_key_bwd_kernel[(blocks * f_tiles,)](
            *(q, k, v, log_decay, reach, scale, d_out, inverse, d_den, state, vector, d_state, d_vector),
            *(d_q, d_k, d_decay, d_scale),
            *_strides(q, k, v, log_decay, key_scale, d_out, d_q, d_k),
            *(heads, batch * heads, q_length, k_length, _levels(shape)),
            **{**options, **_GRADIENTS[q.dtype]},
        )
        gated_value_bwd_kernel[(blocks * d_tiles,)](
            *(q, k, reach, scale, d_out, inverse, d_state, d_v),
            *_strides(q, k, key_scale, d_out, d_v),
            *(heads, q_length, k_length, _levels(shape)),
            **options,
        )
    return d_q, d_k, d_v, d_decay, d_scale, d_kv0, d_z0


@_backward.register_fake
def _(d_out, more, d_kv, d_z, q, k, v, log_decay, key_scale, kv, z, out, den, normalized):  # type: ignore[no-untyped-def]
    gradients = _gradients(q, k, v, key_scale, triton.cdiv(q.shape[3], _GRADIENTS[q.dtype]["BF"]))
    return *gradients, torch.empty_like(d_kv), torch.empty_like(d_z)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.normalized = inputs
    ctx.save_for_backward(*tensors, *output[:2])


def _differentiate(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, log_decay, key_scale, kv, z, out, den = ctx.saved_tensors
    d_q, d_k, d_v, d_decay, d_scale, d_kv, d_z = _backward(
        *gradients, q, k, v, log_decay, key_scale, kv, z, out, den, ctx.normalized
    )
    scale = None if key_scale is None else d_scale.sum(0).sum_to_size(key_scale.shape)
    start = (None, None) if kv is None else (d_kv, d_z)
    return d_q, d_k, d_v, d_decay.to(log_decay.dtype), scale, *start, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _outputs(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, length, features = q.shape
    dim = v.shape[-1]
    out = v.new_empty(batch, length, heads, dim).transpose(1, 2)
    den, z = (q.new_empty(batch, heads, size, dtype=torch.float32) for size in (length, features))
    return out, den, q.new_empty(batch, heads, features, dim, dtype=torch.float32), z


def _gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_scale: torch.Tensor | None, tiles: int
) -> tuple[torch.Tensor, ...]:
    """Empty gradients of q, k, v (in memory as `[B, T, H, .]`), decay `[B, H, T, F]` and scale, a share per tile."""
    rows = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v)]
    d_decay = k.new_empty(k.shape, dtype=torch.float32)
    shares = (0,) if key_scale is None else (tiles, *k.shape[:3])
    return *rows, d_decay, k.new_empty(shares, dtype=torch.float32)


def _reach(log_decay: torch.Tensor, shape: dict[str, Any]) -> torch.Tensor:
    """Log-decays in base 2 from the start of its chunk to each token, float32 `[B, H, Tk, F]`."""
    batch, heads, length, features = log_decay.shape
    reach = torch.empty(log_decay.shape, dtype=torch.float32, device=log_decay.device)
    blocks = batch * heads * triton.cdiv(length, shape["BT"])
    gated_reach_kernel[(blocks * triton.cdiv(features, shape["BF"]),)](
        *(log_decay, reach),
        *_strides(log_decay),
        *(heads, length),
        **{"F": features, "BT": shape["BT"], "BF": shape["BF"], "num_warps": 4, "num_stages": 1},
    )
    return reach


def _states(
    b: torch.Tensor,
    c: torch.Tensor,
    reach: torch.Tensor,
    factor: torch.Tensor | None,
    extra: torch.Tensor | None,
    before: torch.Tensor | None,
    before_z: torch.Tensor | None,
    q_length: int,
    reverse: bool,
    shape: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """State before each chunk, or its gradient after each, and past all: float32 `[B, H, chunks, F, D]` etc."""
    batch, heads, k_length, features = reach.shape
    dim = c.shape[-1]
    chunks = triton.cdiv(k_length, shape["BT"])
    state = reach.new_empty(batch, heads, chunks, features, dim)
    vector = reach.new_empty(batch, heads, chunks, features)
    last, last_z = reach.new_empty(batch, heads, features, dim), reach.new_empty(batch, heads, features)
    tiles = triton.cdiv(features, shape["BF"]) * triton.cdiv(dim, shape["BD"])
    options = _options(shape, F=features, D=dim, REVERSE=reverse, HAS_FACTOR=factor is not None)
    gated_sums_kernel[(tiles * chunks * batch * heads,)](
        *(b, c, reach, _or(factor, reach), _or(extra, reach), state, vector),
        *_strides(b, c, factor),
        *(heads, q_length, k_length),
        **options,
    )
    blocks = triton.cdiv(features * dim, _SCAN_BLOCK) + triton.cdiv(features, _SCAN_BLOCK)
    gated_scan_kernel[(blocks * batch * heads,)](
        *(state, vector, _or(before, reach).contiguous(), _or(before_z, reach).contiguous(), last, last_z),
        *(reach, k_length),
        **{"F": features, "D": dim, "BT": shape["BT"], "BLOCK": _SCAN_BLOCK},
        **{"REVERSE": reverse, "HAS_BEFORE": before is not None, "num_warps": 4, "num_stages": 1},
    )
    return state, vector, last, last_z


def _or(x: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that is not read, where there is none."""
    return other if x is None else x


def _strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of (batch, head, token); 0 in broadcast dimensions."""
    strides: list[int] = []
    for x in tensors:
        if x is None:
            strides += (0, 0, 0)
        else:
            strides += (0 if x.shape[i] == 1 and i < 2 else x.stride(i) for i in range(3))
    return tuple(strides)


def _power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _shape(dtype: torch.dtype, features: int, dim: int, length: int, exact: str) -> dict[str, Any]:
    """Tile sizes and precision of a call: constants that the kernels of its passes share."""
    bt = 16 if length <= 16 else 64
    return {
        "BT": bt,
        "BF": min(64, _power(features)) if length <= 16 else 64,
        "BD": min(64, _power(dim)),
        "BF16_DOTS": dtype == torch.bfloat16,
        "PRECISION": {torch.float32: exact, torch.float16: "tf32", torch.bfloat16: "ieee"}[dtype],
    }


def _levels(shape: dict[str, Any]) -> int:
    return shape["BT"].bit_length() - 1


def _options(shape: dict[str, Any], **constants: Any) -> dict[str, Any]:
    return {**shape, **constants, "num_warps": 8 if shape["BT"] == 64 else 4, "num_stages": 1}


def _launches(target: str, dtype: torch.dtype, dim: int, length: int) -> list[Launch]:
    """The configurations of a call with `dim` features and head_dim, forward and backward."""
    shape = _shape(dtype, dim, dim, length, exact="ieee" if target == _AMD else "tf32x3")
    sizes = {**shape, "F": dim, "D": dim}
    main = {**sizes, **_SCORES[dtype], "NORMALIZED": True, "HAS_SCALE": True, "scale_token": 1}
    sums = {**sizes, "HAS_FACTOR": True, "factor_token": 1}
    small = {"BT": shape["BT"], "num_warps": 4, "num_stages": 1}
    constants: list[tuple[Any, dict[str, Any]]] = [
        (gated_reach_kernel, {"F": dim, "BF": shape["BF"], **small}),
        (gated_sums_kernel, _options(sums, REVERSE=False)),
        (gated_sums_kernel, _options(sums, REVERSE=True)),
        (gated_scan_kernel, {"F": dim, "D": dim, "BLOCK": _SCAN_BLOCK, "HAS_BEFORE": True, "REVERSE": False, **small}),
        (gated_fwd_kernel, _options(main)),
        (gated_delta_kernel, {"D": dim, "BD": _power(dim), **small}),
        (gated_query_key_bwd_kernel, _options({**main, **_GRADIENTS[dtype]})),
        (gated_value_bwd_kernel, _options(main)),
    ]
    launches: list[Launch] = []
    for kernel, values in constants:
        name = f"{_KINDS[dtype]} F{dim} D{dim} T{shape['BT']}" + (" reverse" if values.get("REVERSE") else "")
        options = {key: values.pop(key) for key in ("num_warps", "num_stages")}
        options["is_default"] = dtype == torch.bfloat16 or (dtype == torch.float16 and dim <= 64)
        # Tiles of 16 tokens are below wgmma's; float32 needs more precision than tensor cores have on one target.
        options["uses_dot"] = "PRECISION" in values and shape["BT"] == 64 and dtype != torch.float32
        types = {key: _type(key, _KINDS[dtype]) for key in kernel.arg_names if key not in values}
        launches.append(Launch(kernel, name, types, values, **options, targets=(target,)))
    return launches


def _type(argument: str, kind: str) -> str:
    if argument in RUNTIME:
        return "i32"
    if argument.endswith(("_batch", "_head", "_token")):
        return "i32:16"
    features = ("q", "k", "v", "b", "c", "out", "d_out", "d_q", "d_k", "d_v")
    return f"*{kind}" if argument in features else "*fp32"
