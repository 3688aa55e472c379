"""The laws of tracing: a compiled graph and an exported program compute what the eager layer does."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from hf_linear_attn.testing.contract import Subject, law
from hf_linear_attn.testing.tools import assert_close, draw, padding_masks
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant

__all__ = ["compile_full_graph", "export_any_length"]


@law()
def compile_full_graph(subject: Subject) -> None:
    """`torch.compile` takes the forward and backward as one graph and gives the same numbers."""
    module = subject.build(dtype=torch.float32, trained=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = draw(module.context, 36, padding=padding_masks(2, 36)["left"], dtype=torch.float32)
    results = []
    for forward in (module, compiled):
        q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
        output = forward(dataclasses.replace(inputs, query=q, key=k, value=v))[0]
        output.square().sum().backward()
        results.append((output, q.grad, k.grad, v.grad))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected, "compiled", tolerance=1e-4)


class _Program(nn.Module):
    """A layer as a function of tensors alone, as `torch.export` takes it."""

    def __init__(self, layer: AttentionVariant, call: AttentionInputs) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor,
    ) -> torch.Tensor:
        given = dataclasses.replace(self.call, query=query, key=key, value=value)
        return self.layer(dataclasses.replace(given, hidden_states=hidden_states, token_mask=token_mask))[0]


def _tensors(call: AttentionInputs) -> tuple[Any, ...]:
    return call.query, call.key, call.value, call.hidden_states, call.token_mask


@torch.no_grad()
def _export(layer: AttentionVariant, call: AttentionInputs) -> nn.Module:
    batch, length = Dim("batch"), Dim("length", min=2, max=layer.context.max_length)
    shapes = (*3 * ({0: batch, 2: length},), *2 * ({0: batch, 1: length},))
    return torch.export.export(_Program(layer, call), _tensors(call), dynamic_shapes=shapes, strict=False).module()


@law(lambda subject: subject.served and not subject.is_causal)
def export_any_length(subject: Subject) -> None:
    """`torch.export` gives one program for every batch, length and mask, and it computes the same.

    Options without a form for every length refuse by a `ValueError` which says so.
    """
    layer = subject.build(trained=True)  # in float64, where near-zero denominators of some maps do not matter
    program = None
    # The first is the example; the others lie below and above a block, a window, a number of landmarks.
    for batch, length, padding in ((2, 24, "right"), (1, 7, "left"), (3, 40, "interior"), (4, 130, "left")):
        mask = padding_masks(batch, length)[padding]
        call = draw(layer.context, length, batch=batch, padding=mask)
        try:
            program = program or _export(layer, call)
        except ValueError as error:
            if "exports at one length only" not in str(error):
                raise
            return
        with torch.no_grad():
            actual, expected = (x * mask[:, None, :, None] for x in (program(*_tensors(call)), layer(call)[0]))
        assert_close(actual, expected, f"{batch} x {length}, padding={padding}", tolerance=1e-6)
