"""Passkey retrieval and associative recall: solved by who reads everything, at chance from the end alone."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from hf_linear_attn.data import load_documents
from hf_linear_attn.data.filler import KEYS

SMALL = {"filler": "words", "num_words": 60}


def answer_of(name: str, text: str) -> str:
    """What a reader of the whole text answers."""
    if name == "passkey":
        return re.search(r"The pass key is (\w+)\. Remember", text)[1]
    asked = re.search(r"Where is the (\w+)\?", text)[1]
    return re.search(rf"The {asked} is in the (\w+)\.", text)[1]


@pytest.mark.parametrize("name", ["passkey", "recall"])
def test_classes_are_what_the_document_says(name):
    made = load_documents(name, num_train=160, num_test=80, **SMALL)
    assert made.generated
    assert made.description.startswith("GENERATED")
    assert made.num_labels == 8
    for part, count in ((made.train, 20), (made.test, 10)):
        assert Counter(part["label"]) == dict.fromkeys(range(8), count)
        for text, label in zip(part["text"], part["label"], strict=True):
            assert answer_of(name, text) == made.label_names[label]


@pytest.mark.parametrize("name", ["passkey", "recall"])
def test_the_end_alone_tells_nothing(name):
    """Fitted on the closing question, and for recall on the words before it, a reader stays near one in eight."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    made = load_documents(name, num_train=800, num_test=400, **SMALL)

    def ends(texts: list[str]) -> list[str]:
        return [text.partition("Where is" if name == "recall" else "What is the")[2] for text in texts]

    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=500))
    model.fit(ends(made.train["text"]), made.train["label"])
    assert abs(model.score(ends(made.test["text"]), made.test["label"]) - 1 / 8) < 0.06


@pytest.mark.parametrize("name", ["passkey", "recall"])
def test_as_text_it_ends_with_the_answer(name):
    made = load_documents(name, task="text", num_train=20, num_test=8, **SMALL)
    assert made.train.column_names == ["text", "group"]
    assert made.label_names == []
    for text in made.train["text"]:
        assert text.removesuffix(".").split()[-1] == answer_of(name, text)


@pytest.mark.parametrize("name", ["passkey", "recall"])
def test_as_questions_the_answer_is_a_span(name):
    made = load_documents(name, task="question_answering", num_train=20, num_test=8, **SMALL)
    for row in made.train:
        (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(answer)] == answer
        assert answer_of(name, f"{row['context']} {row['question']}") == answer


def test_the_key_lies_anywhere():
    made = load_documents("passkey", num_train=400, num_test=8, **SMALL)
    places = [int(re.search(r"key at (\d+)%", group)[1]) for group in made.train["group"]]
    assert min(places) < 5
    assert max(places) > 95
    assert 44 < sum(places) / 400 < 56  # uniform: three standard errors are 4.4
    for text, place in zip(made.train["text"], places, strict=True):
        assert text.split().index("pass") - 1 == pytest.approx(60 * place / 100, abs=0.5)


@pytest.mark.parametrize("pairs", [1, 16])
def test_every_pair_is_said_once(pairs):
    made = load_documents("recall", num_pairs=pairs, num_values=4, num_train=20, num_test=4, **SMALL)
    for text in made.train["text"]:
        said = re.findall(r"The (\w+) is in the (\w+)\.", text)
        assert len({key for key, _ in said}) == len(said) == pairs
        assert {key for key, _ in said} <= set(KEYS)
        assert {value for _, value in said} <= set(made.label_names)
        assert len(text.split()) == 60 + 6 * pairs + 4 + 5


@pytest.mark.parametrize("name", ["passkey", "recall"])
def test_the_seed_decides(name):
    first, again, other = (load_documents(name, seed=seed, num_train=8, num_test=8, **SMALL) for seed in (1, 1, 2))
    assert first.train["text"] == again.train["text"]
    assert first.train["text"] != other.train["text"]
    assert not set(first.train["text"]) & set(first.test["text"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("passkey", {"num_keys": 17}, "num_keys must be 2 to 16, given 17"),
        ("passkey", {"num_train": 7}, "must be at least num_keys=8, given 7"),
        ("passkey", {"num_words": 0}, "num_words"),
        ("passkey", {"filler": "lorem"}, "filler must be"),
        ("passkey", {"task": "regression"}, "'regression' is not known. Allowed: sequence_classification, text"),
        ("recall", {"num_pairs": 0}, "num_pairs must be 1 to 16, given 0"),
        ("recall", {"num_values": 1}, "num_values must be 2 to 16, given 1"),
        ("recall", {"num_test": 2}, "must be at least num_values=8, given 400 and 2"),
        ("recall", {"task": "multiple_choice"}, "'multiple_choice' is not known"),
        ("recall", {"num_keys": 3}, "Unknown option(s) 'num_keys'"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_documents(name, **options)
