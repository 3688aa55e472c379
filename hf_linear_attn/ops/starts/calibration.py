"""Measuring a start on real inputs: error against softmax attention, head by head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.features.softmax_map import KEY_CENTROIDS, QUERY_CENTROIDS, Affine

__all__ = [
    "Row",
    "Rows",
    "SelfAttentionCall",
    "balancing_maps",
    "centered_maps",
    "centroid_starts",
    "choose_per_head",
    "choose_start",
    "collect_rows",
    "error_meter",
    "head_errors",
    "head_tokens",
    "kmeans",
    "mean_squared_sum",
    "nonpositive_share",
    "principal_maps",
    "recorded_meter",
    "reducer_starts",
    "warn_of_nonpositive",
]

Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v of one sequence, each [1, H, T, D], no padding

# Softmax attention over a row is quadratic. What is read further than its calibration is another thing to a start: a
# linear tail fitted on 1,024 tokens of a decoder was three times as far off at 2,048 as one that saw them.
_MAX_TOKENS = 4096
# Shares of the mean query that the variance reducer tries. All of it is exact where the kernel is; a kernel flatter
# than exp, with part of it, is usually nearer.
_REDUCER_SHARES = (0.5, 0.7, 1.0)
_KMEANS_TOKENS = 4096  # centroids of so many tokens are as good as those of more
_KMEANS_ROUNDS = 10
_SMALLEST_SPREAD = 1e-3  # of the mean square of the tokens
_SHARPNESS = 8.0  # beta times twice the mean squared distance to the nearest centroid; 4 to 64 are within 4 %


class SelfAttentionCall(Protocol):
    """One recorded call: query, key, value `[B, H, T, D]`, token_mask bool `[B, T]` or None, and what softmax attention
    made of them, `[B, H, T, D]`, or None where that was not recorded."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    token_mask: torch.Tensor | None
    softmax_output: torch.Tensor | None


class Rows(list[Row]):
    """Sequences, and what softmax attention gives for each, `[1, H, T, D]`, or None where it has to be computed."""

    def __init__(self, rows: Iterable[Row], outputs: Iterable[torch.Tensor | None]) -> None:
        super().__init__(rows)
        self.outputs = list(outputs)


def collect_rows(batches: Iterable[SelfAttentionCall], max_tokens: int = _MAX_TOKENS) -> Rows:
    """The sequences of every call without their padding, in float32, at most their first `max_tokens` or 4096 tokens.

    Raises:
        ValueError: when queries and keys are not the same tokens.
    """
    rows: list[Row] = []
    outputs: list[torch.Tensor | None] = []
    most = min(max_tokens, _MAX_TOKENS)
    for call in batches:
        q, k, v, softmax = call.query, call.key, call.value, call.softmax_output
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"Calibration needs self-attention inputs, got {q.shape[2]} queries, {k.shape[2]} keys.")
        for b in range(q.shape[0]):
            keep = slice(None) if call.token_mask is None else call.token_mask[b]
            row = [x[b : b + 1, :, keep].detach() for x in (q, k, v)]
            tokens = row[0].shape[2]
            if not tokens:
                continue
            row = [x[:, :, :most].float() for x in row]
            rows.append((row[0], row[1], row[2]))
            # In half precision it is rounded more than the errors that are to be told apart.
            if softmax is None or softmax.dtype not in (torch.float32, torch.float64) or tokens > most:
                outputs.append(None)
            else:
                outputs.append(softmax[b : b + 1, :, keep].detach().float())
    return Rows(rows, outputs)


def head_tokens(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """All queries and all keys of each head, `[H, tokens, D]`."""
    q, k = (torch.cat([row[i][0] for row in rows], 1) for i in (0, 1))
    return q, k


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
    return error_meter(attend, list(rows), is_causal=is_causal, scaling=scaling)()


def error_meter(
    attend: Callable[[Row], torch.Tensor], rows: Sequence[Row], *, is_causal: bool, scaling: float
) -> Callable[[], torch.Tensor]:
    """`head_errors` as a function to call again after each change of `attend`; softmax is computed at most once."""
    recorded = rows.outputs if isinstance(rows, Rows) else [None] * len(rows)
    outputs = [
        F.scaled_dot_product_attention(*row, is_causal=is_causal, scale=scaling) if known is None else known
        for row, known in zip(rows, recorded, strict=True)
    ]
    norm = torch.stack([exact.square().sum((0, 2, 3)) for exact in outputs]).sum(0)

    def measure() -> torch.Tensor:
        errors = [(attend(row) - exact).square().sum((0, 2, 3)) for row, exact in zip(rows, outputs, strict=True)]
        return torch.stack(errors).sum(0) / norm

    return measure


def recorded_meter(
    attend: Callable[..., tuple[torch.Tensor, object]], calls: Sequence[Any]
) -> Callable[[], torch.Tensor]:
    """As `error_meter`, of recorded calls as they were (`SelfAttentionCall` with a softmax output), padding left out.

    Args:
        attend: a layer: a call to its output `[B, H, T, D]` and something else.
        calls: at least one, not causal.
    """

    def sums(of: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(())
        for call in calls:
            x = of(call).float()
            if call.token_mask is not None:
                x = x.masked_fill(~call.token_mask[:, None, :, None], 0)
            total = total.to(x.device) + x.square().sum((0, 2, 3))
        return total

    norm = sums(lambda call: call.softmax_output)
    return lambda: sums(lambda call: attend(call)[0].float() - call.softmax_output.float()) / norm


def choose_per_head(errors: list[torch.Tensor]) -> torch.Tensor:
    """Index of the candidate with the smallest error in each head; the first one wins ties and non-numbers.

    Args:
        errors: one `[H]` tensor per candidate, the method as published first.

    Returns:
        long `[H]`.
    """
    table = torch.stack(errors)
    return table.nan_to_num(nan=float("inf")).argmin(0)


def choose_start(
    present: Mapping[str, torch.Tensor],
    starts: Iterable[Mapping[str, torch.Tensor]],
    errors: Callable[[], torch.Tensor],
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Try each start in place and leave every head with the one whose error is smallest.

    Args:
        present: the parameters and buffers to set, by name, `[H, ...]`.
        starts: values for them, the method as published first: it wins ties and non-numbers. A name that a start
            leaves out keeps what it held before.
        errors: measures what is in place: `[H]`.
        known: what it would give for the first start, where an earlier choice told.

    Returns:
        the smallest error of each head, `[H]`; infinite for non-numbers.
    """
    before = best = {name: x.detach().clone() for name, x in present.items()}
    smallest: torch.Tensor | None = None
    for start in starts:
        candidate = {**before, **start}
        if smallest is None and known is not None:
            best, smallest = candidate, known
            continue
        for name, x in present.items():
            x.copy_(candidate[name])
        error = errors().nan_to_num(nan=float("inf"))
        if smallest is None:
            best, smallest = candidate, error
            continue
        better = error < smallest
        best = {
            name: torch.where(_like(better, x), candidate[name].to(x), best[name].to(x)) for name, x in best.items()
        }
        smallest = smallest.minimum(error)
    for name, x in present.items():
        x.copy_(best[name])
    assert smallest is not None, "no start was given"
    return smallest


def _like(per_head: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return per_head.view(-1, *[1] * (x.ndim - 1))


def reducer_starts(
    q: torch.Tensor, k: torch.Tensor, *, centered: bool = True
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What the variance reducer tries: keys weighted by exp(scaling * a . k), queries and keys centered or not.

    q . k = (q - a) . (k - c) + a . k + q . c - a . c for any a and c: terms of the query alone cancel, so a kernel has
    to estimate only what differs between queries, if its keys carry the rest as a weight.

    Args:
        q, k: `[H, tokens, D]`.
        centered: False leaves out the candidates that center queries and keys.

    Returns:
        (a, center of the queries, center of the keys), each `[H, D]`; the published form, all 0, first.
    """
    a, c = q.mean(1), k.mean(1)
    zero = torch.zeros_like(a)
    centers = ((zero, zero), (a, c)) if centered else ((zero, zero),)
    return [(zero, zero, zero), *((share * a, *center) for center in centers for share in _REDUCER_SHARES)]


def centered_maps(
    query_weight: torch.Tensor, key_weight: torch.Tensor, q_center: torch.Tensor, k_center: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Weights `[H, F, D]` with the biases `[H, F]` that take the centers `[H, D]` off queries and keys first."""
    return {
        "query_weight": query_weight,
        "query_bias": -(query_weight @ q_center[..., None])[..., 0],
        "key_weight": key_weight,
        "key_bias": -(key_weight @ k_center[..., None])[..., 0],
    }


def mean_squared_sum(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Mean of |q_i + k_j|^2 over all pairs, `[H]`, for q, k `[H, tokens, D]`."""
    cross = (q.mean(1) * k.mean(1)).sum(-1)
    return q.square().sum(-1).mean(1) + k.square().sum(-1).mean(1) + 2 * cross


def nonpositive_share(
    features: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], *, is_causal: bool
) -> float:
    """Share of the rows whose denominator phi(q) . sum phi(k) is not positive.

    Args:
        features: of each sequence, those of queries and of keys `[1, H, T, F]`, and the log weights of the keys
            `[1, H, T]` or None.
        is_causal: whether a row sums over the keys up to its own only.
    """
    wrong = total = 0
    for q, k, log_weight in features:
        if log_weight is not None:  # in float64, where the smallest weights do not vanish
            k = k * (log_weight.double() - log_weight.amax(-1, keepdim=True)).exp()[..., None]
        z = k.cumsum(2) if is_causal else k.sum(2, keepdim=True)
        denominators = (q * z).sum(-1)
        wrong, total = wrong + int((denominators <= 0).sum()), total + denominators.numel()
    return wrong / max(total, 1)


def warn_of_nonpositive(
    where: str,
    kernel: str,
    features: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    *,
    is_causal: bool,
    advice: str,
) -> None:
    """Warn, in a variant's `calibrate`, of rows whose denominators are not positive (`nonpositive_share`).

    Args:
        where: the variant and its layer.
        kernel: the options that decide.
        features, is_causal: see `nonpositive_share`.
        advice: what to use instead.
    """
    share = nonpositive_share(features, is_causal=is_causal)
    if share:
        shown = f"{share:.1%}" if share >= 0.001 else "less than 0.1%"
        warnings.warn(
            f"{where}: {shown} of the denominators of {kernel} are not positive: such rows are noise or 0. {advice}",
            stacklevel=3,
        )


def balancing_maps(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M and M^-T that make E|q M|^2 + E|k M^-T|^2 smallest, for centered q, k `[H, tokens, D]`."""
    q_moment, k_moment = _moment(q), _moment(k)
    # G = M M^T solves G q_moment G = k_moment: the geometric mean of q_moment^-1 and k_moment.
    root, inverse_root = _roots(q_moment)
    m, inverse = _roots(inverse_root @ _roots(root @ k_moment @ root)[0] @ inverse_root)
    return m.to(q.dtype), inverse.to(q.dtype)


def principal_maps(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P and R with q . k = (P q) . (R k) whose rows are ordered by how much of the logits they carry.

    The first r rows give the best rank r estimate of the logits of independent q and k: the singular value
    decomposition of C_q^1/2 C_k^1/2. In these coordinates both moments are the diagonal of singular values.

    Args:
        q, k: `[H, tokens, D]`, centered.

    Returns:
        two `[H, D, D]`.
    """
    (q_root, q_inverse), (k_root, k_inverse) = _roots(_moment(q)), _roots(_moment(k))
    u, values, vh = torch.linalg.svd(q_root @ k_root)
    root = values.sqrt()[..., :, None]
    p, r = root * (u.mT @ q_inverse), root * (vh @ k_inverse)
    return p.to(q.dtype), r.to(k.dtype)


@torch.no_grad()
def kmeans(x: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """Centroids of the tokens of each head: k-means++ seeding, then a few rounds of Lloyd's algorithm.

    Args:
        x: `[H, tokens, D]`, at least one token; beyond 4096 tokens an evenly spaced subset is used.
        k: centroids; with fewer distinct tokens some centroids coincide.
        seed: decides the seeding, together with `x` alone.

    Returns:
        float32 `[H, k, D]`, on the device of `x`.
    """
    x = x.float()
    if x.shape[1] > _KMEANS_TOKENS:
        x = x[:, torch.linspace(0, x.shape[1] - 1, _KMEANS_TOKENS, device=x.device).long()]
    heads, tokens, _ = x.shape
    every_head = torch.arange(heads, device=x.device)
    draws = torch.rand(k, heads, 1, generator=torch.Generator(device="cpu").manual_seed(seed), device="cpu")
    draws = draws.to(x.device)
    squares = x.square().sum(-1)
    distance = torch.ones_like(squares)  # squared, to the nearest centroid so far
    centroids: list[torch.Tensor] = []
    for draw in draws:
        reached = distance.cumsum(-1)
        index = torch.searchsorted(reached, draw * reached[:, -1:])[:, 0].clamp(max=tokens - 1)
        centroids.append(x[every_head, index])
        # A row times a matrix: the other way round takes a CPU three times as long, and subtracting four times.
        product = torch.bmm(centroids[-1][:, None], x.mT)[:, 0]
        nearest = (squares - 2 * product + squares[every_head, index, None]).clamp(min=0)
        nearest[every_head, index] = 0  # not what rounding leaves
        distance = nearest if len(centroids) == 1 else distance.minimum(nearest)
    c = torch.stack(centroids, 1)  # [H, k, D]
    squares_to, first = _squared_distances(x, k), every_head[:, None] * k
    for _ in range(_KMEANS_ROUNDS):
        label = (_argmin(squares_to(c)) + first).flatten()  # of all heads' centroids
        size = torch.bincount(label, minlength=heads * k).view(heads, k, 1).to(x.dtype)
        total = torch.zeros_like(c).view(heads * k, -1).index_add_(0, label, x.flatten(0, 1)).view_as(c)
        c = torch.where(size > 0, total / size.clamp(min=1), c)
    return c


def _squared_distances(x: torch.Tensor, k: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Squares of the distances of tokens `[H, tokens, D]` to k centroids `[H, k, D]` that move, always into the same
    memory; rounding may leave the smallest below 0."""
    # |x - c|^2 = (-2 x, |x|^2, 1) . (c, 1, |c|^2)
    tokens = torch.cat([x.mul(-2), x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])], -1)
    found = x.new_empty(*x.shape[:2], k)

    def to(c: torch.Tensor) -> torch.Tensor:
        c = torch.cat([c, torch.ones_like(c[..., :1]), c.square().sum(-1, keepdim=True)], -1)
        return torch.bmm(tokens, c.mT, out=found)

    return to


def _argmin(x: torch.Tensor) -> torch.Tensor:
    """`x.argmin(-1)` of finite float32 numbers, which it overwrites: on a CPU minima are found faster than places."""
    # Differences from the minimum are above 0, or 0 of either sign: as integers above 0, or not.
    above = x.sub_(x.amin(-1, keepdim=True)).view(torch.int32).clamp_(0, 1)
    places = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    return torch.add(places, above, alpha=x.shape[-1]).amin(-1).long() % x.shape[-1]


def centroid_starts(
    q: torch.Tensor, k: torch.Tensor, num_features: int, scaling: float
) -> list[dict[str, torch.Tensor]]:
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
    spread = _squared_distances(x, num_features)(centroids).amin(-1).clamp(min=0).mean(-1)
    # Tokens that are centroids would make logits that float32 cannot tell apart.
    spread = spread.maximum(_SMALLEST_SPREAD * x.square().sum(-1).mean(-1)).clamp(min=1e-6)
    beta = (0.5 * _SHARPNESS / spread)[:, None]
    share = 2 * beta[..., None] * centroids, -beta * centroids.square().sum(-1)
    return share, (scaling * centroids, torch.zeros_like(share[1]))


def _moment(x: torch.Tensor) -> torch.Tensor:
    """Second moments `[H, D, D]` in float64, with a little of their mean on the diagonal."""
    x = x.double()
    moment = x.mT @ x / x.shape[1]
    ridge = 1e-3 * moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    return moment + ridge[:, None, None] * torch.eye(x.shape[-1], dtype=torch.double, device=x.device)


def _roots(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square roots of symmetric positive matrices `[..., D, D]` and of their inverses.

    Eigenvalues count as at least 1e-6 of the largest.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=1e-12).maximum(1e-6 * values[..., -1:])[..., None, :]
    return (vectors * values.pow(0.5)) @ vectors.mT, (vectors * values.pow(-0.5)) @ vectors.mT
