"""The conversion report: what each layer runs now, what it added, and how far it starts from softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.extra_tokens import extra_tokens_of
from hf_linear_attn.seam.heads import choices_of
from hf_linear_attn.variants.base import AttentionVariant

__all__ = ["ConversionReport", "LayerReport", "OutputErrors", "describe"]


@dataclass(frozen=True)
class OutputErrors:
    """How far one layer's output is from softmax's on some batches, over real tokens.

    Attributes:
        error: `||o - o_softmax|| / ||o_softmax||`.
        cosine: mean cosine of each token's output with softmax's.
        head_errors: the same error in each head.
        head_cosines: the same cosine in each head.
        published_error: what `error` was of the start as published, or None where that was not measured.
        zeros: share of the weights between real tokens that are exactly 0; None for a method that does not learn which
            are (`AttentionVariant.zero_weights`).
        head_zeros: the same share in each head.
    """

    error: float
    cosine: float
    head_errors: list[float]
    head_cosines: list[float]
    published_error: float | None = None
    zeros: float | None = None
    head_zeros: list[float] | None = None


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        layer: index of the layer.
        variant: key of the attention variant, or `"softmax"`.
        new_parameters: parameters the variant added (shared ones are counted in the first layer that holds them).
        state: kind of decode state, or `"kv"` for softmax.
        output_error: relative error of the layer's output against softmax on the calibration batches
            (`||o - o_softmax|| / ||o_softmax||` over real tokens), or None when not calibrated.
        output_cosine: mean cosine of each token's output with softmax's, or None when not calibrated.
        head_errors: the relative error of each head, or None when not calibrated.
        head_cosines: the mean cosine of each head, or None when not calibrated.
        published_error: the relative error of the start as published, before anything was chosen from the calibration
            batches, or None when not calibrated.
        chosen: options that were left to the method or to calibration, and what they came to: `{"k": [40, 17]}`.
        zeros: share of the weights between real tokens that are exactly 0 on the calibration batches, of a method that
            learns which are; None of any other, or when not calibrated.
        head_zeros: the same share in each head.
    """

    layer: int
    variant: str
    new_parameters: int
    state: str
    output_error: float | None = None
    output_cosine: float | None = None
    head_errors: list[float] | None = None
    head_cosines: list[float] | None = None
    published_error: float | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    zeros: float | None = None
    head_zeros: list[float] | None = None


@dataclass(frozen=True)
class ConversionReport:
    """All layers of a converted model.

    Attributes:
        rows: one `LayerReport` per layer.
        max_length: longest sequence (tokens) the model reads now.
        kept_softmax: layers that `layers="auto"` left on softmax, where converting hurt most.
        kept_softmax_by: what was hurt: `"output"` (the distribution that the head gives) or `"states"` (the final
            hidden states); None where that is not known.
        global_tokens: which tokens are global in calls that name none, of layers that choose them by the model's head
            or by their ids; None where none does.
        extra_parameters: parameters of the tokens that travel through the layers (`seam.extra_tokens`).
        tokenizer_max_length: what `tokenizer.model_max_length` should be set to.
    """

    rows: list[LayerReport] = field(default_factory=list)
    max_length: int = 0
    kept_softmax: list[int] = field(default_factory=list)
    kept_softmax_by: str | None = None
    global_tokens: str | None = None
    extra_parameters: int = 0

    def errors_of(self, layer: int | None) -> OutputErrors | None:
        """What was measured of a layer, by index, or None."""
        row: Any = next((row for row in self.rows if row.layer == layer), None)
        if row is None or row.output_error is None:
            return None
        heads = row.head_errors, row.head_cosines
        return OutputErrors(row.output_error, row.output_cosine, *heads, row.published_error, row.zeros, row.head_zeros)

    @property
    def tokenizer_max_length(self) -> int:
        """The tokenizer's limit equals the model's: special tokens count as tokens."""
        return self.max_length

    @property
    def new_parameters(self) -> int:
        """Parameters added to the whole model."""
        return self.extra_parameters + sum(row.new_parameters for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "max_length": self.max_length,
            "kept_softmax": list(self.kept_softmax),
            "kept_softmax_by": self.kept_softmax_by,
            "global_tokens": self.global_tokens,
            "tokenizer_max_length": self.tokenizer_max_length,
            "new_parameters": self.new_parameters,
        }

    def __str__(self) -> str:
        header = ["layer", "variant", "new parameters", "state", "as published", "error", "cosine"]
        if sparse := any(row.zeros is not None for row in self.rows):
            header.append("weights of 0")
        body = [
            [
                str(row.layer),
                row.variant,
                f"{row.new_parameters:,}",
                row.state,
                *("-" if x is None else f"{x:.3f}" for x in (row.published_error, row.output_error, row.output_cosine)),
                *(["-" if row.zeros is None else f"{row.zeros:.1%}"] if sparse else []),
            ]
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *body]
        ]
        told = dict.fromkeys(spelled for row in self.rows if (spelled := _spell_chosen(row.chosen)))
        for spelled in told:
            layers = ", ".join(str(row.layer) for row in self.rows if _spell_chosen(row.chosen) == spelled)
            lines.append(f"chosen in layer {layers}: {spelled}")
        if self.kept_softmax:
            kept = ", ".join(map(str, self.kept_softmax))
            hurt = {"output": " the output", "states": " the final hidden states", None: ""}[self.kept_softmax_by]
            lines.append(f"layers that keep softmax, where converting hurt{hurt} most on the batches: {kept}")
        if self.global_tokens is not None:
            lines.append(f"global tokens, where a call has no global_attention_mask: {self.global_tokens}")
        lines.append(
            f"{self.new_parameters:,} new parameters; reads up to {self.max_length:,} tokens "
            f"(set tokenizer.model_max_length = {self.tokenizer_max_length})"
        )
        return "\n".join(lines)


def _spell_chosen(chosen: Mapping[str, Any]) -> str:
    """`k=17 to 40 (mean 29)`; of a list of equal numbers the number."""
    spelled = []
    for name, value in chosen.items():
        numbers = value if isinstance(value, list) else [value]
        mean = "" if len(set(numbers)) == 1 else f" to {max(numbers)} (mean {sum(numbers) / len(numbers):.0f})"
        spelled.append(f"{name}={min(numbers)}{mean}")
    return ", ".join(spelled)


def describe(
    model: Any,
    errors: dict[int, OutputErrors] | None = None,
    kept_softmax: Sequence[int] = (),
    kept_softmax_by: str | None = None,
) -> ConversionReport:
    """Report of a converted model.

    Args:
        model: the converted model.
        errors: how far a layer is from softmax, by index.
        kept_softmax: layers that were left on softmax by measurement.
        kept_softmax_by: of what, see `ConversionReport`.
    """
    patcher: Any = get_patcher(model.config.base_model_type)
    rows: list[LayerReport] = []
    counted: set[int] = set()
    for attention in patcher.self_attentions(model):
        variant: AttentionVariant | None = getattr(attention.module, "linear_attn", None)
        if variant is None:
            rows.append(LayerReport(attention.layer_idx, "softmax", 0, "kv"))
            continue
        fresh = [p for p in variant.parameters() if id(p) not in counted]
        counted.update(id(p) for p in fresh)
        found = (errors or {}).get(attention.layer_idx)
        rows.append(
            LayerReport(
                layer=attention.layer_idx,
                variant=variant.spec.key,
                new_parameters=sum(p.numel() for p in fresh),
                state=variant.spec.state,
                output_error=None if found is None else found.error,
                output_cosine=None if found is None else found.cosine,
                head_errors=None if found is None else found.head_errors,
                head_cosines=None if found is None else found.head_cosines,
                published_error=None if found is None else found.published_error,
                chosen=variant.chosen(),
                zeros=None if found is None else found.zeros,
                head_zeros=None if found is None else found.head_zeros,
            )
        )
    chosen = ", ".join(dict.fromkeys(x.words for x in choices_of(model, model.linear_attn_task).values())) or None
    extra = extra_tokens_of(model)
    of_extra = 0 if extra is None else extra.tokens.numel()
    limit = patcher.max_length(model.config)
    return ConversionReport(rows, limit, list(kept_softmax), kept_softmax_by, chosen, of_extra)
