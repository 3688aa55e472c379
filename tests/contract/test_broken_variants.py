"""The contract catches what is broken, by the name of the law, and lets a sound variant pass."""

import pytest

from hf_linear_attn.registry import list_variants
from hf_linear_attn.testing import LAWS, Subject, applicable_laws, check_variant
from tests.contract.broken import BROKEN, SOUND


@pytest.mark.parametrize("options", [{}, {"gain": True}], ids=["no_parameters", "gain"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_a_sound_variant_keeps_every_law(is_causal, options):
    assert check_variant(SOUND, is_causal, **options) == []


@pytest.mark.parametrize(
    ("spec", "is_causal", "options", "law", "says"),
    BROKEN,
    ids=[f"{case[0].key}-{'decoder' if case[1] else 'encoder'}-{case[3]}" for case in BROKEN],
)
def test_a_broken_variant_is_caught_by_name(spec, is_causal, options, law, says):
    violations = check_variant(spec, is_causal, laws=[law], **options)
    assert len(violations) == 1
    assert violations[0].startswith(f"{law}: ")
    assert says in violations[0]


def test_every_law_catches_something():
    assert {case[3] for case in BROKEN} == set(LAWS)


def test_laws_follow_from_the_spec():
    encoder = {law.name for law in applicable_laws(Subject(SOUND, False))}
    decoder = {law.name for law in applicable_laws(Subject(SOUND, True))}
    assert decoder - encoder == {"causality", "right_alignment", "decode", "state_is_batch_first", "state_memory"}
    assert "linear_memory" not in encoder | decoder  # it makes no such claim


def test_checking_registers_nothing():
    before = list_variants()
    check_variant(SOUND, False, laws=["shapes_and_dtypes"])
    assert list_variants() == before


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="Unknown law"):
        check_variant(SOUND, False, laws=["casuality"])
    with pytest.raises(ValueError, match="Did you mean 'linformer'"):
        check_variant("linfromer", False)
