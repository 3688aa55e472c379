"""Calibration on a few batches: data-dependent starts, regression layer by layer, and layers that keep softmax."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hf_linear_attn.attention import AttentionRecorder
from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.report import OutputErrors
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant

__all__ = [
    "DEFAULT_LEARNING_RATE",
    "Recording",
    "calibrate",
    "layers_to_keep",
    "output_errors",
    "record",
    "regress",
]

DEFAULT_LEARNING_RATE = 0.03  # of each parameter's own size
_CHECKS = 10  # how often a regression is judged
_SCALE_OF_ZEROS = 0.1  # size that a parameter which starts at 0 is taken to have

Attend = Callable[[AttentionInputs], tuple[torch.Tensor, Any]]


class _EnoughError(Exception):
    """Ends a forward of whose rest nothing is needed: a decoder's head may cost as much as many layers."""


@dataclass
class Recording:
    """Inputs and softmax outputs `[B, H, T, D]` of one layer, batch by batch."""

    inputs: list[AttentionInputs] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


def record(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> dict[int, Recording]:
    """What every converted layer receives, and what softmax makes of it, while all layers run softmax.

    Args:
        model: a converted model; in eval mode meanwhile.
        batches: keyword arguments of the model, on any device.
    """
    recordings: dict[int, Recording] = {}
    last = max(_variants(model))

    def keep(module: Any, inputs: AttentionInputs, output: torch.Tensor) -> None:
        recording = recordings.setdefault(module.layer_idx, Recording())
        recording.inputs.append(inputs)
        recording.outputs.append(output)
        if module.layer_idx == last:
            raise _EnoughError

    with _eval_mode(model):
        for batch in batches:
            _forward(model, batch, keep)
    return dict(sorted(recordings.items()))


@torch.no_grad()
def output_errors(attend: Attend, recording: Recording) -> OutputErrors:
    """How far an attention is from softmax on what one layer received, over its real tokens.

    Args:
        attend: a variant, or a function of its inputs that returns an output and something else.
        recording: the layer's inputs and softmax outputs.
    """
    squared_error = squared_norm = head_cosine = torch.zeros(())  # [H] in the end
    cosine, tokens = 0.0, 0
    for inputs, expected in zip(recording.inputs, recording.outputs, strict=True):
        output = attend(inputs)[0]
        real = torch.ones(output.shape[0], output.shape[2], dtype=torch.bool, device=output.device)
        if inputs.token_mask is not None:
            real = inputs.token_mask
        got, want = (x.transpose(1, 2)[real].float() for x in (output, expected))  # [tokens, H, D]
        squared_error = squared_error.to(got.device) + (got - want).square().sum((0, 2))
        squared_norm = squared_norm.to(got.device) + want.square().sum((0, 2))
        head_cosine = head_cosine.to(got.device) + F.cosine_similarity(got, want, dim=-1).sum(0)
        cosine += F.cosine_similarity(got.flatten(1), want.flatten(1), dim=-1).sum().item()
        tokens += got.shape[0]
    return OutputErrors(
        error=(squared_error.sum() / squared_norm.sum().clamp(min=1e-30)).sqrt().item(),
        cosine=cosine / max(tokens, 1),
        head_errors=(squared_error / squared_norm.clamp(min=1e-30)).sqrt().tolist(),
        head_cosines=(head_cosine / max(tokens, 1)).tolist(),
    )


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    steps: int = 0,
    lr: float = DEFAULT_LEARNING_RATE,
) -> dict[int, OutputErrors]:
    """Let every variant of a converted model choose its start, then train it alone; how far each is from softmax.

    Args:
        model: a converted model.
        batches: keyword arguments of the model.
        steps: steps of regression per layer.
        lr: learning rate of the regression, see `regress`.
    """
    recordings, variants = record(model, batches), _variants(model)
    with _one_warning():
        for layer_idx, recording in recordings.items():
            variants[layer_idx].calibrate(recording.inputs)
    if steps:
        for group in _sharing(variants):
            _regress([variants[i] for i in group], [recordings[i] for i in group], steps, lr)
    return {layer_idx: output_errors(variants[layer_idx], recordings[layer_idx]) for layer_idx in recordings}


def regress(variant: AttentionVariant, recording: Recording, steps: int, lr: float = DEFAULT_LEARNING_RATE) -> None:
    """Train one layer's variant on its `regression_loss`; it ends no further from softmax than it was.

    Adam with a falling learning rate, one batch a step in turn, in float32 or better. Of ten points along the way
    the one with the smallest output error is kept. A variant without parameters stays as it is. Deterministic on CPU.

    Args:
        variant: changed in place, at the end: an exception on the way leaves it as it was.
        recording: the layer's inputs and softmax outputs.
        steps: number of steps.
        lr: learning rate, times the root mean square of each parameter.
    """
    _regress([variant], [recording], steps, lr)


def layers_to_keep(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Layers whose variant, with softmax in all other layers, moves the final hidden states of real tokens most.

    The error of a layer's own output predicts worse what its conversion costs: later layers may depend on it or not.

    Args:
        model: a converted model.
        batches: keyword arguments of the model.
        count: how many layers to choose.
    """
    converted = set(_variants(model))

    def final_states(batch: Mapping[str, Any], kept: set[int]) -> torch.Tensor:
        def run(module: Any, inputs: AttentionInputs, output: torch.Tensor) -> torch.Tensor | None:
            return None if module.layer_idx in kept else module.linear_attn(inputs)[0]

        states = _final_states(model, batch, run).float()
        mask = batch.get("attention_mask")
        if mask is None:
            return states
        return states[mask.to(states.device).bool().reshape(states.shape[:2])]  # choices are rows of the batch

    moved = dict.fromkeys(sorted(converted), 0.0)
    with _eval_mode(model):
        for batch in batches:
            exact = final_states(batch, converted)
            for layer_idx in moved:
                moved[layer_idx] += (final_states(batch, converted - {layer_idx}) - exact).square().sum().item()
    return sorted(sorted(moved, key=lambda layer_idx: -moved[layer_idx])[:count])


@torch.no_grad()
def _forward(model: Any, batch: Mapping[str, Any], recorder: AttentionRecorder) -> None:
    """A forward up to the end, or to an `_EnoughError`."""
    on_device = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    extra = {"use_cache": False} if get_patcher(model.config.base_model_type).is_causal(model.config) else {}
    with suppress(_EnoughError):
        model(**on_device, **extra, linear_attn_recorder=recorder)


def _final_states(model: Any, batch: Mapping[str, Any], recorder: AttentionRecorder) -> torch.Tensor:
    """Final hidden states of the base model, `[B, T, hidden_size]`; its head does not run."""
    states: list[torch.Tensor] = []

    def stop(_module: nn.Module, _args: Any, outputs: Any) -> None:
        states.append(outputs[0])
        raise _EnoughError

    hook = model.base_model.register_forward_hook(stop)
    try:
        _forward(model, batch, recorder)
    finally:
        hook.remove()
    return states[0]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _one_warning() -> Iterator[None]:
    """Gather what the layers have to say into one warning, at the line that called the package."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    own = dict.fromkeys(str(entry.message) for entry in caught if entry.category is UserWarning)
    for entry in caught:
        if entry.category is not UserWarning:
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
    if own:
        warnings.warn("\n".join(own), stacklevel=_callers_level())


def _callers_level() -> int:
    """`stacklevel`, for a warning of the function that asks, of the line that called the package."""
    frame, level, caller = sys._getframe(1), 1, 1
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] == __package__:
            caller = level + 1
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    return caller


def _variants(model: Any) -> dict[int, AttentionVariant]:
    attentions = get_patcher(model.config.base_model_type).self_attentions(model)
    return {a.layer_idx: a.module.linear_attn for a in attentions if hasattr(a.module, "linear_attn")}


def _sharing(variants: Mapping[int, nn.Module]) -> list[list[int]]:
    """Layers in groups that hold the same parameter: those can only be trained together."""
    groups: list[tuple[set[int], list[int]]] = []
    for layer_idx, variant in variants.items():
        held = {id(parameter) for parameter in variant.parameters()}
        joined = next((group for group in groups if group[0] & held), None)
        if joined is None:
            groups.append((held, [layer_idx]))
        else:
            joined[0].update(held)
            joined[1].append(layer_idx)
    return [layers for _, layers in groups]


def _regress(variants: list[AttentionVariant], recordings: list[Recording], steps: int, lr: float) -> None:
    trained, judged = copy.deepcopy(variants), copy.deepcopy(variants)  # a tensor that several share stays one
    for variant in trained:
        variant.eval().requires_grad_(True)
        for parameter in variant.parameters():
            parameter.data = parameter.data.to(accumulation_dtype(parameter.dtype))
    parameters = _parameters(trained)
    if not parameters:
        return

    def error() -> float:
        return sum(output_errors(v, recording).error ** 2 for v, recording in zip(judged, recordings, strict=True))

    best, smallest = [p.detach().clone() for p in _parameters(variants)], error()
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr * _scale(p)} for p in parameters])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in range(1, steps + 1):
        with torch.enable_grad():
            losses = [_loss(v, recording, step) for v, recording in zip(trained, recordings, strict=True)]
            gradients = torch.autograd.grad(torch.stack(losses).sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            _copy(_parameters(judged), parameters)
            found = error()
            if found < smallest:  # false for nan
                best, smallest = [p.detach().clone() for p in _parameters(judged)], found
    _copy(_parameters(variants), best)


def _scale(parameter: torch.Tensor) -> float:
    """Root mean square of a parameter: methods differ by orders of magnitude in the size of theirs."""
    scale = parameter.detach().square().mean().sqrt().item()
    return scale if scale > 0 else _SCALE_OF_ZEROS


def _loss(variant: AttentionVariant, recording: Recording, step: int) -> torch.Tensor:
    index = step % len(recording.inputs)
    inputs, target = recording.inputs[index], recording.outputs[index]
    dtype = accumulation_dtype(target.dtype)
    wide = {name: getattr(inputs, name) for name in ("query", "key", "value", "hidden_states")}
    wide = {name: None if x is None else x.to(dtype) for name, x in wide.items()}
    return variant.regression_loss(replace(inputs, **wide), target.to(dtype))


def _parameters(variants: list[AttentionVariant]) -> list[nn.Parameter]:
    """Each parameter once, in an order that copies of the variants have in common."""
    return list(nn.ModuleList(variants).parameters())


@torch.no_grad()
def _copy(targets: list[nn.Parameter], sources: Sequence[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
