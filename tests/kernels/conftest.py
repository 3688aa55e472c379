"""Kernels on a machine without a GPU: each test of this folder runs them by Triton's interpreter, and only it does.

`TRITON_INTERPRET=1` is read when a kernel is decorated, so as a variable of the process it would have to be there
before anything imports Triton, and would then hold for every other test of that process. Instead the fixture below
hands each launch of an ordinary `triton.jit` function to the interpreter while one test runs, and afterwards puts
everything back: the same functions can be compiled by the next test. Tests with the mark `gpu` launch for real.

The interpreter runs programs one after the other, about 10 ms each: keep grids tiny. It is right in float32, float16
and float64, and silently wrong in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


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
        return of(self).run(*args, grid=grid, warmup=warmup, **kwargs)

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
