"""The model classes of converted models, and the one function that turns an upstream model into one.

Conversion and reload share `attach`: it swaps the class of every `PreTrainedModel` inside a model and of every
converted attention module, gives them the new config, and installs the variants. The classes are made from the
upstream ones on demand and can be imported from here by name (`LinearAttnBertForSequenceClassification`), which is
what pickling needs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from hf_linear_attn.attention import (
    OUTPUT_ATTENTIONS_MESSAGE,
    ConvertedAttention,
    converted_attention_class,
    with_sequence_plan,
)
from hf_linear_attn.auto_config import (
    IMPLEMENTATION,
    check_named_layers,
    config_class_for,
    converted_name,
    file_of,
    made_once,
)
from hf_linear_attn.config import LayerConfig, LinearAttentionConfig
from hf_linear_attn.ops.base.packing import is_traced
from hf_linear_attn.patchers.base import SelfAttention
from hf_linear_attn.registry import get_patcher, get_variant, list_patchers
from hf_linear_attn.report import ConversionReport, describe
from hf_linear_attn.saving import whole_folder
from hf_linear_attn.seam.cache import check_cache, check_given, find_cache, refuse_held
from hf_linear_attn.seam.checkpointing import is_checkpointing
from hf_linear_attn.seam.extra_tokens import ExtraTokens, check_asked, fit_extra_tokens, without_extra_tokens
from hf_linear_attn.seam.generating import Generating
from hf_linear_attn.seam.heads import choices_of, task_of, with_global_tokens
from hf_linear_attn.seam.initialization import is_initialized, mark_initialized, refuse_lost
from hf_linear_attn.seam.limits import check_length, named_arguments
from hf_linear_attn.seam.places import (
    check_layers,
    fit_config,
    have_moved,
    layers_as_they_stand,
    number_layers,
    share_config,
)
from hf_linear_attn.seam.sharing import check_shared, shared_keys, tie_shared, variants_of
from hf_linear_attn.seam.weights import check_weights
from hf_linear_attn.variants.base import AttentionVariant, LayerContext, materialize

__all__ = [
    "WINDOW_OPTION",
    "LinearAttnPreTrainedModel",
    "attach",
    "build_variants",
    "detach",
    "model_class_for",
    "register_auto_models",
]

REPORT_ATTRIBUTE = "_linear_attn_report"
WINDOW_OPTION = "window_size"  # of every variant that has a window


class LinearAttnPreTrainedModel(Generating):
    """Mixin put before an upstream model class."""

    config: Any
    linear_attn_task: str | None = None
    """What the head is for, where variants choose global tokens by it (`seam.heads.task_of`)."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "linear_attn", None) is None:
            raise ValueError(
                f"{type(self).__name__} needs a config with `linear_attn`. Convert a model with convert_model(), or "
                "load a converted checkpoint with from_pretrained()."
            )
        check_named_layers(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        _take_first_layers(model, config)
        try:
            built = build_variants(model, config, LinearAttentionConfig.from_dict(config.linear_attn))
        except ValueError as error:
            raise ValueError(f"{file_of(config.name_or_path)}linear_attn: {error}") from error
        attach(model, config, built)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.base_model is self and not torch.compiler.is_compiling():  # type: ignore[attr-defined]
            settle(self)
        if self.config._attn_implementation == IMPLEMENTATION:
            if kwargs.get("output_attentions"):
                raise ValueError(OUTPUT_ATTENTIONS_MESSAGE)
            if kwargs.get("global_attention_mask") is not None and not _honors_global_mask(self.config):
                raise ValueError(
                    "global_attention_mask was given, but no layer of this model runs a variant that has global tokens "
                    f"(its variants: {', '.join(LinearAttentionConfig.from_dict(self.config.linear_attn).variants())})."
                )
            kwargs = with_sequence_plan(self, args, kwargs)
            if self.base_model is self:  # type: ignore[attr-defined]
                kwargs = with_global_tokens(self, args, kwargs)
            elif self.linear_attn_task is not None and choices_of(self, self.linear_attn_task):
                kwargs = {"linear_attn_task": self.linear_attn_task, **kwargs}
        given = find_cache([*(("", value) for value in args), *kwargs.items()])  # a head would leave out a second one
        if self.base_model is not self:  # type: ignore[attr-defined]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        check_length(self, args, kwargs)
        if self.config._attn_implementation != IMPLEMENTATION:
            refuse_held(given)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        by_place = len(args) > 1 and not is_traced()
        mask = (named_arguments(self, args, kwargs) if by_place else kwargs).get("attention_mask")
        check_given(given, self.config.linear_attn["layers"], mask)
        outputs = without_extra_tokens(self, super().__call__(*args, **kwargs))  # type: ignore[misc]
        used = given if given is not None else _returned_cache(outputs)
        if used is not None and not (self.training and is_checkpointing(self)):  # type: ignore[attr-defined]
            # Upstream hands no cache to layers that it will recompute.
            check_cache(used, _converted_indices(self), mask)
        return outputs

    @property
    def conversion_report(self) -> ConversionReport:
        """What each layer runs, the parameters it added, and its measured error if the conversion was calibrated."""
        settle(self)
        stored = self.base_model.__dict__.get(REPORT_ATTRIBUTE)  # type: ignore[attr-defined]
        return stored if stored is not None else describe(self)  # type: ignore[arg-type]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AttentionVariant | ExtraTokens):
            # Reached for modules that came from the meta device; what the checkpoint filled must stay.
            if not is_initialized(module):
                refuse_lost(self, module)  # type: ignore[arg-type]
                module.reset_parameters()
            return
        super()._init_weights(module)  # type: ignore[misc]

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Upstream's `{target: source}` of tied weights, plus the parameters that variants share across layers."""
        return {**super().get_expanded_tied_weights_keys(all_submodels), **shared_keys(self)}  # type: ignore[misc,arg-type]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As upstream, except that missing or unexpected weights are an error.

        A checkpoint of another head (a converted base model loaded into a classifier, say) may lack or exceed the
        head's weights, as upstream; the converted attention must be complete in any case.

        Raises:
            ValueError: naming the missing or unexpected keys.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        _refuse_incomplete(model, info, str(pretrained_model_name_or_path))
        return (model, info) if wants_info else model

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As upstream, which allocates what the config asks for; here it must agree with the weights first."""
        if load_config.hf_quantizer is None:  # whose weights have shapes of their own
            check_weights(model, state_dict, checkpoint_files, load_config.ignore_mismatched_sizes)
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As upstream, except that a reader of the folder finds the old model or this one, never some of both.

        The saved config describes the layers as they stand, however they were dropped, reordered or stacked. With
        `push_to_hub=True` also what `push_to_hub` uploads.

        Raises:
            FileExistsError: if `save_directory` is a file.
            ValueError: if the layers cannot be saved as they stand (`settle`).
        """
        settle(self, always=True)
        if push_to_hub:
            importlib.import_module("hf_linear_attn.hub").save_and_push(self, save_directory, *args, **kwargs)
        elif kwargs.get("distributed_checkpoint"):  # all processes write into one folder
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        else:
            with whole_folder(save_directory) as stage:
                super().save_pretrained(stage, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the model with a model card and the loader code; see `hf_linear_attn.hub.push_to_hub`."""
        return importlib.import_module("hf_linear_attn.hub").push_to_hub(self, repo_id, **kwargs)


def _returned_cache(outputs: Any) -> Cache | None:
    return find_cache(outputs.items() if isinstance(outputs, Mapping) else (("", value) for value in outputs))


def _converted_indices(model: Any) -> list[int]:
    """Places of the converted layers of a base model."""
    entries = get_patcher(model.config.base_model_type).self_attentions(model)
    return [entry.layer_idx for entry in entries if isinstance(entry.module, ConvertedAttention)]


def _refuse_incomplete(model: PreTrainedModel, info: dict[str, Any], source: str) -> None:
    saved = _saved_class(model.config)
    missing, unexpected = (sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys"))
    for part in get_patcher(model.config.base_model_type).optional_parts if model.base_model is model else ():  # type: ignore[attr-defined]
        # A keyword of the load adds or drops the whole of it, as upstream.
        own, gone, extra = (
            [key for key in keys if key.startswith(f"{part}.")] for keys in (model.state_dict(), missing, unexpected)
        )
        if (not own) or (len(gone) == len(own) and not extra):
            missing, unexpected = ([key for key in keys if key not in gone + extra] for keys in (missing, unexpected))
    if saved is not None and saved is not type(model):
        if missing:  # a model of the class that was saved has them, so the checkpoint lacks them; else it is our head's
            prefix = f"{model.base_model_prefix}."
            with torch.device("meta"):
                held = {name.removeprefix(prefix) for name in saved(model.config).state_dict()}
            missing = [name for name in missing if ".linear_attn." in name or name.removeprefix(prefix) in held]
        unexpected = [name for name in unexpected if ".linear_attn." in name]
    lines = [
        f"{kind} keys: {', '.join(keys)}" for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys
    ]
    if lines:
        named = (
            "" if saved else f" (config.json names no converted class: architectures={model.config.architectures!r})"
        )
        raise ValueError(f"The weights in {source} do not fit {type(model).__name__}{named}: {'; '.join(lines)}.")


def _saved_class(config: Any) -> type[PreTrainedModel] | None:
    """The class that the checkpoint was saved from, or None if its config does not name a converted one."""
    names = config.architectures
    if not isinstance(names, list | tuple) or len(names) != 1 or not isinstance(names[0], str):
        return None
    found = _converted_class(names[0])
    known = isinstance(found, type) and issubclass(found, LinearAttnPreTrainedModel)
    return found if known and found.config_class is type(config) else None  # type: ignore[attr-defined,return-value]


def _honors_global_mask(config: Any) -> bool:
    spec = LinearAttentionConfig.from_dict(config.linear_attn)
    return any(get_variant(key).uses_global_mask for key in spec.variants())


# ---------------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------------


def _config_class(upstream: Any) -> type[PreTrainedConfig]:
    return upstream.config_class


@made_once
def model_class_for(upstream: Any) -> type[PreTrainedModel]:
    """The converted form of an upstream model class (one per class)."""
    return type(
        converted_name(upstream.__name__),
        (LinearAttnPreTrainedModel, upstream),
        {
            "__module__": __name__,
            "__doc__": f"`{upstream.__name__}` with converted attention.",
            "config_class": config_class_for(_config_class(upstream).model_type),
            # The promise is about static caches, which a decode state does not fit.
            "_can_compile_fullgraph": upstream._can_compile_fullgraph and not upstream.can_generate(),
            "linear_attn_task": task_of(upstream),
            "_supports_context_parallel": False,  # a shard of the tokens does not know the others' state
        },
    )


@made_once
def register_auto_models(base_model_type: str) -> None:
    """Register the converted classes with every Auto class that knows the family's config, tokenizers included."""
    patcher = get_patcher(base_model_type)
    base_config, new_config = patcher.config_class, config_class_for(base_model_type)
    for name, mapping in vars(modeling_auto).items():
        if not (name.startswith("MODEL_") and isinstance(mapping, _LazyAutoMapping)) or base_config not in mapping:
            continue
        upstream: Any = mapping[base_config]
        classes = upstream if isinstance(upstream, (list, tuple)) else (upstream,)
        if any(getattr(patcher.modeling, cls.__name__, None) is not cls for cls in classes):
            continue  # a model of another family that takes this one as its inner part
        new = tuple(model_class_for(cls) for cls in classes)
        registered: Any = new if isinstance(upstream, (list, tuple)) else new[0]
        mapping.register(new_config, registered, exist_ok=True)
    if base_config in TOKENIZER_MAPPING:
        tokenizer: Any = TOKENIZER_MAPPING[base_config]
        if isinstance(tokenizer, (list, tuple)):  # (slow, fast)
            tokenizer = next((entry for entry in reversed(tokenizer) if entry), None)
        if tokenizer is not None:
            AutoTokenizer.register(new_config, tokenizer_class=tokenizer, exist_ok=True)


def __getattr__(name: str) -> Any:
    found = _converted_class(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


def _converted_class(name: str) -> Any:
    """The converted class of that name, or None."""
    prefix = converted_name("")
    if name.startswith(prefix):
        upstream_name = name[len(prefix) :]
        for model_type in list_patchers():
            patcher = get_patcher(model_type)
            if not upstream_name.startswith(patcher.config_name.removesuffix("Config")):
                continue  # before its modeling module is imported
            if upstream_name == patcher.config_name:
                return config_class_for(model_type)
            upstream: Any = getattr(patcher.modeling, upstream_name, None)
            if upstream is patcher.attention_class:
                return converted_attention_class(upstream)
            if isinstance(upstream, type) and issubclass(upstream, PreTrainedModel):
                return model_class_for(upstream)  # type: ignore[arg-type]
    return None


# ---------------------------------------------------------------------------------------------------------------
# Attaching and detaching
# ---------------------------------------------------------------------------------------------------------------


def build_variants(
    model: PreTrainedModel, config: PreTrainedConfig, spec: LinearAttentionConfig
) -> list[tuple[SelfAttention, AttentionVariant]]:
    """Build the variants `spec` asks for, on the devices and in the dtype of their layers; changes nothing.

    Args:
        model: an upstream model that was not converted; what is converted inside it stays as it is.
        config: the config the model will have (its limit on positions is what variants are built for).
        spec: which layer runs what.

    Raises:
        ValueError: if a variant's window is wider than upstream's in the layer, or a variant refuses its options.
    """
    patcher: Any = get_patcher(config.base_model_type)  # type: ignore[attr-defined]
    built = []
    for attention in patcher.self_attentions(model):
        layer = spec.layers[attention.layer_idx]
        if layer is None or hasattr(attention.module, "linear_attn"):  # the latter: a head's base model, from AutoModel
            continue
        _check_window(attention.layer_idx, layer, patcher.sliding_window(config, attention.layer_idx))
        place, count = layer.built_for or (attention.layer_idx, len(spec.layers))
        context = LayerContext(
            layer_idx=place,
            num_layers=count,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            head_dim=patcher.head_dim(config),
            max_length=patcher.max_length(config),
            is_causal=patcher.is_causal(config),
            rotary=patcher.rotary,
        )
        weight = patcher.projections(attention.module)[0].weight
        with torch.device("meta"):  # where torch's modules draw nothing from the caller's generators
            variant = get_variant(layer.variant).module_class(layer.variant_config(), context)
        built.append((attention, variant, weight))
    check_asked((variant for _, variant, _ in built), patcher.is_causal(config))
    materialize([(variant, weight) for _, variant, weight in built])
    return [(attention, variant) for attention, variant, _ in built]


def _check_window(layer_idx: int, layer: LayerConfig, window: int | None) -> None:
    """A window of the method's own may not reach further than the one that upstream runs the layer with."""
    asked = layer.options.get(WINDOW_OPTION)
    widest = max(asked) if isinstance(asked, list) else asked
    if window is not None and widest is not None and widest > window:
        raise ValueError(
            f"Layer {layer_idx}: {WINDOW_OPTION}={asked!r}, but the checkpoint attends to a sliding window of {window} "
            f"tokens there (config.sliding_window). Allowed: at most {window}."
        )


def attach(
    model: PreTrainedModel, config: PreTrainedConfig, built: list[tuple[SelfAttention, AttentionVariant]]
) -> None:
    """Install `built` in `model` and make it a converted model with `config`."""
    patcher: Any = get_patcher(config.base_model_type)  # type: ignore[attr-defined]
    number_layers(patcher, model)
    tie_shared([variant for _, variant in built])
    for attention, variant in built:
        attention.module.linear_attn = variant
        attention.module.__class__ = converted_attention_class(type(attention.module))
        variant.train(attention.module.training)
        mark_initialized(variant)
    fit_extra_tokens(patcher, model, config)
    _rebrand(model, config, model_class_for)


def detach(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Undo `attach`, or what was done of one: remove the variants, restore the upstream classes and give `config`."""
    patcher: Any = get_patcher(config.model_type)
    for attention in patcher.self_attentions(model):
        if hasattr(attention.module, "linear_attn"):
            del attention.module.linear_attn
        if isinstance(attention.module, ConvertedAttention):
            attention.module.__class__ = type(attention.module).__bases__[1]
        if not patcher.layers_are_numbered:
            attention.module.__dict__.pop("layer_idx", None)
    fit_extra_tokens(patcher, model, config)
    model.base_model.__dict__.pop(REPORT_ATTRIBUTE, None)
    _rebrand(model, config, lambda converted: converted.__bases__[1])


def _rebrand(model: Any, config: PreTrainedConfig, new_class: Any) -> None:
    """Swap the class of every model in `model`, and the config of every module."""
    share_config(model, config)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            if isinstance(module, LinearAttnPreTrainedModel) != (new_class is model_class_for):
                module.__class__ = new_class(type(module))
            # Recorders of hidden states are looked up by the class's name; the registry of later releases builds the
            # key from the model itself, so go beneath its __setitem__, which all releases share.
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(module.__class__), module._can_record_outputs)
    _name_shared(model)


def _name_shared(model: nn.Module) -> None:
    """Tell every model in `model` which of the variants' parameters are one tensor."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            own = {k: v for k, v in module.all_tied_weights_keys.items() if ".linear_attn." not in k}
            module.all_tied_weights_keys = {**own, **shared_keys(module)}


def settle(model: Any, always: bool = False) -> None:
    """Let the numbers, the config and the report of a converted model follow the places where its layers stand.

    Args:
        model: a converted model.
        always: compare what the config says of each layer with the layer itself; else only if layers have moved.

    Raises:
        ValueError: if one module stands in two places, the config says that fewer layers run than there are, or a
            layer's copy of a parameter that all layers share was trained apart.
    """
    patcher: Any = get_patcher(model.config.base_model_type)
    if not always and not have_moved(patcher, model):
        return
    count, spec = check_layers(patcher, model), LinearAttentionConfig.from_dict(model.config.linear_attn)
    check_shared(variants_of(model))
    came_from = {entry.layer_idx: getattr(entry.module, "layer_idx", None) for entry in patcher.self_attentions(model)}
    number_layers(patcher, model)
    share_config(model, model.config)
    fit_config(model.config, count)
    model.config.linear_attn = replace(spec, layers=layers_as_they_stand(patcher, model)).to_dict()
    tie_shared(list(variants_of(model).values()))
    fit_extra_tokens(patcher, model, model.config)
    _name_shared(model)
    for module in model.modules():
        stored = module.__dict__.get(REPORT_ATTRIBUTE)
        if stored is not None:
            kept = [place for place, number in came_from.items() if number in stored.kept_softmax]
            errors = {place: stored.errors_of(number) for place, number in came_from.items()}
            new = describe(module, errors, kept, stored.kept_softmax_by)  # type: ignore[arg-type]
            module.__dict__[REPORT_ATTRIBUTE] = replace(new, global_tokens=stored.global_tokens)  # as of its head


def _take_first_layers(model: Any, config: Any) -> None:
    """Let the config of a model that was asked to have fewer layers than its checkpoint name no more than these."""
    spec, count = LinearAttentionConfig.from_dict(config.linear_attn), config.num_hidden_layers
    named = len(spec.layers)
    if named == count:
        return
    first = [
        None if layer is None else replace(layer, built_for=layer.built_for or (place, named))
        for place, layer in enumerate(spec.layers[:count])
    ]
    config.linear_attn = replace(spec, layers=tuple(first)).to_dict()
    fit_config(config, count)
    patcher: Any = get_patcher(config.base_model_type)
    rest = "|".join(map(str, range(count, named)))
    layers = re.escape(patcher.self_attentions(model.base_model)[0].name.split(".0.")[0])
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = ignored | {rf"(^|\.){layers}\.({rest})\."}
