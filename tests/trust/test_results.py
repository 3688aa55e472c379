"""The results of `make test-trust` say what its stages' reports say, and so does the page of the documentation."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
CASE = '<testcase classname="t" name="{name}" time="1">{ends}</testcase>'
PASSED, FAILED = "", '<failure message="no">E</failure>'


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(path: Path, **cases: str) -> None:
    inside = "".join(CASE.format(name=name, ends=ends) for name, ends in cases.items())
    inside = inside.replace("(", "[").replace(")", "]")
    path.write_text(f'<testsuites><testsuite time="90.0">{inside}</testsuite></testsuites>')


def skipped(why: str) -> str:
    return f'<skipped message="{why}">S</skipped>'


def properties(**found: object) -> str:
    inside = "".join(f'<property name="{name}" value="{value}"/>' for name, value in found.items())
    return f"<properties>{inside}</properties>"


def test_results_and_page_say_what_the_reports_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(tmp_path / "without.xml", a=PASSED, b=skipped("no") + FAILED, c=skipped("BertModel needs a GPU"), d=PASSED)
    report(tmp_path / "with.xml", a=FAILED, b=FAILED, c=skipped("BertModel needs a GPU"), e=PASSED)
    for method in ("linear", "longformer"):
        report(
            tmp_path / f"{method}.xml",
            a=skipped("asks for weights"),
            c=skipped("LinearAttnBertModel needs a GPU"),
            d=PASSED,
        )
        report(tmp_path / f"peft-{method}.xml", f=skipped("fills a cache"), g=skipped("asks for weights"))
    report(tmp_path / "peft-without.xml", f=PASSED, g=skipped("asks for weights"))
    report(tmp_path / "peft-with.xml", f=FAILED, g=skipped("asks for weights"))
    report(tmp_path / "actions.xml", part1=properties(actions=40, sequences=2), part2=properties(actions=2))
    again = properties(**{"another run": "same bits", "other threads": "3e-07", "larger batch": "same bits"})
    report(
        tmp_path / "numerics.xml",
        **{"long(linear-decoder)": properties(scale="0.1 of 0.2", tokens=9), "again(linear-decoder)": again},
    )
    report(
        tmp_path / "long.xml",
        **{"last(linear)": properties(tokens=9, seconds="1.01", error="2e-06"), "cycles": properties(cycles=7)},
    )
    broken = {"place": "seam/a.py:7", "before": "x: int | None = 1", "after": "x: int | None = 2"}
    mutants = {"seed": 0, "changes": 9, "killed": 7, "timed out": 1, "survived": 1, "alive": [broken], "seconds": 360}
    (tmp_path / "mutants.json").write_text(json.dumps(mutants))
    trust, readme = script("trust"), script("readme")
    monkeypatch.setattr(trust, "RESULTS", tmp_path / "out" / "results.json")
    monkeypatch.setattr(readme, "TRUST", trust.RESULTS)
    monkeypatch.setenv("TRUST_TOKENS", "9")
    monkeypatch.setattr(sys, "argv", ["trust.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="t::a, t::d, t::e, t::f"):
        trust.main()

    results = json.loads(trust.RESULTS.read_text())
    assert results["command"].startswith("make test-trust TRUST_TOKENS=9")
    assert results["stages"]["without"] == {"passed": 2, "skipped": 1, "failed": 1, "seconds": 90}
    assert results["stages"]["peft-with"] == {"passed": 0, "skipped": 1, "failed": 1, "seconds": 90}
    assert results["differ_with_plugin"] == ["t::a", "t::d", "t::e", "t::f"]
    assert results["excluded"]["linear"] == {"asks for weights": 1}
    assert results["excluded"]["peft-linear"] == {"fills a cache": 1}
    assert results["actions"] == {"actions": 42, "sequences": 2}
    found = results["numerics"]["linear-decoder"]
    assert (found["scale"], found["tokens"], found["other threads"]) == ("0.1 of 0.2", "9", "3e-07")
    assert results["long"]["cycles"] == {"cycles": "7"}
    assert "pytest" in results["licenses"]["MIT"]
    assert results["mutants"] == mutants
    assert results["hours"] == 0.38
    page = readme.trust()
    for cells in (
        "`without` | 2 | 1 | 1 | 2",
        "linear | asks for weights | 1",
        "peft-linear | fills a cache | 1",
        "linear-decoder | 9 | 0.1 of 0.2",
        "linear-decoder | same bits | 3e-07 | same bits",
        "linear | 9 | 1.01 | 2e-06",
    ):
        assert f"| {cells} |" in page
    assert "others: t::a, t::d, t::e, t::f" in page
    assert "Long runs: 7 cycles." in page
    assert "of 9 changes the tests failed for 7 and did not end for 1." in page
    assert "| `seam/a.py:7` | `x: int \\| None = 1` | `x: int \\| None = 2` |" in page
