"""Hedgehog's feature map, softmax(W x + b) over features, with starts that estimate e^{q . k} by centroids.

Features u = W x + b `[B, H, T, F]` of a head take one of three forms:

- `PUBLISHED`: each half of them is normalized, `[softmax(u_1), softmax(u_2)]` (arXiv:2402.04347, u_2 = -u_1).
- `KEY_CENTROIDS`: e^{s q . k} ~ sum_c e^{s q . C_c} p(c | k) for centroids C of the keys.
- `QUERY_CENTROIDS`: e^{s q . k} ~ sum_c p(c | q) e^{s C_c . k} for centroids C of the queries.

p(c | x) = softmax_c(-beta |x - C_c|^2) is softmax(W x + b) with W = 2 beta C, b = -beta |C|^2.
"""

from __future__ import annotations

import torch

from hf_linear_attn.ops.base.numerics import accumulation_dtype, exp_
from hf_linear_attn.ops.features.maps import Features, gaussian_orthogonal

__all__ = ["KEY_CENTROIDS", "PUBLISHED", "QUERY_CENTROIDS", "Affine", "published_map", "softmax_map"]

PUBLISHED, KEY_CENTROIDS, QUERY_CENTROIDS = range(3)

Affine = tuple[torch.Tensor, torch.Tensor]  # weight [H, F, D], bias [H, F]


def softmax_map(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, form: torch.Tensor, exp_form: int
) -> Features:
    """Features of `x`, up to the returned log scale.

    Args:
        x: `[B, H, T, D]`.
        weight: `[H, F, D]`, F even.
        bias: `[H, F]`.
        form: long `[H]`, each head's form.
        exp_form: heads of this form have features e^{W x + b}; the others' sum to 1 (to 1 in each half).

    Returns:
        features `[B, H, T, F]` and log scale `[B, H, T]`, 0 but in heads of `exp_form`.
    """
    dtype = accumulation_dtype(x.dtype)
    u = x.to(dtype) @ weight.to(dtype).mT + bias.to(dtype)[:, None]
    u = u.unflatten(-1, (2, -1))
    peak = u.detach().amax(-1)  # [B, H, T, 2]; it cancels
    terms = exp_(u - peak[..., None])  # the only exponentials of F numbers a token
    halves = terms.sum(-1)
    whole = (halves.log() + peak).logsumexp(-1)
    split = (form == PUBLISHED)[:, None, None]
    factor = torch.where(split, halves.reciprocal(), (peak - whole[..., None]).exp())
    features = (terms * factor[..., None]).flatten(-2)
    return features, torch.where((form == exp_form)[:, None], whole, 0.0)


def published_map(num_heads: int, num_features: int, dim: int, seed: int) -> Affine:
    """The start of the paper, W = [I; -I] and b = 0; rows beyond the identity's are random directions.

    Args:
        num_heads: H.
        num_features: F, even.
        dim: D.
        seed: decides the random directions.
    """
    half = torch.eye(dim, device="cpu")[: num_features // 2]
    missing = num_features // 2 - half.shape[0]
    if missing:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        directions = gaussian_orthogonal(missing, dim, generator)
        half = torch.cat([half, directions / directions.norm(dim=-1, keepdim=True)])
    weight = torch.cat([half, -half]).expand(num_heads, -1, -1)
    return weight, torch.zeros(num_heads, num_features, device="cpu")
