"""What `mkdocs build` shows beside docs/: pages of the repository, pages made from the code, and the results explorer.

The site has the folders of the repository, so that a link which works there works here. Every file that a page links to
comes along. Made from the code are a page for each method, the reference, and the messages of all errors.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File, Files

from hf_linear_attn.cli.listing import all_facts, option_notes, spell_defaults
from hf_linear_attn.registry import VARIANTS, VariantSpec

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md", "model_cards/README.md")
EXPLORER = ("docs/explorer.md", "docs/explorer.js", "docs/explorer.css")
# What a user calls, by the module that defines it.
REFERENCE = {
    "Convert": ["convert.convert_model", "convert.revert_model", "registry.list_variants", "registry.get_variant"],
    "Feature maps": ["ops.features.named.register_feature_map", "ops.features.named.unregister_feature_map"],
    "Train": [
        *(
            f"training.{name.lower()}.{name}Trainer"
            for name in ("Transfer", "Distill", "Contrast", "Uptrain", "Finetune")
        ),
        "training.anneal.Anneal",
    ],
    "Share": [
        "hub.push_to_hub",
        "hub.load_converted",
        "hub.prepare_for_hub",
        "model_card.model_card",
        "hub_kernel.export.export_kernels",
    ],
    "Measure": ["report.ConversionReport", "measure.perplexity.document_likelihoods"],
    "Extend": [
        "registry.register_variant",
        "registry.register_patcher",
        "variants.base.AttentionVariant",
        "variants.base.AttentionInputs",
        "patchers.base.ModelPatcher",
        "testing.check_variant",
    ],
}


def on_config(config: Any) -> Any:
    """Put the methods' pages into the navigation."""
    methods = [{key: f"docs/methods/{key}.md"} for key in VARIANTS.names()]
    config.nav = [{"Methods": methods} if "Methods" in entry else entry for entry in config.nav]
    return config


def on_files(files: Files, config: Any) -> Files:
    """All files of the site; those of mkdocs' own theme stay."""
    made = {f"docs/methods/{key}.md": method_page(VARIANTS.get(key)) for key in VARIANTS.names()}
    made |= {"docs/reference.md": reference_page(), "docs/errors.md": errors_page()}
    kept = [file for file in files if not file.src_uri.endswith(".md")]
    kept += [File.generated(config, name, content=text) for name, text in made.items()]
    sources = [*linked_files(), *EXPLORER[1:]]
    kept += [File.generated(config, name, abs_src_path=str(ROOT / name)) for name in sources]
    return Files(kept)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Embed the results into the page of the explorer, which fetches nothing: it works from a folder too."""
    if page.file.src_uri != EXPLORER[0]:
        return html
    data = script("explorer").explorer_data(methods_results(), readme().benches().values())
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    parts = [
        '<link rel="stylesheet" href="explorer.css">',
        html,
        f'<script type="application/json" id="explorer-data">{text}</script>',
        '<script src="explorer.js"></script>',
    ]
    return "\n".join(parts)


def linked_files() -> list[str]:
    """The pages, and every file that one of them links to, by their paths in the repository."""
    waiting = [*PAGES, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    found: list[str] = []
    while waiting:
        name = waiting.pop(0)
        if name in found:
            continue
        found.append(name)
        if name.endswith(".md"):
            text = (ROOT / name).read_text(encoding="utf-8")
            targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
            paths = [(ROOT / name).parent.joinpath(target).resolve() for target in targets]
            waiting += [path.relative_to(ROOT).as_posix() for path in paths if path.is_file()]
    return found


def method_page(spec: VariantSpec) -> str:
    """What a method computes, by its module's words; what the registry says; its options; what was measured."""
    facts, notes = all_facts(spec), option_notes(spec)
    del facts["options"]
    module = inspect.getdoc(inspect.getmodule(spec.module_class)) or ""
    title, _, formula = module.partition("\n\n")
    options = [default.partition("=") for default in spell_defaults(spec)]
    generated = [
        f"# {spec.key}",
        readme().link_arxiv(title),
        escaped(formula),
        f'```python\nconvert_model(model, "{spec.key}", calibration=batches)\n```',
        "## Options",
        readme().table(["option", "default", ""], [[f"`{n}`", f"`{value}`", notes[n]] for n, _, value in options]),
        "## Facts",
        readme().table(
            ["", ""], [[name, readme().link_arxiv("; ".join(text.splitlines()))] for name, text in facts.items()]
        ),
        "## Measured",
        measured(spec),
    ]
    return "\n\n".join(part for part in generated if part) + "\n"


def measured(spec: VariantSpec) -> str:
    """The calibrated start and the speed of the method's leading options."""
    rows = [
        [model, f"{error:.3f}", *(f"{speeds[n]:.2f}x" if n in speeds else "-" for n in (512, 2048, 8192))]
        for (key, model), (error, speeds) in leading().items()
        if key == spec.key
    ]
    header = ["checkpoint", "error of the start, calibrated", *(f"speed at {n:,}" for n in (512, 2048, 8192))]
    about = (
        "Errors are relative errors of attention outputs against softmax at 512 tokens, speeds those of one layer over "
        "`scaled_dot_product_attention`: [all methods beside each other](../methods.md), "
        "[performance](../performance.md), [results](../results.md)."
    )
    start = f"{readme().table(header, rows)}\n\n{about}" if rows else f"Not measured. {about}"
    return f"{start}\n\n{half_precision(spec)}"


def half_precision(spec: VariantSpec) -> str:
    """How far the method is from float64 where that is hardest, a row for each side."""
    found = json.loads(readme().TRUST.read_text(encoding="utf-8"))["numerics"]
    sides = {side: found[name] for side in ("encoder", "decoder") if (name := f"{spec.key}-{side}") in found}
    columns = [name for name in next(iter(sides.values())) if name == "tokens" or "float" in name]
    about = (
        "In half precision, on tokens of the scales that are hard on it: the error of the worst token against float64, "
        "relative to its norm, of what is allowed ([trust](../trust.md))."
    )
    rows = [[side, *(found.get(name, "-") for name in columns)] for side, found in sides.items()]
    return f"{about}\n\n{readme().table(['side', *columns], rows)}"


@cache
def leading() -> dict[tuple[str, str], tuple[float, dict[int, float]]]:
    """What the committed results say of each method's leading options."""
    return readme().leading_numbers(methods_results())


def methods_results() -> dict[str, Any]:
    """What `hf-linear-attn methods` measured."""
    return json.loads((readme().METHODS / "methods.json").read_text(encoding="utf-8"))


def reference_page() -> str:
    """What a user calls, by its docstrings."""
    parts = ["# Reference", "Signatures and docstrings of what is called from outside."]
    for title, names in REFERENCE.items():
        parts += [f"## {title}", *(f"::: hf_linear_attn.{name}" for name in names)]
    return "\n\n".join(parts) + "\n"


def errors_page() -> str:
    """Messages that the package raises, as far as its code writes them out; a value in one is shown as `…`."""
    parts = [
        "# Errors",
        "What the package says when it refuses something, from its code, by the module that says it; a message that is "
        "put together elsewhere is not here. `…` stands for a value. Search for a part of yours that is no value.",
    ]
    for path in sorted((ROOT / "hf_linear_attn").rglob("*.py")):
        rows = [[error, text] for error, text in messages(ast.parse(path.read_text(encoding="utf-8")))]
        if rows:
            name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
            parts += [f"## {name}", readme().table(["error", "says"], rows)]
    return "\n\n".join(parts) + "\n"


def messages(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(class, message) of every `raise X("...")` whose message is written there, or is a constant of the module."""
    assigned = [node for node in ast.iter_child_nodes(tree) if isinstance(node, ast.Assign)]
    named = {target.id: node.value for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        given = node.exc.args[0]
        given = named.get(given.id, given) if isinstance(given, ast.Name) else given
        text, error = " ".join(spelled(given).split()), ast.unparse(node.exc.func)
        if text.strip("… "):
            yield f"`{error}`", escaped(text)


def escaped(text: str) -> str:
    """Text as it stands, in Markdown; what stands between backticks is code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_\[\]<`\\])", r"\\\1", part) for part in parts)


def spelled(node: ast.AST) -> str:
    """A string expression with `…` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(spelled(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return spelled(node.left) + spelled(node.right)
    return "…"


def readme() -> ModuleType:
    """.ci/readme.py, which writes the other generated pages."""
    return script("readme")


@cache
def script(name: str) -> ModuleType:
    """Another file of .ci."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
