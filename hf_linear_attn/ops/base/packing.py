"""Batches of sequences that differ in length: packed rows, and rows that are mostly padding.

A plan cuts a batch into its sequences, puts sequences of similar length together in buckets, and names the token that
stands in each place of them. Attention then runs bucket by bucket on right-padded rows, and its output goes back to the
batch's own order. It is exact for every method whose output does not depend on padding and on batch-mates.

Buckets are chosen by cost: their places plus a fixed number of tokens for each bucket's calls. The plan is made on the
CPU from lengths (one read from the device), and all moves are copies of whole rows, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_linear_attn.ops.base.masking import is_on_host

__all__ = [
    "PACKED_MESSAGE",
    "Bucket",
    "BucketAttention",
    "SequencePlan",
    "attend_by_bucket",
    "is_traced",
    "plan_call",
    "plan_padded",
    "plan_sequences",
    "sequence_begins",
]

PACKED_MESSAGE = (
    "Packed sequences (position_ids that restart, cu_seq_lens_q or seq_idx) run in the self-attention of eager models "
    "without a cache. Pass use_cache=False, and do not compile, export or calibrate on them; or pad the batch instead "
    "and pass its attention_mask."
)

# What another bucket costs, in tokens that its calls could have attended to instead: the time of a call on a single
# token over the time of a further token. On a GPU launches weigh far more against arithmetic.
CALL_TOKENS = {"cpu": 64}
CALL_TOKENS_ELSEWHERE = 8192
# A padded batch is regrouped when that leaves at most this share of its cost: moving rows there and back costs too.
PAYING_SHARE = 0.7
# Sequences this much shorter than the longest of their group begin another; groups are then merged by cost.
GROUP_RATIO = 0.7

BucketAttention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    torch.Tensor,
]
"""(query, key, value `[R, H, W, D]`, real bool `[R, W]` or None, hidden_states `[R, W, C]` or None, global_mask bool
`[R, W]` or None) -> output `[R, H, W, D]`. Padding is on the right and repeats the first token of its row with its
mark."""


@dataclass(frozen=True)
class Bucket:
    """R sequences of similar length, right-padded to W tokens.

    Attributes:
        rows: R.
        width: W, the longest of its sequences.
        real: bool `[R, W]`, False at padding; None when all are W long.
    """

    rows: int
    width: int
    real: torch.Tensor | None


@dataclass(frozen=True)
class SequencePlan:
    """How to run a batch `[B, T]` sequence by sequence.

    Attributes:
        packed: whether some row holds several sequences, which must not see one another.
        buckets: none when the batch may run as it is.
        index: long `[S]`, the token (of the B * T) in each place of the buckets, one bucket after the other; padding
            repeats the first token of its row.
        slot: long `[B * T]`, the place of each token; 0 for padding.
        token_real: bool `[B * T]`, False for padding of the batch; None without.
        slot_real: bool `[S]`, False for padding of the buckets; None without.
        last_real: whether the last token of every row is real; None where that was not looked at.
        has_holes: whether padding stands between tokens of a sequence, so that its places in a bucket are others.
    """

    packed: bool = False
    buckets: tuple[Bucket, ...] = ()
    index: torch.Tensor | None = None
    slot: torch.Tensor | None = None
    token_real: torch.Tensor | None = None
    slot_real: torch.Tensor | None = None
    last_real: bool | None = True
    has_holes: bool = False


def is_traced() -> bool:
    """Whether this call is being turned into a graph, which cannot depend on the data."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def plan_call(
    batch: int,
    length: int,
    token_mask: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> SequencePlan:
    """Plan of a forward over `batch` rows of `length` tokens: of packed sequences, else of its padding.

    A graph that is being traced cannot depend on the data: there the plan is empty, and the graph asserts that there is
    a sequence per row. Padding that lies on a GPU is not looked at, as the CPU would wait for it: no batch is regrouped
    then, only packed rows are.

    Args:
        batch: B.
        length: T.
        token_mask: `[B, T]`, nonzero for a real token, or None.
        cu_seq_lens: `[sequences + 1]` or None, as for `plan_sequences`.
        seq_idx: `[B, T]` or None.
        device: where the tokens lie, if not where `token_mask` does.

    Raises:
        ValueError: for cu_seq_lens of several sequences while a graph is traced, and as `plan_sequences`.
    """
    if length < 2:
        return SequencePlan()
    if is_traced():
        if cu_seq_lens is not None and len(cu_seq_lens) != batch + 1:
            raise ValueError(PACKED_MESSAGE)
        if seq_idx is not None:
            torch._assert_async((seq_idx.diff(dim=-1) == 0).all(), PACKED_MESSAGE)
        return SequencePlan()
    padding = None if token_mask is None else token_mask.bool()
    if padding is not None and is_on_host(padding) and bool(padding.all()):
        padding = None
    plan = SequencePlan()
    if cu_seq_lens is not None or seq_idx is not None:
        plan = plan_sequences(batch, length, cu_seq_lens=cu_seq_lens, seq_idx=seq_idx, token_mask=padding)
    if padding is None:
        return plan
    if not is_on_host(padding):
        return replace(plan, last_real=None)
    return replace(plan if plan.packed else plan_padded(padding, device), last_real=bool(padding[:, -1].all()))


def plan_sequences(
    batch: int,
    length: int,
    *,
    cu_seq_lens: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> SequencePlan:
    """Plan of a batch whose rows may hold several sequences.

    A sequence begins at each row's start, at every entry of `cu_seq_lens` and where `seq_idx` changes.

    Args:
        batch: B.
        length: T.
        cu_seq_lens: `[sequences + 1]`, where sequences begin and end among the B * T tokens.
        seq_idx: `[1 or B, T]`.
        token_mask: bool `[B, T]`, True for a real token, or None when all are.

    Raises:
        ValueError: for seq_idx of another shape, or cu_seq_lens beyond the tokens.
    """
    device = next((x.device for x in (token_mask, cu_seq_lens, seq_idx) if x is not None), None)
    if token_mask is not None:
        token_mask = token_mask.bool().cpu()
        token_mask = None if bool(token_mask.all()) else token_mask
    rows = torch.arange(batch).repeat_interleave(length)
    order = None if token_mask is None else token_mask.flatten().nonzero()[:, 0]
    rows = rows if order is None else rows[order]
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[1:] = row_changes = rows[1:] != rows[:-1]
    if seq_idx is not None:
        ids = seq_idx[None] if seq_idx.ndim == 1 else seq_idx
        if ids.ndim != 2 or ids.shape[1] != length or ids.shape[0] not in (1, batch):
            raise ValueError(f"seq_idx has shape {tuple(ids.shape)}; expected {(batch, length)} [batch, length].")
        flat = ids.cpu().expand(batch, -1).flatten()
        starts[1:] |= (flat if order is None else flat[order]).diff() != 0
    if cu_seq_lens is not None:
        places = cu_seq_lens.cpu().long()
        if places.ndim != 1 or (len(places) and not 0 <= int(places.min()) <= int(places.max()) <= batch * length):
            raise ValueError(f"cu_seq_lens must be places among the {batch * length} tokens, got {places.tolist()}.")
        # A sequence begins with the first real token at its place or after.
        found = places if order is None else torch.searchsorted(order, places)
        starts[found[found < len(starts)]] = True
    packed = bool((starts[1:] & ~row_changes).any())
    if not packed:
        return SequencePlan()
    begin = starts.nonzero()[:, 0]
    lengths = torch.cat([begin, torch.tensor([len(starts)])]).diff()
    return _plan(batch * length, begin, lengths, order, device, packed=True)


def sequence_begins(plan: SequencePlan, batch: int, length: int) -> torch.Tensor | None:
    """Where the sequences of a packed plan begin, bool `[batch, length]`; None for a plan of one sequence per row."""
    if not plan.packed or plan.index is None:
        return None
    begins = torch.zeros(batch * length, dtype=torch.bool, device=plan.index.device)
    places = plan.index.split([bucket.rows * bucket.width for bucket in plan.buckets])
    for bucket, place in zip(plan.buckets, places, strict=True):
        begins[place.view(bucket.rows, bucket.width)[:, 0]] = True
    return begins.view(batch, length)


def plan_padded(token_mask: torch.Tensor, device: torch.device | None = None) -> SequencePlan:
    """Plan of a batch of one sequence per row; without buckets when regrouping would not pay.

    Args:
        token_mask: bool `[B, T]`, True for a real token.
        device: where the tokens lie, if not where `token_mask` does.
    """
    batch, length = token_mask.shape
    device = token_mask.device if device is None else device
    overhead = _call_tokens(device)
    lengths = token_mask.sum(-1).cpu()
    if not int(lengths.max()):
        return SequencePlan()
    groups = _groups(lengths[lengths > 0], overhead)
    if _cost(groups, overhead) > PAYING_SHARE * (batch * length + overhead):
        return SequencePlan()
    order = token_mask.cpu().flatten().nonzero()[:, 0]
    begin = lengths.cumsum(0) - lengths
    kept = lengths > 0
    return _plan(batch * length, begin[kept], lengths[kept], order, device, packed=False)


def attend_by_bucket(
    plan: SequencePlan,
    attend: BucketAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden_states: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run `attend` on each bucket of `plan` and put the outputs back.

    Args:
        plan: a plan with buckets.
        attend: attention of right-padded rows.
        query: `[B, H, T, D]`; key and value alike (T keys).
        hidden_states: `[B, T, C]` or None.
        global_mask: bool `[B, T]` or None.

    Returns:
        `[B, H, T, D]`, 0 at padding.
    """
    B, H, T, _ = query.shape
    device = query.device
    index, slot = _there(plan.index, device), _there(plan.slot, device)
    token_real, slot_real = _there(plan.token_real, device), _there(plan.slot_real, device)

    def cut(x: torch.Tensor | None) -> list[Any]:
        """`x [B, T, ...]` as `[R, W, ...]` of each bucket."""
        if x is None:
            return [None] * len(plan.buckets)
        rows = x.reshape(B * T, -1)
        moved = _MoveRows.apply(rows, index, None, slot, token_real) if x.is_floating_point() else rows[index]
        sizes = [bucket.rows * bucket.width for bucket in plan.buckets]
        return [
            part.view(bucket.rows, bucket.width, *x.shape[2:])
            for part, bucket in zip(moved.split(sizes), plan.buckets, strict=True)
        ]

    outputs = []
    parts = [cut(x) for x in (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))]
    for bucket, *heads, hidden, marked in zip(plan.buckets, *parts, cut(hidden_states), cut(global_mask), strict=True):
        q, k, v = (x.transpose(1, 2) for x in heads)
        real = _there(bucket.real, device)
        output = attend(q, k, v, real, hidden, marked)
        outputs.append(output.transpose(1, 2).reshape(bucket.rows * bucket.width, -1))
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    back: torch.Tensor = _MoveRows.apply(together, slot, token_real, index, slot_real)
    return back.view(B, T, H, -1).transpose(1, 2)


class _MoveRows(torch.autograd.Function):
    """Rows `x[index]`, 0 where not `keep`; its gradient is the move back, not a sum.

    That holds because a row taken twice is needed once: what it is used for at padding has no gradient. It makes
    the backward as fast as the forward, and deterministic everywhere.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        index: torch.Tensor,
        keep: torch.Tensor | None,
        back: torch.Tensor,
        back_keep: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.moves = index, keep, back, back_keep
        moved = x.index_select(0, index)
        return moved if keep is None else moved.masked_fill_(~keep[:, None], 0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        index, keep, back, back_keep = ctx.moves
        return _MoveRows.apply(grads[0], back, back_keep, index, keep), None, None, None, None


def _there(x: torch.Tensor | None, device: torch.device) -> Any:
    """`x` on the device of a layer that may be another than the plan's."""
    return None if x is None else x.to(device)


def _call_tokens(device: torch.device | None) -> int:
    return CALL_TOKENS.get("cpu" if device is None else device.type, CALL_TOKENS_ELSEWHERE)


def _cost(groups: list[tuple[int, int, int]], overhead: int) -> int:
    return sum(overhead + rows * width for _, rows, width in groups)


def _groups(lengths: torch.Tensor, overhead: int) -> list[tuple[int, int, int]]:
    """Buckets of least cost, longest sequences first: (first in descending order, R, W) of each.

    Sequences of nearly the same length stay together, so that the choice is among few.
    """
    values, counts = lengths.unique(return_counts=True)
    fine: list[tuple[int, int]] = []  # (rows, width), longest first
    for width, rows in zip(values.flip(0).tolist(), counts.flip(0).tolist(), strict=True):
        if fine and width >= GROUP_RATIO * fine[-1][1]:
            fine[-1] = (fine[-1][0] + rows, fine[-1][1])
        else:
            fine.append((rows, width))
    # best[i]: least cost of the groups from i on, and where the bucket that begins with i ends.
    best: list[tuple[int, int]] = [(0, 0)] * (len(fine) + 1)
    for i in reversed(range(len(fine))):
        choices, rows = [], 0
        for end in range(i + 1, len(fine) + 1):
            rows += fine[end - 1][0]
            choices.append((overhead + rows * fine[i][1] + best[end][0], end))
        best[i] = min(choices)
    groups, i, first = [], 0, 0
    while i < len(fine):
        end = best[i][1]
        rows = sum(group[0] for group in fine[i:end])
        groups.append((first, rows, fine[i][1]))
        i, first = end, first + rows
    return groups


def _plan(
    tokens: int,
    begin: torch.Tensor,
    lengths: torch.Tensor,
    order: torch.Tensor | None,
    device: torch.device | None,
    *,
    packed: bool,
) -> SequencePlan:
    """Plan from where sequences begin and their lengths `[N]`, in real tokens; `order` are those (None: all are)."""
    longest_first = torch.sort(lengths, descending=True, stable=True).indices
    slot, total = torch.zeros(tokens, dtype=torch.long), 0
    buckets, index, real = [], [], []
    for first, rows, width in _groups(lengths, _call_tokens(device)):
        chosen = longest_first[first : first + rows].sort().values  # of one width: as they stand in the batch
        inside = torch.arange(width)
        here = inside < lengths[chosen][:, None]
        token = torch.where(here, begin[chosen][:, None] + inside, begin[chosen][:, None])
        token = token if order is None else order[token]
        slot[token[here]] = (total + torch.arange(rows * width)).view(rows, width)[here]
        buckets.append(Bucket(rows, width, None if bool(here.all()) else here.to(device)))
        index.append(token.flatten())
        real.append(here.flatten())
        total += rows * width
    token_real, has_holes = None, False
    if order is not None:
        has_holes = bool((order[begin + lengths - 1] - order[begin] >= lengths).any())
        token_real = torch.zeros(tokens, dtype=torch.bool)
        token_real[order] = True
        token_real = token_real.to(device)
    slot_real = None if all(bucket.real is None for bucket in buckets) else torch.cat(real).to(device)
    return SequencePlan(
        packed,
        tuple(buckets),
        torch.cat(index).to(device),
        slot.to(device),
        token_real,
        slot_real,
        has_holes=has_holes,
    )
