"""The documentation is built as `make docs` builds it: no warning, no asset from elsewhere, no method left out."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_linear_attn.cli.listing import option_notes
from hf_linear_attn.registry import VARIANTS
from tests.test_readme import ROOT

pytestmark = pytest.mark.slow


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
