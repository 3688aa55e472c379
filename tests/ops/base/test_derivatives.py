"""Second derivatives are right or refused, whatever the loss."""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hf_linear_attn
from hf_linear_attn.ops.base.derivatives import once_differentiable

PACKAGE = Path(hf_linear_attn.__file__).parent
# Their backward passes are recorded, and have tests of their derivatives of second order.
RECORDED = {"_Entmax", "_MoveRows"}


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        assert not torch.is_grad_enabled()
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def functions():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and "torch.autograd.Function" in map(ast.unparse, node.bases):
                yield node, path.relative_to(PACKAGE).as_posix()


def test_every_backward_pass_of_its_own_refuses_or_is_recorded():
    found = {}
    for node, path in functions():
        (backward,) = (x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "backward")
        found[f"{path}: {node.name}"] = "once_differentiable" in map(ast.unparse, backward.decorator_list)
    assert len(found) > 10
    assert {name.split()[1] for name, refuses in found.items() if not refuses} == RECORDED
    torchs_own = [p for p in PACKAGE.rglob("*.py") if "torch.autograd.function import" in p.read_text(encoding="utf-8")]
    assert torchs_own == []  # it lets the gradient of a linear loss pass as a constant


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "quadratic"])
def test_a_second_derivative_is_refused_and_the_first_is_not(loss):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="is refused"):
        torch.autograd.grad(loss(Cube.apply(x)), x, create_graph=True)
    (first,) = torch.autograd.grad(loss(Cube.apply(x)), x)
    expected = torch.autograd.grad(loss(x**3), x)[0]
    torch.testing.assert_close(first, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_the_forward_pass_is_no_second_derivative(use_reentrant):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    checkpoint(Cube.apply, x, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([3.0, 12.0]))


def test_a_compiled_graph_takes_the_backward_pass():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    torch._dynamo.reset()
    torch.compile(lambda x: Cube.apply(x).sum(), fullgraph=True, backend="aot_eager")(x).backward()
    torch.testing.assert_close(x.grad, torch.tensor([3.0, 12.0]))
