"""What the tests of kernel attention share: small calls, the dense form of a kernel, errors against softmax."""

import torch
import torch.nn.functional as F

from hf_linear_attn.variants.base import AttentionInputs, LayerContext

HEADS, DIM, SCALING = 3, 8, 0.3


def context(causal=False, *, layer_idx=0, dim=DIM, max_length=512):
    return LayerContext(layer_idx, 6, HEADS * dim, HEADS, dim, max_length, causal)


def draw(length, *, batch=2, seed=0, dim=DIM, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, HEADS, length, dim, generator=g, dtype=dtype).unbind(0)


def attend(module, q, k, v, padding=None, hidden=None):
    return module(AttentionInputs(q, k, v, padding, module.context.is_causal, SCALING, hidden))[0]


def dense(scores, v, causal):
    """Rows of `scores` `[B, H, T, T]`, without the future of a decoder, over their sums."""
    scores = scores.tril() if causal else scores
    return scores @ v / scores.sum(-1, keepdim=True)


def mean_weight(query_mean, k):
    """exp(scaling * a . k_j), `[B, H, 1, T]`."""
    return torch.einsum("hd,bhtd->bht", SCALING * query_mean, k).exp()[:, :, None]


def randomize(module, names, scale=0.5):
    """Parameters and buffers away from their start."""
    g = torch.Generator().manual_seed(3)
    state = module.state_dict()
    for name in names:
        state[name].add_(scale * torch.randn(state[name].shape, generator=g, dtype=state[name].dtype))
    return module


def errors_before_and_after_calibration(module, batch=3, length=120):
    """Relative squared error of each head, on padded queries with a common part in head 0 (as checkpoints have)."""
    q, k, v = draw(length, batch=batch, dtype=torch.float32)
    q = 0.3 * q
    q[:, 0] += 2.0 * torch.linspace(-1, 1, DIM)
    padding = torch.arange(length) >= torch.arange(batch)[:, None] * 20
    causal = torch.ones(length, length).tril().bool() if module.context.is_causal else True
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=padding[:, None, None] & causal, scale=SCALING)
    real = padding[:, None, :, None]

    def errors():
        difference = (attend(module, q, k, v, padding) - exact) * real
        return difference.square().sum((0, 2, 3)) / (exact * real).square().sum((0, 2, 3))

    before = errors().detach()
    poisoned = [x.masked_fill(~real, 1e9) for x in (q, k, v)]
    module.calibrate([AttentionInputs(*poisoned, padding, module.context.is_causal, SCALING)])
    return before, errors().detach()
