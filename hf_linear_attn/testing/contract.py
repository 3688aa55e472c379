"""What is tested, what a law is, and the function that runs them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_linear_attn.registry import VariantSpec, get_variant
from hf_linear_attn.testing.tools import draw, padding_masks, projections
from hf_linear_attn.variants.base import AttentionVariant, LayerContext

__all__ = ["LAWS", "Law", "Subject", "applicable_laws", "check_variant", "law"]


# `VariantSpec.test_options` may hold lists with one entry per head or per layer of this small model.
HEADS, LAYERS = 4, 2


@dataclass(frozen=True)
class Subject:
    """What is put to the test: a variant with options, on one side.

    Attributes:
        spec: the variant; need not be registered.
        is_causal: decoder (True) or encoder (False).
        options: options that differ from the defaults.
    """

    spec: VariantSpec
    is_causal: bool
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def served(self) -> bool:
        """Whether the variant serves this side at all."""
        return self.spec.decoder if self.is_causal else self.spec.encoder

    @property
    def decodes(self) -> bool:
        """Whether there is a decode state on this side."""
        return self.served and self.is_causal and self.spec.state != "none"

    @property
    def global_choices(self) -> tuple[bool, ...]:
        """Whether calls are made without, or also with, a mask of global tokens.

        A variant may refuse the mask on one side or with some options, by a `ValueError` that names it.
        """
        if not self.spec.uses_global_mask:
            return (False,)
        try:
            module = self.build()
            module(draw(module.context, 7, with_global=True))
        except ValueError as error:
            if "global_mask" in str(error) or "global_attention_mask" in str(error):
                return (False,)
            raise
        return (False, True)

    def context(self, head_dim: int = 16, max_length: int = 160) -> LayerContext:
        """A layer of a small two-layer model."""
        return LayerContext(1, LAYERS, HEADS * head_dim, HEADS, head_dim, max_length, self.is_causal)

    def build(
        self,
        context: LayerContext | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        trained: bool = False,
        options: dict[str, Any] | None = None,
    ) -> AttentionVariant:
        """A module in eval mode with a checkpoint's projections loaded.

        Args:
            context: the place it is built for; `self.context()` by default.
            dtype: of its parameters.
            trained: calibrate, and move parameters off their start, so that a branch that starts at 0 counts.
            options: instead of the subject's own.
        """
        context = context or self.context()
        config_class: Any = self.spec.config_class
        config = config_class.from_dict(self.options if options is None else options)
        module = self.spec.module_class(config, context).to(dtype).eval()
        module.load_projections(*projections(context, dtype))
        if trained:
            call = draw(context, 48, padding=padding_masks(2, 48)["right"], seed=11, dtype=dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # how good the start is on noise is not the question
                module.calibrate([call])
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in module.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(0.05 * noise.to(dtype))
        return module


@dataclass(frozen=True)
class Law:
    """One promise of the contract; a call raises `AssertionError` beginning with `name` when it is broken."""

    name: str
    check: Callable[[Subject], None]
    applies: Callable[[Subject], bool]

    def __call__(self, subject: Subject) -> None:
        try:
            self.check(subject)
        except Exception as error:  # whatever the variant under test raises is a finding about it
            raise AssertionError(f"{self.name}: {type(error).__name__}: {error}") from error


LAWS: dict[str, Law] = {}


def law(
    applies: Callable[[Subject], bool] = lambda subject: subject.served,
) -> Callable[[Callable[[Subject], None]], Law]:
    def decorate(check: Callable[[Subject], None]) -> Law:
        law = LAWS[check.__name__] = Law(check.__name__, check, applies)
        return law

    return decorate


def applicable_laws(subject: Subject) -> list[Law]:
    """The laws that the subject's spec, side and options put it under."""
    return [law for law in LAWS.values() if law.applies(subject)]


def check_variant(
    variant: str | VariantSpec,
    is_causal: bool,
    *,
    laws: Iterable[str] | None = None,
    **options: Any,
) -> list[str]:
    """Run the contract on one variant.

    Args:
        variant: registry key, or the spec of an unregistered variant.
        is_causal: side to test, decoder or encoder.
        laws: names of the laws to run; all that apply by default.
        **options: options of the variant.

    Returns:
        one message per broken law, each beginning with the law's name; empty when the contract holds.

    Raises:
        ValueError: for an unknown variant or law.
    """
    subject = Subject(get_variant(variant) if isinstance(variant, str) else variant, is_causal, options)
    unknown = sorted(set(laws or ()) - set(LAWS))
    if unknown:
        raise ValueError(f"Unknown law(s) {', '.join(unknown)}. Allowed: {', '.join(LAWS)}.")
    violations = []
    for law in applicable_laws(subject):
        if laws is None or law.name in set(laws):
            try:
                law(subject)
            except AssertionError as violation:
                violations.append(str(violation))
    return violations
