"""What Transformers' mask functions say about packed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hf_linear_attn.ops.base.packing import PACKED_MESSAGE, SequencePlan, is_traced, plan_sequences

__all__ = ["packed_rows"]


def packed_rows(
    mask_function: Callable[..., torch.Tensor], batch: int, q_length: int, kv_length: int, device: torch.device
) -> SequencePlan | None:
    """The plan of rows that Transformers takes for packed, or None.

    Whether `position_ids` mean packing is Transformers' decision: only in decoders that hand them to the mask, and only
    without an attention mask and a cache. Its answer is inside `mask_function(batch, head, query, key)`: a token that
    does not see the one before it begins a sequence.

    Args:
        mask_function: what the mask function of an implementation is given.
        batch: B.
        q_length: tokens of the call.
        kv_length: keys, those of a cache included.
        device: of the answer.
    """
    if mask_function in (causal_mask_function, bidirectional_mask_function) or not 1 < q_length == kv_length:
        return None
    place = torch.arange(q_length, device=device)[None]
    rows, head = torch.arange(batch, device=device)[:, None], torch.zeros((), dtype=torch.long, device=device)
    together = mask_function(rows, head, place[:, 1:], place[:, :-1]).expand(batch, -1)
    if is_traced():
        torch._assert_async(together.all(), PACKED_MESSAGE)
        return None
    if bool(together.all()):
        return None
    return plan_sequences(batch, q_length, seq_idx=F.pad((~together).cumsum(-1), (1, 0)))
