"""What the registry says of each method, and a report of its start, as text: for commands and the README's tables."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hf_linear_attn.registry import KINDS, VariantSpec

if TYPE_CHECKING:
    from hf_linear_attn.cli.calibration_texts import CalibrationTexts
    from hf_linear_attn.report import ConversionReport

__all__ = [
    "KEEPS",
    "all_facts",
    "by_kind",
    "describe_calibration",
    "exact_limit",
    "exported_form",
    "option_notes",
    "short_facts",
    "spell_defaults",
]

# kind of decode state -> what generation keeps
KEEPS = {"constant": "constant size", "window": "a window of keys", "kv": "all keys", "none": "-"}


def _sides(spec: VariantSpec) -> list[str]:
    """`["encoder", "decoder"]`, or the one it serves."""
    return [side for side, serves in (("encoder", spec.encoder), ("decoder", spec.decoder)) if serves]


def _spell_options(options: dict[str, Any]) -> str:
    """Options as they are written in a call of `convert_model`."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def spell_defaults(spec: VariantSpec) -> list[str]:
    """`name=default` of every option."""
    config = spec.config_class()
    return [f"{field.name}={getattr(config, field.name)!r}" for field in fields(config)]


def option_notes(spec: VariantSpec) -> dict[str, str]:
    """What each option means, in one line, as far as the `Attributes` of its class's docstring say it."""
    section = (inspect.getdoc(spec.config_class) or "").partition("\nAttributes:\n")[2]
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def exact_limit(spec: VariantSpec, length: int) -> dict[str, list[str]]:
    """Options under which a method equals softmax attention at `length`: how they are written -> sides they are for.

    Empty for a method that never does.
    """
    limits: dict[str, list[str]] = {}
    if spec.exact_limit is not None:
        for side in _sides(spec):
            limits.setdefault(_spell_options(spec.exact_limit(length, side == "decoder")), []).append(side)
    return limits


def short_facts(spec: VariantSpec) -> str:
    """What a method is for, and below it what it serves and costs."""
    facts = [" and ".join(f"{side}s" for side in _sides(spec)), f"cost {spec.cost}"]
    facts += [f"generation keeps {KEEPS[spec.state]}"] if spec.state != "none" else []
    return f"{spec.guide[1] if spec.guide else spec.title}\n{'; '.join(facts)}"


def by_kind(specs: Iterable[VariantSpec]) -> dict[str, list[VariantSpec]]:
    """Kind -> its methods, in the order of `KINDS`; those that say none come last, as "other"."""
    groups: dict[str, list[VariantSpec]] = {kind: [] for kind in (*KINDS, "other")}
    for spec in specs:
        groups[spec.guide[0] if spec.guide else "other"].append(spec)
    return {kind: group for kind, group in groups.items() if group}


def exported_form(spec: VariantSpec) -> str:
    """What a program exported from an encoder computes."""
    form = "all pairs of tokens behind a mask, quadratic in length" if spec.masked_export else "the method as it runs"
    form = form if spec.any_length else f"{form}, at one length only"
    return f"{form}; refused: {spec.not_exported}" if spec.not_exported else form


def all_facts(spec: VariantSpec) -> dict[str, str]:
    """Everything that the registry says of a variant."""
    notes = option_notes(spec)
    limits = [f"{options} ({', '.join(sides)})" for options, sides in exact_limit(spec, 128).items()]
    return {
        "variant": spec.key,
        "method": spec.title,
        "paper": spec.paper,
        **({"kind": f"{spec.guide[0]}: {KINDS[spec.guide[0]]}", "for": spec.guide[1]} if spec.guide else {}),
        "serves": " and ".join(f"{side}s" for side in _sides(spec))
        + (f" only. {spec.refusal}" if spec.refusal else ""),
        "cost of attention": spec.cost,
        "generation keeps": KEEPS[spec.state],
        "equals softmax": "\n".join(limits) + " at 128 tokens" if limits else "never",
        "quadratic in length": spec.quadratic or "nothing",
        **({"exported": exported_form(spec)} if spec.encoder else {}),
        "Triton kernel": f"{spec.kernel} ({' and '.join(f'{side}s' for side in spec.kernel_sides)})"
        if spec.kernel
        else "none: plain PyTorch",
        "options": "\n".join(
            f"{default}: {notes[name]}" if (name := default.partition("=")[0]) in notes else default
            for default in spell_defaults(spec)
        ),
    }


def describe_calibration(report: ConversionReport, texts: CalibrationTexts) -> str:
    """Which documents served and what they brought, or what it may cost that none did."""
    if not texts.wanted:
        return (
            "Not calibrated: the start is the method as published, which may be many times further from the checkpoint "
            "than one chosen on documents (--calibration auto, or FILE)."
        )
    errors = [(row.published_error, row.output_error) for row in report.rows if row.output_error is not None]
    before, after = (sum(x or 0.0 for x in column) / len(errors) for column in zip(*errors, strict=True))
    chosen = "the method chooses nothing from documents" if before == after else f"{before:.3f} as published"
    return f"Calibrated on {texts}\nError of the layers against softmax, on average: {after:.3f} ({chosen})"
