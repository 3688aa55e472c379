"""The seam with Transformers: the attention function, the mask function and the cache layer.

Transformers looks attention up by name. Every attention module of a converted model calls `linear_attention_forward`,
which finds the layer's variant on the module; layers that keep softmax come through here as well, because they
receive the same two-dimensional padding mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache
from transformers.utils import logging

from hf_linear_attn.auto_config import IMPLEMENTATION, converted_name
from hf_linear_attn.ops.masking import causal_mask
from hf_linear_attn.ops.packing import PACKED_MESSAGE, SequencePlan, attend_by_bucket, is_traced, plan_call
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.variants.base import AttentionInputs, State

__all__ = [
    "AttentionRecorder",
    "ConvertedAttention",
    "LinearAttnCacheLayer",
    "LinearAttnCall",
    "converted_attention_class",
    "with_sequence_plan",
]

logger = logging.get_logger(__name__)

AttentionRecorder = Callable[[nn.Module, AttentionInputs, torch.Tensor], torch.Tensor | None]
"""Called with (module, its inputs, its softmax output `[B, H, Tq, D]`) for each converted layer, which then returns
the softmax output, or what the recorder returns in its place."""


@dataclass
class LinearAttnCall:
    """What a converted attention module adds to the keywords of its attention function.

    It travels with the call. Kept on the module instead, it would mix up threads and recomputed checkpoints.
    """

    hidden_states: torch.Tensor
    cache_layer: LinearAttnCacheLayer | None


class LinearAttnCacheLayer(CacheLayerMixin):
    """One layer's decode state inside a `DynamicCache`.

    `update` counts tokens and hands the new keys and values back unchanged; what has to be remembered is the
    variant's own state, a dict of tensors whose first dimension is the batch.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen_tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the new tokens; keys and values `[B, H, T, D]` come back as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen_tokens += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The same under the name older releases ask for."""
        return -1

    def _map_state(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.state is not None:
            self.state = {name: fn(tensor) for name, tensor in self.state.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_state(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        self._map_state(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        self._map_state(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        self._map_state(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map_state(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self.state = None
        self.seen_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises `ValueError`: tokens that went into a linear-attention state cannot be taken out of it."""
        if tokens_to_remove == 0:
            return
        raise ValueError(
            "The cache of a converted layer cannot be cropped: its state has already absorbed the tokens. Assisted "
            "generation and other methods that roll a cache back need softmax attention "
            '(model.set_attn_implementation("sdpa")).'
        )


class ConvertedAttention:
    """Mixin put before an upstream self-attention class; its instances own a variant, `linear_attn`."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation != IMPLEMENTATION:  # type: ignore[attr-defined]
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        cache = kwargs.get("past_key_values")
        cache_layer = None
        if cache is not None:
            cache_layer = _prepare_cache_layer(cache, self.layer_idx, hidden_states.shape[1])  # type: ignore[attr-defined]
        kwargs["linear_attn_call"] = LinearAttnCall(hidden_states, cache_layer)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


_ATTENTION_CLASSES: dict[type, type] = {}


def converted_attention_class(upstream: type) -> type:
    """The converted subclass of an upstream self-attention class (one per class, importable from `auto`)."""
    if upstream not in _ATTENTION_CLASSES:
        _ATTENTION_CLASSES[upstream] = type(
            converted_name(upstream.__name__),
            (ConvertedAttention, upstream),
            {"__module__": "hf_linear_attn.auto", "__doc__": f"`{upstream.__name__}` that runs an attention variant."},
        )
    return _ATTENTION_CLASSES[upstream]


def _prepare_cache_layer(cache: Cache, layer_idx: int, new_tokens: int) -> LinearAttnCacheLayer:
    """Our layer inside `cache`, put there now if the one in its place is still empty."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, LinearAttnCacheLayer):
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"A converted layer works with a DynamicCache, but layer {layer_idx} of the cache is a "
                f"{type(layer).__name__}. Leave cache_implementation unset."
            )
        if layer.get_seq_length() > 0:
            raise ValueError(
                f"Layer {layer_idx} of the cache already holds {layer.get_seq_length()} tokens of keys and values that "
                "a converted layer cannot use. Start from an empty DynamicCache."
            )
        layer = cache.layers[layer_idx] = LinearAttnCacheLayer()
    _check_lengths(cache, layer, layer_idx, new_tokens)
    return layer


def _check_lengths(cache: Cache, layer: LinearAttnCacheLayer, layer_idx: int, new_tokens: int) -> None:
    """Raise if an exception in an earlier forward left some layers of the cache a step ahead of others."""
    # Layer 0 opens the call, so the last layer must be where it is; later layers follow layer 0, which has just
    # taken the new tokens.
    other: Any = cache.layers[0] if layer_idx else cache.layers[-1]
    expected = layer.seen_tokens + (new_tokens if layer_idx else 0)
    if other.get_seq_length() != expected:
        raise ValueError(
            f"The cache is inconsistent: layer {layer_idx} has seen {layer.seen_tokens} tokens, another layer "
            f"{other.get_seq_length()}. An earlier forward probably failed half-way; start from a new cache."
        )


def linear_attention_mask(
    *, attention_mask: torch.Tensor | None = None, kv_length: int, kv_offset: int = 0, **kwargs: Any
) -> torch.Tensor | None:
    """Mask function: the bool padding mask `[B, kv_length]` (True = real), or None when everything is real.

    Raises:
        ValueError: for a mask that is not two-dimensional, or shorter than the keys.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(_mask_message(attention_mask))
    attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if attention_mask.shape[1] != kv_length:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens but there are {kv_length} (with a cache, the "
            "mask covers past tokens as well; converted layers work with a DynamicCache, not a static one)."
        )
    # Masks cost time, and most are all ones. Not while tracing: the answer depends on the data.
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    return attention_mask


def _mask_message(mask: torch.Tensor) -> str:
    return (
        f"Converted models take a 2-D padding mask [batch, length]; got a {mask.ndim}-D mask of shape "
        f"{tuple(mask.shape)}. An arbitrary attention pattern has no linear form."
    )


def linear_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    global_attention_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    linear_attn_call: LinearAttnCall | None = None,
    linear_attn_recorder: AttentionRecorder | None = None,
    linear_attn_plan: SequencePlan | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of converted models: query, key, value `[B, H, T, D]` to output `[B, Tq, H, D]`.

    Keys and values that serve a group of heads, `[B, H / groups, T, D]`, are repeated for every head, so that variants
    need not know of groups; a decode state that keeps keys grows by that factor. `sliding_window` (tokens) concerns
    layers that keep softmax: a layer that upstream runs with one is not converted.

    Packed sequences (`position_ids` that restart, `cu_seq_lens_q` or `seq_idx`) do not see one another, and a batch
    that is mostly padding runs without most of it. `linear_attn_plan` is what `with_sequence_plan` made of these
    keywords for all layers.

    Raises:
        ValueError: for a mask that is not a 2-D padding mask, packed sequences with a cache or while a graph is traced,
            `output_attentions`, or a module that is neither converted nor listed as softmax in its config.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(_mask_message(attention_mask))
    if kwargs.get("output_attentions"):
        raise ValueError(OUTPUT_ATTENTIONS_MESSAGE)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = _is_causal(module, is_causal)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    if linear_attn_call is None:
        _check_listed_as_softmax(module)
    cache_layer = None if linear_attn_call is None else linear_attn_call.cache_layer
    plan = linear_attn_plan
    if not _is_self_attention(module):
        plan = SequencePlan()  # every packed sequence may see all of the encoder's tokens
    elif plan is None:
        given = attention_mask, position_ids, cu_seq_lens_q, seq_idx
        plan = plan_call(query.shape[0], query.shape[2], *given, gaps=causal)
    regroups = cache_layer is None and linear_attn_recorder is None and query.shape[2] == key.shape[2]
    if plan.packed and not regroups:
        raise ValueError(PACKED_MESSAGE)

    if linear_attn_call is None:

        def attend_softmax(q: Any, k: Any, v: Any, real: Any, *_: Any) -> torch.Tensor:
            # Padding of buckets is on the right: causality hides it, and SDPA is faster without a mask.
            return softmax_attention(q, k, v, None if causal else real, causal, scaling, dropout, sliding_window)

        if plan.buckets and regroups:
            output = attend_by_bucket(plan, attend_softmax, query, key, value)
        else:
            output = softmax_attention(query, key, value, attention_mask, causal, scaling, dropout, sliding_window)
        return output.transpose(1, 2), None

    variant: Any = module.linear_attn
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        # With a cache the mask also covers tokens that are already in the state.
        key_padding=None if attention_mask is None else attention_mask[:, -key.shape[-2] :],
        is_causal=causal,
        scaling=scaling,
        hidden_states=linear_attn_call.hidden_states,
        global_mask=_global_mask(global_attention_mask, query),
    )
    if linear_attn_recorder is not None:
        output = softmax_attention(query, key, value, inputs.key_padding, causal, scaling, 0.0)
        replacement = linear_attn_recorder(module, inputs, output)
        return (output if replacement is None else replacement).transpose(1, 2), None

    if dropout > 0.0:
        logger.warning_once(
            f"Attention dropout ({dropout}) has no form in converted layers and is not applied there. "
            "Set the config's attention dropout to 0 to silence this."
        )
    if plan.buckets and regroups:

        def attend(q: Any, k: Any, v: Any, real: Any, hidden: Any, marked: Any) -> torch.Tensor:
            real = None if causal and marked is None else real  # hidden by causality
            return variant(AttentionInputs(q, k, v, real, causal, scaling, hidden, marked))[0]

        output = attend_by_bucket(plan, attend, query, key, value, inputs.hidden_states, inputs.global_mask)
        return output.transpose(1, 2), None
    state = None
    if cache_layer is not None:
        if cache_layer.state is None:
            cache_layer.state = variant.init_state(query.shape[0], query.dtype, query.device)
        state = cache_layer.state
    output, state = variant(inputs, state)
    if cache_layer is not None:
        cache_layer.state = state
    return output.transpose(1, 2), None


OUTPUT_ATTENTIONS_MESSAGE = (
    "output_attentions=True: a converted layer never forms attention weights. For softmax weights call "
    'model.set_attn_implementation("eager") first (the projections are the checkpoint\'s own).'
)


def softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of a layer that was not converted, `[B, H, Tq, D]`; rows that see no key are 0.

    SDPA drops causality as soon as it is given a mask, so padding, causality and the sliding window (the last
    `sliding_window` tokens of a causal layer, None for all) are combined here.
    """
    q_len, k_len = query.shape[-2], key.shape[-2]
    windowed = is_causal and sliding_window is not None and k_len > sliding_window
    if key_padding is None and not windowed and (not is_causal or q_len == k_len):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=is_causal and q_len > 1, scale=scaling
        )
    allowed = torch.ones((1, 1, 1, k_len), dtype=torch.bool, device=query.device)
    if key_padding is not None:
        allowed = key_padding[:, None, None, :]
    if is_causal:
        past = causal_mask(q_len, k_len, query.device)
        allowed = allowed & (past.triu(k_len - q_len - sliding_window + 1) if windowed else past)  # type: ignore[operator]
    sees_a_key = allowed.any(-1, keepdim=True)
    # Rows without a key attend everywhere and are zeroed afterwards: no NaN in the output nor in the gradients.
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed | ~sees_a_key, dropout_p=dropout, scale=scaling
    )
    return output.masked_fill(~sees_a_key, 0.0)


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """The call's causality; a module that disagrees with what its config makes of the mask is refused."""
    config: Any = module.config
    patcher = get_patcher(config.base_model_type) if hasattr(config, "base_model_type") else None
    if patcher is None or not patcher.is_self_attention(module):
        return bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if bool(module.is_causal) != patcher.is_causal(config):
        raise ValueError(
            f"Layer {module.layer_idx} was built with is_causal={module.is_causal} but its config now asks for "
            f"{patcher.is_causal(config)} (is_decoder was changed after the model was built). Build the model from "
            "the config it should have, then convert it."
        )
    return bool(module.is_causal if is_causal is None else is_causal)


def _check_listed_as_softmax(module: nn.Module) -> None:
    """Raise unless the config says that this module keeps softmax attention."""
    config: Any = module.config
    if hasattr(config, "base_model_type"):
        is_self_attention = get_patcher(config.base_model_type).is_self_attention(module)
        if not is_self_attention or config.linear_attn["layers"][module.layer_idx] is None:
            return
    raise ValueError(
        f"{type(module).__name__} runs with attn_implementation={IMPLEMENTATION!r} but was not converted. Load the "
        f"checkpoint through AutoModel* after `import hf_linear_attn`, or use convert_model()."
    )


def with_sequence_plan(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a model's call, with the plan of its sequences for all layers if this is the base model.

    Layers make the plan themselves when it is not given, from what reaches them: every one reads the positions again,
    and families whose layers get no `position_ids` would not know of packed sequences.
    """
    if model.base_model is not model or "linear_attn_plan" in kwargs:
        return kwargs
    names = ("attention_mask", "position_ids", "cu_seq_lens_q", "seq_idx")
    gaps = get_patcher(model.config.base_model_type).is_causal(model.config)  # an encoder may leave positions out
    if is_traced():
        position_ids = kwargs.get("position_ids")
        if position_ids is not None:  # asserts what a family's layers may be unable to
            plan_call(*position_ids.shape, *(kwargs.get(name) for name in names), gaps=gaps)
        return kwargs
    given = _signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
    given = {**given, **given.pop("kwargs", {})}
    mask, of_tokens = given.get("attention_mask"), given.get("input_ids")
    if of_tokens is None and given.get("inputs_embeds") is not None:
        of_tokens = given["inputs_embeds"][..., 0]
    if of_tokens is None or (mask is not None and mask.ndim != 2):
        return kwargs  # refused later on
    shape = of_tokens.shape
    plan = plan_call(shape[:-1].numel(), shape[-1], *(given.get(name) for name in names), gaps=gaps)
    return {**kwargs, "linear_attn_plan": plan}


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _is_self_attention(module: nn.Module) -> bool:
    config: Any = module.config
    return hasattr(config, "base_model_type") and get_patcher(config.base_model_type).is_self_attention(module)


def _global_mask(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """The call's global tokens as bool `[B, Tq]`; multiple-choice inputs come as `[B, choices, T]`."""
    if mask is None:
        return None
    mask = mask.reshape(-1, mask.shape[-1]).bool()
    expected = (query.shape[0], query.shape[-2])
    if tuple(mask.shape) != expected:
        raise ValueError(f"global_attention_mask has shape {tuple(mask.shape)}; expected {expected} [batch, length].")
    return mask


AttentionInterface.register(IMPLEMENTATION, linear_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, linear_attention_mask)
