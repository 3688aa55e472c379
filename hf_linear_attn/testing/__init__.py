"""The contract of an attention variant, as functions that users can run on their own variant.

    from hf_linear_attn.testing import check_variant

    assert check_variant("performer", is_causal=True) == []

Every law takes a `Subject` (variant, side, options) and raises `AssertionError` beginning with its name.
Which laws apply follows from the variant's spec: nothing is left out by name.
"""

from hf_linear_attn.testing import edge_laws, laws, numerics_laws, tracing_laws  # fill LAWS
from hf_linear_attn.testing.contract import LAWS, Law, Subject, applicable_laws, check_variant

__all__ = [
    "LAWS",
    "Law",
    "Subject",
    "applicable_laws",
    "check_variant",
    "edge_laws",
    "laws",
    "numerics_laws",
    "tracing_laws",
]
