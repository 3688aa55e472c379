"""Attention whose weights need all logits of a row: in chunks of queries, one chunk's logits in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from hf_linear_attn.ops.base.compaction import CompactedCall
from hf_linear_attn.ops.base.numerics import full_precision
from hf_linear_attn.ops.base.tracing import segments

__all__ = ["Weights", "attend_in_chunks", "count_zeros", "masked_softmax", "row_logits"]

# Upper bound on the weights of one chunk of queries: 1 MiB in fp32 on CPU, where passes over a cached chunk are five
# times as fast as over memory, else 64 MiB. While training, autograd keeps all of them.
CPU_CHUNK_ELEMENTS = 1 << 18
CHUNK_ELEMENTS = 1 << 24

Weights = Callable[[slice, torch.Tensor], torch.Tensor]
"""`(rows, allowed) -> [B, H, rows, Tk]`: the attention weights of a slice of the query rows, of which `allowed` (bool,
broadcastable to that shape) says what each may see."""


def row_logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`q k^T` in float32 at least, as softmax kernels keep it: a logit in half precision is off by u times itself.

    Args:
        q: `[B, H, rows, D]`.
        k: `[B, H, Tk, D]`, float32 at least.

    Returns:
        `[B, H, rows, Tk]`.
    """
    with full_precision(k):
        return q.to(k.dtype) @ k.mT


def masked_softmax(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension, in float32 at least; 0 where not allowed, rows without any key included.

    Args:
        logits: `[..., Tk]`.
        allowed: bool, broadcastable to `logits`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # A finite fill and a second mask, not -inf: rows without any key have finite gradients.
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(~allowed, 0)


def attend_in_chunks(call: CompactedCall, weights: Weights, *, is_causal: bool) -> torch.Tensor:
    """Weighted sums of the values of a call.

    Args:
        call: the call, padding in front.
        weights: of its query rows.
        is_causal: whether a row sees no later key.

    Returns:
        `[B, H, Tq, D]`, in the order of `call`.
    """
    chunks = _chunks(call, is_causal)
    outputs = [weights(rows, allowed).to(call.v.dtype) @ call.v for rows, allowed in chunks]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def count_zeros(call: CompactedCall, weights: Weights, *, is_causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """How many weights of a call are exactly 0, and how many real queries may give to real keys: `[H]` each."""
    heads, q_len, k_len = call.q.shape[1], call.q.shape[2], call.k.shape[2]
    zeros, allowed_ones = torch.zeros(2, heads, dtype=torch.long, device=call.q.device)
    is_query = (call.rank[:, k_len - q_len :] >= 0)[:, None, :, None]
    for rows, allowed in _chunks(call, is_causal):
        found = weights(rows, allowed)
        counted = (allowed & is_query[:, :, rows]).expand_as(found)
        zeros += ((found == 0) & counted).sum((0, 2, 3))
        allowed_ones += counted.sum((0, 2, 3))
    return zeros, allowed_ones


def _chunks(call: CompactedCall, is_causal: bool) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of the query rows, and which keys each row of them may see (bool `[B or 1, 1, rows or 1, Tk]`)."""
    (B, H, q_len, _), k_len, device = call.q.shape, call.k.shape[2], call.q.device
    elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS
    real = (call.rank >= 0)[:, None, None, :]
    places = torch.arange(k_len, device=device)
    for rows in segments(q_len, elements, B * H * max(1, k_len)):
        yield rows, real & (places <= places[k_len - q_len :][rows, None]) if is_causal else real
