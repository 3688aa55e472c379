"""The part of a model's config that says which layer runs which attention variant."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_linear_attn.registry import get_variant

__all__ = ["FORMAT_VERSION", "LayerConfig", "LinearAttentionConfig", "PositionsConfig"]

FORMAT_VERSION = 1


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
    options: dict[str, Any] = field(default_factory=dict)
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
    """

    original_max_length: int
    mode: str


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
    def from_dict(cls, data: dict[str, Any]) -> LinearAttentionConfig:
        """Read the JSON form back.

        Raises:
            ValueError: for a newer format, an unknown key, variant or option.
        """
        unknown = sorted(set(data) - {"version", "layers", "positions"})
        if unknown:
            raise ValueError(
                f"Unknown key(s) {unknown} in the linear_attn config. Allowed: version, layers, positions."
            )
        version = data.get("version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"The linear_attn config has format version {version!r}; this hf_linear_attn reads 1 to "
                f"{FORMAT_VERSION}. Upgrade hf-linear-attn."
            )
        layers = tuple(None if layer is None else LayerConfig(**layer) for layer in data["layers"])
        positions = data.get("positions")
        return cls(
            layers=layers,
            positions=None if positions is None else PositionsConfig(**positions),
            version=version,
        )

    def variants(self) -> list[str]:
        """Keys of the variants in use, without repetition, in layer order."""
        return list(dict.fromkeys(layer.variant for layer in self.layers if layer is not None))
