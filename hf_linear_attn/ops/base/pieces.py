"""Softmax attention in pieces: torch's attention kernels for CPUs, forward and backward, and what pieces add up to.

A piece is some rows of queries over some keys, which a mechanism slices, unfolds or gathers. Autograd through that
copies every key as often as pieces hold it, and makes gradients as long as the sequence for each of them. Here all
pieces of a call write into one output and add into the same gradients, and only the inputs, the output and the
log-sum-exp are kept: the backward pass takes the pieces again. What is in hand at once is a piece: from 32 MiB on,
memory is mapped anew, page by page, each time it is asked for. Not differentiable twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype

__all__ = ["LEAST_LOG", "Piece", "attend_pieces", "backward_pieces", "forward_pieces", "merge", "serves"]

# A log-sum-exp below this is that of a row without keys: all its logits are `LOG_ZERO` and something.
LEAST_LOG = LOG_ZERO / 2

_Tensors = tuple[torch.Tensor, ...]


class Piece(Protocol):
    """Some rows of queries over some keys: one call of the kernels, of N sequences and H heads.

    Attributes:
        again: whether an earlier piece had the same rows: outputs are merged, and gradients added.
        parts: keys whose gradients are made at once, all or some of them.
    """

    again: bool = False
    parts: tuple[slice, ...] = (slice(None),)

    def rows(self, x: torch.Tensor, fill: float | None = None) -> torch.Tensor:
        """Its rows of x, which has one for each query: `[N, H, T, ...]`; `fill`, or anything, where there is none."""

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """`rows` of the queries."""
        return self.rows(q)

    def earlier(self, out: torch.Tensor) -> torch.Tensor:
        """`rows` of the outputs, no wider than they are."""
        return self.rows(out)

    def place(self, total: Any, x: torch.Tensor) -> None:
        """The inverse of `rows`: write x to where its rows belong in what the mechanism has for all of them."""

    def place_more(self, total: Any, x: torch.Tensor) -> None:
        """Add x to what an earlier piece placed there."""
        self.place(total, self.rows(total) + x)

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[N, H, K, D]`, good until those of the next piece are taken."""

    def bias(self) -> torch.Tensor | None:
        """What is added to the logits, float32 at least: `[N or 1, H or 1, T or 1, K]`, or None for nothing."""

    def add(self, part: slice, d_keys: torch.Tensor, d_values: torch.Tensor) -> None:
        """Add gradients of a part of the keys and values to those of the tensors that they come from."""


class Pieces(Protocol):
    """The pieces of a call, made from its tensors in the forward pass and again in the backward pass."""

    def __iter__(self) -> Iterator[Piece]: ...

    def zero_gradients(self) -> None:
        """Begin a backward pass."""

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """What the pieces have added up, for the tensors but the queries; the last ones may lack."""


def serves(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernels can run: on a CPU, with values as wide as keys."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def attend_pieces(
    make: Callable[..., Pieces], q: torch.Tensor, *tensors: torch.Tensor | None, scaling: float, may_be_blind: bool
) -> torch.Tensor:
    """Softmax attention of all rows over the keys of their pieces.

    Args:
        make: from the queries and the other tensors, numbers in one dtype, to the pieces.
        q: queries, a row `[D]` each: `[..., D]`.
        tensors: keys, values and whatever else pieces come from.
        scaling: factor of the logits.
        may_be_blind: whether some rows may see no key.

    Returns:
        q's shape, contiguous; 0 in rows that see no key.
    """
    numbers = [x.dtype for x in (q, *tensors) if x is not None and x.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, numbers)
    given = (x.to(dtype) if x is not None and x.is_floating_point() else x for x in (q, *tensors))
    with torch.autocast(q.device.type, enabled=False):
        out: torch.Tensor = _AttendPieces.apply(make, scaling, may_be_blind, *given)  # type: ignore[no-untyped-call]
    return out


class _AttendPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., Pieces], scaling: float, may_be_blind: bool, *tensors: Any) -> Any:
        q = tensors[0]
        out = q.new_empty(q.shape)
        total = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
        forward_pieces(make(*tensors), q, out, total, scaling)
        if may_be_blind:
            out.masked_fill_((total < LEAST_LOG)[..., None], 0)
            total.masked_fill_(total < LEAST_LOG, -LOG_ZERO)  # the backward pass needs weights of 0, not of 1 / 0
        ctx.save_for_backward(*tensors, out, total)
        ctx.settings = make, scaling, may_be_blind
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, out, total = ctx.saved_tensors
        make, scaling, may_be_blind = ctx.settings
        pieces, d_q = make(*tensors), torch.empty_like(out)
        pieces.zero_gradients()
        backward_pieces(pieces, (tensors[0], out, total, grad), d_q, scaling, may_be_blind)
        grads = d_q, *pieces.gradients(), *[None] * len(tensors)
        return (None, None, None, *grads[: len(tensors)])


def forward_pieces(pieces: Pieces, q: torch.Tensor, out: Any, total: Any, scaling: float) -> None:
    """Place what all pieces see in `out`, and the log-sum-exps of their logits in `total`."""
    for piece in pieces:
        part, lse = _attend(piece.queries(q), *piece.keys(), piece.bias(), scaling)
        if piece.again:
            part, lse = merge((piece.earlier(out), piece.rows(total)), (part[..., : out.shape[-1]], lse))
        piece.place(out, part)
        piece.place(total, lse)


def backward_pieces(pieces: Pieces, of_rows: _Tensors, d_q: Any, scaling: float, may_be_blind: bool) -> None:
    """Place the gradients of the queries in `d_q`, and have the pieces add up those of their keys.

    `of_rows` are the queries, the output and the log-sum-exps over all pieces, `-LOG_ZERO` in rows without keys, whose
    gradient is not looked at, and the gradient of the output.
    """
    for piece in pieces:  # in a function of its own, which holds nothing when the next one is taken
        change = _changes(piece, of_rows, scaling, may_be_blind)
        (piece.place_more if piece.again else piece.place)(d_q, change)


def _changes(piece: Piece, of_rows: _Tensors, scaling: float, may_be_blind: bool) -> torch.Tensor:
    """Gradients of the queries of one piece; those of its keys are added up."""
    q, out, total, grad = of_rows
    queries, (keys, values), bias = piece.queries(q), piece.keys(), piece.bias()
    d_out, outputs, lse = piece.rows(grad, 0.0), piece.rows(out), piece.rows(total, -LOG_ZERO)
    if may_be_blind:
        d_out = d_out.clone().masked_fill_((lse > -LEAST_LOG)[..., None], 0)  # masked_fill would lose the strides
    change = None
    for part in piece.parts:
        seen = None if bias is None else bias[..., part]
        given = d_out, queries, keys[:, :, part], values[:, :, part], outputs, lse, seen
        new, *of_keys = _attend_backward(*given, scaling)
        change = new.to(lse.dtype) if change is None else change.add_(new)
        piece.add(part, *of_keys)
    assert change is not None  # a piece has keys
    return change


def merge(one: _Tensors, other: _Tensors) -> _Tensors:
    """One softmax over two sets of keys from those over each: outputs `[..., D]` and log-sum-exps `[...]`."""
    (out, lse), (more, more_lse) = one, other
    both = torch.logaddexp(lse, more_lse)
    return (out * (lse - both).exp_()[..., None]).addcmul_(more, (more_lse - both).exp_()[..., None]), both


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[N, H, T, D]` and log-sum-exp `[N, H, T]`."""
    if serves(q, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scaling)
    logits = _logits(q, k, bias, scaling)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().to(v.dtype) @ v, lse


def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, given the output and the log-sum-exp over all keys and the output's gradient."""
    if serves(q, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.contiguous(), 0.0, False, attn_mask=bias, scale=scaling
        )
    weights = (_logits(q, k, bias, scaling) - lse[..., None]).exp()
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    slope = (weights * ((grad @ v.mT).to(lse.dtype) - delta) * scaling).to(q.dtype)
    return slope @ k, slope.mT @ q, weights.to(grad.dtype).mT @ grad


def _logits(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scaling: float) -> torch.Tensor:
    logits = (q @ k.mT).to(accumulation_dtype(q.dtype)) * scaling
    return logits if bias is None else logits + bias
