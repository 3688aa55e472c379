"""`cosformer` against its dense float64 formula, its positions, and its calibrated start."""

import math

import pytest
import torch

from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs
from hf_linear_attn.variants.cosformer import CosformerAttention, CosformerConfig
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


def build(causal=False, *, max_length=160, **options):
    return CosformerAttention(CosformerConfig(**options), context(causal, max_length=max_length))


def cosines(length, longest):
    place = torch.arange(length, dtype=torch.float64)
    return torch.cos(math.pi / 2 * (place[:, None] - place) / longest)


@SIDES
def test_is_the_dense_formula(causal):
    module = build(causal, variance_reducer=False).double()
    for length in (1, 7, 65, 160):
        q, k, v = draw(length)
        scores = q.relu() @ k.relu().mT * cosines(length, 160)
        torch.testing.assert_close(attend(module, q, k, v), dense(scores, v, causal).nan_to_num(0))
        torch.testing.assert_close(attend(build(causal).double(), q, k, v), attend(module, q, k, v))


@SIDES
def test_means_and_centers(causal):
    module = build(causal).double()
    module = randomize(module, list(module.state_dict()))
    q, k, v = draw(65)
    scores = (q - module.query_center[:, None]).relu() @ (k - module.key_center[:, None]).relu().mT
    scores = scores * cosines(65, 160) * mean_weight(module.query_mean, k)
    torch.testing.assert_close(attend(module, q, k, v), dense(scores, v, causal).nan_to_num(0))


def test_the_longest_sequence_and_not_the_present_one_sets_the_angle():
    q, k, v = draw(30)
    short, long = (build(max_length=n, variance_reducer=False).double() for n in (30, 3000))
    assert not torch.allclose(attend(short, q, k, v), attend(long, q, k, v))
    flat = dense(q.relu() @ k.relu().mT, v, False)
    torch.testing.assert_close(attend(long, q, k, v), flat, atol=1e-3, rtol=1e-3)


def test_sequences_beyond_the_longest_are_refused():
    q, k, v = draw(30)
    with pytest.raises(ValueError, match=r"at most max_length=20 tokens .* got 30 queries and 30 keys"):
        attend(build(max_length=20), q, k, v)
    with pytest.raises(ValueError, match="got 30 queries and 9 keys"):
        build()(AttentionInputs(q, k[:, :, :9], v[:, :, :9], None, False, SCALING))


@SIDES
def test_calibration_is_never_worse_in_any_head(causal):
    before, after = errors_before_and_after_calibration(build(causal))
    assert (after <= before * 1.0001).all()
    assert after[0] < 0.8 * before[0]
    module = build(causal, variance_reducer=False)
    before, after = errors_before_and_after_calibration(module)
    assert torch.equal(before, after)


def test_decode_state_size():
    state = build(True).init_state(2, torch.float32, torch.device("cpu"))
    assert state["kv"].shape == (2, 3, 2 * DIM, DIM)
    assert state["count"].tolist() == [0, 0]


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="variance_reducer=1; allowed: True or False"):
        CosformerConfig(variance_reducer=1)


def test_is_registered_for_both_sides():
    spec = get_variant("cosformer")
    assert (spec.encoder, spec.decoder, spec.state, spec.exact_limit) == (True, True, "constant", None)
