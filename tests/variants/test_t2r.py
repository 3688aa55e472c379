"""`t2r` against its dense float64 formula, and its starts."""

import pytest
import torch

from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.t2r import T2RAttention, T2RConfig
from tests.variants.kernels import (
    DIM,
    attend,
    context,
    dense,
    draw,
    errors_before_and_after_calibration,
    mean_weight,
    randomize,
)

SIDES = pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])


def build(causal=False, *, layer_idx=0, **options):
    return T2RAttention(T2RConfig(**options), context(causal, layer_idx=layer_idx))


@SIDES
@pytest.mark.parametrize("num_features", [None, 5, 40])
def test_is_the_dense_formula(num_features, causal):
    module = build(causal, num_features=num_features).double()
    module = randomize(module, list(module.state_dict()))
    for length in (1, 7, 65):
        q, k, v = draw(length)
        q_features = (q @ module.query_weight.mT + module.query_bias[:, None]).relu()
        k_features = (k @ module.key_weight.mT + module.key_bias[:, None]).relu()
        scores = q_features @ k_features.mT * mean_weight(module.query_mean, k)
        expected = dense(scores, v, causal).nan_to_num(0)
        torch.testing.assert_close(attend(module, q, k, v), expected)


def test_starts_from_both_signs_of_every_coordinate():
    module = build()
    expected = torch.cat([torch.eye(DIM), -torch.eye(DIM)])
    for weight in (module.query_weight, module.key_weight):
        torch.testing.assert_close(weight, expected.expand_as(weight))
    assert not module.query_bias.any()
    few, many = build(num_features=6), build(num_features=2 * DIM + 3)
    torch.testing.assert_close(few.query_weight[0], torch.cat([torch.eye(DIM)[:3], -torch.eye(DIM)[:3]]))
    torch.testing.assert_close(many.query_weight[0, : 2 * DIM], expected)
    assert many.query_weight[0, 2 * DIM :].norm(dim=-1).min() > 0
    torch.manual_seed(9)
    assert torch.equal(build(num_features=2 * DIM + 3).query_weight, many.query_weight)


@SIDES
@pytest.mark.parametrize("options", [{}, {"num_features": 7}, {"num_features": 20, "variance_reducer": False}])
def test_calibration_is_never_worse_in_any_head(options, causal):
    before, after = errors_before_and_after_calibration(build(causal, **options))
    assert (after <= before * 1.0001).all()
    if options.get("variance_reducer", True):
        assert after[0] < 0.8 * before[0]


def test_decode_state_size():
    state = build(True, num_features=6).init_state(2, torch.float32, torch.device("cpu"))
    assert sum(x[0, 0].numel() for x in state.values()) == 6 * (DIM + 1) + 1  # and the scale of the sums


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 1}, "num_features=1; allowed: an integer of at least 2, or None"),
        ({"variance_reducer": 1}, "variance_reducer=1; allowed: True or False"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        T2RConfig(**options)


def test_is_registered_for_both_sides():
    spec = get_variant("t2r")
    assert (spec.encoder, spec.decoder, spec.state, spec.exact_limit) == (True, True, "constant", None)
