"""Calibration on a few batches: data-dependent starts, and regression layer by layer."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_linear_attn.attention import AttentionRecorder
from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.report import OutputErrors
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant

__all__ = [
    "DEFAULT_LEARNING_RATE",
    "EnoughError",
    "OnProgress",
    "Recording",
    "calibrate",
    "eval_mode",
    "output_errors",
    "progress_bars",
    "record",
    "regress",
    "regress_layers",
    "reported",
    "run_recorded",
    "variants_by_layer",
]

DEFAULT_LEARNING_RATE = 0.03  # of each parameter's own size
_CHECKS = 10  # how often a regression is judged
_SCALE_OF_ZEROS = 0.1  # size that a parameter which starts at 0 is taken to have

Attend = Callable[[AttentionInputs], tuple[torch.Tensor, Any]]
OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much of it there is; first with 0 done."""


class EnoughError(Exception):
    """Ends a forward of whose rest nothing is needed: a decoder's head may cost as much as many layers."""


@dataclass
class Recording:
    """Inputs and softmax outputs `[B, H, T, D]` of one layer, batch by batch."""

    inputs: list[AttentionInputs] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """Bars with the time left, one after the other, for what `calibrate` and `layers_to_keep` report.

    None are shown while Transformers' own are switched off (`transformers.utils.logging.disable_progress_bar`).
    """
    bars: dict[str, Any] = {}
    shown: dict[str, int] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what], shown[what] = logging.tqdm(total=total, desc=what), 0
        bars[what].update(done - shown[what])
        shown[what] = done
        if done == total:
            bars[what].close()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def record(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], on_progress: OnProgress | None = None
) -> dict[int, Recording]:
    """What every converted layer receives, and what softmax makes of it, while all layers run softmax.

    Args:
        model: a converted model; in eval mode meanwhile.
        batches: keyword arguments of the model, on any device.
        on_progress: told of each batch.
    """
    recordings: dict[int, Recording] = {}
    last = max(variants_by_layer(model))

    def keep(module: Any, inputs: AttentionInputs, output: torch.Tensor) -> None:
        recording = recordings.setdefault(module.layer_idx, Recording())
        recording.inputs.append(replace(inputs, softmax_output=output))
        recording.outputs.append(output)
        if module.layer_idx == last:
            raise EnoughError

    with eval_mode(model):
        for batch in reported(batches, "recording softmax", on_progress):
            run_recorded(model, batch, keep)
    return dict(sorted(recordings.items()))


def reported(items: Sequence[Any], what: str, on_progress: OnProgress | None) -> Iterator[Any]:
    """The items one by one, each reported once it is dealt with."""
    for done, item in enumerate(items):
        if on_progress is not None and not done:
            on_progress(what, 0, len(items))
        yield item
        if on_progress is not None:
            on_progress(what, done + 1, len(items))


@torch.no_grad()
def output_errors(attend: Attend, recording: Recording) -> OutputErrors:
    """How far an attention is from softmax on what one layer received, over its real tokens.

    Args:
        attend: a variant, or a function of its inputs that returns an output and something else.
        recording: the layer's inputs and softmax outputs.
    """
    squared_error = squared_norm = head_cosine = torch.zeros(())  # [H] in the end
    cosine, tokens = 0.0, 0
    for got, want in _real_outputs(attend, recording):
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
        **_zero_shares(attend, recording),
    )


def _zero_shares(attend: Attend, recording: Recording) -> dict[str, Any]:
    """`zeros` and `head_zeros` of a variant that learns which weights are 0; nothing of any other."""
    counts = [attend.zero_weights(x) for x in recording.inputs] if isinstance(attend, AttentionVariant) else []
    found = [torch.stack(pair).cpu() for pair in counts if pair is not None]
    if not found:
        return {}
    zeros, weights = torch.stack(found).sum(0).double()  # [H] each
    return {"zeros": (zeros.sum() / weights.sum()).item(), "head_zeros": (zeros / weights).tolist()}


def _output_error(attend: Attend, recording: Recording) -> float:
    """`error` of `output_errors` alone."""
    squares = [((got - want).square().sum(), want.square().sum()) for got, want in _real_outputs(attend, recording)]
    error, norm = (sum(x.item() for x in column) for column in zip(*squares, strict=True))
    return (error / max(norm, 1e-30)) ** 0.5


def _real_outputs(attend: Attend, recording: Recording) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What an attention and softmax give for the real tokens of each batch, `[tokens, H, D]` in float32."""
    for inputs, expected in zip(recording.inputs, recording.outputs, strict=True):
        output = attend(inputs)[0]
        real = slice(None) if inputs.token_mask is None else inputs.token_mask
        got, want = (x.transpose(1, 2)[real].flatten(0, -3).float() for x in (output, expected))
        yield got, want


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    steps: int = 0,
    lr: float = DEFAULT_LEARNING_RATE,
    on_progress: OnProgress | None = None,
) -> dict[int, OutputErrors]:
    """Let every variant of a converted model choose its start, then train it alone; how far each is from softmax.

    Args:
        model: a converted model.
        batches: keyword arguments of the model.
        steps: steps of regression per layer.
        lr: learning rate of the regression, see `regress`.
        on_progress: told of each batch, each layer and each step: all of them take minutes on a large model.

    Returns:
        layer -> its errors, that of the start as published among them.
    """
    recordings, variants = record(model, batches, on_progress), variants_by_layer(model)
    published: dict[int, float] = {}
    with _one_warning():
        for layer_idx in reported(list(recordings), "choosing starts", on_progress):
            variant, recording = variants[layer_idx], recordings[layer_idx]
            if steps or type(variant).calibrate is not AttentionVariant.calibrate:  # otherwise it stays as published
                published[layer_idx] = _output_error(variant, recording)
            variant.calibrate(recording.inputs)
    groups = _sharing(variants) if steps else []
    for number, group in enumerate(groups):
        told = None
        if on_progress is not None:
            told = partial(_tell_of_step, on_progress, number * steps, len(groups) * steps)
            told(0)
        _regress([variants[i] for i in group], [recordings[i] for i in group], steps, lr, told)
    found: dict[int, OutputErrors] = {}
    for layer_idx in reported(list(recordings), "measuring errors", on_progress):
        errors = output_errors(variants[layer_idx], recordings[layer_idx])
        found[layer_idx] = replace(errors, published_error=published.get(layer_idx, errors.error))
    return found


def _tell_of_step(on_progress: OnProgress, before: int, total: int, step: int) -> None:
    on_progress("training new parameters", before + step, total)


def regress(variant: AttentionVariant, recording: Recording, steps: int, lr: float = DEFAULT_LEARNING_RATE) -> None:
    """Train one layer's variant on its `regression_loss`; it ends no further from softmax than it was.

    Adam with a falling learning rate, one batch a step in turn, in float32 or better. Of ten points along the way
    the one with the smallest output error is kept. A variant without parameters stays as it is. Deterministic on CPU.

    Args:
        variant: changed in place, at the end: an exception on the way leaves it as it was.
        recording: the layer's inputs and softmax outputs.
        steps: number of steps.
        lr: learning rate, times the root mean square of each parameter.

    Raises:
        ValueError: where a window covers every text that is read: no parameter has a part in any output.
    """
    _regress([variant], [recording], steps, lr)


def regress_layers(variants: Mapping[int, AttentionVariant], recordings: Mapping[int, Recording], steps: int) -> None:
    """`regress` for layers by their index; layers that hold the same parameter are trained together."""
    for group in _sharing(variants):
        _regress([variants[i] for i in group], [recordings[i] for i in group], steps, DEFAULT_LEARNING_RATE)


@torch.no_grad()
def run_recorded(model: Any, batch: Mapping[str, Any], recorder: AttentionRecorder) -> Any:
    """The outputs of a forward, or None of one that an `EnoughError` ends."""
    on_device = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    extra = {"use_cache": False} if get_patcher(model.config.base_model_type).is_causal(model.config) else {}
    with suppress(EnoughError):
        return model(**on_device, **extra, linear_attn_recorder=recorder)
    return None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off meanwhile; each module goes back to the mode it was in."""
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


def variants_by_layer(model: Any) -> dict[int, AttentionVariant]:
    """The variants of a converted model by the index of their layer, in order."""
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


def _regress(
    variants: list[AttentionVariant],
    recordings: list[Recording],
    steps: int,
    lr: float,
    on_step: Callable[[int], None] | None = None,
) -> None:
    trained, judged = copy.deepcopy(variants), copy.deepcopy(variants)  # a tensor that several share stays one
    for variant in trained:
        variant.eval().requires_grad_(True)
        for parameter in variant.parameters():
            parameter.data = parameter.data.to(accumulation_dtype(parameter.dtype))
    parameters = _parameters(trained)
    if not parameters:
        if on_step is not None:
            on_step(steps)
        return

    def error() -> float:
        return sum(_output_error(v, recording) ** 2 for v, recording in zip(judged, recordings, strict=True))

    best, smallest = [p.detach().clone() for p in _parameters(variants)], error()
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr * _scale(p)} for p in parameters])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    learned = False
    for step in range(1, steps + 1):
        with torch.enable_grad():
            losses = [_loss(v, recording, step) for v, recording in zip(trained, recordings, strict=True)]
            loss = torch.stack(losses).sum()
        gradients: Sequence[torch.Tensor | None] = [None] * len(parameters)
        if loss.requires_grad:  # not where the texts lie within a window
            learned = True
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step)
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            _copy(_parameters(judged), parameters)
            found = error()
            if found < smallest:  # false for nan
                best, smallest = [p.detach().clone() for p in _parameters(judged)], found
    if not learned:
        raise ValueError(
            f"calibration_steps={steps}: no layer's output depends on its new parameters, as a window covers every "
            "text that is read. Take longer texts or a narrower window."
        )
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
