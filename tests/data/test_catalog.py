"""Datasets of the Hub, and each entry of the catalog, from a Hub on loopback with rows of their schemas."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_linear_attn.data import BUNDLED_SOURCES, CATALOG, KINDS
from hf_linear_attn.measure.metrics import BUNDLED_METRICS
from tests.hub_server import HubServer, run_hub_server

ROOT = Path(__file__).parents[2]
TEXT = Value("string")


def parquet(rows: list[dict[str, Any]], features: dict[str, Any] | None = None) -> bytes:
    buffer = io.BytesIO()
    Dataset.from_list(rows, features=Features(features) if features else None).to_parquet(buffer)
    return buffer.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def by_config(config: str, splits: list[str], rows: list[dict[str, Any]], features: Any = None) -> dict[str, bytes]:
    """Files of a repository with a configuration in a folder of its own."""
    return {f"{config}/{split}-00000-of-00001.parquet": parquet(rows, features) for split in splits}


def card(files: dict[str, bytes]) -> bytes:
    """A card that says which files belong to which configuration and split, for those of `by_config`."""
    configs: dict[str, list[dict[str, str]]] = {}
    for path in files:
        config, _, name = path.partition("/")
        if name.endswith("-00000-of-00001.parquet") and config != "data":
            configs.setdefault(config, []).append({"split": name.partition("-")[0], "path": path})
    entries = [{"config_name": name, "data_files": paths} for name, paths in configs.items()]
    return f"---\n{yaml.safe_dump({'configs': entries})}---\n".encode() if entries else b""


def class_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": f"A document, number {i}.", "label": i % 2} for i in range(count)]


ALL = ["train", "validation", "test"]
LABELS = ClassLabel(names=["first", "second", "third"])
PAPER = {
    "id": "1",
    "title": "A title",
    "abstract": "An abstract.",
    "full_text": {"section_name": ["Introduction", None], "paragraphs": [["We begin."], ["We end.", "Indeed."]]},
    "qas": {
        "question": ["How does it begin?", "Is it true?", "Why?"],
        "answers": [
            {"answer": [{"unanswerable": False, "extractive_spans": ["We begin.", "not there"]}]},
            {"answer": [{"unanswerable": False, "extractive_spans": []}]},
            {"answer": [{"unanswerable": True, "extractive_spans": []}]},
        ],
    },
}
TRIVIA = {
    "question": "Who lit the lamp?",
    "question_id": "q1",
    "entity_pages": {"title": ["Lamps"], "wiki_context": ["The lamp was lit by Ann Smith."]},
    "answer": {"value": "Ann Smith", "aliases": ["Ann Smith", "A. Smith", "Ann"]},
}
WIKI = ["", " = First = \n", "", " A text . \n", " = = Part = = \n", " More . \n", "", " = Second = \n", " Other . \n"]
SETS = {"text": List(TEXT), "labels": List(LABELS)}
SET_ROWS = [{"text": ["One.", "Two."], "labels": [0, 2] if i % 2 else []} for i in range(4)]

FILES: dict[str, dict[str, bytes]] = {
    "hyperpartisan": {f"hyperpartisan_news_{part}.jsonl": jsonl(class_rows(4)) for part in ("train", "dev", "test")},
    "ecthr": by_config("ecthr_a", ALL, SET_ROWS, SETS),
    "eurlex": by_config("eurlex", ALL, [{**row, "text": "A law."} for row in SET_ROWS], {**SETS, "text": TEXT}),
    "arxiv-classification": by_config("no_ref", ALL, class_rows(4), {"text": TEXT, "label": LABELS}),
    "patent-classification": by_config("patent", ALL, class_rows(4), {"text": TEXT, "label": LABELS}),
    "20newsgroups": {
        f"{part}.jsonl": jsonl([{**row, "label_text": "x"} for row in [*class_rows(4), {"text": "", "label": 1}]])
        for part in ("train", "test")
    },
    "imdb": by_config("plain_text", ["train", "test", "unsupervised"], class_rows(4), {"text": TEXT, "label": LABELS})
    | by_config("other", ["train"], class_rows(4)),
    "booksum": by_config("chapters", ALL, [{"bid": 7, "text": "A chapter.", "summary": [{"text": "Short."}]}] * 4),
    "govreport": by_config("document", ALL, [{"report": "A report.", "summary": "Short."}] * 4),
    "quality": {
        f"data/{part}-00000-of-00001.parquet": parquet(
            [{"id": "1", "question": "What?", "context": "Long.", "choices": ["a", "b", "c", "d"], "label": 3}] * 3
        )
        for part in ("train", "validation")
    },
    "qasper": {f"qasper/{part}/0000.parquet": parquet([PAPER]) for part in ALL},
    "triviaqa": by_config("rc.wikipedia", ALL, [TRIVIA, {**TRIVIA, "answer": {"value": "<unk>", "aliases": []}}]),
    "mldr": {
        f"mldr-v1.0-en/{part}.jsonl.gz": gzip.compress(
            jsonl(
                [{"query": "What?", "positive_passages": [{"docid": "d1", "text": "Long."}], "negative_passages": []}]
            )
        )
        for part in ("train", "test")
    }
    | {"MLDR.py": b"raise SystemExit"},
    "pg19": {
        f"data/{part}-00000-of-00001.parquet": parquet(
            [{"short_book_title": "B", "publication_date": 1900, "url": "u", "text": "A book."}]
        )
        for part in ALL
    },
    "wikitext-103": by_config("wikitext-103-raw-v1", ALL, [{"text": line} for line in WIKI]),
}
EXPECTED: dict[str, dict[str, Any]] = {
    "ecthr": {"text": "One.\n\nTwo.", "label": [0.0, 0.0, 0.0], "group": "train:1"},
    "imdb": {"text": "A document, number 0.", "label": 0, "group": "train:1"},
    "booksum": {"text": "A chapter.", "group": "7"},
    "quality": {"choices": ["a", "b", "c", "d"], "label": 3, "group": "train:1"},
    "qasper": {
        "question": "How does it begin?",
        "answers": {"text": ["We begin."], "answer_start": [37]},
        "group": "1",
    },
    "triviaqa": {"answers": {"text": ["Ann Smith", "Ann"], "answer_start": [20, 20]}, "group": "q1"},
    "mldr": {"text": "Long.", "group": "d1"},
    "wikitext-103": {"text": "= First = \n\n A text . \n = = Part = = \n More .", "group": "train:1"},
}
TEXTS = {"qasper": "A title\n\nAn abstract.\n\nIntroduction\n\nWe begin.\n\nWe end.\n\nIndeed.", "quality": "Long."}

# Each request is (name, keyword arguments of load_documents); each answer what came of it.
LOAD = """
import json, sys
import datasets
datasets.disable_progress_bars()
from hf_linear_attn.data import load_documents
answers = {}
for name, options in json.load(sys.stdin).items():
    try:
        made = load_documents(**options)
        rows = list(made.train)
        answers[name] = {
            "rows": rows, "test": len(list(made.test)), "kind": made.kind, "labels": made.label_names,
            "columns": list(made.train.features), "source": made.source, "note": made.note,
        }
    except Exception as error:
        answers[name] = {"error": f"{type(error).__name__}: {error}"}
json.dump(answers, sys.stdout)
"""


def load_all(hub: HubServer, home: Path, calls: dict[str, dict[str, Any]]) -> dict[str, Any]:
    environment = {**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT), "HF_DATASETS_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        input=json.dumps(calls),
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with run_hub_server() as server:
        for entry in CATALOG.values():
            # Two entries are configurations of one repository.
            files: dict[str, bytes] = {}
            for name, made in FILES.items():
                files |= made if CATALOG[name].hub_id == entry.hub_id else {}
            server.add_dataset(entry.hub_id, {**files, "README.md": card(files)}, entry.revision or "main")
        rows = [{"body": f"t{i}", "topic": "ab"[i % 2]} for i in range(20)]
        server.add_dataset("org/rows", {"train.jsonl": jsonl(rows)})
        server.add_dataset("org/script", {"script.py": b"raise SystemExit"})
        yield server


@pytest.fixture(scope="module")
def loaded(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that the tests below look at, in one process."""
    rows = {"source": "org/rows", "fields": {"text": "body", "label": "topic"}}
    calls: dict[str, dict[str, Any]] = {
        **{name: {"source": name, "task": entry.task} for name, entry in CATALOG.items()},
        **{f"{name} as text": {"source": name, "task": "text"} for name in CATALOG},
        "streamed": {"source": "wikitext-103", "task": "text", "streaming": True},
        "rows": {**rows, "test_split": None, "test_fraction": 0.4},
        "no test split": rows,
        "script": {"source": "org/script"},
        "nowhere": {"source": "org/nowhere"},
        "config": {"source": "stanfordnlp/imdb", "config_name": "plain"},
        "no config": {"source": "stanfordnlp/imdb"},
        "close": {"source": "imbd"},
    }
    return load_all(hub, tmp_path_factory.mktemp("home"), calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOG)
def test_every_entry_loads(loaded, name):
    entry, found = CATALOG[name], loaded[name]
    assert "error" not in found, found["error"]
    assert found["kind"] == entry.task
    assert found["columns"] == [*KINDS[entry.task], "group"]
    assert found["rows"]
    assert found["test"]
    assert found["source"] == f"Hugging Face Hub: {entry.hub_id} ({entry.license or 'license unknown'})"
    expected = EXPECTED.get(name, {})
    assert {column: found["rows"][0][column] for column in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOG)
def test_every_entry_serves_as_text(loaded, name):
    found = loaded[f"{name} as text"]
    assert "error" not in found, found["error"]
    assert found["columns"] == ["text", "group"]
    assert found["rows"][0]["text"] == TEXTS.get(name, found["rows"][0]["text"])


@pytest.mark.slow
def test_an_article_is_one_text_however_many_questions_it_has(loaded):
    assert len(loaded["quality"]["rows"]) == 3
    assert len(loaded["quality as text"]["rows"]) == 1


@pytest.mark.slow
def test_empty_posts_are_left_out_with_a_note(loaded):
    assert loaded["20newsgroups"]["note"] == "2 rows without text were left out."


@pytest.mark.slow
def test_articles_are_streamed_whole(loaded):
    assert loaded["streamed"]["rows"] == loaded["wikitext-103"]["rows"]
    assert len(loaded["streamed"]["rows"]) == 2


@pytest.mark.slow
def test_a_dataset_by_its_id(loaded):
    found = loaded["rows"]
    assert found["labels"] == ["a", "b"]
    assert (len(found["rows"]), found["test"]) == (12, 8)
    assert all(row["group"].startswith("train:") for row in found["rows"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no test split", "ValueError: The dataset 'org/rows' has no split ['test']. Available: train."),
        ("script", "ValueError: The dataset 'org/script' is made by a script of its own, which is not run."),
        ("nowhere", "FileNotFoundError: 'org/nowhere' is none of auto, sotu, mails, novel, matching"),
        ("config", "'plain' not found. Available: ['plain_text', 'other']"),
        ("no config", "the available configs: ['plain_text', 'other']"),
        ("close", "(did you mean 'imdb'?), and could not be loaded from the Hub"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(loaded, name, message):
    assert message in loaded[name]["error"]
    assert "\n" not in loaded[name]["error"]


@pytest.mark.parametrize("name", CATALOG)
def test_an_entry_describes_itself(name):
    entry = CATALOG[name]
    assert entry.task in KINDS
    assert len(entry.hub_id.split("/")) == 2
    assert entry.title[0].isupper() or entry.title[0].isdigit()
    assert entry.lengths is None or "(" in entry.lengths, "length statistics name their source"


def test_the_recipes_say_what_there_is():
    text = (ROOT / "recipes" / "README.md").read_text()
    for name in (*CATALOG, *BUNDLED_SOURCES, *KINDS, *BUNDLED_METRICS):
        assert f"`{name}`" in text, name
