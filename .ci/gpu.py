"""What needs a GPU, with what a bare GPU machine has: Python, PyTorch, Triton, Transformers and a few small packages.

    python .ci/gpu.py test
    python .ci/gpu.py bench

`test` runs the tests marked `gpu` in twelve processes, in bfloat16 and those of the kernels first, then a small script
under compute-sanitizer's memcheck where that is on PATH; with OUT set, `gpu-tests.txt` (as results come),
`gpu-tests-0.xml` and so on, and `gpu-memcheck.txt` are written to that folder. `bench` measures recipes/bench/gpu.yaml
into recipes/bench/results, goes on where an earlier run stopped, and copies what it wrote to OUT if that is set.
Nothing is installed and no connection opened; further arguments go to pytest or to the bench.
Exit status: 0 all went well, 1 something failed, 2 something that is needed is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes" / "bench" / "results"
NEEDED = {
    "test": ("torch", "triton", "transformers", "pytest"),
    "bench": ("torch", "triton", "transformers", "typer", "rich", "yaml", "matplotlib"),
}
TEST_SECONDS = 400
PROCESSES = 12
MEMCHECK_SECONDS = 100
BENCH_SECONDS = 570  # the recipe's own limit comes first; this one is for a call that hangs
# One launch of each pass at lengths that end inside a tile. Gradients too: most addresses are computed there.
MEMCHECK = """
import torch
from hf_linear_attn.kernels.sparse.op import block_sparse_attention
from hf_linear_attn.kernels.sparse.launch import tiles_for
from hf_linear_attn.kernels.gated.op import gated_linear_attention
from hf_linear_attn.kernels.linear.op import linear_attention
from hf_linear_attn.ops.features.maps import ScaledMap
from hf_linear_attn.ops.linear.attention import feature_map_attention
from hf_linear_attn.ops.window.csr import window_csr
q, k, v = (torch.rand(1, 2, 100, 40, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
decay = (-torch.rand(1, 2, 100, 40, device="cuda")).requires_grad_()
scale = torch.rand(1, 2, 100, device="cuda").requires_grad_()
o, den, kv, z = gated_linear_attention(q, k, v, decay, key_scale=scale)
(o.float().sum() + den.sum() + kv.sum() + z.sum()).backward()
for is_causal in (True, False):
    given = {"log_decay": decay[..., 0]} if is_causal else {}
    o, den, kv, z = linear_attention(q, k, v, key_scale=scale, is_causal=is_causal, feature_map="elu", **given)
    (o.float().sum() + den.sum() + kv.sum() + z.sum()).backward()
with torch.no_grad():  # features inside the kernels
    elu = ScaledMap("elu", 1.0), ScaledMap("elu", 1.0, torch.rand(2, 40, device="cuda"))
    for is_causal in (True, False):
        feature_map_attention(q, k, v, *elu, is_causal=is_causal, backend="triton")
lists = window_csr(100, 100, 9, 0, q.device, tiles=tiles_for(q.dtype, 40))
o, lse = block_sparse_attention(q, k, v, lists, scaling=0.2)
(o.float().sum() + lse.sum()).backward()
torch.cuda.synchronize()
"""


def missing(action: str) -> list[str]:
    """What the action needs and this machine does not have, one sentence each."""
    found = [f"{name} is not installed" for name in NEEDED[action] if importlib.util.find_spec(name) is None]
    if not found:
        import torch

        if not torch.cuda.is_available():
            found.append(f"torch {torch.__version__} sees no CUDA device")
    return found


def marked_tests() -> list[str]:
    """Files with a test marked `gpu`, the kernels' first. Others may import what that machine lacks."""
    files = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    return [path.as_posix() for path in sorted(files, key=lambda path: ("kernels" not in path.parts, path))]


def in_order(names: Iterable[str]) -> list[str]:
    """Tests as they should run: bfloat16 first, which models on a GPU have, float32 last; else as they are given."""
    last = ["bf16", "fp16", "fp32"]
    return sorted(names, key=lambda name: next((i for i, dtype in enumerate(last) if dtype in name), 0))


def run_tests(out: Path | None, arguments: list[str]) -> int:
    """Exit status of pytest over the tests marked `gpu`, in `PROCESSES` processes: each waits for its compiler most."""
    command = [sys.executable, "-u", "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout") is None:  # pyproject.toml sets its option, tests have its mark
        command += ["-o", "addopts=-ra"]
    listing = [*command, "--collect-only", "-q", *marked_tests(), *arguments]
    listed = subprocess.run(listing, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    names = in_order(line for line in listed.stdout.splitlines() if "::" in line)
    if listed.returncode or not names:
        print(listed.stdout + listed.stderr, file=sys.stderr)
        return 1
    commands = []
    for number in range(min(PROCESSES, len(names))):
        report = [] if out is None else [f"--junitxml={out / f'gpu-tests-{number}.xml'}"]
        commands.append([*command, "-v", "--durations=3", *report, *names[number::PROCESSES]])
    return _run(commands, TEST_SECONDS, log=None if out is None else out / "gpu-tests.txt")


def run_memcheck(out: Path | None) -> int:
    """Exit status of memcheck, 0 where the tool is not installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not on PATH: no memcheck.")
        return 0
    command = [tool, "--tool", "memcheck", "--error-exitcode", "1"]
    if out is not None:
        command += ["--log-file", str(out / "gpu-memcheck.txt")]
    # PyTorch's own allocator hides accesses between tensors: every tensor gets an allocation of its own.
    return _run([[*command, sys.executable, "-c", MEMCHECK]], MEMCHECK_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def run_bench(out: Path | None, arguments: list[str]) -> int:
    """Exit status of the bench; what it wrote is copied also if it failed."""
    begin = time.time()
    where = RESULTS.relative_to(ROOT)  # not absolute: the results say which command made them
    files = [str(where.parent / "gpu.yaml"), "--output", str(where), "--overwrite"]
    command = [sys.executable, "-m", "hf_linear_attn", "bench", *files]
    status = _run([[*command, *arguments]], BENCH_SECONDS)
    for path in sorted(RESULTS.iterdir()) if out is not None else ():
        if path.stat().st_mtime >= begin:
            shutil.copy(path, out)
    return status


def _environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}


def _run(commands: list[list[str]], seconds: int, log: Path | None = None, **variables: str) -> int:
    """0 if all commands, side by side, go well, else 1 or the status of the only one.

    What they print goes to `log` as well, a line at a time: a lease may end at any.
    """

    def copy(lines: Iterable[str]) -> None:
        for line in lines:
            with lock:
                print(line, end="", flush=True)
                print(line, end="", flush=True, file=file)

    lock = threading.Lock()
    with contextlib.nullcontext() if log is None else log.open("w") as file:
        given = {"cwd": ROOT, "env": _environment(**variables), "text": True}
        given["stdout"] = None if file is None else subprocess.PIPE
        processes = [subprocess.Popen(command, **given) for command in commands]
        readers = [threading.Thread(target=copy, args=(process.stdout or (),)) for process in processes]
        late = threading.Timer(seconds, lambda: [process.kill() for process in processes])
        for thread in (late, *readers):
            thread.start()
        for reader in readers:
            reader.join()
        statuses = [process.wait() for process in processes]
        late.cancel()
    if late.finished.is_set() and min(statuses) < 0:
        print(f"Stopped after {seconds} s: {' '.join(commands[0][:4])} ...", file=sys.stderr)
        return 1
    return statuses[0] if len(statuses) == 1 else int(any(statuses))


def main() -> int:
    """Run what was asked for; see the module's text for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=sorted(NEEDED))
    options, arguments = parser.parse_known_args()
    if lacks := missing(options.action):
        print(f"The GPU {options.action} cannot run here: " + "; ".join(lacks) + ".", file=sys.stderr)
        return 2
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    if options.action == "bench":
        return run_bench(out, arguments)
    results = run_tests(out, arguments), run_memcheck(out)
    return int(any(results))


if __name__ == "__main__":
    sys.exit(main())
