"""Saving over a folder: a reader finds the old model or the new one, whatever moment the process is killed at."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, BertModel
from transformers.utils import logging as transformers_logging

from hf_linear_attn import convert_model
from hf_linear_attn.saving import to_json, whole_folder, write_json
from tests.tiny import tiny_config

transformers_logging.disable_progress_bar()
IDS = torch.arange(3, 19).view(2, 8)
SINGLE, SHARDED = {}, {"max_shard_size": "8KB"}


def converted(seed: int, window_size: int = 4) -> Any:
    """Models of several seeds and windows have weights of the same names and shapes: a mix of two would load."""
    torch.manual_seed(seed)
    return convert_model(BertModel(tiny_config("bert")).eval(), "longformer", window_size=window_size)


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).last_hidden_state


def outcome(folder: Path) -> torch.Tensor | str:
    """What a reader of the folder gets: outputs of the model, or the error."""
    try:
        return outputs(AutoModel.from_pretrained(folder).eval())
    except (OSError, ValueError) as error:
        return str(error)


def kill_at(number: int, folder: Path) -> None:
    """Have this process killed at its `number`-th operation on a file below `folder`."""
    left = number

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event.partition(".")[0] not in ("open", "os", "shutil", "tempfile"):
            return
        if any(isinstance(arg, (str, os.PathLike)) and str(arg).startswith(str(folder)) for arg in args):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save_and_be_killed(number: int, folder: Path, form: dict[str, Any]) -> None:
    model = converted(1, window_size=2)
    kill_at(number, folder)
    model.save_pretrained(folder, **form)


def save_for_ever(folder: Path, seed: int, ready: Event) -> None:
    models, draw = [converted(0, window_size=4), converted(1, window_size=2)], random.Random(seed)
    ready.set()
    while True:
        for model in models:
            model.save_pretrained(folder, max_shard_size=draw.choice(["8KB", "1GB"]))


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start in no time and from a clean one: a fork of this one could wait for ever for its threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def exit_code(process: Any) -> int:
    """The exit status, or minus the signal that ended it."""
    process.join(100)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the process that saves does not end")
    return process.exitcode  # type: ignore[no-any-return]


needs_forkserver = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="starts a hundred processes, too many to spawn"
)


@needs_forkserver
@pytest.mark.parametrize(
    "forms",
    [
        (SINGLE, SINGLE),
        *(
            pytest.param(forms, marks=pytest.mark.slow)
            for forms in ((SHARDED, SINGLE), (SINGLE, SHARDED), (SHARDED, SHARDED))
        ),
    ],
)
def test_a_save_that_is_killed_leaves_the_old_model_the_new_one_or_an_error(
    tmp_path: Path, forms: tuple[dict[str, Any], dict[str, Any]], processes: Any
) -> None:
    old, new = converted(0, window_size=4), converted(1, window_size=2)
    expected = {"old": outputs(old), "new": outputs(new)}
    seen = []
    for number in range(1, 200):
        folder = tmp_path / f"killed_{number}"
        old.save_pretrained(folder, **forms[0])
        (folder / "README.md").write_text("mine")
        process = processes.Process(target=save_and_be_killed, args=(number, folder, forms[1]))
        process.start()
        status = exit_code(process)
        found = outcome(folder)
        if isinstance(found, str):
            assert "config.json" in found
            seen.append("error")
        else:
            equal = [name for name, output in expected.items() if torch.equal(output, found)]
            assert equal, f"killed at operation {number}: another model"
            seen += equal
        assert (folder / "README.md").read_text() == "mine"
        if status == 0:
            break
        assert status == -signal.SIGKILL
        new.save_pretrained(folder, **forms[1])  # and the next save is complete, and cleans up
        assert torch.equal(outcome(folder), expected["new"])
        assert not list(folder.glob(".saving*"))
    assert status == 0
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert list(dict.fromkeys(seen)) == ["old", "error", "new"]


@needs_forkserver
@pytest.mark.slow
def test_saves_that_are_killed_at_random_moments(tmp_path: Path, processes: Any) -> None:
    models = [converted(0, window_size=4), converted(1, window_size=2)]
    expected = [outputs(model) for model in models]
    draw = random.Random(0)
    models[0].save_pretrained(tmp_path / "model")
    for seed in range(40):
        ready = processes.Event()
        process = processes.Process(target=save_for_ever, args=(tmp_path / "model", seed, ready))
        process.start()
        assert ready.wait(100)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        assert exit_code(process) == -signal.SIGKILL
        found = outcome(tmp_path / "model")
        if isinstance(found, str):
            assert "config.json" in found
        else:
            assert any(torch.equal(found, output) for output in expected)


@pytest.mark.parametrize("forms", [(SHARDED, SINGLE), (SINGLE, SHARDED), ({"max_shard_size": "4KB"}, SHARDED)])
def test_weights_of_an_earlier_save_in_another_form_are_not_read(
    tmp_path: Path, forms: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    converted(0).save_pretrained(tmp_path, **forms[0])
    new = converted(1)
    new.save_pretrained(tmp_path, **forms[1])
    assert torch.equal(outcome(tmp_path), outputs(new))
    index = tmp_path / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    for name in ("README.md", "tokenizer.json", "notes/a.txt", "checkpoints/step_1/model.safetensors", "x.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    converted(0).save_pretrained(tmp_path, variant="fp16")
    converted(1).save_pretrained(tmp_path)
    for name in ("README.md", "tokenizer.json", "notes/a.txt", "checkpoints/step_1/model.safetensors", "x.safetensors"):
        assert (tmp_path / name).read_text() == name
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path, variant="fp16").eval()), outputs(converted(0)))
    assert torch.equal(outcome(tmp_path), outputs(converted(1)))


def test_a_save_that_fails_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = converted(0), converted(1)
    old.save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path / "fresh")
    assert sorted(tmp_path.iterdir()) == before
    assert torch.equal(outcome(tmp_path), outputs(old))


def test_a_model_can_be_saved_over_the_file_it_was_loaded_from(tmp_path: Path) -> None:
    converted(0).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path).eval()
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(model), expected)
    assert torch.equal(outcome(tmp_path), expected)


def test_saving_onto_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model' is a file; a folder is needed"):
        converted(0).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_files_have_the_rights_that_upstream_gives_them(tmp_path: Path) -> None:
    BertModel(tiny_config("bert")).save_pretrained(tmp_path / "upstream")
    converted(0).save_pretrained(tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).stat().st_mode == (tmp_path / "upstream" / name).stat().st_mode
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_two_processes_may_save_the_same_folder(tmp_path: Path) -> None:
    """What happens under `torchrun` where a user calls `save_pretrained` on every rank."""
    with whole_folder(tmp_path) as first:
        with whole_folder(tmp_path) as second:
            (second / "config.json").write_text("2")
        (first / "config.json").write_text("1")
    assert (tmp_path / "config.json").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_only_what_a_dead_process_of_this_machine_was_writing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: "rack-a-4711")
    with whole_folder(tmp_path) as stage:
        here = stage.name.removeprefix(".saving-").rsplit("-", 2)[0]
    dead = 2**22 + 1  # no process has this number
    others = [f".saving-{name}-abc" for name in (f"rack-{dead}", f"rack-a-4711-b-{dead}", "rack-a-4711-b", "x")]
    others.append(f".saving-{here}-{os.getpid()}-abc")  # it lives
    for name in (*others, f".saving-{here}-{dead}-abc"):
        (tmp_path / name).mkdir()
    with whole_folder(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("variant", ["fp16", "v1.0"])
def test_weights_of_a_variant_replace_those_of_its_earlier_save_alone(tmp_path: Path, variant: str) -> None:
    converted(0).save_pretrained(tmp_path)
    converted(1).save_pretrained(tmp_path, variant=variant)
    new = converted(2)
    new.save_pretrained(tmp_path, variant=variant, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / f"model.{variant}.safetensors").exists()
    again = type(new).from_pretrained(tmp_path, variant=variant)
    assert torch.equal(outputs(again), outputs(new))


def test_json_has_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    data = {"a": [float("nan"), 1.5, (float("inf"), None)], "b": {"c": float("-inf"), "d": "NaN"}}
    assert json.loads(to_json(data), parse_constant=refuse) == {
        "a": [None, 1.5, [None, None]],
        "b": {"c": None, "d": "NaN"},
    }
    write_json(tmp_path / "x.json", data)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)["b"]["d"] == "NaN"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
