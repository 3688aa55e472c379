"""Local files of every format and folders of them become the tables of every task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_linear_attn.data import KINDS, load_documents

CONTEXT = "The lamp was lit. Nobody came."
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"A text, number {i}."} for i in range(12)],
    "sequence_classification": [{"text": f"A text, number {i}.", "label": ["no", "yes"][i % 2]} for i in range(12)],
    "multi_label_classification": [
        {"text": f"A text, number {i}.", "label": [["long"], ["long", "old"], []][i % 3]} for i in range(12)
    ],
    "regression": [{"text": f"A text, number {i}.", "label": i / 4} for i in range(12)],
    "token_classification": [
        {"tokens": ["Ann", "saw", f"Bob{i}"], "label": ["B-PER", "O", "B-PER"]} for i in range(12)
    ],
    "question_answering": [
        {
            "question": f"Who, {i}?",
            "context": f"{i} {CONTEXT}",
            "answers": {"text": ["lamp"], "answer_start": [f"{i} {CONTEXT}".index("lamp")]},
        }
        for i in range(12)
    ],
    "multiple_choice": [
        {"context": f"{i} {CONTEXT}", "question": "What?", "choices": ["a lamp", "a ship", "nothing"], "label": i % 3}
        for i in range(12)
    ],
}


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def as_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    ".jsonl": as_jsonl,
    ".json": as_json,
    ".csv": lambda path, rows: Dataset.from_list(rows).to_csv(path),
    ".tsv": lambda path, rows: Dataset.from_list(rows).to_csv(path, sep="\t"),
    ".parquet": lambda path, rows: Dataset.from_list(rows).to_parquet(path),
}
FLAT = ("text", "sequence_classification", "regression")  # what a .csv can hold


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[path.suffix](path, rows)
    return str(path)


@pytest.mark.parametrize(
    ("ending", "task"),
    [(ending, task) for ending in WRITERS for task in KINDS if task in FLAT or ending not in (".csv", ".tsv")],
)
def test_every_format_gives_every_table(tmp_path, ending, task):
    made = load_documents(write(tmp_path / f"rows{ending}", ROWS[task]), task=task)
    assert made.kind == task
    assert len(made.train) + len(made.test) == 12
    for part in (made.train, made.test):
        assert part.features == Features({**KINDS[task], "group": Value("string")})
        assert all(group.startswith(f"rows{ending}:") for group in part["group"])
    assert len({*made.train["group"], *made.test["group"]}) == 12


def test_what_the_columns_hold(tmp_path):
    def first(task: str) -> dict[str, Any]:
        made = load_documents({"train": write(tmp_path / f"{task}.jsonl", ROWS[task])}, task=task, test_fraction=0.2)
        names.append(made.label_names)
        return next(row for row in [*made.train, *made.test] if row["group"] == f"{task}.jsonl:2")

    names: list[list[str]] = []
    assert first("sequence_classification")["label"] == 1
    assert first("multi_label_classification")["label"] == [1.0, 1.0]
    assert first("regression")["label"] == 0.25
    assert first("token_classification")["label"] == [0, 1, 0]
    assert first("question_answering")["answers"] == {"text": ["lamp"], "answer_start": [6]}
    assert first("multiple_choice")["label"] == 1
    assert names == [["no", "yes"], ["long", "old"], ["label"], ["B-PER", "O"], [], []]


def test_the_split_depends_on_the_seed_only(tmp_path):
    source = write(tmp_path / "a.jsonl", ROWS["sequence_classification"])
    first, again, other = (load_documents(source, seed=seed).test["group"] for seed in (0, 0, 3))
    assert list(first) == list(again)
    assert list(first) != list(other)


def test_files_by_part_and_lists_of_them(tmp_path):
    rows = ROWS["sequence_classification"]
    a, b = write(tmp_path / "a.jsonl", rows[:4]), write(tmp_path / "b.csv", rows[4:8])
    c = write(tmp_path / "c.parquet", rows[8:])
    made = load_documents({"train": [a, b], "test": c})
    assert list(made.train["group"]) == [f"a.jsonl:{i}" for i in range(1, 5)] + [f"b.csv:{i}" for i in range(1, 5)]
    assert list(made.test["group"]) == [f"c.parquet:{i}" for i in range(1, 5)]
    assert len(load_documents([a, b, c]).train) < 12


def test_files_of_one_name_keep_their_folders(tmp_path):
    train, test = write(tmp_path / "x" / "a.jsonl", ROWS["text"]), write(tmp_path / "y" / "a.jsonl", ROWS["text"][:4])
    made = load_documents({"train": train, "test": test}, task="text")
    assert made.train["group"][0] == "x/a.jsonl:1"
    assert made.test["group"][0] == "y/a.jsonl:1"


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "a*.jsonl", "a b?.jsonl", "a#é%20.jsonl", "a.b,c.jsonl", "[a-z]/1.jsonl"]
)
def test_a_name_is_no_pattern(tmp_path, name):
    write(tmp_path / "a1.jsonl", [{"text": "another file"}])
    for streaming in (False, True):
        options = {"streaming": True, "max_test_documents": 4} if streaming else {}
        made = load_documents(write(tmp_path / name, ROWS["text"]), task="text", **options)
        assert len(list(made.train)) + len(made.test) == 12
    path = tmp_path / Path(name).with_suffix(".txt").name
    path.write_text("One.\n\nTwo.\n")
    assert len(load_documents(path, task="text", sample_by="paragraph").train) == 1


def test_fields_map_columns_and_groups_stay_together(tmp_path):
    rows = [{"body": f"text {i}", "category": "ab"[i % 2], "author": f"w{i // 4}"} for i in range(24)]
    fields = {"text": "body", "label": "category", "group": "author"}
    made = load_documents(write(tmp_path / "a.csv", rows), fields=fields, test_fraction=0.4)
    assert made.label_names == ["a", "b"]
    assert not set(made.train["group"]) & set(made.test["group"])
    assert set(made.train["group"]) <= {f"w{i}" for i in range(6)}


def test_questions_about_one_context_stay_together(tmp_path):
    rows = [{**ROWS["question_answering"][i // 4], "question": f"Question {i}?"} for i in range(24)]
    made = load_documents(write(tmp_path / "a.jsonl", rows), task="question_answering")
    assert not set(made.train["context"]) & set(made.test["context"])


def test_a_labeled_source_as_text(tmp_path):
    source = write(tmp_path / "a.jsonl", ROWS["sequence_classification"])
    made = load_documents(source, task="text", fields={"label": "label"})
    assert made.train.column_names == ["text", "group"]
    assert made.label_names == []
    assert load_documents("matching", task="text", filler="words", num_train=4, num_test=4).train.column_names == [
        "text",
        "group",
    ]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train-00000-of-00001.jsonl", "dev.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("corpus_train.jsonl", "corpus_eval.jsonl"),
        ("data/train/1.jsonl", "data/test/1.jsonl"),
    ],
)
def test_a_folder_says_its_parts(tmp_path, train, test):
    rows = ROWS["sequence_classification"]
    write(tmp_path / "d" / train, rows[:8])
    write(tmp_path / "d" / test, rows[8:])
    (tmp_path / "d" / ".hidden.jsonl").write_text("not json")
    made = load_documents(str(tmp_path / "d"))
    assert (len(made.train), len(made.test)) == (8, 4)
    assert made.name == "d"
    assert made.note == ("The validation files are the test part." if "dev" in test else "")


def test_validation_files_beside_test_files_are_left_out_with_a_note(tmp_path):
    for name in ("train", "validation", "test"):
        write(tmp_path / "d" / f"{name}.jsonl", ROWS["text"])
    made = load_documents(tmp_path / "d", task="text")
    assert (len(made.train), len(made.test)) == (12, 12)
    assert made.note == "1 validation file(s) were left out: there are test files."


def test_a_folder_without_parts_is_split(tmp_path):
    write(tmp_path / "d" / "a.jsonl", ROWS["text"][:6])
    write(tmp_path / "d" / "deep" / "b.jsonl", ROWS["text"][6:])
    made = load_documents(str(tmp_path / "d"), task="text")
    assert len(made.train) + len(made.test) == 12
    assert {group.split(":")[0] for group in [*made.train["group"], *made.test["group"]]} == {"a.jsonl", "deep/b.jsonl"}


def test_a_folder_of_unlabeled_texts(tmp_path):
    for index in range(10):
        path = tmp_path / "books" / f"shelf{index % 2}" / f"{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Title {index}\n\nA text\nof lines.\n", encoding="utf-8")
    made = load_documents(str(tmp_path / "books"), task="text")
    assert (len(made.train), len(made.test)) == (7, 3)
    for row in [*made.train, *made.test]:
        number = row["group"].split("/")[1].removesuffix(".txt")
        assert row["text"] == f"Title {number}\n\nA text\nof lines.\n"
    (tmp_path / "books" / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty.txt, column 'text' is empty \(drop_empty"):
        load_documents(str(tmp_path / "books"), task="text")
    with pytest.raises(ValueError, match="holds texts only"):
        load_documents(str(tmp_path / "books"), task="regression")


def test_titles_of_texts_say_no_part(tmp_path):
    for title in ("The Great Train Robbery", "A Test of Time", "Emma", "Dev Notes"):
        (tmp_path / f"{title}.txt").write_text("Once.")
    assert len(load_documents(tmp_path, task="text").train) == 3
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    for part, title in (("train", "A Test of Time"), ("train", "Emma"), ("test", "The Great Train Robbery")):
        (tmp_path / f"{title}.txt").rename(tmp_path / part / f"{title}.txt")
    (tmp_path / "Dev Notes.txt").unlink()
    assert list(load_documents(tmp_path, task="text").test["group"]) == ["test/The Great Train Robbery.txt"]


def test_streaming_a_folder_of_texts(tmp_path):
    for index in range(6):
        (tmp_path / f"{index}.txt").write_text(f"Text {index}" if index != 4 else "")
    made = load_documents(tmp_path, task="text", streaming=True, max_test_documents=2, drop_empty=True)
    assert list(made.test["group"]) == ["0.txt", "1.txt"]
    assert [(row["group"], row["text"]) for row in made.train] == [(f"{i}.txt", f"Text {i}") for i in (2, 3, 5)]


def test_label_folders_serve_as_text_too(tmp_path):
    for part, label in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        (tmp_path / "d" / part / label).mkdir(parents=True)
        (tmp_path / "d" / part / label / "1.txt").write_text(f"{part} {label}")
    made = load_documents(str(tmp_path / "d"), task="text")
    assert list(made.train["group"]) == ["train/a/1.txt", "train/b/1.txt"]
    assert list(load_documents(str(tmp_path / "d")).test["group"]) == ["a/1.txt", "b/1.txt"]
    with pytest.raises(ValueError, match="sample_by=line serves texts without labels"):
        load_documents(str(tmp_path / "d"), sample_by="line")


@pytest.mark.parametrize(("unit", "count"), [("line", 5), ("paragraph", 3)])
def test_one_text_file_is_cut_as_asked(tmp_path, unit, count):
    path = tmp_path / "novel.txt"
    path.write_text("One.\nTwo.\n\nThree.\nFour.\n\nFive.\n")
    made = load_documents(str(path), task="text", sample_by=unit, drop_empty=True)
    assert len(made.train) + len(made.test) == count
    assert made.note == ("2 rows without text were left out." if unit == "line" else "")
    with pytest.raises(
        ValueError, match=r"one document .* only, novel\.txt, which cannot be split.*sample_by=paragraph"
    ):
        load_documents(str(path), task="text")


def test_paragraphs_become_a_document(tmp_path):
    rows = [{"text": ["First.", "Second."]} for _ in range(4)]
    assert load_documents(write(tmp_path / "a.jsonl", rows), task="text").train["text"][0] == "First.\n\nSecond."


@pytest.mark.parametrize("missing", [None, -1])
def test_test_rows_without_a_label_are_dropped_with_a_note(tmp_path, missing):
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(8)]
    train, test = write(tmp_path / "a.jsonl", rows), [*rows, {"text": "unlabeled", "label": missing}]
    made = load_documents({"train": train, "test": write(tmp_path / "b.jsonl", test)})
    assert len(made.test) == 8
    assert made.note == "1 test rows without a label were left out."
    with pytest.raises(ValueError, match=r"b\.jsonl, row 9, column 'label' has no label"):
        load_documents({"train": str(tmp_path / "b.jsonl"), "test": train})


def test_labels_of_a_column_with_gaps_are_whole_numbers(tmp_path):
    (tmp_path / "test.csv").write_text("text,label\na,3\nb,\n")  # pandas reads 3.0 and NaN
    (tmp_path / "train.csv").write_text("text,label\na,3\nb,1\n")
    made = load_documents(str(tmp_path))
    assert made.label_names == ["1", "3"]
    assert list(made.test["label"]) == [1]


def test_class_labels_keep_their_names(tmp_path):
    names = ClassLabel(names=["z", "a", "unused"])
    features = Features({"text": Value("string"), "label": names, "labels": List(names)})
    rows = [{"text": f"text {i}", "label": i % 2, "labels": [i % 2]} for i in range(8)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    made = load_documents(str(tmp_path / "a.parquet"))
    assert made.label_names == ["z", "a", "unused"]
    test = write(tmp_path / "b.jsonl", [{"text": "by name", "label": "a"}])
    assert list(load_documents({"train": str(tmp_path / "a.parquet"), "test": test}).test["label"]) == [1]
    made = load_documents(str(tmp_path / "a.parquet"), task="multi_label_classification", fields={"label": "labels"})
    assert made.label_names == ["z", "a", "unused"]
    assert made.train["label"][0] in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])


def test_one_entry_for_each_label(tmp_path):
    rows = [{"text": f"text {i}", "label": [float(i % 2), 1.0, 0.0]} for i in range(8)]
    made = load_documents(write(tmp_path / "a.jsonl", rows), task="multi_label_classification")
    assert made.label_names == ["label 0", "label 1", "label 2"]
    assert sorted(made.train["label"])[0] == [0.0, 1.0, 0.0]


def test_answers_as_records_and_unanswerable_questions(tmp_path):
    rows = [
        {"question": "Who?", "context": f"{i} lamp", "answers": [{"text": "lamp", "answer_start": 2}] if i % 2 else []}
        for i in range(8)
    ]
    made = load_documents(write(tmp_path / "a.jsonl", rows), task="question_answering")
    assert {tuple(answer["text"]) for answer in made.train["answers"]} == {("lamp",), ()}


def test_subsets_of_every_task(tmp_path):
    for task, rows in ROWS.items():
        path = write(tmp_path / f"{task}.jsonl", rows)
        made = load_documents(path, task=task, max_train_documents=3, max_test_documents=2)
        assert (len(made.train), len(made.test)) == (3, 2)


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, ROWS["text"])
    load_documents(str(path), task="text")
    write(path, [{"text": "other"}] * 30)
    assert set(load_documents(str(path), task="text").train["text"]) == {"other"}


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_streaming_holds_out_the_first_documents(tmp_path, ending):
    source = write(tmp_path / f"a{ending}", ROWS["text"])
    made = load_documents(source, task="text", streaming=True, max_test_documents=5, max_train_documents=4)
    assert list(made.test["text"]) == [row["text"] for row in ROWS["text"][:5]]
    assert [row["group"] for row in made.train] == [f"a{ending}:{i}" for i in range(6, 10)]
    assert [row["text"] for row in made.train] == [row["text"] for row in ROWS["text"][5:9]]  # a second pass
    assert made.note == "The first 5 documents are the test part."


def test_streaming_takes_test_files(tmp_path):
    train, test = write(tmp_path / "a.jsonl", ROWS["text"]), write(tmp_path / "b.jsonl", ROWS["text"][:3])
    made = load_documents({"train": train, "test": test}, task="text", streaming=True)
    assert len(list(made.train)) == 12
    assert list(made.test["group"]) == ["b.jsonl:1", "b.jsonl:2", "b.jsonl:3"]


def test_streaming_reads_the_first_rows_and_raises_at_later_ones(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(400)]
    rows[300] = {"text": ""}
    made = load_documents(write(tmp_path / "a.jsonl", rows), task="text", streaming=True)
    with pytest.raises(ValueError, match=r"a\.jsonl, row 301, column 'text' is empty"):
        list(made.train)
    rows[3] = {"text": ""}
    with pytest.raises(ValueError, match=r"a\.jsonl, row 4, column 'text' is empty"):
        load_documents(write(tmp_path / "a.jsonl", rows), task="text", streaming=True)


def test_a_stream_is_shuffled_in_its_buffer_by_its_seed(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(60)]
    source = write(tmp_path / "a.jsonl", rows)

    def read(passes=0, **options):
        made = load_documents(source, task="text", streaming=True, max_test_documents=5, **options)
        assert list(made.test["text"]) == [row["text"] for row in rows[:5]], "held out before the rest is shuffled"
        made.train.set_epoch(passes)
        found = [int(row["text"].removeprefix("text ")) for row in made.train]
        assert [row["group"] for row in made.train] == [f"a.jsonl:{i + 1}" for i in found]
        return found

    assert read() == [*range(5, 60)]
    shuffled = read(shuffle_buffer=10)
    assert shuffled != sorted(shuffled)
    assert sorted(shuffled) == [*range(5, 60)]
    assert all(i - 5 - place < 20 for place, i in enumerate(shuffled)), "a document waits for the buffer, not for all"
    assert read(shuffle_buffer=10) == shuffled
    assert len({tuple(read(shuffle_buffer=10, seed=seed)) for seed in range(3)}) == 3
    assert len({tuple(read(passes, shuffle_buffer=10)) for passes in range(3)}) == 3
    assert read(1, shuffle_buffer=10) == read(1, shuffle_buffer=10)
    few = {tuple(sorted(read(passes, shuffle_buffer=10, max_train_documents=20))) for passes in range(2)}
    assert few == {tuple(range(5, 25))}, "the same documents in every pass"


@pytest.mark.parametrize("buffer", [None, 3])
def test_texts_that_stream_keep_the_names_of_their_files_in_every_pass(tmp_path, buffer):
    for part, count in (("train", 8), ("test", 2)):
        (tmp_path / part).mkdir()
        for index in range(count):
            (tmp_path / part / f"{index}.txt").write_text(f"{part} text {index}")
    made = load_documents(tmp_path, task="text", streaming=True, shuffle_buffer=buffer)
    for passes in range(3):
        made.train.set_epoch(passes)
        found = [(row["group"], row["text"]) for row in made.train]
        assert sorted(found) == [(f"train/{i}.txt", f"train text {i}") for i in range(8)]
