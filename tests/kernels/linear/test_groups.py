"""Keys and values that serve a group of heads are read as they are: the bits are those of keys for every head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from transformers import DynamicCache

from hf_linear_attn import convert_model, set_backend
from hf_linear_attn.kernels.linear import mapped_op, op, step
from hf_linear_attn.ops.features.maps import KeyWeights, TokenMap
from hf_linear_attn.ops.linear.attention import linear_attention
from hf_linear_attn.seam.cache import cache_keyword
from hf_linear_attn.testing.contract import Subject
from hf_linear_attn.testing.tools import draw, padding_masks, tokens
from tests.kernels.linear.test_op import _cut
from tests.kernels.subjects import cases, forgets_both_ways, subjects
from tests.tiny import causal_lm, token_batch

BATCH, HEADS, KEY_HEADS, DIM, WIDTH = 2, 4, 2, 20, 24


def _repeated(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None].expand(-1, -1, HEADS // KEY_HEADS, -1, -1).flatten(1, 2)


def _given(q_len: int, k_len: int, device: str = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (HEADS, q_len, DIM), (KEY_HEADS, k_len, DIM), (KEY_HEADS, k_len, WIDTH)
    return [torch.randn(BATCH, t, h, d, device=device).transpose(1, 2) for h, t, d in shapes]


def _same(ours: Any, theirs: Any) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def _outputs_and_gradients(repeat: bool, given: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in given)
    keys, values = (_repeated(k), _repeated(v)) if repeat else (k, v)
    found = op.linear_attention(q, keys, values, **options)
    loss = sum((x * torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape)).sum() for x in found)
    others = [x for x in (options.get("key_scale"), options.get("log_decay")) if x is not None]
    return [*found, *torch.autograd.grad(loss, [q, k, v, *others])]


@pytest.mark.parametrize("feature_map", ["identity", "elu"])
@pytest.mark.parametrize("segments", [1, 3], ids=["whole", "cut"])
@pytest.mark.parametrize("extra", ["", "key_scale", "log_decay", "state"])
def test_outputs_and_gradients(monkeypatch: pytest.MonkeyPatch, extra: str, segments: int, feature_map: str) -> None:
    _cut(monkeypatch, 16, segments)
    given = _given(50, 50)
    options: dict[str, Any] = {"is_causal": True, "feature_map": feature_map}
    if extra == "state":
        options["initial_state"] = torch.rand(BATCH, HEADS, DIM, WIDTH), torch.rand(BATCH, HEADS, DIM)
    elif extra:
        sign = -1 if extra == "log_decay" else 1
        options[extra] = (sign * torch.rand(BATCH, HEADS, 50)).requires_grad_()
    _same(*(_outputs_and_gradients(repeat, given, **options) for repeat in (False, True)))


@pytest.mark.parametrize("segments", [1, 3], ids=["whole", "cut"])
@pytest.mark.parametrize(("q_len", "k_len"), [(50, 50), (20, 50)])
def test_encoders(monkeypatch: pytest.MonkeyPatch, q_len: int, k_len: int, segments: int) -> None:
    _cut(monkeypatch, 16, segments)
    given = _given(q_len, k_len)
    _same(*(_outputs_and_gradients(repeat, given, is_causal=False, feature_map="elu") for repeat in (False, True)))


def _layers() -> list[Subject]:
    """Every method that reads groups and that kernels serve, each side."""
    served = (s for s in subjects() if s.spec.has_kernel(s.is_causal) and not forgets_both_ways(s))
    return [s for s in served if s.build().reads_groups]


@pytest.mark.parametrize("padding", [pytest.param(None, marks=pytest.mark.slow), "left"])
@pytest.mark.parametrize("subject", cases(_layers()))
@torch.no_grad()
def test_layers(subject: Subject, padding: str | None) -> None:
    """A whole sequence, then a state, two more tokens and one."""
    module = subject.build(dtype=torch.float32, trained=True)
    module.backend = "triton"
    mask = None if padding is None else padding_masks(BATCH, 21)[padding][1:]
    inputs = draw(module.context, 21, batch=BATCH if mask is None else 1, padding=mask, dtype=torch.float32)
    grouped = replace(inputs, key=inputs.key[:, ::2], value=inputs.value[:, ::2])
    both = grouped, replace(grouped, key=_repeated(grouped.key), value=_repeated(grouped.value))
    _same(*([module(x)[0]] for x in both))
    if not subject.decodes:
        return
    found: tuple[list[torch.Tensor], ...] = [], []
    for x, outputs in zip(both, found, strict=True):
        state = module.init_state(x.query.shape[0], x.query.dtype, x.query.device)
        for piece in (slice(0, 18), slice(18, 20), slice(20, 21)):
            output, state = module(tokens(x, torch.arange(21)[piece]), state)
            outputs += [output, *state.values()]
    _same(*found)


@pytest.mark.parametrize(
    ("method", "options", "prompt"),
    [
        ("linear", {}, True),
        ("performer", {"num_features": 32}, True),
        ("hedgehog", {}, True),
        ("t2r", {}, True),
        ("taylor", {}, False),  # a prompt's features are computed before, for each head
    ],
)
def test_models_hand_over_groups(
    method: str, options: dict[str, Any], prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt and of a step, to whichever kernel; the answer is that of PyTorch's form."""
    read: list[int] = []

    def watch(module: Any, name: str) -> None:
        run = getattr(module, name)

        def watched(q: torch.Tensor, k: torch.Tensor, *args: Any, **rest: Any) -> Any:
            read.append(k.shape[1])
            return run(q, k, *args, **rest)

        monkeypatch.setattr(module, name, watched)

    watch(mapped_op, "mapped_attention")
    watch(op, "linear_attention")
    watch(step, "decode_step")
    model = convert_model(causal_lm("llama"), method, **options)
    batch, logits = token_batch(2, 24), []
    for backend in ("torch", "triton"):
        set_backend(model, backend)
        cache = {cache_keyword(model.forward): DynamicCache(), "use_cache": True}
        with torch.no_grad():
            first = model(**batch, **cache).logits
            then = model(batch["input_ids"][:, :1], **cache).logits
        logits.append(torch.cat([first, then], 1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    config = model.config
    groups, heads, layers = config.num_key_value_heads, config.num_attention_heads, config.num_hidden_layers
    assert read == [groups if prompt else heads] * layers + [groups] * layers


def test_what_the_last_padded_place_reads_is_not_repeated_either(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = convert_model(causal_lm("llama"), "linear"), token_batch(2, 24)
    batch["attention_mask"][0, -5:] = 0
    expected = model(**batch).logits
    set_backend(model, "triton")
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", None)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("heads", "key_heads", "value_heads"), [(3, 2, 2), (2, 4, 4), (4, 1, 4)])
def test_heads_that_no_group_divides_are_refused(heads: int, key_heads: int, value_heads: int, backend: str) -> None:
    x = torch.ones(1, 4, 5, 8)
    given = x[:, :heads], x[:, :key_heads], x[:, :value_heads]
    with pytest.raises(ValueError, match=f"H / groups heads, got {key_heads} and {value_heads} for H = {heads}"):
        linear_attention(*given, is_causal=True, backend=backend)
    with pytest.raises(ValueError, match=r"k \[B, H / group, Tk, F\]"):
        op.linear_attention(*given, is_causal=True)
    state = torch.ones(1, heads, 8, 8), torch.ones(1, heads, 8), torch.ones(1, heads)
    elu = TokenMap("elu")
    for call in (
        lambda: mapped_op.mapped_attention(*given, elu, elu, KeyWeights(), is_causal=True),
        lambda: step.decode_step(*given, elu, elu, KeyWeights(), state),
    ):
        with pytest.raises(ValueError, match="k and v must have H / group heads each"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_gpu_outputs_and_gradients(dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in _given(200, 200, "cuda")]
    for is_causal in (True, False):
        options = {"is_causal": is_causal, "feature_map": "elu"}
        _same(*(_outputs_and_gradients(repeat, given, **options) for repeat in (False, True)))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["linear", "hedgehog"])
@torch.no_grad()
def test_gpu_models(method: str) -> None:
    """Of a prompt and of a step."""
    model = convert_model(causal_lm("llama"), method).to("cuda")
    ids, logits = token_batch(2, 24)["input_ids"].to("cuda"), []
    for backend in ("torch", "triton"):
        set_backend(model, backend)
        cache = {cache_keyword(model.forward): DynamicCache(), "use_cache": True}
        logits.append(torch.cat([model(ids, **cache).logits, model(ids[:, :1], **cache).logits], 1))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
