"""Linear attention kernels against the dense formula in float64: outputs and every gradient.

Without a GPU the kernels are interpreted (float32 and float16 only); tests marked `gpu` run them for real.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn.kernels.linear import tiles as config
from hf_linear_attn.kernels.linear.op import linear_attention

NAMES = ("q", "k", "v", "key_scale", "log_decay", "kv", "z")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is nan."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args: Any, make: Any = make, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)


def _cut(monkeypatch: pytest.MonkeyPatch, tokens: int, segments: int) -> None:
    """Small chunks, and so many segments, so that short inputs run through every path."""
    tiles_for = config.tiles_for

    def small(*args: Any, **kwargs: Any) -> Any:
        tiles = tiles_for(*args, **kwargs)
        return config.Tiles(tokens, tiles.values, tiles.features, tiles.num_warps, tiles.num_stages)

    def cut(length: int, programs: int, tiles: Any, processors: int, *, has_decay: bool) -> tuple[int, int]:
        chunks = -(-length // tiles.tokens)
        size = -(-chunks // min(segments, chunks))
        return -(-chunks // size), size * tiles.tokens

    monkeypatch.setattr(config, "tiles_for", small)
    monkeypatch.setattr(config, "sums_tiles_for", lambda *args: config.Tiles(32, 16, 16, 8, 1))
    monkeypatch.setattr(config, "segments_for", cut)
    monkeypatch.setattr(config, "forward_segments_for", functools.partial(cut, has_decay=False))


def _phi(x: torch.Tensor, feature_map: str, multiplier: float) -> torch.Tensor:
    if feature_map == "elu":
        return torch.nn.functional.elu(x * multiplier) + 1
    if feature_map == "relu":
        return torch.relu(x * multiplier)
    return x


def dense(
    x: Tensors,
    *,
    is_causal: bool,
    normalized: bool = True,
    feature_map: str = "identity",
    q_multiplier: float = 1.0,
    k_multiplier: float = 1.0,
    query_keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Every pair of tokens, in the dtype of `x`. Returns what the kernels do."""
    q, k = _phi(x["q"], feature_map, q_multiplier), _phi(x["k"], feature_map, k_multiplier)
    v, (q_len, k_len) = x["v"], (q.shape[2], k.shape[2])
    scale = x["key_scale"].expand(k.shape[:3]) if "key_scale" in x else torch.ones_like(k[..., 0])
    real = (scale != 0)[..., None]
    k, v = torch.where(real, k, 0) * scale[..., None], torch.where(real, v, 0)
    if query_keep is not None:
        q = torch.where(query_keep[..., None], q, 0)
    weight = q.new_ones(q_len, k_len)
    to_end, from_start = torch.ones_like(scale), torch.ones_like(scale)
    if is_causal:
        weight = weight.tril(k_len - q_len)
    if "log_decay" in x:
        decay = x["log_decay"]
        i, j, t = (torch.arange(k_len, device=q.device).view(s) for s in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
        inside = (j < t) & (t <= i)
        between = torch.where(inside, decay[:, :, None, None, :], 0).sum(-1)  # no differences: -1e30 takes all digits
        weight = weight * between.exp()[:, :, k_len - q_len :]
        to_end = between[:, :, -1].exp()
        from_start = decay.cumsum(-1).exp()
    k_end = k * to_end[..., None]
    scores = (q @ k.mT) * weight
    sums, den = scores @ v, scores.sum(-1)
    kv, z = k_end.mT @ v, k_end.sum(2)
    if "kv" in x:
        reach = from_start[..., k_len - q_len :, None]
        sums, den = sums + (q * reach) @ x["kv"], den + ((q * reach) @ x["z"][..., None])[..., 0]
        kv, z = kv + from_start[..., -1, None, None] * x["kv"], z + from_start[..., -1, None] * x["z"]
    if normalized:
        sums = sums / torch.where(den.abs() < 1e-30, 1.0, den)[..., None]
    return sums, den, kv, z


def make(
    q_len: int,
    k_len: int,
    features: int,
    dim: int,
    *,
    heads: int = 1,
    batch: int = 1,
    positive: bool = True,
    scale: bool = False,
    decay: bool = False,
    state: bool = False,
    seed: int = 0,
) -> Tensors:
    """Inputs in float64; keys of scale 0 hold nan."""
    torch.manual_seed(seed)
    x = {
        "q": torch.randn(batch, heads, q_len, features, dtype=torch.float64),
        "k": torch.randn(batch, heads, k_len, features, dtype=torch.float64),
        "v": torch.randn(batch, heads, k_len, dim, dtype=torch.float64),
    }
    if positive:
        x["q"], x["k"] = x["q"].abs() + 0.1, x["k"].abs() + 0.1
    if scale:
        x["key_scale"] = torch.rand(batch, 1, k_len, dtype=torch.float64) + 0.2
        x["key_scale"][:, :, k_len // 3 : k_len // 2] = 0
        nothing = (x["key_scale"] == 0)[..., None]
        x["k"], x["v"] = torch.where(nothing, torch.nan, x["k"]), torch.where(nothing, torch.nan, x["v"])
    if decay:
        x["log_decay"] = -torch.rand(batch, heads, k_len, dtype=torch.float64)
        x["log_decay"][:, :, k_len // 2 :: 17] = -1e30
    if state:
        x["kv"] = torch.randn(batch, heads, features, dim, dtype=torch.float64)
        x["z"] = torch.rand(batch, heads, features, dtype=torch.float64) + 0.5
    return x


def as_layout(x: torch.Tensor) -> torch.Tensor:
    """The same tensor as Transformers hands it over: `[B, T, H, D]` in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attend(x: Tensors, **options: Any) -> tuple[torch.Tensor, ...]:
    state = (x["kv"], x["z"]) if "kv" in x else None
    return linear_attention(
        *(x["q"], x["k"], x["v"]),
        key_scale=x.get("key_scale"),
        log_decay=x.get("log_decay"),
        initial_state=state,
        **options,
    )


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def compare(
    x: Tensors,
    dtype: torch.dtype,
    device: str,
    limits: tuple[float, float],
    weights: tuple[float, ...] = (1.0, 0.3, 0.2, 0.1),
    **options: Any,
) -> None:
    """Outputs and all gradients of a loss that sees every output (those of weight 0 apart), by error ratio."""
    small = {name: y.to(dtype) if name in ("q", "k", "v") else y.float() for name, y in x.items()}
    exact = {name: y.double().requires_grad_() for name, y in small.items()}
    given = {
        name: (as_layout(y) if y.ndim == 4 and name != "kv" else y).to(device).detach().requires_grad_()
        for name, y in small.items()
    }
    keep = options.pop("query_keep", None)
    wanted = dense(exact, query_keep=keep, **options)
    found = attend(given, query_keep=None if keep is None else keep.to(device), **options)
    torch.manual_seed(1)
    factors = [torch.randn(y.shape, dtype=torch.float64) * w for y, w in zip(wanted, weights, strict=True)]
    for name, expected, actual in zip(("o", "den", "kv", "z"), wanted, found, strict=True):
        assert actual.shape == expected.shape
        error = rms(actual.cpu() - expected) / max(rms(expected), 1e-12)
        assert error < limits[0], f"{name}: {error}"
    loss = sum((y * f).sum() for y, f, w in zip(wanted, factors, weights, strict=True) if w)
    expected = torch.autograd.grad(loss, list(exact.values()))
    loss = sum((y * f.to(y)).sum() for y, f, w in zip(found, factors, weights, strict=True) if w)
    actual = torch.autograd.grad(loss, list(given.values()))
    for name, right, gradient in zip(exact, expected, actual, strict=True):
        assert gradient.shape == right.shape
        right = torch.where(right.isnan(), 0.0, right)
        error = rms(gradient.cpu() - right) / max(rms(right), 1e-12)
        assert error < limits[1], f"gradient of {name}: {error}"


LIMITS = (0.001, 0.005)


@pytest.mark.parametrize("length", [1, 7, 63, 100])
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_outputs_and_gradients(length: int, is_causal: bool) -> None:
    x = make(length, length, 16, 60 if length == 63 else 16)
    compare(x, torch.float32, "cpu", LIMITS, is_causal=is_causal)


@pytest.mark.parametrize("scale", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("decay", [False, True], ids=["", "decay"])
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("segments", [1, 3], ids=["whole", "cut"])
def test_causal_options(monkeypatch: pytest.MonkeyPatch, scale: bool, decay: bool, state: bool, segments: int) -> None:
    _cut(monkeypatch, 16, segments)
    x = make(63, 63, 16, 16, scale=scale, decay=decay, state=state)
    compare(x, torch.float32, "cpu", LIMITS, is_causal=True)


@pytest.mark.parametrize("segments", [1, 2], ids=["whole", "cut"])
@pytest.mark.parametrize(("q_len", "k_len"), [(7, 63), (40, 20)])
def test_bidirectional_options(monkeypatch: pytest.MonkeyPatch, q_len: int, k_len: int, segments: int) -> None:
    _cut(monkeypatch, 16, segments)
    x = make(q_len, k_len, 16, 16, heads=2, batch=2, scale=True)
    compare(x, torch.float32, "cpu", LIMITS, is_causal=False)


@pytest.mark.parametrize("decay", [False, True], ids=["", "decay"])
@pytest.mark.parametrize(("q_len", "segments"), [(1, 3), (20, 3), (20, 1)])
def test_fewer_queries_stand_at_the_end(
    monkeypatch: pytest.MonkeyPatch, q_len: int, segments: int, decay: bool
) -> None:
    _cut(monkeypatch, 16, segments)
    compare(make(q_len, 63, 16, 16, scale=True, decay=decay), torch.float32, "cpu", LIMITS, is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_fused_feature_maps(monkeypatch: pytest.MonkeyPatch, feature_map: str, is_causal: bool) -> None:
    _cut(monkeypatch, 16, 2)
    x = make(40, 40, 20, 20, heads=2, positive=False, scale=True)
    options = {"feature_map": feature_map, "q_multiplier": 0.7, "k_multiplier": 1.3}
    # Denominators of relu features may be tiny, and then the quotient's gradients are huge: leave them as sums.
    compare(x, torch.float32, "cpu", LIMITS, is_causal=is_causal, normalized=feature_map == "elu", **options)


@pytest.mark.parametrize("decay", [False, True], ids=["", "decay"])
def test_without_a_normalizer(monkeypatch: pytest.MonkeyPatch, decay: bool) -> None:
    _cut(monkeypatch, 16, 2)
    x = make(40, 40, 16, 16, positive=False, decay=decay, state=True)
    compare(x, torch.float32, "cpu", LIMITS, is_causal=True, normalized=False)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_many_features_in_tiles(is_causal: bool) -> None:
    x = make(40, 40, 130, 60, scale=True, decay=is_causal)
    compare(x, torch.float32, "cpu", LIMITS, is_causal=is_causal)


def test_only_the_output_has_a_gradient() -> None:
    x = make(20, 20, 16, 16, decay=True, state=True)
    compare(x, torch.float32, "cpu", LIMITS, weights=(1.0, 0, 0, 0), is_causal=True)


def test_half_precision_sums_do_not_overflow() -> None:
    x = make(70, 70, 16, 16)
    x["q"], x["k"], x["v"] = x["q"] * 60, x["k"] * 60, x["v"] * 60
    compare(x, torch.float16, "cpu", (0.001, 0.005), weights=(1.0, 1e-6, 0, 0), is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_queries_not_kept(is_causal: bool) -> None:
    x = make(40, 40, 16, 16, scale=True)
    keep = torch.ones(1, 1, 40, dtype=torch.bool)
    keep[..., 5:9] = False
    x["q"][:, :, 5:9] = torch.nan
    compare(x, torch.float32, "cpu", LIMITS, is_causal=is_causal, query_keep=keep)


def test_rows_that_see_no_key() -> None:
    x = {name: y.float() for name, y in make(20, 20, 16, 16).items()}
    x["key_scale"] = torch.zeros(1, 1, 20)
    x["key_scale"][..., 9:] = 1
    x = {name: y.requires_grad_() for name, y in x.items()}
    out, den, _, _ = attend(x, is_causal=True)
    assert (out[:, :, :9] == 0).all()
    assert (den[:, :, :9] == 0).all()
    for gradient in torch.autograd.grad(out.square().sum(), list(x.values())):
        assert gradient.isfinite().all()
        assert (gradient[:, :, :9] == 0).all()


def test_split_and_resume() -> None:
    x = {name: y.float() for name, y in make(50, 50, 16, 16, decay=True, scale=True).items()}
    whole, _, kv, z = attend(x, is_causal=True)
    state: Tensors = {}
    parts = []
    for start, stop in ((0, 7), (7, 8), (8, 50)):
        piece = {name: y[:, :, start:stop] for name, y in x.items()}
        out, _, *sums = attend({**piece, **state}, is_causal=True)
        state = dict(zip(("kv", "z"), sums, strict=True))
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state["kv"], kv)
    torch.testing.assert_close(state["z"], z)


def test_output_lies_as_the_projection_reads_it() -> None:
    x = {name: y.float() for name, y in make(20, 20, 16, 16, heads=2).items()}
    assert attend(x, is_causal=True)[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_operators(everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake kernels and autograd registration, as PyTorch checks them."""
    _cut(monkeypatch, 16, 1)
    x = make(9, 9, 16, 16, scale=everything, decay=everything, state=everything)
    given = {name: y.float().nan_to_num().requires_grad_() for name, y in x.items()}
    q, k, v, scale, decay, kv, z = (given.get(name) for name in NAMES)
    keep = torch.ones(1, 1, 9, dtype=torch.bool) if everything else None
    arguments = (q, k, v, scale, keep, decay, kv, z, True, True, 1, 1.0, 1.0)
    torch.library.opcheck(torch.ops.hf_linear_attn.linear_attention, arguments)


def test_compiles_as_one_graph() -> None:
    x = {name: y.float().requires_grad_() for name, y in make(20, 20, 16, 16, decay=True).items()}
    wanted, found = (
        torch.autograd.grad(function(x, is_causal=True)[0].square().sum(), list(x.values()))
        for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager"))
    )
    for expected, actual in zip(wanted, found, strict=True):
        torch.testing.assert_close(actual, expected)


def test_autocast_leaves_the_dtypes_alone() -> None:
    x = {name: y.float() for name, y in make(20, 20, 16, 16).items()}
    wanted = attend(x, is_causal=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(x, is_causal=True)[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 1, 8, 17)}, "Allowed: q"),
        ({"key_scale": (1, 1, 9)}, "key_scale must be"),
        ({"log_decay": (1, 1, 9)}, "log_decay must be"),
        ({"kv": (1, 1, 16, 17)}, "A state is"),
        ({"q": (1, 1, 300, 16)}, "at least as many keys"),
        ({"q": (1, 1, 4, 16), "kv": (1, 1, 16, 16)}, "initial_state needs"),
        ({"is_causal": False, "log_decay": (1, 1, 8)}, "direction"),
        ({"feature_map": "softplus"}, "allowed: 'identity'"),
        ({"q_multiplier": 2.0}, "need a feature map"),
        ({"q": (1, 1, 8, 300), "k": (1, 1, 8, 300)}, "At most 256"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    x: dict[str, Any] = {"q": (1, 1, 8, 16), "k": (1, 1, 8, 16), "v": (1, 1, 8, 16)} | change
    if "kv" in x:
        x["z"] = (1, 1, 16)
    tensors = {name: torch.ones(shape) for name, shape in x.items() if isinstance(shape, tuple)}
    options = {name: y for name, y in x.items() if not isinstance(y, tuple)}
    with pytest.raises(ValueError, match=message):
        attend(tensors, **({"is_causal": True} | options))


GPU_LIMITS = {torch.float32: LIMITS, torch.float16: (0.002, 0.005), torch.bfloat16: (0.005, 0.01)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(GPU_LIMITS), ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(
    ("length", "features", "dim"),
    [(1, 64, 64), (63, 64, 64), (500, 60, 60), (1000, 128, 64), (777, 256, 64), (300, 16, 16), (640, 128, 128)],
)
def test_gpu_outputs_and_gradients(length: int, features: int, dim: int, is_causal: bool, dtype: torch.dtype) -> None:
    x = make(length, length, features, dim, heads=2, batch=2, scale=True)
    compare(x, dtype, "cuda", GPU_LIMITS[dtype], is_causal=is_causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(GPU_LIMITS), ids=str)
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_gpu_fused_feature_maps(feature_map: str, dtype: torch.dtype) -> None:
    x = make(333, 333, 64, 64, heads=2, positive=False, scale=True)
    options = {"feature_map": feature_map, "normalized": feature_map == "elu"}
    # The features are rounded as the inputs are, which the dense formula does not do.
    compare(x, dtype, "cuda", tuple(2 * y for y in GPU_LIMITS[dtype]), is_causal=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(GPU_LIMITS), ids=str)
@pytest.mark.parametrize("normalized", [False, True], ids=["sums", "normalized"])
@pytest.mark.parametrize(("q_len", "k_len"), [(200, 200), (1, 200), (70, 200)])
def test_gpu_decay(q_len: int, k_len: int, normalized: bool, dtype: torch.dtype) -> None:
    x = make(q_len, k_len, 64, 64, heads=2, scale=True, decay=True, state=q_len == k_len)
    limits = GPU_LIMITS[dtype]
    # Gradients of log-decays are running sums of rounded products.
    compare(x, dtype, "cuda", (limits[0], 4 * limits[1]), is_causal=True, normalized=normalized)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(GPU_LIMITS), ids=str)
@pytest.mark.parametrize("batch", [1, 40], ids=["cut", "whole"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_gpu_long_inputs(is_causal: bool, batch: int, dtype: torch.dtype) -> None:
    """4096 tokens, in one segment where there are programs enough, else in many; the last head is compared."""
    torch.manual_seed(0)
    shape = (batch, 8, 4096, 64)
    given = {n: (torch.rand(shape, device="cuda") + 0.1).to(dtype).requires_grad_() for n in ("q", "k")}
    given["v"] = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    out = attend(given, is_causal=is_causal)[0]
    factor = torch.randn_like(out[-1, -1])
    found = torch.autograd.grad((out[-1, -1] * factor).sum(), list(given.values()))
    exact = {n: y.detach()[-1:, -1:].double().requires_grad_() for n, y in given.items()}
    wanted = dense(exact, is_causal=is_causal)[0]
    limits = GPU_LIMITS[dtype]
    assert rms(out[-1, -1] - wanted[0, 0]) / rms(wanted) < limits[0]
    for right, gradient in zip(
        torch.autograd.grad((wanted[0, 0] * factor).sum(), list(exact.values())), found, strict=True
    ):
        assert rms(gradient[-1, -1] - right[0, 0]) / rms(right) < limits[1]
        assert not gradient[:-1].any()


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit() -> None:
    x = {n: y.to("cuda", torch.bfloat16).requires_grad_() for n, y in make(1000, 1000, 64, 64, heads=4).items()}
    runs = [
        torch.autograd.grad(attend(x, is_causal=True)[0].float().square().sum(), list(x.values())) for _ in range(3)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_gpu_streams_do_not_disturb_each_other() -> None:
    inputs = [{n: y.to("cuda", torch.bfloat16) for n, y in make(900, 900, 64, 64, seed=s).items()} for s in (1, 2)]
    alone = [attend(x, is_causal=True)[0] for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        found = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(attend(x, is_causal=True)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


@pytest.mark.gpu
def test_gpu_graph_capture() -> None:
    x = {n: y.to("cuda", torch.bfloat16) for n, y in make(500, 500, 64, 64).items()}
    wanted = attend(x, is_causal=True)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend(x, is_causal=True)[0]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)
