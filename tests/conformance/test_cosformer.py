"""`cosformer`: the published features through flash-linear-attention's naive linear attention.

No package of the index has cosFormer; the features are written here from the paper's equation 10.
"""

import math

import pytest
import torch

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.cosformer import CosformerAttention, CosformerConfig

pytestmark = pytest.mark.conformance
HEADS, DIM, LONGEST = 3, 16, 256
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def theirs():
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    def attend(q, k, v, longest):
        angle = math.pi / 2 * torch.arange(q.shape[2])[:, None] / longest
        features = (torch.cat([x.relu() * angle.sin(), x.relu() * angle.cos()], -1).transpose(1, 2) for x in (q, k))
        output, _ = naive_recurrent_linear_attn(*features, v.transpose(1, 2), scale=1.0, normalize=True)
        return output.transpose(1, 2)

    return attend


def draw(length):
    return torch.randn(3, 2, HEADS, length, DIM, generator=torch.Generator().manual_seed(length)).unbind(0)


def build():
    context = LayerContext(0, 2, HEADS * DIM, HEADS, DIM, LONGEST, True)
    return CosformerAttention(CosformerConfig(), context)


@pytest.mark.parametrize("length", [1, 63, LONGEST])
def test_the_published_features(theirs, length):
    q, k, v = draw(length)
    ours = build()(AttentionInputs(q, k, v, None, True, DIM**-0.5))[0]
    torch.testing.assert_close(ours, theirs(q, k, v, LONGEST), **TOLERANCE)


def test_angles_by_the_length_of_the_call_break_decoding_and_ours_do_not(theirs):
    """The authors' M is the length of the call: the same prefix then gives another output in a longer call."""
    q, k, v = draw(200)
    prefix = [x[:, :, :100] for x in (q, k, v)]
    assert not torch.allclose(theirs(*prefix, 100), theirs(q, k, v, 200)[:, :, :100], atol=1e-2)
    ours, short = (build()(AttentionInputs(*x, None, True, 0.25))[0] for x in ((q, k, v), prefix))
    torch.testing.assert_close(short, ours[:, :, :100], **TOLERANCE)
