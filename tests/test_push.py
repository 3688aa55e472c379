"""`hf-linear-attn push`, as its users run it: from a folder to a Hub server on loopback, and back in a new process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_linear_attn.cli import app
from hf_linear_attn.hub import load_converted
from hf_linear_attn.model_card import GENERATED_MARKER
from tests.hub_server import HubServer, StoredFile, run_hub_server
from tests.test_cli_folders import files, sentence_encoder
from tests.test_hub import ROOT, TOKENS, client
from tests.tiny import outputs_of, token_batch

pytestmark = pytest.mark.slow

STAGE = {
    "stage": "distill",
    "trained": "all parameters",
    "steps": 60,
    "tokens_seen": 29_700,
    "max_length": 512,
    "seconds": 497.9,
    "losses": [[30, 0.9], [60, 0.0512]],
    "parameters_trained": 4_527_630,
}
TRAINED = {"stages": [STAGE], "conversion": {"rows": [{"output_error": 0.25}, {"output_error": 0.5}]}}

# One process that pushes: a line of JSON with arguments and token gives one with exit status and output.
PUSHER = """
import json, os, sys
from typer.testing import CliRunner
from hf_linear_attn.cli import app
for line in sys.stdin:
    arguments, token = json.loads(line)
    os.environ["HF_TOKEN"] = token
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["push", *arguments])
    print("", json.dumps([result.exit_code, result.output]), sep="\\n", flush=True)
"""
PULL = """
import sys
import transformers
from safetensors.torch import save_file
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
from tests.tiny import outputs_of, token_batch
save_file({"logits": outputs_of(model, token_batch())[0]}, sys.argv[2])
"""


class Pusher:
    """`hf-linear-attn push` in a process of its own; `hub` is what it talks to."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        environment = {**os.environ, **hub.environment(home), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", PUSHER], cwd=ROOT, env=environment, **pipes)
        self.hub = hub

    def run(self, *arguments: object, token: str = "hf_tester") -> tuple[int, str]:
        """Exit status and output of one push."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([[*map(str, arguments)], token]) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("[") and line.endswith("]\n"):
                status, output = json.loads(line)
                return status, output
        raise AssertionError("the process has ended")

    def done(self, *arguments: object) -> str:
        """The output of a push that succeeds."""
        status, output = self.run(*arguments)
        assert status == 0, output
        return output

    def refused(self, *arguments: object, token: str = "hf_tester") -> str:
        """The one line that a refused push leaves."""
        status, output = self.run(*arguments, token=token)
        said = [line for line in output.splitlines() if line.startswith("Error: ")]
        assert (status, len(said)) == (1, 1), output
        assert "Traceback" not in output
        return said[0]


@pytest.fixture(scope="module")
def pusher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pusher]:
    with run_hub_server(TOKENS) as server:
        pusher = Pusher(server, tmp_path_factory.mktemp("home"))
        yield pusher
        pusher.process.kill()
        pusher.process.wait()


@pytest.fixture
def hub(pusher: Pusher) -> HubServer:
    pusher.hub.repos.clear()
    return pusher.hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder that `convert` made, with a run's remains beside it."""
    place = tmp_path_factory.mktemp("converted")
    source = sentence_encoder(place / "source")
    arguments = ["convert", str(source), "linear", "--calibration", "none", "--output", str(place / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (place / "out" / "checkpoint-5").mkdir()
    for name in ("checkpoint-5/optimizer.pt", "optimizer.pt", "trainer_state.json", "stages.json"):
        (place / "out" / name).write_text("{}")
    return place / "out"


def test_a_folder_comes_back_in_a_new_process_with_all_that_was_of_use(
    pusher: Pusher, hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    said = pusher.done(folder, "encoder", "--base-model", "tester/base", "--license", "mit")
    assert f"Pushed to {hub.url}/tester/encoder/commit/" in said
    history = hub.repos["tester/encoder"].branches["main"]
    assert len(history) == 2, "one commit after the repository's first: half a model is never there"
    assert set(history[-1].files) == {
        *("README.md", "LICENSE", "config.json", "loader.py", "model.safetensors", "modules.json"),
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
        *("sentence_bert_config.json", "config_sentence_transformers.json"),
        *(name for name in files(folder) if name.startswith(("tokenizer", "vocab", "chat_template"))),
    }
    card = ModelCard(hub.text("tester/encoder", "README.md"))
    assert card.data.license == "mit"  # type: ignore[attr-defined]
    assert card.data.base_model == "tester/base"  # type: ignore[attr-defined]
    client(hub, tmp_path / "other", PULL, "tester/encoder", str(tmp_path / "logits"))
    expected = outputs_of(load_converted(folder).eval(), token_batch())[0]
    assert torch.equal(load_file(tmp_path / "logits")["logits"], expected)


def test_a_card_is_renewed_alone_and_says_what_training_did(
    pusher: Pusher, hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    repo = "tester/encoder"
    assert "holds no model" in pusher.refused(folder, repo, "--card-only")
    assert not hub.repos
    pusher.done(folder, repo, "--private")
    assert hub.repos[repo].private
    assert "## Training" not in hub.text(repo, "README.md")
    trained = tmp_path / "trained"
    shutil.copytree(folder, trained)
    (trained / "train_result.json").write_text(json.dumps(TRAINED))
    pusher.done(trained, "encoder", "--card-only", "--message", "card")
    before, after = hub.repos[repo].branches["main"][-2:]
    assert after.message == "card"
    assert {name for name in after.files if after.files[name] != before.files.get(name)} == {"README.md"}
    card = hub.text(repo, "README.md")
    assert "| distill | all parameters | 4,527,630 | 60 | 29,700 | 512 | 498 | 0.0512 |" in card
    assert "differed from softmax attention by 0.25 to 0.50 of its norm" in card
    by_hand = StoredFile((card.replace(GENERATED_MARKER, "") + "\nMine.\n").encode(), False)
    hub.repos[repo].commit("main", "by hand", {**after.files, "README.md": by_hand})
    pusher.done(folder, repo)
    assert hub.text(repo, "README.md").endswith("\nMine.\n")


def test_an_interrupted_push_leaves_the_revision_that_was_there(
    pusher: Pusher, hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    repo, changed = "tester/encoder", tmp_path / "changed"
    pusher.done(folder, repo)
    first, held = hub.head(repo), len(hub.lfs)
    shutil.copytree(folder, changed)
    model = load_converted(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(changed)
    hub.failing = f"/{repo}/commit/"
    try:
        assert "500" in pusher.refused(changed, repo)
    finally:
        hub.failing = ""
    assert hub.head(repo) is first
    assert len(hub.lfs) == held + 1, "the weights were on their way"
    hub.requests.clear()
    pusher.done(changed, repo)
    assert hub.head(repo).files["model.safetensors"] != first.files["model.safetensors"]
    assert not [request for request in hub.requests if "/lfs-store/" in request], (
        "weights that are there are sent again"
    )


def test_what_cannot_be_pushed_is_a_sentence_and_makes_no_repository(
    pusher: Pusher, hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    load_converted(folder).save_pretrained(bare)
    for arguments, said in (
        ([tmp_path / "nowhere", "x"], "is no folder"),
        ([sentence_encoder(tmp_path / "plain"), "x"], "holds no converted model"),
        ([bare, "x"], "tokenizer"),
        ([folder, "x", "--card-from", tmp_path / "no.json"], "is no file"),
        ([folder, "stranger/x"], "stranger"),
    ):
        assert said in pusher.refused(*arguments)
    assert "Invalid" in pusher.refused(folder, "tester/x", token="")
    assert not hub.repos
