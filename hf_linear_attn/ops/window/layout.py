"""What the forms of the sliding window share: columns seen besides the window, and dilation by classes of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["Extra", "by_dilation", "from_classes", "to_classes"]

# Extra columns: keys `[B, H, G, D]`, values `[B, H, G, D]`, and which row sees which, bool broadcastable to
# `[B, Tq, G]`. A key that the windows hold as well must be left out of `key_allowed`, else it counts twice.
# Both may have one channel more: `scaling` times that of a key is added to all of its logits, that of values is 0.
Extra = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Queries, keys, values, keys that a window may contain (see `by_dilation`) and extra columns, to outputs.
Window = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Extra | None], torch.Tensor]


def by_dilation(
    attend: Window,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dilation: int | tuple[int, ...],
    key_allowed: torch.Tensor | None,
    extra: Extra | None,
) -> torch.Tensor:
    """A dilated window by `attend`, which is a plain one, for the heads of each dilation.

    Args:
        attend: of tensors as those below.
        q: `[B, H, Tq, D]`, row r at position Tk - Tq + r.
        k, v: `[B, H, Tk, D]`.
        dilation: for all heads, or one per head.
        key_allowed: bool `[B or 1, Tk]`, False for keys that no window may contain; None when all may.
        extra: columns seen in addition to the window.

    Returns:
        `[B, H, Tq, D]`.
    """
    steps = dilation if isinstance(dilation, tuple) else (dilation,) * q.shape[1]
    groups = {d: [h for h, step in enumerate(steps) if step == d] for d in dict.fromkeys(steps)}
    if len(groups) == 1:
        return _dilated(attend, q, k, v, steps[0], key_allowed, extra)
    outputs = []
    for d, heads in groups.items():
        part = None if extra is None else (extra[0][:, heads], extra[1][:, heads], extra[2])
        outputs.append(_dilated(attend, q[:, heads], k[:, heads], v[:, heads], d, key_allowed, part))
    order = [h for heads in groups.values() for h in heads]
    return torch.cat(outputs, dim=1)[:, [order.index(h) for h in range(len(steps))]]


def _dilated(
    attend: Window,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dilation: int,
    key_allowed: torch.Tensor | None,
    extra: Extra | None,
) -> torch.Tensor:
    (B, _, q_len, _), k_len = q.shape, k.shape[2]
    if dilation == 1 or k_len == 1:
        return attend(q, k, v, key_allowed, extra)
    # Tokens of one residue class see each other only: classes become batch rows and the pattern a plain band.
    if key_allowed is None:
        key_allowed = torch.ones(1, k_len, dtype=torch.bool, device=q.device)
    key_allowed = to_classes(key_allowed.expand(B, -1)[:, None, :, None], dilation)[:, 0, :, 0]
    if extra is not None:
        rows = extra[2].expand(B, -1, -1)  # [B, Tq or 1, G]
        if rows.shape[1] == q_len:
            rows = to_classes(rows[:, None], dilation)[:, 0]
        else:
            rows = rows.repeat_interleave(dilation, dim=0)
        extra = (extra[0].repeat_interleave(dilation, 0), extra[1].repeat_interleave(dilation, 0), rows)
    q, k, v = (to_classes(x, dilation) for x in (q, k, v))
    return from_classes(attend(q, k, v, key_allowed, extra), dilation, q_len)


def to_classes(x: torch.Tensor, number: int) -> torch.Tensor:
    """`[B, C, T, D]` to `[B * number, C, ceil(T / number), D]`, padded in front: ends stay aligned."""
    x = F.pad(x, (0, 0, -x.shape[2] % number, 0))
    return x.unflatten(2, (-1, number)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def from_classes(x: torch.Tensor, number: int, length: int) -> torch.Tensor:
    """The inverse of `to_classes`: `[B, C, length, D]`."""
    x = x.unflatten(0, (-1, number)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return x[:, :, x.shape[2] - length :]
