"""What an attention variant receives, returns and must provide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn

from hf_linear_attn.ops.calibration import Row, error_meter
from hf_linear_attn.registry import VariantSpec

__all__ = ["AttentionInputs", "AttentionVariant", "LayerContext", "State", "VariantConfig"]

# A decode state: named tensors whose first dimension is the batch, so that a cache can reorder, repeat and
# offload them without knowing the method.
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class VariantConfig:
    """Base of every variant's options. Subclasses are frozen dataclasses whose values survive JSON."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise `ValueError` naming the option, what was given and what is allowed."""

    def require_integer(self, *names: str, at_least: int = 1, optional: bool = False) -> None:
        """Raise `ValueError` unless each of these options is an integer of at least that, or None if `optional`."""
        for name in names:
            value = getattr(self, name)
            if optional and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
                also = ", or None" if optional else ""
                raise ValueError(f"{name}={value!r}; allowed: an integer of at least {at_least}{also}.")

    def require_bool(self, *names: str) -> None:
        """Raise `ValueError` unless each of these options is True or False."""
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: True or False.")

    def require_choice(self, name: str, allowed: Iterable[Any]) -> None:
        """Raise `ValueError` unless this option is one of `allowed`."""
        allowed = list(allowed)
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(map(str, allowed))}.")

    def to_dict(self) -> dict[str, Any]:
        """Options as JSON types (tuples become lists)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> VariantConfig:
        """Build from keyword options.

        Raises:
            ValueError: for an unknown option (with the list of allowed ones) or a bad value.
        """
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(allowed))
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
        key: `[B, H, Tk, D]`, the keys of this call. With a decode state these are the *new* keys only (Tk == Tq).
        value: `[B, H, Tk, D]`.
        key_padding: bool `[B, Tk]`, True for a real token, or None when all are real. A variant need not care what it
            gives at masked queries, as long as it is finite: in a model 0 stands there.
        is_causal: query row r sees keys up to position `Tk - Tq + r` (right-aligned) and everything in the state.
        scaling: factor of the softmax logits, usually `D ** -0.5`.
        hidden_states: input of the attention layer `[B, Tq, hidden_size]`, or None.
        global_mask: bool `[B, Tq]` of the call's global tokens, or None when the call named none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_padding: torch.Tensor | None = None
    is_causal: bool = False
    scaling: float = 1.0
    hidden_states: torch.Tensor | None = None
    global_mask: torch.Tensor | None = None


class AttentionVariant(nn.Module):
    """Base class of the variants: an `nn.Module` that owns every new parameter and buffer of its layer.

    A subclass sets parameters and *persistent* buffers in `reset_parameters` (called on construction, and again
    when a model is materialised from the meta device), computes in `forward`, and overrides the hooks it needs.
    A forward never changes the module: all per-call state is in `inputs` and `state`.

    Attributes:
        spec: what the registry knows of it.
        backend: `"auto"`, `"triton"` or `"torch"`, which its ops are called with (`ops.backend`); never saved.
    """

    spec: ClassVar[VariantSpec]
    backend: str = "auto"

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

    def error_meter(self, rows: Sequence[Row], scaling: float) -> Callable[[], torch.Tensor]:
        """A function that measures this layer as it stands: each head's squared error against softmax on `rows`.

        Args:
            rows: calibration sequences without padding (`ops.calibration.collect_rows`).
            scaling: factor of the logits.

        Returns:
            `() -> [H]`, relative to softmax's squared norm.
        """

        def attend(row: Row) -> torch.Tensor:
            return self(AttentionInputs(*row, is_causal=self.context.is_causal, scaling=scaling))[0]

        return error_meter(attend, rows, is_causal=self.context.is_causal, scaling=scaling)

    def regression_loss(self, inputs: AttentionInputs, target: torch.Tensor) -> torch.Tensor:
        """What the per-layer regression minimises over this variant's parameters: here the output's relative error.

        Args:
            inputs: real inputs of this layer (detached, no state).
            target: softmax attention's output `[B, H, Tq, D]`.

        Returns:
            a scalar.
        """
        output = self(inputs)[0].to(target.dtype)
        if inputs.key_padding is not None:
            real = inputs.key_padding[:, None, :, None]
            output, target = output.masked_fill(~real, 0), target.masked_fill(~real, 0)
        return (output - target).square().sum() / target.square().sum().clamp(min=1e-12)

    def shared_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that all layers of this variant share (tied to the first such layer's)."""
        return ()

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
