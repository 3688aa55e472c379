"""Saved models in a comparison: measured on the documents of the other systems and paired with them, not trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_linear_attn.config import LinearAttentionConfig
from hf_linear_attn.data.tokenization import encode_leading
from hf_linear_attn.measure.rows import RowFile
from hf_linear_attn.saving import saved_at
from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.saved import Evaluation, SavedModel, evaluate_saved, fit_labels, read_saved

if TYPE_CHECKING:
    from hf_linear_attn.data.task import DocumentTask

__all__ = [
    "SAVED",
    "SavedSystem",
    "drop_stale_rows",
    "measure_classifier",
    "saved_classifiers",
    "saved_language_models",
    "saved_row",
]

SAVED = "saved"
"""Stage of the row of a saved language model."""

# What was not done here is not measured.
_TRAINING = ("parameters_trained", "seconds_per_step", "tokens_per_second", "peak_memory_mb", "train_seconds")


@dataclass(frozen=True)
class SavedSystem:
    """A saved model of `evaluation.models`.

    Attributes:
        label: what the recipe calls it.
        saved: the model.
    """

    label: str
    saved: SavedModel

    @property
    def name(self) -> str:
        """What its row is called: no reader may take it for one of the systems that share a budget."""
        return f"{self.label} (trained elsewhere)"

    def facts(self) -> dict[str, Any]:
        """What its rows say of it: its name, and when its weights were written."""
        return {"model": self.saved.name, "saved_at": saved_at(self.saved.name)}

    @property
    def note(self) -> str:
        """A sentence for the report."""
        return (
            f"{self.name} is {self.saved.name}, measured as it was saved: it had no part in the budget, and may have "
            "learned from documents that are test documents here."
        )

    def attention(self) -> tuple[str, dict[str, Any]]:
        """Variant and options, as a row names them: several variants with commas between them, and options where all
        converted layers have the same."""
        conversion = getattr(self.saved.config, "linear_attn", None)
        if conversion is None:
            return "softmax", {}
        read = LinearAttentionConfig.from_dict(conversion)
        options = [layer.options for layer in read.layers if layer is not None]
        if not options:
            return "softmax", {}
        alike = len(read.variants()) == 1 and all(own == options[0] for own in options)
        return ", ".join(read.variants()), dict(options[0]) if alike else {}


def saved_classifiers(recipe: Recipe, task: DocumentTask) -> list[SavedSystem]:
    """The saved models of a comparison that ends with a finetune stage.

    Raises:
        ValueError: for one that `read_saved` refuses, that is for another task, or that does not know a label of the
            documents.
    """
    systems = _read(recipe)
    for system in systems:
        if system.saved.task != task.kind:
            raise ValueError(
                f"evaluation.models: {system.saved.name!r} is for {system.saved.task}, the comparison is of {task.kind}"
            )
        fit_labels(system.saved, task)
    return systems


def saved_language_models(recipe: Recipe, tokenizer: Any, texts: Sequence[str]) -> list[SavedSystem]:
    """The saved models of a comparison of language models.

    Args:
        recipe: of the comparison.
        tokenizer: that the other systems read with.
        texts: the held-out documents.

    Raises:
        ValueError: for one that `read_saved` refuses, that is no causal language model, that reads fewer tokens than
            are measured, or that reads the documents as other tokens: perplexities are of a token.
    """
    systems, longest = _read(recipe), max(recipe.evaluation.perplexity_lengths)
    for system in systems:
        saved = system.saved
        if saved.auto != "AutoModelForCausalLM":
            raise ValueError(f"evaluation.models: {saved.name!r} is read by {saved.auto}, not by AutoModelForCausalLM")
        saved.reads(longest)
        if encode_leading(texts, saved.tokenizer, longest) != encode_leading(texts, tokenizer, longest):
            raise ValueError(
                f"evaluation.models: {saved.name!r} reads the held-out documents as other tokens than "
                f"{recipe.model.name!r}, and perplexities of other tokens do not compare"
            )
    return systems


def drop_stale_rows(systems: Sequence[SavedSystem], rows: RowFile) -> list[str]:
    """Forget the rows of models that were saved anew since an earlier run; a sentence about each.

    Raises:
        ValueError: where a row of an earlier run holds another model under the same name.
    """
    sentences = []
    for system in systems:
        row = rows.find(system=system.name, stage=SAVED)
        if row is not None and row["model"] != system.saved.name:
            raise ValueError(
                f"evaluation.models: {system.label!r} was {row['model']!r} in the run that this one goes on with, "
                f"and is {system.saved.name!r} now: give it another name"
            )
        if row is not None and row.get("saved_at") != system.facts()["saved_at"]:
            rows.drop(system=system.name, stage=SAVED)
            sentences.append(f"{system.name}: {system.saved.name} was saved anew, and is measured again.")
    return sentences


def _read(recipe: Recipe) -> list[SavedSystem]:
    return [SavedSystem(entry.label, read_saved(entry.path)) for entry in recipe.evaluation.saved_models]


def measure_classifier(
    system: SavedSystem, task: DocumentTask, arguments: Mapping[str, Any]
) -> tuple[Evaluation, np.ndarray]:
    """Measure a saved classifier on the test part of `task`.

    Returns:
        what was measured, and the predicted classes `[N]` in the documents' own numbers; a label of the model that they
        do not have gets a number after theirs.

    Raises:
        ValueError: see `evaluate_saved`.
    """
    found = evaluate_saved(system.saved, task, arguments=arguments)
    places = fit_labels(system.saved, task)
    own = {place: number for number, place in enumerate(places)}
    return found, np.array([own.get(label, len(places) + label) for label in found.predictions])


def saved_row(
    system: SavedSystem,
    found: Evaluation,
    predictions: np.ndarray,
    quality: dict[str, Any],
    difference: dict[str, float] | None,
) -> dict[str, Any]:
    """The row of a saved classifier, see `hf_linear_attn.compare.schema`."""
    variant, options = system.attention()
    return {
        "name": system.name,
        "variant": variant,
        "options": options,
        "max_length": found.max_length,
        "quality": quality,
        "difference_to_baseline": difference,
        "parameters_total": found.parameters_total,
        "parameters_added": found.parameters_added,
        **dict.fromkeys(_TRAINING),
        "forward": [],
        "eval_documents": len(predictions),
        "predictions": [int(prediction) for prediction in predictions],
    }
