"""Attention of queries over two neighbouring chunks of keys each, in several rounds of sorting.

The queries of one chunk are cut into blocks of equally many rows, so that a block attends to one piece of sorted keys.
Forward and backward go through a few blocks at a time: what a block gathers stays near the cache and is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hf_linear_attn.ops.lsh.plan import Plan, plan_round, sizes_may_depend_on_numbers

__all__ = ["attend_chunks"]

# Upper bound on the logits of the blocks in hand (1 MiB in fp32): with more, memory is mapped anew for every group.
GROUP_ELEMENTS = 1 << 18
# Upper bound on the keys of the heads in hand, by their places in chunks (4 MiB in fp32), measured on CPU: larger
# tensors are mapped anew in each use, and what is gathered from them comes from main memory.
HEAD_ELEMENTS = 1 << 20
# Added to the logit of a key that a query does not see: finite, so that a row without keys stays finite too.
UNSEEN = -1e30
_NOTHING = UNSEEN / 2  # a log-sum-exp below this is that of a row without keys


def attend_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_chunk: torch.Tensor,
    k_chunk: torch.Tensor,
    k_place: torch.Tensor,
    real: torch.Tensor,
    *,
    num_chunks: int,
    chunk_size: int,
    is_causal: bool,
    scaling: float,
    self_bias: float,
    by_position: bool = False,
    same: bool = False,
    fused: bool | None = None,
) -> torch.Tensor:
    """Softmax over the keys j of query i with q_chunk[r, i] - k_chunk[r, j] in {0, 1} for some round r, each once.

    Args:
        q: `[N, Tq, D]`, row r at position Tk - Tq + r.
        k: `[N, Tk, D]`.
        v: `[N, Tk, D]`, of the same dtype.
        q_chunk: long `[rounds, N, Tq]`, from 1 to num_chunks - 1.
        k_chunk: long `[rounds, N, Tk]`, from 1 to num_chunks - 1.
        k_place: long `[rounds, N, Tk]`, below `chunk_size`: no two real keys of a chunk share a place.
        real: bool `[N, Tk]`, False for keys that nobody sees.
        num_chunks: number of chunks.
        chunk_size: places of a chunk.
        is_causal: a query does not see later keys.
        scaling: factor of the logits.
        self_bias: added to the logit of a token with itself, unless 0.
        by_position: whether the first round's chunks are those of the positions, of queries and keys alike, and all
            keys are real (causal only): nothing needs to be gathered then.
        same: whether the queries are in the chunks of the keys, `q_chunk` equal to `k_chunk`, all keys are real and a
            chunk's keys fill its first places: the order of the keys serves for the queries then.
        fused: whether to use the attention kernels of the CPU; None uses them where they can run.

    Returns:
        `[N, Tq, D]`, in the dtype of the inputs; 0 where a query sees nothing.
    """
    can_fuse = q.device.type == "cpu" and q.shape[-1] == v.shape[-1]
    settings = (is_causal, scaling, self_bias, by_position, can_fuse if fused is None else fused, same)
    heads = _heads_at_a_time(q, num_chunks * chunk_size)
    parts = [*(x.split(heads) for x in (q, k, v)), *(x.split(heads, 1) for x in (q_chunk, k_chunk, k_place))]
    groups = zip(*parts, real.split(heads), strict=True)
    with torch.autocast(q.device.type, enabled=False):
        outs = [_AttendChunks.apply(*x, num_chunks, chunk_size, settings) for x in groups]  # type: ignore[no-untyped-call]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _heads_at_a_time(q: torch.Tensor, places: int) -> int:
    """How many heads to go through at once, each with as many places for keys."""
    if sizes_may_depend_on_numbers(q.device):
        return max(1, HEAD_ELEMENTS // (places * q.shape[2]))
    return max(1, q.shape[0])


_Settings = tuple[bool, float, float, bool, bool, bool]  # is_causal, scaling, self_bias, by_position, fused, same


class _AttendChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_chunk: torch.Tensor,
        k_chunk: torch.Tensor,
        k_place: torch.Tensor,
        real: torch.Tensor,
        num_chunks: int,
        chunk_size: int,
        settings: _Settings,
    ) -> torch.Tensor:
        plans = [
            plan_round(*x, real, num_chunks, chunk_size, settings[5])
            for x in list(zip(q_chunk.unbind(), k_chunk.unbind(), k_place.unbind(), strict=True))[settings[3] :]
        ]
        kind = _kind(num_chunks, k.shape[1], settings[0])
        ids = q_chunk.flatten(1).to(kind), k_chunk.flatten(1).to(kind)
        out = total = None
        for number in range(q_chunk.shape[0]):
            if settings[3] and number == 0:
                part, lse = _forward_by_position(q, k, v, chunk_size, settings)
            else:
                part, lse = _round_forward(_Round(number, plans[number - settings[3]], q, k, v, ids, settings))
            if out is None or total is None:
                out, total = part, lse
                continue
            both = torch.logaddexp(total, lse)
            out = out * (total - both).exp()[:, None] + part * (lse - both).exp()[:, None]
            total = both
        assert out is not None
        assert total is not None
        out = out.masked_fill((total < _NOTHING)[:, None], 0).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, total, real, *ids, *(x for plan in plans for x in plan.tensors()))
        ctx.settings, ctx.chunk_size, ctx.alone = settings, chunk_size, [plan.alone for plan in plans]
        return out.view(*q.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, total, real, q_ids, k_ids, *rest = ctx.saved_tensors
        plans = [Plan(tuple(rest[5 * i : 5 * i + 5]), alone) for i, alone in enumerate(ctx.alone)]
        dead = total < _NOTHING
        grad, total = grad.flatten(0, 1).masked_fill(dead[:, None], 0), total.masked_fill(dead, -UNSEEN)
        grads: tuple[torch.Tensor, ...] = ()
        for number in range(q_ids.shape[0]):
            if ctx.settings[3] and number == 0:
                new = _backward_by_position(q, k, v, out, total, grad, ctx.chunk_size, ctx.settings)
            else:
                plan = plans[number - ctx.settings[3]]
                new = _round_backward(_Round(number, plan, q, k, v, (q_ids, k_ids), ctx.settings), out, total, grad)
            grads = tuple(a + b for a, b in zip(grads, new, strict=True)) if grads else new
        dq, dk, dv = (x.view_as(y).to(y.dtype) for x, y in zip(grads, (q, k, v), strict=True))
        dk, dv = (x.masked_fill(~real[..., None], 0) for x in (dk, dv))
        return (dq, dk, dv, *[None] * 7)


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


class _Round:
    """What the blocks of one round gather, a group of blocks at a time."""

    def __init__(
        self,
        number: int,
        plan: Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ids: tuple[torch.Tensor, torch.Tensor],
        settings: _Settings,
    ) -> None:
        self.is_causal, self.scaling, self.self_bias, _, self.fused, _ = settings
        self.plan, self.q, self.q_ids = plan, q.flatten(0, 1), ids[0]
        self.q_len, self.offset = q.shape[1], k.shape[1] - q.shape[1]
        self.rows = plan.query.shape[0] // max(plan.chunk.shape[0], 1)
        key = plan.key.flatten()
        kind, some = ids[1].dtype, key < k.shape[0] * k.shape[1]
        self.real = (some.to(kind) * 2).view_as(plan.key)  # 0 or 2
        key = key.clamp(max=k.shape[0] * k.shape[1] - 1)
        # Rows of whole chunks `[N * C, ...]`: copying one moves chunk_size tokens at once.
        self.k, self.v = (x.flatten(0, 1).index_select(0, key).view(plan.key.shape[0], -1) for x in (k, v))
        self.positions = (key % k.shape[1]).to(kind).view_as(plan.key) if self.is_causal else None
        self.ids = [x.index_select(0, key).view_as(plan.key) for x in ids[1][:number]]
        self.bias_dtype = torch.promote_types(q.dtype, torch.float32)

    def groups(self) -> Iterator[slice]:
        edges = 0, self.plan.alone, self.plan.chunk.shape[0]
        for chunks in (1, 2):
            step = max(1, GROUP_ELEMENTS // (self.rows * chunks * self.plan.key.shape[1]))
            for start in range(edges[chunks - 1], edges[chunks], step):
                yield slice(start, min(start + step, edges[chunks]))

    def queries(self, group: slice) -> torch.Tensor:
        """long `[blocks * rows]`: the query of each row, N * Tq for none."""
        return self.plan.query[group.start * self.rows : group.stop * self.rows]

    def pairs(self, group: slice) -> torch.Tensor:
        """long `[blocks, chunks]`: the chunk before and the own one, or that alone."""
        chunk = self.plan.chunk[group, None]
        return chunk if group.stop <= self.plan.alone else torch.cat([chunk - 1, chunk], 1).clamp_(min=0)

    def bias(self, query: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
        """`[blocks, 1, rows or 1, chunks * chunk_size]`, at most `UNSEEN` for keys that are not first shown here."""
        blocks = pair.shape[0]

        def of_keys(x: torch.Tensor) -> torch.Tensor:  # [N * C, chunk_size] to [blocks, 1, chunks * chunk_size]
            return x.index_select(0, pair.flatten()).view(blocks, 1, -1)

        query = query.clamp(max=self.q.shape[0] - 1)
        seen = of_keys(self.real)  # 2, or 0 or 1 for keys that are not
        if self.positions is not None:
            at = (query % self.q_len + self.offset + 2).to(seen.dtype).view(blocks, -1, 1)
            ahead = (at - of_keys(self.positions)).clamp_(0, 2)
            seen = torch.minimum(ahead, seen, out=ahead)
        for q_id, k_id in zip(self.q_ids, self.ids, strict=False):
            distance = _distance(q_id.index_select(0, query).view(blocks, -1, 1), of_keys(k_id))
            seen = torch.minimum(distance, seen, out=distance)
        bias = seen.to(self.bias_dtype).sub_(2).mul_(-UNSEEN)
        if self.self_bias:
            own = query + (query // self.q_len + 1) * self.offset  # the key of each query's token
            start = pair[:, :1] * self.plan.key.shape[1]
            column = self.plan.place.index_select(0, own).view(blocks, -1) - start
            held = (column >= 0) & (column < seen.shape[2])
            bias = bias.expand(-1, column.shape[1], -1).contiguous()
            bias.scatter_add_(2, (column * held)[..., None], (held * self.self_bias).to(bias.dtype)[..., None])
        return bias[:, None]

    def tokens(self, x: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
        """Keys or values `[N * C, chunk_size * D]` as `[blocks, 1, chunks * chunk_size, D]`."""
        D = x.shape[1] // self.plan.key.shape[1]
        return x.index_select(0, pair.flatten()).view(pair.shape[0], 1, -1, D)

    def of_queries(self, x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Rows of `x` `[N * Tq, ...]` as `[blocks, 1, rows, ...]`, some row where there is no query."""
        taken = x.index_select(0, query.clamp(max=x.shape[0] - 1))
        return taken.view(-1, 1, self.rows, *x.shape[1:])


def _round_forward(this: _Round) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[N * Tq, D]` and log-sum-exp `[N * Tq]` of one round."""
    outputs, sums = [], []
    for group in this.groups():
        query, pair = this.queries(group), this.pairs(group)
        q, k, v = this.of_queries(this.q, query), this.tokens(this.k, pair), this.tokens(this.v, pair)
        out, lse = _attend(q, k, v, this.bias(query, pair), this.scaling, this.fused)
        outputs.append(out.flatten(0, 2))
        sums.append(lse.flatten())
    slot = this.plan.slot
    return torch.cat(outputs).index_select(0, slot), torch.cat(sums).index_select(0, slot)


def _round_backward(this: _Round, out: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients `[N * Tq, D]` of the queries and `[N * Tk, D]` of keys and values, through one round."""
    grads, dk, dv = [], torch.zeros_like(this.k), torch.zeros_like(this.v)
    for group in this.groups():
        query, pair = this.queries(group), this.pairs(group)
        q, k, v = this.of_queries(this.q, query), this.tokens(this.k, pair), this.tokens(this.v, pair)
        empty = (query == this.q.shape[0]).view(-1, 1, this.rows)
        of_rows = [this.of_queries(x, query) for x in (out, lse, grad)]
        # Their weights must be 0: those of some other query on these keys may be too large for a number.
        of_rows[1].masked_fill_(empty, -UNSEEN)
        of_rows[2].masked_fill_(empty[..., None], 0)
        bias = this.bias(query, pair)
        new = _attend_backward(q, k, v, bias, of_rows[0], of_rows[1], of_rows[2], this.scaling, this.fused)
        grads.append(new[0].flatten(0, 2))
        for total, part in ((dk, new[1]), (dv, new[2])):
            total.index_add_(0, pair.flatten(), part.reshape(pair.numel(), -1))
    places = this.plan.key.numel()
    place = this.plan.place.clamp(max=places - 1)
    dk, dv = (x.view(places, -1).index_select(0, place) for x in (dk, dv))
    return torch.cat(grads).index_select(0, this.plan.slot), dk, dv


def _windows(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """Each chunk of `x` `[N, T, D]` behind the one before it (0 if there is none): `[N, chunks, 2 * chunk, D]`."""
    return F.pad(x, (0, 0, chunk, -x.shape[1] % chunk)).unfold(1, 2 * chunk, chunk).mT


def _bias_by_position(x: torch.Tensor, chunk: int, settings: _Settings) -> torch.Tensor:
    """Bias `[chunks, chunk, 2 * chunk]` for `_windows` of `x`: a causal mask."""
    row, column = torch.arange(chunk, device=x.device)[:, None], torch.arange(-chunk, chunk, device=x.device)
    bias = torch.zeros(chunk, 2 * chunk, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    bias = bias.masked_fill(column == row, settings[2]).masked_fill(column > row, UNSEEN)
    first = bias.masked_fill(column < 0, UNSEEN)
    return torch.cat([first[None], bias.expand(-(-x.shape[1] // chunk) - 1, -1, -1)])


def _forward_by_position(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: int, settings: _Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_round_forward` of the round whose chunks are those of the positions."""
    (N, T, _), bias = q.shape, _bias_by_position(q, chunk, settings)
    q = F.pad(q, (0, 0, 0, -T % chunk)).unflatten(1, (-1, chunk))
    out, lse = _attend(q, _windows(k, chunk), _windows(v, chunk), bias.expand(N, -1, -1, -1), settings[1], settings[4])
    return out.flatten(1, 2)[:, :T].flatten(0, 1), lse.flatten(1)[:, :T].flatten()


def _backward_by_position(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    chunk: int,
    settings: _Settings,
) -> tuple[torch.Tensor, ...]:
    """`_round_backward` of the round whose chunks are those of the positions."""
    (N, T, _), bias = q.shape, _bias_by_position(q, chunk, settings)
    of_rows = (x.unflatten(0, (N, T)) for x in (out, lse[:, None], grad))
    q, out, lse, grad = (F.pad(x, (0, 0, 0, -T % chunk)).unflatten(1, (-1, chunk)) for x in (q, *of_rows))
    given = bias.expand(N, -1, -1, -1), out, lse[..., 0], grad
    dq, *rest = _attend_backward(q, _windows(k, chunk), _windows(v, chunk), *given, settings[1], settings[4])

    def of_keys(x: torch.Tensor) -> torch.Tensor:  # [N, chunks, 2 * chunk, D]: what a chunk gets, and the one before
        before, own = x.chunk(2, 2)
        return (own + F.pad(before[:, 1:], (0, 0, 0, 0, 0, 1))).flatten(1, 2)[:, :T].flatten(0, 1)

    return dq.flatten(1, 2)[:, :T].flatten(0, 1), *(of_keys(x) for x in rest)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scaling: float, fused: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with a bias on the logits: output `[blocks, 1, rows, D]` and log-sum-exp `[blocks, 1, rows]`."""
    if fused:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scaling)
    logits = (q @ k.mT).to(bias.dtype) * scaling + bias
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().to(v.dtype) @ v, lse


def _attend_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    scaling: float,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, given the output and the log-sum-exp over all rounds and the output's gradient."""
    if fused:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scaling
        )
    weights = ((q @ k.mT).to(bias.dtype) * scaling + bias - lse[..., None]).exp()
    delta = (grad.to(bias.dtype) * out.to(bias.dtype)).sum(-1, keepdim=True)
    slope = (weights * ((grad @ v.mT).to(bias.dtype) - delta) * scaling).to(q.dtype)
    return slope @ k, slope.mT @ q, weights.to(grad.dtype).mT @ grad
