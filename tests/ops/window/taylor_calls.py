"""Calls of `window_tail_attention` with Taylor features, and the same by the dense form."""

import torch

from hf_linear_attn.ops.features.maps import ParametricMap, TaylorMap
from hf_linear_attn.ops.window.tail import naive_window_tail_attention, window_tail_attention

F64 = torch.float64
SCALING = 0.4


def project(x, weight, slope):
    """Coordinates, and a log scale that differs between tokens."""
    return x @ weight.mT, (x * slope).sum(-1)


def draw(length, *, queries=None, batch=2, heads=2, dim=4, rank=3, seed=0, slope=0.3):
    """q (the last `queries`), k, v, the parameters of both maps, the log factor."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, dim, generator=g, dtype=F64).unbind(0)
    weights = torch.randn(2, heads, rank, dim, generator=g, dtype=F64).unbind(0)
    slopes = (slope * torch.randn(2, heads, 1, dim, generator=g, dtype=F64)).unbind(0)
    factor = torch.randn(heads, generator=g, dtype=F64)
    return [
        x.clone().requires_grad_()
        for x in (q[:, :, length - (queries or length) :], k, v, weights[0], slopes[0], weights[1], slopes[1], factor)
    ]


def attend(function, arguments, *, window, token_mask=None):
    """The output; `window` is (left, right), and causal with None for the right."""
    q, k, v, q_weight, q_slope, k_weight, k_slope, factor = arguments
    maps = (TaylorMap(ParametricMap(project, x)) for x in ((q_weight, q_slope), (k_weight, k_slope)))
    found = function(
        *(q, k, v, *maps),
        left=window[0],
        right=window[1] or 0,
        is_causal=window[1] is None,
        scaling=SCALING,
        window_log_factor=factor,
        token_mask=token_mask,
    )
    return found[0] if isinstance(found, tuple) else found


def results(function, arguments, *, token_mask=None, **options):
    """The output and all gradients, of rows that are tokens."""
    output = attend(function, arguments, token_mask=token_mask, **options)
    if token_mask is not None:
        output = output * token_mask[:, None, -output.shape[2] :, None]
    loss = output.square().sum() + (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum()
    return [output, *torch.autograd.grad(loss, arguments)]


def assert_same(arguments, **options):
    actual = results(window_tail_attention, arguments, **options)
    expected = results(naive_window_tail_attention, arguments, **options)
    for x, y in zip(actual, expected, strict=True):
        # A gradient that is 0 in exact arithmetic, as that of the factor where all keys are in the window, has only
        # rounding errors of the terms that it sums up.
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-8)
