"""What one attention layer makes a GPU do: kernels launched, PyTorch's operators around them, and bytes of both.

Traced on tensors without values that say they lie on a GPU (`testing.on_gpu`); no kernel is compiled and nothing is
computed. An operator is one that reaches PyTorch's dispatcher and is no view: on a GPU it is a launch of its own, or
more. A launch or operator moves each tensor that it is given once, and what it updates twice: tiles that are read again
come from the cache.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hf_linear_attn.bench.peers.layers import LayerShape, build_variant
from hf_linear_attn.ops.base.groups import of_each_head
from hf_linear_attn.testing.on_gpu import OnGpu, Watched, gpu, move
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant

__all__ = ["Step", "Trace", "count", "trace_layer"]

# What a launch updates in place, by kernel: read and written.
_UPDATED = {"linear_attention_scan_kernel": ("state", "vector"), "gated_scan_kernel": ("state", "vector")}
_NO_WORK = {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "_local_scalar_dense"}
_ONLY_WRITTEN = {"copy_", "fill_", "normal_", "uniform_", "zero_"}


@dataclass(frozen=True)
class Step:
    """One launch or operator.

    Attributes:
        name: of the kernel, or of PyTorch's operator.
        bytes: moved.
        launch: (function, arguments by name) of a launch; None of an operator.
    """

    name: str
    bytes: int
    launch: tuple[Any, dict[str, Any]] | None = None


@dataclass
class Trace:
    """What one pass did, in its order.

    Attributes:
        steps: launches and operators.
        reads: where the CPU waited for a value, `"module:function"`.
    """

    steps: list[Step] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)

    @property
    def launches(self) -> list[Step]:
        return [step for step in self.steps if step.launch is not None]

    @property
    def ops(self) -> Counter[str]:
        """PyTorch's operators by name."""
        return Counter(step.name for step in self.steps if step.launch is None)

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)


class _Counted(Watched):
    """Fills a trace. Memory of unknown content has no values, whatever is computed from lengths alone has."""

    def __init__(self, trace: Trace, fake: FakeTensorMode) -> None:
        super().__init__()
        self.trace, self.fake = trace, fake

    def making(self, name: str) -> AbstractContextManager[Any]:
        return self.fake if name == "empty" else nullcontext()

    def made(self, name: str, result: torch.Tensor) -> None:
        if name != "empty":
            self.trace.steps.append(Step(name, _bytes([result])))

    def computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = func.overloadpacket.__name__
        returned = [value.alias_info for value in func._schema.returns]
        is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
        if is_view or name in _NO_WORK or "empty" in name:
            return
        read = tree_leaves((args, kwargs))
        if name in _ONLY_WRITTEN:
            read = read[1:]
        self.trace.steps.append(Step(name, _bytes(read) + _bytes(tree_leaves(result))))

    def launched(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        name = kernel.fn.__name__
        updated = [given[argument] for argument in _UPDATED.get(name, ())]
        moved = _bytes(given[argument] for argument in kernel.arg_names) + _bytes(updated)
        self.trace.steps.append(Step(name, moved, (kernel, given)))


def _bytes(values: Iterable[Any]) -> int:
    """Bytes of distinct tensors; what is broadcast counts once."""
    found = {}
    for x in values:
        if isinstance(x, torch.Tensor):
            sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
            place = x.untyped_storage()._cdata, x.storage_offset()
            found[place, tuple(sizes)] = torch.Size(sizes).numel() * x.element_size()
    return sum(found.values())


def count(call: Callable[[], Any], fake: FakeTensorMode) -> tuple[Any, Trace]:
    """What a call returns, and what it made the GPU do."""
    trace = Trace()
    with _Counted(trace, fake) as counted:
        result = call()
    trace.reads = sorted({place for place, _ in counted.reads})
    return result, trace


def trace_layer(
    key: str,
    shape: LayerShape,
    options: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    calibrated: bool = False,
    group: int = 1,
) -> dict[str, tuple[Trace, int]]:
    """The passes of one layer of a variant between its projections: its second call of each, when lists are kept.

    Args:
        key: of the variant.
        shape: of the layer; `decode` is one token after `shape.length` of them.
        options: that differ from the defaults.
        dtype: of tokens and parameters.
        calibrated: keys have weights, as calibration may give them; changes nothing in a variant without `query_mean`.
        group: heads that share a key and a value.

    Returns:
        a trace for `"forward"` (without gradients), `"backward"`, and for `"decode"` where a decoder keeps a state;
        each beside the bytes of that state, or 0.

    Raises:
        ValueError: for a variant that does not serve this side, or a bad option.
    """
    module = build_variant(shape, key, options or {}).to(dtype)
    if calibrated and "query_mean" in dict(module.named_buffers()):
        module.get_buffer("query_mean").fill_(1)
    module = move(module)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    given, token = (_inputs(shape, length, dtype, group, fake) for length in (shape.length, 1))
    found: dict[str, tuple[Trace, int]] = {}
    with gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            found["forward"] = count(torch.no_grad()(lambda: _attend(module, given)), fake)[1], 0
            found["backward"] = _backward(module, given, fake), 0
        if shape.is_causal and module.spec.state != "none":
            found["decode"] = _decode(module, given, token, fake)
    return found


def _attend(module: AttentionVariant, inputs: AttentionInputs, state: Any = None) -> tuple[torch.Tensor, Any]:
    """A call as the seam makes it, which repeats keys for variants that read none of groups."""
    if not module.reads_groups:
        heads = inputs.query.shape[1]
        inputs = replace(inputs, key=of_each_head(inputs.key, heads), value=of_each_head(inputs.value, heads))
    found: tuple[torch.Tensor, Any] = module(inputs, state)
    return found


def _inputs(shape: LayerShape, length: int, dtype: torch.dtype, group: int, fake: FakeTensorMode) -> AttentionInputs:
    """Tokens as projections leave them, `[B, T, H, D]` in memory."""
    with fake:
        counts = shape.num_heads, *[shape.num_heads // group] * 2
        heads = [torch.empty(shape.batch, length, count, shape.head_dim, dtype=dtype) for count in counts]
        hidden = torch.empty(shape.batch, length, shape.hidden_size, dtype=dtype)
        query, key, value = (OnGpu(x.transpose(1, 2)).requires_grad_() for x in heads)
        tokens = OnGpu(hidden)
    scaling = shape.head_dim**-0.5
    return AttentionInputs(query, key, value, None, shape.is_causal, scaling, hidden_states=tokens)


def _backward(module: AttentionVariant, inputs: AttentionInputs, fake: FakeTensorMode) -> Trace:
    output, _ = count(lambda: _attend(module, inputs)[0], fake)
    gradient = OnGpu(torch.empty_like(output.values))
    wanted = [inputs.query, inputs.key, inputs.value, *(x for x in module.parameters() if x.requires_grad)]
    return count(lambda: torch.autograd.grad(output, wanted, gradient, allow_unused=True), fake)[1]


@torch.no_grad()
def _decode(
    module: AttentionVariant, inputs: AttentionInputs, token: AttentionInputs, fake: FakeTensorMode
) -> tuple[Trace, int]:
    """Of the second token after the inputs, and bytes of the state."""

    def begin() -> Any:
        state = module.init_state(inputs.query.shape[0], inputs.query.dtype, inputs.query.device)
        return _attend(module, token, _attend(module, inputs, state)[1])[1]

    state, _ = count(begin, fake)
    return count(lambda: _attend(module, token, state), fake)[1], _bytes(state.values())
