"""What is wrong with a source is one sentence that names it, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_linear_attn.data import load_documents

GOOD = [{"text": f"text {i}", "label": i % 2} for i in range(8)]
CHOICE = {"context": "A story.", "question": "What?", "choices": ["a", "b"], "label": 0}
ANSWER = {"question": "Who?", "context": "The lamp.", "answers": {"text": ["lamp"], "answer_start": [4]}}


def rows(path: Path, *wrong: dict[str, Any], task: str = "sequence_classification") -> str:
    """Seven good rows and then the wrong ones."""
    good = {"multiple_choice": [CHOICE], "question_answering": [ANSWER]}.get(task, GOOD) * 7
    if task == "multi_label_classification":
        good = [{"text": "text", "label": ["a", "b"]}] * 7
    elif task == "token_classification":
        good = [{"tokens": ["a", "b"], "label": ["O", "X"]}] * 7
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good[:7], *wrong]))
    return str(path)


# task, the row after seven good ones, what the message says of it
BAD_ROWS = {
    "empty text": ("sequence_classification", {"text": " ", "label": 0}, "column 'text' is empty"),
    "no text": ("text", {"text": None}, "column 'text' is empty"),
    "a number as text": ("text", {"text": 5}, "column 'text' must be text, given int 5"),
    "no label": ("sequence_classification", {"text": "x"}, "column 'label' has no label (None)"),
    "-1 as label": ("sequence_classification", {"text": "x", "label": -1}, "column 'label' has no label (-1)"),
    "half a class": (
        "sequence_classification",
        {"text": "x", "label": 0.5},
        "must be a word or a whole number, given 0.5",
    ),
    "a list as class": ("sequence_classification", {"text": "x", "label": [1]}, "must be a word or a whole number"),
    "a word as number": ("regression", {"text": "x", "label": "high"}, "must be a finite number, given str 'high'"),
    "one label for a set": (
        "multi_label_classification",
        {"text": "x", "label": "a"},
        "must be a list of labels, given 'a'",
    ),
    "a label twice": ("multi_label_classification", {"text": "x", "label": ["a", "a"]}, "names a label twice"),
    "too few token labels": (
        "token_classification",
        {"tokens": ["a", "b"], "label": ["O"]},
        "has 1 labels for 2 tokens",
    ),
    "text as tokens": ("token_classification", {"tokens": "a b", "label": ["O"]}, "'tokens' must be a list of texts"),
    "no tokens": ("token_classification", {"tokens": [], "label": []}, "'tokens' is an empty list"),
    "a start elsewhere": (
        "question_answering",
        {**ANSWER, "answers": {"text": ["lamp"], "answer_start": [0]}},
        "says that str 'lamp' starts at character 0 of the context, which has 'The ' there",
    ),
    "a negative start": (
        "question_answering",
        {**ANSWER, "answers": {"text": ["lamp"], "answer_start": [-5]}},
        "starts at character -5",
    ),
    "no starts": (
        "question_answering",
        {**ANSWER, "answers": {"text": ["lamp"], "answer_start": []}},
        "has 1 texts and 0 starts",
    ),
    "answers as words": ("question_answering", {**ANSWER, "answers": ["lamp"]}, "must be {text: [...], answer_start"),
    "a choice outside": ("multiple_choice", {**CHOICE, "label": 2}, "column 'label' is 2, there are choices 0 to 1"),
    "one choice": ("multiple_choice", {**CHOICE, "choices": ["a"]}, "must hold at least two choices"),
    "an empty choice": ("multiple_choice", {**CHOICE, "choices": ["a", " "]}, "holds an empty choice"),
    "an unknown choice": ("multiple_choice", {**CHOICE, "label": "c"}, "is 'c', which is not one of the choices"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_does_not_fit_is_named(tmp_path, name):
    task, wrong, message = BAD_ROWS[name]
    with pytest.raises(ValueError, match=r"^bad\.jsonl, row 8, column ") as caught:
        load_documents(rows(tmp_path / "bad.jsonl", wrong, task=task), task=task)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_label_that_training_does_not_have_is_named(tmp_path):
    train = rows(tmp_path / "train.jsonl")
    test = rows(tmp_path / "test.jsonl", {"text": "x", "label": 7})
    with pytest.raises(ValueError, match=r"test\.jsonl, row 8, column 'label' is 7, which is no label of the training"):
        load_documents({"train": train, "test": test})
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_list(GOOD, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"test\.jsonl, row 8.* 7, .*: no, yes\."):
        load_documents({"train": str(tmp_path / "a.parquet"), "test": test})


# keyword arguments, error, message; {d} is a folder with good.jsonl, empty and damaged files
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an empty name": ({"source": " "}, ValueError, "The source is empty"),
    "the root": ({"source": "/"}, ValueError, "'/' is the root of the file system"),
    "the root, roundabout": ({"source": "{d}/../../../../../../../../../.."}, ValueError, "root of the file system"),
    "a number": ({"source": 3}, ValueError, "The source must be a name, a path"),
    "a URL": ({"source": "https://example.org/a.jsonl"}, ValueError, "is a URL"),
    "a builder": ({"source": "json"}, ValueError, "'json' names a builder of datasets"),
    "another builder": ({"source": "imagefolder"}, ValueError, "Name the files instead"),
    "no such file": ({"source": "{d}/nowhere.jsonl"}, FileNotFoundError, "There is no file or folder"),
    "no such test file": (
        {"source": {"train": "{d}/good.jsonl", "test": "{d}/nowhere.csv"}},
        FileNotFoundError,
        "nowhere.csv",
    ),
    "no such part": (
        {"source": {"train": "{d}/good.jsonl", "tset": "{d}/good.jsonl"}},
        ValueError,
        "The part of the source 'tset' is not known. Did you mean 'test'?",
    ),
    "no training part": ({"source": {"test": "{d}/good.jsonl"}}, ValueError, "names no training files"),
    "one file twice": (
        {"source": {"train": "{d}/good.jsonl", "test": ["{d}/../d/good.jsonl"]}},
        ValueError,
        "is named as training and as test file",
    ),
    "a folder in a list": ({"source": ["{d}/good.jsonl", "{d}"]}, ValueError, "is a folder; name its files"),
    "a path that a name would be": ({"source": Path("imdb")}, FileNotFoundError, "There is no file or folder 'imdb'"),
    "no files": ({"source": []}, ValueError, "must name a file or a list of files, given []"),
    "another ending": ({"source": "{d}/a.pickle"}, ValueError, "its name ends in none of .json, .jsonl"),
    "a script": ({"source": "{d}/script.py"}, ValueError, "its name ends in none of"),
    "an empty file": ({"source": "{d}/empty.jsonl"}, ValueError, "empty.jsonl is empty"),
    "a header alone": ({"source": "{d}/header.csv"}, ValueError, "cannot be read as csv: it holds no rows"),
    "half a line": ({"source": "{d}/half.jsonl"}, ValueError, "half.jsonl cannot be read as json: JSON parse error"),
    "no parquet": ({"source": "{d}/no.parquet"}, ValueError, "no.parquet cannot be read as parquet: Parquet magic"),
    "ragged lines": ({"source": "{d}/ragged.csv"}, ValueError, "Expected 2 fields in line 3, saw 4"),
    "another encoding": ({"source": "{d}/latin.txt", "task": "text"}, ValueError, "latin.txt is not UTF-8 text"),
    "an empty folder": ({"source": "{d}/none", "task": "text"}, ValueError, "holds no file that can be read"),
    "tables and texts": ({"source": "{d}/mixed"}, ValueError, "holds tables (a.jsonl) and texts (readme.txt)"),
    "a file of no part": ({"source": "{d}/three"}, ValueError, "more.jsonl, whose name says no part"),
    "a test file and another": (
        {"source": "{d}/two"},
        ValueError,
        "holds test.jsonl and more.jsonl, whose name says no part",
    ),
    "one row of a label": (
        {"source": "{d}/rare.jsonl"},
        ValueError,
        "The label 'rare' occurs in one document (or group) only, rare.jsonl:5, which cannot be split",
    ),
    "too few of a label": ({"source": "{d}/few.jsonl"}, ValueError, "a test_fraction nearer to 0.5 may do"),
    "nothing to test": (
        {"source": {"train": "{d}/good.jsonl", "test": "{d}/unlabeled.jsonl"}},
        ValueError,
        "Nothing is left of unlabeled.jsonl. 1 test rows without a label were left out.",
    ),
    "cutting a table": (
        {"sample_by": "line", "task": "text"},
        ValueError,
        "good.jsonl is a table, whose rows are",
    ),
    "dropping questions": (
        {"drop_empty": True, "task": "question_answering"},
        ValueError,
        "drop_empty serves tasks with a column text",
    ),
    "a task": ({"task": "sequence_clasification"}, ValueError, "Did you mean 'sequence_classification'?"),
    "a field": (
        {"fields": {"txt": "text"}},
        ValueError,
        "'txt' is not known. Did you mean 'text'? Allowed: text, label",
    ),
    "a field of another task": (
        {"task": "question_answering", "fields": {"text": "text"}},
        ValueError,
        "Allowed: question, context, answers, group",
    ),
    "fields as a list": ({"fields": ["text"]}, ValueError, "fields must map our columns to the source's"),
    "a column": (
        {"fields": {"text": "txet"}},
        ValueError,
        "good.jsonl has no column 'txet', wanted as 'text' of sequence_classification. "
        "Did you mean fields={text: text}? Available: text, label.",
    ),
    "a column that is not mapped": ({"source": "{d}/body.jsonl"}, ValueError, "has no column 'text'"),
    "one label": ({"source": "{d}/body.jsonl", "fields": {"text": "body"}}, ValueError, "fewer than two labels"),
    "words and numbers": ({"source": "{d}/kinds.jsonl"}, ValueError, "mixes words and numbers as labels: 1, x"),
    "an option": ({"test_fractoin": 0.2}, ValueError, "Unknown option(s) 'test_fractoin'"),
    "code": ({"trust_remote_code": True}, ValueError, "Unknown option(s) 'trust_remote_code'"),
    "a fraction": ({"test_fraction": 2}, ValueError, "test_fraction must be between 0 and 1, given 2"),
    "a fraction in words": ({"test_fraction": "half"}, ValueError, "between 0 and 1, given 'half'"),
    "a seed": ({"seed": "one"}, ValueError, "seed must be a whole number, 0 or more, given 'one'"),
    "a word for a switch": ({"drop_empty": "yes"}, ValueError, "drop_empty must be true or false, given 'yes'"),
    "nobody's home": ({"source": "~nobody-of-this-name/x"}, ValueError, "can be no path"),
    "a long name": ({"source": "x" * 300}, ValueError, "can be no path"),
    "zeros and ones": (
        {"source": "{d}/pairs.jsonl", "task": "multi_label_classification"},
        ValueError,
        "which may be labels or one entry for each",
    ),
    "a unit": ({"source": "{d}/latin.txt", "sample_by": "word"}, ValueError, "Allowed: document, paragraph, line"),
    "no documents": ({"max_train_documents": 0}, ValueError, "max_train_documents must be a positive whole number"),
    "half a document": ({"max_test_documents": 1.5}, ValueError, "max_test_documents must be a positive whole number"),
    "a stream of labels": ({"streaming": True}, ValueError, "streaming=True serves task='text' only"),
    "a buffer of a table": (
        {"shuffle_buffer": 9, "task": "text"},
        ValueError,
        "shuffle_buffer=9 shuffles a stream; give it with streaming=True",
    ),
    "a buffer of one": (
        {"shuffle_buffer": 1, "streaming": True, "task": "text"},
        ValueError,
        "shuffle_buffer must be a whole number, 2 or more, or null, given 1",
    ),
    "a buffer in words": ({"shuffle_buffer": "all", "streaming": True, "task": "text"}, ValueError, "given 'all'"),
    "a buffer as a switch": ({"shuffle_buffer": True, "streaming": True, "task": "text"}, ValueError, "given True"),
    "a buffer of a bundled set": (
        {"source": "matching", "shuffle_buffer": 9, "streaming": True, "task": "text"},
        ValueError,
        "'matching' take no streaming",
    ),
    "too short a stream": ({"streaming": True, "task": "text"}, ValueError, "8 were held out for the test part"),
    "a damaged stream": (
        {"source": "{d}/half.jsonl", "streaming": True, "task": "text"},
        ValueError,
        "half.jsonl cannot be read",
    ),
    "fields of a bundled set": (
        {"source": "matching", "fields": {"text": "x"}},
        ValueError,
        "'matching' take no fields",
    ),
    "a task of a bundled set": (
        {"source": "matching", "task": "regression", "filler": "words"},
        ValueError,
        "are for sequence_classification or text, given task='regression'",
    ),
    "a task of the catalog": ({"source": "ecthr"}, ValueError, "is a set for multi_label_classification (or text)"),
    "fields of the catalog": (
        {"source": "imdb", "fields": {"text": "x"}},
        ValueError,
        "give its id, 'stanfordnlp/imdb'",
    ),
    "no id": ({"source": "a b"}, ValueError, "cannot be the id of a dataset"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("mistakes") / "d"
    (made / "none").mkdir(parents=True)
    rows(made / "good.jsonl", GOOD[7])
    for name, content in {
        "a.pickle": "x",
        "script.py": "raise SystemExit",
        "empty.jsonl": "",
        "header.csv": "text,label\n",
        "half.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "la',
        "no.parquet": "text,label\n",
        "ragged.csv": "text,label\na,1\nb,2,3,4\n",
        "body.jsonl": '{"body": "a", "label": 1}\n',
        "pairs.jsonl": '{"text": "a", "label": [1, 0]}\n{"text": "b", "label": [0, 1]}\n',
        "rare.jsonl": "".join(f'{{"text": "{i}", "label": "{"rare" if i == 4 else "a"}"}}\n' for i in range(6)),
        "few.jsonl": "".join(f'{{"text": "{i}", "label": {i % 2}}}\n' for i in range(4)),
        "unlabeled.jsonl": '{"text": "a", "label": null}\n',
        "kinds.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n',
    }.items():
        (made / name).write_text(content)
    (made / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for name, files in {
        "mixed": ["a.jsonl", "readme.txt"],
        "three": ["train.jsonl", "test.jsonl", "more.jsonl"],
        "two": ["test.jsonl", "more.jsonl"],
    }.items():
        (made / name).mkdir()
        for file in files:
            rows(made / name / file)
    return made


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_call_that_cannot_be_meant_is_one_sentence(folder, name):
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [filled(entry) for entry in value]
        return value.replace("{d}", str(folder)) if isinstance(value, str) else value

    options, error, message = BAD_CALLS[name]
    options = {"source": "{d}/good.jsonl", **options}
    with pytest.raises(error) as caught:
        load_documents(**{key: filled(value) for key, value in options.items()})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_builder_reads_nothing_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "a.json")
    with pytest.raises(ValueError, match="names a builder"):
        load_documents("json")
    (tmp_path / "json").mkdir()
    rows(tmp_path / "json" / "a.jsonl")
    assert load_documents("json").name == "json"  # a folder that is called so is one


def test_a_script_in_a_folder_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text("open('ran', 'w')")
    with pytest.raises(ValueError, match="at least two subfolders"):
        load_documents("mine")
    rows(tmp_path / "mine" / "a.jsonl")
    load_documents("mine")
    assert not (tmp_path / "ran").exists()


def test_a_name_of_the_catalog_and_of_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imdb").mkdir()
    rows(tmp_path / "imdb" / "a.jsonl")
    with pytest.raises(ValueError, match=r"a name of the catalog and a path here: write '\./imdb'"):
        load_documents("imdb")
    assert load_documents("./imdb").name == "imdb"
