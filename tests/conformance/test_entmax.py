"""Entmax attention against the package `entmax` by its authors: weights, gradients, and the rows it cannot do."""

import pytest
import torch

from hf_linear_attn.ops.exact.entmax import entmax
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.entmax import EntmaxAttention, EntmaxConfig

pytestmark = pytest.mark.conformance


@pytest.fixture(scope="module")
def published():
    """The package's functions of (logits, alpha), its exact algorithms and its bisection."""
    import entmax as package

    exact = {1.5: package.entmax15, 2.0: package.sparsemax}
    return {
        "exact": lambda z, alpha: exact[alpha](z, dim=-1),
        "bisection": lambda z, alpha: package.entmax_bisect(z, alpha, dim=-1, n_iter=60),
    }


def gradients(function, logits, alpha):
    variables = [x.detach().clone().requires_grad_() for x in (logits, alpha) if isinstance(x, torch.Tensor)]
    weights = function(*variables) if len(variables) == 2 else function(variables[0], alpha)
    probe = torch.randn(weights.shape, generator=torch.Generator().manual_seed(7), dtype=weights.dtype)
    return weights.detach(), torch.autograd.grad((weights * probe).sum(), variables)


@pytest.mark.parametrize("length", [1, 5, 300])
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_sparsemax_and_entmax15_and_their_gradients(published, alpha, length):
    for scale in (0.1, 1, 10):
        logits = torch.randn(8, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64) * scale
        ours, (ours_grad,) = gradients(entmax, logits, alpha)
        theirs, (theirs_grad,) = gradients(published["exact"], logits, alpha)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("length", [2, 300])
def test_learned_alpha_and_its_gradient(published, length):
    logits = torch.randn(6, 4, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64) * 2
    alpha = torch.tensor([1.05, 1.3, 1.5, 1.7, 1.9, 1.99], dtype=torch.float64)[:, None, None]
    ours, ours_grads = gradients(entmax, logits, alpha)
    theirs, theirs_grads = gradients(published["bisection"], logits, alpha)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    for mine, other in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "alpha"), [("sparsemax", 2.0), ("entmax15", 1.5)])
@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_attention_with_their_weights(published, name, alpha, is_causal):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 8, generator=generator) for _ in range(3))
    context = LayerContext(0, 2, 24, 3, 8, 64, is_causal)
    module = EntmaxAttention(EntmaxConfig(alpha=name, initial_lambda=1.0), context)
    logits = q @ k.mT * 8**-0.5
    if is_causal:
        logits = logits.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -1e9)
    expected = published["exact"](logits, alpha) @ v
    output = module(AttentionInputs(q, k, v, None, is_causal, 8**-0.5))[0]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_rows_without_any_key_theirs_raise_ours_are_0(published, alpha):
    """A sequence of padding alone, masked with -inf as softmax takes it."""
    logits, allowed = torch.zeros(2, 5), torch.tensor([[True], [False]])
    with pytest.raises(RuntimeError, match="index -1 is out of bounds"):
        published["exact"](logits.masked_fill(~allowed, -torch.inf), alpha)
    assert (entmax(logits, alpha, allowed)[1] == 0).all()
