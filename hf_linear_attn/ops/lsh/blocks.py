"""Attention of queries over two neighboring chunks of keys each, in several rounds of sorting.

The queries of one chunk are cut into blocks of equally many rows, so that a block attends to one piece of sorted keys.
Forward and backward go through a few blocks at a time: what a block gathers stays near the cache and is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype
from hf_linear_attn.ops.base.pieces import LEAST_LOG, Piece, backward_pieces, forward_pieces, merge
from hf_linear_attn.ops.lsh.plan import Plan, Rounds, plan_round, sizes_may_depend_on_numbers

__all__ = ["attend_chunks"]

# Upper bound on the logits of the blocks in hand (1 MiB in fp32): with more, memory is mapped anew for every group.
GROUP_ELEMENTS = 1 << 18
# Upper bound on the keys of the heads in hand, by their places in chunks (4 MiB in fp32), measured on CPU: larger
# tensors are mapped anew in each use, and what is gathered from them comes from main memory.
HEAD_ELEMENTS = 1 << 20


def attend_chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rounds: Rounds, *, scaling: float, self_bias: float
) -> torch.Tensor:
    """Softmax over the keys j of query i with q_chunk[r, i] - k_chunk[r, j] in {0, 1} for some round r, each once.

    Args:
        q: `[N, Tq, D]`, row r at position Tk - Tq + r.
        k, v: `[N, Tk, D]`, of the same dtype.
        rounds: see there.
        scaling: factor of the logits.
        self_bias: added to the logit of a token with itself, unless 0.

    Returns:
        `[N, Tq, D]`, in the dtype of the inputs; 0 where a query sees nothing.
    """
    sizes = rounds.num_chunks, rounds.chunk_size
    settings = (rounds.is_causal, scaling, self_bias, rounds.by_position, rounds.same)
    heads = _heads_at_a_time(q, rounds.num_chunks * rounds.chunk_size)
    chunks = rounds.q_chunk, rounds.k_chunk, rounds.k_place
    parts = [*(x.split(heads) for x in (q, k, v)), *(x.split(heads, 1) for x in chunks), rounds.real.split(heads)]
    with torch.autocast(q.device.type, enabled=False):
        outs = [_AttendChunks.apply(*sizes, settings, *x) for x in zip(*parts, strict=True)]  # type: ignore[no-untyped-call]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _heads_at_a_time(q: torch.Tensor, places: int) -> int:
    """How many heads to go through at once, each with as many places for keys."""
    if sizes_may_depend_on_numbers(q.device):
        return max(1, HEAD_ELEMENTS // (places * q.shape[2]))
    return max(1, q.shape[0])


_Tensors = tuple[torch.Tensor, ...]
_Settings = tuple[bool, float, float, bool, bool]  # is_causal, scaling, self_bias, by_position, same


class _AttendChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, num_chunks: int, chunk_size: int, settings: _Settings, *tensors: torch.Tensor
    ) -> torch.Tensor:
        q, k, v, q_chunk, k_chunk, k_place, real = tensors
        plans = [
            plan_round(*x, real, num_chunks, chunk_size, settings[4])
            for x in list(zip(q_chunk.unbind(), k_chunk.unbind(), k_place.unbind(), strict=True))[settings[3] :]
        ]
        kind = _kind(num_chunks, k.shape[1], settings[0])
        ids = q_chunk.flatten(1).to(kind), k_chunk.flatten(1).to(kind)
        found: _Tensors = ()
        for number in range(len(q_chunk)):
            new = _forward(_round(number, plans, (q, k, v), ids, chunk_size, settings), q.flatten(0, 1), settings[1])
            found = merge(found, new) if found else new
        out, total = found
        out = out.masked_fill((total < LEAST_LOG)[:, None], 0).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, total, real, *ids, *(x for plan in plans for x in plan.tensors()))
        ctx.settings, ctx.chunk_size, ctx.alone = settings, chunk_size, [plan.alone for plan in plans]
        return out.view(*q.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, total, real, q_ids, k_ids, *rest = ctx.saved_tensors
        plans = [Plan(tuple(rest[5 * i : 5 * i + 5]), alone) for i, alone in enumerate(ctx.alone)]
        blind = total < LEAST_LOG
        grad, total = grad.flatten(0, 1).masked_fill(blind[:, None], 0), total.masked_fill(blind, -LOG_ZERO)
        of_rows = q.flatten(0, 1), out, total, grad
        grads: _Tensors = ()
        for number in range(len(q_ids)):
            rounds = number, plans, (q, k, v), (q_ids, k_ids), ctx.chunk_size, ctx.settings
            new = _backward(_round(*rounds), of_rows, ctx.settings[1])
            grads = tuple(a + b for a, b in zip(grads, new, strict=True)) if grads else new
        dq, dk, dv = (x.view_as(y).to(y.dtype) for x, y in zip(grads, (q, k, v), strict=True))
        dk, dv = (x.masked_fill(~real[..., None], 0) for x in (dk, dv))
        return (None, None, None, dq, dk, dv, *[None] * 4)


def _kind(num_chunks: int, k_len: int, of_positions: bool) -> torch.dtype:
    """The smallest type that differences of chunk numbers, and of positions if need be, fit into."""
    if num_chunks < 256 and not of_positions:
        return torch.uint8  # negative differences wrap around to large ones
    return torch.int16 if max(num_chunks, k_len) < 1 << 14 else torch.int32


def _distance(q_id: torch.Tensor, k_id: torch.Tensor) -> torch.Tensor:
    """0 or 1 where a chunk is the query's own or the one before, else at least 2.

    On a CPU, kernels of arithmetic are several times faster than comparisons and `where`.
    """
    distance = q_id - k_id
    return distance if distance.dtype == torch.uint8 else distance.bitwise_and_(-2).abs_()


def _round(
    number: int, plans: list[Plan], tensors: _Tensors, ids: _Tensors, chunk_size: int, settings: _Settings
) -> _Round | _ByPosition:
    if settings[3] and number == 0:
        return _ByPosition(tensors, chunk_size, settings)
    return _Round(number, plans[number - settings[3]], tensors, ids, settings)


def _forward(this: _Round | _ByPosition, q: torch.Tensor, scaling: float) -> _Tensors:
    """Output `[N * Tq, D]` and log-sum-exp `[N * Tq]` of one round."""
    out: list[torch.Tensor] = []
    lse: list[torch.Tensor] = []
    forward_pieces(this, q, out, lse, scaling)
    return this.by_query(out), this.by_query(lse)


def _backward(this: _Round | _ByPosition, of_rows: _Tensors, scaling: float) -> _Tensors:
    """Gradients `[N * Tq, D]` of the queries and `[N * Tk, D]` of keys and values, through one round."""
    d_q: list[torch.Tensor] = []
    this.zero_gradients()
    backward_pieces(this, of_rows, d_q, scaling, False)
    return this.by_query(d_q), *this.gradients()


class _Round:
    """What the blocks of one round gather, a group of blocks at a time; outputs are in the order of the blocks."""

    def __init__(self, number: int, plan: Plan, tensors: _Tensors, ids: _Tensors, settings: _Settings) -> None:
        q, k, v = tensors
        self.is_causal, _, self.self_bias, _, _ = settings
        self.plan, self.q_ids = plan, ids[0]
        self.count, self.q_len, self.offset = q.shape[0] * q.shape[1], q.shape[1], k.shape[1] - q.shape[1]
        self.rows = plan.query.shape[0] // max(plan.pair.shape[0], 1)
        key = plan.key.flatten()
        kind, some = ids[1].dtype, key < k.shape[0] * k.shape[1]
        self.real = (some.to(kind) * 2).view_as(plan.key)  # 0 or 2
        key = key.clamp(max=k.shape[0] * k.shape[1] - 1)
        # Rows of whole chunks `[rows, ...]`: copying one moves chunk_size tokens at once.
        self.k, self.v = (x.flatten(0, 1).index_select(0, key).view(plan.key.shape[0], -1) for x in (k, v))
        self.positions = (key % k.shape[1]).to(kind).view_as(plan.key) if self.is_causal else None
        self.ids = [x.index_select(0, key).view_as(plan.key) for x in ids[1][:number]]
        self.bias_dtype = accumulation_dtype(q.dtype)

    def __iter__(self) -> Iterator[Piece]:
        edges = 0, self.plan.alone, self.plan.pair.shape[0]
        for chunks in (1, 2):
            step = max(1, GROUP_ELEMENTS // (self.rows * chunks * self.plan.key.shape[1]))
            for start in range(edges[chunks - 1], edges[chunks], step):
                yield _Group(self, slice(start, min(start + step, edges[chunks])))

    def by_query(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Rows of all groups as rows of queries `[N * Tq, ...]`."""
        return torch.cat(parts).index_select(0, self.plan.slot)

    def zero_gradients(self) -> None:
        self.d_k, self.d_v = torch.zeros_like(self.k), torch.zeros_like(self.v)

    def gradients(self) -> _Tensors:
        """Of keys and values `[N * Tk, D]`."""
        places = self.plan.key.numel()
        place = self.plan.place.clamp(max=places - 1)
        return tuple(x.view(places, -1).index_select(0, place) for x in (self.d_k, self.d_v))


class _Group(Piece):
    """Some blocks of a round, of one sequence and one head each."""

    def __init__(self, of: _Round, group: slice) -> None:
        self.of = of
        self.query = of.plan.query[group.start * of.rows : group.stop * of.rows]  # of each row, N * Tq for none
        # The chunk before and the own one, or that alone: [blocks, chunks].
        self.pair = of.plan.pair[group, 1 if group.stop <= of.plan.alone else 0 :]

    def rows(self, x: torch.Tensor, fill: float | None = None) -> torch.Tensor:
        """`[N * Tq, ...]` as `[blocks, 1, rows, ...]`."""
        taken = x.index_select(0, self.query.clamp(max=len(x) - 1))
        # Weights of what is no query must be 0: those of some other query on these keys may be too large for a number.
        if fill is not None:
            taken.masked_fill_((self.query == len(x)).view(-1, *[1] * (x.ndim - 1)), fill)
        return taken.view(-1, 1, self.of.rows, *x.shape[1:])

    def place(self, total: list[torch.Tensor], x: torch.Tensor) -> None:
        total.append(x.flatten(0, 2))

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[blocks, 1, chunks * chunk_size, D]`."""
        of, index = self.of, self.pair.flatten()
        k, v = (
            x.index_select(0, index).view(len(self.pair), 1, -1, x.shape[1] // of.plan.key.shape[1])
            for x in (of.k, of.v)
        )
        return k, v

    def add(self, part: slice, d_keys: torch.Tensor, d_values: torch.Tensor) -> None:
        for total, x in (self.of.d_k, d_keys), (self.of.d_v, d_values):
            total.index_add_(0, self.pair.flatten(), x.reshape(self.pair.numel(), -1))

    def bias(self) -> torch.Tensor:
        """`[blocks, 1, rows or 1, chunks * chunk_size]`, at most `LOG_ZERO` for keys that are not first shown here."""
        of, pair, blocks = self.of, self.pair, len(self.pair)

        def of_keys(x: torch.Tensor) -> torch.Tensor:  # [rows, chunk_size] to [blocks, 1, chunks * chunk_size]
            return x.index_select(0, pair.flatten()).view(blocks, 1, -1)

        query = self.query.clamp(max=of.count - 1)
        seen = of_keys(of.real)  # 2, or 0 or 1 for keys that are not
        if of.positions is not None:
            at = (query % of.q_len + of.offset + 2).to(seen.dtype).view(blocks, -1, 1)
            ahead = (at - of_keys(of.positions)).clamp_(0, 2)
            seen = torch.minimum(ahead, seen, out=ahead)
        for q_id, k_id in zip(of.q_ids, of.ids, strict=False):
            distance = _distance(q_id.index_select(0, query).view(blocks, -1, 1), of_keys(k_id))
            seen = torch.minimum(distance, seen, out=distance)
        bias = seen.to(of.bias_dtype).sub_(2).mul_(-LOG_ZERO)
        if of.self_bias:
            own = query + (query // of.q_len + 1) * of.offset  # the key of each query's token
            place, size = of.plan.place.index_select(0, own).view(blocks, -1, 1), of.plan.key.shape[1]
            column = place - pair[:, None] * size  # in each of the chunks: [blocks, rows, chunks]
            held = (column >= 0) & (column < size)
            column = (column + torch.arange(pair.shape[1], device=pair.device) * size) * held
            bias = bias.expand(-1, place.shape[1], -1).contiguous()
            bias.scatter_add_(2, column, (held * of.self_bias).to(bias.dtype))
        return bias[:, None]


class _ByPosition(Piece):
    """The round whose chunks are those of the positions, which are slices: all of it is one piece."""

    def __init__(self, tensors: _Tensors, chunk: int, settings: _Settings) -> None:
        (self.q, self.k, self.v), self.chunk, self.self_bias = tensors, chunk, settings[2]
        self.shape = self.q.shape[:2]

    def __iter__(self) -> Iterator[Piece]:
        yield self

    def by_query(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return parts[0]

    def rows(self, x: torch.Tensor, fill: float | None = None) -> torch.Tensor:
        """`[N * T, ...]` as `[N, chunks, chunk, ...]`, 0 beyond the end."""
        x = x.unflatten(0, self.shape)
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % self.chunk)).unflatten(1, (-1, self.chunk))

    def place(self, total: list[torch.Tensor], x: torch.Tensor) -> None:
        total.append(x.flatten(1, 2)[:, : self.shape[1]].flatten(0, 1))

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Each chunk behind the one before it, 0 if there is none: [N, chunks, 2 * chunk, D].
        ends, chunk = (0, 0, self.chunk, -self.shape[1] % self.chunk), self.chunk
        return F.pad(self.k, ends).unfold(1, 2 * chunk, chunk).mT, F.pad(self.v, ends).unfold(1, 2 * chunk, chunk).mT

    def bias(self) -> torch.Tensor:
        """`[N, chunks, chunk, 2 * chunk]`: a causal mask."""
        x, chunk = self.q, self.chunk
        row, column = torch.arange(chunk, device=x.device)[:, None], torch.arange(-chunk, chunk, device=x.device)
        bias = torch.zeros(chunk, 2 * chunk, dtype=accumulation_dtype(x.dtype), device=x.device)
        bias = bias.masked_fill(column == row, self.self_bias).masked_fill(column > row, LOG_ZERO)
        first = bias.masked_fill(column < 0, LOG_ZERO)
        return torch.cat([first[None], bias.expand(-(-x.shape[1] // chunk) - 1, -1, -1)]).expand(len(x), -1, -1, -1)

    def zero_gradients(self) -> None:
        self.grads: list[torch.Tensor] = []

    def add(self, part: slice, d_keys: torch.Tensor, d_values: torch.Tensor) -> None:
        for x in (d_keys, d_values):  # what a chunk gets, and the one before
            before, own = x.chunk(2, 2)
            whole = (own + F.pad(before[:, 1:], (0, 0, 0, 0, 0, 1))).flatten(1, 2)
            self.grads.append(whole[:, : self.shape[1]].flatten(0, 1))

    def gradients(self) -> _Tensors:
        return tuple(self.grads)
