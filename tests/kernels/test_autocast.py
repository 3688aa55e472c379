"""Mixed precision on the way to the kernels: float32 parameters, and tokens as autocast leaves them.

A kernel's own rounding is tested where the kernel is. Here it is what stands around it, which autocast rewrites: every
matrix product that no op protects becomes one of half precision.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn import convert_model, get_variant, set_backend
from hf_linear_attn.kernels.sparse import op as block_sparse
from hf_linear_attn.ops.features.maps import ExponentialMap, KeyWeights, ScaledMap, TokenMap
from hf_linear_attn.ops.linear.attention import feature_map_attention
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.testing.contract import Subject
from hf_linear_attn.testing.tools import draw, floats, padding_masks, tokens
from hf_linear_attn.variants.base import AttentionInputs
from tests.kernels.subjects import label, subjects
from tests.tiny import base_model, causal_families, causal_lm, main_family, small_options, token_batch, variants_for

LENGTH = 21
# Those of the contract's law `low_precision`.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01}


def _cases() -> list[Any]:
    """Subjects in both precisions; with the defaults in bfloat16 they always run."""
    found = []
    for subject in subjects():
        for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            marks = () if not subject.options and dtype == torch.bfloat16 else pytest.mark.heavy
            found.append(pytest.param(subject, dtype, marks=marks, id=f"{label(subject)}-{precision}"))
    return found


def _of_projections(inputs: AttentionInputs, dtype: torch.dtype, *, rotary: bool) -> AttentionInputs:
    """Tokens as projections under autocast give them; rotary embeddings bring queries and keys back to float32."""
    half = floats(inputs, lambda x: x.to(dtype))
    if not rotary:
        return half
    return dataclasses.replace(half, query=half.query.float(), key=half.key.float())


def _backend(subject: Subject) -> str:
    """`"triton"`, or what `"auto"` comes to under options that no kernel serves."""
    module = subject.build(dtype=torch.float32)
    module.backend = "triton"
    try:
        module(draw(module.context, 1, batch=1, dtype=torch.float32))
    except RuntimeError as error:
        if "there is no kernel" not in str(error) and "the kernels forget in one direction" not in str(error):
            raise
        return "torch"
    return "triton"


def _attend(module: Any, inputs: AttentionInputs, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Output, without the rows of padding, and the gradients of inputs and parameters.

    With `dtype` under autocast; the backward pass is outside of it, as PyTorch asks: inside it rounds products itself.
    """
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in ("query", "key", "value")}
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        output = module(dataclasses.replace(inputs, **leaves))[0]
    assert inputs.token_mask is not None
    output = output.masked_fill(~inputs.token_mask[:, None, :, None], 0)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    wanted = leaves | {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((output.float() * weights).sum(), list(wanted.values()), allow_unused=True)
    return {"output": output.detach(), **{k: x for k, x in zip(wanted, grads, strict=True) if x is not None}}


def _errors(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == exact.keys()
    assert all(x.isfinite().all() for x in found.values())
    return {k: float((found[k].float() - x).norm() / x.norm().clamp(min=1e-6)) for k, x in exact.items()}


@pytest.mark.parametrize(("subject", "dtype"), _cases())
def test_training_is_that_of_the_same_numbers_in_float32(subject: Subject, dtype: torch.dtype) -> None:
    """As close as the contract asks, or as plain PyTorch under the same autocast is where a gradient cancels out."""
    module = subject.build(dtype=torch.float32, trained=True)
    exact = draw(module.context, LENGTH, batch=1, padding=padding_masks(2, LENGTH)["left"][1:], dtype=torch.float32)
    given = _of_projections(exact, dtype, rotary=subject.is_causal)
    module.backend = "torch"
    wanted = _attend(module, floats(given, lambda x: x.float()))
    twin = _errors(_attend(module, given, dtype), wanted)
    module.backend = _backend(subject)
    found = _errors(_attend(module, given, dtype), wanted)
    too_far = {k: (error, twin[k]) for k, error in found.items() if error > max(TOLERANCE[dtype], 2 * twin[k])}
    assert not too_far, f"relative errors, and those of plain PyTorch: {too_far}"


@pytest.mark.parametrize("key", ["long_short", "linear", "lolcats", "nystromformer", "reformer"])
def test_a_backward_pass_of_our_own_is_not_rounded_where_autocast_is_on(key: str) -> None:
    """In a loop that calls `loss.backward()` under autocast, float16 does not hold what hides a key."""
    module = Subject(get_variant(key), False, {}).build(dtype=torch.float32, trained=True)
    given = _of_projections(draw(module.context, LENGTH, batch=1, dtype=torch.float32), torch.float16, rotary=False)
    leaves = {name: getattr(given, name).detach().requires_grad_() for name in ("query", "key", "value")}
    with torch.autocast("cpu", dtype=torch.float16):
        module(dataclasses.replace(given, **leaves))[0].float().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves.values())


@pytest.mark.parametrize(("subject", "dtype"), [case for case in _cases() if case.values[0].decodes])
@torch.no_grad()
def test_decoding_is_that_of_the_same_numbers_in_float32(subject: Subject, dtype: torch.dtype) -> None:
    module = subject.build(dtype=torch.float32, trained=True)
    exact = draw(module.context, 11, batch=1, dtype=torch.float32)
    given = _of_projections(exact, dtype, rotary=bool(subject.options))

    def decode(inputs: AttentionInputs) -> dict[str, torch.Tensor]:
        state, rows = module.init_state(1, inputs.query.dtype, torch.device("cpu")), []
        for part in (range(9), range(9, 10), range(10, 11)):
            output, state = module(tokens(inputs, torch.tensor(list(part))), state)
            rows.append(output)
        return {"output": torch.cat(rows, 2)}

    module.backend = "torch"
    wanted = decode(floats(given, lambda x: x.float()))
    module.backend = _backend(subject)
    with torch.autocast("cpu", dtype=dtype):
        error = _errors(decode(given), wanted)["output"]
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("exponential", [False, True], ids=["weight", "exponent"])
def test_what_a_map_computes_for_the_kernels_is_not_rounded(exponential: bool, trains: bool) -> None:
    """Log weights about 128: half precision would round them by up to .06, and so change weights by as much."""
    q, k, v = (1 + 0.1 * torch.randn(1, 2, 9, 16).half() for _ in range(3))
    q.requires_grad_(trains)
    weight, mean = torch.randn(2, 16, 24), torch.full((2, 16), 8.0)
    q_map: Any = ScaledMap("elu", 1.0)
    k_map: Any = ScaledMap("elu", 1.0, mean)
    if exponential:
        q_map, k_map = (
            ExponentialMap(
                lambda x: (x, None),
                lambda weights=weights: (TokenMap("projected_exp", weight=weight @ torch.eye(24)), weights),
                lambda x: (mean[:, None] @ x.float().mT)[..., 0, :],
            )
            for weights in (KeyWeights(), KeyWeights(1.0, mean))
        )

    def attend() -> torch.Tensor:
        return feature_map_attention(q, k, v, q_map, k_map, is_causal=True, backend="triton")[0]

    expected = attend()
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(attend(), expected)


def test_rotary_embeddings_do_not_bring_blocks_back_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own attention takes half precision under autocast; a float32 kernel is several times slower."""
    attend, seen = block_sparse.block_sparse_attention, set()

    def recorded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.update({q.dtype, k.dtype, v.dtype})
        return attend(q, k, v, *args, **kwargs)

    monkeypatch.setattr(block_sparse, "block_sparse_attention", recorded)
    for subject in subjects():
        if subject.spec.kernel == "block_sparse" and subject.spec.has_kernel(subject.is_causal) and not subject.options:
            module = subject.build(dtype=torch.float32)
            module.backend = "triton"
            given = _of_projections(draw(module.context, LENGTH, batch=1), torch.float16, rotary=True)
            with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
                module(given)
    assert seen == {torch.float16}


def _models() -> list[tuple[str, str]]:
    """One variant of each kernel on an encoder and on a decoder with rotary embeddings, where it serves them."""
    rotary = next(family for family in causal_families() if get_patcher(family).rotary)
    found = {}
    for family in (main_family(False), rotary):
        for key in variants_for(family):
            spec = get_variant(key)
            if spec.has_kernel(family == rotary):
                found.setdefault((spec.kernel, family), (key, family))
    return list(found.values())


@pytest.mark.parametrize(("variant", "family"), _models())
def test_a_model_trains_and_generates(variant: str, family: str) -> None:
    causal = family in causal_families() and family != main_family(False)
    model: Any = causal_lm(family) if causal else base_model(family)
    convert_model(model, variant, **small_options(variant, family))
    batch = token_batch(batch=1, length=7)
    batch["attention_mask"][:, :2] = 0
    expected = model(**batch)[0]
    set_backend(model, "triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**batch)[0]
        found.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        real = batch["attention_mask"].bool()
        error = (found[real].float() - expected[real]).norm() / expected[real].norm()
        assert error < 0.1  # of two layers, whose own products are of half precision
        if causal:
            made = model.generate(**batch, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
            assert made.shape == (1, 9)
