"""Blocks of what feature-wise softmax attention takes: shares of queries, logits of keys, values, and their gradients.

A query's shares of the features are softmax(W_q q + b), a key's logits W_k k. Both are computed for one block of tokens
at a time, here, so that those of a long sequence are never held and a block fits a CPU's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_linear_attn.ops.base.masking import safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype, exp_
from hf_linear_attn.ops.base.tracing import is_exported

__all__ = ["ShareGradients", "ShareInputs"]


@dataclass(frozen=True)
class ShareInputs:
    """The tensors of one call; every method is about one block of tokens, and gives the dtype of the sums.

    Attributes:
        q: `[B, H, Tq, D]`; k, v: `[B, H, Tk, D]`.
        token_mask, query_mask: bool `[B, Tk]` and `[B, Tq]`, or None; the content of other tokens is never used.
        query_weight, key_weight: `[H, F, D]`, or None for the identity.
        query_bias: `[H, F]`, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    token_mask: torch.Tensor | None
    query_mask: torch.Tensor | None
    query_weight: torch.Tensor | None
    query_bias: torch.Tensor | None
    key_weight: torch.Tensor | None

    def arguments(self) -> tuple[Any, ...]:
        """The attributes, in order."""
        tokens = self.q, self.k, self.v, self.token_mask, self.query_mask
        return *tokens, self.query_weight, self.query_bias, self.key_weight

    @property
    def dtype(self) -> torch.dtype:
        """That of all sums."""
        return accumulation_dtype(self.v.dtype)

    @property
    def num_features(self) -> int:
        """F."""
        return self.k.shape[-1] if self.key_weight is None else self.key_weight.shape[1]

    def queries(self, rows: slice) -> torch.Tensor:
        real = None if self.query_mask is None else self.query_mask[:, rows]
        return safe_masked_fill(self.q[:, :, rows].to(self.dtype), real)

    def keys(self, now: slice) -> torch.Tensor:
        return safe_masked_fill(self.k[:, :, now].to(self.dtype), self._real(now))

    def values(self, now: slice) -> torch.Tensor:
        return safe_masked_fill(self.v[:, :, now].to(self.dtype), self._real(now))

    def share_logits(self, q: torch.Tensor) -> torch.Tensor:
        """W_q q + b `[B, H, block, F]` of `queries`."""
        weight, bias = self.query_weight, self.query_bias
        if weight is None or bias is None:
            x = q if weight is None else q @ weight.mT
            return x if bias is None else x + bias[:, None]
        if is_exported():
            return torch.einsum("bhtd,hfd->bhtf", q, weight) + bias[:, None]
        # Added in the product, which costs nothing there.
        bias, weight = (x.expand(q.shape[0], *x.shape).flatten(0, 1) for x in (bias[:, None], weight))
        return torch.baddbmm(bias, q.flatten(0, 1), weight.mT).unflatten(0, q.shape[:2])

    def shares(self, q: torch.Tensor) -> torch.Tensor:
        """Softmax of `share_logits`, without gradients."""
        return _softmax(self.share_logits(q))

    def logits(self, k: torch.Tensor, now: slice) -> torch.Tensor:
        """W_k k `[B, H, block, F]` of `keys`, `LOG_ZERO` at padded ones."""
        logits, real = k if self.key_weight is None else k @ self.key_weight.mT, self._real(now)
        return logits if real is None else logits.masked_fill(~real[:, None, :, None], LOG_ZERO)

    def _real(self, now: slice) -> torch.Tensor | None:
        return None if self.token_mask is None else self.token_mask[:, now]


def _softmax(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension of `[B, H, T, F]`; laid out in memory as x."""
    if x.device.type != "cpu":
        return x.softmax(-1)
    if x.stride(1) < x.stride(2):  # heads of a token are neighbors: so have to be the sums, which are laid out anew
        return _softmax(x.transpose(1, 2)).transpose(1, 2)
    shares = exp_(x - x.amax(-1, keepdim=True))
    return shares.div_(shares.sum(-1, keepdim=True))


class ShareGradients:
    """Gradients of the tensors of a `ShareInputs`, filled block by block."""

    def __init__(self, inputs: ShareInputs) -> None:
        self._inputs = inputs
        self._q, self._k, self._v = (torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v))
        weights = inputs.query_weight, inputs.query_bias, inputs.key_weight
        self._query_weight, self._query_bias, self._key_weight = (
            None if x is None else torch.zeros_like(x) for x in weights
        )

    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        """For `ShareInputs.arguments`, in order."""
        return self._q, self._k, self._v, None, None, self._query_weight, self._query_bias, self._key_weight

    def of_shares(self, rows: slice, d_shares: torch.Tensor, shares: torch.Tensor, q: torch.Tensor) -> None:
        """Given that of the shares of a block of queries, which is used up."""
        given = self._inputs
        d_shares = d_shares.sub_((d_shares * shares).sum(-1, keepdim=True)).mul_(shares)
        if self._query_bias is not None:
            self._query_bias += d_shares.sum((0, 2))
        if given.query_weight is not None and self._query_weight is not None:
            self._query_weight += (d_shares.mT @ q).sum(0)
            d_shares = d_shares @ given.query_weight
        real = None if given.query_mask is None else given.query_mask[:, rows]
        self._q[:, :, rows] = safe_masked_fill(d_shares, real)

    def of_logits(self, now: slice, d_logits: torch.Tensor, k: torch.Tensor) -> None:
        """Given that of the logits of a block of keys, 0 at padded ones."""
        given = self._inputs
        if given.key_weight is not None and self._key_weight is not None:
            self._key_weight += (d_logits.mT @ k).sum(0)
            d_logits = d_logits @ given.key_weight
        self._k[:, :, now] = d_logits

    def of_values(self, now: slice, d_values: torch.Tensor) -> None:
        """Given that of a block of values."""
        real = None if self._inputs.token_mask is None else self._inputs.token_mask[:, now]
        self._v[:, :, now] = safe_masked_fill(d_values, real)
