"""What a converted model waits for on a GPU: the CPU should run ahead of it, and CUDA graphs capture a step.

`testing.on_gpu` has tensors of the CPU that say they lie on a GPU, and note where a value is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn import convert_model, set_backend
from hf_linear_attn.ops.base import packing
from hf_linear_attn.ops.base.memo import known_zero
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.testing.on_gpu import OnGpu, Watched, gpu, move
from tests.tiny import (
    base_model,
    cached,
    causal_families,
    causal_lm,
    main_family,
    over,
    representative_variants,
    small_options,
    token_batch,
    variants_for,
)

ENCODER = main_family(causal=False)
DECODER = next(family for family in causal_families() if get_patcher(family).rotary)
PAIRS = [(variant, family) for family in (ENCODER, DECODER) for variant in variants_for(family)]

# What does read a value, where nothing else decides which of two forms is right. A line that no longer holds fails.
_DECAYS = {("ops/linear/decay:_split", ".__bool__()")}  # encoders that forget run plain PyTorch on a GPU
READS = {
    ("efficient", DECODER): {("ops/prefix/blocks:_passes", ".__bool__()")},
    ("gated", ENCODER): _DECAYS,
    ("retention", ENCODER): _DECAYS,
    ("rfa", ENCODER): _DECAYS,
}


@pytest.fixture(autouse=True)
def _on_gpu() -> Iterator[None]:
    with gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # autocast for a device that is not there
        yield


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1], device=x.device),
        lambda x: torch.arange(3).to(x.device),
    ],
)
def test_what_waits_is_seen(read: Callable[[torch.Tensor], Any]) -> None:
    with Watched() as watched:
        read(OnGpu(torch.arange(3)))
    assert len(watched.reads) == 1


def test_what_does_not_wait_is_not_seen() -> None:
    with Watched() as watched:
        x = OnGpu(torch.randn(3, 4))
        y = torch.arange(4, device=x.device) + x.new_ones(3, 4).cumsum(-1) @ x.mT.masked_fill(x.mT > 0, 0) @ x
        assert y.device == x.device == torch.zeros_like(y).device
        assert torch.arange(3).sum().item() == 3  # of the CPU itself
    assert watched.reads == set()


def _model(variant: str, family: str) -> Any:
    model = base_model(family) if family == ENCODER else causal_lm(family)
    return convert_model(model, variant, **small_options(variant, family))


def _batch(length: int = 37) -> dict[str, torch.Tensor]:
    batch = token_batch(length=length)
    batch["attention_mask"][1, :9] = 0
    return batch


def _moved(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: OnGpu(x) for name, x in batch.items()}


@over(PAIRS)
def test_a_training_forward_with_padding_waits_for_nothing(variant: str, family: str) -> None:
    model = move(_model(variant, family).train())
    with Watched():  # lists that are made once
        model(**_moved(_batch()))
    with Watched() as watched:
        model(**_moved(_batch()))
    assert watched.reads == READS.get((variant, family), set())


@over([pair for pair in PAIRS if pair[1] == DECODER])
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "no mask"])
@torch.no_grad()
def test_a_decode_step_waits_for_nothing(variant: str, family: str, masked: bool) -> None:
    model, batch, cache = move(_model(variant, family)), _moved(_batch(43)), DynamicCache()
    with Watched():
        before = {name: x[:, :40] for name, x in batch.items() if masked or name == "input_ids"}
        model(**before, **cached(model, cache))
    with Watched() as watched:
        for end in range(41, 44):
            step = {"input_ids": batch["input_ids"][:, end - 1 : end]}
            if masked:
                step["attention_mask"] = batch["attention_mask"][:, :end]
            model(**step, **cached(model, cache))
    assert watched.reads == set()


@over([(variant, family) for family in (ENCODER, DECODER) for variant in representative_variants(family)])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_mask_that_is_not_read_says_the_same(variant: str, family: str, side: str) -> None:
    """Outputs by plain PyTorch, at the last place of a prompt that is padded on the right too."""
    model, batch = _model(variant, family), token_batch(batch=2, length=37)
    place = torch.arange(37)
    batch["attention_mask"][1] = (place >= 9 if side == "left" else place < 28).long()
    options: dict[str, Any] = {} if family == ENCODER else {"use_cache": False}
    expected = model(**batch, **options)[0]
    every = model(input_ids=batch["input_ids"], **options)[0]
    move(set_backend(model, "torch"))
    with Watched():
        found = model(**_moved(batch), **options)[0]
        full = model(**_moved({**batch, "attention_mask": torch.ones_like(batch["input_ids"])}), **options)[0]
    torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(full.values, every, atol=1e-4, rtol=1e-3)


def test_a_buffer_is_looked_at_twice_at_most() -> None:
    """Distributed training copies buffers in every step: a third look would be one in every step."""
    buffer = OnGpu(torch.zeros(3))
    seen = []
    for _ in range(4):
        with Watched() as watched:
            known = [known_zero(buffer), known_zero(buffer)]
        seen.append((known, len(watched.reads)))
        buffer.copy_(OnGpu(torch.zeros(3)))
    assert seen == [([True, True], 1)] * 2 + [([False, False], 0)] * 2


def test_a_mask_on_the_cpu_is_read_there_and_regroups_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CALL_TOKENS_ELSEWHERE", 1)
    plans: list[packing.SequencePlan] = []
    plan_call = packing.plan_call
    monkeypatch.setattr("hf_linear_attn.attention.plan_call", lambda *args: plans.append(plan_call(*args)) or plans[-1])
    model = move(_model(representative_variants(ENCODER)[0], ENCODER))
    batch = token_batch(batch=2, length=60)
    batch["attention_mask"][1, 5:] = 0
    with Watched() as watched:
        model(input_ids=OnGpu(batch["input_ids"]), attention_mask=batch["attention_mask"])
    assert len(plans[0].buckets) == 2
    assert {how for _, how in watched.reads} == {"a copy from the CPU"}
    # By the plan, once for all layers, and by Transformers.
    assert "attention:_token_mask" not in {place for place, _ in watched.reads}
