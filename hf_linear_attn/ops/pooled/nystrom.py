"""Nystrom approximation of softmax attention through landmarks, Nystromformer (arXiv:2102.03902).

y = F pinv(A) B V, F = softmax(s Q K~^T), A = softmax(s Q~ K~^T), B = softmax(s Q~ K^T). B V is exact attention of
the landmark queries Q~; F pinv(A) carries it over to all queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.compaction import take_tokens
from hf_linear_attn.ops.base.masking import invert_permutation, pads_first_permutation, safe_masked_fill
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.pooled.pooling import attend_pooled, even_segment_mean

__all__ = ["CENTROIDS", "OWN_QUERIES", "SEGMENT_MEANS", "iterative_pinv", "nystrom_attention", "rank_convolution"]

# What the landmarks of a head are. As published: means of segments of queries (Q~) and of keys (K~). Or queries
# alone, Q~ = K~ with the kernel softmax_j(s q.c_j - s |c_j|^2 / 2): segment means of queries, or given centroids.
SEGMENT_MEANS, OWN_QUERIES, CENTROIDS = 0, 1, 2


def iterative_pinv(matrix: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """Moore-Penrose inverse by a third-order iteration, each matrix started from a scale of its own.

    Z <- Z/4 (13 I - AZ (15 I - AZ (7 I - AZ))) from Z = A^T / (norm1(A) norminf(A)), in float32 at least. Few
    iterations leave the smallest singular values behind, which regularises the inverse.

    Args:
        matrix: `[..., m, m]`, non-negative and not 0.
        num_iterations: 6 in the paper.

    Returns:
        `[..., m, m]`, float32 at least.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        scale = matrix.sum(-2).amax(-1) * matrix.sum(-1).amax(-1)
        shape, matrix = matrix.shape, matrix.reshape(-1, *matrix.shape[-2:])
        # Of -Z, whose polynomial has no minus: a product and its sum are one call, forward and backward.
        inverse = matrix.mT / -scale.reshape(-1, 1, 1)
        for _ in range(num_iterations):
            product = torch.bmm(matrix, inverse)
            inner = torch.baddbmm(15 * identity, product, product + 7 * identity)
            inverse = torch.bmm(inverse, torch.baddbmm(13 * identity, product, inner)).div_(4)
    return -inverse.view(shape)


def nystrom_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_landmarks: int,
    num_iterations: int,
    scaling: float,
    token_mask: torch.Tensor | None = None,
    form: torch.Tensor | None = None,
    centroids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bidirectional attention through m landmarks; exact in batch rows of at most m real tokens.

    A segment is a run of real tokens: the one of rank r is in segment r m // n_real.

    Args:
        q: `[B, H, Tq, D]`, the last Tq tokens.
        k: `[B, H, Tk, D]`.
        v: `[B, H, Tk, D]`.
        num_landmarks: m.
        num_iterations: of `iterative_pinv`.
        scaling: factor of the logits.
        token_mask: bool `[B, Tk]`, True for a real token, or None.
        form: long `[H]`, the landmarks of each head; None for `SEGMENT_MEANS` in all.
        centroids: `[H, m, D]`, the landmarks of heads with `CENTROIDS`; needed when `form` is given.

    Returns:
        `[B, H, Tq, D]` in the query's dtype; finite at padded tokens, 0 where no token is real.

    Raises:
        ValueError: for more queries than keys.
    """
    q_len, k_len, m = q.shape[2], k.shape[2], num_landmarks
    if q_len > k_len:
        raise ValueError(f"Nystrom attention needs Tq <= Tk, got Tq={q_len} and Tk={k_len}.")
    query_mask = visible = None
    if token_mask is None and is_exported():  # which length is short is then a question of each row
        token_mask = torch.ones(k.shape[0], k_len, dtype=torch.bool, device=k.device)
    if token_mask is not None:
        n_keys, query_mask = token_mask.sum(-1), token_mask[:, k_len - q_len :]
        q, k, v = safe_masked_fill(q, query_mask), safe_masked_fill(k, token_mask), safe_masked_fill(v, token_mask)
        visible = (token_mask | (n_keys == 0)[:, None])[:, None, None]  # without any key: values are 0, so is the mean
    if not is_exported() and min(q_len, k_len) <= m:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling)

    q_marks, k_marks = even_segment_mean(q, m, query_mask), even_segment_mean(k, m, token_mask)  # [B, H, m, D]
    full = q_marks.dtype  # float32 at least: what becomes of landmarks is as good as what they come from
    bias = torch.zeros((), dtype=full, device=q.device)
    if form is not None and centroids is not None:
        form = form[:, None, None]
        q_marks = torch.where(form == CENTROIDS, centroids.to(full), q_marks)
        k_marks = torch.where(form == SEGMENT_MEANS, k_marks, q_marks)
        bias = (-scaling / 2 * k_marks.square().sum(-1)).masked_fill(form[:, 0] == SEGMENT_MEANS, 0)[:, :, None]
    with torch.autocast(q.device.type, enabled=False):
        mixed = F.scaled_dot_product_attention(q_marks, k.to(full), v.to(full), attn_mask=visible, scale=scaling)  # B V
        logits = scaling * q_marks @ k_marks.mT + bias
        mixed = iterative_pinv(logits.softmax(-1), num_iterations) @ mixed
    if token_mask is not None:
        # Rows of at most m tokens: their keys and values themselves.
        first = pads_first_permutation(~token_mask)
        first = (F.pad(first, (0, m)) if is_exported() else first)[:, :m]
        short = (n_keys <= m)[:, None, None, None]
        k_marks = torch.where(short, take_tokens(k, first).to(full), k_marks)
        mixed = torch.where(short, take_tokens(v, first).to(full), mixed)
        token = torch.arange(m, device=k.device) < n_keys.clamp(min=1)[:, None]
        token = token[:, None, None]
    if form is None:
        return attend_pooled(q, k_marks, mixed, None if token_mask is None else token, scaling)
    if token_mask is not None:
        bias = bias.masked_fill(short, 0).masked_fill(~token, float("-inf"))
    return attend_pooled(q, k_marks, mixed, bias.expand(q.shape[0], q.shape[1], 1, m), scaling)


def rank_convolution(x: torch.Tensor, weight: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Convolution along the ranks of real tokens, one kernel a head for all its channels.

    Args:
        x: `[B, H, T, D]`.
        weight: `[H, K]`, K odd; its middle belongs to the token itself.
        token_mask: bool `[B, T]`, True for a real token, or None.

    Returns:
        `[B, H, T, D]`, 0 at padding.
    """
    order = None if token_mask is None else pads_first_permutation(token_mask)
    if order is not None:
        x = take_tokens(safe_masked_fill(x, token_mask), order)
    kernel = weight.to(x.dtype)[:, None, :, None]
    x = F.conv2d(x, kernel, padding=(weight.shape[1] // 2, 0), groups=x.shape[1])
    if order is not None:
        x = safe_masked_fill(take_tokens(x, invert_permutation(order)), token_mask)
    return x
