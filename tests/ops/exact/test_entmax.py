"""alpha-entmax: against bisection in float64, its derivatives, its masks."""

import pytest
import torch

from hf_linear_attn.ops.exact.entmax import entmax


def by_bisection(logits, alpha):
    """The definition: the threshold is where the weights sum to 1."""
    z = logits.double() * (alpha - 1)
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        above = ((z - middle).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (z - low).clamp(min=0) ** (1 / (alpha - 1))


def families(length):
    """Rows of logits: Gaussian of every scale, heavy-tailed, tied, and crowding geometrically below the largest."""
    generator = torch.Generator().manual_seed(length)
    for scale in (0.01, 0.3, 1, 10, 1000):
        yield torch.randn(16, length, generator=generator, dtype=torch.float64) * scale
    yield torch.empty(16, length, dtype=torch.float64).cauchy_(generator=generator)
    yield torch.randint(0, 3, (16, length), generator=generator).double()
    yield -(2.0 ** -torch.linspace(0, 30, length, dtype=torch.float64))[None]


@pytest.mark.parametrize("length", [1, 2, 50, 2000])
@pytest.mark.parametrize("alpha", [1.02, 1.2, 1.5, 1.8, 1.97, 2.0])
@pytest.mark.parametrize("learned", [False, True])
def test_equals_bisection(length, alpha, learned):
    given = torch.tensor([[alpha]], dtype=torch.float64) if learned else alpha
    for logits in families(length):
        torch.testing.assert_close(entmax(logits, given), by_bisection(logits, alpha), rtol=0, atol=1e-12)
        single = entmax(logits.float(), given)
        torch.testing.assert_close(single.double(), by_bisection(logits.float(), alpha), rtol=0, atol=1e-4)
        torch.testing.assert_close(single.sum(-1), torch.ones(logits.shape[0]), rtol=0, atol=1e-5)


def test_sparsemax_is_the_projection_onto_the_simplex():
    torch.testing.assert_close(entmax(torch.tensor([[1.0, 0.6, -3.0]]), 2), torch.tensor([[0.7, 0.3, 0.0]]))


def test_close_to_softmax_for_alpha_close_to_1():
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(entmax(logits, 1.0001), logits.softmax(-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.9, 2.0])
def test_derivatives_by_logits_and_alpha(alpha):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(2, 1, 9, generator=generator) < 0.7
    torch.autograd.gradcheck(lambda z: entmax(z, alpha, allowed), (logits,))
    if alpha < 2:
        learned = torch.tensor([[[alpha]], [[alpha + 0.05]]], dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(lambda z, a: entmax(z, a, allowed), (logits, learned))


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.9, 2.0])
def test_second_derivatives_by_logits_and_alpha(alpha):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(2, 1, 9, generator=generator) < 0.7
    assert torch.autograd.gradgradcheck(lambda z: entmax(z, alpha, allowed), (logits,))
    if alpha < 2:
        learned = torch.tensor([[[alpha]], [[alpha + 0.05]]], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda z, a: entmax(z, a, allowed), (logits, learned))


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.9, 2.0])
def test_the_gradient_of_a_linear_loss_has_one_of_its_own(alpha):
    """Its incoming gradient is a constant; a penalty on it still trains the logits."""
    logits = torch.linspace(-1, 1.1, 7, dtype=torch.float64, requires_grad=True)
    direction = torch.linspace(2, 3, 7, dtype=torch.float64).square()

    def penalty(z):
        (gradient,) = torch.autograd.grad(entmax(z, alpha) @ direction, z, create_graph=True)
        return gradient.square().sum()

    (found,) = torch.autograd.grad(penalty(logits), logits, allow_unused=True)
    step = torch.linspace(-1, 1, 7, dtype=torch.float64).cos() * 1e-6
    by_differences = (penalty(logits + step) - penalty(logits - step)) / 2
    torch.testing.assert_close(found @ step, by_differences.detach(), rtol=1e-5, atol=1e-14)


def test_gradients_of_each_row_by_torch_func():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    of_a_row = torch.func.grad(lambda z: entmax(z, 1.5).square().sum())
    whole = logits.clone().requires_grad_()
    entmax(whole, 1.5).square().sum().backward()
    torch.testing.assert_close(torch.func.vmap(of_a_row)(logits), whole.grad)


def test_training_keeps_the_weights_and_nothing_else():
    saved, logits = [], torch.randn(2, 3, 50, 50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        entmax(logits, torch.tensor([[[1.3]], [[1.5]], [[1.7]]], requires_grad=True)).sum()
    assert sum(saved) < 1.1 * logits.numel()


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_what_is_not_allowed_might_as_well_not_be_there(alpha):
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)) * 3
    allowed = torch.ones(12, dtype=torch.bool)
    allowed[[0, 4, 11]] = False
    masked = entmax(logits.masked_fill(~allowed, 1e9), alpha, allowed)
    assert (masked[:, ~allowed] == 0).all()
    torch.testing.assert_close(masked[:, allowed], entmax(logits[:, allowed], alpha))


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_without_any_allowed_entry_is_0_with_finite_gradients(alpha, dtype):
    logits = torch.randn(2, 6).to(dtype).requires_grad_()
    weights = entmax(logits, alpha, torch.tensor([[True], [False]]))
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (weights[1] == 0).all()
    weights.square().sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()


@pytest.mark.parametrize("alpha", [1, 1.0, 0.5, 2.1])
def test_an_alpha_out_of_range_is_an_error(alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha}; allowed: above 1 and at most 2"):
        entmax(torch.zeros(1, 2), alpha)
