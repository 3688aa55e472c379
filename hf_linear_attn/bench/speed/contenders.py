"""Who takes turns in `hf-linear-attn bench`: softmax attention, variants and peers, as models, layers and attentions.

A contender is built where its group is measured, and freed after it. Nothing has dropout: neither SDPA nor the peers
are to pay for it where the variants do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from hf_linear_attn.bench.peers.flex import flex_layer
from hf_linear_attn.bench.peers.layers import LayerShape, ProjectedAttention, our_layer, softmax_layer
from hf_linear_attn.bench.peers.registry import SOFTMAX as SOFTMAX_METHOD
from hf_linear_attn.bench.peers.registry import Peer, available_peers, get_peer, list_peers, unavailable_peers
from hf_linear_attn.bench.speed.recipe import (
    SDPA,
    BenchRecipe,
    DecodeBench,
    LayerBench,
    LongBench,
    ModelBench,
    PeerBench,
    bench_methods,
)
from hf_linear_attn.data import load_config
from hf_linear_attn.measure.methods import Method, RefusedError, converted_copy, sharing_copy
from hf_linear_attn.registry import get_patcher

__all__ = [
    "Contender",
    "Trial",
    "layer_groups",
    "model_groups",
    "peer_groups",
    "shaped_model",
    "softmax_limit",
    "variant_reason",
]

TOGETHER = 5  # contenders that take turns with SDPA; so many are in memory at once, and lost by an interruption
PAIRS_TOGETHER = 3  # peers that take turns, each with ours
OURS = "ours for "


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        name: in the table.
        build: what is measured, in evaluation mode; None where `reason` says why it is not.
        facts: of its row: `key` and `options` of a variant, `peer` and `note` of a peer and of ours beside it.
        reason: why it is not measured: `{"refused" | "left_out" | "missing": text}`.
    """

    name: str
    build: Callable[[], nn.Module] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)


class Trial:
    """A contender that was built: its forward, and its forward and backward.

    Args:
        module: what is called.
        inputs: keyword or positional arguments; tensors that require a gradient get one in training.
    """

    def __init__(self, module: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> None:
        self._module, self._args, self._kwargs = module, args, kwargs
        self._gradient: torch.Tensor | None = None

    def _call(self) -> torch.Tensor:
        output = self._module(*self._args, **self._kwargs)
        return output if isinstance(output, torch.Tensor) else output.last_hidden_state

    def forward(self) -> None:
        """Forward, without gradients."""
        with torch.no_grad():
            self._call()

    def training(self) -> None:
        """Forward and backward of everything that requires a gradient."""
        output = self._call()
        if self._gradient is None:  # of the first call, which is not timed
            self._gradient = torch.ones_like(output)
        output.backward(self._gradient)

    def clear(self) -> None:
        """Free the gradients of the last call."""
        for tensor in [*self._module.parameters(), *self._args]:
            tensor.grad = None


def variant_reason(recipe: BenchRecipe, method: Method, length: int, is_causal: bool) -> dict[str, str]:
    """Why a variant is not measured at this length; empty if it is."""
    if not method.serves(is_causal):
        return {"refused": f"serves {'encoders' if is_causal else 'decoders'} only. {method.spec.refusal}"}
    if method.quadratic() and length > recipe.quadratic_up_to:
        return {"left_out": f"not of linear cost, run up to {recipe.quadratic_up_to:,} tokens"}
    return {}


def softmax_limit(recipe: BenchRecipe, name: str, length: int) -> dict[str, str]:
    """Why a form of softmax attention is not measured at this length; empty if it is."""
    limit = recipe.quadratic_up_to if name == "eager" else recipe.softmax_up_to  # eager holds n x n weights
    return {"left_out": f"run up to {limit:,} tokens"} if length > limit else {}


def _in_turns(
    recipe: BenchRecipe,
    part: ModelBench | LayerBench,
    length: int,
    only: list[str] | None,
    is_causal: bool,
    build_softmax: Callable[[str], nn.Module],
    build_variant: Callable[[Method], nn.Module],
) -> list[list[Contender]]:
    """Softmax and the variants of a part in groups that are timed together, each led by SDPA."""
    everyone = []
    for name in part.softmax:
        reason = softmax_limit(recipe, name, length)
        everyone.append(Contender(name, None if reason else partial(build_softmax, name), reason=reason))
    for method in bench_methods(recipe, part, only):
        reason = variant_reason(recipe, method, length, is_causal)
        facts = {"key": method.key, "options": method.options}
        everyone.append(Contender(method.name, None if reason else partial(build_variant, method), facts, reason))
    sdpa = next(contender for contender in everyone if contender.name == SDPA)
    rest = [contender for contender in everyone if contender.name != SDPA]
    able = [contender for contender in rest if contender.build is not None]
    groups = [[sdpa, *able[i : i + TOGETHER]] for i in range(0, len(able), TOGETHER)] or [[sdpa]]
    groups[0] += [contender for contender in rest if contender.build is None]
    return groups


# ---------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------


def shaped_model(part: ModelBench | DecodeBench | LongBench, max_length: int) -> PreTrainedModel:
    """A model without a head of the part's shape that reads `max_length` tokens: random weights, SDPA, eval mode.

    Raises:
        ValueError: for an unknown model type or a key that its config does not have.
    """
    if part.checkpoint is not None:
        config = load_config(part.checkpoint)
        changes = dict(part.config)
    else:
        changes = {key: value for key, value in part.config.items() if key != "model_type"}
        config = get_patcher(part.config["model_type"]).config_class()
    changes["num_hidden_layers"] = part.layers
    changes |= {key: 0.0 for key in config.to_dict() if key.endswith(("dropout", "dropout_prob", "pdrop"))}
    for key, value in changes.items():
        if not hasattr(config, key):
            raise ValueError(f"{part.name!r}: {type(config).__name__} has no {key!r}.")
        setattr(config, key, value)
    get_patcher(config.model_type).set_max_length(config, max_length)
    config.use_cache = False
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation=SDPA).eval()


def _with_softmax(model: PreTrainedModel, implementation: str) -> nn.Module:
    other = sharing_copy(model)
    other.set_attn_implementation(implementation)
    return other


def model_groups(
    recipe: BenchRecipe, part: ModelBench, length: int, only: list[str] | None
) -> tuple[list[list[Contender]], Callable[[nn.Module], Trial]]:
    """The groups of a part at one length, and what makes a trial of each model."""
    device, dtype = torch.device(recipe.device), getattr(torch, recipe.dtype)
    model: Any = shaped_model(part, length)
    model.to(device, dtype)
    causal = get_patcher(model.config.model_type).is_causal(model.config)
    builders = partial(_with_softmax, model), partial(converted_copy, model)
    groups = _in_turns(recipe, part, length, only, causal, *builders)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (part.batch_size, length), generator=generator).to(device)
    return groups, lambda module: Trial(module.to(device, dtype), input_ids=ids)


# ---------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------


def _softmax(shape: LayerShape, name: str) -> nn.Module:
    if name == SDPA:
        return softmax_layer(shape)
    if name == "eager":
        return get_peer("eager causal" if shape.is_causal else "eager").build(shape)
    return flex_layer(shape)


def _attention_of(layer: nn.Module) -> nn.Module:
    """The attention between the projections of a layer."""
    if not isinstance(layer, ProjectedAttention) or not isinstance(layer.attend, nn.Module):
        raise RefusedError("its attention cannot be taken out of its layer")
    return layer.attend


class _LayerTrials:
    """Makes trials of layers of one shape, or of the attentions inside them; all get the same inputs."""

    def __init__(self, recipe: BenchRecipe, shape: LayerShape, projections: bool) -> None:
        self._shape, self._projections = shape, projections
        self._device, self._dtype = torch.device(recipe.device), getattr(torch, recipe.dtype)
        self._inputs: list[torch.Tensor] = []

    def _draw(self) -> list[torch.Tensor]:
        """Hidden states `[B, T, C]`; without projections, behind query, key and value `[B, H, T, D]`."""
        shape, generator = self._shape, torch.Generator(self._device).manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=self._device).to(self._dtype)

        hidden = draw(shape.batch, shape.length, shape.hidden_size)
        if self._projections:
            return [hidden.requires_grad_()]
        heads = (shape.batch, shape.length, shape.num_heads, shape.head_dim)
        # laid out as the projections of a model leave them
        return [*(draw(*heads).transpose(1, 2).detach().requires_grad_() for _ in range(3)), hidden]

    def __call__(self, layer: nn.Module) -> Trial:
        self._inputs = self._inputs or self._draw()
        module = layer if self._projections else _attention_of(layer)
        return Trial(module.to(self._device, self._dtype), *self._inputs)


def layer_groups(
    recipe: BenchRecipe, part: LayerBench, length: int, only: list[str] | None
) -> tuple[list[list[Contender]], Callable[[nn.Module], Trial]]:
    """As `model_groups`, for single layers."""
    shape = LayerShape(part.batch_size, length, part.hidden_size, part.num_heads, part.is_causal)

    def ours(method: Method) -> nn.Module:
        return _checked(our_layer, shape, method.key, method.options)

    groups = _in_turns(recipe, part, length, only, part.is_causal, partial(_softmax, shape), ours)
    return groups, _LayerTrials(recipe, shape, part.projections)


def peer_groups(
    recipe: BenchRecipe,
    part: PeerBench,
    length: int,
    mode: str,
    only: list[str] | None,
    measured: Callable[[str], bool],
) -> list[tuple[list[Contender], Callable[[nn.Module], Trial]]]:
    """Groups of SDPA, then a few peers, each followed by ours of the same shape and options.

    Softmax attention is no peer unless `part.only` names it: it is measured beside the variants.

    Args:
        recipe: of the run.
        part: of the recipe.
        length: tokens.
        mode: of `MODES`.
        only: keys of our variants; None for all.
        measured: whether a peer of this name is to be left out.
    """
    able = {peer.name for peer in available_peers(recipe.device)}
    missing = unavailable_peers(recipe.device)
    limit = softmax_limit(recipe, SDPA, length)
    pairs: dict[LayerShape, list[list[Contender]]] = {}
    for peer in _peers(part):
        if measured(peer.name) or (only is not None and peer.method not in only):
            continue
        shape = LayerShape(part.batch_size, length, part.hidden_size, part.num_heads, peer.causal)
        reason = {} if peer.name in able else {"missing": missing[peer.name]}
        if not reason and mode == "training" and torch.device(recipe.device).type not in peer.trains_on:
            reason = {"missing": f"has no backward pass on {recipe.device}"}
        facts = {"key": peer.method, "options": peer.options, "is_causal": peer.causal, "note": peer.note}
        theirs = Contender(peer.name, None if reason else partial(_checked, peer.build, shape), facts, reason)
        ours = Contender(OURS + peer.name, None if reason else partial(_checked, peer.ours, shape))
        pairs.setdefault(shape, []).append([theirs, ours])
    groups: list[tuple[list[Contender], Callable[[nn.Module], Trial]]] = []
    for shape, found in pairs.items():
        make_trial = _LayerTrials(recipe, shape, part.projections)
        sdpa = Contender(SDPA, None if limit else partial(_softmax, shape, SDPA), reason=limit)
        for start in range(0, len(found), PAIRS_TOGETHER):
            contenders = [contender for pair in found[start : start + PAIRS_TOGETHER] for contender in pair]
            anyone = any(contender.build is not None for contender in contenders)
            reference = sdpa if anyone else Contender(SDPA)
            groups.append(([reference, *contenders], make_trial))
    return groups


def _peers(part: PeerBench) -> list[Peer]:
    if part.only is not None:
        return [get_peer(name) for name in part.only]
    return [peer for peer in map(get_peer, list_peers()) if peer.method != SOFTMAX_METHOD]


def _checked(build: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    try:
        return build(*arguments)
    except ValueError as error:  # a length, say, that the layer does not take
        raise RefusedError(str(error)) from error
