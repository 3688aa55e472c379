"""What all variants share."""

from __future__ import annotations

import torch

from hf_linear_attn.registry import get_variant
from hf_linear_attn.testing.tools import draw
from hf_linear_attn.variants.base import LayerContext


def test_variants_do_not_share_the_compilations_that_torch_allows_a_function() -> None:
    """It counts them by code object, and one that wraps every forward would be one for all variants."""
    context = LayerContext(0, 2, 32, 2, 16, 64, is_causal=False)
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for key in ("linear", "linformer", "longformer"):
            spec = get_variant(key)
            module = spec.module_class(spec.config_class(), context)
            inputs = draw(context, 24, dtype=torch.float32)
            compiled = torch.compile(module, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(inputs)[0], module(inputs)[0])
