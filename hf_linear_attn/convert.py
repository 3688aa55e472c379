"""The verb: `convert_model` rewrites a model's attention in place, `revert_model` takes it back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_linear_attn.auto import (
    REPORT_ATTRIBUTE,
    WINDOW_OPTION,
    LinearAttnPreTrainedModel,
    attach,
    build_variants,
    detach,
    settle,
)
from hf_linear_attn.auto_config import config_class_for
from hf_linear_attn.calibration import DEFAULT_LEARNING_RATE, calibrate, check_batches, layers_to_keep
from hf_linear_attn.config import LayerConfig, LinearAttentionConfig, PositionsConfig
from hf_linear_attn.ops.base.backend import check_backend
from hf_linear_attn.registry import PATCHERS, get_patcher, get_variant, list_patchers
from hf_linear_attn.report import describe
from hf_linear_attn.seam.initialization import mark_initialized
from hf_linear_attn.seam.places import check_layers, fit_config, layer_numbers
from hf_linear_attn.variants.base import MAX_INTEGER, AttentionVariant, device_memory

__all__ = ["convert_model", "extend_positions", "revert_model", "set_backend", "unmark_unpacked"]

logger = logging.get_logger(__name__)

VariantChoice = str | tuple[str, dict[str, Any]] | None
ExtendMode = Literal["tile", "interpolate"]
_ORIGINAL_POSITIONS = "_linear_attn_original_positions"
_ORIGINAL_IMPLEMENTATION = "_linear_attn_original_implementation"


def convert_model(
    model: PreTrainedModel,
    variant: str | Mapping[int, VariantChoice],
    *,
    layers: Iterable[int] | Literal["auto"] | None = None,
    keep_softmax: int | None = None,
    max_length: int | None = None,
    extend: ExtendMode = "tile",
    calibration: Iterable[Mapping[str, Any]] | None = None,
    calibration_steps: int = 0,
    calibration_lr: float = DEFAULT_LEARNING_RATE,
    backend: str = "auto",
    **options: Any,
) -> PreTrainedModel:
    """Rewrite the self-attention of a pretrained model, in place; its weights are kept.

    A part of a composite is converted alone. The composite's config must hold the part's new one, or a checkpoint of
    the composite says softmax: `model.config.encoder = convert_model(model.encoder, "linear").config`.

    Args:
        model: a Transformers model of a supported family (`list_patchers()`), with any head.
        variant: a variant's key (`list_variants()`) for all of `layers`, or a mapping from layer index to None
            (keep softmax), a key, or `(key, options)`; layers that the mapping does not name keep softmax.
        layers: indices to convert, all by default. Only with a single variant. `"auto"` converts all but
            `keep_softmax` layers: those that, converted alone, move the final hidden states of the calibration
            batches most.
        keep_softmax: how many layers `layers="auto"` leaves on softmax.
        max_length: new limit in tokens; extends the position table, its buffers and the config. Rotary families
            (Llama, Qwen, Mistral) have no table: only the config changes, and the embeddings extrapolate.
        extend: how to fill new positions: `"tile"` repeats the table, `"interpolate"` stretches it linearly (refused
            where there is no table).
        calibration: a few batches (keyword arguments of `model`) on which variants choose their data-dependent
            start; the report then has the error of each layer and head against softmax.
        calibration_steps: steps of regression that train each layer's new parameters alone, from its start, on what
            the layer receives in these batches; the model's own weights stay. The best point on the way is kept, as
            judged on the same batches: give it a few thousand tokens, or it fits those alone.
        calibration_lr: learning rate (Adam) of that regression, times the root mean square of each parameter.
        backend: what runs the variants, see `set_backend`.
        **options: options of the variant; with a mapping, of every variant it names by key alone.

    Returns:
        The same object. `model.conversion_report` says what each layer runs now.

    Raises:
        TypeError: if `model` is not a Transformers model.
        ValueError: for an unknown family, variant or option, layers that are one module or more than the config says,
            a variant that does not serve the model's side (encoder or decoder), a bad layer or length, calibration
            options without calibration, a window wider than the sliding window that the layer has (window methods take
            that one by default), an unknown backend, `backend="triton"` for a variant without a kernel, or a model
            that is converted, compiled, sharded, quantized, packed, on the meta device or wrapped by PEFT. The model is
            unchanged in every case.
    """
    _check_convertible(model)
    patcher = get_patcher(model.config.model_type)
    check_layers(patcher, model)
    _check_calibration(calibration, calibration_steps, calibration_lr)
    _check_selection(model, variant, layers, keep_softmax, calibration)
    spec = _resolve(model, variant, None if layers == "auto" else layers, options)
    positions = _check_extension(model, max_length, extend)
    _check_finite(model)
    _check_kernels(model, check_backend(backend), {layer.variant for layer in spec.layers if layer is not None})
    batches = None if calibration is None else check_batches(calibration, model.config.vocab_size)

    upstream_config = model.config

    def converted_config(spec: LinearAttentionConfig) -> PreTrainedConfig:
        config = _converted_config(upstream_config, replace(spec, positions=positions))
        if max_length is not None:
            patcher.set_max_length(config, max_length)
        return config

    config = converted_config(spec)
    with torch.no_grad():
        built = build_variants(model, config, spec)
        for attention, module in built:
            module.load_projections(*patcher.projections(attention.module))
            module.backend = backend

    upstream_table, numbers = _position_weight(model), layer_numbers(patcher, model)
    if max_length is not None:
        _extend_table(model, max_length, extend)
        if extend == "interpolate":
            setattr(model, _ORIGINAL_POSITIONS, upstream_table)
    setattr(model, _ORIGINAL_IMPLEMENTATION, upstream_config._attn_implementation)
    attach(model, config, built)
    errors, kept = None, []
    try:
        if batches is not None:
            errors = calibrate(model, batches, calibration_steps, calibration_lr)
        if batches is not None and keep_softmax is not None:
            kept = layers_to_keep(model, batches, keep_softmax)
            left = replace(spec, layers=tuple(None if i in kept else layer for i, layer in enumerate(spec.layers)))
            config, built = converted_config(left), [pair for pair in built if pair[0].layer_idx not in kept]
            detach(model, upstream_config)
            attach(model, config, built)
    except BaseException:  # an interrupt as well: nothing is left half converted
        detach(model, upstream_config)
        for module, number in numbers:
            module.layer_idx = number
        _restore_table(model, upstream_table)
        _forget(model)
        raise
    unmark_unpacked(model)
    setattr(model.base_model, REPORT_ATTRIBUTE, describe(model, errors, kept))
    return model


def revert_model(model: PreTrainedModel, *, keep_positions: bool = False) -> PreTrainedModel:
    """Take a conversion back, in place: softmax attention, upstream classes and config, the variants' parameters gone.

    Bit-exact while the checkpoint's own weights were not trained. An extended position table shrinks back to the
    checkpoint's length unless `keep_positions`.

    Raises:
        ValueError: if the model is not converted, or its table was stretched by interpolation in another process,
            so that the checkpoint's own rows are not known any more (pass `keep_positions=True`).
    """
    if not isinstance(model, LinearAttnPreTrainedModel):
        raise ValueError(f"revert_model takes a converted model; {type(model).__name__} was not converted.")
    settle(model)
    spec = LinearAttentionConfig.from_dict(model.config.linear_attn)
    patcher = get_patcher(model.config.base_model_type)
    config = _upstream_config(model.config, getattr(model, _ORIGINAL_IMPLEMENTATION, None))
    shrink = spec.positions is not None and not keep_positions
    table = None
    if shrink:
        table = _original_table(model, spec.positions)  # type: ignore[arg-type]
        patcher.set_max_length(config, spec.positions.original_max_length)  # type: ignore[union-attr]
    detach(model, config)  # type: ignore[arg-type]
    _forget(model)
    _restore_table(model, table)
    return model


def set_backend(model: PreTrainedModel, backend: str) -> PreTrainedModel:
    """Choose what runs the variants of a converted model, in place; a saved checkpoint does not remember it.

    Args:
        model: a converted model.
        backend: `"auto"` (Triton kernels where they can run, the reason is logged once), `"triton"` (raises where
            they cannot run, at the call) or `"torch"`. The environment variable HF_LINEAR_ATTN_BACKEND says what
            `"auto"` means.

    Raises:
        ValueError: for an unknown backend, a model that is not converted, or `"triton"` for a variant without a
            kernel. Nothing is changed then.
    """
    if not isinstance(model, LinearAttnPreTrainedModel):
        raise ValueError(f"set_backend takes a converted model; {type(model).__name__} was not converted.")
    variants = [module for module in model.modules() if isinstance(module, AttentionVariant)]
    _check_kernels(model, check_backend(backend), {variant.spec.key for variant in variants})
    for variant in variants:
        variant.backend = backend
    return model


def extend_positions(model: PreTrainedModel, max_length: int, mode: ExtendMode = "tile") -> PreTrainedModel:
    """Let a softmax model read `max_length` tokens: extends its position table, buffers and config, in place.

    Raises:
        ValueError: for an unknown mode or family, a converted model (use `convert_model(..., max_length=)`), or a
            length below the present one.
    """
    _check_convertible(model)
    _check_extension(model, max_length, mode)
    _extend_table(model, max_length, mode)
    get_patcher(model.config.model_type).set_max_length(model.config, max_length)
    return model


# ---------------------------------------------------------------------------------------------------------------
# Checks: all of them run before anything is changed
# ---------------------------------------------------------------------------------------------------------------


def _check_convertible(model: Any) -> None:
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or getattr(model, "_compiled_call_impl", None):
        raise ValueError("The model is compiled. Convert it first, then call torch.compile on the result.")
    if not isinstance(model, PreTrainedModel):
        hint = " Convert the base model before wrapping it (PEFT, DDP)." if isinstance(model, nn.Module) else ""
        if any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__):
            hint = (
                " Convert the Transformers model inside it, in place: convert_model(st[0].auto_model, ...); with "
                "max_length=, set st.max_seq_length too."
            )
        raise TypeError(f"convert_model takes a Transformers PreTrainedModel, got {type(model).__name__}.{hint}")
    if isinstance(model, LinearAttnPreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is already converted. Call revert_model(model) first to convert it another way."
        )
    parameters = list(model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError("The model is on the meta device: it has no weights to convert. Load it first.")
    if any(type(parameter).__name__ == "DTensor" or hasattr(parameter, "_is_flat_param") for parameter in parameters):
        raise ValueError("The model is sharded (FSDP). Convert it before sharding.")
    if model.config.model_type not in PATCHERS:
        raise ValueError(
            f"Model family {model.config.model_type!r} is not supported. Supported: {', '.join(list_patchers())}."
        )
    patcher = get_patcher(model.config.model_type)
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


def _resolve(
    model: PreTrainedModel,
    variant: str | Mapping[int, VariantChoice],
    layers: Iterable[int] | None,
    options: dict[str, Any],
) -> LinearAttentionConfig:
    num_layers = get_patcher(model.config.model_type).num_layers(model)
    if layers is not None and (isinstance(layers, str | bytes | Mapping) or not isinstance(layers, Iterable)):
        raise ValueError(f"layers={layers!r}; allowed: None, a list of layer indices or 'auto'.")
    layers = None if layers is None else list(layers)
    bad = [i for i in layers or () if not _is_layer(i, num_layers)]
    if isinstance(variant, Mapping):
        bad += [i for i in variant if not _is_layer(i, num_layers)]
    if bad:
        raise ValueError(f"Layer(s) {bad} do not exist: the model has layers 0 to {num_layers - 1}.")
    if isinstance(variant, str):
        choices: dict[int, VariantChoice] = dict.fromkeys(range(num_layers) if layers is None else layers, variant)
    elif isinstance(variant, Mapping):
        if layers is not None:
            raise ValueError("Give either `layers` or a mapping of layers, not both.")
        choices = dict(variant)
    else:
        raise TypeError(f"variant must be a name or a mapping from layer index, got {type(variant).__name__}.")
    if options and not any(isinstance(choice, str) for choice in choices.values()):
        raise ValueError(f"Option(s) {', '.join(options)} reach no layer: the mapping names no variant by key alone.")
    resolved: list[LayerConfig | None] = [None] * num_layers
    unbounded: dict[str, list[int]] = {}
    for index, choice in choices.items():
        if choice is None:
            continue
        pair = (choice, options) if isinstance(choice, str) else choice
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], Mapping)):
            raise ValueError(f"Layer {index}: {choice!r}; allowed: None, a variant's key, or (key, options).")
        key, layer_options = pair
        _check_side(model, key)
        window = get_patcher(model.config.model_type).sliding_window(model.config, int(index))
        windowed = any(field.name == WINDOW_OPTION for field in fields(get_variant(key).config_class))
        if window is not None and windowed:
            layer_options = {WINDOW_OPTION: window, **layer_options}
        elif window is not None:
            unbounded.setdefault(key, []).append(int(index))
        resolved[int(index)] = LayerConfig(key, dict(layer_options))
    if not any(resolved):
        raise ValueError("No layer is converted: name at least one layer with a variant.")
    for key, indices in unbounded.items():
        logger.warning_once(
            f"The checkpoint attends to a sliding window of {model.config.sliding_window} tokens in layer(s) "
            f"{', '.join(map(str, indices))}; {key!r} has no window: there it sees whatever its method sees."
        )
    return LinearAttentionConfig(layers=tuple(resolved))


def _is_layer(index: Any, num_layers: int) -> bool:
    return isinstance(index, Integral) and not isinstance(index, bool) and 0 <= int(index) < num_layers


def _check_finite(model: PreTrainedModel) -> None:
    """Raise `ValueError` for weights that are nan or infinite: no attention comes close to what they compute."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for name, parameter in model.named_parameters():
        if parameter.dtype not in dtypes or not parameter.numel():
            continue
        # The extremes, which nan reaches, in place of a mask as large as the weight.
        if not bool(torch.stack(torch.aminmax(parameter.detach())).isfinite().all()):
            raise ValueError(f"The model's weight {name} holds nan or infinite values; load a sound checkpoint.")


def _check_kernels(model: PreTrainedModel, backend: str, keys: Iterable[str]) -> None:
    causal = get_patcher(_family(model)).is_causal(model.config)
    missing = sorted(key for key in keys if not get_variant(key).has_kernel(causal))
    if backend == "triton" and missing:
        side = "decoders" if causal else "encoders"
        raise ValueError(
            f"backend='triton': {', '.join(missing)} has no Triton kernel for {side}. Allowed: 'auto', 'torch'."
        )


def _check_calibration(calibration: Any, steps: Any, lr: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"calibration_steps={steps!r}; allowed: an integer of at least 0.")
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr <= 1e6:
        raise ValueError(f"calibration_lr={lr!r}; allowed: a number above 0.")
    if steps and calibration is None:
        raise ValueError(f"calibration_steps={steps} needs calibration, a list of batches to train on.")


def _check_selection(model: PreTrainedModel, variant: Any, layers: Any, keep_softmax: Any, calibration: Any) -> None:
    if isinstance(layers, str) and layers != "auto":
        raise ValueError(f"layers={layers!r}; allowed: None, layer indices or 'auto'.")
    if layers != "auto":
        if keep_softmax is not None:
            raise ValueError(f"keep_softmax={keep_softmax!r} goes with layers='auto'.")
        return
    most = get_patcher(model.config.model_type).num_layers(model) - 1
    if not isinstance(variant, str):
        raise ValueError("layers='auto' takes a single variant by name, not a mapping of layers.")
    if isinstance(keep_softmax, bool) or not isinstance(keep_softmax, int) or not 1 <= keep_softmax <= most:
        raise ValueError(f"layers='auto' needs keep_softmax from 1 to {most}, got {keep_softmax!r}.")
    if calibration is None:
        raise ValueError("layers='auto' needs calibration, a list of batches on which layers are compared.")


def _check_side(model: PreTrainedModel, key: str) -> None:
    spec = get_variant(key)
    causal = get_patcher(model.config.model_type).is_causal(model.config)
    if not (spec.decoder if causal else spec.encoder):
        side, other = ("a decoder", "encoders") if causal else ("an encoder", "decoders")
        raise ValueError(f"{key!r} serves {other} only and {type(model).__name__} is {side}: {spec.refusal}")


def _check_extension(model: PreTrainedModel, max_length: int | None, mode: str) -> PositionsConfig | None:
    if mode not in ("tile", "interpolate"):
        raise ValueError(f"extend={mode!r} is unknown. Allowed: 'tile', 'interpolate'.")
    patcher = get_patcher(model.config.model_type)
    has_table = patcher.position_table(model) is not None
    if mode == "interpolate" and not has_table:
        raise ValueError(
            f"extend={mode!r} stretches a position table, and {model.config.model_type} has rotary embeddings instead. "
            "Give max_length alone; to slow the rotation down, load the model with other rope_parameters."
        )
    if max_length is None:
        return None
    present = patcher.max_length(model.config)
    if isinstance(max_length, bool) or not isinstance(max_length, int) or not present <= max_length <= MAX_INTEGER:
        raise ValueError(f"max_length={max_length!r} must be an integer of at least {present}, the present limit.")
    if (table := _position_weight(model)) is not None:
        size, memory = 3 * max_length * table.shape[1] * table.element_size(), device_memory(table.device)
        if size > memory:
            raise ValueError(f"max_length={max_length:,} takes {size:,} bytes for positions; there are {memory:,}.")
    return PositionsConfig(original_max_length=present, mode=mode if has_table else "rotary")


# ---------------------------------------------------------------------------------------------------------------
# Configs and positions
# ---------------------------------------------------------------------------------------------------------------


def _converted_config(config: PreTrainedConfig, spec: LinearAttentionConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    fit_config(config, len(spec.layers))
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    config_class: Any = config_class_for(config.model_type)
    new = config_class(**fields, linear_attn=spec.to_dict())
    new.name_or_path = config.name_or_path
    return new


def _upstream_config(config: Any, implementation: str | None) -> PreTrainedConfig:
    """The upstream config; softmax runs as before the conversion, or as Transformers prefers after a reload."""
    drop = ("model_type", "architectures", "linear_attn", "attn_implementation", "auto_map")
    fields = {name: value for name, value in config.to_dict().items() if name not in drop}
    new = get_patcher(config.base_model_type).config_class(**fields, attn_implementation=implementation or "sdpa")
    new.name_or_path = config.name_or_path
    return new


def unmark_unpacked(model: PreTrainedModel) -> None:
    """Let a model be saved whose weights were unpacked from a GGUF file: Transformers may still call it quantized."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == "gguf":
        quantizer.remove_quantization_config(model)


def _forget(model: PreTrainedModel) -> None:
    for name in (_ORIGINAL_POSITIONS, _ORIGINAL_IMPLEMENTATION):
        model.__dict__.pop(name, None)


def _position_weight(model: PreTrainedModel) -> torch.Tensor | None:
    """The position table `[rows, width]`, or None in a family without one."""
    table = get_patcher(_family(model)).position_table(model)
    return None if table is None else getattr(*table).weight.detach()


def _family(model: PreTrainedModel) -> str:
    return getattr(model.config, "base_model_type", model.config.model_type)


def _extend_table(model: PreTrainedModel, max_length: int, mode: str) -> None:
    offset = get_patcher(_family(model)).position_offset(model.config)
    table = _position_weight(model)
    if table is None:
        return
    head, usable = table[:offset], table[offset:]
    if mode == "tile":
        repeats = -(-max_length // usable.shape[0])
        extended = usable.repeat(repeats, 1)[:max_length]
    else:
        extended = F.interpolate(usable.t()[None].float(), size=max_length, mode="linear", align_corners=True)[0].t()
    _restore_table(model, torch.cat([head, extended.to(table.dtype)]))


def _restore_table(model: PreTrainedModel, weight: torch.Tensor | None) -> None:
    if weight is None:
        return
    patcher = get_patcher(_family(model))
    embedding = getattr(*patcher.position_table(model))
    if embedding.weight.shape != weight.shape:
        requires_grad = embedding.weight.requires_grad
        embedding.weight = nn.Parameter(weight.clone(), requires_grad=requires_grad)
        embedding.num_embeddings = weight.shape[0]
        mark_initialized(embedding)
        patcher.resize_position_buffers(model, weight.shape[0])


def _original_table(model: Any, positions: PositionsConfig) -> torch.Tensor | None:
    """The checkpoint's rows of the position table, as trained since where they can be told apart; None without one."""
    rows = positions.original_max_length + get_patcher(model.config.base_model_type).position_offset(model.config)
    table = _position_weight(model)
    if table is None:
        return None
    if positions.mode == "tile":
        return table[:rows]
    stored = getattr(model, _ORIGINAL_POSITIONS, None)
    if stored is None:
        raise ValueError(
            "The position table was interpolated before this model was saved; the checkpoint's own rows are lost. "
            "Pass keep_positions=True to revert the attention only."
        )
    return stored.to(table)
