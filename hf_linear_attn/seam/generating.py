"""What converted models tell Transformers' `generate`, and what they learn from it."""

from __future__ import annotations

from typing import Any

from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS, GenerationMode

from hf_linear_attn.seam.cache import CROP_MESSAGE, OFFLOADED_MESSAGE
from hf_linear_attn.seam.names import IMPLEMENTATION

__all__ = ["NEW_REAL", "Generating"]

NEW_REAL = "linear_attn_new_real"
"""Keyword of layers: whether no token after those of a cache is padding. Of models: the mask of which that holds."""


class Generating:
    """Mixin put before an upstream model class."""

    config: Any

    @property
    def _is_stateful(self) -> bool:
        """What generation asks before it rolls a cache back; softmax layers alone can do that."""
        return bool(self.config._attn_implementation == IMPLEMENTATION)

    def _validate_generation_mode(self, mode: Any, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """As upstream; `ValueError` for ways that need a cache that no converted layer can keep its state in."""
        implementation = generation_config.cache_implementation if self._is_stateful else None
        if self._is_stateful and mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(CROP_MESSAGE)
        if implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            raise ValueError(
                f"cache_implementation={implementation!r}: converted layers work with a DynamicCache. Leave "
                "cache_implementation unset."
            )
        if implementation == "offloaded":
            raise ValueError(OFFLOADED_MESSAGE)
        super()._validate_generation_mode(mode, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As upstream, whose mask covers each token that it has drawn: layers need not ask, nor wait for a GPU.

        The promise is of that very tensor. Who puts another in its place is asked as ever.
        """
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(*args, **kwargs)  # type: ignore[misc]
        mask = updated.get("attention_mask") if self._is_stateful else None
        return updated if mask is None else {**updated, NEW_REAL: mask}
