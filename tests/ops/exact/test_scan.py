"""The loop over pieces against the same step taken over the whole sequence, which autograd differentiates."""

import pytest
import torch

from hf_linear_attn.ops.exact import scan as recomputed_scan
from hf_linear_attn.ops.exact.scan import scan


def step(piece, parts, sums, parameters):
    """Running sums of products, and a number of the piece's places."""
    (x, y), (total,), (scale, _) = parts, sums, parameters
    running = total[:, :, None] + (x * y * scale).cumsum(2)
    place = torch.arange(piece.start, piece.stop, dtype=x.dtype)[:, None]
    return torch.tanh(running) * place, (running[:, :, -1],)


def draw(count, trains=(True, True, True, True)):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, count, 2, 3, generator=g, dtype=torch.float64).transpose(2, 3)
    total, scale = torch.randn(1, 2, 3, generator=g, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    tensors = x, y, total, scale
    return [t.requires_grad_(need) for t, need in zip(tensors, trains, strict=True)]


@pytest.mark.parametrize("elements", [1, 2 * 3 * 2, 1 << 20], ids=["one by one", "uneven pieces", "whole"])
@pytest.mark.parametrize("trains", [(True,) * 4, (True, False, False, False), (False, True, False, True)], ids=str)
def test_pieces_are_the_whole(elements, trains, monkeypatch):
    """Outputs, the sums after them, and the gradients of all that trains, also through the sums."""
    monkeypatch.setattr(recomputed_scan, "PIECE_ELEMENTS", elements)
    unused = torch.zeros((), dtype=torch.float64, requires_grad=True)
    found = []
    for run in (scan, lambda step, *given: step(slice(0, 7), *given)):
        x, y, total, scale = draw(7, trains)
        output, (after,) = run(step, (x, y), (total,), (scale, unused))
        wanted = [t for t in (x, y, total, scale) if t.requires_grad]
        loss = output.sin().sum() + (2 * after).cos().sum()
        found.append([output, after, *torch.autograd.grad(loss, wanted)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_recorded_without_gradients(monkeypatch):
    monkeypatch.setattr(recomputed_scan, "PIECE_ELEMENTS", 1)
    x, y, total, scale = draw(7)
    with torch.no_grad():
        output, (after,) = scan(step, (x, y), (total,), (scale, scale))
    assert not output.requires_grad
    assert not after.requires_grad
    expected, _ = step(slice(0, 7), (x, y), (total,), (scale, scale))
    torch.testing.assert_close(output, expected.detach())


def test_only_the_output_or_only_the_sums_may_be_used(monkeypatch):
    monkeypatch.setattr(recomputed_scan, "PIECE_ELEMENTS", 1)
    for number in range(2):
        x, y, total, scale = draw(7)
        output, (after,) = scan(step, (x, y), (total,), (scale, scale))
        given = torch.autograd.grad((output, after)[number].sum(), [x, y])
        output, (after,) = step(slice(0, 7), (x, y), (total,), (scale, scale))
        expected = torch.autograd.grad((output, after)[number].sum(), [x, y])
        torch.testing.assert_close(given, expected)
