"""The seam with Transformers: the attention function and the mask function (`seam.cache` has the cache layer).

Transformers looks attention up by name. Every attention module of a converted model calls `linear_attention_forward`,
which finds the layer's variant on the module; layers that keep softmax come through here as well, because they
receive the same two-dimensional padding mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from hf_linear_attn.auto_config import IMPLEMENTATION, converted_name, made_once
from hf_linear_attn.ops.base.groups import of_each_head
from hf_linear_attn.ops.base.masking import is_on_host
from hf_linear_attn.ops.base.packing import PACKED_MESSAGE, SequencePlan, attend_by_bucket, is_traced, plan_call
from hf_linear_attn.ops.exact.softmax import softmax_attention
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.cache import LinearAttnCacheLayer, find_cache, prepare_cache_layer
from hf_linear_attn.seam.extra_tokens import EXTRA_TOKENS, PACKED_WITH_EXTRA_TOKENS
from hf_linear_attn.seam.generating import NEW_REAL
from hf_linear_attn.seam.limits import named_arguments
from hf_linear_attn.seam.masks import packed_rows
from hf_linear_attn.variants.base import AttentionInputs

__all__ = [
    "AttentionRecorder",
    "ConvertedAttention",
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


JIT_TRACE_MESSAGE = (
    "torch.jit.trace, which torch.onnx.export(dynamo=False) uses too, writes the length of the example into a "
    "converted layer. Allowed: torch.export.export with dynamic_shapes, and torch.onnx.export of that program "
    "(docs/export.md)."
)


class ConvertedAttention:
    """Mixin put before an upstream self-attention class; its instances own a variant, `linear_attn`."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation != IMPLEMENTATION:  # type: ignore[attr-defined]
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if torch.jit.is_tracing():
            raise ValueError(JIT_TRACE_MESSAGE)
        cache = find_cache([*(("", value) for value in args), *kwargs.items()])
        cache_layer = None
        if cache is not None:
            cache_layer = prepare_cache_layer(cache, self.layer_idx, hidden_states, self.linear_attn)  # type: ignore[attr-defined]
        kwargs["linear_attn_call"] = LinearAttnCall(hidden_states, cache_layer)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


@made_once
def converted_attention_class(upstream: type) -> type:
    """The converted subclass of an upstream self-attention class (one per class, importable from `auto`)."""
    return type(
        converted_name(upstream.__name__),
        (ConvertedAttention, upstream),
        {"__module__": "hf_linear_attn.auto", "__doc__": f"`{upstream.__name__}` that runs an attention variant."},
    )


def linear_attention_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | SequencePlan | None:
    """Mask function: the bool padding mask `[B, kv_length]` (True = real), or None if it was seen to be all real.

    Rows that Transformers takes for packed, which have no mask, come as the plan of their sequences.

    Raises:
        ValueError: for a mask that is not two-dimensional, of another batch size, or shorter than the keys.
    """
    if attention_mask is None:
        return packed_rows(mask_function, batch_size, q_length, kv_length, torch.device(device))
    if attention_mask.ndim != 2:
        raise ValueError(_mask_message(attention_mask))
    given = tuple(attention_mask.shape)
    attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask has shape {given}, but the call needs {(batch_size, kv_length)} [batch, tokens] (with a "
            "cache, the mask covers past tokens as well; converted layers work with a DynamicCache, not a static one)."
        )
    # Masks cost time in every layer, and most are all ones. Not while tracing: the answer depends on the data; nor on a
    # GPU, where the CPU would wait for it. Without a cache the keys are counted by the mask itself, so that one of
    # another length has to reach the layers, which know better.
    if is_traced() or kv_length != q_offset + q_length or not is_on_host(attention_mask):
        return attention_mask
    return None if bool(attention_mask.all()) else attention_mask


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
    attention_mask: torch.Tensor | SequencePlan | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of converted models: query, key, value `[B, H, T, D]` to output `[B, Tq, H, D]`.

    Keys and values that serve a group of heads, `[B, H / groups, T, D]`, are repeated for every head, so that a variant
    need not know of groups (`AttentionVariant.reads_groups`); a decode state that keeps keys grows by that factor.
    `sliding_window` (tokens) concerns layers that keep softmax.

    Packed sequences do not see one another: `cu_seq_lens_q` or `seq_idx` say where they begin, or the plan in place of
    a mask, which is what Transformers made of a decoder's `position_ids`. A batch that is mostly padding runs without
    most of it, unless its mask lies on a GPU. `linear_attn_plan`, `linear_attn_all_real` and
    `linear_attn_new_real` are what `with_sequence_plan` made of these keywords for all layers.

    At masked positions self-attention gives 0, whatever the method, the layout and the batch, as flash attention does.
    One of them is read nevertheless, the last place of a decoder's prompt that is padded on the right: there stands
    what softmax gives its query over the real keys, if they are at hand (not in a chunk after others).

    Raises:
        ValueError: for a mask that is not a 2-D padding mask of the tokens, packed sequences with a cache or while a
            graph is traced, `output_attentions`, or a module that is neither converted nor listed as softmax in its
            config.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(OUTPUT_ATTENTIONS_MESSAGE)
    if kwargs.get(EXTRA_TOKENS):
        given = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal, **kwargs}
        return _beside_extra_tokens(module, query, key, value, attention_mask, **given), None
    of_layer: LinearAttnCall | None = kwargs.get("linear_attn_call")
    if of_layer is None:
        _check_listed_as_softmax(module)
    cache_layer = None if of_layer is None else of_layer.cache_layer
    recorder: AttentionRecorder | None = kwargs.get("linear_attn_recorder")
    if of_layer is not None and not (recorder is None and module.linear_attn.reads_groups):  # type: ignore[union-attr]
        key, value = of_each_head(key, query.shape[1]), of_each_head(value, query.shape[1])
    packed, mask = (attention_mask, None) if isinstance(attention_mask, SequencePlan) else (None, attention_mask)
    own_tokens = _is_self_attention(module)
    if own_tokens and kwargs.get("linear_attn_all_real"):
        mask = None
    token_mask = _token_mask(mask, query, key, cache_layer)
    if own_tokens and kwargs.get(NEW_REAL) and cache_layer is not None and cache_layer.state is not None:
        token_mask = None
    inputs = AttentionInputs(
        *(query, key, value, token_mask),
        is_causal=_is_causal(module, is_causal),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        hidden_states=None if of_layer is None else of_layer.hidden_states,
        global_mask=None if of_layer is None else _global_mask(module, kwargs, query),
        extra=kwargs.get("linear_attn_extra"),
    )
    if not own_tokens:  # every packed sequence may see all of the encoder's tokens
        return _softmax(inputs, dropout).transpose(1, 2), None

    plan = _plan(packed, inputs, kwargs)
    regroups = cache_layer is None and recorder is None and query.shape[2] == key.shape[2] and inputs.extra is None
    if plan.packed and not regroups:
        raise ValueError(PACKED_MESSAGE)
    if of_layer is not None and recorder is not None:
        return _record(module, inputs, recorder).transpose(1, 2), None

    if of_layer is None:
        attend = partial(_softmax, dropout=dropout, sliding_window=sliding_window)
        # Upstream's window counts places, the padding between tokens among them.
        regroups = regroups and (sliding_window is None or plan.packed or not plan.has_holes)
    else:
        _warn_of_dropout(dropout)
        if cache_layer is not None and not is_traced():
            _check_longest(module.linear_attn, cache_layer, mask)
        attend = partial(_run_variant, module.linear_attn, cache_layer=cache_layer)
    keys_at_hand = cache_layer is None or cache_layer.state is None
    output = _by_bucket(plan, attend, inputs) if plan.buckets and regroups else attend(inputs)
    if inputs.token_mask is not None:
        if not keys_at_hand:
            _refuse_padded_end(mask, inputs)
        # Where nobody looked whether a row ends in padding: training does not read what stands there.
        ends_padded = not (module.training if plan.last_real is None else plan.last_real)
        reads_last = keys_at_hand and not plan.packed and (is_traced() or ends_padded)
        output = _settle_padding(output, inputs, reads_last=reads_last, window=sliding_window)
    return output.transpose(1, 2), None


def _beside_extra_tokens(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> torch.Tensor:
    """Attention where the first G tokens of a layer are extra ones (`seam.extra_tokens`): `[B, G + T, H, D]`."""
    count = kwargs.pop(EXTRA_TOKENS)
    plan: SequencePlan | None = kwargs.get("linear_attn_plan")
    if plan is not None and plan.packed:
        raise ValueError(PACKED_WITH_EXTRA_TOKENS)
    of_layer: LinearAttnCall | None = kwargs.get("linear_attn_call")
    if of_layer is not None:
        kwargs["linear_attn_call"] = replace(of_layer, hidden_states=of_layer.hidden_states[:, count:])
        if module.linear_attn.num_extra_tokens:
            kwargs["linear_attn_extra"] = torch.stack([key[:, :, :count], value[:, :, :count]], dim=2)
    of_text = query[:, :, count:], key[:, :, count:], value[:, :, count:]
    text = linear_attention_forward(module, *of_text, mask, **kwargs)[0]
    real = None if mask is None or kwargs.get("linear_attn_all_real") else F.pad(mask.bool(), (count, 0), value=True)
    scaling = query.shape[-1] ** -0.5 if kwargs["scaling"] is None else kwargs["scaling"]
    rows = softmax_attention(query[:, :, :count], key, value, real, False, scaling, kwargs["dropout"])
    return torch.cat([rows.transpose(1, 2), text], dim=1)


def _plan(packed: SequencePlan | None, inputs: AttentionInputs, keywords: dict[str, Any]) -> SequencePlan:
    """The sequences of the call: the model's plan, one for this layer alone, or what stood in place of a mask."""
    plan: SequencePlan | None = keywords.get("linear_attn_plan")
    if plan is None:
        batch, _, q_len, _ = inputs.query.shape
        mask = None if inputs.token_mask is None else inputs.token_mask[:, -q_len:]
        plan = plan_call(batch, q_len, mask, keywords.get("cu_seq_lens_q"), keywords.get("seq_idx"))
    return packed if packed is not None and not plan.packed else plan


def _record(module: nn.Module, inputs: AttentionInputs, recorder: AttentionRecorder) -> torch.Tensor:
    """Softmax's output, or what the recorder gives in its place."""
    output = _softmax(inputs, 0.0)
    replacement = recorder(module, inputs, output)
    return output if replacement is None else replacement


def _token_mask(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, cache_layer: LinearAttnCacheLayer | None
) -> torch.Tensor | None:
    """Which keys are tokens `[B, Tk]`; a mask also covers the tokens that are already in a decode state."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(_mask_message(mask))
    expected = query.shape[0], key.shape[2] if cache_layer is None else cache_layer.seen_tokens
    # Beside softmax layers with a sliding window, one mask for all covers the window's tokens alone.
    fewest = min(key.shape[2], expected[1])
    if mask.shape[0] != expected[0] or not fewest <= mask.shape[1] <= expected[1]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but there are {expected} [batch, tokens] to attend to."
        )
    return mask[:, -key.shape[2] :].to(device=key.device, dtype=torch.bool)


def _softmax(inputs: AttentionInputs, dropout: float, sliding_window: int | None = None) -> torch.Tensor:
    q, k, v, real = inputs.query, inputs.key, inputs.value, inputs.token_mask
    return softmax_attention(q, k, v, real, inputs.is_causal, inputs.scaling, dropout, sliding_window)


def _check_longest(variant: Any, cache_layer: LinearAttnCacheLayer, mask: torch.Tensor | None) -> None:
    """Raise if the call's tokens and those before it are more than the method was built for."""
    tokens = cache_layer.seen_tokens
    if variant.longest is None or tokens <= variant.longest:
        return
    if mask is not None:  # only now is it read
        tokens -= int((~mask.bool()).sum(-1).min())
    if tokens > variant.longest:
        raise ValueError(
            f"The input reaches token {tokens}, and {variant.spec.key} was built for at most {variant.longest}. "
            f"Generate fewer new tokens, or convert with convert_model(..., max_length={tokens}) or more."
        )


def _run_variant(variant: Any, inputs: AttentionInputs, cache_layer: LinearAttnCacheLayer | None) -> torch.Tensor:
    """The variant's output `[B, H, Tq, D]`; its state is in `cache_layer`."""
    if cache_layer is None:
        return variant(inputs)[0]
    query = inputs.query
    if cache_layer.state is None:
        cache_layer.state = variant.init_state(query.shape[0], query.dtype, query.device)
    output, cache_layer.state = variant(inputs, cache_layer.state)
    return output


def _by_bucket(
    plan: SequencePlan, attend: Callable[[AttentionInputs], torch.Tensor], inputs: AttentionInputs
) -> torch.Tensor:
    def attend_rows(q: Any, k: Any, v: Any, real: Any, hidden: Any, marked: Any) -> torch.Tensor:
        # Padding of buckets is on the right: causality hides it, and attention is faster without a mask.
        real = None if inputs.is_causal and marked is None else real
        given = {"query": q, "key": k, "value": v, "token_mask": real, "hidden_states": hidden, "global_mask": marked}
        return attend(replace(inputs, **given))

    tokens = inputs.query, inputs.key, inputs.value, inputs.hidden_states, inputs.global_mask
    return attend_by_bucket(plan, attend_rows, *tokens)


def _refuse_padded_end(mask: torch.Tensor | None, inputs: AttentionInputs) -> None:
    """Raise if the last of several new tokens is padding behind a prompt: generation reads it, its keys are gone."""
    if mask is None or is_traced() or not inputs.is_causal or inputs.query.shape[2] == 1:
        return
    if bool((mask.any(-1) & ~mask[:, -1].bool()).any()):
        raise ValueError(
            "A piece of a prompt ends in padding, after earlier pieces whose keys converted layers do not keep. Pad on "
            "the left, or give the prompt in one piece (prefill_chunk_size unset, a new cache)."
        )


def _settle_padding(
    output: torch.Tensor, inputs: AttentionInputs, *, reads_last: bool, window: int | None
) -> torch.Tensor:
    """`output` `[B, H, Tq, D]` with what stands at masked positions (see `linear_attention_forward`)."""
    assert inputs.token_mask is not None
    q_len = output.shape[2]
    real = inputs.token_mask[:, None, -q_len:, None]
    settled = output.masked_fill(~real, 0)
    if not (reads_last and inputs.is_causal and q_len > 1):
        return settled
    last = _softmax(replace(inputs, query=inputs.query[:, :, -1:]), 0.0, window)
    return torch.cat([settled[:, :, :-1], torch.where(real[:, :, -1:], settled[:, :, -1:], last)], dim=2)


def _warn_of_dropout(dropout: float) -> None:
    if dropout > 0.0:
        logger.warning_once(
            f"Attention dropout ({dropout}) has no form in converted layers and is not applied there. "
            "Set the config's attention dropout to 0 to silence this."
        )


OUTPUT_ATTENTIONS_MESSAGE = (
    "output_attentions=True: a converted layer never forms attention weights. For softmax weights call "
    'model.set_attn_implementation("eager") first (the projections are the checkpoint\'s own).'
)


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

    Also `linear_attn_all_real`, whether its mask is known to have no padding, and `NEW_REAL`, whether what comes after
    a cache is known to have none: a mask is read here, if it lies on the CPU, before Transformers moves it. Layers make
    the plan themselves when it is not given, every one again. Of `position_ids` they learn by their mask
    (`seam.masks.packed_rows`).
    """
    if model.base_model is not model or "linear_attn_plan" in kwargs:
        return kwargs
    kwargs = dict(kwargs)
    promised = kwargs.pop(NEW_REAL, None)
    if is_traced():
        return kwargs
    given = named_arguments(model, args, kwargs)
    mask, of_tokens = given.get("attention_mask"), given.get("input_ids")
    if of_tokens is None and given.get("inputs_embeds") is not None:
        of_tokens = given["inputs_embeds"][..., 0]
    if of_tokens is None:
        return kwargs  # refused later on
    length = of_tokens.shape[-1]
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] > length:
        kwargs[NEW_REAL] = bool(mask[:, -length:].all()) if is_on_host(mask) else mask is promised
    if not isinstance(mask, torch.Tensor) or mask.shape != of_tokens.shape:
        mask = None  # with a cache it covers past tokens, and nothing is regrouped; else it is refused later on
    all_real = mask is not None and is_on_host(mask) and bool(mask.all())
    if given.get("attention_mask") is None:
        _warn_of_positions(model, given)
    batch = of_tokens.shape[:-1].numel()
    packing = given.get("cu_seq_lens_q"), given.get("seq_idx"), of_tokens.device
    plan = plan_call(batch, length, None if all_real else mask, *packing)
    return {**kwargs, "linear_attn_plan": plan, "linear_attn_all_real": all_real}


def _warn_of_positions(model: Any, given: dict[str, Any]) -> None:
    """Say that positions which look like packing are none, as a cache is in use."""
    at, uses_cache = given.get("position_ids"), given.get("use_cache")
    if at is None or at.shape[-1] < 2 or not get_patcher(model.config.base_model_type).is_causal(model.config):
        return
    if uses_cache is None:
        uses_cache = getattr(model.config, "use_cache", False)
    if (uses_cache or find_cache(given.items()) is not None) and bool((at.diff(dim=-1) != 1).any()):
        logger.warning_once(
            "position_ids do not go up by one. Beside a cache they are positions and nothing else, as in Transformers: "
            "if this row holds packed sequences, they see one another. Pass use_cache=False to keep them apart."
        )


def _is_self_attention(module: nn.Module) -> bool:
    config: Any = module.config
    return hasattr(config, "base_model_type") and get_patcher(config.base_model_type).is_self_attention(module)


def _global_mask(module: Any, kwargs: dict[str, Any], query: torch.Tensor) -> torch.Tensor | None:
    """The global tokens as bool `[B, Tq]`: the call's, else those that the layer's variant chose (`seam.heads`).

    The call's come as `[B, choices, T]` for multiple choice.
    """
    mask: torch.Tensor | None = kwargs.get("global_attention_mask")
    if mask is None:
        chosen: torch.Tensor | None = kwargs.get("linear_attn_global_tokens", {}).get(module.layer_idx)
        return None if chosen is None else chosen.to(query.device)
    mask = mask.reshape(-1, mask.shape[-1]).bool()
    expected = (query.shape[0], query.shape[-2])
    if tuple(mask.shape) != expected:
        raise ValueError(f"global_attention_mask has shape {tuple(mask.shape)}; expected {expected} [batch, length].")
    return mask


AttentionInterface.register(IMPLEMENTATION, linear_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, linear_attention_mask)
