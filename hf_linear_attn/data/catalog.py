"""Sets of long documents by task: where they are, what they hold, under which license, how long they are.

What could not be confirmed from a dataset's card or files is None, or said in `unconfirmed`. Licenses are those that
the cards name; a card that names none leaves None. Nothing here is downloaded before it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_linear_attn.data import flatten
from hf_linear_attn.data.external import Flatten
from hf_linear_attn.data.kinds import KINDS

__all__ = ["CATALOG", "CatalogEntry"]


@dataclass(frozen=True)
class CatalogEntry:
    """A dataset of the Hub.

    Attributes:
        title: what it holds, in a sentence.
        task: what it is for, one of `KINDS`; any entry serves `"text"` as well.
        hub_id: its id.
        fields: our column -> the source's, where they differ.
        config_name: configuration.
        revision: branch, where the main one needs a script.
        train_split: split to train on.
        test_split: split to test on; None splits the training split.
        data_files: split -> file, where the repository's own splits need a script.
        flatten: makes plain columns of nested ones, for `task`.
        flatten_text: likewise for `"text"`, where it differs.
        drop_empty: some of its texts are empty, and are left out with a note.
        license: as the card names it; None where it names none.
        lengths: documents and their lengths, with the source of the figures; None where not known.
        unconfirmed: what could not be confirmed.
    """

    title: str
    task: str
    hub_id: str
    fields: Mapping[str, str] = field(default_factory=dict)
    config_name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str | None = "test"
    data_files: Mapping[str, str] | None = None
    flatten: Flatten | None = None
    flatten_text: Flatten | None = None
    drop_empty: bool = False
    license: str | None = None
    lengths: str | None = None
    unconfirmed: str = ""

    def fields_for(self, kind: str) -> dict[str, str]:
        """Columns for its own task or for `"text"`; questions give what they are asked about."""
        if kind == self.task:
            return dict(self.fields)
        if self.flatten_text is not None:
            return {}
        column = "text" if "text" in KINDS[self.task] else "context"
        return {"text": self.fields.get(column, column)}

    def where(self, kind: str) -> dict[str, Any]:
        """Keyword arguments of `hub_sides`."""
        return {
            "config_name": self.config_name,
            "revision": self.revision,
            "train_split": self.train_split,
            "test_split": self.test_split,
            "data_files": self.data_files,
            "flatten": self.flatten if kind == self.task else self.flatten_text or self.flatten,
        }


_CLASSES, _SETS = "sequence_classification", "multi_label_classification"

CATALOG: dict[str, CatalogEntry] = {
    "hyperpartisan": CatalogEntry(
        title="News articles, hyperpartisan or not (SemEval 2019 task 4, the part labeled by article)",
        task=_CLASSES,
        hub_id="zapsdcn/hyperpartisan_news",
        lengths="645 articles (the task's by-article part)",
        unconfirmed="columns text and label are those of the same files elsewhere, not read from this card; the "
        "task's own repository, SemEvalWorkshop/hyperpartisan_news_detection (cc-by-4.0), needs a script",
    ),
    "ecthr": CatalogEntry(
        title="Facts of cases before the European Court of Human Rights, and the articles that were violated",
        task=_SETS,
        hub_id="coastalcph/lex_glue",
        config_name="ecthr_a",
        fields={"label": "labels"},
        license="cc-by-4.0",
        lengths="9,000 / 1,000 / 1,000 cases in train / validation / test (the Hub's viewer)",
    ),
    "eurlex": CatalogEntry(
        title="Laws of the European Union and their EuroVoc concepts (100 labels)",
        task=_SETS,
        hub_id="coastalcph/lex_glue",
        config_name="eurlex",
        fields={"label": "labels"},
        license="cc-by-4.0",
        lengths="65,000 laws in all splits (the Hub's viewer)",
    ),
    "arxiv-classification": CatalogEntry(
        title="Whole papers of arXiv, one of 11 subjects; mentions of the subject are removed",
        task=_CLASSES,
        hub_id="ccdv/arxiv-classification",
        config_name="no_ref",
        lengths="28,000 / 2,500 / 2,500 papers in train / validation / test (card)",
    ),
    "patent-classification": CatalogEntry(
        title="Whole patents, one of 9 classes",
        task=_CLASSES,
        hub_id="ccdv/patent-classification",
        config_name="patent",
        lengths="25,000 / 5,000 / 5,000 patents in train / validation / test (card)",
    ),
    "20newsgroups": CatalogEntry(
        title="Posts to 20 newsgroups without headers, signatures and quotations, split by date",
        task=_CLASSES,
        hub_id="SetFit/20_newsgroups",
        drop_empty=True,  # nothing is left of some posts
        lengths="about 18,000 posts (card)",
        unconfirmed="columns text and label are those of a copy of it, rasgaard/20_newsgroups",
    ),
    "imdb": CatalogEntry(
        title="Movie reviews, positive or negative",
        task=_CLASSES,
        hub_id="stanfordnlp/imdb",
        config_name="plain_text",
        lengths="25,000 / 25,000 labeled reviews in train / test (the dataset's page)",
    ),
    "booksum": CatalogEntry(
        title="Chapters of books out of copyright, of which BookSum has summaries",
        task="text",
        hub_id="ubaada/booksum-complete-cleaned",
        config_name="chapters",
        fields={"group": "bid"},
        lengths="5,653 / 854 / 950 chapters in train / validation / test (card)",
    ),
    "govreport": CatalogEntry(
        title="Reports of United States government agencies",
        task="text",
        hub_id="ccdv/govreport-summarization",
        config_name="document",
        fields={"text": "report"},
        lengths="17,517 / 973 / 973 reports in train / validation / test, on average fewer than 9,000 RoBERTa tokens "
        "(card)",
    ),
    "quality": CatalogEntry(
        title="Stories and articles with questions of four choices each",
        task="multiple_choice",
        hub_id="rbiswasfc/quality",
        test_split="validation",
        flatten_text=flatten.quality_articles,
        license="mit",
        lengths="2,523 / 2,086 questions in train / validation (card)",
    ),
    "qasper": CatalogEntry(
        title="Papers on language processing with questions that are answered by spans of them",
        task="question_answering",
        hub_id="allenai/qasper",
        revision="refs/convert/parquet",
        flatten=flatten.qasper_questions,
        flatten_text=flatten.qasper_papers,
        license="cc-by-4.0",
        lengths="888 / 281 / 416 papers in train / validation / test (the Hub's viewer)",
        unconfirmed="columns as of version 0.1.0 of its script; later ones were not read",
    ),
    "triviaqa": CatalogEntry(
        title="Trivia questions with the Wikipedia pages that answer them",
        task="question_answering",
        hub_id="mandarjoshi/trivia_qa",
        config_name="rc.wikipedia",
        test_split="validation",
        flatten=flatten.trivia_questions,
        license="unknown (card)",
    ),
    "mldr": CatalogEntry(
        title="Long English documents that the queries of MLDR were written for",
        task="text",
        hub_id="Shitao/MLDR",
        data_files={"train": "mldr-v1.0-en/train.jsonl.gz", "test": "mldr-v1.0-en/test.jsonl.gz"},
        flatten=flatten.mldr_queries,
        license="mit",
    ),
    "pg19": CatalogEntry(
        title="Books of Project Gutenberg published before 1919",
        task="text",
        hub_id="emozilla/pg19",
        fields={"group": "short_book_title"},
        lengths="28,602 / 50 / 100 books in train / validation / test, on average 399,450 characters (card)",
        unconfirmed="the card of this copy of deepmind/pg19 (apache-2.0, needs a script) names no license",
    ),
    "wikitext-103": CatalogEntry(
        title="Good and featured articles of Wikipedia, whole",
        task="text",
        hub_id="Salesforce/wikitext",
        config_name="wikitext-103-raw-v1",
        flatten=flatten.wikitext_articles,
        license="cc-by-sa-3.0, gfdl",
        lengths="1,800,000 / 3,760 / 4,360 lines in train / validation / test (the Hub's viewer)",
    ),
}
