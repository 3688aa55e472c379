"""The page of the documentation that says what `make test-trust` found."""

from __future__ import annotations

from typing import Any

from hf_linear_attn.measure.markdown import markdown_table as table

ENDS = ("passed", "skipped", "failed")
AGAIN = ("another run", "other threads", "larger batch")


def render(results: dict[str, Any]) -> str:
    """What .ci/trust.py has written, in sentences and tables."""
    versions = " ".join(f"{name} {version}," for name, version in results["versions"].items())
    stages = [
        [f"`{name}`", *(f"{stage[end]:,}" for end in ENDS), f"{stage['seconds'] / 60:,.0f}"]
        for name, stage in results["stages"].items()
    ]
    same = "the same" if not results["differ_with_plugin"] else f"others: {', '.join(results['differ_with_plugin'])}"
    excluded = [
        [name, why.replace("<", "&lt;"), str(n)]
        for name, whys in results["excluded"].items()
        for why, n in whys.items()
    ]
    actions = ", ".join(f"{count:,} {what}" for what, count in results["actions"].items())
    scales = sorted({scale for found in results["numerics"].values() for scale in found} - {"tokens", *AGAIN})
    errors, again = (
        [[name, *(found.get(what, "-") for what in columns)] for name, found in results["numerics"].items()]
        for columns in (["tokens", *scales], AGAIN)
    )
    decoded = [
        [name, found["tokens"], found["seconds"], found["error"]]
        for name, found in results["long"].items()
        if "tokens" in found
    ]
    others = [found for found in results["long"].values() if "tokens" not in found]
    runs = ", ".join(f"{count} {what}" for found in others for what, count in found.items())
    broken = results["mutants"]
    alive = [[f"`{row[name]}`" for name in ("place", "before", "after")] for row in broken["alive"]]
    return "\n\n".join(
        [
            f"{results['machine']}, {versions} {results['hours']} hours. Made by `{results['command']}`.",
            table(["stage", *ENDS, "minutes"], stages),
            f"With the plugin imported, the results of others' tests are {same}. Random actions: {actions}.",
            table(["converted to", "not run as it is, because it", "tests"], excluded),
            "Numerics: error of the worst token, and what is allowed.",
            table(["method", "tokens", *scales], errors),
            "Outputs and gradients of 1,024 tokens in float32, again: the largest difference over the largest number. "
            "Other threads are three in the place of one, a larger batch four rows in the place of one.",
            table(["method", *AGAIN], again),
            f"Long runs: {runs}. One token after the other, in one layer of a tiny Llama; the error is that of the "
            "last logits beside those of a forward of the whole text.",
            table(["method", "tokens", "time of the last ones over the first", "error"], decoded),
            f"Broken on purpose (seed {broken['seed']}): of {broken['changes']} changes the tests failed for "
            f"{broken['killed']} and did not end for {broken['timed out']}. Not noticed:",
            table(["line", "before", "after"], alive),
            "Licenses of what is installed with all extras:",
            table(["license", "packages"], [[kind, ", ".join(names)] for kind, names in results["licenses"].items()]),
        ]
    )
