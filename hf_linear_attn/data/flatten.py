"""Rows of catalog datasets whose columns are nested, as rows with plain columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = [
    "mldr_queries",
    "qasper_papers",
    "qasper_questions",
    "quality_articles",
    "trivia_questions",
    "wikitext_articles",
]

_HEADING = re.compile(r"\s*= [^=].* =\s*")  # of an article; those of its sections have more signs


def wikitext_articles(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines of WikiText to articles: a heading at the top level opens one."""
    lines: list[str] = []
    for row in rows:
        if _HEADING.fullmatch(row["text"]) and any(line.strip() for line in lines):
            yield {"text": "".join(lines).strip()}
            lines = []
        lines.append(row["text"] if row["text"].endswith("\n") else row["text"] + "\n")
    if any(line.strip() for line in lines):
        yield {"text": "".join(lines).strip()}


def quality_articles(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """QuALITY: each article once, however many questions are asked about it."""
    seen: set[int] = set()
    for row in rows:
        if hash(row["context"]) not in seen:
            seen.add(hash(row["context"]))
            yield {"text": row["context"]}


def _records(value: Any) -> list[dict[str, Any]]:
    """A list of records, which `datasets` may keep as one record of lists."""
    if isinstance(value, Mapping):
        return [dict(zip(value, entry, strict=True)) for entry in zip(*value.values(), strict=True)]
    return list(value)


def trivia_questions(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """TriviaQA: a question about its Wikipedia pages; the answers are the aliases that they contain.

    A question whose pages contain no alias, and one of the test split, whose answers are not public, is left out.
    """
    for row in rows:
        pages = [page["wiki_context"] for page in _records(row["entity_pages"])]
        context = "\n\n".join(page for page in pages if page.strip())
        aliases = dict.fromkeys([row["answer"]["value"], *row["answer"]["aliases"]])
        found = {alias: context.find(alias) for alias in aliases if alias.strip()}
        found = {alias: start for alias, start in found.items() if start >= 0}
        if found:
            yield {
                "question": row["question"],
                "context": context,
                "answers": {"text": list(found), "answer_start": list(found.values())},
                "group": row["question_id"],
            }


def _paper(row: Mapping[str, Any]) -> str:
    sections = [
        "\n\n".join([section["section_name"] or "", *section["paragraphs"]]).strip()
        for section in _records(row["full_text"])
    ]
    return "\n\n".join(filter(None, (row["title"], row["abstract"], *sections)))


def qasper_papers(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Qasper: title, abstract and sections of each paper."""
    for row in rows:
        yield {"text": _paper(row), "group": row["id"]}


def qasper_questions(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Qasper: the questions that are answered by spans of the paper, and those that it does not answer.

    Yes-no questions and free answers are left out: they are no spans.
    """
    for row in rows:
        context = _paper(row)
        for question in _records(row["qas"]):
            spans: dict[str, int] = {}
            unanswerable = False
            for record in _records(question["answers"]):
                answer = record["answer"]
                unanswerable |= bool(answer["unanswerable"])
                spans |= {span: context.find(span) for span in answer["extractive_spans"] if span.strip()}
            spans = {span: start for span, start in spans.items() if start >= 0}
            if spans or unanswerable:
                yield {
                    "question": question["question"],
                    "context": context,
                    "answers": {"text": list(spans), "answer_start": list(spans.values())},
                    "group": row["id"],
                }


def mldr_queries(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """MLDR: the long document that each query was written for."""
    for row in rows:
        for passage in _records(row["positive_passages"]):
            yield {"text": passage["text"], "group": passage["docid"]}
