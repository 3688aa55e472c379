"""Language models under one budget: perplexity after each stage, beside the checkpoint trained on the same tokens.

Of a system's last stage also what a forward costs, what the model writes, and whether it finds a pass key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from accelerate.utils import set_seed

from hf_linear_attn.compare.charts import language_png
from hf_linear_attn.compare.language_parts import last_parts, likelihood_part, prompt_places
from hf_linear_attn.compare.language_tables import language_table
from hf_linear_attn.compare.saved import SAVED, drop_stale_rows, saved_language_models
from hf_linear_attn.data import load_config
from hf_linear_attn.data.tokenization import encode_leading
from hf_linear_attn.measure.bootstrap import bootstrap_interval, bootstrap_statistic, paired_bootstrap_difference
from hf_linear_attn.measure.curve import fit_power_law
from hf_linear_attn.measure.methods import Method, failures, not_measured, parse_methods
from hf_linear_attn.measure.quiet import quiet_libraries
from hf_linear_attn.measure.rows import RowFile, about_machine
from hf_linear_attn.registry import get_patcher, list_variants
from hf_linear_attn.saving import write_json
from hf_linear_attn.training.parts import variants_of
from hf_linear_attn.training.recipe import Recipe, without_redraws
from hf_linear_attn.training.results import TrainResult, forget_stages
from hf_linear_attn.training.run import train
from hf_linear_attn.training.setup import auto_class, build_model, build_tokenizer, load_head, load_task, process_state
from hf_linear_attn.variants.base import AttentionVariant, LayerContext

__all__ = ["BUDGETED", "CHECKPOINT", "LINEAR_BRANCH_OFF", "compare_language"]

CHECKPOINT = "softmax"
BUDGETED = "softmax, same tokens"
CONVERTED = "converted"
LINEAR_BRANCH_OFF = "linear_branch_off"
# Of these more may join later: their rows say what was asked for.
_JOINING = ("models", "variants", "controls", "generation", "passkey_lengths", "passkey_documents", "passkey_filler")


def compare_language(
    recipe: Recipe,
    variants: Sequence[Any] | None = None,
    *,
    command: str = "",
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the checkpoint, the checkpoint uptrained on as many tokens, and each variant after each stage.

    A row is written as soon as it is measured, and stages that are finished are not run again: a comparison that was
    cut off goes on where it stopped. Perplexities are of the first `evaluation.lengths` tokens of the held-out
    documents that are that long, the same documents for every system. After its last stage a system also writes on
    from the prompts of `evaluation.generation`, and looks for the pass keys of `evaluation.passkey_lengths`; a forward
    of `evaluation.forward_lengths` tokens is timed beside the checkpoint's.

    Args:
        recipe: its stages train language models (no `finetune`); `conversion` gives layers, extension and calibration,
            `evaluation.models` saved models that are measured as they are.
        variants: see `parse_methods`; `evaluation.variants` when None. `evaluation.controls` are converted and
            measured, and not trained; `linear_branch_off` among them measures trained ones without that branch.
        command: what to write down as the command that made it.
        fresh: forget what an earlier run trained and measured.
        say: called with a line about each row.

    Returns:
        `{"meta": {...}, "recipe": {...}, "documents": {...}, "rows": [...], "curves": [...]}`, which lies in
        `output_dir` too, as `language.json` and `language.md`, beside `language.png`, quality against cost. A system
        that fails has a row that says why, and is tried again.

    Raises:
        ValueError: for a recipe with another last stage, an encoder, lengths that no held-out document has, prompts
            and pass keys that the documents or the checkpoint have no room for, `linear_branch_off` where no variant
            has such a branch, or rows of another recipe in `output_dir`.
    """
    return _Language(recipe, variants, command, fresh, say).run()


class _Language:
    def __init__(
        self, recipe: Recipe, variants: Sequence[Any] | None, command: str, fresh: bool, say: Callable[[str], None]
    ) -> None:
        if recipe.stages[-1].kind == "finetune":
            raise ValueError("A comparison of language models takes stages transfer, distill or uptrain, got finetune")
        self.state = process_state()
        self.main = self.state.is_main_process
        self.recipe, self.say, self.command = recipe, say if self.main else lambda _: None, command
        self.methods = parse_methods(recipe.evaluation.variants if variants is None else variants, hybrids=True)
        self.output = recipe.output_dir
        with self.state.main_process_first():
            self.tokenizer = build_tokenizer(recipe)
            self.task = load_task(recipe.data, "text")
        self.auto = auto_class(recipe.stages[0], recipe.model.name)
        if self.auto != "AutoModelForCausalLM":
            raise ValueError(f"{recipe.model.name!r} is read by {self.auto}; perplexities are of AutoModelForCausalLM")
        self.controls, self.branch_off = self._controls()
        self.encoded = self._encoded()
        self.documents, self.groups = self._held_out()
        self.likelihoods = [likelihood_part(documents, n) for n, documents in self.documents.items()]
        config = load_config(recipe.model.name)
        limit = get_patcher(config.model_type).max_length(config)
        self.of_the_last = last_parts(recipe, self.tokenizer, self.encoded, limit)
        self.saved = saved_language_models(recipe, self.tokenizer, list(self.task.test["text"]))
        setting = {"recipe": recipe.to_dict(), "documents": {str(n): len(x) for n, x in self.documents.items()}}
        for name in _JOINING:
            setting["recipe"]["evaluation"].pop(name)
        path = self.output / "language.rows.jsonl"
        with self.state.main_process_first():  # it writes the file anew as it opens it
            if fresh and self.main:
                path.unlink(missing_ok=True)
                forget_stages(self.output)
            self.rows = RowFile(path, setting, writes=self.main)
        self.state.wait_for_everyone()  # every process has read them before one adds to them
        for sentence in drop_stale_rows(self.saved, self.rows):
            self.say(sentence)

    def _controls(self) -> tuple[list[Method], bool]:
        """The controls that are converted, and whether trained variants are measured without their linear branch."""
        entries = self.recipe.evaluation.controls
        named = entries.count(LINEAR_BRANCH_OFF)
        if named > 1:
            raise ValueError(f"evaluation.controls names {LINEAR_BRANCH_OFF} twice")
        for entry in entries:
            if isinstance(entry, str) and entry not in (*list_variants(), LINEAR_BRANCH_OFF):
                raise ValueError(
                    f"evaluation.controls: {entry!r} is not known. Allowed: {LINEAR_BRANCH_OFF}, or a variant: "
                    f"{', '.join(list_variants())}."
                )
        in_recipe = parse_methods(self.recipe.evaluation.variants, hybrids=True)
        own = {method.name: method for method in (*self.methods, *in_recipe)}
        if named and not any(self._layer(method).drop_linear_branch() for method in own.values()):
            able = [key for key in list_variants(decoder=True) if self._layer(Method(key)).drop_linear_branch()]
            raise ValueError(
                f"evaluation.controls names {LINEAR_BRANCH_OFF}, but no variant here has a linear branch beside a "
                f"window: {', '.join(own) or 'there is none'}. Those that have: "
                f"{', '.join(able)}."
            )
        return parse_methods((entry for entry in entries if entry != LINEAR_BRANCH_OFF), hybrids=True), bool(named)

    def _encoded(self) -> list[list[int]]:
        """Token ids of the held-out documents, as many as the longest measurement reads."""
        evaluation = self.recipe.evaluation
        prompt = 0 if evaluation.generation is None else evaluation.generation.prompt_tokens
        return encode_leading(list(self.task.test["text"]), self.tokenizer, max(*evaluation.perplexity_lengths, prompt))

    def _held_out(self) -> tuple[dict[int, list[list[int]]], dict[int, list[str]]]:
        lengths, encoded = self.recipe.evaluation.perplexity_lengths, self.encoded
        names = list(self.task.test["group"])
        kept = {n: [place for place, ids in enumerate(encoded) if len(ids) >= n] for n in lengths}
        if short := [n for n, places in kept.items() if not places]:
            raise ValueError(f"No held-out document has {short[0]} tokens (evaluation.lengths)")
        documents = {n: [encoded[place] for place in places] for n, places in kept.items()}
        return documents, {n: [names[place] for place in places] for n, places in kept.items()}

    def run(self) -> dict[str, Any]:
        """Measure what is not measured yet."""
        self._measure(CHECKPOINT, "checkpoint", {}, partial(self._load, self.recipe.model.name))
        for system in self.saved:
            self._measure(system.name, SAVED, system.facts(), system.saved.load)
        self._trained(BUDGETED, self._budgeted())
        for method in self.controls:
            self._measure(method.name, CONVERTED, {"control": True}, partial(self._convert, method))
        for method in self.methods:
            self._measure(method.name, CONVERTED, {}, partial(self._convert, method), is_last=False)
            self._trained(method.name, self._recipe_of(method))
            if self.branch_off and self._layer(method).drop_linear_branch():
                self._without_branch(method.name, self._recipe_of(method))
        results = self.results()
        if not self.main:
            return results
        write_json(self.output / "language.json", results)
        (self.output / "language.md").write_text(language_table(results) + "\n", encoding="utf-8")
        picture = self.output / "language.png"
        if language_png(results, picture):
            self.say(f"Picture: {picture}")
        return results

    # Systems -----------------------------------------------------------------------------------------------------

    def _recipe_of(self, method: Method) -> Recipe:
        folder = self.output / method.name.replace(" ", "_").replace("=", "_")
        base = self.recipe.to_dict()
        conversion = {**(base["conversion"] or {}), "variant": method.key, "options": method.options}
        if method.keep_softmax is not None:
            conversion |= {"layers": "auto", "keep_softmax": method.keep_softmax}
        base |= {"conversion": conversion, "training": {**base["training"], "output_dir": str(folder)}}
        if not list(self._layer(method).parameters()):  # nothing to transfer
            base["stages"] = [stage for stage in base["stages"] if stage["stage"] != "transfer"]
        if self.recipe.evaluation.teacher == "budgeted":
            for stage in base["stages"]:
                if stage["stage"] == "distill":
                    stage["teacher"] = stage["teacher"] or str(self._budgeted().output_dir)
        return Recipe.from_dict(without_redraws(base))

    def _layer(self, method: Method) -> AttentionVariant:
        """A method's layer, on a model like the recipe's."""
        config = load_config(self.recipe.model.name)
        patcher = get_patcher(config.model_type)
        heads, dim = config.num_attention_heads, patcher.head_dim(config)
        context = LayerContext(0, 1, config.hidden_size, heads, dim, 64, patcher.is_causal(config), patcher.rotary)
        return method.spec.module_class(method.config(), context)

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
            load = partial(self._train, recipe, stage.kind, facts)
            self._measure(name, stage.kind, facts, load, is_last=stage is recipe.stages[-1])

    def _train(self, recipe: Recipe, kind: str, facts: dict[str, Any]) -> Any:
        """The model after a stage, which is trained if it is not yet; `facts` get what the row says of that."""
        budgeted = self._budgeted()
        if kind == "distill" and str(budgeted.output_dir) in [getattr(x, "teacher", None) for x in recipe.stages]:
            train(budgeted, resume=True, evaluate=False)  # measured before, and perhaps its folder is gone
        result = train(recipe, until_stage=kind, resume=True, evaluate=False)
        last = result.last
        facts |= {"steps": last.steps, "tokens_seen": last.tokens_seen, "trained": last.trained}
        facts["seconds"] = round(last.seconds, 1)
        return self._load(result.output_dir)

    def _without_branch(self, name: str, recipe: Recipe) -> None:
        """The model after its last stage once more, with nothing beside the window."""
        kind = recipe.stages[-1].kind
        facts: dict[str, Any] = {"control": True}

        def load() -> Any:
            model = self._train(recipe, kind, facts)
            for variant in variants_of(model):
                variant.drop_linear_branch()
            return model

        self._measure(f"{name}, linear branch off", kind, facts, load)

    # Rows --------------------------------------------------------------------------------------------------------

    def _measure(
        self, system: str, stage: str, facts: dict[str, Any], load: Callable[[], Any], *, is_last: bool = True
    ) -> None:
        """The rows that are missing of a system after a stage; the last one has more of them."""
        parts = [*self.likelihoods, *(self.of_the_last if is_last else ())]
        missing = [part for part in parts if not self.rows.has(system=system, stage=stage, **part.identity)]
        if not missing:
            return
        model: Any = None
        failed: dict[str, Any] = {}
        device = self.state.device
        with failures(failed):
            model = load().to(device)
        checkpoint = cache(lambda: model if system == CHECKPOINT else self._load(self.recipe.model.name).to(device))
        for part in missing:
            row: dict[str, Any] = {"system": system, "stage": stage, **part.identity, **facts, **failed}
            if model is not None:
                with failures(row), quiet_libraries():
                    row |= part.measure(model, checkpoint)
            self.rows.append(row)
            self.say(f"{system}, {stage}, {part.label}: {not_measured(row) or part.spell(row)}")

    def results(self) -> dict[str, Any]:
        """Rows of this recipe, with intervals; ratios and differences are to the budgeted checkpoint."""
        return {
            "meta": about_machine(self.command),
            "recipe": self.recipe.to_dict(),
            "checkpoint": CHECKPOINT,
            "baseline": BUDGETED,
            "documents": {
                "source": self.task.source,
                "counts": {str(n): len(documents) for n, documents in self.documents.items()},
                "groups": {str(n): len(set(groups)) for n, groups in self.groups.items()},
            },
            "rows": list(self._with_intervals()),
            "curves": [curve for method in self.methods if (curve := self._curve(method)) is not None],
        }

    def _curve(self, method: Method) -> dict[str, Any] | None:
        """How the divergence from the teacher fell in a system's last stage; None where that is no distillation, or
        too short to say."""
        recipe = self._recipe_of(method)
        stage, done = recipe.stages[-1], TrainResult.read(recipe.output_dir)
        if done is None or stage.kind != "distill" or stage.temperature != 1:  # type: ignore[attr-defined]
            return None
        last, steps = done.last, [0, *(step for step, _ in done.last.losses)]
        share = last.tokens_seen / last.steps
        # A loss is the mean since the one before it; in the first the rate still warms up.
        tokens = [share * (a + b) / 2 for a, b in pairwise(steps)][1:]
        law = fit_power_law(tokens, [loss for _, loss in last.losses][1:])
        if law is None:
            return None
        return {"system": method.name, "tokens_seen": last.tokens_seen, "losses": last.losses, **asdict(law)}

    def _with_intervals(self) -> Iterator[dict[str, Any]]:
        parts = [part.identity for part in (*self.likelihoods, *self.of_the_last)]
        generation = self.recipe.evaluation.generation
        places = [] if generation is None else prompt_places(self.encoded, generation)
        of_prompts = [str(self.task.test["group"][place]) for place in places]
        for row in self.rows.rows:
            identity = next((x for x in parts if x.items() <= row.items()), None)
            if identity is None:  # of other prompts or pass keys, asked for in an earlier run
                continue
            base = self.rows.find(system=BUDGETED, **identity) or {}
            found: dict[str, Any] = {}
            if "nats" in row and "nats" in base:
                found["ratio"] = _ratio(row["nats"], base["nats"], self.groups[row["length"]])
            if "repeated" in row and "repeated" in base:
                difference = paired_bootstrap_difference(row["repeated"], base["repeated"], of_prompts)
                found["repeated_difference"] = difference.to_dict()
                found["written_ratio"] = _ratio(row["written_nats"], base["written_nats"], of_prompts)
            if "found" in row:
                found["found_interval"] = bootstrap_interval(row["found"]).to_dict()
            yield {**row, **found}


def _ratio(own: Sequence[float], base: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """Perplexity over perplexity, on the same texts."""

    def ratio(own: np.ndarray, base: np.ndarray) -> float:
        return float(np.exp(own.mean() - base.mean()))

    return bootstrap_statistic(ratio, np.array(own), np.array(base), groups=groups).to_dict()
