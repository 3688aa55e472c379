"""What a `hf-linear-attn methods` run measures: its recipe, and the methods that the recipe and the registry name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_linear_attn.measure.methods import Method, parse_methods
from hf_linear_attn.measure.strict import build_strictly, read_yaml

__all__ = [
    "UNIFORM",
    "CostsRecipe",
    "DocumentsRecipe",
    "MethodsRecipe",
    "ModelRecipe",
    "RegressionRecipe",
    "Yardstick",
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

    It is tried on every variant that holds no matrix of length by length; layers that share a parameter are fitted
    together.

    Attributes:
        steps: optimizer steps.
        lengths: document lengths at which it is tried.
        seeds: seeds for which it is tried.
        all_options: whether it is tried on every option set of a variant, not on the leading one alone.
    """

    steps: int = 30
    lengths: list[int] = field(default_factory=lambda: [512])
    seeds: list[int] = field(default_factory=lambda: [0])
    all_options: bool = False


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
class Yardstick(Method):
    """Uniform attention, which a method must beat."""

    key: str = UNIFORM

    def __post_init__(self) -> None:
        """There is no such variant."""

    def serves(self, is_causal: bool) -> bool:
        return True

    def quadratic(self) -> bool:
        return False


def chosen_methods(recipe: MethodsRecipe, only: list[str] | None = None) -> list[Method]:
    """The recipe's methods, every other registered variant with its defaults, and the yardstick in front.

    Raises:
        ValueError: as `parse_methods`.
    """
    methods = parse_methods(recipe.methods, rest=True, only=only)
    return [Yardstick(), *sorted(methods, key=lambda method: method.key)]


def leading_methods(methods: list[Method]) -> list[Method]:
    """The first option set of each variant."""
    return list({method.key: method for method in reversed(methods)}.values())[::-1]
