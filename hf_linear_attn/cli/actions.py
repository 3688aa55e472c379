"""What the commands call: load, run, save. No terminal here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hf_linear_attn.cli.calibration_texts import CalibrationTexts
    from hf_linear_attn.compare.run import Comparison
    from hf_linear_attn.report import ConversionReport
    from hf_linear_attn.training.recipe import Recipe
    from hf_linear_attn.training.run import TrainResult

__all__ = ["check_options", "convert_checkpoint", "run_comparison", "run_language_comparison", "run_training"]


def convert_checkpoint(
    name: str,
    variant: str,
    output: Path,
    *,
    options: dict[str, Any],
    max_length: int | None,
    extend: str,
    layers: list[int] | Literal["auto"] | None,
    keep_softmax: int | None,
    keep_softmax_by: str | None,
    calibration: CalibrationTexts,
    calibration_steps: int,
    progress: bool,
) -> ConversionReport:
    """Load `name` with the head its config names, convert it, and save it to `output`.

    Its tokenizer and what else of its folder still holds go there too. Of a checkpoint that lies there nothing that
    loading reads is left; other files stay. `calibration` knows afterwards which documents served.
    """
    from hf_linear_attn.convert import convert_model
    from hf_linear_attn.data.companions import checkpoint_folder, find_companions
    from hf_linear_attn.data.models import load_checkpoint, load_tokenizer, resolve_model
    from hf_linear_attn.registry import get_patcher

    check_options(variant, options)
    if not calibration.wanted and (calibration_steps or layers == "auto"):
        what = "--layers auto" if layers == "auto" else f"--calibration-steps {calibration_steps}"
        raise ValueError(f"{what} needs documents, and --calibration none names none.")
    tokenizer = load_tokenizer(name)
    checkpoint = load_checkpoint(name)
    companions = find_companions(resolve_model(name))

    def batches() -> Iterator[dict[str, Any]]:  # read after everything else was checked
        limit = max_length or get_patcher(checkpoint.config.model_type).max_length(checkpoint.config)
        yield from calibration.batches(tokenizer, limit)

    model: Any = convert_model(
        checkpoint,
        variant,
        layers=layers,
        keep_softmax=keep_softmax,
        keep_softmax_by=keep_softmax_by,  # type: ignore[arg-type]
        max_length=max_length,
        extend=extend,  # type: ignore[arg-type]
        calibration=batches() if calibration.wanted else None,
        calibration_steps=calibration_steps,
        progress=progress,
        **options,
    )
    report = model.conversion_report
    tokenizer.model_max_length = report.tokenizer_max_length
    with checkpoint_folder(output, companions, None if max_length is None else report.tokenizer_max_length) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    return report


def check_options(variant: str, options: dict[str, Any]) -> None:
    """Raise `ValueError` for an unknown variant or option: before anything is loaded, and before an option could be
    taken for another argument of `convert_model`."""
    from hf_linear_attn.registry import get_variant

    config: Any = get_variant(variant).config_class
    config.from_dict(options)


def run_training(recipe: Recipe, **options: Any) -> TrainResult | None:
    """Train, with the options of `train`; the result on the main process, None on the others."""
    from hf_linear_attn.training.run import train

    return _on_main_process(partial(train, recipe, **options))


def run_language_comparison(
    recipe: Recipe, variants: list[str] | None, command: str, fresh: bool
) -> dict[str, Any] | None:
    """Compare language models; the results on the main process, None on the others."""
    from hf_linear_attn.compare.language import compare_language

    return _on_main_process(partial(compare_language, recipe, variants, command=command, fresh=fresh))


def run_comparison(
    recipe: Recipe, variants: list[str] | None, title: str, command: str, fresh: bool
) -> Comparison | None:
    """Compare; the comparison on the main process, None on the others."""
    from hf_linear_attn.compare.run import compare

    return _on_main_process(partial(compare, recipe, variants, title=title, command=command, fresh=fresh))


def _on_main_process(run: Callable[[], Any]) -> Any:
    from accelerate import PartialState

    from hf_linear_attn.training.setup import reuse_freed_memory

    reuse_freed_memory()
    result = run()
    state = PartialState()
    main = state.is_main_process
    state.destroy_process_group()
    return result if main else None
