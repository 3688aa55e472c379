"""Block-sparse softmax attention over lists of key tiles: Triton kernels as custom ops with gradients.

One kernel computes outputs and log-sum-exps, one dq, one dk and dv over the transposed lists; extra columns, which all
rows may see, have a kernel of their own for their gradients. Products accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from hf_linear_attn.kernels.launch import NAMESPACE, check_launches, exact_products, on_device, readable
from hf_linear_attn.kernels.sparse.bwd import (
    block_sparse_dkv_kernel,
    block_sparse_dq_kernel,
    block_sparse_dx_kernel,
)
from hf_linear_attn.kernels.sparse.fwd import block_sparse_fwd_kernel
from hf_linear_attn.kernels.sparse.launch import column_tile, launch_options, target_of
from hf_linear_attn.kernels.sparse.lists import BlockCSR

__all__ = ["block_sparse_attention"]

# Programs that a launch of few tiles is split into: about two for each multiprocessor of a large GPU. A constant, so
# that sums are taken in the same order everywhere.
_PROGRAMS = 264

_LISTS = (
    "Tensor rows, Tensor col_idx, Tensor? bits, Tensor? row_order, Tensor cols, Tensor row_idx, Tensor? bits_t, "
    "Tensor? col_order, Tensor? q_start, Tensor? q_first, Tensor? k_start, Tensor? q_pos, Tensor? k_pos, "
    "Tensor? q_bucket, Tensor? k_bucket, Tensor? x_allowed, Tensor? x_shift, Tensor? seed, SymInt[] numbers, "
    "float scaling, float dropout"
)
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? xk, Tensor? xv, "


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: BlockCSR,
    *,
    scaling: float,
    q_pos: torch.Tensor | None = None,
    k_pos: torch.Tensor | None = None,
    q_bucket: torch.Tensor | None = None,
    k_bucket: torch.Tensor | None = None,
    extra: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
    extra_shift: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the keys that `lists` show to each query, and over extra columns.

    Any strides; gradients for q, k, v and the extra keys and values, of the output and of the log-sum-exp. A key in a
    listed tile takes part in products even where a mask hides it from a query: it must be finite, unless it is hidden
    from all by `k_pos` < 0 or the end of the keys.

    Args:
        q: `[B, H, Tq, D]`, D from 1 to 128; float32, float16 or bfloat16.
        k, v: `[B, H, Tk, D]`, q's dtype.
        lists: which tiles are seen, and the masks inside of them.
        scaling: factor of the logits.
        q_pos: int32 `[B or 1, Tq]`, positions that the bands of `lists` compare instead of places, in all tiles but
            FULL ones.
        k_pos: int32 `[B or 1, Tk]`, likewise; a key at a negative position is never seen.
        q_bucket: int32 `[B or 1, H or 1, Tq]`; with `k_bucket` `[B or 1, H or 1, Tk]` keys of another bucket are hidden
            in all tiles but FULL ones; `lists.masked()` has none. Both >= 0.
        extra: G more keys and values `[B, H, G, D]`, and which query sees which, bool `[B or 1, Tq or 1, G]`, or None:
            each sees all.
        extra_shift: `[H]`, added to the logits of the extra columns; without gradient.
        dropout_p: share of the weights that dropout sets to 0, < 1.
        seed: of the dropout, an integer or an int64 tensor of one element on q's device.

    Returns:
        output `[B, H, Tq, D]` in q's dtype, 0 in rows that see no key, with `[B, Tq, H, D]` contiguous in memory; and
        the natural log-sum-exp of the logits, float32 `[B, H, Tq]`, -1e30 in such rows.

    Raises:
        ValueError: for tensors that do not fit together.
    """
    _check(q, k, v, lists, extra, dropout_p)
    if extra_shift is not None and extra_shift.requires_grad:
        raise ValueError("extra_shift gets no gradient here; allowed: a tensor that requires none.")
    xk, xv, allowed = (None, None, None) if extra is None else extra
    if allowed is not None:
        allowed = allowed.contiguous().view(torch.uint8)
    noise = None
    if dropout_p > 0:
        noise = seed if isinstance(seed, torch.Tensor) else torch.full((1,), seed, dtype=torch.int64, device=q.device)
    given = (q_pos, k_pos, q_bucket, k_bucket, allowed, extra_shift, noise)
    out: tuple[torch.Tensor, torch.Tensor] = _forward_op(
        q, k, v, xk, xv, *lists.tensors(), *given, lists.numbers(), float(scaling), float(dropout_p)
    )
    return out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: BlockCSR,
    extra: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
    dropout_p: float,
) -> None:
    (B, H, q_len, D), k_len = q.shape, k.shape[2]
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or any(x.dtype != q.dtype for x in (k, v)):
        raise ValueError(
            f"q, k and v must share a dtype of float32, float16, bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if not 1 <= D <= 128 or k.shape != (B, H, k_len, D) or v.shape != k.shape:
        raise ValueError(
            "q, k and v must be [B, H, Tq, D], [B, H, Tk, D] and [B, H, Tk, D] with D <= 128, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p!r}; allowed: 0 <= dropout_p < 1.")
    if lists.rows.shape[0] not in (1, B) or lists.rows.shape[1] not in (1, H):
        raise ValueError(
            f"The lists are for {tuple(lists.rows.shape[:2])} batch rows and heads, the queries have {(B, H)}."
        )
    if extra is not None:
        if extra[0].shape != (B, H, extra[0].shape[2], D) or extra[1].shape != extra[0].shape:
            shapes = tuple(extra[0].shape), tuple(extra[1].shape)
            raise ValueError(f"Extra keys and values must be [{B}, {H}, G, {D}], got {shapes[0]} and {shapes[1]}.")
        allowed = extra[2]
        if allowed is not None and (
            allowed.shape[0] not in (1, B) or allowed.shape[1] not in (1, q_len) or allowed.dtype != torch.bool
        ):
            raise ValueError(
                f"The extra columns' mask must be bool [{B} or 1, {q_len} or 1, G], got {allowed.dtype} "
                f"{tuple(allowed.shape)}."
            )


def _like_tokens(x: torch.Tensor) -> torch.Tensor:
    """Empty `[B, H, T, D]`, `[B, T, H, D]` in memory."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


def _zeros_like_tokens(x: torch.Tensor) -> torch.Tensor:
    B, H, T, D = x.shape
    return x.new_zeros(B, T, H, D).transpose(1, 2)


def _strides(x: torch.Tensor | None, names: str, *, skip: int = 1) -> dict[str, int]:
    """Strides by name; 0 for dimensions of size 1, which are broadcast. The last `skip` dimensions have stride 1."""
    fields = names.split()
    if x is None:
        return dict.fromkeys(fields, 0)
    sizes = x.shape[: x.ndim - skip]
    return {n: 0 if size == 1 else s for n, size, s in zip(fields, sizes, x.stride(), strict=False)}


class _Call:
    """Arguments of the kernels, by name, from those of the custom ops."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, xk: Any, xv: Any, lists: Sequence[Any]):
        (*tensors, numbers, scaling, dropout) = lists
        names = "rows col_idx bits row_order cols row_idx bits_t col_order q_start q_first k_start "
        names += "q_pos k_pos q_bucket k_bucket x_allowed x_shift seed"
        # Lists are contiguous as they are made; of what callers give, the last dimension must be.
        tensors = [x if x is None else readable(x) for x in tensors]
        self.given: dict[str, Any] = dict(zip(names.split(), tensors, strict=True))
        *tiles, sub, block, padded, has_band, has_hole, lo, hi, hole_lo, hole_hi = numbers
        (B, H, q_len, D), k_len = q.shape, k.shape[2]
        self.q, self.k, self.v = readable(q), readable(k), readable(v)
        self.xk, self.xv = (None if x is None else readable(x) for x in (xk, xv))
        self.tile, self.tile_t = tiles[:2], tiles[2:]
        self.heads, self.x_len = B * H, 0 if xk is None else xk.shape[2]
        self.has_start, self.has_k_start = self.given["q_start"] is not None, self.given["k_start"] is not None
        self.pairs = dict(self._sizes(H, q_len, k_len, scaling, dropout, D))
        sets_b, sets_h, self.num_rows, _ = self.given["rows"].shape
        self.num_cols = self.given["cols"].shape[2]
        self.masks: dict[str, Any] = {
            **{"lo": lo, "hi": hi, "hole_lo": hole_lo, "hole_hi": hole_hi, "SUB": sub, "BLOCK": block},
            **{"PADDED": padded, "BAND": bool(has_band), "HOLE": bool(has_hole)},
            "SET_B": sets_h if sets_b > 1 else 0,
            "SET_H": 1 if sets_h > 1 else 0,
            "Q_START": self.has_start,
            "K_START": self.has_k_start,
            "START_B": int(any(x is not None and x.shape[0] > 1 for x in self._of("q_start k_start"))),
            "Q_POS": self.given["q_pos"] is not None,
            "K_POS": self.given["k_pos"] is not None,
            "BUCKET": self.given["q_bucket"] is not None,
            **_strides(self.given["q_pos"], "qp_sb"),
            **_strides(self.given["k_pos"], "kp_sb"),
            **_strides(self.given["q_bucket"], "qb_sb qb_sh"),
            **_strides(self.given["k_bucket"], "kb_sb kb_sh"),
        }
        self.columns: dict[str, Any] = {
            **{"xk": self._or_q(self.xk), "xv": self._or_q(self.xv), "x_len": self.x_len},
            **{name: self._or_q(self.given[name]) for name in ("x_allowed", "x_shift")},
            "X_ALLOWED": self.given["x_allowed"] is not None,
            "X_SHIFT": self.given["x_shift"] is not None,
            **_strides(self.xk, "xk_sb xk_sh xk_st"),
            **_strides(self.xv, "xv_sb xv_sh xv_st"),
            **_strides(self.given["x_allowed"], "xa_sb xa_st"),
        }

    def _sizes(self, H: int, q_len: int, k_len: int, scaling: float, dropout: float, D: int) -> dict[str, Any]:
        exact = exact_products(self.q.device) if self.q.dtype == torch.float32 else "ieee"
        return {
            **{"q": self.q, "seed": self._or_q(self.given["seed"]), **_strides(self.q, "q_sb q_sh q_st")},
            **{"num_heads": H, "q_len": q_len, "k_len": k_len, "scaling": scaling, "dropout": dropout},
            **{"D": D, "D_PAD": max(16, triton.next_power_of_2(D))},
            **{"DROPOUT": dropout > 0, "PRECISION": exact},
        }

    def _of(self, names: str) -> list[Any]:
        return [self.given[name] for name in names.split()]

    def _or_q(self, x: torch.Tensor | None) -> torch.Tensor:
        """A pointer for an argument that the kernel does not read."""
        return self.q if x is None else x

    def lists(self, transposed: bool) -> dict[str, Any]:
        """Keys, values, lists and masks, for rows or for columns."""
        names = ("cols", "row_idx", "bits_t", "col_order") if transposed else ("rows", "col_idx", "bits", "row_order")
        shared = ("q_start", "q_first", "k_start", "q_pos", "k_pos", "q_bucket", "k_bucket")
        return {
            **{"k": self.k, "v": self.v, **_strides(self.k, "k_sb k_sh k_st"), **_strides(self.v, "v_sb v_sh v_st")},
            **{name: self._or_q(self.given[name]) for name in (*names, *shared)},
            "num_cols" if transposed else "num_rows": self.num_cols if transposed else self.num_rows,
            "num_entries": self.given[names[1]].shape[-1],
            "ORDER": self.given[names[3]] is not None,
            **self.tiles(transposed),
            **self.masks,
        }

    def tiles(self, transposed: bool) -> dict[str, int]:
        return dict(zip(("TILE_M", "TILE_N"), self.tile_t if transposed else self.tile, strict=True))

    def options(self, kernel: str) -> dict[str, int]:
        options = launch_options(target_of(self.q.device), kernel, self.q.shape[-1], self.q.dtype)
        if "STEP" in options:
            options["STEP"] = min(options["STEP"], self.tile_t[0])
        return options


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, xk: Any, xv: Any, *lists: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    call = _Call(q, k, v, xk, xv, lists)
    # Queries before place 0 are in no tile.
    check_launches(q.device)
    o = _zeros_like_tokens(q) if call.has_start else _like_tokens(q)
    shape = q.shape[:3]
    lse = q.new_full(shape, -1e30, dtype=torch.float32) if call.has_start else q.new_empty(shape, dtype=torch.float32)
    if o.numel() == 0 or call.num_rows == 0:
        return o.zero_(), lse.fill_(-1e30)
    with on_device(q.device):
        block_sparse_fwd_kernel[(call.heads, call.num_rows)](
            o=o, lse=lse, **_strides(o, "o_sb o_sh o_st"),
            EXTRA=call.x_len > 0, TILE_X=column_tile(q.dtype, q.shape[-1]),
            **call.pairs, **call.lists(False), **call.columns, **call.options("fwd"),
        )  # fmt: skip
    return o, lse


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, xk: Any, xv: Any, *lists: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _like_tokens(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    xk: Any,
    xv: Any,
    *lists: Any,
) -> tuple[torch.Tensor, ...]:
    call = _Call(q, k, v, xk, xv, lists)
    new_q = _zeros_like_tokens if call.has_start else _like_tokens
    new_k = _zeros_like_tokens if call.has_k_start else _like_tokens
    dq, dk, dv = new_q(q), new_k(k), new_k(v)
    dxk, dxv = (q.new_empty(0) if x is None else _zeros_like_tokens(x) for x in (xk, xv))
    if o.numel() == 0 or call.num_rows == 0 or (call.num_cols == 0 and call.x_len == 0):
        return dq.zero_(), dk.zero_(), dv.zero_(), dxk, dxv
    d_out, o = readable(d_out), readable(o)
    # Rows of no tile keep delta 0; their log-sum-exp says that they weigh nothing.
    delta = torch.zeros_like(lse) if call.has_start else torch.empty_like(lse)
    gradient = {"d_out": d_out, "lse": lse, "delta": delta, **_strides(d_out, "do_sb do_sh do_st")}
    with on_device(q.device):
        block_sparse_dq_kernel[(call.heads, call.num_rows)](
            o=o, dq=dq, d_lse=lse if d_lse is None else d_lse.contiguous(), D_LSE=d_lse is not None,
            **_strides(o, "o_sb o_sh o_st"), **_strides(dq, "dq_sb dq_sh dq_st"),
            EXTRA=call.x_len > 0, TILE_X=column_tile(q.dtype, q.shape[-1]),
            **gradient, **call.pairs, **call.lists(False), **call.columns, **call.options("dq"),
        )  # fmt: skip
        if call.num_cols > 0:
            block_sparse_dkv_kernel[(call.heads, call.num_cols)](
                dk=dk, dv=dv, **_strides(dk, "dk_sb dk_sh dk_st"), **_strides(dv, "dv_sb dv_sh dv_st"),
                **gradient, **call.pairs, **call.lists(True), **call.options("dkv"),
            )  # fmt: skip
        if call.x_len > 0:
            dxk, dxv = _extra_gradients(call, gradient)
    return dq, dk, dv, dxk, dxv


def _extra_gradients(call: _Call, gradient: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the extra keys and values: few columns of all rows, so the rows are split among programs."""
    (B, H, q_len, D), G, options = call.q.shape, call.x_len, call.options("dx")
    tiles, rows = -(-G // options["TILE_N"]), options["TILE_M"]
    chunks = max(1, min(_PROGRAMS // (call.heads * tiles), -(-q_len // (8 * rows))))
    chunk = -(-q_len // (chunks * rows)) * rows
    chunks = -(-q_len // chunk)
    dxk, dxv = (call.q.new_empty(chunks, B, H, G, D, dtype=torch.float32) for _ in range(2))
    block_sparse_dx_kernel[(call.heads, tiles, chunks)](
        dxk=dxk, dxv=dxv, chunk=chunk, **gradient, **call.pairs, **call.columns, **options
    )
    sums = (x[0] if chunks == 1 else x.sum(0) for x in (dxk, dxv))
    dxk, dxv = (x.to(call.q.dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in sums)
    return dxk, dxv


def _backward_fake(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    xk: Any,
    xv: Any,
    *lists: Any,
) -> tuple[torch.Tensor, ...]:
    extra = (q.new_empty(0) if x is None else _like_tokens(x) for x in (xk, xv))
    return _like_tokens(q), _like_tokens(k), _like_tokens(v), *extra


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, numbers, scaling, dropout = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.options = numbers, scaling, dropout
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> tuple[Any, ...]:
    o, lse, *inputs = ctx.saved_tensors
    nothing = (None,) * (len(inputs) - 5 + 3)
    if d_out is None and d_lse is None:
        return (None,) * 5 + nothing
    d_out = torch.zeros_like(o) if d_out is None else d_out
    dq, dk, dv, dxk, dxv = _backward_op(d_out, d_lse, o, lse, *inputs, *ctx.options)
    extra = (None, None) if inputs[3] is None else (dxk, dxv)
    return dq, dk, dv, *extra, *nothing


_forward_op = torch.library.custom_op(
    f"{NAMESPACE}::block_sparse_fwd", _forward, mutates_args=(), schema=f"({_INPUTS}{_LISTS}) -> (Tensor, Tensor)"
)
_forward_op.register_fake(_forward_fake)
_forward_op.register_autograd(_autograd, setup_context=_setup_context)
_backward_op = torch.library.custom_op(
    f"{NAMESPACE}::block_sparse_bwd",
    _backward,
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor? d_lse, Tensor o, Tensor lse, {_INPUTS}{_LISTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward_op.register_fake(_backward_fake)
