"""`taylor` against its dense float64 series, and its calibrated start."""

import pytest
import torch

from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs
from hf_linear_attn.variants.taylor import TaylorAttention, TaylorConfig
from tests.variants.kernels import (
    DIM,
    SCALING,
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
    return TaylorAttention(TaylorConfig(**options), context(causal, layer_idx=layer_idx))


def series(u, order):
    return 1 + u if order == 1 else 1 + u + u * u / 2


@SIDES
@pytest.mark.parametrize("order", [1, 2])
def test_starts_as_published(order, causal):
    module = build(causal, order=order, num_features=None).double()
    for length in (1, 7, 65):
        q, k, v = draw(length)
        if order == 1:
            u = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
        else:
            u = SCALING * q @ k.mT
        torch.testing.assert_close(attend(module, q, k, v), dense(series(u, order), v, causal))


@SIDES
@pytest.mark.parametrize("options", [{"num_features": 3}, {"num_features": None}, {"order": 1}])
def test_is_the_dense_formula_of_projected_queries_and_keys(options, causal):
    module = build(causal, **options).double()
    module = randomize(module, list(module.state_dict()))
    for length in (7, 65):
        q, k, v = draw(length)
        x = q @ module.query_weight.mT + module.query_bias[:, None]
        y = k @ module.key_weight.mT + module.key_bias[:, None]
        if module.config.order == 1:
            u = (x / x.norm(dim=-1, keepdim=True)) @ (y / y.norm(dim=-1, keepdim=True)).mT
        else:
            u = SCALING * x @ y.mT
        scores = series(u, module.config.order) * mean_weight(module.query_mean, k)
        torch.testing.assert_close(attend(module, q, k, v), dense(scores, v, causal))


def test_the_random_projection_estimates_products_and_is_seeded():
    q, k, _ = draw(30)
    products = []
    for seed in range(400):
        weight = build(num_features=4, seed=seed).query_weight.double()
        products.append((q @ weight.mT) @ (k @ weight.mT).mT)
    torch.testing.assert_close(torch.stack(products).mean(0), q @ k.mT, atol=1.5, rtol=0)
    module = build(num_features=4)
    torch.manual_seed(7)
    assert torch.equal(build(num_features=4).query_weight, module.query_weight)
    assert not torch.equal(build(num_features=4, layer_idx=1).query_weight, module.query_weight)


@SIDES
@pytest.mark.parametrize(
    "options", [{}, {"num_features": 3}, {"num_features": 3, "variance_reducer": False}, {"order": 1}]
)
def test_calibration_is_never_worse_in_any_head(options, causal):
    before, after = errors_before_and_after_calibration(build(causal, **options))
    assert (after <= before * 1.0001).all()
    if options.get("variance_reducer", True):
        assert after[0] < 0.6 * before[0]


def test_the_calibrated_projection_keeps_low_rank_logits():
    """Queries on a plane: two coordinates found by calibration do what all of them do."""
    q, k, v = draw(100, dtype=torch.float32)
    q = q @ torch.diag_embed(torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0]))
    module = build(num_features=2, variance_reducer=False)
    module.calibrate([AttentionInputs(q, k, v, scaling=SCALING)])
    full = build(num_features=None, variance_reducer=False)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALING)
    errors = [(attend(x, q, k, v) - exact).norm() / exact.norm() for x in (module, full)]
    assert errors[0] < 1.05 * errors[1]


def test_decode_state_holds_each_pair_of_coordinates_once():
    for options, features in (({"num_features": 3}, 1 + 3 + 6), ({"order": 1}, 1 + DIM)):
        state = build(True, **options).init_state(2, torch.float32, torch.device("cpu"))
        assert state["kv"].shape == (2, 3, features, DIM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "order=3; allowed: 1, 2"),
        ({"num_features": 0}, "num_features=0; allowed: an integer of at least 1, or None"),
        ({"variance_reducer": 1}, "variance_reducer=1; allowed: True or False"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TaylorConfig(**options)


def test_is_registered_for_both_sides():
    spec = get_variant("taylor")
    assert (spec.encoder, spec.decoder, spec.state, spec.exact_limit) == (True, True, "constant", None)
