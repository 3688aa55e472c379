"""Which parameters train: all, the new ones, the head, the last layers, or low-rank adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.extra_tokens import ExtraTokens
from hf_linear_attn.variants.base import AttentionVariant

__all__ = [
    "TRAINABLE",
    "Lora",
    "check_trainable",
    "choose_trainable",
    "freeze_dropout",
    "head_parameters",
    "last_layers",
    "optimizer_groups",
    "transformer_layers",
    "variants_of",
]

TRAINABLE = ("all", "new", "head", "lora", "last_layers:<k>")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (PEFT).

    Attributes:
        r: rank.
        alpha: scale numerator.
        dropout: dropout of the adapters' input.
        target_modules: names of the linear layers that get one; every projection of the self-attention blocks (queries,
            keys, values and output) when None.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("r", "alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"lora.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}")


def last_layers(trainable: str) -> int | None:
    """The k of `last_layers:<k>`, 0 for `head`, None otherwise."""
    if trainable == "head":
        return 0
    kind, _, count = trainable.partition(":")
    return int(count) if kind == "last_layers" else None


def check_trainable(trainable: str) -> None:
    """Raise `ValueError` unless `trainable` is one of `TRAINABLE`."""
    kind, _, count = trainable.partition(":")
    if trainable in TRAINABLE[:-1] or (kind == "last_layers" and count.strip().isdigit() and int(count) > 0):
        return
    raise ValueError(f"trainable is one of {', '.join(TRAINABLE)}, got {trainable!r}")


def transformer_layers(model: nn.Module) -> nn.ModuleList:
    """The list of transformer layers of a model (the `ModuleList` inside its base model that has one per layer).

    Raises:
        ValueError: if there is none.
    """
    wanted = model.config.num_hidden_layers  # type: ignore[union-attr]
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and ".linear_attn" not in name
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of {wanted} layers; trainable parts need one")
    return found[0]


def variants_of(model: nn.Module) -> list[AttentionVariant]:
    """The attention variants of a model, layer by layer; none for a model that is not converted."""
    return [module for module in model.modules() if isinstance(module, AttentionVariant)]


def _added_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What a conversion added to a model: the variants' parameters, and the tokens that travel through its layers."""
    added = [module for module in model.modules() if isinstance(module, AttentionVariant | ExtraTokens)]
    return [parameter for module in added for parameter in module.parameters()]


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the task head: everything outside the base model, and the base model's pooler."""
    base: nn.Module = model.base_model  # type: ignore[assignment]
    in_base = {id(parameter) for parameter in base.parameters()}
    pooler = getattr(base, "pooler", None)
    pooled = set() if pooler is None else {id(parameter) for parameter in pooler.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in in_base or id(parameter) in pooled
    }


def choose_trainable(model: Any, trainable: str, lora: Lora | None = None, *, with_head: bool) -> tuple[Any, str]:
    """Set `requires_grad` on every parameter.

    Args:
        model: with its head.
        trainable: one of `TRAINABLE`.
        lora: options of `lora`.
        with_head: whether the head trains too, whatever else does: it is new.

    Returns:
        the model (wrapped by PEFT for `lora`) and a sentence that says what trains.

    Raises:
        ValueError: for another word, fewer layers than `last_layers:<k>` asks for, or if nothing would train.
    """
    check_trainable(trainable)
    if trainable == "all":
        model.requires_grad_(True)
        return model, "all parameters"
    head = head_parameters(model) if with_head or trainable == "head" else {}
    chosen: list[nn.Parameter] = list(head.values())
    names = ["the head (classifier and pooler)"] if head else []
    if trainable in ("new", "lora"):
        added = _added_parameters(model)
        chosen += added
        names[:0] = ["the conversion's new parameters"] if added else []
    if count := last_layers(trainable):
        layers = transformer_layers(model)
        if count > len(layers):
            raise ValueError(f"trainable={trainable!r}, but the model has {len(layers)} layers")
        chosen += [parameter for layer in layers[len(layers) - count :] for parameter in layer.parameters()]
        names[:0] = [f"the last {count} of {len(layers)} layers"]
    model.requires_grad_(False)
    if trainable == "lora":
        model, sentence = _with_adapters(model, lora or Lora(), head)
        return model, " and ".join([sentence, *names])
    if not chosen:
        raise ValueError(f"trainable={trainable!r} leaves {type(model).__name__} nothing to train")
    for parameter in chosen:
        parameter.requires_grad_(True)
    return model, " and ".join(names)


def _with_adapters(model: Any, options: Lora, head: Iterable[str]) -> tuple[Any, str]:
    """The model wrapped by PEFT, which saves what the conversion added and the head beside the adapters."""
    from peft import LoraConfig, get_peft_model

    if any(variant.shared_parameters() for variant in variants_of(model)):
        raise ValueError(
            "trainable='lora' keeps a copy of each layer's new parameters, and here layers share theirs; allowed: "
            "trainable='all' or 'new', or options that share nothing between layers"
        )
    targets = options.target_modules or attention_projections(model)
    saved = {name.split(".")[1 if name.startswith(f"{model.base_model_prefix}.") else 0] for name in head}
    if _added_parameters(model):
        saved.add("linear_attn")
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        modules_to_save=sorted(saved) or None,
        fan_in_fan_out=_are_transposed(model, targets),
    )
    return get_peft_model(model, config), f"LoRA (r={options.r}) on {', '.join(targets)}"


def attention_projections(model: nn.Module) -> list[str]:
    """Names, inside a layer, of the linear projections of the self-attention block: q, k, v and output."""
    config: Any = model.config
    patcher = get_patcher(getattr(config, "base_model_type", config.model_type))
    place = patcher.self_attentions(model)[0]
    path = place.name.split(f".{place.layer_idx}.", 1)[1]
    block = path.split(".")[0]
    layer: Any = patcher.layers(model)[place.layer_idx]
    inside = getattr(layer, block)
    return [
        f"{block}.{name}"
        for name, module in inside.named_modules()
        if ".linear_attn" not in f".{name}" and getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]


def _are_transposed(model: nn.Module, targets: list[str]) -> bool:
    """Whether the target layers keep their weight as [in, out], as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(
        isinstance(module, Conv1D) and any(name.endswith(f".{target}") for target in targets)
        for name, module in model.named_modules()
    )


def freeze_dropout(model: nn.Module) -> None:
    """Put modules without a trained parameter in eval mode: a frozen layer has no reason to drop anything, and its
    output can then be computed once. Call it after `model.train()`."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def optimizer_groups(
    model: Any,
    *,
    learning_rate: float,
    weight_decay: float,
    head_learning_rate: float | None = None,
    new_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: rates of their own for the head and for what a conversion added, and no weight
    decay on biases and normalization (anything with fewer than two dimensions)."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = {id(parameter) for parameter in head_parameters(base).values()}
    new = {id(parameter) for parameter in _added_parameters(model)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = learning_rate
            if id(parameter) in head and head_learning_rate is not None:
                rate = head_learning_rate
            elif id(parameter) in new and new_learning_rate is not None:
                rate = new_learning_rate
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]
