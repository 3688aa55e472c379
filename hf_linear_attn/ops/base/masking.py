"""Masks and positions that attention ops need: padding, ranks among real tokens, right-aligned causality.

`token_mask` is a bool tensor `[B, T]`, True for a real token, or None when all tokens are real.
"""

from __future__ import annotations

import torch

__all__ = [
    "causal_mask",
    "gather_tokens",
    "invert_permutation",
    "is_on_host",
    "known_all_real",
    "pads_first_permutation",
    "query_mask_of",
    "real_token_rank",
    "safe_masked_fill",
]


def is_on_host(x: torch.Tensor) -> bool:
    """Whether to read a value of `x` waits for no device."""
    return x.device.type == "cpu"


def known_all_real(token_mask: torch.Tensor | None) -> bool:
    """Whether no token is padding, as far as that is known: neither a traced graph nor a mask on a GPU is asked."""
    if token_mask is None:
        return True
    return is_on_host(token_mask) and not torch.compiler.is_compiling() and bool(token_mask.all())


def safe_masked_fill(x: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Set padded tokens to 0 by selection, so that inf, nan or 1e9 in them vanishes (0 * nan is nan).

    Args:
        x: `[B, H, T, D]`.
        token_mask: bool `[B, T]`, or None, which returns `x` itself.

    Returns:
        `[B, H, T, D]`.
    """
    if token_mask is None:
        return x
    return x.masked_fill(~token_mask[:, None, :, None], 0)


def query_mask_of(token_mask: torch.Tensor | None, q_len: int, is_causal: bool) -> torch.Tensor | None:
    """The token mask of the queries: the last `q_len` of the key positions when causal or equally many.

    Args:
        token_mask: bool `[B, Tk]`, or None.
        q_len: number of queries Tq.
        is_causal: whether queries are right-aligned with the keys.

    Returns:
        bool `[B, Tq]`, or None when the keys' mask says nothing about the queries.
    """
    if token_mask is None or q_len > token_mask.shape[1]:
        return None
    if q_len == token_mask.shape[1]:
        return token_mask
    return token_mask[:, -q_len:] if is_causal else None


def real_token_rank(token_mask: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """Position of each token among the real tokens of its row, `cumsum(mask) - 1`, clamped at 0.

    Args:
        token_mask: bool `[B, T]`.
        length: T, checked when given.

    Returns:
        long `[B, T]`; a padded token has the rank of the last real token before it (0 when there is none).

    Raises:
        ValueError: when `length` is not the mask's.
    """
    if length is not None and token_mask.shape[-1] != length:
        raise ValueError(f"token_mask covers {token_mask.shape[-1]} tokens, the sequence has {length}.")
    return (token_mask.long().cumsum(-1) - 1).clamp_(min=0)


def pads_first_permutation(token_mask: torch.Tensor) -> torch.Tensor:
    """Indices that move the padded tokens of each row to the front and keep the order of the real ones.

    Args:
        token_mask: bool `[B, T]`.

    Returns:
        long `[B, T]`: token `perm[b, i]` goes to place i, so real tokens end up right-aligned.
    """
    # What a stable sort gives, in half its time and in operators that ONNX has.
    length, real = token_mask.shape[-1], token_mask.long().cumsum(-1)
    source = torch.arange(length, device=token_mask.device).expand_as(real)
    place = torch.where(token_mask, length - real[..., -1:] + real - 1, source - real)
    return torch.empty_like(place).scatter_(-1, place, source)


def invert_permutation(perm: torch.Tensor) -> torch.Tensor:
    """The inverse of each row's permutation, which brings gathered tokens back to their places.

    Args:
        perm: long `[B, T]`.

    Returns:
        long `[B, T]`.
    """
    places = torch.arange(perm.shape[-1], device=perm.device).expand_as(perm)
    return torch.empty_like(perm).scatter_(-1, perm, places)


def gather_tokens(x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """Reorder tokens by a permutation per batch row.

    Args:
        x: `[B, T]`, `[B, T, C]` (tokens in dimension 1) or `[B, H, T, D]` (tokens in dimension 2).
        perm: long `[B, T]`.

    Returns:
        a tensor of `x`'s shape with token `perm[b, i]` at place i.

    Raises:
        ValueError: for another number of dimensions.
    """
    if x.ndim == 2:
        return x.gather(1, perm)
    if x.ndim == 3:
        return x.gather(1, perm[:, :, None].expand(-1, -1, x.shape[2]))
    if x.ndim == 4:
        return x.gather(2, perm[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    raise ValueError(f"gather_tokens takes [B, T], [B, T, C] or [B, H, T, D], got shape {tuple(x.shape)}.")


def causal_mask(q_len: int, k_len: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Right-aligned causal mask: query row r sits at position `k_len - q_len + r`.

    Returns:
        bool `[q_len, k_len]`, True where the query may see the key.

    Raises:
        ValueError: when there are more queries than keys.
    """
    if q_len > k_len:
        raise ValueError(f"Causal attention needs q_len <= k_len, got q_len={q_len} and k_len={k_len}.")
    rows = torch.arange(k_len - q_len, k_len, device=device)
    return torch.arange(k_len, device=device)[None, :] <= rows[:, None]
