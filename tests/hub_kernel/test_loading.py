"""The exported kernel, loaded by the `kernels` library in processes that have this package not, or have it as well."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.hub_kernel.export import export_kernels
from hf_linear_attn.ops.linear.attention import linear_attention
from hf_linear_attn.ops.window.attention import sliding_window_attention

kernels = pytest.importorskip("kernels", reason="the extra [test] is not installed")

# Nothing of the package, nor what it stands on; no connection.
ALONE = """
import os, socket, sys
for name in ("hf_linear_attn", "transformers", "triton"):
    sys.modules[name] = None
def refused(*_): raise AssertionError("tried to connect")
socket.socket.connect = refused
import torch
torch.set_num_threads(1)
from pathlib import Path
folder = Path(sys.argv[1])
"""

# Layers as their users have them, dense, and what `kernelize` makes of them.
KERNELIZE = """
import torch.nn.functional as F
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

@use_kernel_forward_from_hub("LinearAttention")
class Linear(torch.nn.Module):
    def forward(self, query, key, value, token_mask=None, is_causal=False):
        weights = (F.elu(query) + 1) @ (F.elu(key) + 1).mT
        seen = torch.ones_like(weights, dtype=torch.bool)
        seen = seen.tril() if is_causal else seen
        seen = seen if token_mask is None else seen & token_mask[:, None, None]
        weights = weights * seen
        return weights / weights.sum(-1, keepdim=True) @ value

@use_kernel_forward_from_hub("DecayAttention")
class Decay(torch.nn.Module):
    def forward(self, query, key, value, log_decay, token_mask=None):
        sums = log_decay.cumsum(2)
        gaps = (sums[:, :, :, None] - sums[:, :, None]).masked_fill(~torch.ones(70, 70).bool().tril(), -torch.inf)
        return (query @ key.mT * gaps.exp()) @ value

@use_kernel_forward_from_hub("SlidingWindowAttention")
class Window(torch.nn.Module):
    def forward(self, query, key, value, left, right, scaling, token_mask=None):
        distance = torch.arange(70) - torch.arange(70)[:, None]
        seen = ((distance >= -left) & (distance <= right)) & token_mask[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)

model = torch.nn.ModuleList([Linear(), Decay(), Window()])
mapping = {n: {"cpu": LocalLayerRepository(folder, layer_name=n)} for n in
           ("LinearAttention", "DecayAttention", "SlidingWindowAttention")}

g = torch.Generator().manual_seed(0)
q, k, v = torch.randn(3, 2, 2, 70, 8, generator=g, dtype=torch.float64)
decay = -torch.rand(2, 2, 70, generator=g, dtype=torch.float64)
mask = torch.ones(2, 70, dtype=torch.bool)
mask[0, 40:] = False
calls = {"linear": (0, (), {"token_mask": mask}), "causal": (0, (), {"is_causal": True}),
         "decay": (1, (decay,), {}), "window": (2, (9, 4, 0.3, mask), {})}

def run():
    found = {}
    for name, (which, more, options) in calls.items():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = model[which](*leaves, *more, **options) * mask[:, None, :, None]
        found[name] = [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    return found

dense = run()
own = {module.forward.__func__ for module in model}
with use_kernel_mapping(mapping):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
assert not own & {module.forward.__func__ for module in model}
ours = run()
for module in model:
    module.compile(backend="eager", fullgraph=True)
compiled = run()
torch.save({"dense": dense, "ours": ours, "compiled": compiled, "given": (q, k, v, decay, mask)}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the package."""
    folder = tmp_path_factory.mktemp("kernel")
    export_kernels(folder)
    return folder


def run(script: str, *arguments: Any, **environment: str) -> str:
    """What a script prints in a process of its own."""
    plain = {"PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    given = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(given, env={**plain, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernelize_puts_the_ops_into_layers_of_others(folder: Path, tmp_path: Path) -> None:
    run(ALONE + KERNELIZE, folder, tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    q, k, v, decay, mask = found["given"]
    phi = [F.elu(x) + 1 for x in (q, k)]
    ours = {  # the package's own ops, in this process
        "linear": linear_attention(*phi, v, token_mask=mask, is_causal=False)[0],
        "causal": linear_attention(*phi, v, is_causal=True)[0],
        "decay": linear_attention(q, k, v, log_decay=decay, is_causal=True, normalized=False)[0],
        "window": sliding_window_attention(q, k, v, left=9, right=4, scaling=0.3, key_allowed=mask),
    }
    for name, expected in ours.items():
        torch.testing.assert_close(found["ours"][name][0], expected * mask[:, None, :, None])
        torch.testing.assert_close(found["ours"][name], found["dense"][name])
        torch.testing.assert_close(found["compiled"][name], found["dense"][name])


def test_the_card_runs_as_it_stands(folder: Path) -> None:
    """With the folder in the place of its repository on the Hub."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    local = """
import kernels
kernels.LayerRepository = lambda repo, layer_name, **_: kernels.LocalLayerRepository(folder, layer_name=layer_name)
"""
    compared = "torch.testing.assert_close(MyWindow()(q, k, v, 8, 0, 16**-0.5), near)"
    script = ALONE + local + "\n".join([*blocks, compared]).replace("<this repository>", "you/kernel")
    run(script, folder, LOCAL_KERNELS=f"you/kernel={folder}")


def test_the_library_finds_the_files_whole(folder: Path) -> None:
    from kernels._rust import Digest, DigestAlgorithm

    for build in (folder / "build").iterdir():
        metadata = kernels.Metadata.read_from_file(build / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
        assert f"torch-{metadata.backend.backend_type}".lower() == build.name


def test_triton_kernels_of_two_exports_and_of_the_package_run_in_one_process(folder: Path) -> None:
    """By Triton's interpreter: each has operators of its own."""
    run(
        """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
from hf_linear_attn.ops.linear.attention import linear_attention
from hf_linear_attn.ops.window.attention import sliding_window_attention
build = Path(sys.argv[1]) / "build"
cpu, cuda = get_local_kernel(build / "torch-cpu"), get_local_kernel(build / "torch-cuda")
assert cpu.__name__.startswith("_hf_linear_attn_cpu_") and cuda.__name__.startswith("_hf_linear_attn_cuda_")
torch.manual_seed(0)
q, k, v = torch.rand(3, 1, 1, 20, 16)
for options in ({"is_causal": False}, {"is_causal": True, "log_decay": -torch.rand(1, 1, 20)}):
    expected = linear_attention(q, k, v, backend="torch", **options)[0]
    for attend in (linear_attention, cpu.linear_attention, cuda.linear_attention):
        torch.testing.assert_close(attend(q, k, v, backend="triton", **options)[0], expected)
window = {"left": 3, "right": 2, "scaling": 0.5}
expected = sliding_window_attention(q, k, v, backend="torch", **window)
for attend in (sliding_window_attention, cpu.sliding_window_attention, cuda.sliding_window_attention):
    torch.testing.assert_close(attend(q, k, v, backend="triton", **window), expected, rtol=1e-4, atol=1e-5)
for name in ("hf_linear_attn", cpu.__name__, cuda.__name__):
    namespace = getattr(torch.ops, name)
    assert namespace.linear_attention and namespace.block_sparse_fwd and namespace.gated_linear_attention
""",
        folder,
        TRITON_INTERPRET="1",
        PYTHONPATH=str(Path(__file__).parents[2]),
    )
