"""Linear attention that forgets in both directions, for encoders: two causal scans, one of them over the sequence read
from its end, whose sums are added before the quotient.

y_i = phi(q_i) (S_i + R_i) / (phi(q_i) . (z_i + u_i)),
S_i = diag(exp(g_i)) S_{i-1} + w_i phi(k_i) v_i^T,    R_i = diag(exp(g_i)) (R_{i+1} + w_{i+1} phi(k_{i+1}) v_{i+1}^T),

z and u likewise: a token's own key counts once, in S. A later key j reaches row i with weight w_j exp(g_i + .. +
g_{j-1}), as an earlier one does with w_j exp(g_{j+1} + .. + g_i).
"""

from __future__ import annotations

from typing import Any

import torch

from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.linear import blocks, plain
from hf_linear_attn.ops.linear.layout import Call

__all__ = ["attend"]


def attend(call: Call, *, recorded: bool) -> torch.Tensor:
    """Attend, checked arguments given, query row r at position Tk - Tq + r: `[B, H, Tq, D]`.

    Args:
        call: with decay, without a state; `is_causal` does not count.
        recorded: whether autograd has to record it (`plain`).

    Raises:
        ValueError: in a program of any length.
    """
    if is_exported() and isinstance(call.k.shape[2], torch.SymInt):
        raise ValueError(
            "Decay in both directions exports at one length only: sums go from chunk to chunk. Allowed with any "
            "length: 'linear', or rfa with gate=False."
        )
    recorded = recorded or not 1 < call.q.shape[2] == call.k.shape[2]
    sums, peak = _sums(call, recorded, own=True)
    later, later_peak = (None if x is None else x.flip(2) for x in _sums(_reversed(call), recorded, own=False))
    assert later is not None
    if peak is None or later_peak is None:
        sums = sums + later
    else:
        highest = torch.maximum(peak, later_peak)
        left, later_left = ((x - highest).exp()[..., None] for x in (peak, later_peak))
        sums = torch.addcmul(sums * left, later, later_left)
    if not call.options.normalized:
        return sums.to(call.v.dtype)
    return plain.quotient(call, sums[..., :-1], sums[..., -1:], None, None)[0]


def _sums(call: Call, recorded: bool, *, own: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Numerators, denominators beside them, of a causal scan, and their log scale: `[B, H, Tq]` or None for 0."""
    options = call.options._replace(is_causal=True, divided=False, own=own)
    return (plain if recorded else blocks).attend(Call(options, call.tensors))[:2]


def _reversed(call: Call) -> Call:
    """The call on the tokens that its queries stand at, the last one first: no row sees others."""
    q, k, v, log_weight, decay_tokens, token_mask, query_mask, *rest = call.tensors
    length = q.shape[2]

    def last(x: Any, dim: int = 2) -> Any:
        return None if x is None else x.narrow(dim, x.shape[dim] - length, length).flip(dim)

    heads, masks = (q, k, v, log_weight, decay_tokens), (token_mask, query_mask)
    return Call(call.options, (*map(last, heads), *(last(x, 1) for x in masks), *rest))
