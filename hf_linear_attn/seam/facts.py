"""Every fact of Transformers that the package relies on, each with a probe.

A probe is a function whose docstring states the fact; it raises when the fact is no longer true. `hf-linear-attn
doctor` runs them all, then tries what they are for on tiny models (`doctor.py`). Facts about one family are the
answers of its patcher, which `seam.family_facts` holds against a model.
"""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    EncoderDecoderConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
)
from transformers import cache_utils as caches
from transformers import masking_utils as masks
from transformers.generation import configuration_utils as generation
from transformers.models.auto import auto_factory, modeling_auto, tokenization_auto
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.utils import logging, output_capturing

from hf_linear_attn.registry import get_patcher, list_patchers
from hf_linear_attn.seam.cache import LinearAttnCacheLayer, cache_keyword, find_cache
from hf_linear_attn.seam.checkpointing import enable_checkpointing, is_checkpointing
from hf_linear_attn.seam.tiny import has_causal_lm, tiny_config, tiny_model, token_batch

__all__ = ["FACTS", "Fact", "require", "run_with"]

_PROBE = "linear_attn_probe"


class Fact(NamedTuple):
    """One thing that must be true: a name, a sentence, and a function that raises when it is not."""

    name: str
    claim: str
    probe: Callable[[], None]


FACTS: list[Fact] = []


def _fact(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(probe: Callable[[], None]) -> Callable[[], None]:
        FACTS.append(Fact(name, " ".join((probe.__doc__ or "").split()), probe))
        return probe

    return register


def require(holds: object, found: str) -> None:
    """Raise `AssertionError` with what was found in place of a fact."""
    if not holds:
        raise AssertionError(found)


def _decoder() -> str:
    """A family whose default model is a decoder."""
    return next(name for name in list_patchers() if get_patcher(name).is_causal(tiny_config(name)))


# ---------------------------------------------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------------------------------------------


@_fact("cache layers")
def _cache_layers() -> None:
    """A DynamicCache holds its layers in a list, DynamicLayer one and all unless the config asks for a window; one
    without a config makes them when they are first needed, of the class `layer_class_to_replicate`."""
    require(caches.DynamicCache().layer_class_to_replicate is caches.DynamicLayer, "another class is replicated")
    kinds = [type(layer) for layer in caches.DynamicCache(config=tiny_config(_decoder())).layers]
    require(kinds == [caches.DynamicLayer] * 2, f"layers are {kinds}")
    require(not caches.DynamicLayer().is_initialized, "a new DynamicLayer is initialized")


@_fact("cache methods")
def _cache_methods() -> None:
    """A layer of ours inside a DynamicCache gets every call the cache makes of its layers."""
    cache = caches.DynamicCache()
    cache.layers.append(layer := LinearAttnCacheLayer())
    layer.announced = True
    states = torch.arange(2.0)[:, None, None, None]
    require(torch.equal(cache.update(states, states, 0)[0], states), "update does not return what the layer did")
    layer.state = {"sum": torch.arange(2.0)}
    require(cache.get_seq_length() == 1, f"get_seq_length says {cache.get_seq_length()} after one token")
    require(tuple(cache.get_mask_sizes(3, 0)) == (4, 0), f"mask sizes are {cache.get_mask_sizes(3, 0)}")
    cache.reorder_cache(torch.tensor([1, 0]))  # type: ignore[arg-type]
    cache.batch_repeat_interleave(2)
    require(layer.state["sum"].tolist() == [1, 1, 0, 0], "reorder or repeat did not reach the layer")
    cache.batch_select_indices(torch.tensor([0, 2]))
    require(layer.state["sum"].tolist() == [1, 0], "batch_select_indices did not reach the layer")
    cache.crop(0)
    cache.reset()
    require(layer.state is None and cache.get_seq_length() == 0, "reset did not reach the layer")


@_fact("cache of a composite")
def _cache_of_composite() -> None:
    """An EncoderDecoderCache keeps the cache of self-attention as `self_attention_cache`, and is a Cache."""
    own = caches.DynamicCache()
    both = caches.EncoderDecoderCache(own, caches.DynamicCache())
    require(both.self_attention_cache is own, "self_attention_cache is another object")
    require(isinstance(both, caches.Cache), "it is no Cache")


@_fact("cache keyword")
def _cache_keyword() -> None:
    """Models and self-attention modules take the cache under one of the names that CACHE_KEYWORDS lists."""
    for model_type in list_patchers():
        if has_causal_lm(model_type):
            patcher = get_patcher(model_type)
            model_class: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[patcher.config_class]
            cache_keyword(model_class.forward)
            cache_keyword(patcher.attention_class.forward)


@_fact("cache reaches layers")
def _cache_reaches_layers() -> None:
    """A model that runs with a cache hands it to every self-attention module, and returns it."""
    model_type = _decoder()
    model = tiny_model(model_type, decoder=True)
    attentions = get_patcher(model_type).self_attentions(model)
    met: list[object] = []
    for attention in attentions:
        attention.module.register_forward_pre_hook(
            lambda _module, args, kwargs: met.append(find_cache([*(("", x) for x in args), *kwargs.items()])),
            with_kwargs=True,
        )
    with torch.no_grad():
        returned = find_cache(model(**token_batch(), use_cache=True).items())
    require(returned is not None, "no cache was returned")
    require(all(cache is returned for cache in met) and len(met) == len(attentions), f"layers were given {met}")


# ---------------------------------------------------------------------------------------------------------------
# Attention and masks
# ---------------------------------------------------------------------------------------------------------------


@_fact("attention interface")
def _attention_interface() -> None:
    """The function registered under a config's `attn_implementation` is called as (module, query, key, value, mask,
    keywords) with `[B, H, T, D]`, gets a model's unknown keywords, and its `[B, T, H, D]` is used."""
    for model_type in list_patchers():
        met: dict[str, Any] = {}
        run_with(model_type, met, {"linear_attn_keyword": 7})
        shape = met["query"].shape
        require(shape[:1] == (2,) and shape[2] == 37, f"{model_type}: the query's shape is {tuple(shape)}")
        require(met["keywords"].get("linear_attn_keyword") == 7, f"{model_type}: an unknown keyword was lost")
        require({"scaling", "dropout"} <= met["keywords"].keys(), f"{model_type}: keywords are {list(met['keywords'])}")
        require(met["calls"] == 2, f"{model_type}: {met['calls']} calls in a model of 2 layers")


@_fact("mask interface")
def _mask_interface() -> None:
    """The mask function registered under the same name is called with `batch_size`, `q_length`, `q_offset`,
    `kv_length`, `kv_offset`, `mask_function`, `attention_mask` and `device`, and what it returns reaches attention."""
    for model_type in list_patchers():
        met: dict[str, Any] = {}
        run_with(model_type, met, {})
        keywords = met["mask_keywords"]
        names = {"batch_size", "q_length", "q_offset", "kv_length", "kv_offset", "mask_function", "device"}
        require({"attention_mask", *names} <= keywords.keys(), f"{model_type}: {list(keywords)}")
        require(keywords["attention_mask"].shape == (2, 37), f"{model_type}: the mask's shape is wrong")
        require(met["mask"] is met["mask_returned"], f"{model_type}: attention got another mask")


def run_with(model_type: str, met: dict[str, Any], extra: dict[str, Any]) -> None:
    """Run a tiny model whose attention and mask functions write down what they are given, last layer last."""

    def attend(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **keywords: Any) -> tuple[Any, None]:
        met.update(query=query, key=key, value=value, mask=mask, keywords=keywords, calls=met.get("calls", 0) + 1)
        return query.transpose(1, 2), None

    def mask(**keywords: Any) -> torch.Tensor:
        met.update(mask_keywords=keywords, mask_returned=torch.ones(2, 37, dtype=torch.bool))
        return met["mask_returned"]

    decoder = get_patcher(model_type).is_causal(tiny_config(model_type))
    AttentionInterface.register(_PROBE, attend)
    AttentionMaskInterface.register(_PROBE, mask)
    try:
        batch = token_batch()
        batch["attention_mask"][0, :5] = 0
        model = tiny_model(model_type, decoder=decoder, attn_implementation=_PROBE)
        met["module"] = get_patcher(model_type).self_attentions(model)[-1].module
        met["module"].register_forward_pre_hook(
            lambda _module, args, kwargs: met.update(hidden=(args or (kwargs["hidden_states"],))[0]), with_kwargs=True
        )
        with torch.no_grad():
            model(**batch, **extra)
    finally:
        AttentionInterface._global_mapping.pop(_PROBE)
        AttentionMaskInterface._global_mapping.pop(_PROBE)


@_fact("packing rule")
def _packing_rule() -> None:
    """Upstream reads packed sequences off `position_ids` of decoders only where there is neither a mask nor a cache."""
    model = tiny_model(_decoder(), decoder=True)
    ids, positions = token_batch()["input_ids"], (torch.arange(37) % 20)[None].expand(2, -1)
    rule = masks.and_masks(masks.causal_mask_function, masks.packed_sequence_mask_function((positions == 0).cumsum(-1)))
    sees = rule(torch.tensor(0), torch.tensor(0), torch.tensor([19, 20, 21]), torch.tensor([18, 19, 20]))
    require(sees.tolist() == [True, False, True], f"the mask of packed rows lets tokens see their predecessors: {sees}")
    with torch.no_grad():
        packed, alone = model(ids, position_ids=positions, use_cache=False), model(ids[:, 20:], use_cache=False)
        masked = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
    require(torch.allclose(packed.logits[:, 20:], alone.logits, atol=1e-3), "packed sequences see one another")
    require(not torch.allclose(masked.logits[:, 20:], alone.logits, atol=1e-3), "a mask of ones keeps them apart")


# ---------------------------------------------------------------------------------------------------------------
# Configs, classes, weights
# ---------------------------------------------------------------------------------------------------------------


@_fact("config fields")
def _config_fields() -> None:
    """A config class is a dataclass; what it does not know reaches `__post_init__(**kwargs)`; `attn_implementation`
    becomes `_attn_implementation`; `to_dict` and `to_diff_dict` make what is saved."""
    require(dataclasses.is_dataclass(PreTrainedConfig), "PreTrainedConfig is no dataclass")

    class Probe(PreTrainedConfig):
        model_type = _PROBE

        def __post_init__(self, **kwargs: Any) -> None:
            self.met = dict(kwargs)
            super().__post_init__(**kwargs)

    probe_class: Any = Probe
    config = probe_class(linear_attn={"version": 1}, attn_implementation="eager")
    require({"linear_attn", "attn_implementation"} <= config.met.keys(), f"__post_init__ got {list(config.met)}")
    require(config._attn_implementation == "eager", f"_attn_implementation is {config._attn_implementation!r}")
    require("met" in config.to_dict() and "met" in config.to_diff_dict(), "attributes are not saved")


@_fact("config registry")
def _config_registry() -> None:
    """`AutoConfig.register` makes a model type known, and `AutoConfig.for_model` builds its config."""
    for model_type in list_patchers():
        config = AutoConfig.for_model(f"linear_attn_{model_type}")
        require(config.model_type == f"linear_attn_{model_type}", f"{model_type}: built a {type(config).__name__}")


@_fact("model registries")
def _model_registries() -> None:
    """The Auto classes' tables are `MODEL_..._MAPPING`s of `modeling_auto`, lazy mappings from config class to model
    class that can be added to; an Auto class names its table `_model_mapping`."""
    require(hasattr(auto_factory._LazyAutoMapping, "register"), "mappings cannot be added to")
    tables = [x for name, x in vars(modeling_auto).items() if name.startswith("MODEL_")]
    tables = [table for table in tables if isinstance(table, auto_factory._LazyAutoMapping)]
    require(len(tables) > 10, f"{len(tables)} tables found")
    for model_type in list_patchers():
        patcher = get_patcher(model_type)
        require(patcher.config_class in modeling_auto.MODEL_MAPPING, f"{model_type} is not in MODEL_MAPPING")
        cls: Any = modeling_auto.MODEL_MAPPING[patcher.config_class]
        require(getattr(patcher.modeling, cls.__name__, None) is cls, f"{model_type}: {cls} is defined elsewhere")
        require(cls.config_class is patcher.config_class, f"{model_type}: config_class is {cls.config_class}")
    require(issubclass(modeling_auto.AutoModel, auto_factory._BaseAutoModelClass), "AutoModel has another base")
    require(modeling_auto.AutoModel._model_mapping is modeling_auto.MODEL_MAPPING, "AutoModel's table moved")


@_fact("tokenizer registry")
def _tokenizer_registry() -> None:
    """TOKENIZER_MAPPING maps a config class to its tokenizer class, or to several."""
    for model_type in list_patchers():
        config_class = get_patcher(model_type).config_class
        if config_class in tokenization_auto.TOKENIZER_MAPPING:
            found: Any = tokenization_auto.TOKENIZER_MAPPING[config_class]
            entries = found if isinstance(found, (list, tuple)) else [found]
            require(any(isinstance(entry, type) for entry in entries), f"{model_type}: {found!r}")


@_fact("output recorders")
def _output_recorders() -> None:
    """What `output_hidden_states` records is looked up in `_CAN_RECORD_REGISTRY`, a dict, by the class's `str`."""
    require(isinstance(output_capturing._CAN_RECORD_REGISTRY, dict), "the registry is no dict")
    for model_type in list_patchers():
        model: Any = tiny_model(model_type, decoder=False)
        require(isinstance(model._can_record_outputs, dict), f"{model_type}: {model._can_record_outputs!r}")
        require(
            dict.__contains__(output_capturing._CAN_RECORD_REGISTRY, str(model.__class__)),
            f"{model_type}: a model that was built is not in the registry",
        )


@_fact("tied weights")
def _tied_weights() -> None:
    """A model's tied weights are `all_tied_weights_keys` (target: source), made by `get_expanded_tied_weights_keys`."""
    model = tiny_model(_decoder(), decoder=True)
    made = model.get_expanded_tied_weights_keys(all_submodels=True)
    require(isinstance(made, dict) and isinstance(model.all_tied_weights_keys, dict), f"made {made!r}")
    require(made.items() <= model.all_tied_weights_keys.items(), f"{made} is not in {model.all_tied_weights_keys}")


@_fact("loading")
def _loading() -> None:
    """`from_pretrained(output_loading_info=True)` says which weights were missing and unexpected, and calls
    `_init_weights` for every module that the checkpoint did not fill, whose tensors lack `_is_hf_initialized` and have
    left the meta device."""
    model: Any = tiny_model(_decoder(), decoder=True)
    initialized: list[nn.Module] = []

    class Probe(type(model)):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.probe = nn.Linear(2, 2)

        def _init_weights(self, module: nn.Module) -> None:
            flags = [getattr(tensor, "_is_hf_initialized", False) for tensor in module.parameters()]
            if flags and not all(flags) and not any(tensor.is_meta for tensor in module.parameters()):
                initialized.append(module)
            super()._init_weights(module)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            loaded, info = Probe.from_pretrained(folder, output_loading_info=True)
        finally:
            logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    require(missing == ["probe.bias", "probe.weight"], f"missing keys are {missing}")
    require(not info["unexpected_keys"], f"unexpected keys are {info['unexpected_keys']}")
    require(loaded.probe in initialized, "_init_weights was not called for the missing module")


@_fact("generation guards")
def _generation_guards() -> None:
    """`generate` asks `_validate_generation_mode(mode, config, ...)` before the first forward, and `_is_stateful`; ways
    of generating are members of GenerationMode, static caches are listed by name. Of each token that it draws it says
    in `_update_model_kwargs_for_generation` that it is real; a keyword that is added there reaches the base model."""
    base: Any = type(tiny_model(_decoder(), decoder=True))
    met: list[Any] = []

    class Probe(base):  # type: ignore[misc]
        def _validate_generation_mode(self, mode: Any, generation_config: Any, *args: Any, **kwargs: Any) -> None:
            met.append((mode, generation_config.cache_implementation))
            super()._validate_generation_mode(mode, generation_config, *args, **kwargs)

        def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            updated = super()._update_model_kwargs_for_generation(*args, **kwargs)
            drawn.append(updated["attention_mask"])
            return {**updated, "linear_attn_probe": True}

    drawn: list[torch.Tensor] = []
    model = Probe(tiny_config(_decoder())).eval()
    model.register_forward_pre_hook(lambda *_: met.append("forward"))
    keywords: list[bool] = []
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, given: keywords.append("linear_attn_probe" in given), with_kwargs=True
    )
    batch = token_batch(length=5)
    batch["attention_mask"][0, :2] = 0
    model.generate(**batch, max_new_tokens=2, do_sample=False, pad_token_id=0)
    require(keywords == [False, True], f"the keyword reached the base model's calls as {keywords}")
    first = batch["attention_mask"]
    covered = [x.shape == (2, 6 + n) and x[:, :5].equal(first) and bool(x[:, 5:].all()) for n, x in enumerate(drawn)]
    require(drawn != [] and all(covered), "the mask does not say that each token that was drawn is real")
    require(met[:2] == [(generation.GenerationMode.GREEDY_SEARCH, None), "forward"], f"calls were {met}")
    require(base._is_stateful is False and isinstance(base._can_compile_fullgraph, bool), "flags of the class are gone")
    require(hasattr(generation.GenerationMode, "ASSISTED_GENERATION"), "there is no ASSISTED_GENERATION")
    require("static" in generation.ALL_STATIC_CACHE_IMPLEMENTATIONS, "static caches are not listed")


@_fact("initialization marks")
def _initialization_marks() -> None:
    """`init_weights` draws the weights of every module anew, but for those that carry `_is_hf_initialized`."""
    model: Any = tiny_model(_decoder(), decoder=True)
    marked, unmarked = (get_patcher(_decoder()).layers(model)[place] for place in (0, 1))
    for layer in (marked, unmarked):
        for module in layer.modules():
            for tensor in module.parameters(recurse=False):
                tensor.data.fill_(7)
                tensor._is_hf_initialized = module._is_hf_initialized = layer is marked
    model.init_weights()
    kept = [all(bool((x == 7).all()) for x in layer.parameters()) for layer in (marked, unmarked)]
    require(kept == [True, False], f"of a marked and an unmarked layer, these kept their weights: {kept}")


@_fact("configs in configs")
def _configs_in_configs() -> None:
    """`_attn_implementation` of a config is a property whose setter a composite's config calls on those it holds."""
    require(isinstance(PreTrainedConfig._attn_implementation, property), "_attn_implementation is no property")
    inner = tiny_config(_decoder())
    outer: Any = EncoderDecoderConfig(encoder=inner.to_dict(), decoder=inner.to_dict())
    outer._attn_implementation = "eager"
    require(outer.decoder._attn_implementation == "eager", "a composite does not hand its implementation down")


@_fact("weights before they are read")
def _weights_before_they_are_read() -> None:
    """`from_pretrained` reads weights in `_load_pretrained_model(model, state_dict, files, load_config)`, into a model
    on the meta device; what matches `_keys_to_ignore_on_load_unexpected` may be left over."""
    base: Any = type(model := tiny_model(_decoder(), decoder=True))
    met: dict[str, Any] = {}

    class Probe(base):  # type: ignore[misc]
        @classmethod
        def _load_pretrained_model(cls, model: Any, state_dict: Any, files: Any, config: Any, *args: Any) -> Any:
            met.update(meta=all(x.is_meta for x in model.parameters()), files=files, config=config)
            return super()._load_pretrained_model(model, state_dict, files, config, *args)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        Probe.from_pretrained(folder)
    require(met.get("meta"), "the model is not on the meta device, or weights are read elsewhere")
    require([str(file).endswith(".safetensors") for file in met["files"]] == [True], f"files are {met['files']}")
    fields = ("hf_quantizer", "ignore_mismatched_sizes")
    require(all(hasattr(met["config"], name) for name in fields), f"load_config lacks one of {fields}")
    require(hasattr(base, "_keys_to_ignore_on_load_unexpected"), "_keys_to_ignore_on_load_unexpected is gone")


@_fact("model attributes")
def _model_attributes() -> None:
    """A model knows its `base_model`, its `name_or_path` and whether it recomputes activations, and switches attention
    by `set_attn_implementation`."""
    model: Any = tiny_model(_decoder(), decoder=True)
    require(model.base_model is not model and isinstance(model.base_model, PreTrainedModel), "base_model is gone")
    require(is_checkpointing(model) is False, "a new model recomputes activations")
    enable_checkpointing(model)
    require(is_checkpointing(model) is True, "enabling the recomputation of activations shows nowhere")
    model.set_attn_implementation("eager")
    require(model.config._attn_implementation == "eager", "set_attn_implementation did not change the config")
    require(isinstance(model.name_or_path, str), "name_or_path is gone")


@_fact("trainer hooks")
def _trainer_hooks() -> None:
    """`Trainer` calls the methods of its own by which a run is resumed, checked, saved and given its batches, and hands
    `_init_training_state` the step that ends it and the checkpoint that it begins from; its state holds that of
    callbacks that export one."""
    functions = [inspect.unwrap(x) for x in vars(Trainer).values() if inspect.isfunction(x)]
    called = {name for function in functions for name in function.__code__.co_names}
    hooks = (
        *("_init_training_state", "_maybe_log_save_evaluate", "_save_checkpoint", "_save_rng_state"),
        *("_get_train_sampler", "_set_signature_columns_if_needed"),
    )
    gone = [name for name in hooks if name not in called or not hasattr(Trainer, name)]
    require(not gone, f"Trainer lacks {gone}, or calls them no more")
    given = list(inspect.signature(Trainer._init_training_state).parameters)
    expected = ["max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"]
    require(given == ["self", *expected], f"_init_training_state takes {given}")

    class Told(ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {"every": 2}}

    held = TrainerState(stateful_callbacks=[Told()]).stateful_callbacks  # type: ignore[list-item]
    require(held == {"Told": {"args": {"every": 2}}}, f"a callback's state is held as {held}")
