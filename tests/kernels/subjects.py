"""Variants that kernels may run, for the tests of the way to the kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest

from hf_linear_attn import get_variant, list_variants
from hf_linear_attn.testing.contract import Subject

__all__ = ["cases", "forgets_both_ways", "label", "subjects"]


@functools.cache
def subjects() -> tuple[Subject, ...]:
    """Every variant, each side, with each of its test options and as it is."""
    found = [
        Subject(spec, is_causal, options)
        for spec in (get_variant(key) for key in list_variants())
        for is_causal in (False, True)
        for options in (*spec.test_options, {})
    ]
    return tuple(subject for subject in found if subject.served and _builds(subject))


def _builds(subject: Subject) -> bool:
    """Whether this side takes the options."""
    try:
        subject.build()
    except ValueError:
        return False
    return True


def forgets_both_ways(subject: Subject) -> bool:
    """Whether it is a gate on an encoder, which no kernel runs and `backend="triton"` refuses (`ONE_DIRECTION`)."""
    return not subject.is_causal and bool(subject.options.get("gate"))


def label(subject: Subject) -> str:
    side, options = "decoder" if subject.is_causal else "encoder", "options" if subject.options else "defaults"
    return f"{subject.spec.key}-{side}-{options}"


def cases(found: Iterable[Subject]) -> list[Any]:
    """Parameters of tests: `make test` runs the first options of each side, as short inputs tell little of the rest."""
    first: dict[tuple[str, bool], Subject] = {}
    return [
        pytest.param(
            s, marks=() if first.setdefault((s.spec.key, s.is_causal), s) is s else pytest.mark.slow, id=label(s)
        )
        for s in found
    ]
