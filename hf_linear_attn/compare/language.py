"""Language models under one budget: perplexity after each stage, beside the checkpoint trained on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from accelerate.utils import set_seed

from hf_linear_attn.data import load_config
from hf_linear_attn.data.tokenization import encode_leading
from hf_linear_attn.measure.bootstrap import bootstrap_statistic
from hf_linear_attn.measure.markdown import markdown_table
from hf_linear_attn.measure.methods import Method, failures, not_measured, parse_methods
from hf_linear_attn.measure.perplexity import document_likelihoods
from hf_linear_attn.measure.rows import RowFile, about_machine
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.saving import write_json
from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.run import train
from hf_linear_attn.training.setup import auto_class, build_model, build_tokenizer, load_head, load_task
from hf_linear_attn.variants.base import LayerContext

__all__ = ["BUDGETED", "CHECKPOINT", "compare_language", "language_table"]

CHECKPOINT = "softmax"
BUDGETED = "softmax, same tokens"
CONVERTED = "converted"


def compare_language(
    recipe: Recipe,
    variants: Sequence[Any] | None = None,
    *,
    command: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the checkpoint, the checkpoint uptrained on as many tokens, and each variant after each stage.

    A row is written as soon as it is measured, and stages that are finished are not run again: a comparison that was
    cut off goes on where it stopped. Perplexities are of the first `evaluation.lengths` tokens of the held-out
    documents that are that long, the same documents for every system.

    Args:
        recipe: its stages train language models (no `finetune`); `conversion` gives layers, extension and calibration.
        variants: see `parse_methods`; `evaluation.variants` when None. `evaluation.controls` are converted and
            measured, and not trained.
        command: what to write down as the command that made it.
        say: called with a line about each row.

    Returns:
        `{"meta": {...}, "recipe": {...}, "documents": {...}, "rows": [...]}`, which lies in `output_dir` too, as
        `language.json` and `language.md`. A system that fails has a row that says why, and is tried again.

    Raises:
        ValueError: for a recipe with another last stage, an encoder, lengths that no held-out document has, or rows
            of another recipe in `output_dir`.
    """
    return _Language(recipe, variants, command, say).run()


class _Language:
    def __init__(
        self, recipe: Recipe, variants: Sequence[Any] | None, command: str, say: Callable[[str], None]
    ) -> None:
        if recipe.stages[-1].kind == "finetune":
            raise ValueError("A comparison of language models takes stages transfer, distill or uptrain, got finetune")
        self.recipe, self.say, self.command = recipe, say, command
        self.methods = parse_methods(recipe.evaluation.variants if variants is None else variants)
        self.controls = parse_methods(recipe.evaluation.controls)
        self.output = recipe.output_dir
        self.tokenizer = build_tokenizer(recipe)
        self.task = load_task(recipe.data, "text")
        self.auto = auto_class(recipe.stages[0], recipe.model.name)
        if self.auto != "AutoModelForCausalLM":
            raise ValueError(f"{recipe.model.name!r} is read by {self.auto}; perplexities are of AutoModelForCausalLM")
        self.documents, self.groups = self._held_out()
        setting = {"recipe": recipe.to_dict(), "documents": {str(n): len(x) for n, x in self.documents.items()}}
        setting["recipe"]["evaluation"].pop("variants")  # more of them may join later
        setting["recipe"]["evaluation"].pop("controls")
        self.rows = RowFile(self.output / "language.rows.jsonl", setting)

    def _held_out(self) -> tuple[dict[int, list[list[int]]], dict[int, list[str]]]:
        lengths = self.recipe.evaluation.lengths
        encoded = encode_leading(list(self.task.test["text"]), self.tokenizer, max(lengths))
        names = list(self.task.test["group"])
        kept = {n: [place for place, ids in enumerate(encoded) if len(ids) >= n] for n in lengths}
        if short := [n for n, places in kept.items() if not places]:
            raise ValueError(f"No held-out document has {short[0]} tokens (evaluation.lengths)")
        documents = {n: [encoded[place] for place in places] for n, places in kept.items()}
        return documents, {n: [names[place] for place in places] for n, places in kept.items()}

    def run(self) -> dict[str, Any]:
        """Measure what is not measured yet."""
        self._measure(CHECKPOINT, "checkpoint", {}, partial(self._load, self.recipe.model.name))
        self._trained(BUDGETED, self._budgeted())
        for method in self.controls:
            self._measure(method.name, CONVERTED, {"control": True}, partial(self._convert, method))
        for method in self.methods:
            self._measure(method.name, CONVERTED, {}, partial(self._convert, method))
            self._trained(method.name, self._recipe_of(method))
        results = self.results()
        write_json(self.output / "language.json", results)
        (self.output / "language.md").write_text(language_table(results) + "\n", encoding="utf-8")
        return results

    # Systems -----------------------------------------------------------------------------------------------------

    def _recipe_of(self, method: Method) -> Recipe:
        folder = self.output / method.name.replace(" ", "_").replace("=", "_")
        base = self.recipe.to_dict()
        conversion = {**(base["conversion"] or {}), "variant": method.key, "options": method.options}
        base |= {"conversion": conversion, "training": {**base["training"], "output_dir": str(folder)}}
        if not self._has_parameters(method):  # nothing to transfer
            base["stages"] = [stage for stage in base["stages"] if stage["stage"] != "transfer"]
        return Recipe.from_dict(base)

    def _has_parameters(self, method: Method) -> bool:
        """Whether a method's layers have parameters of their own, on a model like the recipe's."""
        config = load_config(self.recipe.model.name)
        patcher = get_patcher(config.model_type)
        heads, dim = config.num_attention_heads, patcher.head_dim(config)
        context = LayerContext(0, 1, config.hidden_size, heads, dim, 64, patcher.is_causal(config), patcher.rotary)
        return bool(list(method.spec.module_class(method.config(), context).parameters()))

    def _budgeted(self) -> Recipe:
        """Softmax uptrained with the arguments of every stage but `transfer`, which leaves the checkpoint's weights."""
        data = self.recipe.to_dict()
        stages = [stage for stage in data["stages"] if stage["stage"] != "transfer"] or data["stages"][-1:]
        same = ("training", "data", "max_length", "lora", "trainable")
        stages = [{"stage": "uptrain", **{name: stage[name] for name in same}} for stage in stages]
        for stage in stages:
            if stage["trainable"] == "new":  # softmax has nothing new
                stage["trainable"] = "all"
        folder = str(self.output / "softmax")
        data |= {"conversion": None, "stages": stages, "training": {**data["training"], "output_dir": folder}}
        return Recipe.from_dict(data)

    def _convert(self, method: Method) -> Any:
        recipe = self._recipe_of(method)
        set_seed(recipe.seed)
        return build_model(recipe, self.auto, None, self.tokenizer, self.task.train)

    def _load(self, name: str) -> Any:
        return load_head(self.auto, name, self.recipe, None, self.tokenizer)

    def _trained(self, name: str, recipe: Recipe) -> None:
        """Every stage of a system, one after the other, each measured as it ends."""
        for stage in recipe.stages:
            facts: dict[str, Any] = {}

            def load(kind: str = stage.kind, facts: dict[str, Any] = facts) -> Any:
                result = train(recipe, until_stage=kind, resume=True)
                last = result.last
                facts |= {"steps": last.steps, "tokens_seen": last.tokens_seen, "trained": last.trained}
                facts["seconds"] = round(last.seconds, 1)
                return self._load(result.output_dir)

            self._measure(name, stage.kind, facts, load)

    # Rows --------------------------------------------------------------------------------------------------------

    def _measure(self, system: str, stage: str, facts: dict[str, Any], load: Callable[[], Any]) -> None:
        missing = [n for n in self.documents if not self.rows.has(system=system, stage=stage, length=n)]
        if not missing:
            return
        model: Any = None
        failed: dict[str, Any] = {}
        with failures(failed):
            model = load()
        for length in missing:
            row: dict[str, Any] = {"system": system, "stage": stage, "length": length, **facts, **failed}
            if model is not None:
                with failures(row):
                    row["nats"] = document_likelihoods(model, self.documents[length], length)
                    row["perplexity"] = math.exp(float(np.mean(row["nats"])))
            self.rows.append(row)
            found = not_measured(row) or f"perplexity {row['perplexity']:.3f}"
            self.say(f"{system}, {stage}, {length:,} tokens: {found}")

    def results(self) -> dict[str, Any]:
        """Rows with their ratios to the budgeted checkpoint, on the same documents."""
        return {
            "meta": about_machine(self.command),
            "recipe": self.recipe.to_dict(),
            "documents": {
                "source": self.task.source,
                "counts": {str(n): len(documents) for n, documents in self.documents.items()},
                "groups": {str(n): len(set(groups)) for n, groups in self.groups.items()},
            },
            "rows": list(self._with_ratios()),
        }

    def _with_ratios(self) -> Iterator[dict[str, Any]]:
        for row in self.rows.rows:
            base = self.rows.find(system=BUDGETED, length=row["length"]) or {}
            if "nats" in row and "nats" in base:
                interval = bootstrap_statistic(
                    _ratio, np.array(row["nats"]), np.array(base["nats"]), groups=self.groups[row["length"]]
                )
                row = {**row, "ratio": interval.to_dict()}
            yield row


def _ratio(own: np.ndarray, base: np.ndarray) -> float:
    """Perplexity over perplexity."""
    return float(np.exp(own.mean() - base.mean()))


def language_table(results: dict[str, Any]) -> str:
    """Markdown: a line for every system and stage, perplexity over the budgeted checkpoint's at every length."""
    lengths = sorted({row["length"] for row in results["rows"]})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in results["rows"]:
        cell = not_measured(row)
        if cell is None:
            cell = f"{row['perplexity']:.2f}"
            if ratio := row.get("ratio"):
                cell += f" ({ratio['mean']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}])"
        name = row["system"] + (" (control)" if row.get("control") else "")
        lines.setdefault((name, row["stage"]), {})[row["length"]] = cell
    header = ["system", "after", *(f"perplexity at {n:,} (over {BUDGETED})" for n in lengths)]
    body = [[*key, *(cells.get(n, "-") for n in lengths)] for key, cells in lines.items()]
    return markdown_table(header, body)
