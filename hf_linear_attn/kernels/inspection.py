"""What the shipped kernels compile to, without a GPU: registers, shared memory, spills and tensor-core instructions.

    python -m hf_linear_attn.kernels.inspection --output outputs/kernels.json

Every `Launch` that a module of this package names in `shipped_launches()` is compiled for each target. The exit
status is 1 when a default configuration does not compile, spills, needs more shared memory than the target has, or
says that it uses tensor cores and none show in its code. Needs Triton, which brings the compilers and disassemblers.
`hf-linear-attn bench --kernels` inspects what the layers of each method launch instead (`launch_as_called`).

Sources of the limits: CUDA C programming guide, "Technical specifications per compute capability" (opt-in shared
memory per block); AMD CDNA3 instruction set architecture, "Local data share".
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_linear_attn.kernels.launch import Launch

__all__ = [
    "TARGETS",
    "Inspection",
    "Target",
    "inspect_launch",
    "kernel_modules",
    "launch_as_called",
    "main",
    "problems_of",
    "sources",
]


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        backend: Triton's name of the compiler, `"cuda"` or `"hip"`.
        arch: compute capability times ten, or AMD's name.
        warp_size: threads of a warp.
        shared_bytes: shared memory that one program can have.
        tensor_cores: what a dot compiles to there: a name and a pattern of its instructions.
        half_dots: the name that dots of 16-bit inputs must show.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    tensor_cores: Mapping[str, str]
    half_dots: str


TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 166_912, {"mma": r"\b[HID]MMA\b"}, "mma"),
    "sm_90": Target("cuda", 90, 32, 232_448, {"wgmma": r"\b[HIQ]GMMA\b", "mma": r"\b[HID]MMA\b"}, "wgmma"),
    "gfx942": Target("hip", "gfx942", 64, 65_536, {"mfma": r"\bv_s?mfmac?_"}, "mfma"),
}


@dataclass(frozen=True)
class Inspection:
    """What one configuration of one kernel compiled to for one target.

    Attributes:
        kernel: name of the function.
        config: name of the configuration.
        target: key of `TARGETS`.
        num_warps: warps of a program.
        num_stages: stages of software pipelining.
        is_default: whether a call chooses this configuration by itself.
        registers: vector registers of a thread; None where it did not compile.
        shared_bytes: shared memory of a program.
        spills: instructions that access local memory (NVIDIA) or registers spilled (AMD).
        stack_bytes: local memory of a thread.
        tensor_cores: number of instructions by kind.
        instructions: of the whole kernel, NVIDIA only.
        load_waits: in loops, how many asynchronous copies may still be under way after each wait for some: 0 hides
            none of them behind the products of a chunk. NVIDIA only.
        dot_waits: in loops, waits for tensor cores that let no product run on. Hopper only.
        problems: what a default configuration must not show.
    """

    kernel: str
    config: str
    target: str
    num_warps: int
    num_stages: int
    is_default: bool
    registers: int | None = None
    shared_bytes: int | None = None
    spills: int | None = None
    stack_bytes: int | None = None
    tensor_cores: Mapping[str, int] = field(default_factory=dict)
    instructions: int | None = None
    load_waits: Sequence[int] = ()
    dot_waits: int | None = None
    problems: Sequence[str] = ()


def kernel_modules() -> list[str]:
    """Names of the modules of this package that ship kernels: those with a function `shipped_launches`."""
    package = importlib.import_module("hf_linear_attn.kernels")
    names = sorted(module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
    entries = {name: getattr(importlib.import_module(name), _ENTRY, None) for name in names}
    # Not where it is only imported from another module.
    return [name for name, entry in entries.items() if entry is not None and entry.__module__ == name]


def sources() -> dict[str, str]:
    """A digest of the source of all kernels, by folder of this package: what a report was made of."""
    from triton.runtime.jit import JITFunction

    package = importlib.import_module("hf_linear_attn.kernels")
    found: dict[str, dict[str, str]] = {}
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.name:
                found.setdefault(module.name.split(".")[2], {})[name] = inspect.getsource(value.fn)
    texts = {folder: "\n".join(text for _, text in sorted(texts.items())) for folder, texts in found.items()}
    return {folder: hashlib.sha256(text.encode()).hexdigest()[:16] for folder, text in sorted(texts.items())}


def launch_as_called(kernel: Any, arguments: Mapping[str, Any], name: str) -> Launch:
    """The configuration that a call of a `triton.jit` function compiles to.

    Args:
        kernel: the function.
        arguments: of the call, by name, with the compiler's options among them.
        name: what to call it in reports.
    """
    kernel = _jit_function(kernel)
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            constants[parameter.name] = value
        elif hasattr(value, "dtype"):
            signature[parameter.name] = f"*{_TYPES[str(value.dtype).removeprefix('torch.')]}"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            aligned = value % 16 == 0 and not parameter.do_not_specialize
            signature[parameter.name] = ("i32" if abs(value) < 1 << 31 else "i64") + ":16" * aligned
    given = {option: arguments.get(option, default) for option, default in (("num_warps", 4), ("num_stages", 3))}
    return Launch(kernel, name, signature, constants, **given, uses_dot=False)


def inspect_launch(launch: Launch, target: str) -> Inspection:
    """Compile one configuration for one target and read what came out.

    Args:
        launch: the configuration. Pointers count as aligned to 16 bytes, as PyTorch's are; an integer type with
            the suffix `:16` as divisible by 16.
        target: key of `TARGETS`.

    Raises:
        KeyError: for an unknown target.
        RuntimeError: when Triton's interpreter is on: nothing is compiled then.
        ValueError: when an argument of the kernel has neither a type nor a value, or one that it does not have.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled. Unset it.")
    place = TARGETS[target]
    kernel = _jit_function(launch.kernel)
    identity: dict[str, Any] = {
        "kernel": kernel.__name__,
        "config": launch.name,
        "target": target,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "is_default": launch.is_default,
    }
    signature, attributes = _signature(kernel, launch)
    source = ASTSource(kernel, signature, dict(launch.constants), attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    try:
        compiled = triton.compile(source, GPUTarget(place.backend, place.arch, place.warp_size), options)
    except (triton.TritonError, RuntimeError) as error:  # RuntimeError: a pass of the compiler gave up
        return Inspection(**identity, problems=[f"does not compile: {_reason(error)}"])
    read = _read_cubin if place.backend == "cuda" else _read_amdgcn
    code, resources = read(compiled)
    counts = {name: len(re.findall(pattern, code)) for name, pattern in place.tensor_cores.items()}
    identity |= resources
    found = Inspection(**identity, shared_bytes=compiled.metadata.shared, tensor_cores=counts)
    return replace(found, problems=problems_of(found, launch))


def problems_of(found: Inspection, launch: Launch) -> list[str]:
    """What is wrong with a compiled configuration, one sentence each; empty where nothing is."""
    place, problems = TARGETS[found.target], []
    if found.spills or found.stack_bytes:
        problems.append(f"spills: {found.spills} times, {found.stack_bytes} bytes of local memory")
    if found.shared_bytes is not None and found.shared_bytes > place.shared_bytes:
        problems.append(f"shared memory: {found.shared_bytes} bytes, the target has {place.shared_bytes}")
    if launch.uses_dot:
        halves = any(kind.split(":")[0] in ("*bf16", "*fp16") for kind in launch.signature.values())
        if not sum(found.tensor_cores.values()):
            problems.append("no tensor-core instruction")
        elif halves and not found.tensor_cores[place.half_dots]:
            problems.append(f"no {place.half_dots} instruction in dots of 16-bit inputs")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, write the JSON file if one is asked for, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hf_linear_attn.kernels.inspection", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--only", default="", help="only kernels or configurations whose name contains this")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--modules", nargs="+", help="modules with shipped_launches(); default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(arguments)
    import triton

    tasks = []
    for module in options.modules or kernel_modules():
        for number, launch in enumerate(_launches(module)):
            name = f"{_jit_function(launch.kernel).__name__} {launch.name}"
            targets = launch.targets or TARGETS
            tasks += [(module, number, x) for x in options.targets if x in targets and options.only in name]
    if not tasks:
        print(f"No shipped configuration has {options.only!r} in its name.", file=sys.stderr)
        return 1
    if options.jobs > 1 and len(tasks) > 1:
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(_inspect, tasks))
    else:
        found = [_inspect(task) for task in tasks]
    print("\n".join(_table(found)))
    if options.output is not None:
        content = {"triton": triton.__version__, "kernels": [asdict(row) for row in found]}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    for row in found:
        for problem in row.problems:
            level = "error" if row.is_default else "note"
            print(f"{level}: {row.kernel} {row.config} on {row.target}: {problem}", file=sys.stderr)
    return int(any(row.problems for row in found if row.is_default))


_ENTRY = "shipped_launches"
_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "uint8": "u8", "bool": "i1"}
_TYPES |= {"int32": "i32", "int64": "i64"}


def _launches(module: str) -> list[Launch]:
    return getattr(importlib.import_module(module), _ENTRY)()


def _inspect(task: tuple[str, int, str]) -> Inspection:
    """One task in a process of its own: a launch holds functions, which do not pickle, so it goes by number."""
    module, number, target = task
    return inspect_launch(_launches(module)[number], target)


def _jit_function(kernel: Any) -> Any:
    """The function under decorators such as `triton.heuristics`, whose `fn` is what they decorate."""
    while not inspect.isfunction(kernel.fn):
        kernel = kernel.fn
    return kernel


def _reason(error: BaseException) -> str:
    """The end of the innermost message: before it stands the source."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[-300:]


def _signature(kernel: Any, launch: Launch) -> tuple[dict[str, str], dict[tuple[int], list[list[object]]]]:
    """Types by argument as Triton wants them, and which arguments are multiples of 16."""
    names = kernel.arg_names
    missing = [name for name in names if name not in launch.signature and name not in launch.constants]
    unknown = [name for name in (*launch.signature, *launch.constants) if name not in names]
    if missing or unknown:
        raise ValueError(
            f"{launch.name}: {kernel.__name__} takes {', '.join(names)}; "
            f"without a type or value: {', '.join(missing) or 'none'}, not taken: {', '.join(unknown) or 'none'}."
        )
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for place, name in enumerate(names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        signature[name], _, divisor = launch.signature[name].partition(":")
        if divisor == "16" or signature[name].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, attributes


def _read_cubin(compiled: Any) -> tuple[str, dict[str, Any]]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([knobs.nvidia.cuobjdump.path, flag, str(path)], check=True, capture_output=True, text=True)
            for flag in ("--dump-resource-usage", "-sass")
        )
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    looped = _in_loops(compiled.asm["ttgir"])
    waits = [int(number) for line in looped for number in re.findall(r"ttg\.async_wait .*\{num = (\d+)", line)]
    return code.stdout, {
        "registers": numbers["REG"],
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code.stdout, re.MULTILINE)),
        "load_waits": waits,
        "dot_waits": sum("warp_group_dot_wait" in line and "pendings = 0" in line for line in looped),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code.stdout)),
        "stack_bytes": numbers["STACK"] + numbers["LOCAL"],
    }


def _in_loops(ttgir: str) -> list[str]:
    """The lines of Triton's code that stand in a loop, once each: a body is indented deeper than its loop."""
    found, depth = [], None
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if depth is not None and indent <= depth:
            depth = None
        if depth is not None:
            found.append(line)
        elif "scf.for" in line or "scf.while" in line:
            depth = indent
    return found


def _read_amdgcn(compiled: Any) -> tuple[str, dict[str, int]]:
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        match = re.search(rf"^\s*-?\s*\.{name}:\s+(\d+)", code, re.MULTILINE)
        if match is None:
            raise ValueError(f"The assembly of {compiled.name} does not say its {name}.")
        return int(match.group(1))

    # .vgpr_count includes the accumulation registers. Scalar registers spill into vector registers, not into memory.
    return code, {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "stack_bytes": number("private_segment_fixed_size"),
    }


def _table(found: Iterable[Inspection]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("kernel", "config", "target", "warps", "stages", "registers", "shared", "spills", "tensor cores", "")
    ]
    for row in found:
        cores = " ".join(f"{name} {count}" for name, count in row.tensor_cores.items() if count) or "-"
        numbers = ("-" if n is None else str(n) for n in (row.registers, row.shared_bytes, row.spills))
        mark = "" if not row.problems else "ERROR" if row.is_default else "note"
        shape = (str(row.num_warps), str(row.num_stages))
        rows.append((row.kernel, row.config, row.target, *shape, *numbers, cores, mark))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
