"""The forms of `memory` against PyTorch's attention and flash-linear-attention's linear attention, segment by segment.

Transformers' only model with a segment memory, XLNet, has relative positions of its own in its logits; the memory
itself is PyTorch's attention of a segment over cached keys, whose causal mask is aligned at the lower right.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.memory import MemoryAttention, MemoryConfig

pytestmark = pytest.mark.conformance
HEADS, DIM = 4, 16
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def normalized_linear_attention():
    """Their recurrence with normalizer and state, in our layout."""
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    def run(q, k, v, state=None):
        output, state = naive_recurrent_linear_attn(
            *(x.transpose(1, 2) for x in (q, k, v)), initial_state=state, output_final_state=True, normalize=True
        )
        return output.transpose(1, 2), state

    return run


def draw(length):
    return torch.randn(3, 2, HEADS, length, DIM, generator=torch.Generator().manual_seed(length)).unbind(0)


def build(causal=True, **options):
    return MemoryAttention(MemoryConfig(**options), LayerContext(0, 2, HEADS * DIM, HEADS, DIM, 512, causal))


def attend(module, q, k, v):
    return module(AttentionInputs(q, k, v, None, module.context.is_causal, DIM**-0.5))[0]


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("length", [1, 63, 600])
def test_chunked_is_pytorch_s_attention_with_its_gradients(length, causal):
    given = [x.requires_grad_() for x in draw(length)]
    ours, theirs = attend(build(causal), *given), F.scaled_dot_product_attention(*given, is_causal=causal)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    gradients = (torch.autograd.grad(x.square().sum(), given) for x in (ours, theirs))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize(("size", "memory"), [(16, 16), (16, 40), (32, 8)])
def test_transformer_xl_is_a_segment_over_cached_keys(size, memory):
    q, k, v = draw(100)
    outputs = []
    for start in range(0, 100, size):
        first, stop = max(0, start - memory), min(start + size, 100)
        bias = causal_lower_right(stop - start, stop - first)
        cached = k[:, :, first:stop], v[:, :, first:stop]
        outputs.append(F.scaled_dot_product_attention(q[:, :, start:stop], *cached, attn_mask=bias))
    ours = attend(build(form="transformer_xl", segment_size=size, mem_length=memory), q, k, v)
    torch.testing.assert_close(ours, torch.cat(outputs, 2), **TOLERANCE)


def test_infini_is_a_segment_s_attention_and_linear_attention_to_those_before(normalized_linear_attention):
    q, k, v = draw(100)
    module = build(form="infini", segment_size=16)
    with torch.no_grad():
        module.beta.copy_(torch.tensor([-8.0, -1.0, 0.0, 2.0]))
    gate = module.beta.sigmoid()[:, None, None]
    q_features, k_features = F.elu(q) + 1, F.elu(k) + 1
    outputs, state = [], None
    for part in torch.arange(100).split(16):
        local = F.scaled_dot_product_attention(*(x[:, :, part] for x in (q, k, v)), is_causal=True)
        if state is None:
            outputs.append(local)
        else:
            nothing = torch.zeros_like(local)  # keys and values that add nothing: only the memory is read
            read, _ = normalized_linear_attention(q_features[:, :, part], nothing, nothing, state)
            outputs.append(gate * read + (1 - gate) * local)
        _, state = normalized_linear_attention(*(x[:, :, part] for x in (q_features, k_features, v)), state)
    torch.testing.assert_close(attend(module, q, k, v), torch.cat(outputs, 2), **TOLERANCE)
