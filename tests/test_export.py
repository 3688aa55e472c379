"""Converted encoders leave Python: torch.export and ONNX at any batch and length, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hf_linear_attn import convert_model, get_variant, list_variants
from hf_linear_attn.cli.listing import all_facts
from tests.exporting import LastHiddenState, encoder, export, inputs, largest_error, onnx_session
from tests.tiny import FAMILIES, base_model, is_causal, representative_variants, small_options, token_batch

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
VARIANTS = [key for key in list_variants(encoder=True) if get_variant(key).any_length]
OTHER_FAMILIES = [
    (variant, family)
    for family in FAMILIES
    if not is_causal(family) and family != "bert"
    for variant in representative_variants(family)
]
LIMIT = 1e-4
# PyTorch's ONNX exporter copies trees of a class that PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")


# The programs of single layers are law: `export_any_length`.
@pytest.mark.heavy
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_onnxruntime_is_right_at_other_shapes(variant: str, masked: bool) -> None:
    model = encoder(variant)
    program = export(model, masked=masked)
    assert largest_error(model, program.module(), masked=masked) < LIMIT
    assert largest_error(model, onnx_session(program), masked=masked) < LIMIT


@pytest.mark.parametrize("variant", ["linear", pytest.param("longformer", marks=pytest.mark.slow)])
def test_onnxruntime_is_right_at_other_shapes_in_short(variant: str) -> None:
    model = encoder(variant)
    assert largest_error(model, onnx_session(export(model, masked=True)), masked=True) < LIMIT


@pytest.mark.heavy
@pytest.mark.parametrize(("variant", "family"), OTHER_FAMILIES)
def test_every_encoder_family_exports(variant: str, family: str) -> None:
    model = encoder(variant, family)
    program = export(model, masked=True)
    assert largest_error(model, program.module(), masked=True) < LIMIT
    assert largest_error(model, onnx_session(program), masked=True) < LIMIT


# jit.trace says that it is deprecated, and reads every property of a model, deprecated ones too.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_converted_layer_refuses_to_be_traced_at_one_length() -> None:
    model = encoder("linear")
    args = inputs(2, 24, masked=True)
    with pytest.raises(ValueError, match=r"torch\.jit\.trace.*torch\.export"):
        torch.jit.trace(model, args, check_trace=False)
    model.model.set_attn_implementation("sdpa")  # no converted layer runs
    traced = torch.jit.trace(model, args, check_trace=False)
    torch.testing.assert_close(traced(*args), model(*args))


def test_the_registry_says_what_an_exported_program_computes() -> None:
    for key in VARIANTS:
        spec = get_variant(key)
        assert ("mask" in all_facts(spec)["exported"]) == spec.masked_export
    assert "pattern='fixed'" in all_facts(get_variant("sparse"))["exported"]


def test_marks_of_global_tokens_are_refused_in_an_exported_program() -> None:
    model = convert_model(base_model("bert"), "longformer", **small_options("longformer", "bert"))
    batch = token_batch(length=24)
    batch["global_attention_mask"] = torch.zeros_like(batch["input_ids"])
    with pytest.raises(ValueError, match="global_attention_mask"):
        torch.export.export(model, (), kwargs=batch, strict=False)


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = base_model("bert")
    convert_model(model, "linear").save_pretrained("model")
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("variant", ["gated", "retention", "rfa"])
def test_decay_in_both_directions_exports_at_one_length(variant: str) -> None:
    model = LastHiddenState(convert_model(base_model("bert"), variant, **small_options(variant, "bert"))).eval()
    with pytest.raises(ValueError, match="exports at one length only"):
        export(model, masked=True)
    if variant == "retention":
        args = inputs(2, 24, masked=True)
        torch.testing.assert_close(torch.export.export(model, args, strict=False).module()(*args), model(*args))


def test_a_pattern_without_a_form_for_every_length_is_refused() -> None:
    model = LastHiddenState(convert_model(base_model("bert"), "sparse", **small_options("sparse", "bert"))).eval()
    with pytest.raises(ValueError, match=r"pattern='fixed'.*pattern='strided'"):
        export(model, masked=True)
