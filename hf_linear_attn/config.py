"""The part of a model's config that says which layer runs which attention variant."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from hf_linear_attn.ops.features.named import refuse_unregistered
from hf_linear_attn.registry import get_variant

__all__ = ["EXTENSION_MODES", "FORMAT_VERSION", "LayerConfig", "LinearAttentionConfig", "PositionsConfig"]

FORMAT_VERSION = 1
EXTENSION_MODES = ("tile", "interpolate", "rotary")


@dataclass(frozen=True)
class LayerConfig:
    """One converted layer: the variant's key and all of its options (defaults written out).

    Attributes:
        variant: key of the variant.
        options: its options.
        built_for: (place, number of layers) for which the variant was built, if the layer stands elsewhere now: options
            with one value per layer and starts drawn per layer go by it. None for its own place.

    Raises:
        ValueError: for an unknown variant, an unknown option or a bad value.
    """

    variant: str
    options: Mapping[str, Any] = field(default_factory=dict)
    built_for: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.built_for is not None:
            object.__setattr__(self, "built_for", _place(self.built_for))
        full = get_variant(self.variant).config_class.from_dict(self.options)  # type: ignore[attr-defined]
        object.__setattr__(self, "options", full.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        place = {} if self.built_for is None else {"built_for": list(self.built_for)}
        return {"variant": self.variant, "options": self.options, **place}

    def variant_config(self) -> Any:
        """The variant's own frozen options object."""
        return get_variant(self.variant).config_class.from_dict(self.options)  # type: ignore[attr-defined]


def _place(value: Any) -> tuple[int, int]:
    """A place and a number of layers, from JSON."""
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or any(type(number) is not int for number in pair) or not 0 <= pair[0] < pair[1]:
        raise ValueError(f"built_for={value!r}; allowed: [place, number of layers] with 0 <= place < number of layers.")
    return pair


@dataclass(frozen=True)
class PositionsConfig:
    """How the limit on positions was extended.

    Attributes:
        original_max_length: longest sequence (tokens) the checkpoint itself could read.
        mode: `"tile"` (the table repeated), `"interpolate"` (stretched linearly) or `"rotary"` (there is no table).

    Raises:
        ValueError: for another value.
    """

    original_max_length: int
    mode: str

    def __post_init__(self) -> None:
        length = self.original_max_length
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"original_max_length={_shown(length)}; allowed: an integer of at least 1.")
        if self.mode not in EXTENSION_MODES:
            raise ValueError(f"mode={_shown(self.mode)}; allowed: {', '.join(EXTENSION_MODES)}.")


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Which variant each layer runs; stored in `config.json` under `linear_attn`.

    Attributes:
        layers: one entry per layer of the model, None where the layer keeps softmax attention.
        positions: how the position table was extended, or None.
        version: format version; a newer one than this package knows is refused.
    """

    layers: tuple[LayerConfig | None, ...]
    positions: PositionsConfig | None = None
    version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "version": self.version,
            "layers": [None if layer is None else layer.to_dict() for layer in self.layers],
            "positions": None if self.positions is None else asdict(self.positions),
        }

    @classmethod
    def from_dict(cls, data: Any) -> LinearAttentionConfig:
        """Read the JSON form back.

        Raises:
            ValueError: for a newer format, a missing or unknown key, an unknown variant or option, or a bad value; the
                sentence names the key, the value and what is allowed.
        """
        _check_keys("linear_attn", data, required=("version", "layers"), optional=("positions",))
        version = data["version"]
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            raise ValueError(
                f"linear_attn.version={_shown(version)}; allowed: format versions 1 to {FORMAT_VERSION}."
                + (" Upgrade hf-linear-attn." if newer else "")
            )
        if not isinstance(data["layers"], list | tuple):
            raise ValueError(
                f"linear_attn.layers={_shown(data['layers'])}; allowed: a list with one entry per layer of the model."
            )
        positions = data.get("positions")
        return cls(
            layers=tuple(
                None if layer is None else _read(LayerConfig, f"linear_attn.layers[{i}]", layer)
                for i, layer in enumerate(data["layers"])
            ),
            positions=None if positions is None else _read(PositionsConfig, "linear_attn.positions", positions),
            version=version,
        )

    def check_savable(self) -> None:
        """Raise `ValueError` for a layer with an option that means something in this process alone."""
        for i, layer in enumerate(self.layers):
            for value in () if layer is None else layer.options.values():
                try:
                    refuse_unregistered(value)
                except ValueError as error:
                    raise ValueError(f"linear_attn.layers[{i}]: {error}") from error

    def variants(self) -> list[str]:
        """Keys of the variants in use, without repetition, in layer order."""
        return list(dict.fromkeys(layer.variant for layer in self.layers if layer is not None))


def _read(cls: Any, place: str, data: Any) -> Any:
    """One of the dataclasses above from its JSON form; `place` is where that stands."""
    with_default = [f.name for f in fields(cls) if (f.default, f.default_factory) != (MISSING, MISSING)]
    _check_keys(place, data, [f.name for f in fields(cls) if f.name not in with_default], with_default)
    try:
        return cls(**data)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _check_keys(place: str, data: Any, required: Sequence[str], optional: Sequence[str]) -> None:
    allowed = ", ".join([*required, *optional])
    if not isinstance(data, Mapping):
        raise ValueError(f"{place}={_shown(data)}; allowed: a mapping with the keys {allowed}.")
    unknown = [key for key in data if key not in required and key not in optional]
    if unknown:
        raise ValueError(f"Unknown key(s) {_shown(unknown)} in {place}. Allowed: {allowed}.")
    missing = [key for key in required if key not in data]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}. Its keys: {allowed}.")


def _shown(value: Any) -> str:
    """What was given, cut short: a damaged file may hold anything there."""
    return reprlib.repr(value)
