"""Reload: what was saved is what comes back, or there is an error."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.models.auto import modeling_auto

from hf_linear_attn import convert_model, revert_model
from tests.tiny import (
    FAMILIES,
    assert_bit_equal,
    base_model,
    build,
    head_classes,
    outputs_of,
    over,
    pairs,
    representative_variants,
    small_options,
    tiny_config,
    token_batch,
)

HEADS = [(family, cls) for family in FAMILIES for cls in head_classes(family)]
HEAD_IDS = [cls.__name__ for _, cls in HEADS]


def auto_classes_for(cls: type) -> list[type]:
    """The Auto classes under which the upstream class `cls` is registered."""
    found = []
    for value in vars(modeling_auto).values():
        mapping = getattr(value, "_model_mapping", None)
        if isinstance(value, type) and mapping is not None and cls.config_class in mapping:
            entry = mapping[cls.config_class]
            if cls is entry or (isinstance(entry, (list, tuple)) and cls is entry[0]):
                found.append(value)
    return found


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("family", "cls"), HEADS, ids=HEAD_IDS)
def test_every_head_reloads_bit_equal_through_every_auto_class(family: str, cls: type, tmp_path: Path) -> None:
    autos = auto_classes_for(cls)
    assert autos
    for variant in representative_variants(family):
        model = convert_model(
            build(cls, tiny_config(family)), variant, max_length=200, **small_options(variant, family)
        )
        expected = outputs_of(model, token_batch(length=190))
        model.save_pretrained(tmp_path / variant)
        for auto in autos:
            again = auto.from_pretrained(tmp_path / variant)
            assert type(again) is type(model)
            assert_bit_equal(outputs_of(again, token_batch(length=190)), expected)
            assert again.conversion_report.to_dict() == model.conversion_report.to_dict()


@over(pairs())
def test_a_reloaded_model_behaves_like_the_converted_one(variant: str, family: str, tmp_path: Path) -> None:
    model = convert_model(base_model(family), variant, **small_options(variant, family))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    batch = token_batch()
    with torch.no_grad():
        left = model(**batch, output_hidden_states=True).hidden_states
        right = again(**batch, output_hidden_states=True).hidden_states
    assert_bit_equal(list(left), list(right))
    again.save_pretrained(tmp_path / "twice")
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (tmp_path / "twice/config.json").read_text()
    )
    # Reverting after a reload gives the checkpoint back, too.
    revert_model(model)
    revert_model(again)
    assert type(again) is type(model)
    assert_bit_equal(outputs_of(model, batch), outputs_of(again, batch))


def test_calibrated_starts_reload(tmp_path: Path) -> None:
    batch = token_batch()
    for variant in ("linear", "performer"):
        model = convert_model(base_model("bert"), variant, calibration=[batch])
        model.save_pretrained(tmp_path / variant)
        assert_bit_equal(outputs_of(AutoModel.from_pretrained(tmp_path / variant), batch), outputs_of(model, batch))


def test_parameters_shared_across_layers_reload_shared(tmp_path: Path) -> None:
    model = convert_model(base_model("bert"), "linformer", sharing="layerwise", k=16)
    assert [row.new_parameters > 0 for row in model.conversion_report.rows] == [True, False]
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert_bit_equal(outputs_of(again, token_batch()), outputs_of(model, token_batch()))
    first, second = (m.linear_attn for m in again.modules() if hasattr(m, "linear_attn"))
    assert [a is b for a, b in zip(first.parameters(), second.parameters(), strict=True)] == [True]
    # Training one moves both.
    with torch.no_grad():
        next(first.parameters()).add_(1.0)
    assert torch.equal(next(first.parameters()), next(second.parameters()))


def test_sharded_and_half_precision_saves_reload(tmp_path: Path) -> None:
    model = convert_model(base_model("bert").to(torch.bfloat16), "longformer", window_size=8)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModel.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert_bit_equal(outputs_of(again, token_batch()), outputs_of(model, token_batch()))


def tampered(path: Path, edit) -> Path:
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_missing_or_unexpected_weights_are_errors(tmp_path: Path) -> None:
    def saved(name: str) -> Path:
        model = build(BertForSequenceClassification, tiny_config("bert"))
        convert_model(model, "performer").save_pretrained(tmp_path / name)
        return tmp_path / name

    buffer = "bert.encoder.layer.1.attention.self.linear_attn"
    key = next(k for k in load_file(saved("probe") / "model.safetensors") if k.startswith(buffer))
    lacking = tampered(saved("lacking"), lambda w: w.pop(key))
    with pytest.raises(ValueError, match=rf"missing keys: {key}"):
        AutoModelForSequenceClassification.from_pretrained(lacking)
    without_query = tampered(saved("query"), lambda w: w.pop("bert.encoder.layer.0.attention.self.query.weight"))
    with pytest.raises(ValueError, match=r"missing keys: .*query"):
        AutoModelForSequenceClassification.from_pretrained(without_query)
    extra = tampered(saved("extra"), lambda w: w.update({"bert.surprise": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"unexpected keys: bert\.surprise"):
        AutoModelForSequenceClassification.from_pretrained(extra)


def test_a_base_checkpoint_may_get_a_new_head(tmp_path: Path) -> None:
    model = convert_model(base_model("bert"), "performer")
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert classifier(**token_batch()).logits.shape == (2, 5)
    with torch.no_grad():
        assert torch.equal(classifier.bert(**token_batch())[0], model(**token_batch())[0])


def test_a_head_of_another_size_is_upstreams_error_or_starts_anew(tmp_path: Path) -> None:
    """Found by Transformers' common tests: scripts catch its `RuntimeError`."""
    convert_model(BertForSequenceClassification(tiny_config("bert")), "linear").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"classifier\.weight is \[2, 32\].*\[7, 32\].*ignore_mismatched_sizes=True"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    held = load_file(tmp_path / "model.safetensors")
    kept = {name for name, value in model.state_dict().items() if torch.equal(value, held[name])}
    assert set(held) - kept == {"classifier.weight", "classifier.bias"}


def test_starting_anew_is_offered_only_where_it_would_do(tmp_path: Path) -> None:
    convert_model(BertForSequenceClassification(tiny_config("bert")), "performer", num_features=8).save_pretrained(
        tmp_path
    )
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_features": 8', '"num_features": 16'))
    for given in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(RuntimeError, match="linear_attn") as raised:
            AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7, **given)
        assert ("classifier.weight is [2, 32]" in str(raised.value)) == (not given)
        assert "ignore_mismatched_sizes" not in str(raised.value)


def test_switched_to_softmax_while_saving_reloads_as_converted(tmp_path: Path) -> None:
    model = convert_model(base_model("bert"), "linear")
    converted = outputs_of(model, token_batch())
    model.set_attn_implementation("sdpa")
    softmax = outputs_of(model, token_batch())
    model.save_pretrained(tmp_path)
    assert_bit_equal(outputs_of(AutoModel.from_pretrained(tmp_path), token_batch()), converted)
    asked = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert_bit_equal(outputs_of(asked, token_batch()), softmax)


def test_the_upstream_class_refuses_a_converted_checkpoint(tmp_path: Path) -> None:
    convert_model(base_model("bert"), "linear").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not converted"):
        BertModel.from_pretrained(tmp_path)(**token_batch())


def test_a_process_without_the_plugin_gets_a_clear_error(tmp_path: Path) -> None:
    convert_model(base_model("bert"), "linear").save_pretrained(tmp_path)
    automatic = run("import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])", str(tmp_path))
    assert automatic.returncode != 0
    assert "linear_attn_bert" in automatic.stderr
    direct = run("import sys, transformers; transformers.BertModel.from_pretrained(sys.argv[1])", str(tmp_path))
    assert direct.returncode != 0
    assert "linear_attn" in direct.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_fresh_process_with_the_plugin_gets_the_same_bits(tmp_path: Path) -> None:
    model = build(BertForSequenceClassification, tiny_config("bert"))
    convert_model(model, "performer", kernel="hyperbolic").save_pretrained(tmp_path)
    batch = token_batch()
    save_file({**batch, "logits": model(**batch).logits.detach()}, tmp_path / "expected.safetensors")
    code = """
import sys, torch, hf_linear_attn
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
torch.set_num_threads(1)
path = Path(sys.argv[1])
batch = load_file(path / "expected.safetensors")
expected = batch.pop("logits")
model = AutoModelForSequenceClassification.from_pretrained(path)
with torch.no_grad():
    assert torch.equal(model(**batch).logits, expected)
print("same bits")
"""
    result = run(code, str(tmp_path))
    assert "same bits" in result.stdout, result.stderr


def test_pickle_in_a_fresh_process(tmp_path: Path) -> None:
    batch = token_batch()
    models = [convert_model(base_model(family), "linear") for family in FAMILIES]
    pickled = pickle.dumps([(model, outputs_of(model, batch)) for model in models])
    (tmp_path / "models.pkl").write_bytes(pickle.dumps((batch, pickled)))
    code = """
import pickle, sys, torch
torch.set_num_threads(1)
batch, pickled = pickle.load(open(sys.argv[1], "rb"))
assert "transformers" not in sys.modules
for model, expected in pickle.loads(pickled):
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], expected[0])
    print(model.config.base_model_type)
"""
    result = run(code, str(tmp_path / "models.pkl"))
    assert result.stdout.split() == FAMILIES, result.stderr


def test_deepcopy_is_independent() -> None:
    model = convert_model(base_model("bert"), "performer")
    twin = copy.deepcopy(model)
    before = outputs_of(model, token_batch())
    assert_bit_equal(outputs_of(twin, token_batch()), before)
    revert_model(twin)
    assert_bit_equal(outputs_of(model, token_batch()), before)


def test_importing_the_plugin_changes_nothing_for_other_models(tmp_path: Path) -> None:
    model = base_model("bert")
    batch = token_batch()
    model.save_pretrained(tmp_path)
    save_file({**batch, "out": outputs_of(model, batch)[0]}, tmp_path / "expected.safetensors")
    code = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
import transformers
torch.set_num_threads(1)
path = Path(sys.argv[1])
batch = load_file(path / "expected.safetensors")
expected = batch.pop("out")
def check():
    model = transformers.AutoModel.from_pretrained(path)
    assert type(model) is transformers.BertModel and type(model.config) is transformers.BertConfig
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], expected)
        assert model.config._attn_implementation == "sdpa"
check()
import hf_linear_attn
check()
from hf_linear_attn import convert_model
convert_model(transformers.AutoModel.from_pretrained(path), "linear")
check()
model = transformers.AutoModel.from_pretrained(path, attn_implementation="eager")
with torch.no_grad():
    assert len(model(**batch, output_attentions=True).attentions) == 2
print("unchanged")
"""
    result = run(code, str(tmp_path))
    assert "unchanged" in result.stdout, result.stderr


def tiny_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[BOS]", "[EOS]", "[MASK]", "[UNK]", *[f"w{i}" for i in range(92)]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(path)


PIPELINES = {
    "text-classification": (BertForSequenceClassification, "bert", "w1 w2 w3"),
    "fill-mask": (BertForMaskedLM, "bert", "w1 [MASK] w3"),
    "feature-extraction": (BertModel, "bert", "w1 w2"),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_run_converted_checkpoints(task: str, tmp_path: Path) -> None:
    cls, family, text = PIPELINES[task]
    model = build(cls, tiny_config(family))
    convert_model(model, "linear").save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    ours = pipeline(task, model=str(tmp_path))
    assert type(ours.model) is type(model)
    direct = pipeline(task, model=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    assert ours(text) == direct(text)


def test_text_generation_pipeline(tmp_path: Path) -> None:
    from tests.tiny import causal_lm

    model = causal_lm("gpt2")
    convert_model(model, "linear").save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    text = generator("w1 w2 w3", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("w1 w2 w3")


def test_configs_are_validated_on_load(tmp_path: Path) -> None:
    convert_model(base_model("bert"), "linear").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def broken(**changes) -> None:
        (tmp_path / "config.json").write_text(
            json.dumps({**config, "linear_attn": {**config["linear_attn"], **changes}})
        )

    broken(version=99)
    with pytest.raises(ValueError, match="Upgrade"):
        AutoConfig.from_pretrained(tmp_path)
    broken(surprise=1)
    with pytest.raises(ValueError, match="surprise"):
        AutoConfig.from_pretrained(tmp_path)
    broken(layers=[{"variant": "linear", "options": {"bogus": 1}}, None])
    with pytest.raises(ValueError, match="bogus"):
        AutoConfig.from_pretrained(tmp_path)


def test_config_alone_builds_a_model() -> None:
    config = convert_model(base_model("bert"), "performer").config
    model = AutoModelForMaskedLM.from_config(copy.deepcopy(config))
    assert type(model).__name__ == "LinearAttnBertForMaskedLM"
    assert torch.isfinite(model.eval()(**token_batch()).logits).all()
