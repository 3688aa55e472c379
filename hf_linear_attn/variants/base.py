"""What an attention variant receives, returns and must provide."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import nn

from hf_linear_attn.ops.base.text_pairs import GlobalChoice
from hf_linear_attn.ops.features import named
from hf_linear_attn.ops.features.maps import FeatureMap
from hf_linear_attn.ops.linear.attention import feature_map_attention, init_linear_state
from hf_linear_attn.ops.starts.calibration import Row, error_meter
from hf_linear_attn.registry import VariantSpec

__all__ = [
    "MAX_INTEGER",
    "AttentionInputs",
    "AttentionVariant",
    "FeatureMapVariant",
    "LayerContext",
    "State",
    "VariantConfig",
    "device_memory",
    "materialize",
]

# A decode state: named tensors whose first dimension is the batch, so that a cache can reorder, repeat and
# offload them without knowing the method.
State = dict[str, torch.Tensor]
Forward = Callable[..., tuple[torch.Tensor, State | None]]


MAX_INTEGER = 2**31 - 1
"""Largest integer an option may be, unless it says less: no length or seed is larger."""
MAX_WIDTH = 2**16
"""Largest number of features, slots or tokens that a tensor of a layer may be made for."""
MAX_NUMBER = 1e4
"""Largest number an option may be, unless it says less: it fits into float16."""


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class VariantConfig:
    """Base of every variant's options. Subclasses are frozen dataclasses whose values survive JSON."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise `ValueError` naming the option, what was given and what is allowed."""

    @property
    def draws_features(self) -> bool:
        """Whether these options give random features, which `AttentionVariant.redraw` draws anew."""
        return False

    def require_integer(
        self,
        *names: str,
        at_least: int = 1,
        at_most: int = MAX_INTEGER,
        optional: bool = False,
        each: str = "",
        word: str | None = None,
    ) -> None:
        """Raise `ValueError` unless each of these options is an integer in that range, or None if `optional`.

        With `each` (`"head"`, `"layer"`) a list of such integers is allowed as well, and so is a `word` (`"auto"`).
        """
        for name in names:
            value = getattr(self, name)
            numbers = value if each and isinstance(value, tuple) else (value,)
            if (optional and value is None) or (word is not None and value == word):
                continue
            if not numbers or not all(_is_integer(x) and at_least <= x <= at_most for x in numbers):
                also = (f", or a list with one per {each}" if each else "") + (", or None" if optional else "")
                also += "" if word is None else f", or {word!r}"
                large = any(_is_integer(x) and x > at_most for x in numbers)
                range_ = f"from {at_least} to {at_most}" if large else f"of at least {at_least}"
                raise ValueError(f"{name}={value!r}; allowed: an integer {range_}{also}.")

    def require_width(self, *names: str, at_least: int = 1, optional: bool = False) -> None:
        """`require_integer` for options that a tensor of the layer is as large as: features, slots, ranks."""
        self.require_integer(*names, at_least=at_least, at_most=MAX_WIDTH, optional=optional)

    def require_number(
        self, *names: str, at_least: float = -MAX_NUMBER, at_most: float = MAX_NUMBER, optional: bool = False
    ) -> None:
        """Raise `ValueError` unless each of these options is a number in that range, or None if `optional`."""
        for name in names:
            value = getattr(self, name)
            if optional and value is None:
                continue
            is_number = _is_integer(value) or isinstance(value, float)
            if not is_number or not at_least <= value <= at_most:  # false for nan
                bounded = is_number or (at_least, at_most) != (-MAX_NUMBER, MAX_NUMBER)
                range_ = f" from {at_least:g} to {at_most:g}" if bounded else ""
                raise ValueError(f"{name}={value!r}; allowed: a number{range_}{', or None' if optional else ''}.")

    def require_bool(self, *names: str) -> None:
        """Raise `ValueError` unless each of these options is True or False."""
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: True or False.")

    def require_choice(self, name: str, allowed: Iterable[Any]) -> None:
        """Raise `ValueError` unless this option is one of `allowed`, and of its type: True is not 1."""
        allowed, value = list(allowed), getattr(self, name)
        if isinstance(value, bool) or not any(isinstance(value, type(x)) and value == x for x in allowed):
            raise ValueError(f"{name}={value!r}; allowed: {', '.join(map(str, allowed))}.")

    def require_feature_map(self, name: str, *others: str) -> None:
        """Raise `ValueError` unless this option is the name of a feature map, a function, or one of `others`.

        A function's name takes its place (`ops.features.named.name_of`), so that options stay plain values.
        """
        value = named.name_of(getattr(self, name))
        if not named.is_known(value) and not (isinstance(value, str) and value in others):
            allowed = ", ".join([*named.registered_names(), *others])
            raise ValueError(
                f"{name}={value!r}; allowed: {allowed}. A map of your own is known by its name once "
                "hf_linear_attn.register_feature_map(name, function) was called in this process, before a model is "
                "converted or loaded."
            )
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Options as JSON types (tuples become lists)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> VariantConfig:
        """Build from keyword options.

        Raises:
            ValueError: for an unknown option (with the list of allowed ones) or a bad value.
        """
        allowed = [field.name for field in fields(cls)]
        if not isinstance(options, Mapping):
            raise ValueError(f"options={options!r}; allowed: a mapping with the keys {', '.join(allowed)}.")
        unknown = [name for name in options if name not in allowed]
        if unknown:
            raise ValueError(
                f"Unknown option(s) {', '.join(map(repr, unknown))} for {cls.__name__}. Allowed: {', '.join(allowed)}."
            )
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})


@dataclass(frozen=True)
class LayerContext:
    """The place in a model where a variant is installed.

    Attributes:
        layer_idx: index of the layer, from 0.
        num_layers: layers in the model.
        hidden_size: width of `hidden_states`.
        num_heads: query heads.
        head_dim: width of a head.
        max_length: longest sequence the model's position table allows (tokens).
        is_causal: whether the layer is causal (decoder) or bidirectional (encoder).
        rotary: whether queries and keys arrive with rotary embeddings, which a projection of hidden_states lacks.
    """

    layer_idx: int
    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    max_length: int
    is_causal: bool
    rotary: bool = False

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers, on the CPU, that depend on the seed and the layer alone."""
        return torch.Generator(device="cpu").manual_seed(seed * 100_003 + self.layer_idx)


@dataclass
class AttentionInputs:
    """One call of one attention layer.

    Attributes:
        query: `[B, H, Tq, D]`.
        key: `[B, H, Tk, D]`, the keys of this call. With a decode state these are the *new* keys only (Tk == Tq). Fewer
            heads, of a group each, for a variant that `reads_groups`.
        value: `[B, H, Tk, D]`, likewise.
        token_mask: bool `[B, Tk]`, True for a real token, or None when all are real. A variant need not care what it
            gives at masked queries, as long as it is finite: in a model 0 stands there.
        is_causal: query row r sees keys up to position `Tk - Tq + r` (right-aligned) and everything in the state.
        scaling: factor of the softmax logits, usually `D ** -0.5`.
        hidden_states: input of the attention layer `[B, Tq, hidden_size]`, or None.
        global_mask: bool `[B, Tq]` of the call's global tokens, or None when the call named none.
        softmax_output: softmax attention's output `[B, H, Tq, D]` of a recorded call, for calibration; None elsewhere.
        extra: keys and values of the model's extra tokens `[B, H, 2, G, D]`, for variants that ask for such
            (`num_extra_tokens`); None elsewhere, and in a layer that stands alone.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    token_mask: torch.Tensor | None = None
    is_causal: bool = False
    scaling: float = 1.0
    hidden_states: torch.Tensor | None = None
    global_mask: torch.Tensor | None = None
    softmax_output: torch.Tensor | None = None
    extra: torch.Tensor | None = None


def _also_of_nothing(forward: Forward) -> Forward:
    """`forward` for calls without rows or without queries too, which no method needs to know of.

    They become calls with one more row, or token, of zeros, whose output is dropped: what is returned has the right
    shape, and every parameter a gradient of 0, as the checkpoint's own projections have then.
    """

    @wraps(forward)
    def wrapped(
        self: nn.Module, inputs: AttentionInputs, state: State | None = None
    ) -> tuple[torch.Tensor, State | None]:
        rows, _, queries, _ = inputs.query.shape
        if rows and queries:
            return forward(self, inputs, state)
        if rows:
            return wrapped(self, _with_zeros(inputs, of_tokens=True))[0][:, :, :0], state
        more = None if state is None else {name: _one_more(x, 0) for name, x in state.items()}
        output, after = wrapped(self, _with_zeros(inputs, of_tokens=False), more)
        return output[:0], None if after is None else {name: x[:0].clone() for name, x in after.items()}

    # Of its own: torch.compile compiles a code object a few times at most.
    wrapped.__code__ = wrapped.__code__.replace()  # type: ignore[attr-defined]
    return wrapped


def _with_zeros(inputs: AttentionInputs, *, of_tokens: bool) -> AttentionInputs:
    """The call with one more row, or with one more token, of zeros."""
    found = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    tensors = {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}
    grown: Any = {name: _one_more(x, max(x.ndim - 2, 1) if of_tokens else 0) for name, x in tensors.items()}
    return replace(inputs, **grown)


def _one_more(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros([1 if i == dim else size for i, size in enumerate(x.shape)])], dim)


class AttentionVariant(nn.Module):
    """Base class of the variants: an `nn.Module` that owns every new parameter and buffer of its layer.

    A subclass sets parameters and *persistent* buffers in `reset_parameters` (called on construction, and again
    when a model is materialized from the meta device), computes in `forward`, and overrides the hooks it needs.
    A forward never changes the module: all per-call state is in `inputs` and `state`.

    Attributes:
        spec: what the registry knows of it.
        backend: `"auto"`, `"triton"` or `"torch"`, which its ops are called with (`ops.base.backend`); never saved.
        reads_groups: whether keys and values come as the model has them, `[B, H / groups, Tk, D]`, each for a group of
            heads side by side, and not repeated for every head.
        longest: most tokens that a decode state may follow, if their number has a limit which the state does not tell.
        num_extra_tokens: G, tokens that it asks an encoder to send through the layers in front of the sequence; what it
            reads of them is in `AttentionInputs.extra`. All layers that ask, ask for as many.
    """

    spec: ClassVar[VariantSpec]
    num_extra_tokens: int = 0
    reads_groups: ClassVar[bool] = False
    backend: str = "auto"
    longest: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "reset_parameters" in cls.__dict__:
            cls.reset_parameters = _unless_on_meta(cls.reset_parameters)  # type: ignore[method-assign,assignment]
        if "forward" in cls.__dict__:
            cls.forward = _also_of_nothing(cls.forward)  # type: ignore[method-assign]

    def __init__(self, config: Any, context: LayerContext) -> None:
        super().__init__()
        self.config = config
        self.context = context

    def reset_parameters(self) -> None:
        """Set every parameter and buffer in place to its start; deterministic given options and `layer_idx`."""

    def load_projections(
        self,
        query: tuple[torch.Tensor, torch.Tensor | None],
        key: tuple[torch.Tensor, torch.Tensor | None],
        value: tuple[torch.Tensor, torch.Tensor | None],
    ) -> None:
        """Start from the checkpoint's projections: (weight `[H*D, hidden_size]`, bias `[H*D]`) of q, k and v."""

    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose the data-dependent start from real inputs of this layer (detached, no state)."""

    def chosen(self) -> dict[str, Any]:
        """Options that were left to the method or to calibration, with what they are in this layer; for the report."""
        return {}

    def error_meter(self, rows: Sequence[Row], scaling: float) -> Callable[[], torch.Tensor]:
        """A function that measures this layer as it stands: each head's squared error against softmax on `rows`.

        Args:
            rows: calibration sequences without padding (`ops.starts.calibration.collect_rows`).
            scaling: factor of the logits.

        Returns:
            `() -> [H]`, relative to softmax's squared norm.
        """

        def attend(row: Row) -> torch.Tensor:
            return self(AttentionInputs(*row, is_causal=self.context.is_causal, scaling=scaling))[0]

        return error_meter(attend, rows, is_causal=self.context.is_causal, scaling=scaling)

    def regression_loss(self, inputs: AttentionInputs, target: torch.Tensor) -> torch.Tensor:
        """What the per-layer regression minimizes over this variant's parameters: here the output's relative error.

        Args:
            inputs: real inputs of this layer (detached, no state).
            target: softmax attention's output `[B, H, Tq, D]`.

        Returns:
            a scalar.
        """
        output = self(inputs)[0].to(target.dtype)
        if inputs.token_mask is not None:
            real = inputs.token_mask[:, None, :, None]
            output, target = output.masked_fill(~real, 0), target.masked_fill(~real, 0)
        return (output - target).square().sum() / target.square().sum().clamp(min=1e-12)

    def shared_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that all layers of this variant share (tied to the first such layer's)."""
        return ()

    def global_choice(self, task: str | None) -> GlobalChoice | None:
        """How global tokens are chosen in calls that name none; None leaves it to `forward`, as a call of one layer.

        A model asks once per call, and once for all layers of the same options: the options alone decide.

        Args:
            task: what the model's head is for, in the Hub's words (`seam.heads`); None without a head it tells of.
        """
        return None

    def anneal(self, share: float) -> None:
        """Move the parameters that have a schedule to where they stand when `share` of it (0 to 1) is done.

        Called after every step of training (`training.anneal`); frozen parameters stay as they are.
        """

    def redraw(self, seed: int) -> None:
        """Draw the random directions of the features anew, in place: those of a layer with this `seed` in its options.

        Called between steps of training (`convert.redraw_features`) where the options say `draws_features`. All that
        was calibrated or trained stays, so it must not be an answer to one draw.
        """

    def zero_weights(self, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor] | None:
        """How sparse the weights are of a method that learns which are 0, for the conversion report.

        Args:
            inputs: real inputs of this layer (detached, no state).

        Returns:
            how many weights between real tokens are exactly 0, and how many there are, `[H]` each; None for a method
            whose pattern decides instead, or whose weights are never 0.
        """
        return None

    def drop_linear_branch(self) -> bool:
        """Leave out, until the module is built anew, what stands beside a window for the keys outside of it.

        A control: a branch without which a model is as good does nothing. Weights are kept, and saved as they were.

        Returns:
            whether there is such a branch under these options; False leaves the layer as it is.
        """
        return False

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        """The decode state before any token. Variants whose spec says `state="none"` need none."""
        raise TypeError(f"{type(self).__name__} keeps no decode state")

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        """Attend.

        Args:
            inputs: the call.
            state: what earlier calls left behind, or None when no cache is in use.

        Returns:
            output `[B, H, Tq, D]` in the query's dtype, and the new state (None if none was given). Rows that may
            see no key are 0; rows of padding tokens are finite.
        """
        raise TypeError(f"{type(self).__name__} does not implement forward")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())


class FeatureMapVariant(AttentionVariant):
    """Linear attention, phi(q) . phi(k) in place of exp(scaling q . k), with the feature maps of a subclass.

    Attributes:
        num_features: F of the maps; a subclass sets it.
    """

    num_features: int

    def feature_maps(self, scaling: float) -> tuple[FeatureMap, FeatureMap]:
        """phi of queries and phi of keys, for the factor of the softmax logits."""
        raise TypeError(f"{type(self).__name__} does not implement feature_maps")

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        heads, dim = self.context.num_heads, self.context.head_dim
        return init_linear_state(batch_size, heads, self.num_features, dim, dtype, device)

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        output, state = feature_map_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            *self.feature_maps(inputs.scaling),
            token_mask=inputs.token_mask,
            is_causal=inputs.is_causal,
            state=state,
            backend=self.backend,
        )
        return output.to(inputs.query.dtype), state


def _unless_on_meta(reset: Callable[[Any], None]) -> Callable[[Any], None]:
    """`reset_parameters` that draws nothing for a module without data, which a checkpoint may not even fit."""

    @wraps(reset)
    def wrapped(self: AttentionVariant) -> None:
        tensors = [*self.parameters(), *self.buffers()]
        if not tensors or not all(tensor.is_meta for tensor in tensors):
            reset(self)

    return wrapped


def materialize(variants: Sequence[tuple[AttentionVariant, torch.Tensor]]) -> None:
    """Give variants that were made on the meta device their data, on the device and in the dtype of a weight each.

    That way sizes are known before anything is allocated. Beside a weight on the meta device a variant stays there.

    Raises:
        ValueError: if they need more memory than the device has. Nothing is allocated then.
    """
    needed: dict[torch.device, int] = {}
    for variant, like in variants:
        tensors = [*variant.parameters(), *variant.buffers()]
        needed[like.device] = needed.get(like.device, 0) + sum(x.numel() * x.element_size() for x in tensors)
    for device, size in needed.items():
        memory = device_memory(device)
        if size > memory:
            raise ValueError(
                f"The variants need {size:,} bytes with these options; {device} has {memory:,}. Options that tensors "
                "are made for (features, slots, ranks, max_length) must be smaller."
            )
    for variant, like in variants:
        if not like.is_meta:
            variant.to_empty(device=like.device)
            variant.reset_parameters()
        variant.to(like.dtype)


def device_memory(device: torch.device) -> float:
    """Bytes that can be allocated on `device` at most, infinite where that is not known or nothing is allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf
