"""Hedgehog's feature map, softmax(W x + b) over features, with starts that estimate e^{q . k} by centroids.

Features u = W x + b `[B, H, T, F]` of a head take one of three forms:

- `PUBLISHED`: each half of them is normalised, `[softmax(u_1), softmax(u_2)]` (arXiv:2402.04347, u_2 = -u_1).
- `KEY_CENTROIDS`: e^{s q . k} ~ sum_c e^{s q . C_c} p(c | k) for centroids C of the keys.
- `QUERY_CENTROIDS`: e^{s q . k} ~ sum_c p(c | q) e^{s C_c . k} for centroids C of the queries.

p(c | x) = softmax_c(-beta |x - C_c|^2) is softmax(W x + b) with W = 2 beta C, b = -beta |C|^2.
"""

from __future__ import annotations

import torch

from hf_linear_attn.ops.base.numerics import exp_
from hf_linear_attn.ops.features.maps import Features, accumulation_dtype, gaussian_orthogonal
from hf_linear_attn.ops.starts.calibration import kmeans

__all__ = ["KEY_CENTROIDS", "PUBLISHED", "QUERY_CENTROIDS", "centroid_starts", "published_map", "softmax_map"]

PUBLISHED, KEY_CENTROIDS, QUERY_CENTROIDS = range(3)

Affine = tuple[torch.Tensor, torch.Tensor]  # weight [H, F, D], bias [H, F]
Start = dict[str, torch.Tensor]

_SMALLEST_SPREAD = 1e-3  # of the mean square of the tokens
_SHARPNESS = 8.0  # beta times twice the mean squared distance to the nearest centroid; 4 to 64 are within 4 %


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


def centroid_starts(q: torch.Tensor, k: torch.Tensor, num_features: int, scaling: float) -> list[Start]:
    """The two centroid forms as values of `query_weight`, `query_bias`, `key_weight`, `key_bias` and `form`.

    Args:
        q, k: the queries and keys of each head, `[H, tokens, D]`.
        num_features: F, the number of centroids.
        scaling: s, factor of the softmax logits.
    """
    share_of_key, logit_of_query = _centroid_maps(k, num_features, scaling)
    share_of_query, logit_of_key = _centroid_maps(q, num_features, scaling)
    form = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
    names = ("query_weight", "query_bias", "key_weight", "key_bias", "form")
    return [
        dict(zip(names, (*logit_of_query, *share_of_key, form + KEY_CENTROIDS), strict=True)),
        dict(zip(names, (*share_of_query, *logit_of_key, form + QUERY_CENTROIDS), strict=True)),
    ]


def _centroid_maps(x: torch.Tensor, num_features: int, scaling: float) -> tuple[Affine, Affine]:
    """With centroids C of `x` `[H, tokens, D]`: p(c | x), and the logits of C with what `x` is multiplied by."""
    centroids = kmeans(x, num_features, seed=0)
    spread = torch.cdist(x, centroids).amin(-1).square().mean(-1)
    # Tokens that are centroids would make logits that float32 cannot tell apart.
    spread = spread.maximum(_SMALLEST_SPREAD * x.square().sum(-1).mean(-1)).clamp(min=1e-6)
    beta = (0.5 * _SHARPNESS / spread)[:, None]
    share = 2 * beta[..., None] * centroids, -beta * centroids.square().sum(-1)
    return share, (scaling * centroids, torch.zeros_like(share[1]))
