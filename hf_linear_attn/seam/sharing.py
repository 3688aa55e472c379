"""Parameters that all layers of one variant share: one tensor, and Transformers told so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hf_linear_attn.variants.base import AttentionVariant

__all__ = ["check_shared", "shared_keys", "tie_shared", "variants_of"]


def variants_of(model: nn.Module) -> dict[str, AttentionVariant]:
    """Variants installed in `model`: module name -> variant, in layer order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AttentionVariant)}


def check_shared(variants: Mapping[str, AttentionVariant]) -> None:
    """Raise `ValueError` if a layer's copy of a parameter that all layers share was trained apart.

    Args:
        variants: module name to variant, as `variants_of` gives them.
    """
    first: dict[tuple[str, str], torch.Tensor] = {}
    for module_name, variant in variants.items():
        for name in variant.shared_parameters():
            own = variant.get_parameter(name)
            source = first.setdefault((variant.spec.key, name), own)
            if own is not source and not torch.equal(own, source):
                raise ValueError(
                    f"{module_name}.{name} is one parameter for all layers of {variant.spec.key}, but this copy was "
                    "changed apart. Convert with an option that does not share it."
                )


def tie_shared(variants: Sequence[AttentionVariant]) -> None:
    """Make layers of one variant hold the same tensor for the parameters it shares."""
    first: dict[tuple[str, str], AttentionVariant] = {}
    for variant in variants:
        variant.__dict__.pop("_tied_weights_keys", None)  # of an earlier attachment among other layers
        for name in variant.shared_parameters():
            source = first.setdefault((variant.spec.key, name), variant)
            if source is variant:
                continue
            owner, _, leaf = name.rpartition(".")
            setattr(variant.get_submodule(owner), leaf, source.get_parameter(name))
            # Transformers looks for these names here before it saves tensors that share memory.
            variant._tied_weights_keys = {**getattr(variant, "_tied_weights_keys", {}), name: name}  # type: ignore[assignment]


def shared_keys(model: nn.Module) -> dict[str, str]:
    """`{target: source}` names of the parameters that variants share across layers."""
    first: dict[tuple[str, str], str] = {}
    keys = {}
    for module_name, variant in variants_of(model).items():
        for name in variant.shared_parameters():
            full = f"{module_name}.{name}"
            source = first.setdefault((variant.spec.key, name), full)
            if source != full:
                keys[full] = source
    return keys
