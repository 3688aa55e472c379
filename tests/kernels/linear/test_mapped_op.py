"""Linear attention from tokens in the kernels against features in float64, for each kind of map."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn import get_variant
from hf_linear_attn.kernels.linear import mapped_op
from hf_linear_attn.ops.features import softmax_map as softmax
from hf_linear_attn.ops.features.maps import (
    ExponentialMap,
    KeyWeights,
    ScaledMap,
    SpelledMap,
    TokenMap,
    relu_features,
)
from hf_linear_attn.ops.linear import attention
from hf_linear_attn.testing.contract import Subject
from hf_linear_attn.testing.tools import draw
from tests.kernels.subjects import forgets_both_ways

HEADS, DIM, WIDTH = 2, 20, 24


def _elu(x: torch.Tensor, of_keys: bool = True) -> ScaledMap:
    return ScaledMap("elu", 0.7, torch.randn(HEADS, DIM).to(x) if of_keys else None, 0.5)


def _relu(x: torch.Tensor, of_keys: bool = True) -> ScaledMap:
    return ScaledMap("relu", 0.7, torch.randn(HEADS, DIM).to(x) if of_keys else None, 0.5)


def _projected(x: torch.Tensor, of_keys: bool = True) -> SpelledMap:
    weight, bias, mean = (torch.randn(HEADS, *shape).to(x) for shape in ((DIM, 40), (40,), (DIM,)))

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        shared = 0.3 * (x * mean.to(x)[:, None]).sum(-1) if of_keys else None
        return relu_features(x @ weight.to(x) + bias.to(x)[:, None])[0], shared

    spelled = TokenMap("projected_relu", weight=weight, bias=bias), KeyWeights(0.3, mean) if of_keys else KeyWeights()
    return SpelledMap(function, (weight, bias), spelled=lambda: spelled)


def _normalized(x: torch.Tensor, of_keys: bool = True) -> SpelledMap:
    weight, center = torch.randn(HEADS, DIM, 40).to(x), torch.randn(HEADS, DIM).to(x)

    def function(x: torch.Tensor, weight: torch.Tensor) -> Any:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return relu_features(F.normalize(x - center.to(x)[:, None], dim=-1) @ weight.to(x))

    spelled = TokenMap("projected_relu", weight=weight, center=center, normalized=True), KeyWeights()
    return SpelledMap(function, (weight,), spelled=lambda: spelled)


def _exp(x: torch.Tensor, of_keys: bool = True) -> ExponentialMap:
    weight, square, center, mean = (torch.randn(HEADS, *s).to(x) for s in ((DIM, 33), (DIM, DIM), (DIM,), (DIM,)))
    bias = torch.randn(HEADS, 33).to(x)

    def function(x: torch.Tensor) -> Any:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        moved = x - center.to(x)[:, None]
        u = 0.7 * (moved @ weight.to(x) + bias.to(x)[:, None])
        peak = u.amax(-1)
        rest = (x * mean.to(x)[:, None]).sum(-1) - (moved @ square.to(x)).square().sum(-1) / 2
        return (u - peak[..., None]).exp(), peak + 0.6 * rest if of_keys else peak

    weights = KeyWeights(0.6, mean, square) if of_keys else KeyWeights()
    spelled = TokenMap("projected_exp", 0.7, weight, center, bias), weights
    return ExponentialMap(function, lambda: spelled)


def _softmax(x: torch.Tensor, of_keys: bool = True) -> SpelledMap:
    weight, bias = torch.randn(HEADS, 36, DIM).to(x), torch.randn(HEADS, 36).to(x)
    exp_form = softmax.QUERY_CENTROIDS if of_keys else softmax.KEY_CENTROIDS
    form = torch.tensor([softmax.PUBLISHED, softmax.QUERY_CENTROIDS], device=x.device)

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return softmax.softmax_map(x, weight, bias, form, exp_form)

    spelled = TokenMap("projected_softmax", weight=weight.mT, bias=bias, form=form, exp_form=exp_form), KeyWeights()
    return SpelledMap(function, (weight, bias), spelled=lambda: spelled)


MAPS = {
    "elu": _elu,
    "relu": _relu,
    "projected_relu": _projected,
    "normalized": _normalized,
    "exp": _exp,
    "softmax": _softmax,
}


def _tokens(q_len: int, k_len: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    shapes = (q_len, DIM), (k_len, DIM), (k_len, WIDTH)
    return [torch.randn(2, n, HEADS, size, device=device).transpose(1, 2).to(dtype) for n, size in shapes]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that these kernels served."""
    found: list[Any] = []

    def watched(*args: Any, of: Any = mapped_op.mapped_attention, **options: Any) -> Any:
        found.append(options)
        return of(*args, **options)

    monkeypatch.setattr(mapped_op, "mapped_attention", watched)
    return found


@torch.no_grad()
def _compare(kind: str, given: list[torch.Tensor], limit: float, **options: Any) -> Any:
    """The kernels beside the plain form in float64; returns both outputs, log denominators and states."""
    torch.manual_seed(1)
    maps = MAPS[kind](given[0].float(), False), MAPS[kind](given[0].float())
    exact = [x.double() for x in given]
    state = options.pop("state", None)
    wide = None if state is None else {name: x.double() for name, x in state.items()}
    run = attention.feature_map_attention_with_normalizer
    found = run(*given, *maps, **options, state=state, backend="triton")
    wanted = run(*exact, *maps, **options, state=wide, backend="torch")
    mask = options.get("token_mask")
    real = slice(None) if mask is None or not options["is_causal"] else mask[:, -given[0].shape[2] :]
    for one, other in zip(found[:2], wanted[:2], strict=True):
        one, other = (x.transpose(1, 2)[real] for x in (one, other))
        seen = other > -1e3
        assert (one[seen] - other[seen]).abs().max() < limit * max(1, other[seen].abs().max())
        assert (one.double()[~seen] < -1e3).all()
    return found, wanted


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(
    ("q_len", "k_len", "is_causal"), [(70, 70, True), (5, 70, True), (40, 70, False), (1, 1, True)]
)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_outputs_and_denominators(
    kind: str, q_len: int, k_len: int, is_causal: bool, padded: bool, calls: list[Any]
) -> None:
    torch.manual_seed(0)
    given, mask = _tokens(q_len, k_len), None
    if padded:
        mask = torch.rand(2, k_len) < 0.7
        mask[0, : k_len // 2] = False
        given[1] = given[1].masked_fill(~mask[:, None, :, None], float("nan"))
        given[2] = given[2].masked_fill(~mask[:, None, :, None], float("inf"))
    _compare(kind, given, 1e-4, token_mask=mask, is_causal=is_causal)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", MAPS)
def test_a_sequence_in_parts_is_the_sequence(kind: str, calls: list[Any]) -> None:
    torch.manual_seed(0)
    given, state = _tokens(50, 50), attention.init_linear_state(2, HEADS, _width(kind), WIDTH, torch.float32, "cpu")
    outputs = []
    for part in (slice(0, 33), slice(33, 34), slice(34, 50)):
        (output, _, state), _ = _compare(kind, [x[:, :, part] for x in given], 1e-4, is_causal=True, state=state)
        outputs.append(output)
    whole, _ = _compare(kind, given, 1e-4, is_causal=True)
    torch.testing.assert_close(torch.cat(outputs, 2), whole[0], atol=1e-4, rtol=1e-4)
    assert len(calls) == 4


def _width(kind: str) -> int:
    return {"projected_relu": 40, "normalized": 40, "exp": 33, "softmax": 36}.get(kind, DIM)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", MAPS)
@torch.no_grad()
def test_decay_and_given_weights(kind: str, padded: bool, calls: list[Any]) -> None:
    """Decays of heads that forget little, fast and everything at once, also over a state."""
    torch.manual_seed(0)
    given, mask = _tokens(150, 150), torch.rand(2, 150) < 0.7 if padded else None
    decay = -torch.rand(2, HEADS, 150) * torch.tensor([0.02, 3.0])[:, None]
    decay[0, 0, 70] = -torch.inf
    extra = {"log_decay": decay, "key_log_weight": 3 * torch.randn(2, HEADS, 150)}
    maps = MAPS[kind](given[0], False), MAPS[kind](given[0])

    def run(wide: bool, backend: str) -> torch.Tensor:
        state, outputs = None, []
        if not padded:
            state = attention.init_linear_state(2, HEADS, _width(kind), WIDTH, torch.float64, torch.device("cpu"))
            state = {name: x if wide else x.float() for name, x in state.items()}
        for part in (slice(0, 149), slice(149, 150)) if state is not None else (slice(0, 150),):
            tensors = [(x.double() if wide else x)[:, :, part] for x in given]
            options = {name: (x.double() if wide else x)[:, :, part] for name, x in extra.items()}
            output, state = attention.feature_map_attention(
                *(*tensors, *maps), **options, token_mask=mask, is_causal=True, state=state, backend=backend
            )
            outputs.append(output)
        return torch.cat(outputs, 2)

    found, wanted = run(False, "triton"), run(True, "torch")
    if mask is not None:
        found, wanted = (x.transpose(1, 2)[mask] for x in (found, wanted))
    torch.testing.assert_close(found.double(), wanted, atol=2e-4, rtol=1e-4)
    assert len(calls) == 1 + (not padded)


@torch.no_grad()
def test_encoders_with_given_weights_go_another_way(calls: list[Any]) -> None:
    torch.manual_seed(0)
    given, weights = _tokens(40, 40), 3 * torch.randn(2, HEADS, 40)
    maps = _elu(given[0], False), _elu(given[0])

    def run(wide: bool, backend: str) -> torch.Tensor:
        tensors = (x.double() if wide else x for x in (*given, weights))
        *tokens, weight = tensors
        options = {"key_log_weight": weight, "is_causal": False, "backend": backend}
        return attention.feature_map_attention(*tokens, *maps, **options)[0]

    torch.testing.assert_close(run(False, "triton").double(), run(True, "torch"), atol=1e-4, rtol=1e-4)
    assert not calls


@pytest.mark.parametrize("is_causal", [True, False])
def test_no_weight_overflows_and_none_reaches_an_earlier_row(is_causal: bool, calls: list[Any]) -> None:
    """A key of log weight +1,000 in the middle, one of -1,000 before all others."""
    torch.manual_seed(0)
    given = _tokens(40, 40)
    mean = torch.zeros(HEADS, DIM)
    mean[:, 0] = 1.0
    given[1][..., 0] = 0.0
    given[1][:, :, 0, 0], given[1][:, :, 20, 0] = -1000.0, 1000.0
    maps = ScaledMap("elu", 0.01), ScaledMap("elu", 0.01, mean)
    with torch.no_grad():
        found, _ = attention.feature_map_attention(*given, *maps, is_causal=is_causal, backend="triton")
    wanted, _ = attention.feature_map_attention(*(x.double() for x in given), *maps, is_causal=is_causal)
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kind", MAPS)
def test_half_precision(kind: str, dtype: torch.dtype, calls: list[Any]) -> None:
    torch.manual_seed(0)
    _compare(kind, _tokens(40, 40, dtype), 2e-2, is_causal=True)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("key", "options"), [("linear", {}), ("hedgehog", {}), ("performer", {"num_features": 40})], ids=str
)
@torch.no_grad()
def test_a_compiled_layer_takes_them_in_one_graph(key: str, options: dict[str, Any], calls: list[Any]) -> None:
    module = Subject(get_variant(key), True, options).build(dtype=torch.float32, trained=True)
    module.backend = "triton"
    inputs = draw(module.context, 20, batch=1, dtype=torch.float32)
    expected = module(inputs)[0]
    assert len(calls) == 1

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return module(dataclasses.replace(inputs, query=query, key=key, value=value))[0]

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs.query, inputs.key, inputs.value), expected)


def test_gradients_take_the_way_through_features(calls: list[Any]) -> None:
    q, k, v = _tokens(8, 8)
    output, _ = attention.feature_map_attention(q.requires_grad_(), k, v, _elu(q, False), _elu(q), is_causal=True)
    output.sum().backward()
    assert not calls
    assert q.grad is not None


def test_long_sequences_of_few_heads_are_cut(calls: list[Any]) -> None:
    q, v = (torch.empty(1, 1, 4096, 16) for _ in range(2))
    assert not mapped_op.serves(q, v, TokenMap("elu"), is_causal=True)
    assert mapped_op.serves(q, v, TokenMap("elu"), is_causal=False)


def test_what_is_causal_only_is_refused_elsewhere() -> None:
    q, k, v = _tokens(5, 5)
    with pytest.raises(ValueError, match="log_weight and log_decay need is_causal=True"):
        mapped_op.mapped_attention(
            *(q, k, v, TokenMap("elu"), TokenMap("elu"), KeyWeights()),
            log_weight=torch.zeros(2, HEADS, 5),
            is_causal=False,
        )


def test_operator() -> None:
    q, k, v = _tokens(5, 5)
    (q_map, _), (k_map, weights) = _exp(q, False).spelled(), _exp(q).spelled()
    codes = [(mapped_op.KINDS[x.kind], *x[1:]) for x in (q_map, k_map)]
    given = (q, k, v, *(None,) * 7, *codes[0], *codes[1], *weights, True)
    torch.library.opcheck(torch.ops.hf_linear_attn.mapped_attention, given)


LAYERS = [
    ("linear", {}),
    ("retention", {}),
    ("rfa", {"num_features": 24}),
    ("rfa", {"num_features": 24, "variance_reducer": False, "gate": True}),
    ("t2r", {}),
    ("hedgehog", {}),
    ("performer", {"num_features": 40}),
    ("performer", {"kernel": "hyperbolic", "num_features": 20}),
    ("performer", {"kernel": "positive", "num_features": 40, "variance_reducer": False}),
]


@pytest.mark.parametrize(
    ("key", "options", "is_causal"),
    [
        (key, options, is_causal)
        for key, options in LAYERS
        for is_causal in (True, False)
        if get_variant(key).has_kernel(is_causal)
        and not forgets_both_ways(Subject(get_variant(key), is_causal, options))
    ],
    ids=str,
)
@torch.no_grad()
def test_layers_are_their_twins(key: str, options: dict[str, Any], is_causal: bool, calls: list[Any]) -> None:
    module = Subject(get_variant(key), is_causal, options).build(dtype=torch.float32, trained=True)
    for name, x in module.named_buffers():
        if name.endswith(("mean", "map")):
            x.normal_(std=0.5)
    inputs = draw(module.context, 40, batch=1, padding=None, dtype=torch.float32)
    found = []
    for module.backend in ("triton", "torch"):
        found.append(module(inputs)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-3), (torch.float16, 2e-2), (torch.bfloat16, 5e-2)],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kind", MAPS)
def test_gpu_outputs(kind: str, is_causal: bool, dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    _compare(kind, _tokens(777, 777, dtype, "cuda"), limit, is_causal=is_causal)
