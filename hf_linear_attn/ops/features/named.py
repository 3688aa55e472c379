"""Feature maps of one's own, by name: `register_feature_map` adds them to `FEATURE_MAPS`.

A checkpoint holds the name of a feature map and never its code, so whoever loads one registers the map first. A
function given to a method in place of a name works without being registered, in this process; it has a name here that
no checkpoint may hold.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.features.maps import FEATURE_MAPS, FeatureMap, Features

__all__ = [
    "feature_width",
    "is_known",
    "name_of",
    "refuse_unregistered",
    "register_feature_map",
    "registered_names",
    "unregister_feature_map",
]

OwnMap = Callable[[torch.Tensor], "torch.Tensor | Features"]

_UNREGISTERED = "unregistered:"
# Names that options of methods mean otherwise.
_RESERVED = ("identity", "laplace", "rbf")
# The user's functions by the name of their map: registered ones, and those that were given in place of a name.
_FUNCTIONS: dict[str, OwnMap] = {}
_LOCK = threading.Lock()


def register_feature_map(name: str, function: OwnMap) -> None:
    """Let `feature_map=name` mean `function`, in every method that has the option and takes maps by name.

    The registration lives as long as the process: one that loads a checkpoint made with the map registers it first.

    Args:
        name: an identifier that is not taken; what a checkpoint holds.
        function: `x [..., D] -> features [..., F]`, for each token by itself; or `(features, log_scale [...])`, where
            the true features are `features * exp(log_scale)`, which an exponential needs lest it overflow. `x` is
            float32 or float64, times the square root of the logits' factor. Features are to be at least 0, so that
            attention is a mean of values, and differentiable for training.

    Raises:
        TypeError: for something else than a function, an `nn.Module` among it, whose parameters no model would hold.
        ValueError: if the name is no identifier or is taken by another function.
    """
    _check_function(function)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name={name!r}; allowed: a string of letters, digits and _ that starts with no digit.")
    with _LOCK:
        if name in _FUNCTIONS and _FUNCTIONS[name] == function:
            return
        if name in FEATURE_MAPS or name in _RESERVED:
            raise ValueError(
                f"feature map {name!r} is taken; taken are {', '.join(sorted({*FEATURE_MAPS, *_RESERVED}))}. "
                "Choose another name, or unregister_feature_map(name) first if it is one of yours."
            )
        _FUNCTIONS[name] = function
        FEATURE_MAPS[name] = _map_of(function)


def unregister_feature_map(name: str) -> None:
    """Forget a map that `register_feature_map` named; layers that use it no longer run.

    Raises:
        ValueError: for a name that was not registered.
    """
    with _LOCK:
        if name not in _FUNCTIONS or name.startswith(_UNREGISTERED):
            known = [key for key in _FUNCTIONS if not key.startswith(_UNREGISTERED)]
            raise ValueError(f"feature map {name!r} was not registered; registered are: {', '.join(known) or 'none'}.")
        del _FUNCTIONS[name], FEATURE_MAPS[name]


def name_of(given: Any) -> Any:
    """The name of a feature map that was given as a name or as a function; what is neither comes back.

    A function that is not registered gets a name for this process, and its registered one once it has one.

    Raises:
        TypeError: for an `nn.Module`.
    """
    if isinstance(given, str):
        if not given.startswith(_UNREGISTERED) or given not in _FUNCTIONS:
            return given
        given = _FUNCTIONS[given]
    elif not callable(given):
        return given
    _check_function(given)
    with _LOCK:
        names = sorted((name for name, function in _FUNCTIONS.items() if function == given), key=_is_unregistered)
        if names:
            return names[0]
        plain = f"{_UNREGISTERED}{getattr(given, '__module__', None)}.{getattr(given, '__qualname__', repr(given))}"
        alike = sum(name.partition("#")[0] == plain for name in _FUNCTIONS)
        name = f"{plain}#{alike + 1}" if alike else plain
        _FUNCTIONS[name] = given
        FEATURE_MAPS[name] = _map_of(given)
        return name


def registered_names() -> list[str]:
    """Names that `feature_map` may be given, sorted: those of the package, then those that were registered."""
    names = [name for name in FEATURE_MAPS if not _is_unregistered(name)]
    return sorted(names, key=lambda name: (name in _FUNCTIONS, name))


def is_known(name: Any) -> bool:
    """Whether a map goes by that name here, be it one that no checkpoint may hold."""
    return isinstance(name, str) and name in FEATURE_MAPS


def refuse_unregistered(name: Any) -> None:
    """Raise `ValueError` for the name of a function given in Python, of which a checkpoint would hold nothing."""
    if isinstance(name, str) and _is_unregistered(name):
        raise ValueError(
            f"feature_map is a function that was given in Python ({name.removeprefix(_UNREGISTERED)}); a checkpoint "
            "holds names, not code, so nothing could load it. Give the function a name, "
            "hf_linear_attn.register_feature_map('my_map', function), and save again: the model then holds that name, "
            "and whoever loads it registers it first."
        )


def feature_width(name: str, dim: int) -> int:
    """F, the number of features that a map makes of tokens of `dim` numbers; one of your own is tried out.

    Raises:
        ValueError: for a map that does not return finite features of each token by itself, `[..., F]`.
    """
    if name not in _FUNCTIONS:
        return dim
    with torch.device("cpu"), torch.no_grad():  # layers are built on the meta device
        x = torch.linspace(-3.0, 3.0, 10 * dim).view(1, 2, 5, dim)
        features, log_scale = FEATURE_MAPS[name](x)
        if features.shape[:-1] != x.shape[:-1] or not features.shape[-1]:
            found, wanted = tuple(features.shape), f"(1, 2, 5, features) of tokens {tuple(x.shape)}"
            raise ValueError(f"feature_map={name!r} returned a tensor of shape {found}; allowed: {wanted}.")
        if log_scale is not None and log_scale.shape != x.shape[:-1]:
            shape = tuple(log_scale.shape)
            raise ValueError(
                f"feature_map={name!r} returned a log scale of shape {shape}; allowed: {tuple(x.shape[:-1])}."
            )
        if not features.isfinite().all():
            raise ValueError(f"feature_map={name!r} returned numbers that are not finite for inputs from -3 to 3.")
        alone = FEATURE_MAPS[name](x.view(10, 1, 1, dim))
        if not all(_alike(*pair) for pair in zip((features, log_scale), alone, strict=True)):
            raise ValueError(f"feature_map={name!r} lets a token's features depend on other tokens; each is by itself.")
    return features.shape[-1]


def _alike(together: torch.Tensor | None, alone: torch.Tensor | None) -> bool:
    """Whether tokens have the same features, or log scale, among others as alone."""
    if together is None or alone is None:
        return together is alone
    return torch.allclose(together, alone.view_as(together), rtol=1e-4, atol=1e-6)


def _is_unregistered(name: str) -> bool:
    return name.startswith(_UNREGISTERED)


def _check_function(function: Any) -> None:
    if isinstance(function, nn.Module):
        raise TypeError(
            f"A feature map is a function without parameters, got the module {type(function).__name__}: no layer would "
            "hold its parameters. A map that trains is a variant of its own (CONTRIBUTING.md), as 't2r' and 'hedgehog'."
        )
    if not callable(function):
        raise TypeError(f"function={function!r}; allowed: a function of a tensor [..., D].")


def _map_of(function: OwnMap) -> FeatureMap:
    def features(x: torch.Tensor) -> Features:
        dtype = accumulation_dtype(x.dtype)
        found = function(x.to(dtype))
        phi, log_scale = found if isinstance(found, tuple) else (found, None)
        if not isinstance(phi, torch.Tensor):
            raise TypeError(f"A feature map returned {type(phi).__name__}; allowed: a tensor, or a pair of them.")
        return phi.to(dtype), None if log_scale is None else log_scale.to(dtype)

    return features
