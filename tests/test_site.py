"""The documentation is built as `make docs` builds it: no warning, no asset from elsewhere, no method left out."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_linear_attn.cli.listing import option_notes
from hf_linear_attn.registry import VARIANTS
from tests.test_readme import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    return folder


def words(page: Path) -> str:
    """What a reader sees, one space between the words."""
    article = page.read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", article)).split())


def test_every_method_has_a_page_that_says_what_its_options_are(site: Path) -> None:
    for key in VARIANTS.names():
        spec = VARIANTS.get(key)
        page = site / "docs" / "methods" / f"{key}.html"
        text = words(page).replace(" ", "")
        for fact in (spec.title, spec.cost, *option_notes(spec).values()):
            assert "".join(fact.replace("`", "").split()) in text, (key, fact)
        assert f"methods/{key}.html" in (site / "index.html").read_text(encoding="utf-8"), "not in the navigation"
        paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", spec.paper)
        assert paper is None or f"https://arxiv.org/abs/{paper[1]}" in page.read_text(encoding="utf-8")


def test_pages_load_nothing_from_elsewhere_and_link_to_what_is_there(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loads = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\" >]+)", text)
        loads += re.findall(r"<link\b[^>]*\bhref=\"?([^\" >]+)", text)
        assert [target for target in loads if re.match(r"(?:https?:)?//", target)] == [], page
        if page.name == "404.html":  # its links begin at the server's root
            continue
        targets = [*loads, *re.findall(r"<a\b[^>]*\bhref=\"?([^\" >]+)", text)]
        local = {html.unescape(target).partition("#")[0] for target in targets if not re.match(r"\w+:|//", target)}
        missing = [target for target in local if target and not (page.parent / target).exists()]
        assert missing == [], page


def test_messages_of_errors_can_be_looked_up(site: Path) -> None:
    text = words(site / "docs" / "errors.html")
    for part in (
        "holds no model that a card could describe",
        "allowed on an encoder: even, half on each side",
        "mixes every position",
    ):
        assert part in text
    reference = words(site / "docs" / "reference.html")
    for part in ("convert_model", "calibration_steps", "DistillTrainer", "register_feature_map"):
        assert part in reference


# ---------------------------------------------------------------------------------------------------------------
# The results explorer
# ---------------------------------------------------------------------------------------------------------------

METHODS = json.loads((ROOT / "recipes" / "methods" / "results" / "methods.json").read_text(encoding="utf-8"))["rows"]
BENCH = json.loads((ROOT / "recipes" / "bench" / "results" / "cpu.json").read_text(encoding="utf-8"))["rows"]


def explorer_data(site: Path) -> dict[str, Any]:
    text = (site / "docs" / "explorer.html").read_text(encoding="utf-8")
    embedded = re.findall(r'<script type="?application/json"? id="?explorer-data"?>(.*?)</script>', text, re.DOTALL)
    assert len(embedded) == 1
    return json.loads(embedded[0])


def mean_error(model: str, length: int, method: str, stage: str) -> float | None:
    place = model, length, method
    rows = [r for r in METHODS if r["kind"] == "start" and (r["model"], r["length"], r["method"]) == place]
    errors = [row[stage]["error"] for row in rows if row.get(stage)]
    return statistics.fmean(errors) if errors else None


def test_the_explorer_holds_every_committed_start_and_cost_and_no_other(site: Path) -> None:
    data = explorer_data(site)
    shown = 0
    for checkpoint in data["checkpoints"]:
        for method, start in checkpoint["starts"].items():
            for length, errors in start["errors"].items():
                shown += 1
                for stage in ("published", "calibrated", "regressed"):
                    assert errors.get(stage) == mean_error(checkpoint["name"], int(length), method, stage)
    assert shown == len({(r["model"], r["length"], r["method"]) for r in METHODS if r.get("published")})
    assert [(c["name"], c["side"]) for c in data["checkpoints"]] == [("minilm", "encoder"), ("smollm2", "decoder")]

    costs = {(row["model"], row["length"], row["method"]): row for row in METHODS if row["kind"] == "cost"}
    benches = {(row["part"], row["mode"], row["length"], row["contender"]): row for row in BENCH}
    for measurement in data["measurements"]:
        part = measurement["name"].removesuffix(", random weights")
        for row in measurement["rows"]:
            length, method = row["length"], row["method"]
            if measurement["checkpoint"]:
                raw = costs[measurement["checkpoint"], length, method]
            else:
                raw = benches[part, row["mode"], length, method]
            for name in ("ratio", "seconds", "sdpa_seconds", "sdpa_peak_mb"):
                assert row.get(name) == raw.get(name)
            kept = raw.get("cache_bytes")
            assert row.get("megabytes") == (raw.get("peak_mb") if kept is None else kept / 1e6)
            assert ("why" in row) == ("seconds" not in raw)
            if row["start"] is not None and measurement["checkpoint"] is None:  # the same options under another name
                entry = next(r for r in METHODS if r["method"] == row["start"])
                config = VARIANTS.get(row["key"]).config_class
                assert config.from_dict(entry["options"]) == config.from_dict(raw["options"])
    names = {(measurement["name"], measurement["checkpoint"]) for measurement in data["measurements"]}
    for kind in ("layer", "model", "decode"):
        for part in {row["part"] for row in BENCH if row["kind"] == kind}:
            contenders = {row["key"] for row in BENCH if row["part"] == part and "key" in row}
            assert len(contenders) == 1 or (f"{part}, random weights", None) in names


class Controls(HTMLParser):
    """Ids of a page, the controls among them, and what labels point at; tags must close in order."""

    VOID = ("area", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.controls: set[str] = set()
        self.labeled: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []
        self.controls |= {given["id"]} if tag == "select" else set()
        self.labeled |= {given["for"]} if tag == "label" else set()
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_of_the_explorer_is_well_formed_and_its_script_asks_for_nothing(site: Path) -> None:
    text = (site / "docs" / "explorer.html").read_text(encoding="utf-8")
    page = Controls()
    page.feed(
        '<div class="explorer' + text.partition('<div id="explorer" class="explorer')[2].partition("</article>")[0]
    )
    page.close()
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert len(page.controls) == 5
    assert page.controls <= page.labeled
    script = (site / "docs" / "explorer.js").read_text(encoding="utf-8")
    style = (site / "docs" / "explorer.css").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]+", script + style) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert re.search(r"\b(fetch|XMLHttpRequest|import|eval|innerHTML|WebSocket|url)\b *[(:=]", script + style) is None
    wanted = set(re.findall(r'byId\("(\w+)"\)', script))
    assert {f"explorer-{name}" for name in wanted} <= set(page.ids)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="draws the page in Chromium")
def test_the_explorer_draws_every_method_and_the_line_that_none_beats(site: Path, tmp_path: Path) -> None:
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=4000",
    ]
    command = ["chromium", *flags, "--dump-dom", (site / "docs" / "explorer.html").as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    table = drawn.partition('id="explorer-table"')[2].partition("</table>")[0]
    assert re.findall(r'aria-sort="ascending"[^>]*><button[^>]*data-column="(\w+)"', table) == ["error"]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", table)[1:]]
    shown = {re.sub(r"<.*?>", "", row[0]): row for row in cells}
    assert all(f'href="methods/{name.split()[0]}.html"' in row[0] for name, row in shown.items() if name != "softmax")

    # By hand: MiniLM's first layer at 2,048 tokens, beside softmax itself.
    points = {"softmax": (1.0, 0.0)}
    for row in METHODS:
        if (row["kind"], row["model"], row["length"]) == ("cost", "minilm", 2048) and "ratio" in row:
            stages = (mean_error("minilm", 2048, row["method"], stage) for stage in ("calibrated", "published"))
            error = next((value for value in stages if value is not None), None)
            if error is not None:
                points[row["method"]] = 1 / row["ratio"], error
    beaten = {
        name
        for name, (time, error) in points.items()
        if any(t <= time and e <= error and (t, e) != (time, error) for t, e in points.values())
    }
    assert {name for name, row in shown.items() if "yes" in row} == points.keys() - beaten
    for name, (time, error) in points.items():
        assert f"{error:.3f}" in shown[name]
        assert f"{time:.2f}" in shown[name]
    marks = drawn.partition('id="explorer-plot"')[2].partition("</svg>")[0]
    assert marks.count('class="mark"') == len(points)
    assert marks.count('tabindex="0"') == 1


@pytest.mark.skipif(shutil.which("node") is None, reason="asks node whether the script parses")
def test_the_script_of_the_explorer_parses() -> None:
    done = subprocess.run(["node", "--check", str(ROOT / "docs" / "explorer.js")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
