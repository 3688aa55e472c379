"""Softmax over a sliding window in blocks of tokens, with a backward pass of its own that recomputes the weights.

A segment of tokens is laid out as chunks of C queries and, for each, the W keys that it may reach: overlapping views of
one padded copy of the keys, so that scores and outputs are plain batched matrix products. The forward pass keeps the
inputs, the output and the log of the denominators.

Shapes: q `[B, H, Tq, D]`, k, v `[B, H, Tk, D]`; query row r stands at position Tk - Tq + r and sees the keys
`left` before to `right` after it. Not differentiable twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.base.numerics import LOG2_E, LOG_ZERO, TINY, full_precision
from hf_linear_attn.ops.linear.layout import block_size

__all__ = ["window_block_softmax"]

_CHUNK = 32  # queries of a chunk: few keys outside the window are computed, and products are still large enough


def window_block_softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    left: int,
    right: int,
    scaling: float,
    key_allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output `[B, H, Tq, D]`, log of the sum of e^l over the window and the largest l in it, both `[B, H, Tq]`.

    Args:
        q, k, v: of one dtype, float32 or float64.
        left, right: keys of the window before and after the query's own.
        scaling: factor of the logits l.
        key_allowed: bool `[B or 1, Tk]`, or None when all keys are.

    A row that sees no key has the output 0 and `LOG_ZERO`.
    """
    return _WindowSoftmax.apply(q, k, v, key_allowed, left, right, scaling)


class _WindowSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        allowed: torch.Tensor | None,
        left: int,
        right: int,
        scaling: float,
    ) -> Any:
        output = v.new_empty(v.shape[0], q.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)
        log_sum = q.new_empty(q.shape[:3])
        peaks = torch.empty_like(log_sum)
        with full_precision(v):
            for segment in _segments(q, k, left, right):
                scores, values = segment.scores(q, k, allowed, scaling * LOG2_E), segment.windows(v)
                peak = scores.amax(-1, keepdim=True)
                scores.sub_(peak.clamp(min=LOG_ZERO / 2)).exp2_()
                total = scores.sum(-1, keepdim=True)
                rows = segment.rows
                output[:, :, rows] = segment.whole(torch.bmm(scores, values).div_(total.clamp(min=TINY)))
                log = torch.where(total > 0, (peak + total.clamp(min=TINY).log2()) / LOG2_E, LOG_ZERO)
                peak = torch.where(total > 0, peak / LOG2_E, LOG_ZERO)
                log_sum[:, :, rows], peaks[:, :, rows] = (segment.whole(x)[..., 0] for x in (log, peak))
        ctx.save_for_backward(q, k, v, allowed, output, log_sum)
        ctx.options = left, right, scaling
        ctx.set_materialize_grads(False)
        return output, log_sum, peaks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        q, k, v, allowed, output, log_sum = ctx.saved_tensors
        left, right, scaling = ctx.options
        d_output, d_log, d_peak = gradients
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_output = torch.zeros_like(output) if d_output is None else d_output
        shift = -(d_output * output).sum(-1)
        shift = shift if d_log is None else shift + d_log
        for segment in _segments(q, k, left, right):
            scores = segment.scores(q, k, allowed, scaling * LOG2_E)
            change = None
            if d_peak is not None:  # to the largest logits of each row, in equal shares
                change = (scores == scores.amax(-1, keepdim=True)) & (scores > LOG_ZERO / 2)
                change = change / change.sum(-1, keepdim=True).clamp(min=1) * segment.chunks(d_peak[..., None])
            logs = segment.chunks(log_sum[..., None]).clamp_(min=LOG_ZERO / 2)
            weights = scores.sub_(logs.mul_(LOG2_E)).exp2_()
            gradient, keys = segment.chunks(d_output), segment.windows(k)
            segment.add(d_v, torch.bmm(weights.mT, gradient))
            d_scores = torch.bmm(gradient, segment.windows(v).mT).add_(segment.chunks(shift[..., None]))
            d_scores.mul_(weights)
            d_scores = (d_scores if change is None else d_scores + change).mul_(scaling)
            d_q[:, :, segment.rows] = segment.whole(torch.bmm(d_scores, keys))
            segment.add(d_k, torch.bmm(d_scores.mT, segment.chunks(q)))
        return d_q, d_k, d_v, None, None, None, None


def _segments(q: torch.Tensor, k: torch.Tensor, left: int, right: int) -> list[_Segment]:
    length, block = q.shape[2], block_size(q)
    return [_Segment(q, k, i, min(i + block, length), left, right) for i in range(0, length, block)]


class _Segment:
    """Rows of a call laid out as chunks, `[M, C, X]`, and their windows of keys, `[M, W, X]`.

    Every head has `count` chunks of queries and as many of keys, of which the last ones are padding, so that
    all heads make one sequence of chunks: chunk m of queries has the keys from chunk m on.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, start: int, stop: int, left: int, right: int) -> None:
        self.rows, self.shape = slice(start, stop), q.shape[:2]
        self.size = min(_CHUNK, stop - start)
        self.steps = -(-(self.size + left + right) // self.size)  # chunks of keys in a window
        self.count = -(-(stop - start) // self.size) + self.steps - 1
        self.first = k.shape[2] - q.shape[2] + start - left  # position of the first key of the first window
        self.left, self.right, self.k_len = left, right, k.shape[2]
        # Positions of the keys that exist, and where they stand in the padded sequence of a head.
        begin, end = max(self.first, 0), min(self.first + self.count * self.size, self.k_len)
        self.keys, self.place = slice(begin, end), slice(begin - self.first, end - self.first)

    def chunks(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `[B, H, Tq, X]` as `[M, C, X]`, zeros after the end."""
        padded = x.new_zeros(*self.shape, self.count * self.size, x.shape[-1])
        padded[:, :, : self.rows.stop - self.rows.start] = x[:, :, self.rows]
        return padded.view(-1, self.size, x.shape[-1])

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """`[M, C, X]` as the rows `[B, H, rows, X]`."""
        return x.view(*self.shape, -1, x.shape[-1])[:, :, : self.rows.stop - self.rows.start]

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        """Keys `[B, H, Tk, X]` as overlapping views `[M, W, X]`."""
        heads, width = self.shape[0] * self.shape[1], x.shape[-1]
        padded = x.new_zeros(heads * self.count + self.steps - 1, self.size, width)
        inside = padded[: heads * self.count].view(*self.shape, -1, width)
        inside[:, :, self.place] = x[:, :, self.keys]
        shape = (heads * self.count, self.steps * self.size, width)
        return padded.as_strided(shape, (self.size * width, width, 1))

    def add(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """Add what the windows `[M, W, X]` hold to the keys `[B, H, Tk, X]` that they show."""
        heads, width = self.shape[0] * self.shape[1], x.shape[-1]
        parts = x.view(heads * self.count, self.steps, self.size, width)
        padded = x.new_zeros(heads * self.count + self.steps - 1, self.size, width)
        for step in range(self.steps):
            padded[step : step + heads * self.count] += parts[:, step]
        inside = padded[: heads * self.count].view(*self.shape, -1, width)
        total[:, :, self.keys] += inside[:, :, self.place]

    def scores(self, q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor | None, scaling: float) -> torch.Tensor:
        """Logits `[M, C, W]`, `LOG_ZERO` outside the window."""
        scores = torch.bmm(self.chunks(q), self.windows(k).mT).mul_(scaling)
        # Masks are terms: on a CPU, filling by a mask takes ten times as long as adding.
        step = torch.arange(scores.shape[2], device=q.device) - torch.arange(self.size, device=q.device)[:, None]
        scores.add_(_bias((step >= 0) & (step <= self.left + self.right), scores))
        if allowed is None and self.place.start == 0 and self.place.stop == self.count * self.size:
            return scores
        real = torch.zeros(self.shape[0], self.count * self.size, dtype=torch.bool, device=q.device)
        real[:, self.place] = True if allowed is None else allowed[:, self.keys]
        real = F.pad(real, (0, (self.steps - 1) * self.size)).unfold(1, self.steps * self.size, self.size)
        bias = _bias(real[:, None, :, None], scores)  # [B, 1, count, 1, W]
        return scores.view(*self.shape, self.count, *scores.shape[1:]).add_(bias).view_as(scores)


def _bias(seen: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What is added to logits: 0 where a key is seen, `LOG_ZERO` elsewhere."""
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, LOG_ZERO)
