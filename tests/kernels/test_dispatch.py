"""Variants with `backend="triton"` are what they are in plain PyTorch: outputs, gradients, decode states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_linear_attn import get_variant
from hf_linear_attn.ops.base import backend
from hf_linear_attn.testing.contract import Subject
from hf_linear_attn.testing.tools import draw, padding_masks, tokens
from tests.kernels.subjects import cases, forgets_both_ways, subjects

LENGTH = 21


def _subjects() -> list[Subject]:
    """Every variant with a kernel, each side, with options that make short inputs exercise the method, and as it is."""
    found: list[Subject] = []
    for subject in subjects():
        is_first = not any((s.spec, s.is_causal) == (subject.spec, subject.is_causal) for s in found)
        runs = subject.spec.has_kernel(subject.is_causal) and not forgets_both_ways(subject)
        if runs and (is_first or not subject.options):
            found.append(subject)
    return found


def _attend(module: Any, inputs: Any, state: Any = None) -> tuple[list[torch.Tensor], Any]:
    """Output, without the rows of padding, and gradients of inputs and parameters."""
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    inputs.query, inputs.key, inputs.value = leaves
    output, state = module(inputs, state)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    if inputs.token_mask is not None:
        output = output.masked_fill(~inputs.token_mask[:, None, :, None], 0)
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad((output * weights).sum(), [*leaves, *parameters], allow_unused=True)
    return [output.detach(), *(x for x in grads if x is not None)], state


@pytest.mark.parametrize("padding", [pytest.param(None, marks=pytest.mark.slow), "left"])
@pytest.mark.parametrize("subject", cases(_subjects()))
def test_triton_is_the_twin(subject: Subject, padding: str | None) -> None:
    module = subject.build(dtype=torch.float32, trained=True)
    mask = None if padding is None else padding_masks(2, LENGTH)[padding][1:]
    found = {}
    for name in ("torch", "triton"):
        module.backend = name
        inputs = draw(module.context, LENGTH, batch=1, padding=mask, dtype=torch.float32)
        with torch.no_grad():  # other kernels may serve
            output = module(inputs)[0]
        found[name], _ = _attend(module, inputs)
        found[name].append(output if mask is None else output.masked_fill(~mask[:, None, :, None], 0))
    assert len(found["torch"]) == len(found["triton"])
    for ours, twin in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(ours, twin, rtol=2e-3, atol=2e-4 * float(twin.abs().max()) + 1e-6)


@pytest.mark.parametrize("subject", [case for case in cases(_subjects()) if case.values[0].decodes])
@torch.no_grad()
def test_decoding_is_the_twins(subject: Subject) -> None:
    module = subject.build(dtype=torch.float32, trained=True)
    inputs = draw(module.context, 11, batch=1, dtype=torch.float32)
    outputs = {}
    for name in ("torch", "triton"):
        module.backend = name
        state = module.init_state(1, torch.float32, torch.device("cpu"))
        rows = []
        for part in (range(9), range(9, 10), range(10, 11)):
            output, state = module(tokens(inputs, torch.tensor(list(part))), state)
            rows.append(output)
        outputs[name] = torch.cat(rows, 2)
    torch.testing.assert_close(outputs["triton"], outputs["torch"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "variant"),
    [
        ("linear.op.linear_attention", "linear"),
        ("gated.op.gated_linear_attention", "gated"),
        ("linear.exp_features.exp_features", "performer"),
        ("sparse.op.block_sparse_attention", "longformer"),
    ],
)
def test_kernels_really_ran(kernel: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would be one of the twin with itself if the dispatch never chose the kernels."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(f"hf_linear_attn.kernels.{kernel}", broken)
    module = Subject(get_variant(variant), True).build(dtype=torch.float32)
    module.backend = "triton"
    with pytest.raises(AssertionError, match="the kernel was called"):
        module(draw(module.context, 9, dtype=torch.float32))
    module.backend = "auto"  # never the interpreter
    assert not backend.use_triton("auto", torch.ones(1))
    module(draw(module.context, 9, dtype=torch.float32))
