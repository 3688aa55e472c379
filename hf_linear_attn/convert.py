"""The verb: `convert_model` rewrites a model's attention in place, `revert_model` takes it back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
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
from hf_linear_attn.calibration import (
    DEFAULT_LEARNING_RATE,
    OnProgress,
    calibrate,
    progress_bars,
)
from hf_linear_attn.checks import (
    VariantChoice,
    check_auto,
    check_batches,
    check_extension,
    check_features,
    check_finite,
    check_kernels,
    check_model,
    check_regression,
    check_switch,
    choose_layers,
)
from hf_linear_attn.config import LinearAttentionConfig, PositionsConfig
from hf_linear_attn.layer_choice import KeepBy, layers_to_keep
from hf_linear_attn.patchers.base import ModelPatcher, SelfAttention
from hf_linear_attn.positions import extend_table, position_table, position_weight, set_table
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.report import describe
from hf_linear_attn.seam.places import check_layers, fit_config, layer_numbers, layers_as_they_stand
from hf_linear_attn.variants.base import MAX_INTEGER, AttentionVariant

__all__ = ["convert_model", "extend_positions", "redraw_features", "revert_model", "set_backend", "unmark_unpacked"]

logger = logging.get_logger(__name__)

Built = list[tuple[SelfAttention, AttentionVariant]]
ExtendMode = Literal["tile", "interpolate"]
_ORIGINAL_POSITIONS = "_linear_attn_original_positions"
_ORIGINAL_IMPLEMENTATION = "_linear_attn_original_implementation"


def convert_model(
    model: PreTrainedModel,
    variant: str | Mapping[int, VariantChoice],
    *,
    layers: Iterable[int] | Literal["auto"] | None = None,
    keep_softmax: int | None = None,
    keep_softmax_by: KeepBy | None = None,
    max_length: int | None = None,
    extend: ExtendMode = "tile",
    calibration: Iterable[Mapping[str, Any]] | None = None,
    calibration_steps: int = 0,
    calibration_lr: float = DEFAULT_LEARNING_RATE,
    backend: str = "auto",
    progress: bool = False,
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
            `keep_softmax` layers: those that, converted alone, change what the model gives for the calibration batches
            most.
        keep_softmax: how many layers `layers="auto"` leaves on softmax.
        keep_softmax_by: what a layer must not change: `"output"`, the distributions of the head (by their KL
            divergence); `"states"`, the final hidden states, for a head that was not trained yet. None means
            `"output"` where the head gives distributions, `"states"` elsewhere.
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
        progress: show bars with the time left while calibration runs: on a large model it takes minutes.
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
    check_model(model)
    patcher = get_patcher(model.config.model_type)
    check_layers(patcher, model)
    check_regression(calibration, calibration_steps, calibration_lr)
    check_auto(patcher, model, variant, layers, keep_softmax, keep_softmax_by, calibration)
    check_switch("progress", progress)
    spec = LinearAttentionConfig(
        layers=choose_layers(patcher, model, variant, None if layers == "auto" else layers, options),
        positions=check_extension(patcher, model, max_length, extend),
    )
    check_finite(model)
    check_kernels(patcher, model, backend, spec.variants())
    batches = None if calibration is None else check_batches(calibration, model.config.vocab_size)

    upstream = model.config
    config, built = _build(patcher, model, spec, max_length, backend)
    _warn_of_windows(patcher, upstream, spec)
    with _all_or_nothing(patcher, model):
        _install(patcher, model, config, built, max_length, extend)
        kept: list[int] = []
        with progress_bars() if progress else nullcontext() as told:
            errors = None
            if batches is not None:
                errors = calibrate(model, batches, calibration_steps, calibration_lr, told)
            # Options that were left to the method or to calibration are settled now.
            config.linear_attn = replace(spec, layers=layers_as_they_stand(patcher, model)).to_dict()
            if keep_softmax is not None:
                kept, keep_softmax_by = _back_to_softmax(
                    model, upstream, built, batches, keep_softmax, keep_softmax_by, told
                )
        setattr(model.base_model, REPORT_ATTRIBUTE, describe(model, errors, kept, keep_softmax_by))
        unmark_unpacked(model)
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
    positions = LinearAttentionConfig.from_dict(model.config.linear_attn).positions
    patcher = get_patcher(model.config.base_model_type)
    config, table = _upstream_config(model.config, getattr(model, _ORIGINAL_IMPLEMENTATION, None)), None
    if positions is not None and not keep_positions:
        table = _original_table(patcher, model, positions)
        patcher.set_max_length(config, positions.original_max_length)
    detach(model, config)  # type: ignore[arg-type]
    _forget(model)
    set_table(patcher, model, table)
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
    check_kernels(get_patcher(model.config.base_model_type), model, backend, {x.spec.key for x in variants})
    for variant in variants:
        variant.backend = backend
    return model


def redraw_features(model: nn.Module, seed: int | None = None) -> int:
    """Draw the random features of a converted model anew, in place: between steps of training, as Performers do.

    Only the random directions change. What calibration chose (means, centers, bandwidths) and what was trained stays:
    it belongs to the kernel that any directions estimate, though calibration chose it on those of the conversion, and
    so the report's errors are of them. Layers without random features stay as they are. The options keep their
    `seed`; a checkpoint holds the directions themselves. A decode state is of the directions that it was made with:
    begin a new one.

    Args:
        model: a converted model, or what holds one (PEFT, a composite, `torch.compile`; not a graph whose weights were
            frozen into it).
        seed: the directions become those of a conversion with `seed=seed`; None takes one from torch's generator.

    Returns:
        the seed.

    Raises:
        ValueError: for a bad seed, a model that is not converted or has no random features, or one without its weights
            (meta device, offloaded). Nothing is changed then.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_INTEGER):
        raise ValueError(f"seed={seed!r}; allowed: an integer from 0 to {MAX_INTEGER}, or None.")
    variants = check_features(model)
    seed = int(torch.randint(MAX_INTEGER, ())) if seed is None else seed
    for variant in variants:
        variant.redraw(seed)
    return seed


def extend_positions(model: PreTrainedModel, max_length: int, mode: ExtendMode = "tile") -> PreTrainedModel:
    """Let a softmax model read `max_length` tokens: extends its position table, buffers and config, in place.

    Raises:
        ValueError: for an unknown mode or family, a converted model (use `convert_model(..., max_length=)`), or a
            length below the present one.
    """
    check_model(model)
    patcher = get_patcher(model.config.model_type)
    check_extension(patcher, model, max_length, mode)
    extend_table(patcher, model, max_length, mode)
    patcher.set_max_length(model.config, max_length)
    return model


# ---------------------------------------------------------------------------------------------------------------
# Steps of a conversion
# ---------------------------------------------------------------------------------------------------------------


def _build(
    patcher: ModelPatcher, model: PreTrainedModel, spec: LinearAttentionConfig, max_length: int | None, backend: str
) -> tuple[PreTrainedConfig, Built]:
    """The config that the model will have, and its variants, which know the projections; changes nothing."""
    config = _converted_config(model.config, spec)
    if max_length is not None:
        patcher.set_max_length(config, max_length)
    with torch.no_grad():
        built = build_variants(model, config, spec)
        for attention, variant in built:
            variant.load_projections(*patcher.projections(attention.module))
            variant.backend = backend
    return config, built


def _warn_of_windows(patcher: ModelPatcher, config: PreTrainedConfig, spec: LinearAttentionConfig) -> None:
    """Say which layers will see further than the sliding window that upstream runs them with."""
    unbounded: dict[str, list[str]] = {}
    for index, layer in enumerate(spec.layers):
        if layer is None or WINDOW_OPTION in layer.options or patcher.sliding_window(config, index) is None:
            continue
        unbounded.setdefault(layer.variant, []).append(str(index))
    for key, indices in unbounded.items():
        logger.warning_once(
            f"The checkpoint attends to a sliding window of {config.sliding_window} tokens in layer(s) "
            f"{', '.join(indices)}; {key!r} has no window: there it sees whatever its method sees."
        )


@contextmanager
def _all_or_nothing(patcher: ModelPatcher, model: PreTrainedModel) -> Iterator[None]:
    """Leave the model as it was if the conversion is not finished."""
    config, table, numbers = model.config, position_table(patcher, model), layer_numbers(patcher, model)
    try:
        yield
    except BaseException:  # an interrupt as well: nothing is left half converted
        detach(model, config)
        for module, number in numbers:
            module.layer_idx = number
        set_table(patcher, model, table)
        _forget(model)
        raise


def _install(
    patcher: ModelPatcher,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    built: Built,
    max_length: int | None,
    extend: ExtendMode,
) -> None:
    """Extend the position table and attach the variants; the model remembers what `revert_model` will need."""
    setattr(model, _ORIGINAL_IMPLEMENTATION, model.config._attn_implementation)
    if max_length is not None:
        if extend == "interpolate":
            setattr(model, _ORIGINAL_POSITIONS, position_weight(patcher, model))
        extend_table(patcher, model, max_length, extend)
    attach(model, config, built)


def _back_to_softmax(
    model: PreTrainedModel,
    upstream: PreTrainedConfig,
    built: Built,
    batches: Any,
    count: int,
    by: KeepBy | None,
    on_progress: OnProgress | None,
) -> tuple[list[int], KeepBy]:
    """Take the conversion of the `count` layers back whom it hurts most on the batches; their indices, hurt in what."""
    kept, by = layers_to_keep(model, batches, count, by, on_progress)
    config = model.config
    spec = LinearAttentionConfig.from_dict(config.linear_attn)
    left = tuple(None if index in kept else layer for index, layer in enumerate(spec.layers))
    config.linear_attn = replace(spec, layers=left).to_dict()
    detach(model, upstream)
    attach(model, config, [pair for pair in built if pair[0].layer_idx not in kept])
    return kept, by


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


def _original_table(patcher: ModelPatcher, model: Any, positions: PositionsConfig) -> torch.Tensor | None:
    """The checkpoint's rows of the position table, as trained since where they can be told apart; None without one."""
    table = position_weight(patcher, model)
    if table is None:
        return None
    if positions.mode == "tile":
        return table[: positions.original_max_length + patcher.position_offset(model.config)]
    stored = getattr(model, _ORIGINAL_POSITIONS, None)
    if stored is None:
        raise ValueError(
            "The position table was interpolated before this model was saved; the checkpoint's own rows are lost. "
            "Pass keep_positions=True to revert the attention only."
        )
    return stored.to(table)
