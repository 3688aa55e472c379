"""How many singular directions carry softmax attention: the spectrum of its matrices (Linformer, arXiv:2006.04768)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.starts.calibration import Row

__all__ = ["SPECTRUM_TOKENS", "cumulative_spectrum", "linformer_bound", "rank_for_energy"]

SPECTRUM_TOKENS = 1024
"""Tokens of a sequence whose spectrum is worth its time: singular values cost the cube of the length."""


def linformer_bound(head_dim: int) -> float:
    """d ln d, the k of Linformer's theorem up to its constants; it does not depend on the length."""
    return head_dim * math.log(head_dim)


def cumulative_spectrum(weights: torch.Tensor) -> torch.Tensor:
    """Sums of the largest singular values of matrices `[..., Tq, Tk]`, as shares of the sum of all: ascending to 1.

    Returns:
        `[..., min(Tq, Tk)]`; entry i is the share of the largest i + 1.
    """
    values = torch.linalg.svdvals(weights)
    return values.cumsum(-1) / values.sum(-1, keepdim=True)


@torch.no_grad()
def rank_for_energy(rows: Sequence[Row], energy: float, *, scaling: float) -> torch.Tensor:
    """The fewest singular values of softmax attention that hold a share of their sum, in the mean over sequences.

    Args:
        rows: sequences without padding; a short one has all of its sum in as many values as it has tokens.
        energy: the share, from 0 to 1.
        scaling: factor of the logits.

    Returns:
        long `[H]`, at least 1 and at most the tokens of the longest sequence.
    """
    longest = max(q.shape[2] for q, _, _ in rows)
    total = torch.zeros(())
    for q, k, _ in rows:
        share = cumulative_spectrum((q @ k.mT * scaling).softmax(-1))[0]  # [H, T]
        total = total.to(share) + F.pad(share, (0, longest - share.shape[-1]), value=1.0)
    return ((total / len(rows) < energy).sum(-1) + 1).clamp(max=longest)
