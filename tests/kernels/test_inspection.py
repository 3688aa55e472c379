"""The inspection compiles without a GPU, reads the compiler's output right, and fails where it should."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn import kernels
from hf_linear_attn.kernels import inspection
from hf_linear_attn.kernels.launch import Launch
from tests.kernels import inspected


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(autouse=True)
def interpreter(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is interpreted here, and nothing compiled outlives the module."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", cache)


def _launch(name: str) -> Launch:
    return next(launch for launch in inspected.shipped_launches() if launch.name == name)


@pytest.mark.parametrize(("target", "instruction"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("gfx942", "mfma")])
def test_a_good_kernel_has_tensor_cores_and_no_problem(target: str, instruction: str) -> None:
    found = inspection.inspect_launch(_launch("good"), target)
    assert found.problems == []
    assert found.tensor_cores[instruction] > 0
    assert found.spills == found.stack_bytes == 0
    assert 16 < found.registers < 256
    # the operands, 64 x 64 in two bytes each, pass through shared memory, on AMD one at a time
    assert 64 * 64 * 2 <= found.shared_bytes <= 2 * 64 * 64 * 2


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("small-tile", "no wgmma instruction in dots of 16-bit inputs"),
        ("dot-claimed-in-vain", "no tensor-core instruction"),
        ("large", r"shared memory: \d+ bytes, the target has 232448"),
        ("spills", r"spills: \d+ times, \d+ bytes of local memory"),
    ],
)
def test_each_fault_is_found(name: str, problem: str) -> None:
    (found,) = inspection.inspect_launch(_launch(name), "sm_90").problems
    assert re.fullmatch(problem, found)


def test_a_kernel_that_does_not_compile_is_a_problem() -> None:
    launch = dataclasses.replace(_launch("good"), constants={**_launch("good").constants, "SIZE": 63})
    (found,) = inspection.inspect_launch(launch, "sm_90").problems
    assert found.startswith("does not compile: ")


def test_arguments_without_a_type_or_unknown_are_named() -> None:
    launch = dataclasses.replace(_launch("good"), signature={"a": "*bf16", "b": "*bf16", "stride": "i32"})
    with pytest.raises(ValueError, match=r"without a type or value: out, not taken: stride"):
        inspection.inspect_launch(launch, "sm_90")


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="Unset it"):
        inspection.inspect_launch(_launch("good"), "sm_90")


@pytest.mark.parametrize(("only", "status"), [("good", 0), ("small-tile", 1), ("large", 0), ("none", 1)])
def test_the_command_fails_for_default_configurations_alone(
    only: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "kernels.json"
    arguments = ["--modules", inspected.__name__, "--only", only, "--targets", "sm_90", "--jobs", "1"]
    assert inspection.main([*arguments, "--output", str(output)]) == status
    printed = capsys.readouterr()
    if only == "none":
        assert "'none'" in printed.err
        return
    (row,) = json.loads(output.read_text())["kernels"]
    assert (row["config"], row["target"], bool(row["problems"])) == (only, "sm_90", only != "good")
    assert only in printed.out.splitlines()[1]
    assert ("error: " in printed.err, "note: " in printed.err) == (only == "small-tile", only == "large")


def _forward(module: str) -> Launch:
    """The first forward kernel in bfloat16 that a module ships for sm_90 by default."""
    launches = [x for x in inspection._launches(module) if x.is_default and "bf16" in x.name]
    launches = [x for x in launches if not x.targets or "sm_90" in x.targets]
    return next(x for x in launches if inspection._jit_function(x.kernel).__name__.endswith("_fwd_kernel"))


@pytest.mark.parametrize("module", inspection.kernel_modules())
def test_a_forward_kernel_of_each_family_compiles(module: str) -> None:
    """The interpreter runs what the compiler refuses: returns of two dtypes, say."""
    assert inspection.inspect_launch(_forward(module), "sm_90").problems == []


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_every_shipped_configuration(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    assert inspection.main(["--output", str(output)]) == 0
    rows = json.loads(output.read_text())["kernels"]
    assert {row["target"] for row in rows} == set(inspection.TARGETS)


def test_every_kernel_of_the_package_is_shipped_by_a_configuration() -> None:
    from triton.runtime.jit import JITFunction

    modules = [importlib.import_module(name) for name in inspection.kernel_modules()]
    shipped = {inspection._jit_function(launch.kernel).__name__ for m in modules for launch in m.shipped_launches()}
    defined = {
        name
        for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert defined == shipped
