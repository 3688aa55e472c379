"""The script of a machine with a GPU, without one: leases are rare, and what is wrong before a launch costs one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn.bench.speed.recipe import BenchRecipe
from hf_linear_attn.ops.base import backend
from hf_linear_attn.testing.on_gpu import Watched, gpu

ROOT = Path(__file__).parents[1]
# Of the extras, and not among what PyTorch, Triton and Transformers bring: a GPU machine has none of them.
MISSING = (
    *("accelerate", "datasets", "entmax", "evaluate", "fla", "gguf", "hypothesis", "kernels", "linformer"),
    *("matplotlib", "nbmake", "nystrom_attention", "onnx", "onnxruntime", "peft", "performer_pytorch", "psutil"),
    *("pytest_timeout", "reformer_pytorch", "rich", "sentence_transformers", "sklearn", "tensorboard", "torchao"),
    *("trl", "xdist"),
)
BARE = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
import pytest
sys.exit(pytest.main({arguments!r}))
"""


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / ".ci" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Commands:
    """In place of `subprocess.Popen`: what would run, and that it goes well."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> Any:
        self.seen.append(command)
        printed = None if options["stdout"] is None else iter(["one line\n"])
        return SimpleNamespace(stdout=printed, wait=lambda: 0, kill=lambda: None)


def test_no_test_for_a_gpu_imports_what_a_bare_machine_lacks(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collected as `make test-gpu` collects, in a process where those imports fail; then shared out, none twice."""

    def bare(command: list[str], **options: Any) -> Any:
        arguments = command[command.index("pytest") + 1 :]
        run = [sys.executable, "-c", BARE.format(missing=MISSING, arguments=arguments)]
        environment = {**options.pop("env"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return real(run, env=environment, **options)

    real, commands = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", bare)
    monkeypatch.setattr(script, "_run", lambda given, *args, **options: commands.extend(given) or 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in MISSING else name)
    assert script.run_tests(None, []) == 0
    assert len(commands) == 12
    names = [[x for x in command if "::" in x] for command in commands]
    assert len({x for group in names for x in group}) == sum(map(len, names)) > 100
    for group in names:
        dtypes = [next((i for i, dtype in enumerate(("bf16", "fp16", "fp32")) if dtype in x), 0) for x in group]
        assert dtypes == sorted(dtypes)


def test_the_kernels_come_first(script: ModuleType) -> None:
    files = script.marked_tests()
    of_kernels = [path.startswith("tests/kernels/") for path in files]
    assert 0 < sum(of_kernels) < len(files)
    assert of_kernels == sorted(of_kernels, reverse=True)


def test_what_runs_under_memcheck_is_launched(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel but those of decode steps and of exponential features, forward and backward."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(backend, "machine_refusal", lambda *args, **options: None)
    launched: list[str] = []
    monkeypatch.setattr(Watched, "launched", lambda self, kernel, *given: launched.append(kernel.fn.__name__))
    with gpu(), Watched():
        exec(script.MEMCHECK, {})
    expected = {
        *(f"linear_attention_{name}_kernel" for name in ("sums", "scan", "fwd", "delta", "bwd")),
        *(f"gated_{name}_kernel" for name in ("reach", "sums", "scan", "fwd", "delta", "query_key_bwd", "value_bwd")),
        "mapped_sums_kernel",
        "mapped_attention_kernel",
        *(f"block_sparse_{name}_kernel" for name in ("fwd", "dq", "dkv")),
    }
    assert set(launched) == expected


@pytest.mark.parametrize("action", ["test", "bench"])
def test_an_action_from_start_to_end(
    action: str, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = _Commands()
    monkeypatch.setattr(subprocess, "Popen", commands)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    listed = SimpleNamespace(stdout="a.py::b\na.py::c[bf16]\n", stderr="", returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: listed)
    monkeypatch.setattr(script.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu.py", action, "--further"])
    assert script.main() == 0
    if action == "test":
        *tests, memcheck = commands.seen
        assert [command[-1] for command in tests] == ["a.py::b", "a.py::c[bf16]"]
        assert f"--junitxml={tmp_path / 'gpu-tests-0.xml'}" in tests[0]
        assert (tmp_path / "gpu-tests.txt").read_text() == "one line\none line\n"
        assert memcheck[0] == "/usr/bin/compute-sanitizer"
    else:
        ((*_, bench, recipe, _, output, _, further),) = commands.seen
        assert (bench, output, further) == ("bench", "recipes/bench/results", "--further")
        assert BenchRecipe.from_yaml(ROOT / recipe).device == "cuda"


def test_what_prints_as_it_goes_is_kept_when_its_time_is_over(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "import time; print('first', flush=True); time.sleep(60)"
    assert script._run([[sys.executable, "-c", text]], 5, log=tmp_path / "log.txt") == 1
    assert (tmp_path / "log.txt").read_text() == "first\n"
    assert "Stopped after 5 s" in capfd.readouterr().err
