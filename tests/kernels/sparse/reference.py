"""What the tests of block-sparse attention compare with: dense masks of lists, dense attention in float64."""

from __future__ import annotations

from typing import Any

import torch


def error_ratio(actual, expected):
    """RMS of the error over RMS of what is expected; nan counts as wrong."""
    actual, expected = actual.detach(), expected.detach()
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt().clamp(min=1e-12))


def dense_attention(q, k, v, seen, scaling, bias=None):
    """Output and log-sum-exp with a mask broadcastable to [B, H, Tq, Tk]; rows without keys are 0 and -1e30."""
    logits = q @ k.mT * scaling
    logits = logits if bias is None else logits + bias
    logits = logits.masked_fill(~seen, -torch.inf)
    empty = ~seen.expand(logits.shape).any(-1)
    logits = logits.masked_fill(empty[..., None], 0)
    out = (logits.softmax(-1) @ v).masked_fill(empty[..., None], 0)
    return out, logits.logsumexp(-1).masked_fill(empty, -1e30)


def seen_by_lists(lists, q_len, k_len, *, transposed=False):
    """What lists show by their own account, entry by entry: bool [B or 1, H or 1, Tq, Tk]. No pair may come twice."""
    pointers, index, words = (
        (lists.cols, lists.row_idx, lists.bits_t) if transposed else (lists.rows, lists.col_idx, lists.bits)
    )
    m, n = lists.tile_t if transposed else lists.tile
    starts = [torch.zeros(1, dtype=torch.long) if x is None else x.long() for x in lists.tensors()[-3:]]
    sets_b, sets_h, count, _ = pointers.shape
    batch = max(sets_b, *(len(x) for x in starts))
    seen = torch.zeros(batch, sets_h, q_len, k_len, dtype=torch.int)

    def tokens(place, start, length):
        token = place // lists.padded_block * lists.block + place % lists.padded_block - start
        return token, (token >= 0) & (token < length) & (place % lists.padded_block < lists.block)

    for b in range(batch):
        q_start, q_first, k_start = (x[min(b, len(x) - 1)] for x in starts)
        for h in range(sets_h):
            at: Any = min(b, sets_b - 1), h
            for major in range(count):
                begin, middle, end = pointers[(*at, major)].tolist()
                minors = index[at][begin:end].tolist()
                assert len(set(minors)) == len(minors), "a tile is listed twice"
                for entry in range(begin, end):
                    minor = int(index[(*at, entry)])
                    r, c = (minor, major) if transposed else (major, minor)
                    q_place, k_place = q_first + r * m + torch.arange(m), c * n + torch.arange(n)
                    (row, row_in), (key, real) = tokens(q_place, q_start, q_len), tokens(k_place, k_start, k_len)
                    assert entry < middle or bool(real.all()), "an incomplete tile is listed as FULL"
                    shown = row_in[:, None] & real
                    if entry < middle:
                        word = None if words is None else int(words[(*at, entry)])
                        shown = shown & _inside(lists, word, q_place, k_place, n)
                    pairs = shown.nonzero()
                    seen[b, h, row[pairs[:, 0]], key[pairs[:, 1]]] += 1
    assert int(seen.max()) <= 1, "a pair is shown twice"
    return seen.bool()


def _inside(lists, word, q_place, k_place, tile_n):
    distance = q_place[:, None] - k_place
    shown = torch.ones_like(distance, dtype=torch.bool)
    if lists.band is not None:
        shown &= (distance >= lists.band[0]) & (distance <= lists.band[1])
    if lists.hole is not None:
        shown &= (distance < lists.hole[0]) | (distance > lists.hole[1])
    if word is not None:
        i, j = torch.arange(len(q_place))[:, None] // lists.sub, torch.arange(tile_n) // lists.sub
        shown &= (word >> (i * (tile_n // lists.sub) + j)) % 2 == 1
    return shown
