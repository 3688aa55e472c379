"""Every training recipe of the repository runs: two steps of every stage, on a tiny model of its family.

Everything that counts tokens is a sixteenth of what the recipe says; models, documents and the number of steps are
small. All else is the recipe's: stages, what they train, optimizer, schedule, batches, conversion.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    RobertaForMaskedLM,
)
from typer.testing import CliRunner

from hf_linear_attn import get_variant
from hf_linear_attn.auto import LinearAttnPreTrainedModel
from hf_linear_attn.bench.retrieval.recipe import RetrievalRecipe
from hf_linear_attn.bench.speed.recipe import BenchRecipe
from hf_linear_attn.bench.starts.recipe import MethodsRecipe
from hf_linear_attn.cli import app
from hf_linear_attn.training.arguments import merge_arguments
from hf_linear_attn.training.parts import TRAINABLE
from hf_linear_attn.training.recipe import STAGES, Recipe
from hf_linear_attn.training.run import train
from tests.small_runs import FILLER, small_tokenizer
from tests.tiny import build, tiny_config

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate_configs")
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))
RECIPES = [path for path in FILES if "stages" in yaml.safe_load(path.read_text())]
SHRINK = 16
# The recipe's checkpoint -> a tiny model's class, its model_type and its limit in tokens.
CHECKPOINTS: dict[str, tuple[Any, str, int]] = {
    "google-bert/bert-base-uncased": (BertForMaskedLM, "bert", 512),
    "FacebookAI/roberta-base": (RobertaForMaskedLM, "roberta", 512),
    "openai-community/gpt2": (GPT2LMHeadModel, "gpt2", 1024),
    "minilm": (BertModel, "bert", 512),
    "smollm2": (LlamaForCausalLM, "llama", 8192),
}
# Options of conversions that count tokens.
TOKENS = ("window_size", "block_size", "k", "num_landmarks")


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    """As the original: one special token, which ends texts and is unknown, and none that pads."""
    characters = [*"abcdefghijklmnopqrstuvwxyz0123456789", "\u0120"]
    vocabulary = {token: index for index, token in enumerate([*characters, "<|endoftext|>"])}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[])
    assert tokenizer.pad_token is None
    return tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the tiny checkpoint that stands for one of `CHECKPOINTS`."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(checkpoint: str) -> Path:
        cls, family, limit = CHECKPOINTS[checkpoint]
        path = root / checkpoint.replace("/", "_")
        if not path.exists():
            extra = {"max_position_embeddings": limit // SHRINK + (1 if family == "roberta" else 0)}
            if checkpoint == "minilm":  # of which a recipe trains the last three layers
                extra["num_hidden_layers"] = 3
            if family == "gpt2":
                extra |= {"bos_token_id": 37, "eos_token_id": 37, "pad_token_id": None}
            build(cls, tiny_config(family, **extra), scale=1.0).save_pretrained(path)
            (gpt2_tokenizer() if family == "gpt2" else small_tokenizer()).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Task -> file of a few documents of that kind."""
    root = tmp_path_factory.mktemp("documents")
    texts = [" ".join(FILLER[(3 * row + 7 * word) % len(FILLER)] for word in range(30 + 25 * row)) for row in range(12)]
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": text} for text in texts],
        "sequence_classification": [{"text": text, "label": ("no", "yes")[row % 2]} for row, text in enumerate(texts)],
        "multi_label_classification": [
            {"text": text, "label": [("a", "b", "c")[row % 3], "d"]} for row, text in enumerate(texts)
        ],
    }
    for kind, own in rows.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return {kind: str(root / f"{kind}.jsonl") for kind in rows}


def shrunk(tokens: Any) -> Any:
    return None if tokens is None else max(2, tokens // SHRINK)


def small(path: Path, checkpoint: Path, documents: dict[str, str], output: Path) -> Recipe:
    """The recipe of a file, small enough for a test."""
    recipe = Recipe.from_yaml(path)

    def data(own: dict[str, Any], kind: str) -> dict[str, Any]:
        return {**own, "source": documents[kind], "options": {}, "max_test_documents": 2, "folds": 0}

    stages = recipe.to_dict()["stages"]
    for stage in stages:
        kind = stage["task"] if stage["stage"] == "finetune" else "text"
        stage["data"] = data(stage["data"] or dataclasses.asdict(recipe.data), kind)
        for key in ("max_length", "window", "stride", "passage_tokens", "margin"):
            if key in stage:
                stage[key] = shrunk(stage[key])
        stage["training"].pop("num_train_epochs", None)
        stage["training"] |= {"max_steps": 2}
    changes: dict[str, Any] = {
        "model": {"name": str(checkpoint)},
        "data": data(dataclasses.asdict(recipe.data), "text"),
        "training": {"output_dir": str(output)},
    }
    if recipe.conversion is not None:
        conversion = dataclasses.asdict(recipe.conversion)
        options = {key: shrunk(value) if key in TOKENS else value for key, value in conversion["options"].items()}
        if conversion["variant"] == "bigbird":
            options.setdefault("block_size", 64 // SHRINK)  # its default counts tokens too
        changes["conversion"] = {
            "options": options,
            "max_length": shrunk(conversion["max_length"]),
            "calibration_tokens": shrunk(conversion["calibration_tokens"]),
            "keep_softmax": conversion["keep_softmax"] and 1,
        }
    return recipe.replace(**changes, stages=stages)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_stage_of_a_recipe_takes_two_steps(
    path: Path, checkpoints: Any, documents: dict[str, str], tmp_path: Path
) -> None:
    written = Recipe.from_yaml(path)
    recipe = small(path, checkpoints(written.model.name), documents, tmp_path / "run")
    assert [type(stage) for stage in recipe.stages] == [type(stage) for stage in written.stages]
    result = train(recipe)
    assert [(stage.stage, stage.steps) for stage in result.stages] == [(stage.kind, 2) for stage in written.stages]
    for stage, asked in zip(result.stages, recipe.stages, strict=True):
        assert stage.parameters_trained > 0
        assert stage.max_length == asked.max_length
        assert torch.tensor([stage.evaluation["eval_loss"], *(loss for _, loss in stage.losses)]).isfinite().all()
    if written.stages[-1].kind == "finetune":
        assert len(result.predictions) == len(result.references) == 2
        assert set(result.metrics) > {"loss"}
    converted = getattr(AutoConfig.from_pretrained(tmp_path / "run"), "linear_attn", None)
    assert (converted is None) == (written.conversion is None)
    if converted is not None:
        kept = [layer for layer in converted["layers"] if layer is None]
        assert len(kept) == (1 if written.conversion.keep_softmax else 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.model_max_length == recipe.max_length
    assert tokenizer.pad_token is not None


def test_every_recipe_is_run_here_or_read_by_the_test_of_its_kind() -> None:
    others = {"bench": BenchRecipe, "methods": MethodsRecipe, "minilm": RetrievalRecipe}
    for path in set(FILES) - set(RECIPES):
        assert path.parent.name in others, f"{path} has no stages, and its folder no other kind of recipe"
        others[path.parent.name].from_yaml(path)
    unknown = {Recipe.from_yaml(path).model.name for path in RECIPES} - set(CHECKPOINTS)
    assert not unknown, f"No tiny model stands for {unknown}: add it to CHECKPOINTS"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_opens_with_its_command_and_says_what_it_does(path: Path) -> None:
    recipe, lines = Recipe.from_yaml(path), path.read_text().splitlines()
    where = path.relative_to(ROOT).as_posix()
    demo = "# hf-linear-attn demo"
    assert lines[0] in (f"# hf-linear-attn train {where}", f"# hf-linear-attn compare {where}", demo)
    assert lines[1] == "#"
    assert recipe.output_dir.parts[0] == "outputs"
    assert recipe.conversion is None or recipe.conversion.variant in path.read_text()
    for stage in recipe.stages:
        own = merge_arguments(recipe.training, stage.training)
        assert "max_steps" in own or "num_train_epochs" in own, f"{stage.kind} does not say how long"
        assert stage.max_length is not None
    for entry in recipe.evaluation.variants:
        key, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        get_variant(key).config_class.from_dict(options)


def test_no_two_recipes_write_one_folder() -> None:
    folders = [Recipe.from_yaml(path).output_dir for path in RECIPES]
    assert len(set(folders)) == len(folders)


def test_the_page_lists_every_recipe_and_every_launcher() -> None:
    page = (ROOT / "recipes" / "README.md").read_text()
    for path in (*FILES, *LAUNCHERS):
        assert f"]({path.relative_to(ROOT / 'recipes').as_posix()})" in page, path.name
    for trainable in TRAINABLE:
        assert f"`{trainable}`" in page


def commands_of_the_page() -> list[str]:
    lines = (ROOT / "recipes" / "README.md").read_text().splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.startswith("hf-linear-attn train ")]


@pytest.mark.parametrize("command", commands_of_the_page())
def test_the_pages_commands_reach_the_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[tuple[Recipe, dict[str, Any]]] = []
    monkeypatch.setattr("hf_linear_attn.cli.actions.run_training", lambda recipe, **how: reached.append((recipe, how)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    [(recipe, how)] = reached
    kinds = [stage.kind for stage in recipe.stages]
    assert all(how[key] is None or how[key] in kinds for key in ("from_stage", "until_stage"))
    assert (recipe != Recipe.from_yaml(shlex.split(command)[2])) == ("--set" in command)


def test_the_pages_example_is_a_recipe_with_stages_as_the_page_describes_them() -> None:
    page = (ROOT / "recipes" / "README.md").read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    recipe = Recipe.from_dict(yaml.safe_load(example))
    assert [stage.kind for stage in recipe.stages] == ["transfer", "distill", "finetune"]
    for kind in STAGES:
        assert f"| `{kind}` |" in page


def test_the_long_embedder_opens_in_sentence_transformers(
    checkpoints: Any, documents: dict[str, str], tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers", reason="the extra [conformance] is not installed")
    path = ROOT / "recipes" / "minilm" / "long_embedder.yaml"
    train(small(path, checkpoints("minilm"), documents, tmp_path / "run"))
    encoder = library.SentenceTransformer(str(tmp_path / "run"), device="cpu")
    assert isinstance(encoder[0].auto_model, LinearAttnPreTrainedModel)
    assert encoder.max_seq_length == 4096 // SHRINK
    document = " ".join(FILLER * 6)  # longer than the checkpoint's window, shorter than what is read now
    inputs = AutoTokenizer.from_pretrained(tmp_path / "run")([document], return_tensors="pt")
    assert 512 // SHRINK < inputs["input_ids"].shape[1] < 4096 // SHRINK
    model = AutoModel.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    torch.testing.assert_close(encoder.encode([document], convert_to_tensor=True), states.mean(1), rtol=1e-4, atol=1e-5)


# Launchers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launcher_is_read_by_accelerate_and_opens_with_its_command(path: Path) -> None:
    text = path.read_text()
    command = next(line for line in text.splitlines() if "accelerate launch" in line)
    assert command == text.splitlines()[0]
    assert command.startswith("# ")
    assert f"--config_file recipes/accelerate_configs/{path.name} " in command
    assert command.endswith("-m hf_linear_attn train <recipe>")
    config, written = load_config_from_file(str(path)), yaml.safe_load(text)
    for key in ("num_processes", "num_machines", "machine_rank", "mixed_precision"):
        assert getattr(config, key) == written[key]
    # The parser of `accelerate launch` knows every key of these sections.
    options = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(written.get(section, {})) <= options
    if {"fsdp_config", "deepspeed_config"} & set(written):
        assert "transfer" in text, "what a strategy refuses is said in its file"
