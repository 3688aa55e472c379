"""The causal form of `ops.window.taylor`, in blocks of tokens with a backward pass of its own.

Keys are laid out `left` places late: the windows of chunk n, of C rows, lie in chunks n .. n + steps - 1 of the keys.
Before the diagonal of the first of these are keys that a row's window has left: they weigh products of features, from
u. The keys of earlier chunks come in as sums, relative to the largest log scale so far, that of a key which every later
row sees. So nothing overflows, and no later key changes a bit of a row.

The forward pass keeps the inputs, the output, the logs of the denominators and the sums before each block; the backward
pass computes all else again, block by block. A block's tensors are `[N, G, C, X]`, of N chunks and G = B H heads: the
chunks from any one on are a view, so that no product copies its windows.

Weights are powers of two (see `ops.base.numerics`). Masks are factors and terms: on a CPU, filling by a mask takes ten
times as long.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.base.numerics import LOG2_E, LOG_ZERO, full_precision
from hf_linear_attn.ops.features.gradients import MapGradients, leaf, map_parts
from hf_linear_attn.ops.features.maps import FeatureMap, Features
from hf_linear_attn.ops.linear.attention import State
from hf_linear_attn.ops.window.taylor import expand, expand_backward, with_one

__all__ = ["causal_taylor_window_attention"]

_CHUNK = 64  # rows of a chunk: fewer cost more for the sums, more cost more for weights, of the future too
# Rows of the heads that are worked off together, and elements of their weights.
_CPU_ROWS, _CPU_ELEMENTS = 6144, 1 << 22
_ROWS, _ELEMENTS = 1 << 19, 1 << 26
_NO_WEIGHT = LOG_ZERO / 2  # logs of weights up to it are those of nothing

_Sums = tuple[torch.Tensor, torch.Tensor]  # phi(k) [v, 1]^T over earlier keys, [G, F, D + 1], relative to 2^log, [G]


def causal_taylor_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_coordinates: FeatureMap,
    k_coordinates: FeatureMap,
    *,
    left: int,
    scaling: float,
    window_log_factor: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    state: State | None = None,
) -> tuple[torch.Tensor, State]:
    """Attend. Query row r sits at position Tk - Tq + r. Not differentiable twice.

    Args:
        q: `[B, H, Tq, D]`; k, v: `[B, H, Tk, D]`. Of one dtype, float32 or float64, finite at padding too.
        q_coordinates, k_coordinates: maps of tokens to coordinates `[B, H, T, R]` and log scales of their features,
            `[B, H, T]` or None. What trains in them is among the parameters of a `ParametricMap`.
        left: keys of the window before a query's own.
        scaling: factor of the logits.
        window_log_factor: log of what the window's terms are multiplied by, `[H]`.
        token_mask: bool `[B or 1, Tk]`, or None when all keys are real.
        state: linear attention's, over keys older than `k`, with the features of `taylor_features`.

    Returns:
        `[B, H, Tq, D]`, 0 in rows that see no key, and the state with the keys that the last query's window has left.
    """
    (q_function, q_parameters), (k_function, k_parameters) = map_parts(q_coordinates), map_parts(k_coordinates)
    options = q_function, k_function, len(q_parameters), min(left, k.shape[2] - 1), scaling
    start = (None, None) if state is None else _from_state(state, v.dtype)
    arguments = q, k, v, window_log_factor, token_mask, *start, *q_parameters, *k_parameters
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments):
        output, sums, log = _Attention.apply(options, *arguments)
    else:
        output, _, _, (sums, log) = _forward(_Call(options, arguments))
    return output, _to_state(sums, log, q.shape[:2])


def _from_state(state: State, dtype: torch.dtype) -> _Sums:
    sums = torch.cat([state["kv"], state["z"][..., None]], -1).flatten(0, 1).to(dtype)
    log = (state["log_scale"].to(dtype) * LOG2_E).clamp(min=_NO_WEIGHT).flatten()
    return sums.index_select(1, _order(sums)), log


def _to_state(sums: torch.Tensor, log: torch.Tensor, shape: torch.Size) -> State:
    sums = sums.index_select(1, _order(sums).argsort()).unflatten(0, shape)
    log_scale = torch.where(log > _NO_WEIGHT, log / LOG2_E, LOG_ZERO).view(shape)
    return {"kv": sums[..., :-1], "z": sums[..., -1], "log_scale": log_scale}


def _order(sums: torch.Tensor) -> torch.Tensor:
    """Where the features of `expand` stand among those of `taylor_features`: by gap of the pair, not by its first."""
    size = int((2 * sums.shape[1]) ** 0.5)
    row, column = torch.triu_indices(size, size, device=sums.device)
    return ((column - row) * size + row).argsort()


class _Call:
    """One call: its tensors, and how they are cut.

    Attributes:
        size, steps: C, and the chunks of keys that the windows of a chunk lie in.
        first: position of the first key of row 0's window; negative where padding comes first.
        stop: position of the first key of the last row's window.
        blocks: first row and number of chunks of each; rows below 0 are places of keys before those of row 0.
        future: of each chunk of keys, what is added to the logs of its weights, `[C, C]`; None for nothing.
        passed, held: 1 at keys of the first chunk that have left a row's window, and at all others, `[C, C]`.
    """

    def __init__(self, options: Any, arguments: Any, trains: bool = False) -> None:
        self.trains = trains
        self.q_map, self.k_map, self.q_count, left, self.scaling = options
        self.q, self.k, self.v, self.factor, self.token_mask, sums, log, *parameters = arguments
        self.parameters = tuple(leaf(x, trains and x.requires_grad) for x in parameters)
        self.start = None if sums is None else (sums, log)
        self.shape, length, device = self.q.shape[:2], self.q.shape[2], self.q.device
        self.size = min(_CHUNK, length)
        self.steps = -(-(self.size + left) // self.size)
        self.first = self.k.shape[2] - length - left
        self.stop = max(self.first + length - 1, 0)
        rows, elements = (_CPU_ROWS, _CPU_ELEMENTS) if device.type == "cpu" else (_ROWS, _ELEMENTS)
        rows = min(rows, elements // (self.steps * self.size)) // self.shape.numel()
        block = max(1, rows // self.size) * self.size
        earlier = -(-max(self.first, 0) // self.size) * self.size
        self.blocks = [(i, min(block, -i) // self.size) for i in range(-earlier, 0, block)]
        self.blocks += [(i, -(-min(block, length - i) // self.size)) for i in range(0, length, block)]
        place = torch.arange(self.steps * self.size, device=device)
        step = place - place[: self.size, None]
        future = torch.zeros_like(step, dtype=self.q.dtype).masked_fill_(step > left, LOG_ZERO)
        self.future = [part if part.any() else None for part in future.split(self.size, 1)]
        self.passed = (step[:, : self.size] < 0).to(self.q.dtype)
        self.held = 1 - self.passed

    def place(self, start: int, count: int, length: int) -> tuple[slice, slice]:
        """Which of `length` rows are in `count` chunks from row `start` on, and where they stand in these."""
        low = min(max(start, 0), length)
        high = max(min(start + count * self.size, length), low)
        front = min(max(-start, 0), count * self.size)
        return slice(low, high), slice(front, front + high - low)

    def cut(self, x: torch.Tensor, there: slice, count: int, value: float = 0.0) -> torch.Tensor:
        """Rows `[B, H, T, X]`, which stand `there` in the chunks, as `[N, B, H, C, X]`."""
        total = count * self.size
        if x.shape[2] < total:
            x = F.pad(x, (0, 0, there.start, total - there.stop), value=value)
        return x.unflatten(2, (count, self.size)).permute(2, 0, 1, 3, 4)

    def laid(self, x: torch.Tensor, start: int, count: int, more: int = 0) -> torch.Tensor:
        """Chunks from row `start` of `x` `[B, H, T, X]` on, with room for more channels: `[N, G, C, X + more]`."""
        here, there = self.place(start, count, x.shape[2])
        found = x.new_empty(count, *self.shape, self.size, x.shape[3] + more)
        found[..., : x.shape[3]] = self.cut(x[:, :, here], there, count)
        return found.flatten(1, 2)

    def apart(self, x: torch.Tensor) -> torch.Tensor:
        """Chunks `[N, G, C, X]` or `[N G, C, X]` as `[B, H, N, C, X]`."""
        return x.view(-1, *self.shape, self.size, x.shape[-1]).permute(1, 2, 0, 3, 4)

    def whole(self, x: torch.Tensor, there: slice) -> torch.Tensor:
        """Rows `[B, H, T, X]` that stand `there` in the chunks."""
        return self.apart(x).flatten(2, 3)[:, :, there]

    def map_queries(self, q: torch.Tensor) -> Features:
        with torch.set_grad_enabled(self.trains):
            return self.q_map(q, *self.parameters[: self.q_count])

    def map_keys(self, k: torch.Tensor) -> Features:
        with torch.set_grad_enabled(self.trains):
            return self.k_map(k, *self.parameters[self.q_count :])

    def values(self, start: int, count: int) -> torch.Tensor:
        """Values, and 1, which adds up to the denominator: of all windows of a block, `[M, G, C, D + 1]`."""
        found = self.laid(self.v, self.first + start, count + (self.steps - 1 if start >= 0 else 0), 1)
        found[..., -1] = 1.0
        return found

    def keys(self, start: int, count: int) -> torch.Tensor:
        """Keys, 1, and what is added to their logits, `LOG_ZERO` where there is no key: `[M, G, C, D + 2]`."""
        count += self.steps - 1
        found = self.laid(self.k, self.first + start, count, 2)
        here, there = self.place(self.first + start, count, self.k.shape[2])
        bias = found.new_full((1 if self.token_mask is None else len(self.token_mask), count * self.size), LOG_ZERO)
        bias[:, there] = 0.0 if self.token_mask is None else torch.where(self.token_mask[:, here], 0.0, LOG_ZERO)
        found[..., -2] = 1.0
        found.unflatten(1, self.shape)[..., -1] = bias.unflatten(1, (count, self.size)).transpose(0, 1)[:, :, None]
        return found

    def queries(self, start: int, count: int, log_scale: torch.Tensor | None) -> torch.Tensor:
        """Scaled queries, what is added to the logits of their window, and 1: `[N, G, C, D + 2]`."""
        found = self.laid(self.q, start, count, 2)
        found[..., :-2] *= self.scaling * LOG2_E
        # A query's scale multiplies the tail: what is the same for a whole row cancels, so it is taken off the window.
        factor = self.factor.to(found.dtype)[:, None]
        balance = factor.expand(1, -1, self.q.shape[2] - start) if log_scale is None else factor - log_scale.detach()
        balance = balance[:, :, : count * self.size, None] * LOG2_E
        found.unflatten(1, self.shape)[..., -2:-1] = self.cut(balance, slice(0, balance.shape[2]), count)
        found[..., -1] = 1.0
        return found


class _Late:
    """Keys that rows leave behind: the sums of all before each chunk of a block, and after its last.

    Attributes:
        here, there: their positions, and where these stand in the chunks.
        keys, outputs: `[B, H, T, D]`, and their coordinates and log scales.
        rank, log: coordinates `[N G, C, R]`, and log scales to the base 2, `[N G, C]`.
        before, tops: sums `[N + 1, G, F, D + 1]`, relative to 2^tops, `[N + 1, G]`.
    """

    def __init__(self, call: _Call, start: int, v: torch.Tensor, earlier: _Sums | None) -> None:
        count, heads = v.shape[:2]
        self.here, self.there = call.place(call.first + start, count, call.stop)
        self.keys = leaf(call.k[:, :, self.here], call.trains)
        self.outputs = call.map_keys(self.keys)
        rank, log = (None if x is None else x.detach() for x in self.outputs)
        assert rank is not None
        log = torch.zeros_like(rank[..., 0]) if log is None else log * LOG2_E
        if call.token_mask is not None:
            log = log.masked_fill(~call.token_mask[:, None, self.here], LOG_ZERO)
        self.rank = call.cut(rank, self.there, count).reshape(count * heads, call.size, -1)
        log = call.cut(log[..., None], self.there, count, LOG_ZERO).reshape(count, heads, call.size)
        self.log, self._rows = log.flatten(0, 1), with_one(self.rank)
        features = expand(self._rows)
        if earlier is None:
            sums = v.new_zeros(heads, features.shape[1], v.shape[3])
            earlier = sums, sums.new_full((heads,), _NO_WEIGHT)
        self.tops = torch.cat([earlier[1][None], log.amax(-1)]).cummax(0).values
        self._kept = (self.tops[:-1] - self.tops[1:]).exp2_()[..., None, None]
        self._factors = (log - self.tops[1:, :, None]).exp2_()[..., None]
        self._weighted = v * self._factors
        self.before = v.new_empty(count + 1, *earlier[0].shape)
        self.before[0] = earlier[0]
        torch.bmm(features, self._weighted.flatten(0, 1), out=self.before[1:].flatten(0, 1))
        for n in range(count):
            self.before[n + 1].addcmul_(self.before[n], self._kept[n])

    def backward(self, d_before: torch.Tensor, d_v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of `rank` and `log`; those of the values are added to `d_v`.

        Of the sums' gradients `d_before` those before a chunk are of its own rows; they become those of all later rows.
        """
        for n in reversed(range(len(self._kept))):
            d_before[n].addcmul_(d_before[n + 1], self._kept[n])
        d_sums = d_before[1:].flatten(0, 1)
        d_weighted = torch.bmm(expand(self._rows).mT, d_sums).view_as(self._weighted)
        d_v.addcmul_(d_weighted[..., :-1], self._factors)
        d_features = torch.bmm(d_sums, self._weighted.flatten(0, 1).mT)
        return expand_backward(self._rows, d_features), d_weighted.mul_(self._weighted).sum(-1).flatten(0, 1)


class _Rows:
    """Rows of a block and their weights, relative to 2^log `[N G, C]`.

    That is `logs`, `[B, H, T, 1]`, or the largest of each row.

    Attributes:
        queries, outputs: `[B, H, T, D]`, and their coordinates and log scales.
        q, k: what is multiplied to logits, `[N G, C, D + 2]` and, of all chunks of keys, `[M, G, C, D + 2]`.
        weights: of each chunk of keys but for products of features, `[N G, C, C]`.
        u, product: of keys that have left the window, 0 elsewhere; u + u^2 / 2.
        far: weights of the sums before each chunk, `[N G, C, 1]`.
    """

    def __init__(self, call: _Call, start: int, late: _Late, logs: torch.Tensor | None = None) -> None:
        count = len(late.before) - 1
        self.queries = leaf(call.q[:, :, start : start + count * call.size], call.trains)
        self.outputs = call.map_queries(self.queries)
        self.there = slice(0, self.queries.shape[2])
        rank = call.cut(self.outputs[0].detach(), self.there, count)
        self.rank = rank.reshape(len(late.rank), call.size, -1)
        self.q = call.queries(start, count, self.outputs[1]).flatten(0, 1)
        self.k = call.keys(start, count)
        self.weights = []
        for n, future in enumerate(call.future):
            scores = torch.bmm(self.q, self.k[n : n + count].flatten(0, 1).mT)
            if n == 0:
                scores.mul_(call.held).addcmul_(late.log[:, None], call.passed)
            self.weights.append(scores if future is None else scores.add_(future))
        tops = late.tops[:-1].flatten()[:, None]
        self.log = tops
        if logs is None:
            for scores in self.weights:
                self.log = torch.maximum(self.log, scores.amax(-1))
        else:
            self.log = call.cut(logs, self.there, count).reshape(-1, call.size)
        for scores in self.weights:
            scores.sub_(self.log[..., None]).exp2_()
        self.far = (tops - self.log).exp2_()[..., None]
        self.u = torch.bmm(self.rank, late.rank.mT).mul_(call.passed)
        self.product = torch.addcmul(self.u, self.u, self.u, value=0.5)
        self._rows = with_one(self.rank)

    def forward(self, late: _Late, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `[N G, C, D]` and the log of the denominators, `-LOG_ZERO` in rows that see no key."""
        count = len(late.before) - 1
        sums = torch.bmm(expand(self._rows).mT, late.before[:-1].flatten(0, 1)).mul_(self.far)
        output, total = sums[..., :-1].contiguous(), sums[..., -1]
        self.weights[0].addcmul_(self.weights[0], self.product)
        for n, weights in enumerate(self.weights):
            output.baddbmm_(weights, v[n : n + count].flatten(0, 1)[..., :-1])
            total += weights.sum(-1)
        seen = total > 0
        return (
            output.div_(torch.where(seen, total, 1.0)[..., None]),
            torch.where(seen, self.log + total.log2(), -LOG_ZERO),
        )

    def backward(
        self, call: _Call, late: _Late, v: torch.Tensor, change: torch.Tensor, d_before: torch.Tensor, d_v: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of `rank`, `q` and `k`, and of `rank` and `log` of `late`.

        Args:
            change: gradients of the output and what those of weights are relative to, `[N G, C, D + 1]`; overwritten.
            d_before: those of the sums before each chunk, written; d_v: those of the values, added to.
        """
        count = len(late.before) - 1
        d_q, d_k = torch.zeros_like(self.q), torch.zeros_like(self.k)
        for n, weights in enumerate(self.weights):
            at = slice(n, n + count)
            d_scores = torch.bmm(change, v[at].flatten(0, 1).mT).mul_(weights)
            if n == 0:
                weights.addcmul_(weights, self.product)
                d_u = torch.addcmul(d_scores, d_scores, self.u).mul_(call.passed)
                d_scores.addcmul_(d_scores, self.product)
                d_log = (d_scores * call.passed).sum(1)
                d_scores.mul_(call.held)
            d_v[at].flatten(0, 1).baddbmm_(weights.mT, change[..., :-1])
            d_k[at].flatten(0, 1).baddbmm_(d_scores.mT, self.q)
            d_q.baddbmm_(d_scores, self.k[at].flatten(0, 1))
        change.mul_(self.far)
        torch.bmm(expand(self._rows), change, out=d_before[:-1].flatten(0, 1))
        d_rank = expand_backward(self._rows, torch.bmm(late.before[:-1].flatten(0, 1), change.mT))
        return d_rank.baddbmm(d_u, late.rank), d_q, d_k, torch.bmm(d_u.mT, self.rank), d_log


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, *arguments: torch.Tensor | None) -> Any:
        output, log, before, after = _forward(_Call(options, arguments))
        ctx.options, ctx.count = options, len(arguments)
        ctx.save_for_backward(*arguments, output, log, *(x for sums in before for x in sums or (None, None)))
        ctx.mark_non_differentiable(after[1])
        ctx.set_materialize_grads(False)
        return output, *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: torch.Tensor | None, d_sums: torch.Tensor | None, _: Any) -> Any:
        tensors = ctx.saved_tensors  # once: under activation checkpointing every reading recomputes
        arguments, (output, log, *sums) = tensors[: ctx.count], tensors[ctx.count :]
        before = [None if x is None else (x, y) for x, y in zip(sums[::2], sums[1::2], strict=True)]
        found = _backward(_Call(ctx.options, arguments, trains=True), output, log, before, d_output, d_sums)
        return None, *(x if wanted else None for x, wanted in zip(found, ctx.needs_input_grad[1:], strict=True))


def _forward(call: _Call) -> Any:
    """Output, logs of the denominators to the base 2, the sums before each block, and those after the call."""
    (B, H), length = call.shape, call.q.shape[2]
    padded = -(-length // call.size) * call.size
    sums, before = call.start, []
    with torch.no_grad(), full_precision(call.v):
        output = call.v.new_empty(B, padded, H, call.v.shape[3]).transpose(1, 2)
        logs = call.v.new_empty(B, H, padded, 1)
        for start, count in call.blocks:
            before.append(sums)
            v = call.values(start, count)
            late = _Late(call, start, v[:count], sums)
            sums = late.before[-1].clone(), late.tops[-1]
            if start >= 0:
                now = slice(start, start + count * call.size)
                found, log = _Rows(call, start, late).forward(late, v)
                for rows, part in ((output, found), (logs, log[..., None])):
                    rows[:, :, now].unflatten(2, (count, -1)).copy_(call.apart(part))
    return output[:, :, :length], logs, before, sums


def _backward(
    call: _Call,
    output: torch.Tensor,
    logs: torch.Tensor,
    before: list[_Sums | None],
    d_output: torch.Tensor | None,
    d_sums: torch.Tensor | None,
) -> list[Any]:
    """Gradients of the arguments of `_Attention.forward`, in their order."""
    found = MapGradients(call.parameters)
    d_q, d_k, d_v = torch.empty_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v)
    d_factor = torch.zeros_like(call.factor)
    d_output = torch.zeros_like(output) if d_output is None else d_output
    for (start, count), earlier in reversed(list(zip(call.blocks, before, strict=True))):
        v = call.values(start, count)
        late = _Late(call, start, v[:count], earlier)
        d_before, d_values = torch.zeros_like(late.before), torch.zeros_like(v[..., :-1])
        if d_sums is not None:
            d_before[-1] = d_sums
        d_near: Any = 0.0, 0.0
        place, there = call.place(call.first + start, len(v), call.k.shape[2])
        if start >= 0:
            now = slice(start, start + count * call.size)
            rows = _Rows(call, start, late, logs[:, :, now])
            change = call.laid(d_output, start, count, 1)
            change[..., -1] = (change[..., :-1] * call.laid(output, start, count)).sum(-1).neg_()
            d_rank, d_rows, d_keys, *d_near = rows.backward(call, late, v, change.flatten(0, 1), d_before, d_values)
            d_rows = call.whole(d_rows, rows.there)
            given = call.whole(d_rank, rows.there), -d_rows[..., -2]
            d_q[:, :, now] = found.through(rows.outputs, given, [rows.queries], call.parameters)[0]
            d_q[:, :, now].add_(d_rows[..., :-2], alpha=call.scaling)
            d_factor += d_rows[..., -2].sum((0, 2))
            d_k[:, :, place].add_(call.whole(d_keys, there)[..., :-2], alpha=1 / LOG2_E)
        d_rank, d_log = (x + y for x, y in zip(late.backward(d_before, d_values[:count]), d_near, strict=True))
        given = call.whole(d_rank, late.there), call.whole(d_log[..., None], late.there)[..., 0]
        d_k[:, :, late.here] += found.through(late.outputs, given, [late.keys], call.parameters)[0]
        d_v[:, :, place] += call.whole(d_values, there)
        d_sums = d_before[0]
    return [d_q, d_k, d_v, d_factor, None, d_sums, None, *found.parameters]
