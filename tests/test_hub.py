"""Sharing on the Hub, as two people do it: one process pushes, others pull from a Hub server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_linear_attn import convert_model
from hf_linear_attn.hub import auto_map_for, prepare_for_hub
from hf_linear_attn.model_card import GENERATED_MARKER
from tests.hub_server import HubServer, run_hub_server
from tests.tiny import base_model

ROOT = Path(__file__).parents[1]
TOKENS = {"hf_tester": "tester", "hf_stranger": "stranger"}
REPOS = {
    "tester/bert": "AutoModelForSequenceClassification",
    "tester/roberta": "AutoModelForTokenClassification",
    "tester/gpt2": "AutoModelForCausalLM",
}

PUSH = """
import sys
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast, RobertaForTokenClassification,
)
from hf_linear_attn import convert_model
from tests.tiny import build, outputs_of, tiny_config, token_batch

vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(95))])}
inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
names = ["input_ids", "attention_mask"]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
)
models_to_push = {
    "tester/bert": (BertForSequenceClassification, "bert", {0: "performer", 1: "linformer"}),
    "tester/roberta": (RobertaForTokenClassification, "roberta", "linear"),
    "tester/gpt2": (GPT2LMHeadModel, "gpt2", {1: ("performer", {"num_features": 16})}),
}
expected = {}
for repo_id, (cls, family, variant) in models_to_push.items():
    model = convert_model(build(cls, tiny_config(family)), variant, max_length=200)
    expected[repo_id.replace("/", ".")] = outputs_of(model, token_batch())[0]
    print(model.push_to_hub(repo_id))
    tokenizer.push_to_hub(repo_id)
save_file(expected, sys.argv[1])
"""

PULL = """
import json, sys
import transformers
from safetensors.torch import save_file
assert "hf_linear_attn" not in sys.modules
mode, repos, target = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
options = {"trust_remote_code": True} if mode == "trusted" else {}
if mode == "imported":
    import hf_linear_attn
outputs = {}
for repo_id, auto_class in repos.items():
    model = getattr(transformers, auto_class).from_pretrained(repo_id, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo_id, **options)
    assert tokenizer("w0 w3")["input_ids"] == [2, 5], tokenizer("w0 w3")
    from tests.tiny import outputs_of, token_batch
    outputs[repo_id.replace("/", ".")] = outputs_of(model, token_batch())[0]
    model.save_pretrained(f"{target}.{repo_id.replace('/', '.')}")
save_file(outputs, target)
"""


def client(
    hub: HubServer, home: Path, code: str, *arguments: str, token: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process that talks to `hub` with a cache of its own under `home`."""
    environment = {**os.environ, **hub.environment(home, token), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with run_hub_server(TOKENS) as server:
        yield server


@pytest.fixture(scope="module")
def expected(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The three models of `REPOS` pushed from one process; their outputs there."""
    home = tmp_path_factory.mktemp("pusher")
    done = client(hub, home, PUSH, str(home / "expected.safetensors"), token="hf_tester")
    for repo_id in REPOS:
        assert f"{hub.url}/{repo_id}/commit/" in done.stdout
    return load_file(home / "expected.safetensors")


# The server itself, with nothing of this package


def test_hub_server_gives_back_what_huggingface_hub_uploads(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    content = {
        "a.txt": b"text",
        "inner/b.json": b"{}",
        "weights.safetensors": os.urandom(70_000),
        "empty": b"",
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    code = """
import sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, whoami
api = HfApi()
assert whoami()["name"] == "tester"
assert api.create_repo("data").repo_id == "tester/data"
assert api.create_repo("tester/data", exist_ok=True).repo_id == "tester/data"
first = api.upload_folder(repo_id="tester/data", folder_path=sys.argv[1])
api.upload_file(repo_id="tester/data", path_or_fileobj=b"new", path_in_repo="a.txt")
api.delete_file("inner/b.json", "tester/data")
print(snapshot_download("tester/data", revision=first.oid))
assert open(hf_hub_download("tester/data", "a.txt")).read() == "new"
assert sorted(api.list_repo_files("tester/data")) == ["a.txt", "empty", "weights.safetensors"]
"""
    with run_hub_server() as hub:
        done = client(hub, tmp_path / "home", code, str(folder), token="hf_tester")
        assert [commit.message for commit in hub.repos["tester/data"].branches["main"]][:2] == [
            "initial commit",
            "Upload folder using huggingface_hub",
        ]
    snapshot = Path(done.stdout.strip())
    assert {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()} == set(content)
    for name, data in content.items():
        assert (snapshot / name).read_bytes() == data, name


def test_hub_server_refuses_what_the_hub_refuses(tmp_path: Path) -> None:
    owner, stranger, wrong, nobody = "hf_tester", "hf_stranger", "hf_wrong", False
    new_file = {"path_or_fileobj": "README.md", "path_in_repo": "x"}
    cases: list[tuple[Any, str, dict[str, Any], str, str]] = [
        (owner, "create_repo", {"repo_id": "tester/open"}, "HfHubHTTPError", "409"),
        (wrong, "create_repo", {"repo_id": "tester/x"}, "HfHubHTTPError", "Invalid credentials"),
        (nobody, "create_repo", {"repo_id": "tester/x"}, "HfHubHTTPError", "Invalid username or password"),
        (stranger, "create_repo", {"repo_id": "tester/x"}, "HfHubHTTPError", "don't have the rights"),
        (stranger, "upload_file", {"repo_id": "tester/open", **new_file}, "HfHubHTTPError", "write access"),
        (stranger, "model_info", {"repo_id": "tester/secret"}, "RepositoryNotFoundError", "private or gated"),
        (nobody, "model_info", {"repo_id": "tester/secret"}, "RepositoryNotFoundError", "private or gated"),
        (
            nobody,
            "model_info",
            {"repo_id": "tester/open", "revision": "v9"},
            "RevisionNotFoundError",
            "Revision Not Found",
        ),
        (
            nobody,
            "hf_hub_download",
            {"repo_id": "tester/open", "filename": "no.txt"},
            "RemoteEntryNotFoundError",
            "no.txt",
        ),
    ]
    code = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("open")
api.create_repo("secret", private=True)
for token, call, arguments, *_ in json.loads(sys.argv[1]):
    try:
        getattr(HfApi(token=token), call)(**arguments)
        print("accepted")
    except Exception as error:
        print(type(error).__name__, *str(error).split())
"""
    with run_hub_server(TOKENS) as hub:
        done = client(hub, tmp_path, code, json.dumps(cases), token=owner)
    for (token, call, _, error, message), answer in zip(cases, done.stdout.splitlines(), strict=True):
        assert answer.startswith(error), (token, call, answer)
        assert message in answer, (token, call, answer)


# Pushed models, pulled by other people


@pytest.mark.parametrize("mode", [pytest.param("imported", marks=pytest.mark.slow), "trusted"])
def test_a_new_process_gets_bit_equal_outputs(
    mode: str, hub: HubServer, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """With the package imported, and with `trust_remote_code=True` where it is only installed."""
    target = tmp_path / "outputs.safetensors"
    client(hub, tmp_path / "home", PULL, mode, json.dumps(REPOS), str(target))
    pulled = load_file(target)
    assert pulled.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(pulled[name], tensor), name
    for repo_id in REPOS:
        # Saved again, it is as good as new: no code of the package is copied, no repository pointed at.
        folder = Path(f"{target}.{repo_id.replace('/', '.')}")
        assert [path.name for path in folder.glob("*.py")] == []
        assert "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("expected")
def test_a_process_without_the_plugin_gets_a_clear_error(hub: HubServer, tmp_path: Path) -> None:
    code = """
import importlib.abc, sys
from transformers import AutoModel, BertModel

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_linear_attn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def message(load, **options):
    try:
        load("tester/bert", **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"

print(message(AutoModel.from_pretrained))
sys.meta_path.insert(0, Missing())
print("====")
print(message(AutoModel.from_pretrained, trust_remote_code=True))
print("====")
print(message(BertModel.from_pretrained))
"""
    not_trusted, not_installed, upstream = client(hub, tmp_path, code).stdout.split("====")
    assert "trust_remote_code=True" in not_trusted
    assert "ValueError: " in not_trusted
    assert "pip install hf_linear_attn" in not_installed
    assert "linear_attn" in upstream
    assert "loaded" not in upstream


@pytest.mark.usefixtures("expected")
@pytest.mark.parametrize("repo_id", REPOS)
def test_the_repository_holds_card_loader_and_auto_map(repo_id: str, hub: HubServer) -> None:
    assert set(hub.head(repo_id).files) >= {"README.md", "config.json", "loader.py", "model.safetensors"}
    config = json.loads(hub.text(repo_id, "config.json"))
    assert config["auto_map"]["AutoConfig"].startswith("loader.LinearAttn")
    assert config["auto_map"][REPOS[repo_id]] == f"loader.{config['architectures'][0]}"
    card = ModelCard(hub.text(repo_id, "README.md"))
    data: Any = card.data
    assert data.library_name == "transformers"
    assert "hf-linear-attn" in data.tags
    assert f'{REPOS[repo_id]}.from_pretrained("{repo_id}")' in card.content
    assert "Not measured." in card.content
    assert data.eval_results is None
    assert str(ROOT) not in card.content


@pytest.mark.slow
def test_a_second_push_updates_and_keeps_a_card_written_by_hand(tmp_path: Path) -> None:
    code = """
import os, sys
import torch
from huggingface_hub import HfApi
from transformers import BertModel
from hf_linear_attn import convert_model
from hf_linear_attn.hub import save_and_push
from tests.tiny import build, tiny_config

os.chdir(sys.argv[1])
plain = build(BertModel, tiny_config("bert"))
plain.push_to_hub("tester/base")
def upload_card(text, repo, revision=None):  # ModelCard.push_to_hub would ask the public Hub whether it is valid
    HfApi().upload_file(
        path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo, commit_message="card", revision=revision
    )

upload_card("---\\nlicense: mit\\n---\\nThe base.", "tester/base")
model = convert_model(BertModel.from_pretrained("tester/base"), "linear")
model.push_to_hub("twice")
with torch.no_grad():
    model.encoder.layer[0].output.dense.weight.add_(1)
again = model.push_to_hub("twice", commit_message="second", tags="long-documents", revision="trained")
print(again.oid)
model.push_to_hub("twice", commit_message="third", license="apache-2.0")
save_and_push(model, "twice", commit_message="saved")
loaded = type(model).from_pretrained("tester/twice")
assert torch.equal(loaded.encoder.layer[0].output.dense.weight, model.encoder.layer[0].output.dense.weight)
with torch.no_grad():
    loaded.encoder.layer[0].output.dense.weight.add_(1)
loaded.push_to_hub("tester/twice", commit_message="reloaded")
upload_card("---\\ntags:\\n- mine\\n---\\nWritten by hand.", "tester/twice")
loaded.push_to_hub("tester/twice", commit_message="by hand")
upload_card("---\\ntags: []\\n---\\nOf the branch.", "tester/twice", "trained")
loaded.push_to_hub("tester/twice", commit_message="by hand on a branch", revision="trained")
loaded.push_to_hub("tester/twice", commit_message="in shards", max_shard_size="20KB")
zeros = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
save = dict(state_dict=zeros, push_to_hub=True, repo_id="tester/zeros", max_shard_size="1GB")
model.save_pretrained("zeros", False, **save)
assert not HfApi().repo_exists("tester/zeros")  # the main process alone pushes
model.save_pretrained("zeros", **save)
pushed = type(model).from_pretrained("tester/zeros").state_dict()
assert pushed.keys() == zeros.keys() and not any(x.any() for x in pushed.values())
"""
    with run_hub_server() as hub:
        done = client(hub, tmp_path / "home", code, str(tmp_path), token="hf_tester")
        repo = hub.repos["tester/twice"]
        trained = repo.branches["trained"][-3]
        assert done.stdout.split()[-1] == trained.oid
        cards: dict[str, Any] = {
            commit.message: ModelCard(commit.files["README.md"].content.decode())
            for history in repo.branches.values()
            for commit in history
            if "README.md" in commit.files
        }
        weights = [commit.files["model.safetensors"].oid for commit in repo.branches["main"][1:3]]
    assert weights[0] != weights[1] == trained.files["model.safetensors"].oid
    assert cards["Upload LinearAttnBertModel"].data.base_model == "tester/base"
    assert cards["Upload LinearAttnBertModel"].data.license == "mit", "inherited from the base model's card"
    assert "long-documents" in cards["second"].data.tags
    assert cards["third"].data.license == "apache-2.0"
    assert GENERATED_MARKER in cards["saved"].content, "save_pretrained(push_to_hub=True) makes the same card"
    assert (tmp_path / "twice" / "model.safetensors").is_file()
    # Loaded from its own repository, the model still knows what it was made from.
    assert cards["reloaded"].data.base_model == "tester/base"
    by_hand = cards["by hand"]
    assert "Written by hand." in by_hand.text
    assert GENERATED_MARKER not in by_hand.content
    assert by_hand.data.tags[0] == "mine"
    assert "linear" in by_hand.data.tags
    assert "Of the branch." in cards["by hand on a branch"].text
    files = repo.branches["main"][-1].files
    shards = {name for name in files if name.endswith(".safetensors")}
    assert shards == set(json.loads(files["model.safetensors.index.json"].content)["weight_map"].values())
    assert len(shards) > 1


def test_refused_pushes_say_why_and_create_nothing(tmp_path: Path) -> None:
    code = """
import sys
from transformers import BertModel
from hf_linear_attn import convert_model, revert_model
from hf_linear_attn.hub import push_to_hub
from tests.tiny import build, tiny_config

def message(push, *args, **options):
    try:
        push(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "pushed"

model = convert_model(build(BertModel, tiny_config("bert")), "linear")
print(message(model.push_to_hub, "tester/x", token="hf_wrong"))
print("====")
print(message(model.push_to_hub, "tester/x", token="hf_stranger"))
print("====")
print(message(model.push_to_hub, "tester/x", results={"rows": []}, token="hf_tester"))
print("====")
print(message(push_to_hub, revert_model(model), "tester/x", token="hf_tester"))
"""
    with run_hub_server(TOKENS) as hub:
        wrong, stranger, results, plain = client(hub, tmp_path, code).stdout.split("====")
        assert hub.repos == {}
    assert "Invalid credentials in Authorization header" in wrong
    assert "namespace 'tester'" in stranger
    assert "0 rows of the results fit" in results
    assert "convert_model" in plain


@pytest.mark.slow
@pytest.mark.usefixtures("expected")
def test_a_private_model_needs_a_token(hub: HubServer, tmp_path: Path) -> None:
    code = """
import sys
import hf_linear_attn
from transformers import AutoModel
for token in ("hf_tester", "hf_wrong", "hf_stranger", False):
    try:
        # No shared cache: the first of these loads would answer for the others.
        AutoModel.from_pretrained("tester/bert", token=token, cache_dir=f"{sys.argv[1]}/{token}")
        print("loaded")
    except OSError as error:
        print(" ".join(str(error).split()))
"""
    hub.repos["tester/bert"].private = True
    try:
        owner, wrong, stranger, nobody = client(hub, tmp_path, code, str(tmp_path)).stdout.splitlines()
    finally:
        hub.repos["tester/bert"].private = False
    assert owner == "loaded"
    assert "Invalid credentials" in wrong
    for answer in (stranger, nobody):
        assert "pass a token having permission to this repo" in answer


# Without a Hub


def test_a_prepared_folder_loads_without_running_its_loader(tmp_path: Path) -> None:
    """Where the package is imported, `auto_map` changes nothing and asks for no trust."""
    model = convert_model(base_model("bert"), "linear")
    model.save_pretrained(tmp_path)
    prepare_for_hub(model, tmp_path)
    (tmp_path / "loader.py").write_text("raise AssertionError('the loader ran')")
    for options in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        config = AutoConfig.from_pretrained(tmp_path, **options)
        assert type(config).__name__ == "LinearAttnBertConfig"
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
        assert type(classifier).__name__ == "LinearAttnBertForSequenceClassification"


def test_prepare_for_hub_needs_a_saved_model(tmp_path: Path) -> None:
    model = convert_model(base_model("bert"), "linear")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        prepare_for_hub(model, tmp_path)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_auto_map_names_every_head_that_transformers_knows(family: str) -> None:
    plain = base_model(family)
    upstream = type(plain.config)
    converted = convert_model(plain, "linear")
    mapped = auto_map_for(converted)
    assert mapped.pop("AutoConfig") == f"loader.LinearAttn{upstream.__name__}"
    assert {"AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"} <= mapped.keys()
    causal = AutoModelForCausalLM._model_mapping[upstream].__name__
    assert mapped["AutoModelForCausalLM"] == f"loader.LinearAttn{causal}"
    from hf_linear_attn import auto

    for name in mapped.values():
        assert getattr(auto, name.removeprefix("loader.")).config_class is type(converted.config)
