"""What the global tokens of Longformer see: everything, through projections of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.ops.base.compaction import CompactedCall, GlobalTokens
from hf_linear_attn.ops.base.masking import causal_mask, gather_tokens
from hf_linear_attn.ops.window.attention import at_least_two, attend_projected

__all__ = ["affine", "check_hidden", "check_marks", "keep_old", "rows_over_all", "rows_over_first"]

# Length of the basis: the sum of a row's weight and a large bias rounds off little of the weight. A power of two.
_BASIS = 256.0


def affine(layer: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `[out, C]` and bias `[out]` of a linear layer, as its forward applies them.

    A wrapper around the layer (LoRA, say) adds to its weight without changing it, a quantized weight knows little but
    to be multiplied, and an offloaded one comes only when the layer runs. So anything else than a plain `nn.Linear`
    whose weight is at hand is asked what it does to the basis of its input.

    Args:
        layer: maps `[..., C]` to `[..., out]`, affinely.
        like: a tensor `[..., C]` of the input's dtype and device.
    """
    plain = nn.Parameter, torch.Tensor
    if type(layer) is nn.Linear and type(layer.weight) in plain and not layer.weight.is_meta:
        return layer.weight, layer.bias
    bias = layer(like.new_zeros(1, like.shape[-1]))
    basis = _BASIS * torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return (layer(basis) - bias).t() / _BASIS, bias[0]


def check_hidden(q_len: int, token_mask: torch.Tensor | None, k_len: int, count: int, marked: bool) -> None:
    """Check that a call with Tq < Tk has the hidden states that the rows of its global tokens look at.

    Args:
        q_len: Tq.
        token_mask: bool `[B, Tk]` or None.
        k_len: Tk.
        count: number of first tokens that are global.
        marked: whether the call names its global tokens itself.

    Raises:
        ValueError: when some of those are before the queries and others are not.
    """
    before = k_len - q_len
    if before == 0:
        return
    if token_mask is None or marked:
        complete = before >= count and not marked
    else:
        real = token_mask[:, :before].sum(-1)
        complete = count == 1 or bool(((real == 0) | (real >= count)).all())
    if not complete:
        raise ValueError(
            f"Global tokens need the hidden states of all {k_len} keys, got those of {q_len} queries. Allowed: "
            f"Tq == Tk; or no global_mask and none or all of the first {count} tokens before the queries."
        )


def check_marks(mask: torch.Tensor | None, batch: int, q_len: int, projects: bool, decodes: bool) -> None:
    """Check the mask of a call's global tokens.

    Args:
        mask: bool `[B, Tq]` or None.
        batch: B.
        q_len: Tq.
        projects: whether the layer has projections of its own for global tokens.
        decodes: whether the call has a decode state.

    Raises:
        ValueError: for a mask that the layer cannot honor, or of another shape.
    """
    if mask is None:
        return
    if not projects:
        raise ValueError("A global_mask needs projections: num_global_tokens >= 1, and no rotary embeddings.")
    if decodes:
        raise ValueError("A global_mask does not go with a decode state: call with use_cache=False.")
    if tuple(mask.shape) != (batch, q_len):
        raise ValueError(f"global_mask must have shape {(batch, q_len)}, got {tuple(mask.shape)}.")


def keep_old(
    new: dict[str, torch.Tensor], tokens: GlobalTokens, state: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Per global token: its entry of `new` (`[B, H, G, D]` each) if it came with this call, else the state's."""
    if state is None:
        return new
    is_new = tokens.is_new[:, None, :, None]
    return {name: torch.where(is_new, x, state[name].to(x.dtype)) for name, x in new.items()}


def rows_over_all(
    call: CompactedCall,
    tokens: GlobalTokens,
    hidden: torch.Tensor,
    projections: Sequence[nn.Module],
    scaling: float,
    is_causal: bool,
) -> torch.Tensor:
    """Output `[B, H, G, D]` of the global tokens over all tokens of the call (causal: up to their own).

    `projections` are the query, key and value layers of the global tokens, `[..., C]` to `[..., H * D]`.
    """
    hidden = _clean(hidden, call)  # in the call's own order, which makes no difference to keys
    place = call.origin(tokens.position)
    real = call.query_mask
    allowed = torch.ones_like(hidden[:, :, 0], dtype=torch.bool) if real is None else real
    allowed = allowed[:, None, None, :]
    if is_causal:
        allowed = allowed & (torch.arange(hidden.shape[1], device=hidden.device) <= place[:, None, :, None])
    query, key, value = projections
    q = _project(gather_tokens(hidden, place), query, call.q.shape[1])
    return attend_projected(q, hidden, affine(key, hidden), affine(value, hidden), allowed, scaling)


def rows_over_first(
    call: CompactedCall,
    tokens: GlobalTokens,
    hidden: torch.Tensor,
    projections: Sequence[nn.Module],
    scaling: float,
    state: dict[str, torch.Tensor] | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same for the first tokens of a decoder, whose whole past is global as well.

    Returns:
        the output, and the projected keys and values of the global tokens seen so far, for the state.
    """
    hidden = gather_tokens(_clean(hidden, call), call.origin(tokens.position))  # [B, G, C]
    q, k, v = (_project(hidden, layer, call.q.shape[1]) for layer in projections)
    kept = keep_old({"global_key_projected": k, "global_value_projected": v}, tokens, state)
    mask = causal_mask(q.shape[2], q.shape[2], q.device)
    keys = kept["global_key_projected"], kept["global_value_projected"]
    return F.scaled_dot_product_attention(q, *keys, attn_mask=mask, scale=scaling), kept


def _project(hidden: torch.Tensor, layer: nn.Module, num_heads: int) -> torch.Tensor:
    rows = hidden.shape[1]
    return layer(at_least_two(hidden, 1))[:, :rows].unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _clean(hidden: torch.Tensor, call: CompactedCall) -> torch.Tensor:
    """The call's hidden states `[B, T, C]`, 0 at padding."""
    return hidden if call.query_mask is None else hidden.masked_fill(~call.query_mask[..., None], 0)
