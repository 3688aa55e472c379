"""Losses that bring a converted model back to its checkpoint: layer by layer, by its outputs, by its states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant

__all__ = ["LayerLosses", "contrast_loss", "label_divergence", "mean_states", "states_distance"]


class LayerLosses:
    """Recorder of a forward in which every layer runs softmax: what each variant loses to it on the same inputs.

    Pass it as `linear_attn_recorder`. The loss of a layer is its variant's `regression_loss`, in float32 or better:
    the output's relative error, or the cross-entropy of the attention weights for methods that say so.
    """

    def __init__(self) -> None:
        self.losses: dict[int, torch.Tensor] = {}

    def __call__(self, module: Any, inputs: AttentionInputs, output: torch.Tensor) -> None:
        variant: AttentionVariant = module.linear_attn
        if not any(parameter.requires_grad for parameter in variant.parameters()):
            return
        dtype = accumulation_dtype(output.dtype)
        tensors = {name: getattr(inputs, name) for name in ("query", "key", "value", "hidden_states")}
        wide: dict[str, Any] = {name: None if x is None else x.detach().to(dtype) for name, x in tensors.items()}
        with torch.autocast(output.device.type, enabled=False):
            loss = variant.regression_loss(replace(inputs, **wide), output.detach().to(dtype))
        self.losses[module.layer_idx] = loss

    def mean(self) -> torch.Tensor:
        """Mean over the layers, a scalar."""
        return torch.stack(list(self.losses.values())).mean()


def label_divergence(
    student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """Mean Kullback-Leibler divergence KL(teacher || student) of class probabilities, in nats.

    Args:
        student: logits `[..., C]`.
        teacher: logits `[..., C]`.
        real: bool `[...]`, the places that count; all when None.
        temperature: both are divided by it; the result is multiplied by its square, which keeps gradients in size
            (Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531).

    Returns:
        a scalar, 0 where no place counts.
    """
    if real is not None:
        student, teacher = student[real], teacher[real]
    got = F.log_softmax(student.float() / temperature, dim=-1)
    want = F.log_softmax(teacher.float() / temperature, dim=-1)
    count = max(got.numel() // got.shape[-1], 1)
    return F.kl_div(got, want, reduction="sum", log_target=True) * temperature**2 / count


def mean_states(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean of the states `[B, T, d]` over real tokens (bool `[B, T]`), `[B, d]`: what embedders pool with."""
    weights = real[..., None].to(states)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def states_distance(student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Relative squared error of token states, and one minus the cosine of their means: a scalar.

    Args:
        student: `[B, T, d]`.
        teacher: `[B, T, d]`.
        real: bool `[B, T]`, True for a token.
    """
    student, teacher = student.float(), teacher.float()
    error = (student - teacher)[real].square().sum() / teacher[real].square().sum().clamp(min=1e-12)
    cosine = F.cosine_similarity(mean_states(student, real), mean_states(teacher, real), dim=-1)
    return error + (1 - cosine).mean()


def contrast_loss(
    queries: torch.Tensor, documents: torch.Tensor, temperature: float = 0.05, symmetric: bool = False
) -> torch.Tensor:
    """Cross-entropy of each query's own document under a softmax over the cosines to all of them, in nats: a scalar.

    That of sentence-transformers' `MultipleNegativesRankingLoss` with `scale` 1 / temperature (Henderson et al.,
    Efficient Natural Language Response Suggestion for Smart Reply, arXiv:1705.00652).

    Args:
        queries: vectors `[B, d]`.
        documents: vectors `[B, d]`, that of each query in its own row.
        temperature: the cosines are divided by it.
        symmetric: the mean with the loss of documents that find their queries.
    """
    scores = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T / temperature  # [B, B]
    own = torch.arange(len(scores), device=scores.device)
    loss = F.cross_entropy(scores, own)
    return (loss + F.cross_entropy(scores.T, own)) / 2 if symmetric else loss
