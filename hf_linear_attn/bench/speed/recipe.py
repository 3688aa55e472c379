"""What a `hf-linear-attn bench` run measures: its recipe. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_linear_attn.measure.methods import Method, parse_methods

__all__ = [
    "DTYPES",
    "MODES",
    "SDPA",
    "SOFTMAX",
    "BenchRecipe",
    "DecodeBench",
    "LayerBench",
    "LongBench",
    "ModelBench",
    "PeerBench",
    "bench_methods",
]

MODES = ("forward", "training")
SDPA = "sdpa"
SOFTMAX = (SDPA, "eager", "flex_attention")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")


_POSITIVE = (
    "lengths", "contexts", "hidden_size", "num_heads", "layers", "batch_size", "tokens", "softmax_seconds",
)  # fmt: skip


def _check(where: str, name: str, given: Any, allowed: Iterable[str] | None = None) -> None:
    """Raise `ValueError` for an empty list, or a value that is not allowed (by default: a positive integer)."""
    values = given if isinstance(given, list) else [given]
    if not values:
        raise ValueError(f"{where}: {name} is empty.")
    for value in values:
        positive = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not (positive if allowed is None else value in allowed):
            wanted = "positive integers" if allowed is None else ", ".join(allowed)
            raise ValueError(f"{where}: {name} has {value!r}; allowed: {wanted}.")


def _check_part(kind: str, part: Any) -> None:
    """Raise `ValueError` for what no part of a recipe may have."""
    where, given = f"{kind} {part.name!r}", vars(part)
    for name in _POSITIVE:
        if name in given:
            _check(where, name, given[name])
    for name, allowed in (("modes", MODES), ("softmax", SOFTMAX)):
        if name in given:
            _check(where, name, given[name], allowed)
    if SDPA not in given.get("softmax", [SDPA]):
        raise ValueError(f"{where}: softmax={part.softmax} lacks {SDPA!r}, which every ratio refers to.")
    if "checkpoint" in given and part.checkpoint is None and "model_type" not in part.config:
        raise ValueError(f"{where} needs `checkpoint`, or a `config` with a model_type; got {part.config}.")


@dataclass(frozen=True)
class ModelBench:
    """Whole models of one shape with random weights, softmax and variants taking turns.

    Attributes:
        name: of this part of the results.
        lengths: tokens of a sequence.
        checkpoint: bundled name, folder or Hub id whose config decides the shape (no weights are read).
        config: keys that are changed in it; with `model_type` and without `checkpoint`, the whole config.
        layers: layers kept.
        batch_size: sequences of a batch.
        modes: of `forward` and `training` (forward and backward, without an optimizer).
        softmax: implementations of softmax attention to measure beside the variants.
        variants: as in `BenchRecipe`; null for the recipe's.
    """

    name: str
    lengths: list[int]
    checkpoint: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    batch_size: int = 1
    modes: list[str] = field(default_factory=lambda: list(MODES))
    softmax: list[str] = field(default_factory=lambda: list(SOFTMAX))
    variants: list[Any] | None = None

    def __post_init__(self) -> None:
        _check_part("models", self)


@dataclass(frozen=True)
class LayerBench:
    """Single attention layers: projections of queries, keys, values and output, and the attention between them.

    Attributes:
        name: of this part of the results.
        lengths: tokens of a sequence.
        hidden_size: width of the hidden states.
        num_heads: heads.
        is_causal: decoder or encoder.
        batch_size: sequences of a batch.
        modes: as in `ModelBench`.
        softmax: as in `ModelBench`.
        variants: as in `BenchRecipe`; null for the recipe's.
        projections: false leaves the projections out, so that the attention alone is timed.
    """

    name: str
    lengths: list[int]
    hidden_size: int
    num_heads: int
    is_causal: bool = False
    batch_size: int = 1
    modes: list[str] = field(default_factory=lambda: list(MODES))
    softmax: list[str] = field(default_factory=lambda: list(SOFTMAX))
    variants: list[Any] | None = None
    projections: bool = True

    def __post_init__(self) -> None:
        _check_part("layers", self)


@dataclass(frozen=True)
class PeerBench:
    """Other people's layers of the same methods, each beside ours of the same shape and options.

    Attributes:
        name: of this part of the results.
        lengths: tokens of a sequence.
        hidden_size: width of the hidden states.
        num_heads: heads.
        batch_size: sequences of a batch.
        modes: as in `ModelBench`.
        only: names of peers (see `hf_linear_attn.bench.peers.registry`); null for all.
        projections: as in `LayerBench`; a peer whose attention cannot be taken out of its layer is then refused.
    """

    name: str
    lengths: list[int]
    hidden_size: int
    num_heads: int
    batch_size: int = 1
    modes: list[str] = field(default_factory=lambda: list(MODES))
    only: list[str] | None = None
    projections: bool = True

    def __post_init__(self) -> None:
        _check_part("peers", self)


@dataclass(frozen=True)
class DecodeBench:
    """Generation token by token after contexts of several lengths, all of them taking turns.

    Attributes:
        name: of this part of the results.
        contexts: tokens that were read before.
        checkpoint: as in `ModelBench`; a decoder.
        config: as in `ModelBench`.
        layers: layers kept.
        tokens: tokens that are timed, one at a time, each after one that is not.
        batch_size: sequences that are generated at a time.
        variants: as in `BenchRecipe`; null for the recipe's.
    """

    name: str
    contexts: list[int]
    checkpoint: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    tokens: int = 32
    batch_size: int = 1
    variants: list[Any] | None = None

    def __post_init__(self) -> None:
        _check_part("decode", self)


@dataclass(frozen=True)
class LongBench:
    """Whole models on inputs that take minutes: each reads them once, alone, its time and its memory together.

    Attributes:
        name: of this part of the results.
        lengths: tokens of the sequence, ascending.
        checkpoint: as in `ModelBench`; of a decoder it is also measured what its cache holds in the end.
        config: as in `ModelBench`.
        layers: layers kept.
        softmax_seconds: leave SDPA out where, by its time at a shorter length and n^2, it would take longer.
        variants: as in `BenchRecipe`; null for the recipe's.
    """

    name: str
    lengths: list[int]
    checkpoint: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    softmax_seconds: int = 600
    variants: list[Any] | None = None

    def __post_init__(self) -> None:
        _check_part("long", self)
        if self.lengths != sorted(self.lengths):
            raise ValueError(f"long {self.name!r}: lengths={self.lengths}; allowed: ascending.")


@dataclass(frozen=True)
class BenchRecipe:
    """A whole run.

    Attributes:
        title: of tables and picture.
        device: `cpu` or `cuda`.
        dtype: `float32`, `bfloat16` or `float16`.
        threads: of PyTorch on the CPU; null for its own choice.
        repeats: timed rounds of each group of contenders; medians count.
        seconds: start no further round of a group after so many seconds (3 rounds are always run).
        minutes: start no further group after so many minutes; what is then missing is measured by the next run. Null
            for no limit.
        softmax_up_to: longest sequence (tokens) for softmax attention.
        quadratic_up_to: longest sequence for variants whose options do not claim linear cost.
        variants: keys, or one-key mappings to options; a registered variant that is not named runs with its defaults.
        models: see `ModelBench`.
        layers: see `LayerBench`.
        peers: see `PeerBench`.
        decode: see `DecodeBench`.
        long: see `LongBench`.
    """

    title: str
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    repeats: int = 5
    seconds: float = 20.0
    minutes: float | None = None
    softmax_up_to: int = 8192
    quadratic_up_to: int = 4096
    variants: list[Any] = field(default_factory=list)
    models: list[ModelBench] = field(default_factory=list)
    layers: list[LayerBench] = field(default_factory=list)
    peers: list[PeerBench] = field(default_factory=list)
    decode: list[DecodeBench] = field(default_factory=list)
    long: list[LongBench] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check("recipe", "device", self.device, DEVICES)
        _check("recipe", "dtype", self.dtype, DTYPES)
        _check("recipe", "repeats", self.repeats)
        if self.threads is not None:
            _check("recipe", "threads", self.threads)
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"recipe: minutes must be positive or null, got {self.minutes!r}.")
        names = [part.name for part in self.parts()]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"recipe: parts with the same name: {', '.join(repeated)}.")
        if not names:
            raise ValueError("recipe: nothing to measure; name models, layers, peers, decode or long.")
        for part in self.parts():
            bench_methods(self, part)

    def parts(self) -> list[Any]:
        """Everything to measure, in order."""
        return [*self.models, *self.layers, *self.peers, *self.decode, *self.long]

    @classmethod
    def from_yaml(cls, path: str | Path) -> BenchRecipe:
        """Read a recipe file.

        Raises:
            ValueError: for an unknown key, a missing one or a bad value.
        """
        from hf_linear_attn.measure.strict import build_strictly, read_yaml

        return build_strictly(cls, read_yaml(path), "recipe")

    def setting(self) -> dict[str, Any]:
        """What must not change between the rows of one file; lengths and variants may grow."""
        free = ("lengths", "contexts", "variants", "only", "modes", "softmax", "softmax_seconds")
        parts = {part.name: {k: v for k, v in asdict(part).items() if k not in free} for part in self.parts()}
        return {"dtype": self.dtype, "repeats": self.repeats, "parts": parts}


def bench_methods(recipe: BenchRecipe, part: Any, only: list[str] | None = None) -> list[Method]:
    """The variants of a part: its own list as it stands, or the recipe's and every other one with its defaults.

    Raises:
        ValueError: as `parse_methods`.
    """
    own = getattr(part, "variants", None)
    return parse_methods(recipe.variants if own is None else own, rest=own is None, only=only)
