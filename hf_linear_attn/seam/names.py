"""Names under which Transformers knows what is converted."""

from __future__ import annotations

__all__ = ["IMPLEMENTATION"]

IMPLEMENTATION = "linear_attn"
"""Key of our attention and mask functions, and the `attn_implementation` written into `config.json`."""
