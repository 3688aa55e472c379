"""The documents are run: python blocks execute, commands exist, generated sections are up to date."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_linear_attn import convert_model
from hf_linear_attn.cli import app
from hf_linear_attn.data import resolve_model
from hf_linear_attn.registry import PATCHERS, VARIANTS
from hf_linear_attn.testing import check_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")  # its examples go on where the README's end
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def hub_ids_as_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the README's Hub ids are folders: `from_pretrained` prefers a folder."""
    encoder = tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2"
    shutil.copytree(resolve_model("minilm"), encoder)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([README], vocab_size=400, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    decoder = tmp_path / "openai-community" / "gpt2"
    tokenizer.save_pretrained(decoder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=4, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(decoder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("hub_ids_as_folders")
def test_readme_python_runs_from_top_to_bottom() -> None:
    namespace: dict[str, object] = {}
    examples = [("README.md", block) for block in blocks(README, "python")]
    examples += [("docs/usage.md", block) for block in blocks(USAGE, "python")]
    assert len(examples) >= 6
    for number, (document, block) in enumerate(examples):
        exec(compile(block, f"{document}, example {number}", "exec"), namespace)


def with_python(document: str) -> bool:
    return bool(blocks((ROOT / document).read_text(encoding="utf-8"), "python"))


# README.md and docs/usage.md are one text, CONTRIBUTING.md writes out files, docs/export.md has tests of its own.
RUN_ELSEWHERE = {"README.md", "docs/usage.md", "CONTRIBUTING.md", "docs/export.md"}


@pytest.mark.usefixtures("hub_ids_as_folders")
@pytest.mark.parametrize("document", sorted({name for name in DOCUMENTS if with_python(name)} - RUN_ELSEWHERE))
def test_python_of_a_page_runs_from_top_to_bottom(document: str) -> None:
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks((ROOT / document).read_text(encoding="utf-8"), "python")):
        exec(compile(block, f"{document}, example {number}", "exec"), namespace)


def test_commands_of_the_first_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    first = page.partition("\n## From nothing")[0]  # the rest runs in tests/test_newcomer.py
    lines = "\n".join(blocks(first, "bash")).splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("hf-linear-attn ")]
    assert [words[0] for words in commands] == ["convert", "list"]
    for words in commands:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output)
    assert AutoModel.from_pretrained("outputs/start_here").config.max_position_embeddings == 4096


def test_every_letter_of_a_cost_is_in_the_notation() -> None:
    table = (ROOT / "docs" / "notation.md").read_text(encoding="utf-8").partition("## Words")[0]
    letters = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE)))
    used = {letter for key in VARIANTS.names() for letter in re.findall(r"\b\d*([a-zA-Z])\b", VARIANTS.get(key).cost)}
    assert used - set(letters) == set()


def test_generated_sections_of_the_readme_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, ".ci/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_committed_result_has_the_format_of_the_report() -> None:
    from hf_linear_attn.compare.report import check_results

    readme = import_file(ROOT / ".ci" / "readme.py")
    for path in sorted(readme.RESULTS.glob("*.json")):
        check_results(readme.json.loads(path.read_text(encoding="utf-8")))
        assert readme.result(path)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_exist(document: str) -> None:
    lines = "\n".join(blocks((ROOT / document).read_text(encoding="utf-8"), "bash")).splitlines()
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for line in lines if line.startswith("make ")}
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)} == set()
    commands = {line.split()[1] for line in lines if line.startswith("hf-linear-attn ")}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
    files = {word for line in lines for word in line.split() if re.fullmatch(r"recipes/\S+", word)}
    assert {name for name in files if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_files_named_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    assert [target for target in links if not (ROOT / document).parent.joinpath(target).exists()] == []


def import_file(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def contributed(tmp_path: Path) -> dict[str, types.ModuleType]:
    """The two files that CONTRIBUTING.md writes out, imported; unregistered at the end."""
    variant, family = blocks(CONTRIBUTING, "python")
    modules = {}
    for name, code in {"gated_average": variant, "ernie": family}.items():
        (tmp_path / f"{name}.py").write_text(code)
        modules[name] = import_file(tmp_path / f"{name}.py")
    yield modules
    VARIANTS.unregister("gated_average")
    PATCHERS.unregister("ernie")


def context(is_causal: bool) -> LayerContext:
    return LayerContext(
        layer_idx=0, num_layers=1, hidden_size=8, num_heads=2, head_dim=4, max_length=64, is_causal=is_causal
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_variant_of_contributing_computes_its_formula(contributed: dict, is_causal: bool) -> None:
    torch.manual_seed(0)
    spec = VARIANTS.get("gated_average")
    layer = spec.module_class(spec.config_class(gate_bias=0.5), context(is_causal)).double()
    torch.nn.init.normal_(layer.direction)
    query, key, value = torch.randn(3, 2, 2, 7, 4, dtype=torch.float64)
    real = torch.tensor([[True] * 7, [False, True, True, False, True, True, False]])
    poisoned = [x.masked_fill(~real[:, None, :, None], float("inf")) for x in (key, value)]
    inputs = AttentionInputs(query, *poisoned, token_mask=real, is_causal=is_causal)
    output, state = layer(inputs)

    gate = torch.sigmoid((key @ layer.direction)[..., 0] + layer.bias[..., 0])  # [B, H, T]
    seen = real[:, None, None, :] & (torch.ones(7, 7).tril().bool() if is_causal else torch.ones(7, 7).bool())
    weights = gate[:, :, None, :] * seen
    expected = (weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)) @ value
    torch.testing.assert_close(output, expected)
    assert state is None


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_variant_of_contributing_keeps_the_contract(contributed: dict, is_causal: bool) -> None:
    assert check_variant("gated_average", is_causal) == []


def test_the_variant_of_contributing_refuses_bad_options(contributed: dict) -> None:
    with pytest.raises(ValueError, match=r"gate_bias=11; allowed: a number from -10 to 10"):
        VARIANTS.get("gated_average").config_class.from_dict({"gate_bias": 11})
    with pytest.raises(ValueError, match=r"Unknown option.*'bias'.*Allowed: gate_bias"):
        VARIANTS.get("gated_average").config_class.from_dict({"bias": 1})


def test_the_family_of_contributing_converts_and_reloads(contributed: dict, tmp_path: Path) -> None:
    from transformers import ErnieConfig, ErnieModel

    from hf_linear_attn.auto_config import register_auto_configs

    register_auto_configs()  # the import of the package does this for a file in patchers/
    torch.manual_seed(0)
    config = ErnieConfig(vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = convert_model(ErnieModel(config).eval(), "gated_average", gate_bias=1.0)
    ids = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        model.save_pretrained(tmp_path / "converted")
        again = AutoModel.from_pretrained(tmp_path / "converted").eval()(ids).last_hidden_state
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
