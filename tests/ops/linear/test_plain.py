"""The form that autograd and torch.compile take, beside the blocks with a backward pass of their own."""

import pytest
import torch

from hf_linear_attn.ops.linear.attention import linear_attention

F64 = torch.float64
OPTIONS = ("plain", "weighted", "raw")


def draw(length, decayed=None):
    """q, k, v, log weights and log-decays, per token and head or per feature."""
    g = torch.Generator().manual_seed(length)
    q, k = torch.rand(2, 2, 3, length, 5, generator=g, dtype=F64)
    v = torch.randn(2, 3, length, 4, generator=g, dtype=F64)
    weight = 3 * torch.randn(2, 3, length, generator=g, dtype=F64)
    shape = (2, 3, length, 5) if decayed == "per_feature" else (2, 3, length)
    return q, k, v, weight, -torch.rand(shape, generator=g, dtype=F64) if decayed else None


def padding_of(length):
    real = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.6
    real[0, :3], real[1, -5:] = False, False
    return real


@pytest.mark.parametrize(
    ("causal", "options", "decayed"),
    [
        *((False, options, None) for options in ("plain", "weighted")),
        *((True, options, decayed) for options in OPTIONS for decayed in (None, "scalar", "per_feature")),
    ],
)
def test_the_traced_form_is_the_eager_one(causal, options, decayed, small_blocks, monkeypatch):
    """Outputs and gradients of two forms of one sum."""
    q, k, v, weight, decay = draw(45, decayed)
    inputs = [q, k, v, *([weight] if options == "weighted" else []), *([] if decay is None else [decay])]
    inputs, results = [x.requires_grad_() for x in inputs], []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        output = linear_attention(
            *inputs[:3],
            log_decay=None if decay is None else inputs[-1],
            key_log_weight=inputs[3] if options == "weighted" else None,
            token_mask=padding_of(45),
            is_causal=causal,
            normalized=options != "raw",
        )[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_compiles_to_one_graph(causal):
    q, k, v, weight = (x.float() for x in draw(130)[:4])

    def run(q, k, v, w):
        return linear_attention(q, k, v, key_log_weight=w, is_causal=causal)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, weight), run(q, k, v, weight))
