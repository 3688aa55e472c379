"""One decode step of linear attention: the new key joins the sums, and its query reads them."""

from __future__ import annotations

import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO, full_precision
from hf_linear_attn.ops.linear.layout import Call, State
from hf_linear_attn.ops.linear.plain import quotient

__all__ = ["attend"]


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor | None, State]:
    """Attend from one token to a state and itself, checked arguments given; returns what `plain.attend` does."""
    token = slice(0, 1)
    with full_precision(call.v):
        queries, log_scale = call.queries(call.q, token, call.parameters)  # [B, H, 1, F], [B, H, 1] or None
        features, weight, decay = call.keys(call.key_inputs(), token, call.parameters)
        value, real = call.values(token), call.real(token)
        left = None if decay is None else decay[:, :, 0]  # log of what is left of the sums, [B, H, F or 1]
        if call.log_scale is None or weight is None:
            kv = features.mT * value
            kv = kv + call.kv if left is None else torch.addcmul(kv, call.kv, left.exp()[..., None])
            return (queries @ kv).to(call.v.dtype), None, {"kv": kv}
        # Relative to the largest weight so far, which decays along with the sums.
        before = call.log_scale[..., None]  # [B, H, 1]
        weight = weight if real is None else weight.masked_fill(~real, LOG_ZERO)
        latest = before if left is None else before + left.detach().amax(-1, keepdim=True)
        peak = torch.maximum(latest, weight.detach())
        left = before - peak if left is None else left + (before - peak)
        left, added = left.exp(), (weight - peak).exp()
        features = features * (added if real is None else added.masked_fill(~real, 0))[..., None]
        kv = torch.addcmul(features.mT * value, call.kv, left[..., None])
        z = torch.addcmul(features[:, :, 0], call.z, left)
        output, normalizer = quotient(call, queries @ kv, queries @ z[..., None], peak, log_scale)
    return output, normalizer, {"kv": kv, "z": z, "log_scale": peak[..., 0]}
