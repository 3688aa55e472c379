"""Bidirectional feature-wise softmax over positions in blocks of tokens, with a backward pass of its own.

c_f = sum_j softmax_j(l_jf) v_j is summed once over all keys, relative to a running maximum of each feature, and read by
every query: o_i = sum_f a_if c_f. The forward pass keeps its inputs, c and each feature's log normalizer; the backward
pass computes shares and weights again, block by block, and needs one pass over the keys: what all keys have in common,
sum_j softmax_j(l_jf) v_j . d_f, is c_f . d_f for the gradient d_f of c_f.

Shapes as in `ops.prefix.attention`. Not differentiable twice.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.base.numerics import LOG_ZERO, TINY, exp_, full_precision
from hf_linear_attn.ops.linear import layout
from hf_linear_attn.ops.prefix.shares import ShareGradients, ShareInputs

__all__ = ["context_block_attention"]


def context_block_attention(inputs: ShareInputs) -> torch.Tensor:
    """Attend with all queries to all keys.

    Returns:
        `[B, H, Tq, D]` in v's dtype (`[B, T, H, D]` in memory, what the output projection reads next), 0 in sequences
        without a key.
    """
    return _ContextAttention.apply(*inputs.arguments())  # type: ignore[no-any-return]


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        given = ShareInputs(*arguments)
        v, block = given.v, layout.block_size(given.v)
        with full_precision(v):
            context, log_norm = _context(given, block)
            output = v.new_empty(v.shape[0], given.q.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)
            for rows in _blocks(given.q, block):
                output[:, :, rows] = given.shares(given.queries(rows)) @ context
        ctx.save_for_backward(*arguments, context, log_norm)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: torch.Tensor) -> Any:
        *arguments, context, log_norm = ctx.saved_tensors
        given = ShareInputs(*arguments)
        found, block, d_context = ShareGradients(given), layout.block_size(given.v), torch.zeros_like(context)
        for rows in _blocks(given.q, block):
            d_context += _query_gradients(given, found, rows, d_output, context)
        common = (context * d_context).sum(-1)[:, :, None]  # [B, H, 1, F]
        for now in _blocks(given.k, block):
            _key_gradients(given, found, now, log_norm, d_context, common)
        return found.arguments()


def _blocks(x: torch.Tensor, block: int) -> list[slice]:
    return [slice(i, min(i + block, x.shape[2])) for i in range(0, x.shape[2], block)]


def _weights(logits: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """e^{l - log_scale}."""
    return exp_(logits - log_scale)


# One block to a function: what it frees at its end is what the next one is given, still in the CPU's cache.


def _context(given: ShareInputs, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """c `[B, H, F, D]`, 0 without a key, and log sum_j e^{l_jf} `[B, H, 1, F]`."""
    first, *others = _blocks(given.k, block)
    kv, z, peak = _key_sums(given, first, None)
    for now in others:
        kv_new, z_new, highest = _key_sums(given, now, peak)
        kept = (peak - highest).exp_().mT
        kv, z, peak = kv_new.add_(kv.mul_(kept)), z_new.add_(z.mul_(kept)), highest
    z = z.clamp_(min=TINY)
    return kv.div_(z), z.log().mT + peak


def _key_sums(
    given: ShareInputs, now: slice, peak: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over a block, `[B, H, F, D]` and `[B, H, F, 1]`, relative to the maximum so far `[B, H, 1, F]` (last)."""
    logits = given.logits(given.keys(now), now)
    highest = logits.amax(2, keepdim=True)
    # Padded keys, should there be no others, stay far below it.
    highest = highest.clamp_(min=LOG_ZERO / 2) if peak is None else torch.maximum(peak, highest)
    weights = _weights(logits, highest)
    return weights.mT @ given.values(now), weights.sum(2)[..., None], highest


def _query_gradients(
    given: ShareInputs, found: ShareGradients, rows: slice, d_output: torch.Tensor, context: torch.Tensor
) -> torch.Tensor:
    """Finds those of a block of queries; gives what it adds to that of c."""
    q, d_rows = given.queries(rows), d_output[:, :, rows].to(given.dtype)
    shares = given.shares(q)
    found.of_shares(rows, d_rows @ context.mT, shares, q)
    return shares.mT @ d_rows


def _key_gradients(
    given: ShareInputs,
    found: ShareGradients,
    now: slice,
    log_norm: torch.Tensor,
    d_context: torch.Tensor,
    common: torch.Tensor,
) -> None:
    """Finds those of a block of keys and values."""
    k = given.keys(now)
    weights = _weights(given.logits(k, now), log_norm)
    found.of_values(now, weights @ d_context)
    found.of_logits(now, (given.values(now) @ d_context.mT).sub_(common).mul_(weights), k)
