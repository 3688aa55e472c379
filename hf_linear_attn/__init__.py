"""Rewrite the attention of pretrained Transformers models into linear or sparse attention.

    from hf_linear_attn import convert_model
    model = convert_model(model, "performer")

Importing the package registers the `linear_attn_*` config classes with Transformers' Auto classes, so that
`AutoModel*.from_pretrained` and `pipeline` read converted checkpoints. It changes nothing for other models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_linear_attn.auto_config import register_auto_configs
from hf_linear_attn.seam.versions import say_if_untested

if TYPE_CHECKING:
    from hf_linear_attn.convert import (
        convert_model,
        extend_positions,
        redraw_features,
        revert_model,
        set_backend,
    )
    from hf_linear_attn.ops.features.named import register_feature_map, unregister_feature_map
    from hf_linear_attn.registry import get_variant, list_patchers, list_variants, register_patcher, register_variant
    from hf_linear_attn.report import ConversionReport

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "convert_model",
    "extend_positions",
    "get_variant",
    "list_patchers",
    "list_variants",
    "redraw_features",
    "register_feature_map",
    "register_patcher",
    "register_variant",
    "revert_model",
    "set_backend",
    "unregister_feature_map",
]

# Public name -> module. Resolved on first use: importing the package must not import torch's heavy parts.
_HOMES = {
    "ConversionReport": "report",
    "convert_model": "convert",
    "extend_positions": "convert",
    "get_variant": "registry",
    "list_patchers": "registry",
    "list_variants": "registry",
    "redraw_features": "convert",
    "register_feature_map": "ops.features.named",
    "register_patcher": "registry",
    "register_variant": "registry",
    "revert_model": "convert",
    "set_backend": "convert",
    "unregister_feature_map": "ops.features.named",
}

say_if_untested()
register_auto_configs()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
