"""Measuring a start on real inputs: error against softmax attention, head by head."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

__all__ = ["Row", "balancing_maps", "choose_per_head", "head_errors", "mean_squared_sum", "real_rows"]

Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v of one sequence, each [1, H, T, D], no padding

_MAX_TOKENS = 1024  # softmax attention over a row is quadratic; this much of it is enough to compare starts


def real_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_padding: torch.Tensor | None) -> list[Row]:
    """The sequences of a batch without their padding, in float32, at most their first 1024 tokens.

    Args:
        q, k, v: `[B, H, T, D]`.
        key_padding: bool `[B, T]`, True for a real token, or None.

    Raises:
        ValueError: when queries and keys are not the same tokens.
    """
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"Calibration needs self-attention inputs, got {q.shape[2]} queries, {k.shape[2]} keys.")
    rows = []
    for b in range(q.shape[0]):
        keep = slice(None) if key_padding is None else key_padding[b]
        row = tuple(x[b : b + 1, :, keep][:, :, :_MAX_TOKENS].detach().float() for x in (q, k, v))
        if row[0].shape[2]:
            rows.append((row[0], row[1], row[2]))
    return rows


def head_errors(
    attend: Callable[[Row], torch.Tensor], rows: Iterable[Row], *, is_causal: bool, scaling: float
) -> torch.Tensor:
    """Squared output error against softmax attention, relative to its squared norm.

    Args:
        attend: the attention to judge, `(q, k, v) -> [1, H, T, D]`.
        rows: sequences without padding.

    Returns:
        `[H]`; not finite where the attention is not.
    """
    error, norm = torch.zeros(()), torch.zeros(())
    for row in rows:
        exact = F.scaled_dot_product_attention(*row, is_causal=is_causal, scale=scaling)
        error = error.to(exact.device) + (attend(row) - exact).square().sum((0, 2, 3))
        norm = norm.to(exact.device) + exact.square().sum((0, 2, 3))
    return error / norm


def choose_per_head(errors: list[torch.Tensor]) -> torch.Tensor:
    """Index of the candidate with the smallest error in each head; the first one wins ties and non-numbers.

    Args:
        errors: one `[H]` tensor per candidate, the method as published first.

    Returns:
        long `[H]`.
    """
    table = torch.stack(errors)
    return table.nan_to_num(nan=float("inf")).argmin(0)


def mean_squared_sum(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Mean of |q_i + k_j|^2 over all pairs, `[H]`, for q, k `[H, tokens, D]`."""
    cross = (q.mean(1) * k.mean(1)).sum(-1)
    return q.square().sum(-1).mean(1) + k.square().sum(-1).mean(1) + 2 * cross


def balancing_maps(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M and M^-T that make E|q M|^2 + E|k M^-T|^2 smallest, for centred q, k `[H, tokens, D]`."""
    q_moment, k_moment = (x.double().mT @ x.double() / x.shape[1] for x in (q, k))
    ridge = 1e-3 * torch.eye(q.shape[-1], dtype=torch.double, device=q.device)
    q_moment, k_moment = (
        x + ridge * x.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-12) for x in (q_moment, k_moment)
    )
    # G = M M^T solves G q_moment G = k_moment: the geometric mean of q_moment^-1 and k_moment.
    root, inverse_root = _symmetric_power(q_moment, 0.5), _symmetric_power(q_moment, -0.5)
    g = inverse_root @ _symmetric_power(root @ k_moment @ root, 0.5) @ inverse_root
    return _symmetric_power(g, 0.5).to(q.dtype), _symmetric_power(g, -0.5).to(q.dtype)


def _symmetric_power(matrix: torch.Tensor, power: float, *, floor: float = 1e-6) -> torch.Tensor:
    """A power of symmetric positive matrices, eigenvalues raised to at least `floor` of the largest.

    Args:
        matrix: `[..., D, D]`.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=1e-12).maximum(floor * values[..., -1:]).pow(power)
    return (vectors * values[..., None, :]) @ vectors.mT
