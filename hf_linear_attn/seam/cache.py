"""The decode state of a converted layer inside Transformers' caches.

A converted layer takes the place of an empty `DynamicLayer`. Nothing here trusts a keyword's name: Transformers has
renamed the cache's before (5.24: `past_key_values` became `cache`), and a cache that is not recognized is a decode
state that is lost without a word.

Transformers' own layers for linear attention do not carry these states: they hold one recurrent state of a fixed shape
that is copied into place at every step, and count no tokens, which masks and positions of an all-converted model need.
A variant's state is several named tensors, of dtypes of their own, and some grow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from hf_linear_attn.ops.base.masking import is_on_host
from hf_linear_attn.ops.base.packing import is_traced
from hf_linear_attn.variants.base import AttentionVariant, State, VariantConfig

__all__ = [
    "CACHE_KEYWORDS",
    "CROP_MESSAGE",
    "OFFLOADED_MESSAGE",
    "LinearAttnCacheLayer",
    "cache_keyword",
    "check_cache",
    "check_given",
    "find_cache",
    "prepare_cache_layer",
    "refuse_held",
]

CACHE_KEYWORDS = ("cache", "past_key_values")
"""Names under which Transformers hands a cache to models and attention modules, newest first."""


CROP_MESSAGE = (
    "The cache of a converted layer cannot be cropped: its state has already absorbed the tokens. Assisted generation, "
    "prompt lookup and other methods that roll a cache back need softmax attention "
    '(model.set_attn_implementation("sdpa")) and a new cache.'
)
OFFLOADED_MESSAGE = (
    "The cache is offloaded: it would move a layer's state to the CPU before the converted layer reads it. Leave "
    "cache_implementation unset; a state of constant size needs no offloading."
)


class LinearAttnCacheLayer(CacheLayerMixin):
    """One layer's decode state inside a `DynamicCache`.

    `update` counts tokens and hands the new keys and values back unchanged; what has to be remembered is the
    variant's own state, a dict of tensors whose first dimension is the batch.

    The layer serves the converted layer that announced itself (`prepare_cache_layer`) and nobody else: softmax
    attention would see the new tokens alone. While it is empty it becomes what it replaced for who needs that.

    Args:
        replaces: the empty layer in whose place it stands, by default one that keeps all keys.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, replaces: DynamicLayer | None = None) -> None:
        super().__init__()
        self.replaces = DynamicLayer() if replaces is None else replaces
        self.state: State | None = None
        self.made_by: tuple[str, VariantConfig] | None = None  # key and options of the variant whose state it is
        self.seen_tokens = 0
        self.padding: torch.Tensor | None = None  # which of them, `[B, seen_tokens or 0]`; None where nobody looked
        self.announced = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the new tokens; keys and values `[B, H, T, D]` come back as they are.

        Raises:
            ValueError: when softmax attention asks while the layer holds a state.
        """
        if not self.announced:
            self.refuse_softmax()
            self.__class__, self.__dict__ = type(self.replaces), self.replaces.__dict__  # type: ignore[assignment]
            return self.update(key_states, value_states, *args, **kwargs)
        self.announced = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen_tokens += key_states.shape[-2]
        return key_states, value_states

    def refuse_softmax(self) -> None:
        """Raise `ValueError` if there are tokens in the state, which softmax attention cannot read."""
        if self.seen_tokens:
            raise ValueError(
                f"The cache holds the state of a converted layer after {self.seen_tokens} tokens; softmax attention "
                "cannot use it, the keys are gone. Start from a new cache, or call cache.reset()."
            )

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

    def _map_rows(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._map_state(fn)
        self.padding = None if self.padding is None else fn(self.padding)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        self._map_state(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map_state(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self.state = self.padding = None
        self.seen_tokens = 0
        self.announced = False

    def crop(self, tokens_to_remove: int) -> None:
        """Raises `ValueError`: tokens that went into a linear-attention state cannot be taken out of it."""
        if tokens_to_remove == 0:
            return
        raise ValueError(CROP_MESSAGE)


def find_cache(values: Iterable[tuple[str, Any]]) -> Cache | None:
    """The cache among named values: arguments of a model or of a layer, or what a model returned.

    It is known by its type, whatever its name.

    Raises:
        ValueError: for something under a name of the cache that is none, and for two caches, of which upstream heads
            use the one under the newer name and leave the other out without a word.
    """
    found, known_as = None, ""
    for name, value in values:
        if isinstance(value, Cache):
            if found is not None and value is not found:
                raise ValueError(
                    f"Two caches were given, {known_as or 'one'} with {found.get_seq_length()} tokens and "
                    f"{name or 'one'} with {value.get_seq_length()}; allowed: one. PEFT's prefix tuning adds a second "
                    "one of keys and values, which converted layers cannot use."
                )
            found, known_as = value, name
        elif name in CACHE_KEYWORDS and value is not None:
            raise ValueError(
                f"{name} is a {type(value).__name__}; converted layers work with a DynamicCache. Leave "
                "cache_implementation unset, and use no continuous batching."
            )
    return found


def cache_keyword(forward: Callable[..., Any]) -> str:
    """The name under which a model's or a module's `forward` takes a cache.

    Raises:
        RuntimeError: if it has none that is known, naming the version of Transformers.
    """
    parameters = inspect.signature(forward).parameters
    for name in CACHE_KEYWORDS:
        if name in parameters:
            return name
    raise RuntimeError(
        f"{forward.__qualname__} of transformers {transformers.__version__} takes a cache under none of the names that "
        f"this hf_linear_attn knows ({', '.join(CACHE_KEYWORDS)}); it takes {', '.join(parameters)}."
    )


def prepare_cache_layer(
    cache: Cache, layer_idx: int, hidden_states: torch.Tensor, variant: AttentionVariant
) -> LinearAttnCacheLayer:
    """Our layer inside `cache`, put there now if the one in its place is still empty; its next update is ours.

    Args:
        cache: what the attention module was given.
        layer_idx: the module's place in it.
        hidden_states: `[B, T, hidden_size]`, the tokens of this call.
        variant: the module's.

    Raises:
        ValueError: for a layer of another kind, one that holds keys and values, or a state of another variant, of other
            options, of another batch size or of another call.
    """
    cache = _self_attention_cache(cache)
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[layer_idx]
    if not isinstance(layer, LinearAttnCacheLayer):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"A converted layer works with a DynamicCache, but layer {layer_idx} of the cache is a "
                f"{type(layer).__name__}. Leave cache_implementation unset."
            )
        _refuse_keys(layer, layer_idx)
        layer = cache.layers[layer_idx] = LinearAttnCacheLayer(layer)
    _check_maker(layer, layer_idx, variant)
    _check_batch(layer, hidden_states.shape[0])
    _check_lengths(cache, layer, layer_idx, hidden_states.shape[1])
    layer.announced = True
    return layer


def check_cache(cache: Cache, layer_indices: Iterable[int], mask: Any = None) -> None:
    """Raise unless every converted layer (by its place) keeps its state in `cache`, after a forward that used it.

    Which of its tokens are padding by the forward's mask is kept for the next call (`check_given`).

    Raises:
        RuntimeError: naming the layer and the version of Transformers.
    """
    layers = _self_attention_cache(cache).layers
    for index in layer_indices:
        if index >= len(layers) or not isinstance(layers[index], LinearAttnCacheLayer):
            kind = type(layers[index]).__name__ if index < len(layers) else "nothing"
            raise RuntimeError(
                f"The model ran with a cache, but converted layer {index} was not given it (the cache holds {kind} in "
                f"its place), so its tokens are lost. transformers {transformers.__version__} hands caches on in a way "
                "that this hf_linear_attn does not know: run `hf-linear-attn doctor`, or pass use_cache=False."
            )
    first = _first_state(cache)
    if first is not None and first.state is not None:
        first.padding = None
        if not is_traced():
            first.padding = _padding(mask, len(next(iter(first.state.values()))), first.seen_tokens)


def refuse_held(cache: Cache | None) -> None:
    """Raise `ValueError` if a layer of `cache` holds the state of a converted layer: softmax is about to use it."""
    for layer in [] if cache is None else _self_attention_cache(cache).layers:
        if isinstance(layer, LinearAttnCacheLayer):
            layer.refuse_softmax()


def check_given(cache: Cache | None, layers: Sequence[Any], mask: Any) -> None:
    """Look at what a converted model was given, before any of its layers adds to it.

    Args:
        cache: the cache of its call.
        layers: per layer of the model, None where it keeps softmax.
        mask: the attention mask, or None.

    Raises:
        ValueError: if the cache is offloaded, or holds softmax's keys in the place of a converted layer, or if tokens
            that are in it are padding by this mask and were not when they were read, or the other way round.
    """
    if cache is None:
        return
    if getattr(_self_attention_cache(cache), "offloading", False):
        raise ValueError(OFFLOADED_MESSAGE)
    for index, (layer, converted) in enumerate(zip(_self_attention_cache(cache).layers, layers, strict=False)):
        if converted is not None and isinstance(layer, DynamicLayer):
            _refuse_keys(layer, index)
    if not is_traced():
        _check_padding(_first_state(cache), mask)


def _refuse_keys(layer: DynamicLayer, layer_idx: int) -> None:
    if layer.get_seq_length() > 0:
        raise ValueError(
            f"Layer {layer_idx} of the cache already holds {layer.get_seq_length()} tokens of keys and values that "
            "a converted layer cannot use. Start from an empty DynamicCache."
        )


def _check_padding(layer: LinearAttnCacheLayer | None, mask: Any) -> None:
    """Raise unless those tokens before the call are padding that were when the layer read them.

    A mask that lies on a GPU, or covers other tokens than those and some new ones, is not looked at.
    """
    if layer is None or (held := layer.padding) is None:
        return
    if held.shape[1] not in (0, layer.seen_tokens):  # a call counts tokens before it is done with them
        raise ValueError(
            f"The cache is inconsistent: a layer has seen {layer.seen_tokens} tokens, masks of calls that ended told "
            f"of {held.shape[1]}. An earlier forward probably failed half-way; start from a new cache."
        )
    now = _padding(mask, held.shape[0], layer.seen_tokens)
    if now is None or now.shape == held.shape == (len(held), 0):
        return
    now, held = (x if x.shape[1] else x.new_zeros(len(x), layer.seen_tokens) for x in (now, held))
    changed = (now != held).nonzero()
    if not len(changed):
        return
    row, token = changed[0].tolist()
    raise ValueError(
        f"attention_mask: token {token} of row {row} is {'' if now[row, token] else 'no '}padding, and was "
        f"{'' if held[row, token] else 'none '}when it was read into the cache. A state can neither leave out a token "
        "afterwards nor take one in. Pass the mask of all tokens so far, or start from a new cache."
    )


def _first_state(cache: Cache) -> LinearAttnCacheLayer | None:
    for layer in _self_attention_cache(cache).layers:
        if isinstance(layer, LinearAttnCacheLayer):
            return layer
    return None


def _padding(mask: Any, batch: int, tokens: int) -> torch.Tensor | None:
    """Which of the first tokens are padding, bool `[B, tokens]`, `[B, 0]` if none is; None where a mask cannot tell."""
    if mask is None:
        return torch.zeros(batch, 0, dtype=torch.bool)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not is_on_host(mask):
        return None
    if mask.shape[0] != batch or mask.shape[1] < tokens:
        return None
    padding = ~mask[:, :tokens].bool()
    return padding if bool(padding.any()) else padding[:, :0].clone()


def _self_attention_cache(cache: Any) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _check_maker(layer: LinearAttnCacheLayer, layer_idx: int, variant: AttentionVariant) -> None:
    """Raise if the layer's state is another method's, or of other options: its tensors may have the same names."""
    maker = variant.spec.key, variant.config
    if layer.state is None:
        layer.made_by = maker
    elif layer.made_by != maker:
        made = "another method" if layer.made_by is None else f"{layer.made_by[0]} ({layer.made_by[1]})"
        raise ValueError(
            f"Layer {layer_idx} of the cache holds a state of {made}, but the layer runs {maker[0]} ({maker[1]}). "
            "Start from a new cache, or call cache.reset()."
        )


def _check_batch(layer: LinearAttnCacheLayer, batch: int) -> None:
    held = {tensor.shape[0] for tensor in (layer.state or {}).values()}
    if held - {batch}:
        raise ValueError(
            f"The cache holds states of {max(held)} sequences, the batch has {batch}. Start from a new cache, or use "
            "cache.batch_repeat_interleave or cache.batch_select_indices."
        )


def _check_lengths(cache: Cache, layer: LinearAttnCacheLayer, layer_idx: int, new_tokens: int) -> None:
    """Raise if an exception in an earlier forward left some layers of the cache a step ahead of others."""
    # Layer 0 opens the call, so the last layer in use must be where it is (a cache may have room for more layers than
    # the model has left); later layers follow layer 0, which has just taken the new tokens.
    layers: list[Any] = cache.layers
    in_use = [entry for entry in layers if entry.is_initialized]
    other: Any = cache.layers[0] if layer_idx else (in_use or [layer])[-1]
    expected = layer.seen_tokens + (new_tokens if layer_idx else 0)
    if other.get_seq_length() != expected:
        raise ValueError(
            f"The cache is inconsistent: layer {layer_idx} has seen {layer.seen_tokens} tokens, another layer "
            f"{other.get_seq_length()}. An earlier forward probably failed half-way; start from a new cache."
        )
