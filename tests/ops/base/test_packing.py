"""Plans of packed and padded batches: every token once, no bucket that costs more than it saves, exact gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_linear_attn.ops.base import packing


@pytest.mark.parametrize("call_tokens", [0, 64, 4096])
@pytest.mark.parametrize("padded", [False, True])
def test_a_plan_holds_every_token_once(call_tokens: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CALL_TOKENS", {"cpu": call_tokens})
    generator = torch.Generator().manual_seed(call_tokens + padded)
    for trial in range(20):
        lengths = torch.randint(1, 80, (1 + 3 * trial,), generator=generator)
        lengths = lengths if trial % 2 else (lengths.float() ** 1.7).long() + 1
        at = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
        mask = (torch.rand(at.shape, generator=generator) < (0.7 if padded else 2.0)) | (at == 0)
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        plan = packing.plan_call(1, at.shape[1], mask, seq_idx=document[None])
        if not plan.packed:
            assert len(lengths) == 1
            continue
        assert plan.index is not None
        assert plan.slot is not None
        real = torch.ones_like(plan.index, dtype=torch.bool) if plan.slot_real is None else plan.slot_real
        assert torch.equal(plan.index[real].sort().values, mask[0].nonzero()[:, 0])
        assert torch.equal(plan.index[plan.slot[mask[0]]], mask[0].nonzero()[:, 0])
        sizes = [bucket.rows * bucket.width for bucket in plan.buckets]
        for bucket, index, here in zip(plan.buckets, plan.index.split(sizes), real.split(sizes), strict=True):
            rows, here = document[index].view(bucket.rows, bucket.width), here.view(bucket.rows, bucket.width)
            assert torch.equal(rows, rows[:, :1].expand_as(rows)), "padding of a bucket is the document's own"
            assert here[:, 0].all()
            assert not (here[:, 1:] & ~here[:, :-1]).any(), "padding is on the right"
            assert here.all() == (bucket.real is None)
            assert bucket.width == here.sum(1).max()
        cost = sum(sizes) + call_tokens * len(sizes)
        kept = mask[0].split(lengths.tolist())
        longest = max(int(x.sum()) for x in kept)
        assert cost <= longest * sum(bool(x.any()) for x in kept) + call_tokens, "a single bucket would be cheaper"
        if not call_tokens:
            assert sum(sizes) <= int(mask.sum()) / packing.GROUP_RATIO + 1


def test_rows_that_are_mostly_real_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(8, 256, dtype=torch.bool)
    for fill in (0.75, 0.9, 1.0):
        mask[1:] = torch.arange(256) < 256 * fill
        assert packing.plan_padded(mask).buckets == ()
    mask[1:] = torch.arange(256) >= 256 * 0.6
    assert [(bucket.rows, bucket.width) for bucket in packing.plan_padded(mask).buckets] == [(1, 256), (7, 102)]
    assert packing.plan_padded(torch.zeros(2, 9, dtype=torch.bool)).buckets == ()
    short = torch.arange(40) < torch.tensor([[40], [3]])
    assert packing.plan_padded(short).buckets == (), "too few tokens to pay for another call"


def test_moving_rows_has_a_gradient_of_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CALL_TOKENS", {"cpu": 1})  # sequences as short as these would share one bucket
    mask = torch.arange(3) >= torch.tensor([[0], [3], [2]])
    plan = packing.plan_call(3, 3, mask, seq_idx=torch.tensor([[0, 0, 1]]))
    assert [(bucket.rows, bucket.width) for bucket in plan.buckets] == [(1, 2), (2, 1)]

    def attend(q: Any, k: Any, v: Any, real: Any, hidden: Any, _: Any) -> torch.Tensor:
        weights = q @ k.mT + hidden.sum(-1)[:, None, None]
        if real is not None:
            weights = weights.masked_fill(~real[:, None, None], -torch.inf)
        return weights.softmax(-1) @ v

    def function(q: Any, k: Any, v: Any, hidden: Any) -> torch.Tensor:
        return packing.attend_by_bucket(plan, attend, q, k, v, hidden)

    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 1, 3, 2)] * 3 + [(3, 3, 2)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    out = function(*inputs)
    assert (out.transpose(1, 2)[~mask] == 0).all()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_padding_on_a_gpu_is_not_looked_at() -> None:
    """The meta device has no values to look at."""
    padding = torch.ones(2, 50, dtype=torch.bool, device="meta")
    assert packing.plan_call(2, 50, padding) == packing.SequencePlan(last_real=None)


def test_a_plan_lies_where_the_tokens_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CALL_TOKENS_ELSEWHERE", 1)
    padding = torch.arange(60) < torch.tensor([[60], [5]])
    plan = packing.plan_call(2, 60, padding, device=torch.device("meta"))
    assert [(bucket.rows, bucket.width) for bucket in plan.buckets] == [(1, 60), (1, 5)]
    assert {x.device.type for x in (plan.index, plan.slot, plan.token_real) if x is not None} == {"meta"}
    assert plan.last_real is False
