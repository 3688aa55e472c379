"""Which parameters train: all, the new ones, the head, the last layers, or low-rank adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from hf_linear_attn.training.recipe import TrainingRecipe

__all__ = ["apply_trainable", "freeze_dropout", "head_parameters", "optimizer_groups", "transformer_layers"]


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


def _added_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".linear_attn." in name}


def apply_trainable(model: Any, recipe: TrainingRecipe) -> tuple[Any, str]:
    """Set `requires_grad` on every parameter as `recipe.trainable` says.

    Returns:
        the model (wrapped by PEFT for `lora`) and a sentence that says what trains.

    Raises:
        ValueError: if there are fewer layers than `last_layers:<k>` asks for.
    """
    kind = recipe.trainable
    if kind == "all":
        model.requires_grad_(True)
        return model, "all parameters"
    head = head_parameters(model)
    model.requires_grad_(False)
    chosen: dict[str, nn.Parameter] = dict(head)
    sentence = "the head (classifier and pooler)"
    if kind in ("new", "lora"):
        chosen.update(_added_parameters(model))
        sentence = "the conversion's new parameters and the head"
    if recipe.last_layers:
        layers = transformer_layers(model)
        if recipe.last_layers > len(layers):
            raise ValueError(f"training.trainable={kind!r}, but the model has {len(layers)} layers")
        for layer in layers[len(layers) - recipe.last_layers :]:
            chosen.update({f"layer.{name}": p for name, p in layer.named_parameters()})
        sentence = f"the last {recipe.last_layers} of {len(layers)} layers and the head"
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        options = recipe.lora
        model = get_peft_model(
            model,
            LoraConfig(
                r=options.r,
                lora_alpha=options.alpha,
                lora_dropout=options.dropout,
                target_modules=options.target_modules,
            ),
        )
        sentence = (
            f"LoRA (r={options.r}) on {', '.join(options.target_modules)}, the conversion's new parameters and the head"
        )
    # after PEFT, which freezes everything but its adapters
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return model, sentence


def freeze_dropout(model: nn.Module) -> None:
    """Put modules without a trained parameter in eval mode: a frozen layer has no reason to drop anything, and its
    output can then be computed once. Call it after `model.train()`."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def optimizer_groups(model: Any, recipe: TrainingRecipe) -> list[dict[str, Any]]:
    """AdamW parameter groups: the head's learning rate apart, no decay on biases and normalization."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = {id(parameter) for parameter in head_parameters(base).values()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in head, parameter.ndim > 1), []).append(parameter)
    head_rate = recipe.learning_rate if recipe.head_learning_rate is None else recipe.head_learning_rate
    return [
        {
            "params": parameters,
            "lr": head_rate if is_head else recipe.learning_rate,
            "weight_decay": recipe.weight_decay if decay else 0.0,
        }
        for (is_head, decay), parameters in groups.items()
    ]
