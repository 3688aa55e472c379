"""Patterns of more than two factors: a query sees about l = n^(1/p) keys of each, in n times the p-th root of n.

Factor m of p, from 0. `strided`: distances a l^m with a <= l, of the last one any a; a distance has one digit in base l
for each factor. `fixed`: in the own block of l^(m+1) tokens (of the last one in all) the last c tokens of each block of
l^m; every token is a block of its own for m = 0. So p steps, one through each factor, reach every token (causal: every
earlier one). p = 2 gives the patterns of `ops.sparse.strided` and of own blocks with summaries.

Positions are ranks among the real tokens. The keys of each row are gathered: few pairs, but no products of blocks, so
that on a CPU p = 2 takes less time up to tens of thousands of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hf_linear_attn.ops.base.backend import use_triton
from hf_linear_attn.ops.base.compaction import CompactedCall
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.sparse.attention import gather_tokens, segment_rows
from hf_linear_attn.ops.window.attention import attend_blocks

__all__ = ["FactoredPattern", "factored_attention"]

# All pairs behind a mask, while the keys are at most so many times as many as a row's slots, and the pairs few.
_DENSE_FACTOR, _DENSE_PAIRS = 4, 1 << 20
_MOST = 2**31 - 1  # a block this large holds every input


@dataclass(frozen=True)
class FactoredPattern:
    """What some heads see.

    Attributes:
        name: `"strided"` or `"fixed"`.
        stride: l.
        factors: p, at least 2.
        num_last: c of `fixed`, at most l.
        part: the factor m that they see, of `fixed` with the own block; None for all of them.
        is_causal: whether a query sees keys up to itself only.
    """

    name: str
    stride: int
    factors: int
    num_last: int
    part: int | None
    is_causal: bool

    @property
    def parts(self) -> list[int]:
        """The factors that are seen."""
        if self.part is None:
            return list(range(self.factors))
        return sorted({self.part, 0}) if self.name == "fixed" else [self.part]

    def size(self, m: int) -> int:
        """l^m, where no input is longer."""
        return min(self.stride**m, _MOST)

    def sees(self, row: torch.Tensor, key: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Whether tokens of rank `row` see those of rank `key`, of `count` tokens: bool, of tensors that broadcast."""
        seen = torch.zeros_like(row - key, dtype=torch.bool)
        for m in self.parts:
            size, outer = self.size(m), self.size(m + 1)
            is_last = m == self.factors - 1
            if self.name == "strided":
                distance = (row - key).abs()
                seen = seen | ((distance % size == 0) & (is_last | (distance <= outer)))
            else:
                near = torch.ones_like(seen) if is_last else row // outer == key // outer
                seen = seen | (near & (key >= self._end(key // size * size, m, count) - self._number(m)))
        seen = seen & (key >= 0) & (key < count)
        return seen & (key <= row) if self.is_causal else seen

    def lists(self, row: torch.Tensor, count: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys that each row sees, none of them twice: ranks, and which slots are in use, `[B or 1, R, K]`.

        Args:
            row: ranks of the queries, long `[B or 1, R]`.
            count: real tokens, long `[B or 1]`.
            length: an upper bound of them.
        """
        row, count = torch.broadcast_tensors(row[..., None], count[:, None, None])
        columns = self._strided(row, length) if self.name == "strided" else self._fixed(row, count, length)
        there = (columns >= 0) & (columns < count)
        return columns, there & (columns <= row) if self.is_causal else there

    def _strided(self, row: torch.Tensor, length: int) -> torch.Tensor:
        distances = {0}
        for m in self.parts:
            size, is_last = self.size(m), m == self.factors - 1
            distances |= set(range(0, length if is_last else min(length, self.stride * size + 1), size))
        if not self.is_causal:
            distances |= {-distance for distance in distances}
        return row - torch.tensor(sorted(distances, reverse=True), device=row.device)

    def _fixed(self, row: torch.Tensor, count: torch.Tensor, length: int) -> torch.Tensor:
        columns = []
        for m in self.parts:
            size, outer, number = self.size(m), self.size(m + 1), self._number(m)
            if m == self.factors - 1:
                first, blocks = torch.zeros_like(row), -(-length // size)
            else:
                first, blocks = row // outer * outer, min(self.stride, -(-length // size))
            slot = torch.arange(blocks * number, device=row.device)
            start = first + slot // number * size
            column = self._end(start, m, count) - number + slot % number
            # What an inner factor shows already, and tokens before the block.
            inner = 0 if m == 0 else size if self.part is None else self.stride
            shown = (column // inner == row // inner) if inner else torch.zeros_like(column, dtype=torch.bool)
            columns.append(torch.where(shown | (column < start), -1, column))
        return torch.cat(columns, -1)

    def _end(self, start: torch.Tensor, m: int, count: torch.Tensor) -> torch.Tensor:
        """Where blocks end; a short last one counts on encoders alone, since on decoders more tokens may come."""
        end = start + self.size(m)
        return end if self.is_causal else end.minimum(count)

    def _number(self, m: int) -> int:
        return min(self.num_last, self.size(m))


def factored_attention(
    call: CompactedCall, pattern: FactoredPattern, *, scaling: float, backend: str = "auto"
) -> torch.Tensor:
    """Softmax attention of every query over the keys that a pattern shows it.

    Args:
        call: queries, keys and values with their padding in front.
        pattern: of these heads.
        scaling: factor of the logits.
        backend: what runs it, see `ops.base.backend`.

    Returns:
        `[B, H, Tq, D]` in the compacted order. Rows of padding are finite.

    Raises:
        RuntimeError: for `backend="triton"`, which has no kernel for them.
        ValueError: for `fixed` in a program of any length.
    """
    use_triton(backend, call.q, "there is no kernel for patterns of more than two factors")
    (B, H, q_len, D), k_len = call.q.shape, call.k.shape[2]
    if is_exported() and isinstance(k_len, torch.SymInt) and pattern.name == "fixed":
        raise ValueError("pattern='fixed' exports at one length only. Allowed with any length: pattern='strided'.")
    row, count = call.rank[:, k_len - q_len :], call.rank[:, -1] + 1
    slots = 0 if is_exported() else pattern.lists(row[:, :1], count, k_len)[0].shape[-1]
    if is_exported() or (k_len <= _DENSE_FACTOR * slots and q_len * k_len <= _DENSE_PAIRS):
        seen = pattern.sees(row[..., None], call.rank[:, None], count[:, None, None])
        mask = (seen | ~seen.any(-1, keepdim=True))[:, None]
        return F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=mask, scale=scaling)
    recompute = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    step, outputs = segment_rows(B * H * D * slots, call.q.numel()), []
    for begin in range(0, q_len, step):
        part = slice(begin, begin + step)
        given = pattern, call.q[:, :, part], call.k, call.v, row[:, part], count, scaling
        if recompute:  # what was gathered would be kept for the backward pass
            outputs.append(checkpoint(_read, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_read(*given))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _read(
    pattern: FactoredPattern,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row: torch.Tensor,
    count: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """What queries `[B, H, R, D]` of ranks `row` `[B or 1, R]` read from the keys that are gathered for each."""
    k_len = k.shape[2]
    columns, seen = pattern.lists(row, count, k_len)
    place = (columns + k_len - count[:, None, None]).clamp(0, k_len - 1)[:, None]
    keys, values = gather_tokens(k, place), gather_tokens(v, place)  # [B, R, H, K, D]
    seen = seen | ~seen.any(-1, keepdim=True)
    out = attend_blocks(q.transpose(1, 2)[:, :, :, None], keys, values, seen[:, :, None], scaling)
    return out[:, :, :, 0].transpose(1, 2)
