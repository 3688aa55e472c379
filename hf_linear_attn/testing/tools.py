"""Inputs, references and probes of the contract ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_linear_attn.variants.base import AttentionInputs, LayerContext

TOKEN_DIMS = {"query": 2, "key": 2, "value": 2, "hidden_states": 1, "token_mask": 1, "global_mask": 1}
Projection = tuple[torch.Tensor, torch.Tensor | None]


def projections(context: LayerContext, dtype: torch.dtype) -> tuple[Projection, Projection, Projection]:
    """The checkpoint's (weight, bias) of q, k and v, the same at every call."""
    generator = torch.Generator().manual_seed(42)
    inner, hidden = context.num_heads * context.head_dim, context.hidden_size

    def one() -> Projection:
        weight = torch.randn(inner, hidden, generator=generator, dtype=torch.float64, device="cpu") * hidden**-0.5
        bias = torch.randn(inner, generator=generator, dtype=torch.float64, device="cpu") * 0.1
        return weight.to(dtype), bias.to(dtype)

    return one(), one(), one()


def draw(
    context: LayerContext,
    length: int,
    *,
    batch: int = 2,
    queries: int | None = None,
    padding: torch.Tensor | None = None,
    with_global: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> AttentionInputs:
    """One call: random hidden states through the projections; `queries` keeps the last rows only."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, context.hidden_size, generator=generator, dtype=torch.float64)
    flags = torch.rand(batch, length, generator=generator) < 0.1
    q, k, v = (
        nn.functional.linear(hidden, weight, bias).unflatten(-1, (context.num_heads, context.head_dim)).transpose(1, 2)
        for weight, bias in projections(context, torch.float64)
    )
    kept = slice(length - (queries or length), None)
    return AttentionInputs(
        query=q[:, :, kept].to(dtype),
        key=k.to(dtype),
        value=v.to(dtype),
        token_mask=padding,
        is_causal=context.is_causal,
        scaling=context.head_dim**-0.5,
        hidden_states=hidden[:, kept].to(dtype),
        global_mask=flags[:, kept] if with_global else None,
    )


def padding_masks(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Left, right and interior padding: bool `[batch, length]`, rows of different lengths, none empty."""
    place = torch.arange(length).expand(batch, -1)
    pads = (torch.arange(batch)[:, None] + 1) * length // (batch + 2)
    holes = (place % 3 == 1) & (place // 3 % (torch.arange(batch)[:, None] + 1) == 0)
    return {"left": place >= pads, "right": place < length - pads, "interior": ~holes}


def each(inputs: AttentionInputs, change: Callable[[torch.Tensor, int], torch.Tensor]) -> AttentionInputs:
    """Apply `change(tensor, token_dimension)` to every tensor of a call."""
    found = {name: getattr(inputs, name) for name in TOKEN_DIMS}
    changed: dict[str, Any] = {name: change(x, TOKEN_DIMS[name]) for name, x in found.items() if x is not None}
    return dataclasses.replace(inputs, **changed)


def floats(inputs: AttentionInputs, change: Callable[[torch.Tensor], torch.Tensor]) -> AttentionInputs:
    """Apply `change` to the floating-point tensors of a call."""
    return each(inputs, lambda x, dim: x if x.dtype == torch.bool else change(x))


def scaled(inputs: AttentionInputs, factor: float | torch.Tensor) -> AttentionInputs:
    """Floating-point tensors times a number, or times one number per row of the batch (`[B]`)."""
    by = torch.as_tensor(factor)
    return floats(inputs, lambda x: x * by.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))


def cast(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    """Floating-point tensors in another dtype."""
    return floats(inputs, lambda x: x.to(dtype))


def select(inputs: AttentionInputs, rows: torch.Tensor | slice) -> AttentionInputs:
    """The call on some rows of the batch."""
    return each(inputs, lambda x, dim: x[rows])


def tokens(inputs: AttentionInputs, index: torch.Tensor) -> AttentionInputs:
    """The call on some of the tokens."""
    return each(inputs, lambda x, dim: x.index_select(dim, index))


def merged(inputs: AttentionInputs, other: AttentionInputs, where: torch.Tensor) -> AttentionInputs:
    """`inputs` with the tokens in `where` (bool `[T]` or `[B, T]`) taken from `other`, padding mask kept."""
    mask = where.expand(inputs.key.shape[0], -1)
    shapes = {
        1: lambda x: mask.reshape(*mask.shape, *[1] * (x.ndim - 2)),
        2: lambda x: mask[:, None, :, None],
    }
    taken: dict[str, Any] = {
        name: torch.where(shapes[dim](getattr(inputs, name)), getattr(other, name), getattr(inputs, name))
        for name, dim in TOKEN_DIMS.items()
        if getattr(inputs, name) is not None and name != "token_mask"
    }
    return dataclasses.replace(inputs, **taken)


def poisoned(inputs: AttentionInputs) -> AttentionInputs:
    """1e9 in every padded token, which also claims to be a global one."""
    assert inputs.token_mask is not None
    poison = each(inputs, lambda x, dim: torch.full_like(x, True if x.dtype == torch.bool else 1e9))
    return merged(inputs, poison, ~inputs.token_mask)


def dense_softmax(inputs: AttentionInputs) -> torch.Tensor:
    """Softmax attention with an n x n matrix in float64; rows without a key are 0. Shape `[B, H, Tq, D]`."""
    q, k, v = (x.double() for x in (inputs.query, inputs.key, inputs.value))
    logits = q @ k.transpose(-1, -2) * inputs.scaling
    allowed = torch.ones(logits.shape[-2:], dtype=torch.bool)
    if inputs.is_causal:
        allowed = allowed.tril(k.shape[2] - q.shape[2])
    if inputs.token_mask is not None:
        allowed = allowed & inputs.token_mask[:, None, None, :]
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ v).to(inputs.query.dtype)


def assert_close(actual: Any, expected: Any, what: str, tolerance: float = 1e-5) -> None:
    """`torch.testing.assert_close` with `what` in the message."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def value_error(call: Callable[[], Any]) -> str:
    """The message of the `ValueError` that `call` raises, or "" when it returns."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything a module holds, as values that compare by content."""
    found: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        for name, value in [*vars(part).items(), *part._parameters.items(), *part._buffers.items()]:
            if name not in ("_parameters", "_buffers", "_modules"):
                found[f"{prefix}.{name}".lstrip(".")] = _frozen(value)
    return found


def _frozen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.detach().cpu().double().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return repr(value)


class AllocationRecorder(TorchDispatchMode):
    """Shape, and number of elements held in memory, of every tensor that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                # An expanded view has the shape but not the memory.
                self.seen.append((tuple(x.shape), x.untyped_storage().nbytes() // x.element_size()))
        return result
