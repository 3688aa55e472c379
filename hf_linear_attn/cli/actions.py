"""What the commands call: load, run, save. No terminal here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_linear_attn.evaluation.compare import Comparison
    from hf_linear_attn.report import ConversionReport
    from hf_linear_attn.training.recipe import Recipe
    from hf_linear_attn.training.trainer import TrainResult

__all__ = ["convert_checkpoint", "run_comparison", "run_training"]


def convert_checkpoint(
    name: str,
    variant: str,
    output: Path,
    *,
    options: dict[str, Any],
    max_length: int | None,
    extend: str,
    layers: list[int] | None,
) -> ConversionReport:
    """Load `name` with the head its config names, convert it, save it and its tokenizer to `output`."""
    import transformers

    from hf_linear_attn.convert import convert_model
    from hf_linear_attn.data.models import resolve_model, resolve_model_kwargs

    path, kwargs = resolve_model(name), resolve_model_kwargs(name)
    config = transformers.AutoConfig.from_pretrained(path, **kwargs)
    architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    model: Any = convert_model(
        architecture.from_pretrained(path, **kwargs),
        variant,
        layers=layers,
        max_length=max_length,
        extend=extend,  # type: ignore[arg-type]
        **options,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **kwargs)
    tokenizer.model_max_length = model.conversion_report.tokenizer_max_length
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model.conversion_report


def run_training(recipe: Recipe) -> TrainResult | None:
    """Train; the result on the main process, None on the others."""
    from accelerate import PartialState

    from hf_linear_attn.training.setup import reuse_freed_memory
    from hf_linear_attn.training.trainer import train

    reuse_freed_memory()
    result = train(recipe)
    state = PartialState()
    main = state.is_main_process
    state.destroy_process_group()
    return result if main else None


def run_comparison(recipe: Recipe, variants: list[str] | None, title: str, command: str) -> Comparison | None:
    """Compare; the comparison on the main process, None on the others."""
    from accelerate import PartialState

    from hf_linear_attn.evaluation.compare import compare
    from hf_linear_attn.training.setup import reuse_freed_memory

    reuse_freed_memory()
    comparison = compare(recipe, variants, title=title, command=command)
    state = PartialState()
    main = state.is_main_process
    state.destroy_process_group()
    return comparison if main else None
