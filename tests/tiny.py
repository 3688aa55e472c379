"""Tiny models of every registered family, with every head that Transformers' Auto classes know for it."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping

from hf_linear_attn import get_variant, list_patchers, list_variants
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.cache import cache_keyword
from hf_linear_attn.seam.tiny import PAD as PAD
from hf_linear_attn.seam.tiny import VOCAB as VOCAB
from hf_linear_attn.seam.tiny import build as build
from hf_linear_attn.seam.tiny import has_causal_lm, tiny_model
from hf_linear_attn.seam.tiny import tiny_config as tiny_config
from hf_linear_attn.seam.tiny import token_batch as token_batch
from hf_linear_attn.variants.base import LayerContext

FAMILIES = list_patchers()


def without_dropout(model_type: str) -> dict[str, float]:
    """Overrides of `tiny_config` that switch off every dropout the family has."""
    names = [field.name for field in dataclasses.fields(get_patcher(model_type).config_class)]
    return dict.fromkeys((name for name in names if "drop" in name), 0.0)


def head_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """Every upstream class that an Auto class knows for the family."""
    config_class = get_patcher(model_type).config_class
    found: dict[str, type[PreTrainedModel]] = {}
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and isinstance(mapping, _LazyAutoMapping) and config_class in mapping:
            entry = mapping[config_class]
            for cls in entry if isinstance(entry, (list, tuple)) else (entry,):
                if cls.__module__ == get_patcher(model_type).modeling_module:  # not a model with this one inside
                    found[cls.__name__] = cls
    return [found[name] for name in sorted(found)]


def base_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    """The family's base model."""
    return tiny_model(model_type, decoder=False, **overrides)


def causal_lm(model_type: str = "gpt2", **overrides: Any) -> PreTrainedModel:
    """The family's causal language model."""
    return tiny_model(model_type, decoder=True, **overrides)


def causal_families() -> list[str]:
    """Families that have a causal language model."""
    return [family for family in FAMILIES if has_causal_lm(family)]


def is_causal(model_type: str) -> bool:
    """Whether the family's default model is a decoder."""
    return get_patcher(model_type).is_causal(tiny_config(model_type))


def variants_of_side(causal: bool) -> list[str]:
    """Variants that serve decoders, or encoders."""
    return list_variants(decoder=True) if causal else list_variants(encoder=True)


def variants_for(model_type: str) -> list[str]:
    """Variants that serve the family's default side."""
    return variants_of_side(is_causal(model_type))


@cache
def _accepts(variant: str, number: int, causal: bool, rotary: bool) -> bool:
    """Whether a layer of tiny models can be built with an option set (some are for one side only)."""
    spec = get_variant(variant)
    try:
        options = spec.config_class.from_dict(spec.test_options[number])
        spec.module_class(options, LayerContext(0, 2, 32, 4, 8, 160, causal, rotary))
    except ValueError:
        return False
    return True


def option_sets(variant: str, model_type: str, causal: bool | None = None) -> list[dict[str, Any]]:
    """Option sets under which short inputs exercise the variant on the family, and its defaults.

    `causal` is the side, by default the family's own.
    """
    side, rotary = is_causal(model_type) if causal is None else causal, get_patcher(model_type).rotary
    sets = enumerate(get_variant(variant).test_options)
    return [*(dict(options) for number, options in sets if _accepts(variant, number, side, rotary)), {}]


def small_options(variant: str, model_type: str, causal: bool | None = None) -> dict[str, Any]:
    """The first of `option_sets`: a window that does not cover short inputs, say."""
    return option_sets(variant, model_type, causal)[0]


def pairs() -> list[tuple[str, str]]:
    """All (variant, family) pairs that may be converted."""
    return [(variant, family) for family in FAMILIES for variant in variants_for(family)]


def main_family(causal: bool) -> str:
    """The family of one side on which every variant is tested thoroughly."""
    return next(family for family in FAMILIES if is_causal(family) == causal)


def representative_variants(model_type: str) -> list[str]:
    """Two variants that differ as much as the registry can tell.

    One has a state of constant size and no use for global tokens, the other keeps keys and marks tokens as global.
    """
    specs = [get_variant(name) for name in variants_for(model_type)]
    constant = next(spec.key for spec in specs if spec.state == "constant" and not spec.uses_global_mask)
    return [constant, next(spec.key for spec in specs if spec.state != "constant" and spec.uses_global_mask)]


def thorough_pairs() -> list[tuple[str, str]]:
    """Pairs for costly tests: every variant on one family of each side, every family with two variants."""
    main = {main_family(False), main_family(True)}
    return [(v, family) for v, family in pairs() if family in main or v in representative_variants(family)]


@cache
def _always() -> frozenset[tuple[str, str]]:
    """Pairs that `make test` runs: the thorough ones, and two variants on every family turned decoder."""
    decoders = [(v, family) for family in causal_families() for v in representative_variants(main_family(True))]
    return frozenset((*thorough_pairs(), *decoders))


def over(cases: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """Parametrizes a test over (variant, family) pairs; those beyond the thorough ones are `slow`."""
    marks = [() if case in _always() else pytest.mark.slow for case in cases]
    found = [pytest.param(v, f, marks=mark, id=f"{v}-{f}") for (v, f), mark in zip(cases, marks, strict=True)]
    return pytest.mark.parametrize(("variant", "family"), found)


def cached(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """`cache` under the name that this release of Transformers has for it."""
    return {cache_keyword(type(model).forward): cache}


def inputs_for(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`batch` in the shape the head wants (multiple choice takes [batch, choices, length])."""
    if "MultipleChoice" in type(model).__name__:
        return {name: tensor.unsqueeze(1).expand(-1, 2, -1).contiguous() for name, tensor in batch.items()}
    return batch


def outputs_of(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All float tensors that a forward returns, without the cache."""
    with torch.no_grad():
        out = model(**inputs_for(model, batch))
    return [value for value in out.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def assert_bit_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    """Same number of tensors, the same bits."""
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b), f"differ by up to {(a - b).abs().max().item():.3g}"
