"""Every method in fp16 and bf16 on long inputs of adversarial scale: finite, and within a stated error of fp64.

TRUST_LENGTH is the length in tokens, 65,536 by default; at most 4,096 for methods that take quadratic memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.registry import get_variant, list_variants
from hf_linear_attn.testing.contract import Subject
from hf_linear_attn.testing.numerics_laws import SCALES, errors_of, rounded_once_more
from hf_linear_attn.testing.tools import cast, draw
from hf_linear_attn.variants.base import AttentionInputs, LayerContext

LENGTH = int(os.environ.get("TRUST_LENGTH", "65536"))
HEAD_DIM = 64
FACTOR = 4  # as many times softmax's own error is allowed, besides what the method's function makes of rounded inputs


def subjects() -> list[Subject]:
    """Every method with its defaults, on each side that it serves."""
    found = [Subject(get_variant(key), causal) for key in list_variants() for causal in (False, True)]
    return [subject for subject in found if subject.served]


def length_for(subject: Subject) -> int:
    """As many tokens as its memory allows."""
    memory_is_linear = subject.spec.claims_linear_cost({}) or subject.spec.key == "memory"
    return LENGTH if memory_is_linear else min(LENGTH, 4096)


def context(is_causal: bool, length: int) -> LayerContext:
    return LayerContext(1, 2, HEAD_DIM, 1, HEAD_DIM, length, is_causal)


def softmax(call: AttentionInputs) -> torch.Tensor:
    q, k, v = call.query, call.key, call.value
    return F.scaled_dot_product_attention(q, k, v, is_causal=call.is_causal, scale=call.scaling)


@cache
def call(what: str, is_causal: bool, length: int) -> tuple[AttentionInputs, float]:
    """Numbers of that scale in the dtype they are hard on, and the error of torch's softmax attention on them."""
    _, dtype, factors = next(scale for scale in SCALES if scale[0] == what)
    inputs = draw(context(is_causal, length), length, batch=1)
    inputs = cast(dataclasses.replace(inputs, **{k: getattr(inputs, k) * f for k, f in factors.items()}), dtype)
    return inputs, worst(softmax(inputs), softmax(cast(inputs, torch.float64)))


def worst(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Error of the worst token, relative to its norm or the usual one."""
    return errors_of([output], [exact], [exact])[0]


@pytest.mark.heavy
@pytest.mark.parametrize("subject", subjects(), ids=lambda s: f"{s.spec.key}-{'decoder' if s.is_causal else 'encoder'}")
@torch.no_grad()
def test_half_precision_is_finite_and_near_fp64(
    subject: Subject, record_property: Callable[[str, object], None]
) -> None:
    length = length_for(subject)
    place = context(subject.is_causal, length)
    record_property("tokens", length)
    for what, dtype, _ in SCALES:
        inputs, softmax_error = call(what, subject.is_causal, length)
        half = subject.build(place, dtype=torch.float32).to(dtype)
        exact = subject.build(place, dtype=torch.float32).to(dtype).double()
        doubles, unit = cast(inputs, torch.float64), torch.finfo(dtype).eps / 2
        expected = exact(doubles)[0]
        if expected.abs().amax() > torch.finfo(dtype).max:
            continue  # which this dtype cannot hold
        error, allowed = worst(half(inputs)[0], expected), FACTOR * max(softmax_error, unit)
        if error > allowed:
            allowed += worst(exact(rounded_once_more(doubles, unit))[0], expected)
        record_property(f"{what}, {dtype}".replace("torch.", ""), f"{error:.2g} of {allowed:.2g}")
        assert error <= allowed, f"{what} in {dtype}: off by {error:.2g}, allowed {allowed:.2g}"
