"""The law of half precision: no method loses more than softmax attention does, beyond what its function makes of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from hf_linear_attn.testing.contract import Subject, law
from hf_linear_attn.testing.tools import cast, dense_softmax, draw, floats
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext

__all__ = ["SCALES", "errors_of", "half_precision", "rounded_once_more"]

LENGTH, HEAD_DIM = 1030, 64
NAMES = ("output", "gradient of query", "gradient of key", "gradient of value")
FACTORS = (4, 8, 8, 8)
# What is multiplied by what, in the dtype that it is hard on: fp16 by its range, bf16 by its 8 bits.
SCALES: tuple[tuple[str, torch.dtype, dict[str, float]], ...] = (
    ("hidden states x60, values x500", torch.float16, {"hidden_states": 60, "value": 500}),
    ("keys x100", torch.float16, {"key": 100}),
    ("queries x100", torch.float16, {"query": 100}),
    ("logits x30", torch.bfloat16, {"query": 30**0.5, "key": 30**0.5}),
    ("logits x100", torch.bfloat16, {"query": 10, "key": 10}),
)

Attention = Callable[[AttentionInputs], torch.Tensor]


@law()
def half_precision(subject: Subject) -> None:
    """On 1,030 tokens of large numbers, outputs and gradients in fp16 and bf16 are finite, and as good as softmax's.

    The error against fp64 on the same rounded numbers is at most 4 times (of gradients, which are differences of saved
    outputs that were rounded, 8 times) that of `scaled_dot_product_attention`, or of one rounding where that is exact.
    A method that is not softmax on these inputs may make more of rounding: it is allowed, besides, what its own
    function makes of inputs that are rounded once more. What fp16 cannot hold need not be finite.
    """
    context = subject.context(head_dim=HEAD_DIM, max_length=LENGTH)
    start = subject.build(context, dtype=torch.float32)
    for what, dtype, _ in SCALES:
        half = copy.deepcopy(start).to(dtype)
        exact = copy.deepcopy(half).double()
        inputs, softmax, softmax_errors = _softmax(context, what)
        doubles = cast(inputs, torch.float64)
        expected = _evaluate(_attend(exact), doubles)
        is_softmax = errors_of(expected[:1], softmax[:1], softmax)[0] < 1e-6
        errors = errors_of(_evaluate(_attend(half), inputs), expected, softmax)
        more, unit = [0.0] * len(NAMES), torch.finfo(dtype).eps / 2
        limits = [factor * max(error, unit) for factor, error in zip(FACTORS, softmax_errors, strict=True)]
        if not is_softmax and any(error > limit for error, limit in zip(errors, limits, strict=True)):
            more = errors_of(_evaluate(_attend(exact), rounded_once_more(doubles, unit)), expected, softmax)
        fits = [x.abs().amax() <= torch.finfo(dtype).max for x in expected]
        for name, error, limit, extra, in_range in zip(NAMES, errors, limits, more, fits, strict=True):
            allowed = limit + extra if in_range else float("inf")
            assert error <= allowed, f"{what} in {dtype}: {name} is off by {error:.2g}, allowed {allowed:.2g}"


@cache
def _softmax(context: LayerContext, what: str) -> tuple[AttentionInputs, list[torch.Tensor], list[float]]:
    """A call, softmax attention on it in fp64, and the errors of torch's kernel in the call's own precision."""
    _, dtype, factors = next(scale for scale in SCALES if scale[0] == what)
    inputs = draw(context, LENGTH, batch=1)
    large = {name: getattr(inputs, name) * factor for name, factor in factors.items()}
    inputs = cast(dataclasses.replace(inputs, **large), dtype)
    expected = _evaluate(dense_softmax, cast(inputs, torch.float64))

    def kernel(call: AttentionInputs) -> torch.Tensor:
        q, k, v = call.query, call.key, call.value
        return F.scaled_dot_product_attention(q, k, v, is_causal=call.is_causal, scale=call.scaling)

    return inputs, expected, errors_of(_evaluate(kernel, inputs), expected, expected)


def _attend(module: AttentionVariant) -> Attention:
    return lambda inputs: module(inputs)[0]


def _evaluate(attention: Attention, inputs: AttentionInputs) -> list[torch.Tensor]:
    """Output, and gradients of query, key and value for one random direction."""
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    output = attention(dataclasses.replace(inputs, query=leaves[0], key=leaves[1], value=leaves[2]))
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(output.shape, generator=generator).sign()  # the same numbers in every dtype
    gradients = torch.autograd.grad(output, leaves, direction.to(output.dtype), allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))
    return [output.detach(), *zeros]


def errors_of(actual: list[torch.Tensor], expected: list[torch.Tensor], softmax: list[torch.Tensor]) -> list[float]:
    """Of the worst token, relative to its norm or, where that is smaller, to the root mean square over all tokens.

    Gradients that vanish where softmax's do not are as good as 0: there it is the mean over softmax's.
    """
    found = []
    for place, (a, b, c) in enumerate(zip(actual, expected, softmax, strict=False)):
        size = b.double().norm(dim=-1)
        usual = max(x.double().norm(dim=-1).square().mean().sqrt().item() for x in ((b,) if place == 0 else (b, c)))
        size = size.clamp(min=max(usual, torch.finfo(torch.float64).tiny))
        error = ((a.double() - b.double()).norm(dim=-1) / size).amax().item()
        found.append(error if a.isfinite().all() else float("inf"))
    return found


def rounded_once_more(inputs: AttentionInputs, unit: float) -> AttentionInputs:
    """Every number off by up to `unit` of itself, either way."""
    generator = torch.Generator().manual_seed(3)
    return floats(inputs, lambda x: x * (1 + unit * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)))
