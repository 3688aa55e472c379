"""`performer` against performer-pytorch's `FastAttention`, on the same projection.

Theirs adds 1e-4 to every feature after dividing by a maximum over the sequence (and 1e-6 to the causal sums): with
those set to 0 the functions are the same, and with them a later key changes earlier rows.
"""

from functools import partial

import pytest
import torch

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.performer import PerformerAttention, PerformerConfig

pytestmark = pytest.mark.conformance
HEADS, DIM = 3, 16
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture
def theirs(monkeypatch):
    from performer_pytorch import performer_pytorch as package

    def build(omega, causal, *, eps, **options):
        monkeypatch.setattr(package, "softmax_kernel", partial(softmax_kernel, eps=eps))
        monkeypatch.setattr(package, "causal_linear_attention_noncuda", partial(noncuda, eps=eps))
        module = package.FastAttention(DIM, nb_features=omega.shape[0], causal=causal, **options)
        module.projection_matrix.copy_(omega)
        return module

    softmax_kernel, noncuda = package.softmax_kernel, package.causal_linear_attention_noncuda
    return build


def draw(length):
    return torch.randn(3, 2, HEADS, length, DIM, generator=torch.Generator().manual_seed(length)).unbind(0)


def build(causal, kernel="positive"):
    context = LayerContext(0, 2, HEADS * DIM, HEADS, DIM, 512, causal)
    return PerformerAttention(PerformerConfig(num_features=64, kernel=kernel), context)


def attend(module, q, k, v):
    return module(AttentionInputs(q, k, v, None, module.context.is_causal, DIM**-0.5))[0]


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("length", [1, 63, 200])
def test_positive_features(theirs, length, causal):
    q, k, v = draw(length)
    module = build(causal)
    expected = theirs(module.omega, causal, eps=0.0)(q, k, v)
    torch.testing.assert_close(attend(module, q, k, v), expected, **TOLERANCE)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_relu_features(theirs, causal):
    """The generalized kernel, whose 1e-3 on each feature both have."""
    q, k, v = draw(130)
    module = build(causal, "relu")
    expected = theirs(module.omega, causal, eps=0.0, generalized_attention=True)(q, k, v)
    torch.testing.assert_close(attend(module, q, k, v), expected, **TOLERANCE)


def test_their_stabilizer_lets_a_later_key_change_earlier_rows_and_ours_does_not(theirs):
    q, k, v = draw(40)
    module = build(True)
    reference = theirs(module.omega, True, eps=1e-4)
    changed = k.clone()
    changed[:, :, 30] *= 8
    for attention, leaks in ((partial(attend, module), False), (reference, True)):
        before, after = attention(q, k, v)[:, :, :30], attention(q, changed, v)[:, :, :30]
        assert torch.allclose(before, after, atol=1e-5) != leaks
