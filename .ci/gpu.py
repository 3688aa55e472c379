"""Tests that need a GPU, with what a bare GPU machine has: Python, PyTorch, Triton, Transformers, pytest.

    python .ci/gpu.py test

Runs the tests marked `gpu`, then a small script under compute-sanitizer's memcheck where that is on PATH. Nothing is
installed and no connection opened. With OUT set, `gpu-tests.xml` and `gpu-memcheck.txt` are written to that folder.
Exit status: 0 all passed, 1 a test or memcheck failed, 2 something that is needed is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "transformers", "pytest")
TEST_SECONDS = 400
MEMCHECK_SECONDS = 100
# One launch of each pass at lengths that end inside a tile. Gradients too: most addresses are computed there.
MEMCHECK = """
import torch
from hf_linear_attn.kernels.block_sparse import block_sparse_attention
from hf_linear_attn.kernels.block_sparse_config import tiles_for
from hf_linear_attn.kernels.gated_linear_attention import gated_linear_attention
from hf_linear_attn.kernels.linear_attention import linear_attention
from hf_linear_attn.ops.block_csr import window_csr
q, k, v = (torch.rand(1, 2, 100, 40, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
decay = (-torch.rand(1, 2, 100, 40, device="cuda")).requires_grad_()
scale = torch.rand(1, 2, 100, device="cuda").requires_grad_()
o, den, kv, z = gated_linear_attention(q, k, v, decay, key_scale=scale)
(o.float().sum() + den.sum() + kv.sum() + z.sum()).backward()
for is_causal in (True, False):
    given = {"log_decay": decay[..., 0]} if is_causal else {}
    o, den, kv, z = linear_attention(q, k, v, key_scale=scale, is_causal=is_causal, feature_map="elu", **given)
    (o.float().sum() + den.sum() + kv.sum() + z.sum()).backward()
lists = window_csr(100, 100, 9, 0, q.device, tiles=tiles_for(q.dtype, 40))
o, lse = block_sparse_attention(q, k, v, lists, scaling=0.2)
(o.float().sum() + lse.sum()).backward()
torch.cuda.synchronize()
"""


def missing() -> list[str]:
    """What the tests need and this machine does not have, one sentence each."""
    found = [f"{name} is not installed" for name in NEEDED if importlib.util.find_spec(name) is None]
    if not found:
        import torch

        if not torch.cuda.is_available():
            found.append(f"torch {torch.__version__} sees no CUDA device")
    return found


def run_tests(out: Path | None, arguments: list[str]) -> int:
    """Exit status of pytest over the tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--durations=10", "-p", "no:cacheprovider", "tests"]
    if importlib.util.find_spec("pytest_timeout") is None:  # pyproject.toml sets its option
        command += ["-o", "addopts=-ra --strict-markers"]
    if out is not None:
        command.append(f"--junitxml={out / 'gpu-tests.xml'}")
    return _run([*command, *arguments], TEST_SECONDS)


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
    return _run([*command, sys.executable, "-c", MEMCHECK], MEMCHECK_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _run(command: list[str], seconds: int, **variables: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"Stopped after {seconds} s: {' '.join(command[:4])} ...", file=sys.stderr)
        return 1


def main() -> int:
    """Run what was asked for; see the module's text for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["test"])
    options, arguments = parser.parse_known_args()
    del options
    lacks = missing()
    if lacks:
        print("The GPU tests cannot run here: " + "; ".join(lacks) + ".", file=sys.stderr)
        return 2
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    results = run_tests(out, arguments), run_memcheck(out)
    return int(any(results))


if __name__ == "__main__":
    sys.exit(main())
