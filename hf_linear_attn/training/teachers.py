"""What a distillation learns from: the checkpoint, by a second copy of it or by the same weights on softmax."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_linear_attn.convert import revert_model
from hf_linear_attn.training.parts import variants_of

__all__ = ["Teacher", "frozen_copy", "holds_checkpoint", "windowed_states"]


def _softmax_everywhere(*_: Any) -> None:
    """A recorder that leaves every layer softmax's output."""


def holds_checkpoint(model: Any) -> bool:
    """Whether the weights of a converted model, with softmax in every layer, are its checkpoint: not if its position
    table was stretched."""
    converted = getattr(model.config, "linear_attn", None) or {}
    return bool(converted) and (converted.get("positions") or {}).get("mode") != "interpolate"


def frozen_copy(model: Any) -> nn.Module:
    """A copy of the checkpoint that a converted model still holds, with softmax in every layer, in eval mode.

    Raises:
        ValueError: if it holds it no more (`revert_model`): its position table was stretched before it was saved.
    """
    teacher = copy.deepcopy(model)
    if variants_of(teacher):
        teacher = revert_model(teacher)
    return teacher.requires_grad_(False).eval()


class Teacher:
    """Runs the teacher without gradients.

    Args:
        model: the teacher; None for the weights of the student on softmax, which is right while they are frozen.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, student: nn.Module, **inputs: Any) -> Any:
        """Outputs of the teacher's model class.

        Args:
            student: unwrapped; used where there is no other model.
            **inputs: keyword arguments of the model.
        """
        if self.model is not None:
            return self.model.to(next(student.parameters()).device)(**inputs)
        with _as_checkpoint(student):
            return student(**inputs, linear_attn_recorder=_softmax_everywhere)


@contextlib.contextmanager
def _as_checkpoint(student: Any) -> Iterator[None]:
    """Without adapters and dropout."""
    training = [module for module in student.modules() if module.training]
    student.eval()
    adapters = student.disable_adapter() if hasattr(student, "disable_adapter") else contextlib.nullcontext()
    try:
        with adapters:
            yield
    finally:
        for module in training:
            module.training = True


def windowed_states(run: Any, input_ids: torch.Tensor, real: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """Last hidden states of documents that are longer than the teacher reads, from overlapping windows of it.

    A window is `[first token, content, last token]`, as long as `window`; the windows of a document start `stride`
    tokens apart, the last one at its end. A token takes its state from the window in whose middle it lies most. A
    document that fits one window is read as it is.

    Args:
        run: `(input_ids [N, T], attention_mask [N, T]) -> states [N, T, d]`.
        input_ids: `[B, T]`, padded on the right; the first and the last real token of a row are special tokens.
        real: bool `[B, T]`.
        window: tokens of a window, at most what the teacher reads.
        stride: tokens between two windows' starts.

    Returns:
        states `[B, T, d]`, 0 at padding.
    """
    rows: list[torch.Tensor] = []  # ids of every window of every document
    places: list[tuple[int, int, int, int]] = []  # document, start, and what the window says: from, to
    for document, length in enumerate(real.sum(1).tolist()):
        ids = input_ids[document, :length]
        if length <= window:
            rows.append(ids)
            places.append((document, 0, 0, length))
            continue
        body, inner = ids[1:-1], window - 2
        last = len(body) - inner
        starts = [*range(0, last, stride), last]
        # halfway between the middles of two windows the one hands over to the other
        borders = [0, *((a + b + inner) // 2 for a, b in itertools.pairwise(starts)), len(body)]
        for start, (begin, end) in zip(starts, itertools.pairwise(borders), strict=True):
            rows.append(torch.cat([ids[:1], body[start : start + inner], ids[-1:]]))
            first, final = begin == 0, end == len(body)
            places.append((document, start, begin + (0 if first else 1), end + (2 if final else 1)))
    lengths = torch.tensor([len(row) for row in rows], device=input_ids.device)
    batch = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(batch.shape[1], device=batch.device) < lengths[:, None]
    states = run(batch, mask.long())
    found = states.new_zeros(*input_ids.shape, states.shape[-1])
    for row, (document, start, begin, end) in enumerate(places):
        found[document, begin:end] = states[row, begin - start : end - start]
    return found
