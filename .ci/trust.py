"""What `make test-trust` found, from the reports of its stages: `python .ci/trust.py outputs/trust` writes RESULTS.

A stage is one run of pytest; its report, `<stage>.xml`, is JUnit's. `without`, `with` and one for each method are runs
of the same tests of Transformers: without the plugin, with it imported, on converted models. `peft-` and each of those
are runs of PEFT's. `mutants.json` is what .ci/mutants.py found.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "trust" / "results.json"
PACKAGES = ("torch", "transformers", "peft", "hypothesis", "mutmut", "pytest", "triton")
SUITES = ("", "peft-")  # of others' tests: how their stages begin
CONVERTED = ("linear", "longformer")  # stages of others' tests on models of these methods
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def upstream_names(reason: str) -> str:
    """A reason with converted classes under the names of upstream's, whose tests it may end as well."""
    return re.sub(r"LinearAttn(?=[A-Z])", "", re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", reason))


def read(path: Path) -> dict[str, Any]:
    """One stage: its counts, seconds, outcome of every test, reasons of what was skipped, recorded properties."""
    suite = ET.parse(path).getroot().find("testsuite")
    outcomes, reasons, properties = {}, Counter(), defaultdict(dict)
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        ends = {OUTCOMES[child.tag]: child for child in case if child.tag in OUTCOMES}  # of its subtests too
        outcomes[name] = next((end for end in ("failed", "skipped") if end in ends), "passed")
        if outcomes[name] == "skipped":
            reasons[upstream_names(ends["skipped"].get("message"))] += 1
        for one in case.iter("property"):
            properties[case.get("name")][one.get("name")] = one.get("value")
    counts = Counter(outcomes.values())
    return {
        "seconds": round(float(suite.get("time"))),
        "counts": {kind: counts[kind] for kind in ("passed", "skipped", "failed")},
        "outcomes": outcomes,
        "reasons": dict(reasons.most_common()),
        "properties": {name: dict(found) for name, found in properties.items()},
    }


def licenses() -> dict[str, list[str]]:
    """License -> what is installed under it of this package's dependencies and theirs, its own extras included."""
    extras = distribution("hf-linear-attn").metadata.get_all("Provides-Extra")
    wanted, found, seen = [("hf-linear-attn", extra) for extra in extras], defaultdict(set), set()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            meta = distribution(name).metadata
        except PackageNotFoundError:  # an extra that is not installed
            continue
        if name != "hf-linear-attn":
            stated = [line.rpartition(" :: ")[2] for line in meta.get_all("Classifier") or [] if "License ::" in line]
            text = meta.get("License-Expression") or ", ".join(stated) or meta.get("License") or "not stated"
            found[text.strip().splitlines()[0]].add(name)
        for needed in map(Requirement, distribution(name).requires or []):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                wanted += [(canonicalize_name(needed.name), extra) for extra in needed.extras or {""}]
    return {kind: sorted(names) for kind, names in sorted(found.items())}


def by_method(stage: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What a stage's tests recorded, by what they are parametrized with, or their name."""
    merged: dict[str, dict[str, str]] = defaultdict(dict)
    for name, found in stage["properties"].items():
        merged[name.partition("[")[2].rstrip("]") or name].update(found)
    return dict(merged)


def differing(stages: dict[str, Any]) -> list[str]:
    """Tests of others that end otherwise once the plugin is imported, or are there in one run alone."""
    found = set()
    for suite in SUITES:
        without, with_plugin = (stages[suite + name]["outcomes"] for name in ("without", "with"))
        found |= {test for test in without | with_plugin if without.get(test) != with_plugin.get(test)}
    return sorted(found)


def excluded(stages: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Stage on converted models -> reason -> tests that are skipped for it there, and for it nowhere without them."""
    return {
        suite + name: {
            reason: n
            for reason, n in stages[suite + name]["reasons"].items()
            if reason not in stages[f"{suite}without"]["reasons"]
        }
        for suite in SUITES
        for name in CONVERTED
    }


def main() -> None:
    """Read the stages in the folder that the command line names, and write RESULTS; a difference is an error."""
    folder = Path(sys.argv[1])
    stages = {path.stem: read(path) for path in sorted(folder.glob("*.xml"))}
    mutants = json.loads((folder / "mutants.json").read_text(encoding="utf-8"))
    asked, actions = sorted(os.environ.items()), Counter()
    for found in stages["actions"]["properties"].values():
        actions.update({name: int(count) for name, count in found.items()})
    results = {
        "command": " ".join(["make test-trust", *(f"{name}={x}" for name, x in asked if name.startswith("TRUST_"))]),
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
        "hours": round(sum(stage["seconds"] for stage in [*stages.values(), mutants]) / 3600, 2),
        "stages": {name: {**stage["counts"], "seconds": stage["seconds"]} for name, stage in stages.items()},
        "differ_with_plugin": differing(stages),
        "excluded": excluded(stages),
        "actions": actions,
        "numerics": by_method(stages["numerics"]),
        "long": by_method(stages["long"]),
        "mutants": mutants,
        "licenses": licenses(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if results["differ_with_plugin"]:
        sys.exit(f"With the plugin imported these end otherwise: {', '.join(results['differ_with_plugin'])}.")


if __name__ == "__main__":
    main()
