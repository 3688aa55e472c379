"""The same bits again: in another run, with other threads, and in a larger batch, or how far off at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from hf_linear_attn.registry import get_variant, list_variants
from hf_linear_attn.testing.contract import Subject
from hf_linear_attn.testing.tools import draw, each, padding_masks
from hf_linear_attn.variants.base import AttentionInputs, LayerContext

LENGTH, BATCH = 1024, 4
LARGEST = {"another run": 0.0, "other threads": 5e-5, "larger batch": 5e-5}  # difference over the largest number
SUBJECTS = [Subject(get_variant(key), causal) for key in list_variants() for causal in (False, True)]

pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def context(subject: Subject) -> LayerContext:
    return LayerContext(1, 2, 256, 4, 64, LENGTH, subject.is_causal)


def outputs_and_gradients(subject: Subject, inputs: AttentionInputs) -> list[torch.Tensor]:
    """Of a layer made anew: its output, and the gradients of its inputs by real rows."""
    module = subject.build(context(subject), dtype=torch.float32, trained=True)
    leaves = [getattr(inputs, name).detach().clone().requires_grad_() for name in ("query", "key", "value")]
    inputs = AttentionInputs(*leaves, inputs.token_mask, inputs.is_causal, inputs.scaling, inputs.hidden_states)
    output = module(inputs)[0].masked_fill(~inputs.token_mask[:, None, :, None], 0)
    found = [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]
    assert all(x.isfinite().all() for x in found)
    return found


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "subject",
    [subject for subject in SUBJECTS if subject.served],
    ids=lambda s: f"{s.spec.key}-{'decoder' if s.is_causal else 'encoder'}",
)
def test_the_same_bits_again(subject: Subject, record_property: Callable[[str, object], None]) -> None:
    torch.set_num_threads(1)
    masks = padding_masks(BATCH, LENGTH)
    found = dict.fromkeys(LARGEST, 0.0)
    for side in ("left", "right"):
        inputs = draw(context(subject), LENGTH, batch=BATCH, padding=masks[side], dtype=torch.float32)
        first = outputs_and_gradients(subject, inputs)
        again = {"another run": outputs_and_gradients(subject, inputs)}
        rows = each(inputs, lambda x, dim: x[:1])
        again["larger batch"] = outputs_and_gradients(subject, rows)
        torch.set_num_threads(3)
        again["other threads"] = outputs_and_gradients(subject, inputs)
        torch.set_num_threads(1)
        for what, ours in again.items():
            theirs = [x[: len(ours[0])] for x in first]
            found[what] = max(found[what], difference(ours, theirs))
    for what, largest in LARGEST.items():
        record_property(what, f"{found[what]:.1g}" if found[what] else "same bits")
        assert found[what] <= largest, f"{what}: off by {found[what]:.2g}"
