"""Attention inside the buckets of locality-sensitive hashes (Reformer, arXiv:2001.04451), in O(n log n).

Each round sorts the keys by (bucket, position) into chunks; a query sees the chunk that it falls in and the one before.
Over all rounds it attends to the union of what they show, each key once: a round leaves out what an earlier one has
shown, and rounds are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.compaction import CompactedCall, take_tokens
from hf_linear_attn.ops.base.numerics import full_precision
from hf_linear_attn.ops.base.tracing import blocks_of, is_exported
from hf_linear_attn.ops.lsh.blocks import attend_chunks
from hf_linear_attn.ops.lsh.levels import Level, at_level, read_whole, whole_length
from hf_linear_attn.ops.lsh.plan import Rounds, sizes_may_depend_on_numbers

__all__ = [
    "hash_buckets",
    "level_attention",
    "naive_round_attention",
    "round_attention",
    "visible",
    "whole_attention",
]

# Added to the logit of a token with itself where queries are keys: it counts when nothing else is there, as in the
# paper's code.
SELF_LOGIT = -1e5
# Upper bound on the scores in hand while hashing (2 MiB in fp32): of long inputs they would be many times the keys.
HASH_ELEMENTS = 1 << 19


def hash_buckets(
    x: torch.Tensor, rotations: torch.Tensor, mean: torch.Tensor | None = None, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """Angular hash: the nearest of the directions [R, -R], in float32 at least.

    Args:
        x: `[B, H, T, D]`.
        rotations: R, `[H, D, rounds, b / 2]`; b / 2 = 0 is a single bucket.
        mean: `[H, D]`, subtracted from x, or None.
        sizes: for each number of buckets b' <= b, 1 or even, a hash by the first b' / 2 directions of each round; None
            for b.

    Returns:
        long `[B, H, T, sizes * rounds]`, the rounds of each size side by side, from 0 to b' - 1.
    """
    rounds, half = rotations.shape[2:]
    if half == 0:
        return torch.zeros(*x.shape[:3], rounds, dtype=torch.long, device=x.device)
    halves = [half] if sizes is None else [size // 2 for size in sizes]
    dtype = torch.promote_types(x.dtype, torch.float32)
    # A hash of rounded numbers is another hash: no autocast.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        directions = rotations[..., : max(halves)].to(dtype).flatten(2)
        offset = None if mean is None else mean.to(dtype)[:, None] @ directions
        found = []
        for part in _hash_pieces(x, directions.shape[-1]):
            score = part.to(dtype) @ directions
            if offset is not None:
                score = score.sub_(offset)
            score = score.unflatten(-1, (rounds, -1))
            found.append(torch.cat([_nearest(score[..., :few]) for few in halves], -1))
        return found[0] if len(found) == 1 else torch.cat(found, 2)


def _nearest(score: torch.Tensor) -> torch.Tensor:
    """Number of the largest of `[score, -score]`, over the last dimension; 0 where that is empty."""
    if not score.shape[-1]:
        return torch.zeros(score.shape[:-1], dtype=torch.long, device=score.device)
    nearest = score.abs().argmax(-1, keepdim=True)  # direction, of either sign
    return torch.where(score.gather(-1, nearest) < 0, nearest + score.shape[-1], nearest)[..., 0]


def _hash_pieces(x: torch.Tensor, directions: int) -> Sequence[torch.Tensor]:
    """Tokens whose scores fit a CPU's cache; all of them elsewhere."""
    if is_exported() or not sizes_may_depend_on_numbers(x.device):
        return [x]
    return x.split(max(64, HASH_ELEMENTS // max(x.shape[0] * x.shape[1] * directions, 1)), 2)


@torch.no_grad()
def visible(
    q_bucket: torch.Tensor,
    k_bucket: torch.Tensor,
    real: torch.Tensor | None,
    chunk_size: int,
    num_buckets: int,
    *,
    is_causal: bool,
    centered: bool = False,
    whole: torch.Tensor | None = None,
) -> Rounds:
    """Where queries look, query row r being at position Tk - Tq + r.

    A query is placed in the order of the keys by its own (bucket, position). Bidirectional: chunks are cut from the
    order of all keys, without wrapping; `centered` moves a query to where the two chunks show most of its bucket, as
    far ahead as behind. Causal: each bucket is cut into chunks from its first key on, so that no
    later token moves a boundary, and a query sees its own bucket alone. One more round, the first, then has a single
    bucket: the query's own chunk of all keys and the one before, itself included.

    Args:
        q_bucket: long `[B, H, Tq, rounds]`; may be `k_bucket` itself, which saves work.
        k_bucket: long `[B, H, Tk, rounds]`.
        real: bool `[B or 1, Tk]`, False for padding; None without any.
        chunk_size: keys per chunk.
        num_buckets: buckets are below this.
        is_causal: a query sees keys up to its own.
        centered: of bidirectional ones only.
        whole: bool `[B or 1]`, bidirectional sequences of one bucket that are read whole: each round shows the next
            two chunks, whatever the query. None for none.
    """
    (B, H, q_len, rounds), k_len = q_bucket.shape, k_bucket.shape[2]
    if is_exported() and not is_causal:
        return _visible_by_counts(q_bucket, k_bucket, real, chunk_size, num_buckets, centered, whole)
    chunk, offset = min(chunk_size, k_len), k_len - q_len
    by_position = real is None and is_causal and q_len == k_len
    centered = centered and not is_causal
    same = real is None and q_bucket is k_bucket and not centered
    if real is None:
        real = torch.ones(1, k_len, dtype=torch.bool, device=k_bucket.device)
    real = real.expand(B, k_len).repeat_interleave(H, 0)  # [N, Tk]
    sorts = rounds
    if k_len <= chunk_size * (2 if is_causal else 1):  # one round shows everything
        sorts = 0 if is_causal else 1
    q_chunks, k_chunks, k_places = [], [], []
    count = real.cumsum(-1)
    if is_causal or not sorts:  # a single bucket
        place = (count - 1).clamp(min=0)
        k_chunks.append(place // chunk + 1)
        k_places.append(place % chunk)
        q_chunks.append(k_chunks[0][:, offset:])
    position = torch.arange(k_len, device=real.device)
    edges = torch.arange(num_buckets, device=real.device) * k_len
    for number in range(sorts):
        k_own = k_bucket[..., number].flatten(0, 1).contiguous()
        code = torch.where(real, k_own * k_len, num_buckets * k_len) + position
        code, order = code.sort(-1)
        first = torch.searchsorted(code, edges.expand(code.shape[0], -1).contiguous())  # [N, b]
        total = torch.cat([first[:, 1:], count[:, -1:]], 1) - first
        k_rank = torch.empty_like(order).scatter_(-1, order, position.expand_as(order)) - first.gather(1, k_own)
        if is_causal:
            size = -(-total // chunk) + 1  # with an empty chunk between buckets
            base = size.cumsum(-1) - size + 1
        else:
            base = first
        k_base = base.gather(1, k_own)
        if is_causal:
            k_chunks.append(k_base + k_rank // chunk)
            k_places.append(k_rank % chunk)
        else:
            k_chunks.append((k_base + k_rank) // chunk + 1)
            k_places.append((k_base + k_rank) % chunk)
        if same:
            q_chunks.append(k_chunks[-1])
            continue
        q_own = q_bucket[..., number].flatten(0, 1).contiguous()
        q_rank = torch.searchsorted(code, q_own * k_len + position[offset:]) - first.gather(1, q_own)
        q_base = base.gather(1, q_own)
        if is_causal:
            q_chunks.append(q_base + q_rank // chunk)
        elif centered:
            end = q_base + total.gather(1, q_own)
            q_chunks.append(_centered(q_base + q_rank, q_base, end, count[:, -1:], chunk))
        else:
            q_chunks.append((q_base + q_rank).minimum(count[:, -1:] - 1).clamp(min=0) // chunk + 1)
    # Causal: every bucket may leave a chunk unfilled, and has an empty one before and after it.
    num_chunks = k_len // chunk + 2 + (2 * num_buckets if is_causal and sorts else 0)
    q_chunk, k_chunk, k_place = torch.stack(q_chunks), torch.stack(k_chunks), torch.stack(k_places)
    if whole is not None:
        q_chunk = _round_by_round(q_chunk, whole.expand(B).repeat_interleave(H, 0))
    return Rounds(q_chunk, k_chunk, k_place, real, num_chunks, chunk, is_causal, by_position, same)


def _centered(
    place: torch.Tensor, first: torch.Tensor, end: torch.Tensor, count: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Chunk, from 1 on, such that it and the one before show most of the bucket of places `first` .. `end` - 1.

    Args:
        place: long `[N, Tq]`, in the order of the keys, around which to look in buckets of more than two chunks.
        first: long `[N, Tq]`.
        end: long `[N, Tq]`.
        count: long `[N, 1]`, keys in that order.
        chunk: keys per chunk.
    """
    reach = ((end - first) // 2).clamp(max=chunk)
    middle = place.maximum(first + reach).minimum(end - reach)
    last = (count - 1).clamp(min=0) // chunk + 1
    return ((middle + chunk // 2) // chunk + 1).clamp(min=2).minimum(last)


def _round_by_round(q_chunk: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`q_chunk` `[rounds, N, Tq]`, where `whole` `[N]` the second of each round's own two chunks."""
    number = torch.arange(1, q_chunk.shape[0] + 1, device=q_chunk.device) * 2
    return torch.where(whole[:, None], number[:, None, None], q_chunk)


def _visible_by_counts(
    q_bucket: torch.Tensor,
    k_bucket: torch.Tensor,
    real: torch.Tensor | None,
    chunk_size: int,
    num_buckets: int,
    centered: bool,
    whole: torch.Tensor | None,
) -> Rounds:
    """`visible` of as many queries as keys, bidirectional, without sorting: a key's rank is counted, bucket by bucket.

    For exported programs. Arguments as in `visible`.
    """
    B, H, k_len = k_bucket.shape[:3]
    if isinstance(k_len, torch.SymInt) and torch.__version__ < "2.13":
        raise ValueError(f"reformer exports at one length only in PyTorch {torch.__version__}. Allowed: 2.13 or newer.")
    if real is None:
        real = torch.ones(1, k_len, dtype=torch.bool, device=k_bucket.device)
    real = real.expand(B, k_len)
    held = (k_bucket[..., None] == torch.arange(num_buckets, device=real.device)) & real[:, None, :, None, None]
    upto = held.long().cumsum(2)  # [B, H, T, rounds, b]
    total = upto[:, :, -1:]
    first = total.cumsum(-1) - total
    before = upto - held.long() + first  # the place of a key, or where a query falls, were it in that bucket
    k_place = before.gather(-1, k_bucket[..., None])[..., 0]
    q_place = before.gather(-1, q_bucket[..., None])[..., 0]
    last = (real.sum(-1) - 1).clamp(min=0)[:, None, None, None]
    if centered:
        q_first, q_total = (x.expand_as(held).gather(-1, q_bucket[..., None])[..., 0] for x in (first, total))
        q_chunk = _centered(q_place, q_first, q_first + q_total, last + 1, chunk_size)
    else:
        q_chunk = q_place.minimum(last) // chunk_size + 1
    k_place, q_chunk = (x.permute(3, 0, 1, 2).flatten(1, 2) for x in (k_place.minimum(last), q_chunk))
    if whole is not None:
        q_chunk = _round_by_round(q_chunk, whole[:, None].expand(B, H).flatten())
    seen = real[:, None].expand(B, H, k_len).flatten(0, 1)
    k_chunk = k_place // chunk_size + 1
    return Rounds(q_chunk, k_chunk, k_place % chunk_size, seen, blocks_of(k_len, chunk_size) + 1, chunk_size, False)


def naive_round_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rounds: Rounds,
    *,
    scaling: float,
    self_penalty: bool = False,
) -> torch.Tensor:
    """Dense O(n^2) evaluation of `round_attention`, for exported programs and tests; same arguments."""
    q_len, k_len = q.shape[2], k.shape[2]
    distance = rounds.q_chunk[..., None] - rounds.k_chunk[..., None, :]
    allowed = ((distance == 0) | (distance == 1)).any(0) & rounds.real[:, None]  # [N, Tq, Tk]
    ahead = torch.arange(k_len, device=q.device) - torch.arange(k_len - q_len, k_len, device=q.device)[:, None]
    if rounds.is_causal:
        allowed = allowed & (ahead <= 0)
    logits = q @ k.mT * scaling
    if self_penalty:
        logits = logits.masked_fill(ahead == 0, SELF_LOGIT)
    return logits.masked_fill(~allowed.unflatten(0, q.shape[:2]), -torch.inf).softmax(-1).nan_to_num(0) @ v


def round_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rounds: Rounds,
    *,
    scaling: float,
    self_penalty: bool = False,
) -> torch.Tensor:
    """Softmax attention over the keys that a query sees in any round.

    Args:
        q: `[B, H, Tq, D]`, row r at position Tk - Tq + r.
        k: `[B, H, Tk, D]`.
        v: `[B, H, Tk, D]`. All finite, padding too.
        rounds: of `visible`.
        scaling: factor of the logits.
        self_penalty: `SELF_LOGIT` is added to the logit of a token with itself.

    Returns:
        `[B, H, Tq, D]`; rows that see no key are 0.
    """
    if is_exported() and not rounds.is_causal:
        return naive_round_attention(q, k, v, rounds, scaling=scaling, self_penalty=self_penalty)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    shape, (q, k, v) = q.shape[:2], (x.to(dtype).flatten(0, 1) for x in (q, k, v))
    out = attend_chunks(q, k, v, rounds, scaling=scaling, self_bias=SELF_LOGIT if self_penalty else 0.0)
    return out.unflatten(0, shape)


def whole_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    real: torch.Tensor | None,
    *,
    is_causal: bool,
    scaling: float,
    self_penalty: bool,
) -> torch.Tensor:
    """Softmax attention over all keys, or if causal over all up to a query's own, for few tokens: a mask is dense.

    Args:
        q: `[B, H, Tq, D]`, row r at position Tk - Tq + r.
        k: `[B, H, Tk, D]`.
        v: `[B, H, Tk, D]`. All finite, padding too.
        real: bool `[B or 1, Tk]`, False for padding; None without any.
        is_causal: a query sees keys up to its own.
        scaling: factor of the logits.
        self_penalty: as in `round_attention`.

    Returns:
        `[B, H, Tq, D]`; anything finite where nothing is real.
    """
    q_len, k_len, dtype = q.shape[2], k.shape[2], torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    bias, plain = None, real is None and not self_penalty and (not is_causal or q_len == k_len)
    if not plain:
        ahead = torch.arange(k_len, device=q.device) - torch.arange(k_len - q_len, k_len, device=q.device)[:, None]
        allowed = ahead <= (0 if is_causal else k_len)
        if real is not None:  # a row without any key would have no softmax
            allowed = (allowed & real[:, None, None]) | (ahead == 0)
        penalty = max(SELF_LOGIT, torch.finfo(dtype).min) if self_penalty else 0.0
        bias = torch.zeros(allowed.shape, dtype=dtype, device=q.device).masked_fill(ahead == 0, penalty)
        bias = bias.masked_fill(~allowed, -torch.inf)
    with full_precision(q):
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=is_causal and plain, scale=scaling)


def _first_tokens(call: CompactedCall, first: int, last: int, size: int, options: dict[str, Any]) -> torch.Tensor:
    """Causal `whole_attention` of the queries in columns `first` .. `last` - 1 that are among the first `size` tokens.

    Rows have their padding in front, of many lengths: tokens are taken by their rank, `size` squared logits in all.
    """
    offset = call.k.shape[2] - call.q.shape[2]
    rank = call.rank.expand(len(call.q), -1)
    column = (torch.arange(size, device=rank.device) - rank[:, :1]).clamp(0, rank.shape[1] - 1)
    k, v = take_tokens(call.k, column), take_tokens(call.v, column)
    q = take_tokens(call.q, (column - offset).clamp(min=0))
    output = whole_attention(q, k, v, None, is_causal=True, **options)
    return take_tokens(output, rank[:, first:last].clamp(0, size - 1))


def level_attention(
    call: CompactedCall,
    q_bucket: torch.Tensor,
    k_bucket: torch.Tensor,
    levels: Sequence[Level],
    chunk_size: int,
    *,
    is_causal: bool,
    centered: bool,
    all_real: bool,
    scaling: float,
    self_penalty: bool,
) -> torch.Tensor:
    """`round_attention` of a compacted call, each query at its level: that of its rank, or if not causal of the row.

    `whole_attention` at a whole level.

    Args:
        call: queries `[B, H, Tq, D]`, keys and values `[B, H, Tk, D]`.
        q_bucket: long `[B, H, Tq, levels * rounds]`, as by `hash_buckets`; may be `k_bucket` itself.
        k_bucket: long `[B, H, Tk, levels * rounds]`.
        levels: that tokens of the call may be at.
        chunk_size: keys per chunk.
        is_causal: a query sees keys up to its own.
        centered: as in `visible`.
        all_real: True where nothing is padding.
        scaling: factor of the logits.
        self_penalty: as in `round_attention`.

    Returns:
        `[B, H, Tq, D]`.
    """
    seen, same = None if all_real else call.rank >= 0, q_bucket is k_bucket
    options: dict[str, Any] = {"scaling": scaling, "self_penalty": self_penalty}

    def attend(
        first: int,
        last: int,
        q_bucket: torch.Tensor,
        k_bucket: torch.Tensor,
        level: Level,
        whole: torch.Tensor | None = None,
    ) -> torch.Tensor:
        real = None if seen is None else seen[:, :last]
        if level.whole and is_causal and not all_real:
            return _first_tokens(call, first, last, whole_length(k_len, levels), options)
        q, k, v = call.q[:, :, first - offset : last - offset], call.k[:, :, :last], call.v[:, :, :last]
        if level.whole:
            return whole_attention(q, k, v, real, is_causal=is_causal, **options)
        where: dict[str, Any] = {"is_causal": is_causal, "centered": centered, "whole": whole}
        return round_attention(
            q, k, v, visible(q_bucket, k_bucket, real, chunk_size, level.buckets, **where), **options
        )

    k_len = call.k.shape[2]
    offset = k_len - call.q.shape[2]
    if not is_causal or len(levels) == 1:
        count = call.rank[:, -1] + 1
        k_bucket = at_level(k_bucket, count, levels)
        q_bucket = k_bucket if same else at_level(q_bucket, count, levels)
        return attend(offset, k_len, q_bucket, k_bucket, levels[-1], read_whole(count, levels))
    fewest, most = (0, 0) if all_real else _padding(call.rank)
    output, reached = call.q[:, :, :0], offset
    ends = [level.start for level in levels[1:]] + [k_len]
    of_levels = zip(levels, ends, q_bucket.chunk(len(levels), -1), k_bucket.chunk(len(levels), -1), strict=True)
    for level, end, q_own, k_own in of_levels:
        # The columns that hold a token of this level in some row; the first of them may hold lower ones in others.
        first, last = max(level.start + fewest if level.start else 0, offset), min(end + most, k_len)
        if first >= last:
            continue
        k_own = k_own[:, :, :last]
        q_own = k_own if same and first == 0 else q_own[:, :, first - offset : last - offset]
        found, again = attend(first, last, q_own, k_own, level), reached - first
        chosen = call.rank[:, None, first:reached, None] >= level.start
        known, before = output.split([output.shape[2] - again, again], 2)
        output = torch.cat([known, torch.where(chosen, found[:, :, :again], before), found[:, :, again:]], 2)
        reached = last
    return output


def _padding(rank: torch.Tensor) -> tuple[int, int]:
    """Bounds on the padding in front of a row, by the ranks of its keys."""
    if not sizes_may_depend_on_numbers(rank.device):
        return 0, rank.shape[1]
    padding = rank.shape[1] - 1 - rank[:, -1]
    return int(padding.min()), int(padding.max())
