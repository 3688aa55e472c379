"""Variants with options, as recipes and callers name them, and what keeps one of them from being measured."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_linear_attn.convert import convert_model
from hf_linear_attn.registry import VariantSpec, get_variant, list_variants

__all__ = [
    "Method",
    "RefusedError",
    "converted_copy",
    "failures",
    "not_measured",
    "out_of_memory",
    "parse_methods",
    "sharing_copy",
    "spell_options",
]


@dataclass(frozen=True)
class Method:
    """A variant with options.

    Attributes:
        key: of the variant.
        options: that differ from its defaults.
        keep_softmax: layers left on softmax, those whose conversion costs most; None where all are converted.

    Raises:
        ValueError: for an unknown variant or option, or a number of layers below 1.
    """

    key: str
    options: dict[str, Any] = field(default_factory=dict)
    keep_softmax: int | None = None

    def __post_init__(self) -> None:
        self.config()
        if self.keep_softmax is not None and (type(self.keep_softmax) is not int or self.keep_softmax < 1):
            raise ValueError(f"keep_softmax={self.keep_softmax!r} beside {self.key}; allowed: layers, at least 1.")

    def config(self) -> Any:
        """All options of the variant."""
        return self.spec.config_class.from_dict(dict(self.options))  # type: ignore[attr-defined]

    @property
    def name(self) -> str:
        """Key and options in one line."""
        hybrid = {} if self.keep_softmax is None else {"keep_softmax": self.keep_softmax}
        return f"{self.key} {spell_options({**self.options, **hybrid})}".strip()

    @property
    def spec(self) -> VariantSpec:
        """What the registry says of the variant."""
        return get_variant(self.key)

    def serves(self, is_causal: bool) -> bool:
        """Whether it can run on a decoder (causal) or an encoder."""
        return self.spec.decoder if is_causal else self.spec.encoder

    def quadratic(self) -> bool:
        """Whether these options do not claim a cost that grows in proportion to the length."""
        return not self.spec.claims_linear_cost(self.options)

    def seeded(self, seed: int) -> dict[str, Any]:
        """The options, with the run's seed for a method that has one."""
        names = [entry.name for entry in fields(self.spec.config_class)]
        return {"seed": seed, **self.options} if "seed" in names else self.options


def spell_options(options: Mapping[str, Any]) -> str:
    """Options as part of a name: `window_size=64`."""
    return ",".join(f"{name}={value}" for name, value in options.items())


def parse_methods(
    entries: Iterable[Any], *, rest: bool = False, only: Collection[str] | None = None, hybrids: bool = False
) -> list[Method]:
    """Variants as a recipe or a caller writes them: `"linear"`, `("linear", {...})` or `{"linear": {...}}`.

    Args:
        entries: the variants.
        rest: add every registered variant that is not named, with its defaults.
        only: keys of those to keep; all by default.
        hybrids: whether `{"linear": {...}, "keep_softmax": 8}` is understood: all but 8 layers are converted.

    Raises:
        ValueError: for another form, an unknown variant or option, a variant that is named twice, or a hybrid where
            none is understood.
    """
    methods = [_parse(entry, hybrids) for entry in entries]
    if rest:
        named = {method.key for method in methods}
        methods += [Method(key) for key in list_variants() if key not in named]
    names = [method.name for method in methods]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Variants that are named twice: {', '.join(repeated)}.")
    for key in only or ():
        get_variant(key)
    return [method for method in methods if only is None or method.key in only]


def _parse(entry: Any, hybrids: bool) -> Method:
    if isinstance(entry, str):
        return Method(entry)
    found, keep_softmax = entry, None
    if isinstance(entry, Mapping):
        rest = dict(entry)
        keep_softmax = rest.pop("keep_softmax", None)
        found = next(iter(rest.items())) if len(rest) == 1 else None
    if keep_softmax is not None and not hybrids:
        raise ValueError(f"{entry!r}: keep_softmax beside a variant is of comparisons of language models.")
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return Method(found[0], dict(found[1] or {}), keep_softmax)
    raise ValueError(f"A variant is 'key', {{key: options}} or (key, options); got {entry!r}.")


def sharing_copy(model: PreTrainedModel) -> Any:
    """A copy that shares the parameters and buffers of `model`."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def converted_copy(model: PreTrainedModel, method: Method) -> PreTrainedModel:
    """A converted model that shares the weights of `model`; `RefusedError` if the conversion is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return convert_model(sharing_copy(model), method.key, **method.options)
        except ValueError as error:
            raise RefusedError(str(error)) from error


class RefusedError(ValueError):
    """A contender that does not serve what is asked of it."""


@contextmanager
def failures(row: dict[str, Any]) -> Iterator[None]:
    """A contender that cannot run is a row that says so: the others go on."""
    try:
        yield
    except RefusedError as error:
        row["refused"] = str(error)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        row["failure"] = "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {first}"


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # the CPU's wording


def not_measured(row: Mapping[str, Any]) -> str | None:
    """Why a row was not measured, `failed: reason` or the like; None if it was, or says nothing."""
    for kind in ("failure", "refused", "missing", "left_out"):
        if kind in row:
            return f"{'failed' if kind == 'failure' else kind.replace('_', ' ')}: {row[kind]}"
    return None
