"""Long work that is cut off, told wrongly, or shared: what is kept, what is refused, what ends with the same bits."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from transformers.utils import logging
from typer.testing import CliRunner

from hf_linear_attn.cli import app
from hf_linear_attn.seam.trainer import last_checkpoint
from hf_linear_attn.training import TransferTrainer, UptrainTrainer
from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.run import train
from hf_linear_attn.training.stage import StageTrainer
from tests.training.test_run import STAGES, assert_same, snapshot, staged_recipe, weights

ROOT = Path(__file__).parents[2]
runner = CliRunner(env={"COLUMNS": "200"})

# One process imports everything and forks each attempt, which may be killed: an import takes longer than the run.
FORKS = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.run import train
import safetensors.torch, transformers.trainer

def dying(function, calls, before=False):
    # killed before its n-th call, or when half of what it should write is written
    def call(*args, **kwargs):
        calls[0] -= 1
        if calls[0] == 0:
            if before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            for path in [arg for arg in args if isinstance(arg, (str, os.PathLike))]:
                if os.path.isfile(path):
                    os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def attempt(recipe, within, calls):
    if within == "replace":
        os.replace = dying(os.replace, [calls], before=True)
    elif within == "save":
        torch.save = dying(torch.save, [calls])
    elif within == "weights":
        own = transformers.modeling_utils.safe_save_file
        transformers.modeling_utils.safe_save_file = dying(own, [calls])
    elif within == "state":
        own = transformers.trainer_callback.TrainerState.save_to_json
        transformers.trainer_callback.TrainerState.save_to_json = dying(own, [calls])
    train(recipe, resume=True, on_step=lambda share: None)

print("ready", flush=True)
for line in sys.stdin:
    path, within, calls, seconds = line.split()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            attempt(Recipe.from_yaml(path), within, int(calls))
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        os._exit(status)
    end = time.monotonic() + float(seconds)
    done, status = 0, 0
    while not done:
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    print("answer", status, flush=True)
"""


class Attempts:
    """Runs of a recipe in processes that may be killed."""

    def __init__(self, folder: Path) -> None:
        script = folder / "forks.py"
        script.write_text(FORKS)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": (folder / "stderr").open("w")}
        self.process = subprocess.Popen([sys.executable, str(script)], env=environment, text=True, **pipes)
        self.folder = folder
        self.wait("ready")

    def wait(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise AssertionError((self.folder / "stderr").read_text())

    def run(self, recipe: Recipe, within: str = "nothing", calls: int = 0, seconds: float = 200.0) -> bool:
        """Whether it ended, rather than being killed; any other end is a failure."""
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe.to_dict()))
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path} {within} {calls} {seconds}\n")
        self.process.stdin.flush()
        status = int(self.wait("answer"))
        assert status in (0, signal.SIGKILL), (self.folder / "stderr").read_text()
        return status == 0


@pytest.fixture
def attempts(tmp_path: Path) -> Any:
    made = Attempts(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()


@pytest.mark.slow
def test_killed_at_ten_random_moments_a_run_ends_with_the_same_bits(tmp_path: Path, attempts: Attempts) -> None:
    recipe = staged_recipe(tmp_path, training={"save_steps": 1, "save_total_limit": 2})
    start = time.monotonic()
    assert attempts.run(recipe)
    whole = time.monotonic() - start
    other = recipe.replace(training={"output_dir": str(tmp_path / "killed")})
    draw, kills, tries = random.Random(0), 0, 0
    while kills < 10 and tries < 40:  # a run that was faster than its kill is finished: it begins anew
        tries += 1
        if attempts.run(other, seconds=draw.uniform(0.05, 0.6) * whole):
            assert_same(weights(tmp_path / "run"), weights(tmp_path / "killed"))
            other = recipe.replace(training={"output_dir": str(tmp_path / f"killed-{tries}")})
        else:
            kills += 1
    assert kills == 10
    assert attempts.run(other)
    assert_same(weights(tmp_path / "run"), weights(other.output_dir))
    one, two = (json.loads((path / "train_result.json").read_text()) for path in (tmp_path / "run", other.output_dir))
    assert (one["metrics"]["accuracy"], one["predictions"]) == (two["metrics"]["accuracy"], two["predictions"])
    assert (one["conversion"], one["groups"]) == (two["conversion"], two["groups"])


EARLY_AND_LATE = (1, 2, 3, 5, 8, 11, 14)


@pytest.mark.parametrize(
    ("within", "calls", "least"),
    [
        pytest.param("weights", (2,), 1, id="weights once"),
        *(
            pytest.param(within, EARLY_AND_LATE, 3, marks=pytest.mark.slow, id=within)
            for within in ("replace", "save", "weights", "state")
        ),
    ],
)
def test_killed_within_a_write_a_run_ends_with_the_same_bits(
    within: str, calls: tuple[int, ...], least: int, tmp_path: Path, attempts: Attempts
) -> None:
    recipe = staged_recipe(tmp_path, training={"save_steps": 2})
    assert attempts.run(recipe)
    other = recipe.replace(training={"output_dir": str(tmp_path / "killed")})
    kills = sum(not attempts.run(other, within, call) for call in calls)
    assert kills >= least
    assert attempts.run(other)
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "killed"))


# The command's sentences --------------------------------------------------------------------------------------------


def command(recipe: Recipe, folder: Path, *flags: str) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    return runner.invoke(app, ["train", str(path), *flags])


def sentence(result: Any) -> str:
    """The one line that a command which failed leaves."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return errors[0]


@pytest.fixture(autouse=True)
def _memory_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_linear_attn.training.setup.reuse_freed_memory", lambda: None)


@pytest.fixture
def _trainers_bar_alone() -> Iterator[None]:
    """Without the bars of written shards, which end a line, an error's sentence would follow Trainer's bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if shown:
        logging.enable_progress_bar()


@pytest.mark.usefixtures("_trainers_bar_alone")
def test_a_loss_that_is_not_finite_ends_the_command_with_the_last_checkpoint_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = staged_recipe(tmp_path, "gpt2", training={"save_steps": 1, "disable_tqdm": False})
    own = StageTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = own(self, *args, **kwargs)
        broken = isinstance(self, UptrainTrainer) and self.state.global_step == 2
        return loss * float("nan") if broken else loss

    monkeypatch.setattr(UptrainTrainer, "compute_loss", poisoned)
    said = sentence(command(recipe, tmp_path))
    assert "The loss is not finite at step 3; no weights were written since the last checkpoint" in said
    run = tmp_path / "run"
    assert last_checkpoint(run) == str(run / "checkpoint-2")
    assert (run / "2-distill" / "model.safetensors").is_file()
    assert not (run / "model.safetensors").exists()
    assert not (run / "train_result.json").exists()
    monkeypatch.undo()
    assert command(recipe, tmp_path, "--resume").exit_code == 0  # the data was mended, say


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = staged_recipe(tmp_path, training={"save_strategy": "no"})
    own = TransferTrainer.train

    def train_and_break(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        with torch.no_grad():
            next(p for p in self.model.parameters() if p.requires_grad).fill_(float("inf"))
        return output

    monkeypatch.setattr(TransferTrainer, "train", train_and_break)
    assert "not finite: nothing is saved" in sentence(command(recipe, tmp_path))
    assert not (tmp_path / "run" / "1-transfer" / "model.safetensors").exists()


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.usefixtures("_trainers_bar_alone")
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("torch.save", FULL),
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")),
        ("transformers.modeling_utils.safe_save_file", "safetensors"),
        ("transformers.trainer_callback.TrainerState.save_to_json", FULL),
    ],
)
def test_a_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(
    place: str, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if error == "safetensors":
        from safetensors import SafetensorError

        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    training = {"save_steps": 1, "disable_tqdm": False}
    recipe = staged_recipe(tmp_path, "gpt2", stages=STAGES["gpt2"][:1], training=training)
    expected = train(recipe.replace(training={"output_dir": str(tmp_path / "whole")}))
    import importlib

    head, _, name = place.rpartition(".")
    owner: Any
    try:
        owner = importlib.import_module(head)
    except ModuleNotFoundError:
        module, _, cls = head.rpartition(".")
        owner = getattr(importlib.import_module(module), cls)
    own, per_checkpoint = getattr(owner, name), 2 if place == "torch.save" else 1
    calls = [0]

    def full(*args: Any, **kwargs: Any) -> Any:
        if "checkpoint-3" in str(args) + str(kwargs):
            raise error
        calls[0] += 1
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    said = sentence(command(recipe, tmp_path))
    assert "No space left on device" in said or "could not be written" in said
    assert calls[0] >= per_checkpoint
    run = tmp_path / "run"
    assert last_checkpoint(run) == str(run / "checkpoint-2")
    assert not (run / "checkpoint-3").exists()  # the half of one would fill the disk still
    assert not (run / "model.safetensors").exists()
    monkeypatch.undo()
    assert command(recipe, tmp_path, "--resume").exit_code == 0
    assert_same(weights(expected.output_dir), weights(run))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_result_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = staged_recipe(tmp_path, stages=STAGES["bert"][2:])
    own = Path.write_text

    def full(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        return own(Path("/dev/full") if "train_result" in self.name else self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device" in sentence(command(recipe, tmp_path))
    monkeypatch.undo()
    assert command(recipe, tmp_path, "--resume").exit_code == 0


def test_two_runs_cannot_write_one_folder(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path)
    train(recipe, until_stage="transfer")
    held = snapshot(tmp_path / "run")
    with FileLock(tmp_path / "run" / ".lock"):
        for flag in ("--resume", "--overwrite"):
            assert "Another run writes to" in sentence(command(recipe, tmp_path, flag))
        now = snapshot(tmp_path / "run")
    now.pop(".lock")
    assert now == held


def test_the_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    script = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(run / ".lock")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(BlockingIOError, match="Another run writes to"):
            train(recipe)
        holder.kill()
    assert (run / ".lock").exists()
    assert train(recipe, until_stage="transfer").last.steps == 4
    assert not (run / ".lock").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["evaluation.metrics=[acuracy]"], "Did you mean 'accuracy'"),
        (["training.learning_rate=-1"], "learning_rate must be a finite number above 0"),
        (["training.learning_rate=.nan"], "learning_rate must be a finite number above 0"),
        (["distill.new_learning_rate=.inf"], "new_learning_rate must be a finite number above 0"),
        (["training.output_dir=documents/train/fruit/0.txt/run"], "is a file"),
        (["data.source=nowhere.csv"], "nowhere.csv"),
        (["training.max_stepz=3"], "Did you mean max_steps"),
    ],
)
def test_a_mistake_ends_the_command_before_anything_is_written(
    changes: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = staged_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    held = set(snapshot(tmp_path))
    flags = [flag for change in changes for flag in ("--set", change)]
    assert message in sentence(command(recipe, tmp_path, *flags))
    assert set(snapshot(tmp_path)) == held
    assert not (tmp_path / "run").exists()


def test_a_resume_under_other_settings_is_one_sentence(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path)
    train(recipe, until_stage="transfer")
    said = sentence(command(recipe, tmp_path, "--resume", "--set", "training.seed=1"))
    assert "seed=0 there and 1 here" in said
