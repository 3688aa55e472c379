"""Attention inside the buckets of locality-sensitive hashes (Reformer, arXiv:2001.04451), in O(n log n).

Each round sorts the keys by (bucket, position); a query sees one interval of that order. Over all rounds it attends
to the union of its intervals, each key once: a key's weight is divided by the number of rounds that show it to this
query, and rounds are merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["SELF_LOGIT", "Intervals", "hash_buckets", "interval_attention", "naive_interval_attention", "visible"]

# Upper bound on the logits of one round held at once (16 MiB in fp32).
GROUP_ELEMENTS = 1 << 22
# Logit of a token to itself where queries are keys: it counts when nothing else is there, as in the paper's code.
SELF_LOGIT = -1e5


def hash_buckets(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Angular hash: the nearest of the directions [R, -R], in float32 at least.

    Args:
        x: `[B, H, T, D]`.
        rotations: `[H, D, rounds, b / 2]`; b / 2 = 0 is a single bucket.

    Returns:
        long `[B, H, T, rounds]`, from 0 to b - 1.
    """
    rounds, half = rotations.shape[2:]
    if half == 0:
        return torch.zeros(*x.shape[:3], rounds, dtype=torch.long, device=x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A hash of rounded numbers is another hash: no autocast.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        rotated = (x.to(dtype) @ rotations.to(dtype).flatten(2)).unflatten(-1, (rounds, half))
        return torch.cat([rotated, -rotated], -1).argmax(-1)


@dataclass
class Intervals:
    """What each query sees in each round, N = B * H.

    Attributes:
        order: long `[N, rounds, Tk]`, the key at each place of the round's order, real keys first.
        low: long `[N, rounds, Tq]`, first place that the query sees.
        high: long `[N, rounds, Tq]`, the place after the last.
        chunk: places are gathered in chunks of so many.
        span: chunks from the one that holds `low` on that hold the whole interval.
    """

    order: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    chunk: int
    span: int


@torch.no_grad()
def visible(
    q_bucket: torch.Tensor, k_bucket: torch.Tensor, real: torch.Tensor, chunk_size: int, *, is_causal: bool
) -> Intervals:
    """Where queries look, query row r being at position Tk - Tq + r.

    A query is placed in the order of the keys by its own (bucket, position). Bidirectional: it sees the chunk of
    keys it falls in and the one before, without wrapping. Causal: the last `2 * chunk_size` keys before it in its
    own bucket, which no later token can change, as it would the chunks. One more round then has a single bucket:
    the last `2 * chunk_size` keys of all, itself included.

    Args:
        q_bucket: long `[B, H, Tq, rounds]`.
        k_bucket: long `[B, H, Tk, rounds]`.
        real: bool `[B or 1, Tk]`, False for padding.
        chunk_size: keys per chunk.
    """
    q_len, k_len = q_bucket.shape[2], k_bucket.shape[2]
    chunk, place = min(chunk_size, k_len), torch.arange(k_len, device=real.device)
    if is_causal:
        q_bucket, k_bucket = (torch.nn.functional.pad(x, (0, 1)) for x in (q_bucket, k_bucket))
    if k_len <= chunk_size * (2 if is_causal else 1):  # the last round shows everything
        q_bucket, k_bucket = q_bucket[..., -1:], k_bucket[..., -1:]
    q_bucket, k_bucket = (x.transpose(2, 3).contiguous() for x in (q_bucket, k_bucket))  # [B, H, rounds, T]
    last = torch.iinfo(torch.long).max - k_len
    code = torch.where(real[:, None, None], k_bucket * k_len, last) + place
    code, order = (x.flatten(0, 1) for x in code.sort(-1))
    first = (q_bucket * k_len).flatten(0, 1)  # no key of this bucket has a smaller code
    at = torch.searchsorted(code, first + place[k_len - q_len :])
    if is_causal:
        high = torch.cat([at[:, :-1], at[:, -1:] + 1], 1)
        return Intervals(order, torch.searchsorted(code, first).maximum(high - 2 * chunk), high, chunk, 3)
    n_real = real.sum(-1).expand(q_bucket.shape[0]).repeat_interleave(q_bucket.shape[1])[:, None, None]
    own = at.minimum(n_real - 1).clamp(min=0) // chunk
    return Intervals(order, (own - 1).clamp(min=0) * chunk, ((own + 1) * chunk).minimum(n_real), chunk, 2)


def naive_interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    *,
    scaling: float,
    self_penalty: bool = False,
) -> torch.Tensor:
    """Dense O(n^2) evaluation of `interval_attention`, for tests and inspection; same arguments."""
    q_len, k_len = q.shape[2], k.shape[2]
    place = intervals.order.argsort(-1)[:, :, None, :]  # [N, rounds, 1, Tk]
    seen = (place >= intervals.low[..., None]) & (place < intervals.high[..., None])
    itself = torch.arange(k_len, device=q.device) == torch.arange(k_len - q_len, k_len, device=q.device)[:, None]
    allowed = seen.any(1).unflatten(0, q.shape[:2])
    logits = q @ k.mT * scaling
    if self_penalty:
        logits = logits.masked_fill(itself, SELF_LOGIT)
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0) @ v


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    *,
    scaling: float,
    self_penalty: bool = False,
) -> torch.Tensor:
    """Softmax attention over the keys that a query sees in any round.

    Args:
        q: `[B, H, Tq, D]`, row r at position Tk - Tq + r.
        k: `[B, H, Tk, D]`.
        v: `[B, H, Tk, D]`. All finite, padding too.
        intervals: of `visible`.
        scaling: factor of the logits.
        self_penalty: logit `SELF_LOGIT` from a token to itself.

    Returns:
        `[B, H, Tq, D]`; rows that see no key are 0.
    """
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    # Heads in groups: what a group gathers is freed before the next one, and while it lasts it stays near the cache.
    step = max(1, GROUP_ELEMENTS // (q.shape[1] * intervals.span * intervals.chunk))
    outputs = []
    for start in range(0, q.shape[0], step):
        group = slice(start, start + step)
        of_group = replace(intervals, **{name: getattr(intervals, name)[group] for name in ("order", "low", "high")})
        outputs.append(_attend_heads(q[group], k[group], v[group], of_group, scaling, self_penalty))
    return torch.cat(outputs).view(*shape[:3], v.shape[-1])


def _attend_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, scaling: float, self_penalty: bool
) -> torch.Tensor:
    """`interval_attention` on q, k, v `[N, T, D]`."""
    place = torch.empty_like(intervals.order)
    place.scatter_(-1, intervals.order, torch.arange(k.shape[1], device=q.device).expand_as(place))
    rounds = [
        _attend_round(q, k, v, intervals, place, number, scaling, self_penalty)
        for number in range(intervals.order.shape[1])
    ]
    share = torch.stack([lse for _, lse in rounds]).softmax(0).to(v.dtype)  # [rounds, N, Tq]
    return torch.stack([part * weight[..., None] for (part, _), weight in zip(rounds, share, strict=True)]).sum(0)


def _attend_round(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    place: torch.Tensor,
    number: int,
    scaling: float,
    self_penalty: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[N, Tq, D]` and log-sum-exp `[N, Tq]` of one round, on q, k, v `[N, T, D]`."""
    chunk, offset = intervals.chunk, k.shape[1] - q.shape[1]
    low, high = intervals.low, intervals.high
    slots = _assign_slots(low[:, number] // chunk, k.shape[1] // chunk + 1, min(chunk, q.shape[1]))

    def of_queries(x: torch.Tensor) -> torch.Tensor:  # [N, Tq, C] to [N, blocks, rows, C]
        return _take(x, slots.query).unflatten(1, (slots.chunk.shape[1], -1))

    def of_keys(x: torch.Tensor) -> torch.Tensor:  # [N, Tk, C] to [N, blocks, span * chunk, C]
        x = _take(x, intervals.order[:, number])
        chunks = slots.chunk[..., None] + torch.arange(intervals.span, device=x.device)
        x = torch.nn.functional.pad(x, (0, 0, 0, (chunk - x.shape[1] % chunk) + (intervals.span - 1) * chunk))
        x = x.unflatten(1, (-1, chunk)).flatten(2)
        return _take(x, chunks.flatten(1)).unflatten(1, (chunks.shape[1], -1)).unflatten(-1, (chunk, -1)).flatten(2, 3)

    with torch.no_grad():
        bounds = of_queries(torch.cat([low, high], 1).int().mT)
        # Places that only fill the last chunk have no key: -1 is in no interval.
        places = of_keys(place.int().mT + 1) - 1
        # A round at a time: with the rounds in the last dimension of one tensor this takes several times as long.
        columns = zip(places.unbind(-1), *(x.unbind(-1) for x in bounds.chunk(2, -1)), strict=True)
        inside = [
            (at[:, :, None] >= start[..., None]) & (at[:, :, None] < end[..., None]) for at, start, end in columns
        ]
        seen, count = inside[number], inside[0].to(torch.int16)
        for shown in inside[1:]:
            count = count + shown
    logits = of_queries(q) @ of_keys(k * scaling).mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if self_penalty:
        keys = of_keys(torch.arange(k.shape[1], device=k.device).expand(k.shape[:2])[..., None])[..., 0]
        itself = keys[..., None, :] == slots.query.unflatten(1, (keys.shape[1], -1))[..., None] + offset
        logits = logits.masked_fill(itself, SELF_LOGIT)
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    top = logits.detach().amax(-1, keepdim=True)
    weights = (logits - top).exp() * (seen / count.clamp(min=1)).to(logits.dtype)
    total = weights.sum(-1, keepdim=True)
    empty, total = total == 0, total.clamp(min=torch.finfo(total.dtype).tiny)
    output = (weights / total).to(v.dtype) @ of_keys(v)
    lse = (top + total.log()).masked_fill(empty, torch.finfo(logits.dtype).min)
    return _take(output.flatten(1, 2), slots.slot), _take(lse.flatten(1, 2), slots.slot)[..., 0]


@dataclass
class _Slots:
    """Queries in blocks of equally many rows, all of a block with the same chunk of keys.

    Attributes:
        slot: long `[N, Tq]`, the row of each query among the rows of all blocks.
        query: long `[N, blocks * rows]`, the query of each row; some query where a block is not full.
        chunk: long `[N, blocks]`.
    """

    slot: torch.Tensor
    query: torch.Tensor
    chunk: torch.Tensor


@torch.no_grad()
def _assign_slots(chunk: torch.Tensor, num_chunks: int, rows: int) -> _Slots:
    """Slots for queries with the given chunks, long `[N, Tq]`.

    Any number of queries may look at one chunk. They fill as many blocks as they need: at most one block per chunk is
    not full, so a number of blocks that is known beforehand is enough for every input.
    """
    N, q_len = chunk.shape
    blocks = min(q_len, q_len // rows + num_chunks)
    index = torch.arange(max(q_len, num_chunks + 1, blocks), device=chunk.device)
    ordered, order = chunk.sort(dim=-1, stable=True)
    first = torch.searchsorted(ordered, index[: num_chunks + 1].expand(N, -1).contiguous())  # first query of each
    needed = -(-first.diff() // rows)
    end = needed.cumsum(-1)
    slot = (end - needed).gather(1, ordered) * rows + index[:q_len] - first.gather(1, ordered)
    slot = torch.empty_like(slot).scatter_(1, order, slot)
    query = slot.new_zeros(N, blocks * rows).scatter_(1, slot, index[:q_len].expand(N, -1))
    owner = torch.searchsorted(end, index[:blocks].expand(N, -1).contiguous(), right=True)
    return _Slots(slot, query, owner.clamp(max=num_chunks - 1))


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` (long `[N, M]`) of `x` `[N, T, C]`: `[N, M, C]`."""
    rows = (index + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]).flatten()
    return x.reshape(-1, x.shape[-1]).index_select(0, rows).view(*index.shape, x.shape[-1])
