"""The contract, law by law, on every registered variant, side and set of test options.

`make test` runs all of it with the default options; the further sets are `slow`.
"""

import pytest
import torch

from hf_linear_attn.registry import get_variant, list_variants
from hf_linear_attn.testing import Subject, applicable_laws


def _accepted(subject):
    """Whether the side takes these options (a one-sided option is a `ValueError` at construction)."""
    try:
        subject.build()
    except ValueError:
        return False
    return True


def _cases():
    for key in list_variants():
        spec = get_variant(key)
        for number, options in enumerate(({}, *spec.test_options)):
            subjects = [Subject(spec, is_causal, options) for is_causal in (False, True)]
            sides = [subject for subject in subjects if not subject.served or _accepted(subject)]
            assert any(subject.served for subject in sides), f"{key}: no side accepts {options}"
            for subject in sides:
                side = "decoder" if subject.is_causal else "encoder"
                label = "-".join(f"{name}={value}" for name, value in options.items()) or "defaults"
                for law in applicable_laws(subject):
                    case = f"{law.name}-{key}-{side}-{number}-{label}"
                    yield pytest.param(law, subject, marks=pytest.mark.slow if options else (), id=case)


@pytest.mark.parametrize(("law", "subject"), list(_cases()))
def test_variant(law, subject):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        law(subject)
    finally:
        torch.set_num_threads(threads)
