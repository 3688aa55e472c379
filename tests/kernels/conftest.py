"""Kernels on a machine without a GPU: each test of this folder runs them by Triton's interpreter, and only it does.

`TRITON_INTERPRET=1` is read when a kernel is decorated, so as a variable of the process it would have to be there
before anything imports Triton, and would then hold for every other test of that process. Instead the fixture below
hands each launch of an ordinary `triton.jit` function to the interpreter while one test runs, and afterwards puts
everything back: the same functions can be compiled by the next test. Tests with the mark `gpu` launch for real.

The interpreter runs programs one after the other, about 10 ms each: keep grids tiny. It is right in float32, float16
and float64, and silently wrong in bfloat16: such tensors are handed to it in float32, and what it wrote is rounded. So
everything around the kernels is tested in bfloat16 here, and not their products, which a GPU rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hf_linear_attn.ops.base import backend


class _Scope:
    """What `_patch_lang` returns, for a language that stays patched until the test ends."""

    def restore(self) -> None:
        return None


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run `triton.jit` functions by the interpreter during one test, unless it is marked `gpu`.

    A module that compiles kernels instead overrides this fixture with an empty one of the same name.
    """
    if request.node.get_closest_marker("gpu") is not None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        yield
        return
    triton = pytest.importorskip("triton", reason="the extra [triton] is not installed")
    backend._load_kernels()  # while they are ordinary functions: the variable below is read by their decorators
    from triton.language import core, math
    from triton.runtime import interpreter as module
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for code that asks at run time what runs
    interpreted: dict[Any, Any] = {}

    def of(function: Any) -> Any:
        if function.fn not in interpreted:
            interpreted[function.fn] = module.InterpretedFunction(function.fn)
        return interpreted[function.fn]

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given, write_back = _in_float32([*args, *kwargs.values()])
        named = dict(zip(kwargs, given[len(args) :], strict=True))
        if "BF16_DOTS" in named:
            named["BF16_DOTS"] = False
        result = of(self).run(*given[: len(args)], grid=grid, warmup=warmup, **named)
        write_back()
        return result

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return of(self)(*args, **kwargs)

    # The interpreter replaces the language's functions at each launch and at each call of a device function, and
    # leaves some of them replaced. Once per test is enough, and faster; the copies put all of them back.
    patched = [triton.language, core, math, core.tensor, core.dtype, core.tensor_descriptor_base]
    copies = [(owner, dict(vars(owner))) for owner in patched]
    try:
        module._patch_lang(_with_language(triton.language, core))
        monkeypatch.setattr(module, "_patch_lang", lambda function: _Scope())
        monkeypatch.setattr(JITFunction, "run", run)
        monkeypatch.setattr(JITFunction, "__call__", call)
        yield
    finally:
        for owner, copy in copies:
            _put_back(owner, copy)


def _in_float32(args: list[Any]) -> tuple[list[Any], Callable[[], None]]:
    """Arguments of a launch with bfloat16 tensors in float32, and what brings back those that the kernel wrote."""
    copies = []

    def widened(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype != torch.bfloat16:
            return x
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # of all strides, also of 0
        copies.append((memory, memory.float(), memory.float()))
        return copies[-1][1].as_strided(x.shape, x.stride(), x.storage_offset())

    def write_back() -> None:
        for memory, after, before in copies:
            written = after.view(torch.int32) != before.view(torch.int32)  # by bits: what nobody writes may be nan
            memory.copy_(torch.where(written, after.to(memory.dtype), memory))

    return [widened(x) for x in args], write_back


def _with_language(language: Any, core: Any) -> Callable[[], None]:
    """A function whose globals hold both modules that the interpreter looks for."""
    namespace = {"tl": language, "core": core}
    exec("def function(): pass", namespace)
    return namespace["function"]


def _put_back(owner: Any, copy: dict[str, Any]) -> None:
    for name, value in list(vars(owner).items()):
        if name not in copy:
            if isinstance(owner, type):  # in a module they are names that the interpreter's rewritten functions use
                delattr(owner, name)
        elif value is not copy[name]:
            setattr(owner, name, copy[name])
