"""The gated linear attention kernels against the formula written densely in float64: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn.kernels.gated import op as module
from hf_linear_attn.kernels.gated.op import gated_linear_attention

Tensors = dict[str, torch.Tensor]
STATE = ("kv", "z")


def _dense(x: Tensors, normalized: bool) -> tuple[torch.Tensor, ...]:
    """(o, den, kv, z) in float64, every pair of tokens on its own."""
    x = {name: value.double() for name, value in x.items()}
    q, k, v, g = (x[name] for name in ("q", "k", "v", "log_decay"))
    if "key_scale" in x:
        scale = x["key_scale"].expand(k.shape[:3])[..., None]
        k, v = torch.where(scale == 0, 0, k * scale), torch.where(scale == 0, 0, v)
    length, offset = k.shape[2], k.shape[2] - q.shape[2]
    reach = g.clamp(min=-110.0).cumsum(2)
    between = reach[:, :, :, None] - reach[:, :, None]  # [B, H, i, j, F]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[:, :, None]
    weight = torch.where(seen, between, -torch.inf).exp()
    scores = (q[:, :, :, None] * k[:, :, None] * weight[:, :, offset:]).sum(-1)
    out, den = scores @ v, scores.sum(-1)
    kv, z = (k * weight[:, :, -1]).mT @ v, (k * weight[:, :, -1]).sum(2)
    if "kv" in x:
        carried = q * reach[:, :, offset:].exp()
        out, den = out + carried @ x["kv"], den + (carried * x["z"][:, :, None]).sum(-1)
        kept = reach[:, :, -1].exp()
        kv, z = kv + kept[..., None] * x["kv"], z + kept * x["z"]
    if normalized:
        out = torch.where(den[..., None] == 0, 0, out / torch.where(den == 0, 1, den)[..., None])
    return out, den, kv, z


def _inputs(
    length: int,
    features: int = 16,
    dim: int = 16,
    *,
    batch: int = 1,
    heads: int = 2,
    queries: int | None = None,
    scale: str = "none",
    state: bool = False,
    decay: str = "mixed",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tensors:
    generator = torch.Generator().manual_seed(length + features)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    x = {
        "q": draw(batch, queries or length, heads, features).transpose(1, 2),  # as Transformers lays them out
        "k": draw(batch, length, heads, features).transpose(1, 2),
        "v": draw(batch, length, heads, dim).transpose(1, 2) - 0.3,
    }
    x = {name: value.to(dtype) for name, value in x.items()}
    x["log_decay"] = -draw(batch, heads, length, features) * 0.2
    if decay == "mixed":  # some features forget fast, some never, and all now and then, as packed sequences do
        x["log_decay"] *= torch.tensor([0.0, 1.0, 40.0, 300.0]).repeat(features // 4)
        x["log_decay"][:, :, length // 2 // 5 * 5 + 1 :][:, :, :1] = -1e30  # not where the key has scale 0
    if scale != "none":
        x["key_scale"] = draw(batch, heads, length) + 0.1 if scale == "full" else draw(1, 1, length) + 0.1
        x["key_scale"][..., :: 5 if length > 1 else 2] = 0.0
    if state:
        x |= {"kv": draw(batch, heads, features, dim), "z": draw(batch, heads, features) + 0.5}
    return {name: value.to(device) for name, value in x.items()}


def _call(x: Tensors, normalized: bool) -> tuple[torch.Tensor, ...]:
    start = (x["kv"], x["z"]) if "kv" in x else None
    named = {"key_scale": x.get("key_scale"), "initial_state": start, "normalized": normalized}
    return gated_linear_attention(x["q"], x["k"], x["v"], x["log_decay"], **named)


def _ratio(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    error = (found.double() - expected.double()).pow(2).mean().sqrt()
    return float(error / expected.double().pow(2).mean().sqrt().clamp(min=1e-2))  # gradients may be 0


def _compare(x: Tensors, normalized: bool, outputs: float = 1e-4, gradients: float = 1e-4) -> None:
    names = ("o", "den", "kv", "z")
    mine = {name: value.detach().clone().requires_grad_() for name, value in x.items()}
    reference = {name: value.detach().double().requires_grad_() for name, value in x.items()}
    found, expected = _call(mine, normalized), _dense(reference, normalized)
    assert found[0].dtype == x["v"].dtype
    assert all(value.dtype == torch.float32 for value in found[1:])
    for name, a, b in zip(names, found, expected, strict=True):
        assert _ratio(a, b) < outputs, name
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(b.shape, generator=generator).to(b.device) for b in expected]
    for a, b, w in zip(found, expected, weights, strict=True):
        assert a.isfinite().all()
        assert a.shape == b.shape == w.shape
    sum((a * w).sum() for a, w in zip(found, weights, strict=True)).backward()
    sum((b * w).sum() for b, w in zip(expected, weights, strict=True)).backward()
    for name in x:
        assert mine[name].grad is not None, name
        assert mine[name].grad.dtype == x[name].dtype
        assert _ratio(mine[name].grad, reference[name].grad) < gradients, name


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgets to write shows as nan."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def poisoned(*args: object, make=make, **kwargs: object) -> torch.Tensor:  # type: ignore[no-untyped-def]
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(owner, name, poisoned)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("length", "normalized", "options"),
    [
        (1, True, {}),
        (1, False, {"state": True, "scale": "full"}),
        (7, True, {"state": True, "scale": "full", "features": 60, "dim": 20}),
        (16, False, {}),
        (63, True, {"scale": "shared", "batch": 2}),
        (100, True, {"state": True, "heads": 1, "scale": "full"}),
        (100, False, {"queries": 30, "heads": 1}),
        (66, True, {"queries": 5, "heads": 1, "features": 68, "dim": 36, "scale": "shared"}),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_equals_the_dense_formula(length: int, normalized: bool, options: dict) -> None:
    _compare(_inputs(length, **options), normalized)


@pytest.mark.usefixtures("_poisoned")
def test_the_state_resumes_a_split_sequence() -> None:
    x = _inputs(70, heads=1, state=True)
    whole = _call(x, True)
    start, outputs = (x["kv"], x["z"]), []
    for part in (slice(0, 1), slice(1, 12), slice(12, 70)):
        tensors = (x[name][:, :, part] for name in ("q", "k", "v", "log_decay"))
        o, _, *start = gated_linear_attention(*tensors, initial_state=tuple(start))
        outputs.append(o)
    for found, expected in zip((torch.cat(outputs, 2), *start), (whole[0], *whole[2:]), strict=True):
        assert _ratio(found, expected) < 1e-4


def test_a_key_of_scale_0_counts_for_nothing_whatever_it_holds() -> None:
    x = _inputs(20, scale="shared")
    clean = {name: value.clone().requires_grad_() for name, value in x.items()}
    gone = (x["key_scale"] == 0).flatten()
    for name in ("k", "v"):
        x[name][:, :, gone] = torch.nan
    spoiled = {name: value.requires_grad_() for name, value in x.items()}
    for tensors in (clean, spoiled):
        o, den, kv, z = _call(tensors, True)
        (o.square().sum() + den.sum() + kv.square().sum() + z.sum()).backward()
    for name in clean:
        torch.testing.assert_close(spoiled[name].grad, clean[name].grad, rtol=0, atol=0)


def test_compiles_to_one_graph() -> None:
    x = _inputs(5)
    explained = torch._dynamo.explain(lambda **tensors: _call(tensors, True)[0] * 2)(**x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_the_fake_results_are_like_the_real_ones() -> None:
    x = {name: value.requires_grad_() for name, value in _inputs(7, scale="shared", state=True).items()}
    arguments = (x["q"], x["k"], x["v"], x["log_decay"], x["key_scale"], x["kv"], x["z"], True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._forward, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 9, 16)}, "From 1 to 8 queries"),
        ({"k": torch.zeros(1, 2, 8, 8)}, "k has shape"),
        ({"v": torch.zeros(1, 2, 8, 129)}, "at most 128"),
        ({"v": torch.zeros(1, 2, 8, 16).double()}, "allowed is one dtype"),
        ({"key_scale": torch.zeros(1, 2, 7)}, "key_scale has shape"),
        ({"key_scale": torch.zeros(1, 2, 8).half()}, r"must be torch\.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change: Tensors, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call({**_inputs(8), **change}, True)


# Rounding of the inputs' dtype in products: 8 bits of mantissa for bfloat16, 11 for the others' tensor cores.
LIMITS = {torch.float32: (1e-4, 1e-3), torch.float16: (2e-3, 5e-3), torch.bfloat16: (1e-2, 2e-2)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("length", "options"),
    [
        (1, {"state": True}),
        (63, {"features": 60, "dim": 60, "scale": "full"}),
        (500, {"features": 64, "dim": 64, "state": True, "scale": "shared"}),
        (257, {"features": 128, "dim": 128, "queries": 100}),
    ],
)
@pytest.mark.parametrize("normalized", [True, False])
def test_on_a_gpu(dtype: torch.dtype, length: int, options: dict, normalized: bool) -> None:
    _compare(_inputs(length, dtype=dtype, device="cuda", **options), normalized, *LIMITS[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_a_long_sequence_on_a_gpu_equals_its_parts(dtype: torch.dtype) -> None:
    """4096 tokens against the same kernel in float32 on parts of 512, where the dense formula has no room."""
    x = _inputs(4096, 64, 64, dtype=dtype, device="cuda", decay="slow")
    found = _call(x, True)
    start, outputs = None, []
    for first in range(0, 4096, 512):
        tensors = (x[name][:, :, first : first + 512].float() for name in ("q", "k", "v", "log_decay"))
        o, _, *start = gated_linear_attention(*tensors, initial_state=None if start is None else tuple(start))
        outputs.append(o)
    assert _ratio(found[0], torch.cat(outputs, 2)) < LIMITS[dtype][0]
    assert _ratio(found[2], start[0]) < LIMITS[dtype][0]


@pytest.mark.gpu
def test_runs_on_a_gpu_are_bit_equal() -> None:
    x = _inputs(1000, 64, 64, dtype=torch.bfloat16, device="cuda", scale="full", state=True)
    runs = []
    for _ in range(2):
        tensors = {name: value.clone().requires_grad_() for name, value in x.items()}
        o, den, kv, z = _call(tensors, True)
        (o.float().sum() + den.sum() + kv.sum() + z.sum()).backward()
        runs.append([o, den, kv, z, *(value.grad for value in tensors.values())])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
