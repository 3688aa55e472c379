"""Feature maps of one's own: names, collisions, functions without a name, and what is wrong with a function."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.ops.features.maps import FEATURE_MAPS
from hf_linear_attn.ops.features.named import (
    feature_width,
    name_of,
    refuse_unregistered,
    register_feature_map,
    registered_names,
    unregister_feature_map,
)

REFUSED = [
    (lambda x: x.softmax(-2), "depend on other tokens"),
    (lambda x: x.cumsum(-2), "depend on other tokens"),
    (lambda x: x.flip(-2).cumsum(-2).flip(-2), "depend on other tokens"),
    (lambda x: (x, x.amax((-2, -1), keepdim=True)[..., 0].expand(x.shape[:-1])), "depend on other tokens"),
    (lambda x: x.sum(-1), r"shape \(1, 2, 5\); allowed: \(1, 2, 5, features\)"),
    (lambda x: (x, x), r"log scale of shape \(1, 2, 5, 4\); allowed: \(1, 2, 5\)"),
    (lambda x: x.log(), "not finite"),
    (lambda x: x[..., :0], "shape"),
]


@pytest.fixture
def softplus() -> Iterator[str]:
    register_feature_map("softplus", F.softplus)
    yield "softplus"
    if "softplus" in FEATURE_MAPS:
        unregister_feature_map("softplus")


def test_a_registered_map_is_the_function_in_full_precision(softplus: str) -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    features, log_scale = FEATURE_MAPS[softplus](x)
    assert log_scale is None
    assert torch.equal(features, F.softplus(x))
    assert FEATURE_MAPS[softplus](x.half())[0].dtype == torch.float32
    assert registered_names()[-1] == "softplus"


def test_a_name_is_given_once(softplus: str) -> None:
    register_feature_map(softplus, F.softplus)  # a notebook's cell, run again
    with pytest.raises(ValueError, match=r"'softplus' is taken; taken are .*elu.*rbf.*softplus"):
        register_feature_map(softplus, torch.sigmoid)
    for name in ("elu", "identity", "laplace", "rbf"):
        with pytest.raises(ValueError, match=f"{name!r} is taken"):
            register_feature_map(name, torch.sigmoid)
    x = torch.ones(1, 1, 1, 4)
    assert torch.equal(FEATURE_MAPS[softplus](x)[0], F.softplus(x)), "a refused registration changed the map"
    unregister_feature_map(softplus)
    register_feature_map(softplus, torch.sigmoid)
    assert torch.equal(FEATURE_MAPS[softplus](x)[0], x.sigmoid())


@pytest.mark.parametrize("name", ["", "my map", "unregistered:x", "2x", None, 3])
def test_names_are_identifiers(name: object) -> None:
    with pytest.raises(ValueError, match="allowed: a string"):
        register_feature_map(name, torch.sigmoid)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["no_such_map", "elu"])
def test_only_what_was_registered_is_forgotten(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} was not registered"):
        unregister_feature_map(name)
    assert "elu" in FEATURE_MAPS


@pytest.mark.parametrize(
    ("given", "message"), [(torch.nn.Softplus(), "module Softplus"), (3, "function=3"), (None, "=None")]
)
def test_only_functions_are_registered(given: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        register_feature_map("nothing", given)  # type: ignore[arg-type]
    assert "nothing" not in FEATURE_MAPS


def test_a_function_without_a_name_gets_one_that_no_checkpoint_may_hold() -> None:
    def own(x: torch.Tensor) -> torch.Tensor:
        return x.square()

    name = name_of(own)
    assert name_of(own) == name_of(name) == name
    assert name not in registered_names()
    assert torch.equal(FEATURE_MAPS[name](torch.full((1, 2), 3.0))[0], torch.full((1, 2), 9.0))
    with pytest.raises(ValueError, match=r"given in Python \(.*own.*register_feature_map"):
        refuse_unregistered(name)
    other = name_of(lambda x: x.square())
    assert other != name_of(lambda x: x.abs()), "two functions under one name"
    register_feature_map("own", own)
    try:
        assert name_of(name) == name_of(own) == "own"  # named after the model was made: it can be saved now
        refuse_unregistered("own")
    finally:
        unregister_feature_map("own")


def test_bound_methods_are_one_function() -> None:
    class Maps:
        def square(self, x: torch.Tensor) -> torch.Tensor:
            return x.square()

    maps = Maps()
    assert name_of(maps.square) == name_of(maps.square)


@pytest.mark.parametrize("given", ["elu", "no_such_map", 3, None, ["elu"]])
def test_what_is_no_function_keeps_its_name(given: object) -> None:
    assert name_of(given) is given


def test_the_width_is_what_the_function_makes() -> None:
    assert feature_width("elu", 4) == 4
    wide = name_of(lambda x: torch.cat([x.relu(), (-x).relu()], -1))
    assert feature_width(wide, 4) == 8
    with torch.device("meta"):  # layers are built there; the function may hold tensors of the CPU
        directions = torch.ones(4, 3, device="cpu")
        assert feature_width(name_of(lambda x: (x @ directions).relu()), 4) == 3


@pytest.mark.parametrize(("function", "message"), REFUSED)
def test_a_function_that_is_no_feature_map_is_refused(function: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature_width(name_of(function), 4)
