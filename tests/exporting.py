"""Encoders exported with a dynamic batch and length, and how far what they give is from the eager model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from hf_linear_attn import convert_model
from tests.tiny import base_model, small_options, token_batch

# (batch, length): none is the example's, some below and some above a block, a window and a number of landmarks.
EXAMPLE = (2, 24)
SHAPES = ((1, 7), (3, 40), (2, 65), (4, 18), (1, 130), (5, 33))
# The first of their test options are refused: pattern="fixed", form="infini" and gate=True.
OPTIONS: dict[str, dict[str, Any]] = {
    "memory": {"form": "chunked"},
    "rfa": {"variance_reducer": False},
    "sparse": {"pattern": "strided", "stride": 8},
}


class LastHiddenState(nn.Module):
    """A model as a function of tensors to a tensor, as a server wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def encoder(variant: str, family: str = "bert") -> LastHiddenState:
    """A tiny converted model, with options under which short inputs exercise the method."""
    options = OPTIONS.get(variant) or small_options(variant, family)
    return LastHiddenState(convert_model(base_model(family), variant, **options)).eval()


def inputs(batch: int, length: int, *, masked: bool) -> tuple[torch.Tensor, ...]:
    """Token ids, and with `masked` a mask: rows without padding, padded on the right and on the left."""
    tokens = token_batch(batch=batch, length=length, seed=length)
    mask = tokens["attention_mask"]
    for row in range(batch):
        pads = (3 + 7 * row) % (length // 2 + 1)
        if row % 3 == 0:
            mask[row, length - pads :] = 0
        elif row % 3 == 1:
            mask[row, :pads] = 0
    return (tokens["input_ids"], mask) if masked else (tokens["input_ids"],)


def export(model: nn.Module, *, masked: bool) -> ExportedProgram:
    """The program of any batch and length."""
    args = inputs(*EXAMPLE, masked=masked)
    dims = {0: Dim("batch"), 1: Dim("length", min=2, max=160)}
    return torch.export.export(model, args, dynamic_shapes=tuple(dims for _ in args), strict=False)


def onnx_session(program: Any) -> Callable[..., torch.Tensor]:
    """`program`, an exported one, as a function that onnxruntime runs."""
    import onnxruntime

    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*args: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in args), strict=True)))[0])

    return run


@torch.no_grad()
def largest_error(model: nn.Module, run: Callable[..., torch.Tensor], *, masked: bool) -> float:
    """Largest difference at real tokens over `SHAPES`."""
    worst = 0.0
    for shape in SHAPES:
        args = inputs(*shape, masked=masked)
        real = args[1].bool() if masked else torch.ones_like(args[0], dtype=torch.bool)
        worst = max(worst, (run(*args) - model(*args))[real].abs().max().item())
    return worst
