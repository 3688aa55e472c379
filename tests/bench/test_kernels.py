"""What layers make a GPU do, counted without one, and the budget that the committed counts are.

`make readme` aside, a change that is meant to count less, or to count more, commits what
`hf-linear-attn bench --kernels --output recipes/bench/results --overwrite` writes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn.bench.kernels import run
from hf_linear_attn.bench.kernels.tables import render_kernels
from hf_linear_attn.bench.kernels.trace import count, trace_layer
from hf_linear_attn.bench.peers.layers import LayerShape
from hf_linear_attn.cli import app
from hf_linear_attn.kernels.inspection import TARGETS, sources
from hf_linear_attn.testing.on_gpu import OnGpu, gpu

RESULTS = Path(__file__).parents[2] / "recipes" / "bench" / "results" / "kernels.json"
SHORT = run.LENGTHS[0]
# Of 65 channels and 153 features, masked in wide tiles, and a few registers of two maps: (kernel, method) to
# instructions that access local memory.
SPILLS = {
    ("block_sparse_dkv_kernel", "long_short"): 6,
    ("block_sparse_dq_kernel", "long_short"): 171,
    ("block_sparse_dx_kernel", "long_short"): 31,
    ("block_sparse_fwd_kernel", "long_short"): 4,
    ("linear_attention_bwd_kernel", "taylor"): 53,
    ("linear_attention_fwd_kernel", "taylor"): 284,
    ("mapped_attention_kernel", "performer"): 6,
    ("mapped_attention_kernel", "rfa"): 5,
}


@functools.cache
def _committed() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("call", "steps"),
    [
        (lambda x, y: x + y, [("add", 48 + 16 + 48)]),
        (lambda x, y: x + x, [("add", 48 + 48)]),
        (lambda x, y: x + y.expand(3, 4), [("add", 48 + 16 + 48)]),
        (lambda x, y: x.mT.unsqueeze(0)[:, 1:].detach(), []),
        (lambda x, y: x.mul_(2), [("mul_", 48 + 48)]),
        (lambda x, y: x[0].copy_(y), [("copy_", 16 + 16)]),
        (lambda x, y: torch.arange(4, device=x.device), [("arange", 32)]),
        (lambda x, y: torch.empty_like(x).zero_(), [("zero_", 48)]),
        (lambda x, y: x.bfloat16().sum(-1), [("_to_copy", 48 + 24), ("sum", 24 + 6)]),
    ],
)
def test_what_an_operator_moves(call: Callable[..., Any], steps: list[tuple[str, int]]) -> None:
    x, y = OnGpu(torch.zeros(3, 4)), OnGpu(torch.zeros(4))
    with gpu():
        _, trace = count(lambda: call(x, y), FakeTensorMode(allow_non_fake_inputs=True))
    assert [(step.name, step.bytes) for step in trace.steps] == steps


def test_where_a_value_is_read_is_named() -> None:
    with gpu():
        _, trace = count(lambda: OnGpu(torch.zeros(3)).sum().item(), FakeTensorMode(allow_non_fake_inputs=True))
    assert len(trace.reads) == 1


def test_the_plain_kernel_reads_and_writes_what_the_layout_says() -> None:
    """Without weights, cut into segments: keys and values twice, queries and outputs once, states of segments."""
    batch, heads, length, dim = 1, 12, 4096, 64
    shape = LayerShape(batch, length, heads * dim, heads, True)
    trace, _ = trace_layer("linear", shape, {"variance_reducer": False})["forward"]
    state, segments = 4 * (dim * dim + dim), 16  # of 256 tokens: 132 processors could have three programs each
    tokens, rows = 2 * dim * length, 4 * length  # bytes of a head's queries, and of its denominators
    total = 4 * segments  # log-decays of segments, which stand in where there are none
    assert [step.bytes / heads for step in trace.launches] == [
        2 * tokens + segments * state + total,
        2 * segments * state,
        4 * tokens + rows + (segments + 1) * state,
    ]


def test_attention_of_no_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No kernel serves 'linformer'; allowed: 'bigbird', "):
        run.served(["linear", "linformer"])


@pytest.mark.parametrize("case", run.CASES)
@pytest.mark.parametrize(("key", "is_causal"), run.served(), ids=str)
def test_no_launch_and_no_operator_more_than_committed(key: str, is_causal: bool, case: str) -> None:
    """Operators and bytes where PyTorch is the one that they were counted with: others take theirs apart otherwise."""
    committed = {
        (row["method"], row["side"], row["pass"]): row for row in _committed()["rows"] if row["length"] == SHORT
    }
    compiled = {(row["kernel"], row["config"], row["num_warps"], row["num_stages"]) for row in _committed()["kernels"]}
    same_torch = torch.__version__.split(".")[:2] == _committed()["meta"]["torch"].split(".")[:2]
    for row, trace in run.count_passes(key, is_causal, SHORT, case):
        budget = committed[row["method"], row["side"], row["pass"]]
        assert sum(row["launches"].values()) <= sum(budget["launches"].values())
        assert len(row.get("waits_in", [])) <= len(budget.get("waits_in", []))
        if same_torch:
            assert sum(row["ops"].values()) <= sum(budget["ops"].values()), (row["ops"], budget["ops"])
            assert row["bytes"] <= budget["bytes"] * 1.001
        for step in trace.launches:
            assert step.launch is not None
            _, given = step.launch
            shape = given.get("num_warps", 4), given.get("num_stages", 3)
            assert (step.name, run.spell_constants(given), *shape) in compiled, "not compiled: write the counts anew"


def test_the_committed_kernels_are_those_of_today_and_no_other_spills() -> None:
    meta, kernels = _committed()["meta"], _committed()["kernels"]
    assert meta["sources"] == sources(), "kernels changed since they were compiled: write the counts anew"
    spilling = {(row["kernel"], *row["methods"]): row["spills"] for row in kernels if row["problems"]}
    assert spilling == SPILLS
    assert max(row["shared_bytes"] for row in kernels) <= TARGETS[meta["target"]].shared_bytes
    assert {row["method"].split(",")[0] for row in _committed()["rows"]} == {key for key, _ in run.served()}


def test_the_committed_tables_are_of_the_committed_numbers() -> None:
    assert RESULTS.with_suffix(".md").read_text(encoding="utf-8") == render_kernels(_committed())


def test_the_command_writes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LENGTHS", (64,))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "served", lambda only: [("longformer", True)])
    monkeypatch.setattr(run, "CASES", {"": {}})
    counted = run.count_passes
    monkeypatch.setattr(run, "count_passes", lambda *given, **options: counted(*given, **options)[2:])  # one kernel
    output = tmp_path / "out"
    result = CliRunner().invoke(app, ["bench", "--kernels", "--variants", "longformer", "--output", str(output)])
    assert result.exit_code == 0, result.output
    found = json.loads((output / "kernels.json").read_text())
    assert [(row["method"], row["pass"]) for row in found["rows"]] == [("longformer", "decode")]
    (kernel,) = found["kernels"]
    assert kernel["kernel"] == "block_sparse_fwd_kernel"
    assert kernel["instructions"] > 100
    assert kernel["methods"] == ["longformer"]
    assert "block_sparse_fwd_kernel" in (output / "kernels.md").read_text()


@pytest.mark.parametrize("more", [["recipes/bench/smoke.yaml"], ["--device", "cpu"], ["--threads", "1"], ["--fresh"]])
def test_what_measures_does_not_go_with_it(more: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "--kernels", *more])
    assert result.exit_code == 1
    assert "--kernels measures nothing, so it takes no" in result.output
