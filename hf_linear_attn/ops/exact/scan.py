"""A loop over the pieces of a sequence that carries sums along, computed again piece by piece in the backward pass.

As one pass each over the whole sequence, the steps of such a loop take many tensors as large as the sequence, and
autograd keeps them; from 32 MiB on, memory is mapped anew, page by page, each time it is asked for. Here only the
inputs and the sums before each piece are kept. Not differentiable twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.features.gradients import MapGradients, leaf

__all__ = ["Step", "scan"]

# Upper bound on the elements of a sequence that are in hand at once (4 MiB in fp32).
PIECE_ELEMENTS = 1 << 20

_Tensors = tuple[torch.Tensor, ...]
# A piece, its part of each sequence, the sums before it and the parameters, to its output, of the shape and dtype of
# its part of the first sequence, and the sums after it.
Step = Callable[[slice, _Tensors, _Tensors, _Tensors], tuple[torch.Tensor, _Tensors]]


def scan(step: Step, sequences: _Tensors, sums: _Tensors, parameters: _Tensors) -> tuple[torch.Tensor, _Tensors]:
    """The outputs of all pieces, and the sums after the last one.

    What is no more than one piece is left to autograd, as is all on a GPU and in a traced graph.

    Args:
        step: computes a piece; tensors that train are among its arguments.
        sequences: `[B, H, N, ...]`, cut along N.
        sums: before the first piece.
        parameters: the same for all pieces.
    """
    first, count = sequences[0], sequences[0].shape[2]
    whole = first.device.type != "cpu" or torch.compiler.is_compiling()
    size = count if whole else max(1, PIECE_ELEMENTS * count // max(1, first.numel()))
    if whole or size >= count:
        return step(slice(0, count), _parts(sequences, slice(0, count)), sums, parameters)
    pieces = [slice(i, min(i + size, count)) for i in range(0, count, size)]
    given = *sequences, *sums, *parameters
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        output, *after = _Scan.apply(step, pieces, len(sequences), len(sums), *given)
    else:
        output, before = _forward(step, pieces, sequences, sums, parameters)
        after = before[-1]
    return output, tuple(after)


def _forward(
    step: Step, pieces: list[slice], sequences: _Tensors, sums: _Tensors, parameters: _Tensors
) -> tuple[torch.Tensor, list[_Tensors]]:
    """The output, and the sums before each piece and after the last one."""
    output, before = torch.empty_like(sequences[0]), [sums]
    for piece in pieces:
        output[:, :, piece], sums = step(piece, _parts(sequences, piece), sums, parameters)
        before.append(sums)
    return output, before


def _parts(sequences: _Tensors, piece: slice) -> _Tensors:
    """Contiguous, which is worth a copy."""
    return tuple(x[:, :, piece].contiguous() for x in sequences)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: Step, pieces: list[slice], num_sequences: int, num_sums: int, *given: torch.Tensor
    ) -> Any:
        middle = num_sequences + num_sums
        sequences, parameters = given[:num_sequences], given[middle:]
        output, before = _forward(step, pieces, sequences, given[num_sequences:middle], parameters)
        ctx.settings = step, pieces, num_sequences, num_sums, len(parameters)
        ctx.save_for_backward(*sequences, *parameters, *(x for sums in before[:-1] for x in sums))
        return output, *before[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *grad_sums: torch.Tensor) -> Any:
        step, pieces, num_sequences, num_sums, num_parameters = ctx.settings
        tensors = ctx.saved_tensors  # once: under activation checkpointing every reading recomputes
        sequences, before = tensors[:num_sequences], tensors[num_sequences + num_parameters :]
        parameters = tuple(leaf(x, x.requires_grad) for x in tensors[num_sequences : num_sequences + num_parameters])
        totals, found = [torch.empty_like(x) for x in sequences], MapGradients(parameters)
        for number in reversed(range(len(pieces))):
            piece, sums = pieces[number], before[number * num_sums : (number + 1) * num_sums]
            inputs = [leaf(x) for x in (*_parts(sequences, piece), *sums)]
            with torch.enable_grad():
                output, after = step(piece, tuple(inputs[:num_sequences]), tuple(inputs[num_sequences:]), parameters)
            given = grad[:, :, piece], *grad_sums
            changes = found.through((output, *after), given, inputs, parameters)
            for total, change in zip(totals, changes, strict=False):
                total[:, :, piece] = change
            grad_sums = tuple(changes[num_sequences:])
        return None, None, None, None, *totals, *grad_sums, *found.parameters
