"""Layers that keep softmax: those whose conversion, alone, changes what a model gives most."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hf_linear_attn.attention import AttentionRecorder
from hf_linear_attn.calibration import EnoughError, OnProgress, eval_mode, reported, run_recorded, variants_by_layer
from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.variants.base import AttentionInputs

__all__ = ["KeepBy", "layers_to_keep"]

_ROWS = 128  # of logits that are compared at once: a vocabulary makes them wide

KeepBy = Literal["output", "states"]


def layers_to_keep(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    count: int,
    by: KeepBy | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[list[int], KeepBy]:
    """Layers whose variant, with softmax in all other layers, moves what the model gives most.

    The error of a layer's own output predicts worse what its conversion costs: later layers may depend on it or not.

    Args:
        model: a converted model.
        batches: keyword arguments of the model.
        count: how many layers to choose.
        by: `"output"`, the Kullback-Leibler divergence from the distributions that the head gives with softmax (for
            every real token, where it gives one a token); `"states"`, the squared change of the final hidden states of
            real tokens; None for `"output"` where the head gives distributions, `"states"` elsewhere.
        on_progress: told of each forward.

    Returns:
        the layers, and what they were chosen by.

    Raises:
        ValueError: for `"output"` where the model gives no distribution.
    """
    moved, blocks = dict.fromkeys(sorted(variants_by_layer(model)), 0.0), _blocks(model)
    with eval_mode(model):
        if by != "states":
            gives = bool(_distributions(model, batches[0], _alone(None)))
            if by == "output" and not gives:
                name = type(model).__name__
                raise ValueError(f"keep_softmax_by='output': {name} gives no distribution; allowed: 'states'.")
            by = "output" if gives else "states"
        final, distance = (_distributions, _divergence) if by == "output" else (_final_states, _squared_distance)
        calls = [(batch, layer_idx) for batch in batches for layer_idx in (None, *moved)]
        for batch, layer_idx in reported(calls, "choosing layers", on_progress):
            if layer_idx is None:
                with _remembered(blocks) as outputs:
                    exact = final(model, batch, _alone(None))
                continue
            with _replayed([(blocks[i], outputs[i]) for i in outputs if i < layer_idx]):
                found = final(model, batch, _alone(layer_idx))
            moved[layer_idx] += sum(distance(x, y) for x, y in zip(exact, found, strict=True))
    return sorted(sorted(moved, key=lambda layer_idx: -moved[layer_idx])[:count]), by


def _alone(running: int | None) -> AttentionRecorder:
    """A recorder under which this layer runs its variant and the others softmax."""

    def run(module: Any, inputs: AttentionInputs, _output: torch.Tensor) -> torch.Tensor | None:
        return module.linear_attn(inputs)[0] if module.layer_idx == running else None

    return run


def _blocks(model: Any) -> dict[int, nn.Module]:
    """The module of each layer, of which its attention is a part, by index."""
    attentions = get_patcher(model.config.base_model_type).self_attentions(model)
    names = {a.layer_idx: re.match(r".*?\.\d+(?=\.)", a.name) for a in attentions}
    return {index: model.get_submodule(name[0]) for index, name in names.items() if name is not None}


@contextmanager
def _remembered(blocks: Mapping[int, nn.Module]) -> Iterator[dict[int, Any]]:
    """What each block gives in a forward, by index."""
    outputs: dict[int, Any] = {}

    def keep(index: int, _block: nn.Module, _args: Any, output: Any) -> None:
        outputs[index] = output

    hooks = [block.register_forward_hook(partial(keep, index)) for index, block in blocks.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replayed(answers: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Let blocks give what they gave before: up to the first layer that differs nothing is computed again."""
    own = [(block, block.__dict__.get("forward")) for block, _ in answers]
    try:
        for block, output in answers:
            block.forward = partial(_constant, output)  # type: ignore[method-assign]
        yield
    finally:
        for block, forward in own:
            del block.forward
            if forward is not None:
                block.forward = forward  # type: ignore[method-assign]


def _constant(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    return output


def _divergence(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Sum of the Kullback-Leibler divergences of softmax(found) from softmax(exact), `[rows, classes]` both."""
    total = 0.0
    for x, y in zip(exact.split(_ROWS), found.split(_ROWS), strict=True):
        x, y = x.float().log_softmax(-1), y.float().log_softmax(-1)
        total += F.kl_div(y, x, reduction="sum", log_target=True).item()
    return total


def _squared_distance(exact: torch.Tensor, found: torch.Tensor) -> float:
    return (found.float() - exact.float()).square().sum().item()


def _final_states(model: Any, batch: Mapping[str, Any], recorder: AttentionRecorder) -> list[torch.Tensor]:
    """Final hidden states of the base model at real tokens, `[tokens, hidden_size]`; its head does not run."""
    states: list[torch.Tensor] = []

    def stop(_module: nn.Module, _args: Any, outputs: Any) -> None:
        states.append(outputs[0].flatten(0, -2))
        raise EnoughError

    hook = model.base_model.register_forward_hook(stop)
    try:
        run_recorded(model, batch, recorder)
    finally:
        hook.remove()
    return [_of_real_tokens(x, batch) for x in states]


def _distributions(model: Any, batch: Mapping[str, Any], recorder: AttentionRecorder) -> list[torch.Tensor]:
    """Logits of all distributions that the model gives, `[rows, classes]` for each of its outputs; none for scores."""
    problem, mask = getattr(model.config, "problem_type", None), batch.get("attention_mask")
    found: list[torch.Tensor] = []
    outputs = None if model.base_model is model or problem == "regression" else run_recorded(model, batch, recorder)
    if not isinstance(outputs, Mapping):  # a tuple, with return_dict=False in the config, does not say what is what
        return found
    for name, logits in outputs.items():
        if not name.endswith("logits"):
            continue
        if name in ("start_logits", "end_logits"):  # over the tokens of a row
            found.append(logits if mask is None else logits.masked_fill(~mask.to(logits.device).bool(), LOG_ZERO))
        elif problem == "multi_label_classification":  # yes or no for each label
            found.append(torch.stack([logits, torch.zeros_like(logits)], -1).flatten(0, -2))
        elif logits.shape[-1] > 1:
            found.append(_of_real_tokens(logits.flatten(0, -2), batch))
    return found


def _of_real_tokens(rows: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """`rows` `[batch * T, ...]` without those of padding; others as they are (choices are rows of the batch)."""
    mask = batch.get("attention_mask")
    if mask is None or mask.numel() != len(rows):
        return rows
    return rows[mask.to(rows.device).bool().flatten()]
