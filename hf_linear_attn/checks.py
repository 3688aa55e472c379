"""What can be wrong with a conversion, found before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_linear_attn.auto import WINDOW_OPTION, LinearAttnPreTrainedModel
from hf_linear_attn.config import LayerConfig, PositionsConfig
from hf_linear_attn.ops.base.backend import check_backend
from hf_linear_attn.patchers.base import ModelPatcher
from hf_linear_attn.positions import position_weight
from hf_linear_attn.registry import PATCHERS, get_patcher, get_variant, list_patchers
from hf_linear_attn.variants.base import MAX_INTEGER, AttentionVariant, device_memory

__all__ = [
    "VariantChoice",
    "check_auto",
    "check_batches",
    "check_extension",
    "check_features",
    "check_finite",
    "check_kernels",
    "check_model",
    "check_regression",
    "check_switch",
    "choose_layers",
]

VariantChoice = str | tuple[str, dict[str, Any]] | None


def check_model(model: Any) -> None:
    """Raise unless `model` is a Transformers model of a known family whose own weights are at hand.

    Raises:
        TypeError: for something else than a Transformers model.
        ValueError: for an unknown family, or a model that is converted, compiled, sharded, quantized, packed, on the
            meta device, wrapped by PEFT, or made to look both ways where its attention looks back.
    """
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or getattr(model, "_compiled_call_impl", None):
        raise ValueError("The model is compiled. Convert it first, then call torch.compile on the result.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"convert_model takes a Transformers PreTrainedModel, got {type(model).__name__}.{_where_it_is(model)}"
        )
    if isinstance(model, LinearAttnPreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is already converted. Call revert_model(model) first to convert it another way."
        )
    _check_parameters(model)
    if model.config.model_type not in PATCHERS:
        raise ValueError(
            f"Model family {model.config.model_type!r} is not supported. Supported: {', '.join(list_patchers())}."
        )
    patcher = get_patcher(model.config.model_type)
    _check_parts(patcher, model)
    _check_projections(patcher, model)
    _check_direction(patcher, model)


def _check_direction(patcher: ModelPatcher, model: Any) -> None:
    asked = patcher.is_causal(model.config)
    for place, _, module in patcher.self_attentions(model):
        if bool(module.is_causal) != asked:
            raise ValueError(
                f"The attention of layer {place} was built with is_causal={module.is_causal}, and the config asks for "
                f"{asked}. Allowed: a {type(model).__name__} whose attention and config agree on what a token sees; "
                "a decoder that was made to look both ways cannot be converted."
            )


def _where_it_is(model: Any) -> str:
    """Where the Transformers model may be that was not given."""
    if any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__):
        return (
            " Convert the Transformers model inside it, in place: convert_model(st[0].auto_model, ...); with "
            "max_length=, set st.max_seq_length too."
        )
    return " Convert the base model before wrapping it (PEFT, DDP)." if isinstance(model, nn.Module) else ""


def _check_parameters(model: PreTrainedModel) -> None:
    parameters = list(model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError("The model is on the meta device: it has no weights to convert. Load it first.")
    if any(type(parameter).__name__ == "DTensor" or hasattr(parameter, "_is_flat_param") for parameter in parameters):
        raise ValueError("The model is sharded (FSDP). Convert it before sharding.")


def _check_parts(patcher: ModelPatcher, model: PreTrainedModel) -> None:
    """Raise for a part that is converted already, or of a class that Transformers does not know."""
    for module in model.modules():
        cls = type(module)
        if isinstance(module, LinearAttnPreTrainedModel):
            raise ValueError(
                f"The {cls.__name__} inside the model is already converted. Revert it (revert_model on that part) and "
                "convert the whole model: a part's config is not saved with the whole."
            )
        if isinstance(module, PreTrainedModel) and getattr(patcher.modeling, cls.__name__, None) is not cls:
            raise ValueError(
                f"{cls.__name__} is not one of Transformers' {model.config.model_type} classes, so its "
                "checkpoints could not be reloaded. Convert the Transformers model inside it instead."
            )


def _check_projections(patcher: ModelPatcher, model: PreTrainedModel) -> None:
    """Raise where a projection's weight is not the checkpoint's own, in floating point."""
    if getattr(getattr(model, "hf_quantizer", None), "packed_modules", None):
        raise ValueError(
            "The model's weights are packed (GGUF). Load them unpacked: "
            "from_pretrained(..., quantization_config=GgufConfig(dequantize=True))."
        )
    if any(getattr(module, "base_layer", None) is not None for module in model.modules()):
        raise ValueError("The model carries PEFT adapters. Convert the base model first, then add adapters.")
    for attention in patcher.self_attentions(model):
        for name in patcher.projection_names:
            layer = getattr(attention.module, name)
            # Packed integers, a subclass of Tensor, or (torch.ao) a method that unpacks them.
            weight = layer.weight
            if type(weight) not in (torch.Tensor, nn.Parameter) or not weight.is_floating_point():
                raise ValueError(
                    f"The model is quantized ({attention.name}.{name} is a {type(layer).__name__} whose weight is a "
                    f"{type(weight).__name__}). Convert it first: load it without quantization, convert_model(...), "
                    "save_pretrained(folder), then from_pretrained(folder, quantization_config=...)."
                )


def check_features(model: Any) -> list[AttentionVariant]:
    """The variants of a model that draw random features.

    Raises:
        ValueError: for a model without any, or whose layers' tensors are on the meta device, as offloaded ones are.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    variants = [module for module in modules if isinstance(module, AttentionVariant)]
    if not variants:
        raise ValueError(f"redraw_features takes a converted model; {type(model).__name__} was not converted.")
    drawing = [variant for variant in variants if variant.config.draws_features]
    if not drawing:
        layers = " or ".join(sorted({f"{variant.spec.key} ({variant.extra_repr()})" for variant in variants}))
        raise ValueError(f"No layer of the {type(model).__name__} has random features to draw: they run {layers}.")
    for variant in drawing:
        missing = [name for name, buffer in variant.named_buffers() if buffer.is_meta]
        if missing:
            raise ValueError(
                f"Layer {variant.context.layer_idx}: {', '.join(missing)} of {variant.spec.key} hold no data here (the "
                "meta device, or offloaded). Draw the features of a model whose weights are loaded."
            )
    return drawing


def check_finite(model: PreTrainedModel) -> None:
    """Raise `ValueError` for weights that are nan or infinite: no attention comes close to what they compute."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for name, parameter in model.named_parameters():
        if parameter.dtype not in dtypes or not parameter.numel():
            continue
        # The extremes, which nan reaches, in place of a mask as large as the weight.
        if not bool(torch.stack(torch.aminmax(parameter.detach())).isfinite().all()):
            raise ValueError(f"The model's weight {name} holds nan or infinite values; load a sound checkpoint.")


def choose_layers(
    patcher: ModelPatcher,
    model: PreTrainedModel,
    variant: str | Mapping[int, VariantChoice],
    layers: Iterable[int] | None,
    options: dict[str, Any],
) -> tuple[LayerConfig | None, ...]:
    """What each layer of `model` is to run, None where it keeps softmax.

    Raises:
        TypeError: for a `variant` that is neither a name nor a mapping.
        ValueError: for layers that do not exist, an unknown variant or option, options that reach no layer, or a
            variant that does not serve the model's side.
    """
    num_layers = patcher.num_layers(model)
    choices = _choices(variant, layers, num_layers)
    if options and not any(isinstance(choice, str) for choice in choices.values()):
        raise ValueError(f"Option(s) {', '.join(options)} reach no layer: the mapping names no variant by key alone.")
    chosen: list[LayerConfig | None] = [None] * num_layers
    for index, choice in choices.items():
        if choice is not None:
            chosen[int(index)] = _layer_config(patcher, model, index, choice, options)
    if not any(chosen):
        raise ValueError("No layer is converted: name at least one layer with a variant.")
    return tuple(chosen)


def _choices(variant: Any, layers: Any, num_layers: int) -> dict[int, VariantChoice]:
    """The choice for each layer that is named."""
    if layers is not None and (isinstance(layers, str | bytes | Mapping) or not isinstance(layers, Iterable)):
        raise ValueError(f"layers={layers!r}; allowed: None, a list of layer indices or 'auto'.")
    layers = None if layers is None else list(layers)
    named = [*(layers or ()), *(variant if isinstance(variant, Mapping) else ())]
    bad = [index for index in named if not _is_layer(index, num_layers)]
    if bad:
        raise ValueError(f"Layer(s) {bad} do not exist: the model has layers 0 to {num_layers - 1}.")
    if isinstance(variant, str):
        return dict.fromkeys(range(num_layers) if layers is None else layers, variant)
    if not isinstance(variant, Mapping):
        raise TypeError(f"variant must be a name or a mapping from layer index, got {type(variant).__name__}.")
    if layers is not None:
        raise ValueError("Give either `layers` or a mapping of layers, not both.")
    return dict(variant)


def _is_layer(index: Any, num_layers: int) -> bool:
    return isinstance(index, Integral) and not isinstance(index, bool) and 0 <= int(index) < num_layers


def _layer_config(
    patcher: ModelPatcher, model: PreTrainedModel, index: int, choice: Any, options: dict[str, Any]
) -> LayerConfig:
    """A layer's variant and options; a window that is not chosen is the sliding window that upstream runs it with."""
    pair = (choice, options) if isinstance(choice, str) else choice
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], Mapping)):
        raise ValueError(f"Layer {index}: {choice!r}; allowed: None, a variant's key, or (key, options).")
    key, own = pair
    _check_side(patcher, model, key)
    window = patcher.sliding_window(model.config, int(index))
    if window is not None and any(field.name == WINDOW_OPTION for field in fields(get_variant(key).config_class)):
        own = {WINDOW_OPTION: window, **own}
    return LayerConfig(key, dict(own))


def _check_side(patcher: ModelPatcher, model: PreTrainedModel, key: str) -> None:
    spec, causal = get_variant(key), patcher.is_causal(model.config)
    if not (spec.decoder if causal else spec.encoder):
        side, other = ("a decoder", "encoders") if causal else ("an encoder", "decoders")
        raise ValueError(f"{key!r} serves {other} only and {type(model).__name__} is {side}: {spec.refusal}")


def check_auto(
    patcher: ModelPatcher,
    model: PreTrainedModel,
    variant: Any,
    layers: Any,
    keep_softmax: Any,
    keep_softmax_by: Any,
    calibration: Any,
) -> None:
    """Raise `ValueError` unless `layers="auto"` comes with all it needs, and what goes with it alone is not given."""
    by = keep_softmax_by
    if by is not None and (not isinstance(by, str) or by not in ("output", "states")):
        raise ValueError(f"keep_softmax_by={by!r}; allowed: 'output', 'states' or None.")
    if isinstance(layers, str) and layers != "auto":
        raise ValueError(f"layers={layers!r}; allowed: None, layer indices or 'auto'.")
    if layers != "auto":
        if keep_softmax is not None:
            raise ValueError(f"keep_softmax={keep_softmax!r} goes with layers='auto'.")
        if by is not None:
            raise ValueError(f"keep_softmax_by={by!r} goes with layers='auto'.")
        return
    most = patcher.num_layers(model) - 1
    if not isinstance(variant, str):
        raise ValueError("layers='auto' takes a single variant by name, not a mapping of layers.")
    if isinstance(keep_softmax, bool) or not isinstance(keep_softmax, int) or not 1 <= keep_softmax <= most:
        raise ValueError(f"layers='auto' needs keep_softmax from 1 to {most}, got {keep_softmax!r}.")
    if by == "output" and model.base_model is model:
        raise ValueError(f"keep_softmax_by='output': {type(model).__name__} has no head; allowed: 'states' or None.")
    if calibration is None:
        raise ValueError("layers='auto' needs calibration, a list of batches on which layers are compared.")


def check_extension(
    patcher: ModelPatcher, model: PreTrainedModel, max_length: Any, mode: str
) -> PositionsConfig | None:
    """How the limit on positions is to be extended; None if it is not.

    Raises:
        ValueError: for an unknown mode, one that needs a table that the family lacks, a length below the present one
            or one that no memory holds.
    """
    if mode not in ("tile", "interpolate"):
        raise ValueError(f"extend={mode!r} is unknown. Allowed: 'tile', 'interpolate'.")
    table = position_weight(patcher, model)
    if mode == "interpolate" and table is None:
        raise ValueError(
            f"extend={mode!r} stretches a position table, and {model.config.model_type} has rotary embeddings instead. "
            "Give max_length alone; to slow the rotation down, load the model with other rope_parameters."
        )
    if max_length is None:
        return None
    present = patcher.max_length(model.config)
    if isinstance(max_length, bool) or not isinstance(max_length, int) or not present <= max_length <= MAX_INTEGER:
        raise ValueError(f"max_length={max_length!r} must be an integer of at least {present}, the present limit.")
    if table is not None:
        size, memory = 3 * max_length * table.shape[1] * table.element_size(), device_memory(table.device)
        if size > memory:
            raise ValueError(f"max_length={max_length:,} takes {size:,} bytes for positions; there are {memory:,}.")
    return PositionsConfig(original_max_length=present, mode="rotary" if table is None else mode)


def check_kernels(patcher: ModelPatcher, model: PreTrainedModel, backend: str, keys: Iterable[str]) -> None:
    """Raise `ValueError` for an unknown backend, or `"triton"` where one of the variants has no kernel."""
    causal = patcher.is_causal(model.config)
    missing = sorted(key for key in keys if not get_variant(key).has_kernel(causal))
    if check_backend(backend) == "triton" and missing:
        side = "decoders" if causal else "encoders"
        raise ValueError(
            f"backend='triton': {', '.join(missing)} has no Triton kernel for {side}. Allowed: 'auto', 'torch'."
        )


def check_switch(name: str, value: Any) -> None:
    """Raise `ValueError` unless an argument is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}; allowed: True or False.")


def check_regression(calibration: Any, steps: Any, lr: Any) -> None:
    """Raise `ValueError` unless steps and learning rate are numbers in range, and steps come with batches."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"calibration_steps={steps!r}; allowed: an integer of at least 0.")
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr <= 1e6:
        raise ValueError(f"calibration_lr={lr!r}; allowed: a number above 0.")
    if steps and calibration is None:
        raise ValueError(f"calibration_steps={steps} needs calibration, a list of batches to train on.")


def _check_value(name: str, value: Any) -> None:
    """Raise `ValueError` for an entry of a calibration batch that the model cannot read."""
    where = f"{name} of a calibration batch"
    if name == "use_cache":
        raise ValueError(f"{where}: calibration runs without a cache. Leave it out.")
    if not isinstance(value, torch.Tensor | bool | None):
        raise ValueError(
            f'{where} is a {type(value).__name__}; allowed: a tensor (return_tensors="pt" makes a tokenizer give them).'
        )
    fewest = {"input_ids": 2, "inputs_embeds": 3}.get(name)  # multiple choice has one dimension more
    if fewest is not None and (value is None or isinstance(value, bool) or value.ndim < fewest or not value.numel()):
        given = value if isinstance(value, bool | None) else f"shape {tuple(value.shape)}"
        raise ValueError(f"{where} has {given}; allowed: [batch, tokens{', width' * (fewest - 2)}], none of them 0.")


def check_batches(calibration: Iterable[Mapping[str, Any]], vocab_size: int) -> list[dict[str, Any]]:
    """The batches without their labels.

    Raises:
        ValueError: for something else than a list of mappings, none at all, values that are no tensors, ids or
            embeddings of another shape, values that are not finite, a batch of nothing but padding, or token ids that a
            model with so many embeddings does not have.
    """
    if isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise ValueError(f"calibration={calibration!r}; allowed: a list of batches, argument names to tensors each.")
    if isinstance(calibration, Mapping):
        raise ValueError("calibration takes a list of batches; got one batch. Pass [batch].")
    batches = []
    for batch in calibration:
        if not isinstance(batch, Mapping):
            raise ValueError(f"A calibration batch must map argument names to tensors, got {type(batch).__name__}.")
        for name, value in batch.items():
            if name != "labels":
                _check_value(name, value)
        mask = batch.get("attention_mask")
        if isinstance(mask, torch.Tensor) and not bool(mask.any()):
            raise ValueError("A calibration batch holds nothing but padding (its attention_mask is all 0).")
        embeds = batch.get("inputs_embeds")
        if embeds is not None and isinstance(mask, torch.Tensor) and mask.shape == embeds.shape[:-1]:
            embeds = embeds[mask.bool()]
        if embeds is not None and not bool(embeds.isfinite().all()):
            raise ValueError("inputs_embeds of a calibration batch has values that are not finite.")
        ids = batch.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"input_ids of a calibration batch go from {int(ids.min())} to {int(ids.max())}; allowed: 0 to "
                f"{vocab_size - 1}, the model's vocabulary. Is the tokenizer this model's?"
            )
        batches.append({name: value for name, value in batch.items() if name != "labels"})
    if not batches:
        raise ValueError("calibration holds no batch.")
    return batches
