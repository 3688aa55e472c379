"""The laws of rare calls: padding that is not even a number, calls of nothing, second derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from hf_linear_attn.testing.contract import Subject, law
from hf_linear_attn.testing.tools import assert_close, draw, each, floats, merged, padding_masks
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, State

__all__ = ["calls_of_nothing", "keys_of_groups", "padding_of_any_content", "redraws", "second_derivatives"]

# The tensors of a call that have gradients.
LEAVES = ("query", "key", "value", "hidden_states")


def _states(subject: Subject, module: AttentionVariant, inputs: AttentionInputs) -> tuple[State | None, ...]:
    """A call is made without a state, and where there is one also with it."""
    query = inputs.query
    return (None, module.init_state(len(query), query.dtype, query.device)) if subject.decodes else (None,)


def _attend(
    module: AttentionVariant, inputs: AttentionInputs, state: State | None
) -> tuple[torch.Tensor, State, dict[str, torch.Tensor | None]]:
    """Output and state of a call, and the gradients of its tensors and of the parameters by the output's real rows."""
    module.zero_grad()
    inputs = floats(inputs, lambda x: x.detach().clone().requires_grad_())
    output, after = module(inputs, state)
    real = inputs.token_mask
    rows = output if real is None else output.masked_fill(~real[:, None, :, None], 0)
    rows.square().sum().backward()
    leaves = {name: getattr(inputs, name) for name in LEAVES}
    grads = {name: x.grad for name, x in {**leaves, **dict(module.named_parameters())}.items()}
    return output.detach(), after or {}, grads


@law()
def padding_of_any_content(subject: Subject) -> None:
    """Padding of nan or inf changes no real row, no later one and no gradient, and leaves the whole output finite."""
    module = subject.build(trained=True)
    rest = draw(module.context, 5, seed=3)
    for with_global in subject.global_choices:
        for side, mask in padding_masks(2, 36).items():
            inputs = draw(module.context, 36, padding=mask, with_global=with_global)
            for state in (None,) if with_global else _states(subject, module, inputs):
                expected, expected_state, expected_grads = _attend(module, inputs, state)
                for number in (float("nan"), float("inf")):
                    poison = each(inputs, lambda x, dim, number=number: torch.full_like(x, number))  # type: ignore[misc]
                    output, after, grads = _attend(module, merged(inputs, poison, ~mask), state)
                    what = f"{number} at {side} padding, global mask {with_global}, state {state is not None}"
                    assert output.isfinite().all(), f"{what}: not finite"
                    assert_close(output.transpose(1, 2)[mask], expected.transpose(1, 2)[mask], what)
                    for name, grad in expected_grads.items():
                        assert_close(grads[name], grad, f"{what}: gradient of {name}")
                    if state is not None:
                        assert_close(module(rest, after)[0], module(rest, expected_state)[0], f"{what}: what follows")


@law(lambda subject: subject.served and subject.build().reads_groups)
def keys_of_groups(subject: Subject) -> None:
    """Keys that heads share give what keys repeated for every head give, and have the sum of their gradients."""
    module = subject.build(trained=True)
    for mask in (None, padding_masks(2, 36)["left"]):
        whole = draw(module.context, 36, padding=mask)
        of_group = {name: getattr(whole, name)[:, ::2] for name in ("key", "value")}
        repeated = {name: x.repeat_interleave(2, dim=1) for name, x in of_group.items()}
        for state in _states(subject, module, whole):
            found, after, grads = _attend(module, dataclasses.replace(whole, **of_group), state)
            expected, expected_after, wanted = _attend(module, dataclasses.replace(whole, **repeated), state)
            assert_close(found, expected, "output")
            for name, x in expected_after.items():
                assert_close(after[name], x, name)
            for name, gradient in wanted.items():
                if name in of_group and gradient is not None:
                    gradient = gradient.unflatten(1, (-1, 2)).sum(2)
                assert_close(grads[name], gradient, f"gradient of {name}")


@law()
def calls_of_nothing(subject: Subject) -> None:
    """No rows give no rows, no tokens no tokens, with gradients of 0; the state fits the batch."""
    module = subject.build(trained=True)
    for batch, length in ((0, 36), (0, 1), (2, 0), (0, 0)):
        for mask in (None, torch.ones(batch, length, dtype=torch.bool)):
            inputs = draw(module.context, length, batch=batch, padding=mask)
            for state in _states(subject, module, inputs):
                output, after, grads = _attend(module, inputs, state)
                what = f"{batch} x {length}, mask {mask is not None}, state {state is not None}"
                assert output.shape == inputs.query.shape, f"{what}: shape {tuple(output.shape)}"
                assert output.dtype == inputs.query.dtype, f"{what}: output is {output.dtype}"
                assert set(after) == set(state or {}), f"{what}: the state holds {sorted(after)}"
                for name, x in after.items():
                    assert len(x) == batch, f"{what}: state {name!r} has shape {tuple(x.shape)}"
                    assert length or torch.equal(x, (state or {})[name]), f"{what}: state {name!r} changed"
                assert grads["value"] is not None, f"{what}: no gradient of the values"
                wrong = [name for name, x in grads.items() if x is not None and (x != 0).any()]  # nan != 0
                assert not wrong, f"{what}: gradients of {', '.join(wrong)} are not 0"


@law()
def redraws(subject: Subject) -> None:
    """Features drawn anew change the output where the options say that they are random, and nothing elsewhere; a seed
    always draws the same, and parameters stay."""
    module = subject.build(trained=True)
    inputs = draw(module.context, 36)
    start, parameters = module(inputs)[0], {name: x.clone() for name, x in module.named_parameters()}
    outputs = []
    for seed in (7, 8, 7):
        module.redraw(seed)
        outputs.append(module(inputs)[0])
    assert torch.equal(outputs[0], outputs[2]), "one seed gave two draws"
    for name, x in module.named_parameters():
        assert torch.equal(x, parameters[name]), f"{name} changed"
    changed = not (torch.equal(outputs[0], start) or torch.equal(outputs[0], outputs[1]))
    said = module.config.draws_features
    assert changed == said, f"draws_features is {said}, and the output {'changed' if changed else 'stayed'}"


@law()
def second_derivatives(subject: Subject) -> None:
    """Gradients of gradients match differences of gradients, or are refused by an error that speaks of derivatives."""
    context = subject.context(head_dim=4, max_length=80)
    module = subject.build(context, trained=True)
    for length in (7, 65):
        inputs = draw(context, length, padding=padding_masks(2, length)["left"])
        leaves = [getattr(inputs, name) for name in LEAVES] + [x.detach() for x in module.parameters()]
        steps, weights = _noise(leaves, seed=1), _noise(leaves, seed=2)
        given = [x.clone().requires_grad_() for x in leaves]
        try:
            slope = _slope(module, inputs, given, weights, create_graph=True) + 0 * given[0].sum()
            grads = torch.autograd.grad(slope, given, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            if "derivative" not in str(error):
                raise
            continue
        found = sum((g * step).sum().item() for g, step in zip(grads, steps, strict=True))
        ahead, behind = (
            _slope(module, inputs, [x + size * step for x, step in zip(leaves, steps, strict=True)], weights).item()
            for size in (1e-6, -1e-6)
        )
        expected = (ahead - behind) / 2e-6
        assert abs(found - expected) < 1e-4 * (1 + abs(expected)), f"T={length}: {found:g}, should be {expected:g}"


def _noise(like: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in like]


def _slope(
    module: AttentionVariant,
    inputs: AttentionInputs,
    given: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    *,
    create_graph: bool = False,
) -> torch.Tensor:
    """Weighted sum of the gradients of a loss that is linear in the output, as a penalty on gradients would be.

    `given` are the leaves of the call, then the parameters.
    """
    leaves = [x if x.requires_grad else x.clone().requires_grad_() for x in given]
    tensors: dict[str, Any] = dict(zip(LEAVES, leaves, strict=False))
    call = dataclasses.replace(inputs, **tensors)
    names = [name for name, _ in module.named_parameters()]
    parameters: dict[str, Any] = dict(zip(names, leaves[len(LEAVES) :], strict=True))
    output = torch.func.functional_call(module, parameters, (call,))[0]
    loss = (output * torch.linspace(0, 9, output.numel(), dtype=output.dtype).sin().view_as(output)).sum()
    grads = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return torch.stack([(g * w).sum() for g, w in zip(grads, weights, strict=True)]).sum()
