"""The forms of linear attention, each for the arguments of `linear_attention` in causal attention."""

from unittest.mock import patch

import torch

from hf_linear_attn.ops.linear import layout
from hf_linear_attn.ops.linear.attention import init_linear_state, linear_attention


def attend(q, k, v, **given):
    """What a call takes: blocks with a backward pass of their own."""
    return linear_attention(q, k, v, is_causal=True, **given)


def traced(q, k, v, *, chunk=layout.CHUNK, **given):
    """What autograd and torch.compile take, in chunks of so many tokens."""
    with patch.object(torch.compiler, "is_compiling", lambda: True), patch.object(layout, "CHUNK", chunk):
        return linear_attention(q, k, v, is_causal=True, **given)


def token_by_token(q, k, v, *, log_decay=None, key_log_weight=None, token_mask=None, state=None, **given):
    """Decoding."""
    if state is None:
        shape = *k.shape[:2], k.shape[-1], v.shape[-1]
        state = init_linear_state(*shape, v.dtype, v.device, normalized=given.get("normalized", True))
    outputs, parts = [], {"log_decay": log_decay, "key_log_weight": key_log_weight}
    for t in range(v.shape[2]):
        now = slice(t, t + 1)
        options = {name: None if x is None else x[:, :, now] for name, x in parts.items()}
        mask = None if token_mask is None else token_mask[:, now]
        rows = (x[:, :, now] for x in (q, k, v))
        output, state = attend(*rows, **options, token_mask=mask, state=state, **given)
        outputs.append(output)
    return torch.cat(outputs, 2), state
