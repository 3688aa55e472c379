"""What a `hf-linear-attn methods` run measures: its recipe, and the methods that the recipe and the registry name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_linear_attn.compare.systems import parse_variants, spell_options
from hf_linear_attn.registry import VariantSpec, get_variant, list_variants
from hf_linear_attn.training.recipe import build_strictly, read_yaml

__all__ = [
    "UNIFORM",
    "CostsRecipe",
    "DocumentsRecipe",
    "Method",
    "MethodsRecipe",
    "ModelRecipe",
    "RegressionRecipe",
    "chosen_methods",
    "leading_methods",
]

UNIFORM = "uniform attention"


@dataclass(frozen=True)
class DocumentsRecipe:
    """Where the tokens come from; starts are chosen on documents of one part and measured on the other's.

    Attributes:
        source: as `hf_linear_attn.data.load_documents` takes it.
        calibration_tokens: tokens that starts are chosen on; at least one document.
        test_tokens: tokens that errors are measured on; at least one document.
    """

    source: str = "sotu"
    calibration_tokens: int = 1024
    test_tokens: int = 1024


@dataclass(frozen=True)
class ModelRecipe:
    """A checkpoint and the layers whose queries, keys and values are recorded.

    Attributes:
        name: Hub id, folder or bundled name.
        lengths: tokens of a document.
        layers: indices of the layers; all when null.
    """

    name: str
    lengths: list[int]
    layers: list[int] | None = None


@dataclass(frozen=True)
class RegressionRecipe:
    """The optional fit of a layer's new parameters to softmax's output on the calibration documents.

    It is tried on the leading options of every variant that holds no matrix of length by length.

    Attributes:
        steps: optimizer steps.
        lengths: document lengths at which it is tried.
        seeds: seeds for which it is tried.
    """

    steps: int = 30
    lengths: list[int] = field(default_factory=lambda: [512])
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class CostsRecipe:
    """The forward pass that is timed: the checkpoint's first layers, softmax (SDPA) and methods taking turns.

    Attributes:
        lengths: tokens of a sequence.
        layers: layers kept; all layers of a model cost the same.
        repeats: timed rounds, the median counts.
        quadratic_up_to: longest sequence for methods that hold a matrix of length by length.
    """

    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192])
    layers: int = 1
    repeats: int = 3
    quadratic_up_to: int = 2048


@dataclass(frozen=True)
class MethodsRecipe:
    """A whole run.

    Attributes:
        models: the checkpoints.
        methods: keys, or one-key mappings to options; a registered variant that is not named runs with its defaults.
            Of several option sets of a variant the first one leads: it is in the table of all methods, and timed.
        seeds: of the choice of documents and of methods that draw at random.
        documents: see `DocumentsRecipe`.
        regression: see `RegressionRecipe`; null for none.
        costs: see `CostsRecipe`; null for none.
        quadratic_up_to: longest document for methods that hold a matrix of length by length.
    """

    models: list[ModelRecipe]
    methods: list[Any]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    documents: DocumentsRecipe = field(default_factory=DocumentsRecipe)
    regression: RegressionRecipe | None = None
    costs: CostsRecipe | None = None
    quadratic_up_to: int = 1024

    @classmethod
    def from_yaml(cls, path: str | Path) -> MethodsRecipe:
        """Read a recipe file.

        Raises:
            ValueError: for an unknown key, a missing one or a bad value.
        """
        return build_strictly(cls, read_yaml(path), "recipe")

    def setting(self) -> dict[str, Any]:
        """What must not change between the rows of one file."""
        models = {model.name: model.layers for model in self.models}
        costs = None if self.costs is None else {"layers": self.costs.layers, "repeats": self.costs.repeats}
        steps = None if self.regression is None else self.regression.steps
        return {"documents": asdict(self.documents), "layers": models, "regression_steps": steps, "costs": costs}


@dataclass(frozen=True)
class Method:
    """A variant with options, or uniform attention, the yardstick."""

    key: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Key and options in one line."""
        return " ".join([self.key, spell_options(self.options)]).strip()

    @property
    def spec(self) -> VariantSpec | None:
        """The registered variant; None for the yardstick."""
        return None if self.key == UNIFORM else get_variant(self.key)

    def serves(self, causal: bool) -> bool:
        """Whether it can run on a decoder (causal) or an encoder."""
        return self.spec is None or (self.spec.decoder if causal else self.spec.encoder)

    def quadratic(self) -> bool:
        """Whether it holds a matrix of length by length."""
        return self.spec is not None and not self.spec.claims_linear_cost(self.options)

    def seeded(self, seed: int) -> dict[str, Any]:
        """The options, with the run's seed for a method that has one."""
        names = [] if self.spec is None else [f.name for f in fields(self.spec.config_class)]
        return {"seed": seed, **self.options} if "seed" in names else self.options


def chosen_methods(recipe: MethodsRecipe, only: list[str] | None = None) -> list[Method]:
    """The recipe's methods, every other registered variant with its defaults, and the yardstick in front.

    Raises:
        ValueError: for an unknown variant or option, or a method that is named twice.
    """
    wanted = only if only is not None else list_variants()
    for key in wanted:
        get_variant(key)
    keys = [entry if isinstance(entry, str) else next(iter(entry)) for entry in recipe.methods]
    entries = [entry for key, entry in zip(keys, recipe.methods, strict=True) if only is None or key in wanted]
    methods = [Method(key, options) for key, options in parse_variants(entries)]
    methods += [Method(key) for key in wanted if key not in keys]
    names = [method.name for method in methods]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Methods that are named twice: {', '.join(repeated)}.")
    return [Method(UNIFORM), *sorted(methods, key=lambda method: method.key)]


def leading_methods(methods: list[Method]) -> list[Method]:
    """The first option set of each variant."""
    return list({method.key: method for method in reversed(methods)}.values())[::-1]
