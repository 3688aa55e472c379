"""Generated, installed and labeled local documents; options and subsets."""

from __future__ import annotations

from collections import Counter

import pytest

from hf_linear_attn.data.documents import load_documents
from hf_linear_attn.data.filler import KEYS
from hf_linear_attn.data.installed import clean_source
from hf_linear_attn.data.task import group_split


def ends(text: str) -> tuple[str, str]:
    words = text.replace(".", "").split()
    return words[6], words[-1]


@pytest.fixture(scope="module")
def matching():
    return load_documents("matching", filler="words", num_words=60, num_train=600, num_test=400, num_keys=4)


def test_matching_is_labeled_as_generated(matching):
    assert matching.generated
    assert matching.description.startswith("GENERATED")
    assert matching.source.startswith("generated")


def test_matching_is_solved_by_both_ends(matching):
    for part in (matching.train, matching.test):
        for text, label in zip(part["text"], part["label"], strict=True):
            first, last = ends(text)
            assert first in KEYS
            assert last in KEYS
            assert (first == last) == bool(label)


def test_matching_is_at_chance_from_one_end(matching):
    """A reader of one half sees one key, which tells nothing: fitted on train it stays near 1/2 on test."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    for half in (slice(None, 30), slice(-30, None)):

        def cut(texts, half=half):
            return [" ".join(text.split()[half]) for text in texts]

        model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=500))
        model.fit(cut(matching.train["text"]), matching.train["label"])
        accuracy = model.score(cut(matching.test["text"]), matching.test["label"])
        assert 0.42 < accuracy < 0.58  # 400 documents: three standard errors are .075
    for end in (0, 1):
        seen = Counter((ends(t)[end], y) for t, y in zip(matching.train["text"], matching.train["label"], strict=True))
        assert all(50 < count < 105 for count in seen.values())  # 75 expected of each key and label


def test_matching_length_and_balance_are_as_asked(matching):
    assert Counter(matching.test["label"]) == {0: 200, 1: 200}
    assert {len(text.split()) for text in matching.test["text"]} == {60 + 7 + 8}
    varied = load_documents("matching", filler="words", num_words=(20, 40), num_train=50, num_test=10)
    lengths = [len(text.split()) - 15 for text in varied.train["text"]]
    assert 20 <= min(lengths) < max(lengths) <= 40


def test_matching_is_reproducible():
    options = {"filler": "words", "num_words": 10, "num_train": 6, "num_test": 4}
    first, again, other = (load_documents("matching", seed=seed, **options) for seed in (1, 1, 2))
    assert first.train["text"] == again.train["text"]
    assert first.train["text"] != other.train["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_words": 0}, "num_words"),
        ({"num_words": (9, 3)}, "num_words"),
        ({"num_keys": 1}, "num_keys must be 2 to 16, given 1"),
        ({"filler": "lorem"}, "filler must be 'auto', 'sotu' or 'words', given 'lorem'"),
        ({"num_train": 1}, "num_train"),
    ],
)
def test_matching_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        load_documents("matching", **options)


@pytest.mark.parametrize("source", ["sotu", "matching", "installed-sources", "auto"])
def test_unknown_option_is_named_with_the_allowed_ones(source):
    with pytest.raises(ValueError, match=r"Unknown option.*'num_wrods'.*Allowed: "):
        load_documents(source, num_wrods=3)


def test_clean_source_hides_the_package():
    source = (
        "# Copyright The HuggingFace Team\n# Licensed\n\nimport torch\n"
        "from torch import (\n    nn,\n    Tensor,\n)\n"
        "from a.b import c, \\\n    d\n\ndef f(x):\n    import numpy as np\n"
        "    return torch.nn.functional.relu(x) + Torch + pytorch\n"
    )
    cleaned = clean_source(source, ["torch", "numpy"])
    assert "import" not in cleaned
    assert "Copyright" not in cleaned
    assert "Tensor" not in cleaned
    assert "    d" not in cleaned.split("def f")[0]
    assert "torch.nn" not in cleaned
    assert "package.nn.functional.relu(x) + package + pytorch" in cleaned


def test_installed_sources_have_no_import_and_no_name():
    task = load_documents("installed-sources", packages=["sympy", "networkx"], files_per_package=12, min_words=300)
    assert task.label_names == ["sympy", "networkx"]
    assert not task.generated
    assert not set(task.train["group"]) & set(task.test["group"])
    for text in [*task.train["text"], *task.test["text"]]:
        assert len(text.split()) >= 300
        lines = [line.split() for line in text.splitlines()]
        assert not any(line[:1] == ["from"] and "import" in line[2:3] for line in lines)
    texts = " ".join(task.train["text"]).lower()
    assert " sympy." not in texts
    assert " networkx." not in texts


def test_installed_sources_refuse_a_package_that_is_not_there():
    with pytest.raises(ValueError, match="'no_such_package' has 0 installed source files"):
        load_documents("installed-sources", packages=["sympy", "no_such_package"])


def write_folder(root, counts):
    for label, count in counts.items():
        (root / label).mkdir(parents=True)
        for index in range(count):
            (root / label / f"{index}.txt").write_text(f"{label} document {index}", encoding="utf-8")


def test_local_folder_is_split_by_file(tmp_path):
    write_folder(tmp_path, {"cats": 10, "dogs": 20})
    task = load_documents(str(tmp_path))
    assert task.label_names == ["cats", "dogs"]
    assert len(task.train) + len(task.test) == 30
    assert not set(task.train["text"]) & set(task.test["text"])
    for text, label in zip(task.test["text"], task.test["label"], strict=True):
        assert text.startswith(task.label_names[label])


def test_local_folder_that_is_split_already_is_kept(tmp_path):
    write_folder(tmp_path / "train", {"a": 3, "b": 4})
    write_folder(tmp_path / "test", {"a": 1, "b": 2})
    task = load_documents(str(tmp_path))
    assert (len(task.train), len(task.test)) == (7, 3)


def test_local_folder_with_one_label_is_refused(tmp_path):
    write_folder(tmp_path, {"only": 3})
    with pytest.raises(ValueError, match="at least two subfolders"):
        load_documents(str(tmp_path))


def test_subsets_keep_every_label_and_the_shares(tmp_path):
    write_folder(tmp_path / "train", {"a": 80, "b": 20})
    write_folder(tmp_path / "test", {"a": 30, "b": 3})
    task = load_documents(str(tmp_path), max_train_documents=20, max_test_documents=2)
    assert Counter(task.train["label"]) == {0: 16, 1: 4}
    assert Counter(task.test["label"]) == {0: 1, 1: 1}
    with pytest.raises(ValueError, match="below the number of labels"):
        load_documents(str(tmp_path), max_test_documents=1)


def test_group_split_refuses_a_label_in_one_group():
    with pytest.raises(ValueError, match=r"label\(s\) \[1\] occur in one group only"):
        group_split([0, 0, 1, 1], ["x", "y", "z", "z"], 0.3, 0)
    with pytest.raises(ValueError, match="test_fraction"):
        group_split([0, 0], ["x", "y"], 1.0, 0)
