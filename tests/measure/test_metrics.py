"""The bundled metrics give scikit-learn's numbers, offline, alone and combined, in one process and in two."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error

from hf_linear_attn.data import KINDS
from hf_linear_attn.measure import metrics
from hf_linear_attn.measure.bundled import Accuracy, MacroF1
from hf_linear_attn.measure.metrics import BUNDLED_METRICS, check_metrics, load_metrics


def draw(seed: int, classes: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    references = rng.integers(classes, size=count)
    predictions = np.where(rng.random(count) < 0.5, references, rng.integers(classes, size=count))
    return predictions, references


@pytest.mark.parametrize("classes", [2, 6, 30])
def test_accuracy_and_macro_f1_equal_scikit_learn(classes):
    predictions, references = draw(classes, classes)
    found = load_metrics(["accuracy", "macro_f1"]).compute(predictions=predictions, references=references)
    assert found["accuracy"] == pytest.approx(accuracy_score(references, predictions), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(references, predictions, average="macro"), abs=1e-12)


def test_macro_f1_of_classes_on_one_side_only():
    predictions, references = [0, 0, 3, 3], [0, 1, 1, 0]
    found = MacroF1().compute(predictions=predictions, references=references)["macro_f1"]
    assert found == pytest.approx(f1_score(references, predictions, average="macro", zero_division=0.0))


def test_batches_of_tensors_add_up():
    predictions, references = draw(0, 4)
    combined = load_metrics(["accuracy", "macro_f1"])
    for start in range(0, 200, 64):
        part = slice(start, start + 64)
        combined.add_batch(predictions=torch.tensor(predictions[part]), references=torch.tensor(references[part]))
    assert combined.compute()["accuracy"] == pytest.approx(accuracy_score(references, predictions))


def test_a_metric_can_be_used_twice():
    combined = load_metrics(["accuracy"])
    assert combined.compute(predictions=[1, 1], references=[1, 0]) == {"accuracy": 0.5}
    assert combined.compute(predictions=[1, 1], references=[1, 1]) == {"accuracy": 1.0}


def test_perplexity_equals_the_exponential_of_cross_entropy():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 11, 7, dtype=torch.float64), torch.randint(7, (3, 11))
    lengths = torch.tensor([11, 4, 1])
    keep = torch.arange(11) < lengths[:, None]
    summed = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * keep
    found = load_metrics(["perplexity"]).compute(predictions=summed.sum(1), references=lengths)
    expected = torch.nn.functional.cross_entropy(logits[keep], targets[keep]).exp()
    assert found["perplexity"] == pytest.approx(expected.item(), rel=1e-12)


def test_perplexity_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one predicted token"):
        load_metrics(["perplexity"]).compute(predictions=[0.0], references=[0])


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
        ("in Paris", ["Paris", "the city of Paris"], 0.0, 2 / 3),
        ("a b c d", ["x"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("something", [], 0.0, 0.0),
        ("new york new york", ["new york"], 0.0, 2 * 2 / 6),
    ],
)
def test_exact_match_and_f1_of_answers(prediction, answers, exact, f1):
    found = load_metrics(["exact_match_f1"]).compute(predictions=[prediction], references=[answers])
    assert found["exact_match"] == exact
    assert found["f1"] == pytest.approx(f1)


def test_evaluate_combine_takes_them():
    found = evaluate.combine([Accuracy(), MacroF1()]).compute(predictions=[0, 1, 1], references=[0, 1, 0])
    assert set(found) == {"accuracy", "macro_f1"}


@pytest.mark.parametrize("name", sorted(BUNDLED_METRICS))
def test_every_metric_describes_itself(name):
    metric = BUNDLED_METRICS[name]()
    assert metric.info.description
    assert "Returns" in metric.info.inputs_description
    assert set(metric.features) == {"predictions", "references"}


def test_multi_label_f1_equals_scikit_learn():
    rng = np.random.default_rng(0)
    references = rng.integers(2, size=(80, 7))
    references[:, 6] = 0  # a label that is never there
    predictions = np.where(rng.random((80, 7)) < 0.6, references, 0)
    found = load_metrics(["multi_label_f1"]).compute(predictions=predictions, references=references.astype(float))
    for average in ("micro", "macro"):
        expected = f1_score(references, predictions, average=average, zero_division=0.0)
        assert found[f"{average}_f1"] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="apply a threshold first"):
        load_metrics(["multi_label_f1"]).compute(predictions=[[0.7, 0.1]], references=[[1, 0]])


def test_regression_metrics_equal_other_peoples():
    rng = np.random.default_rng(0)
    references = rng.normal(size=50)
    predictions = references + rng.normal(size=50)
    found = load_metrics(["mse", "pearson"]).compute(predictions=predictions, references=references)
    assert found["mse"] == pytest.approx(mean_squared_error(references, predictions))
    assert found["pearson"] == pytest.approx(pearsonr(references, predictions).statistic)
    assert np.isnan(load_metrics(["pearson"]).compute(predictions=[1.0, 1.0], references=[0.0, 1.0])["pearson"])


@pytest.mark.parametrize(
    ("predicted", "real", "precision", "recall"),
    [
        ("B-A I-A O B-B", "B-A I-A O B-B", 1.0, 1.0),
        ("B-A O O B-B", "B-A I-A O B-B", 1 / 2, 1 / 2),  # the end counts
        ("B-A B-A", "B-A I-A", 0.0, 0.0),  # one entity is not two
        ("I-A I-A O", "B-A I-A O", 1.0, 1.0),  # as CoNLL reads it
        ("B-A I-B", "B-A I-A", 0.0, 0.0),
        ("O O", "B-A O", 0.0, 0.0),
        ("O O", "O O", 0.0, 0.0),
        ("A A O B", "A A O B", 1.0, 1.0),
        ("B-A O B-B O", "B-A O O O", 1 / 2, 1.0),
    ],
)
def test_entities_are_right_as_a_whole(predicted, real, precision, recall):
    found = load_metrics(["entity_f1", "token_accuracy"]).compute(
        predictions=[predicted.split()], references=[real.split()]
    )
    assert found["entity_precision"] == pytest.approx(precision)
    assert found["entity_recall"] == pytest.approx(recall)
    both = precision + recall
    assert found["entity_f1"] == pytest.approx(2 * precision * recall / both if both else 0.0)
    same = [a == b for a, b in zip(predicted.split(), real.split(), strict=True)]
    assert found["token_accuracy"] == pytest.approx(np.mean(same))


def test_token_accuracy_counts_tokens_and_not_documents():
    found = load_metrics(["token_accuracy"]).compute(
        predictions=[["O"], ["A", "A", "A"]], references=[["A"], ["A"] * 3]
    )
    assert found["token_accuracy"] == 0.75
    with pytest.raises(ValueError, match="Document 1 has 1 predicted labels and 2 references"):
        load_metrics(["entity_f1"]).compute(predictions=[["O"], ["O"]], references=[["O"], ["O", "O"]])


@pytest.mark.parametrize("name", sorted(BUNDLED_METRICS))
@pytest.mark.parametrize("task", KINDS)
def test_a_metric_is_for_its_tasks_alone(name, task):
    if task in BUNDLED_METRICS[name].tasks:
        check_metrics([name], task)
    else:
        with pytest.raises(ValueError, match=f"'{name}' measures .*, not {task}. For {task}: "):
            check_metrics([name], task)


def test_every_task_has_a_metric():
    assert {task for metric in BUNDLED_METRICS.values() for task in metric.tasks} == set(KINDS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "No metric was named. Bundled: accuracy, macro_f1"),
        ("accuracy", "must be a list of names, given 'accuracy'"),
        ([3], "must be a list of names"),
        (["acuracy"], "'acuracy' is not bundled. Did you mean 'accuracy'?"),
        (["org/theirs"], "One of the Hub is named hub:<id>"),
        (["./x"], "'./x' is not bundled"),
        (["accuracy", "accuracy"], "named twice"),
        (["hub:"], "names no metric of the Hub"),
        (["hub:a/b/c"], "names no metric of the Hub"),
        (["hub:../x"], "names no metric of the Hub"),
        (["hub:/tmp/x"], "names no metric of the Hub"),
        (["hub:x.py"], "is a path here"),
    ],
)
def test_a_name_that_is_no_metric_is_refused_before_anything_runs(names, message):
    for call in (load_metrics, lambda names: check_metrics(names, "sequence_classification")):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(names)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"The task 'classification' is not known\. Allowed: sequence_classification"):
        check_metrics(["accuracy"], "classification")


@pytest.mark.parametrize("name", ["mine", "hub:mine"])
def test_a_script_of_this_folder_is_never_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text("open('ran', 'w')")
    for call in (load_metrics, lambda names: check_metrics(names, "text")):
        with pytest.raises(ValueError, match="'mine'"):
            call([name])
    assert not (tmp_path / "ran").exists()


def test_names_of_the_hub_go_to_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(metrics.evaluate, "load", lambda name, **options: asked.append(name) or Accuracy(**options))
    load_metrics(["macro_f1", "hub:org/theirs"])
    check_metrics(["macro_f1", "hub:theirs"], "sequence_classification")
    assert asked == ["org/theirs"]

    def unreachable(name, **options):
        raise FileNotFoundError("Couldn't find a module script")

    monkeypatch.setattr(metrics.evaluate, "load", unreachable)
    with pytest.raises(ValueError, match=r"'hub:theirs' could not be had from the Hub: Couldn't find"):
        load_metrics(["hub:theirs"])


def add_share(process_id: int, cache: str) -> dict[str, float] | None:
    options = {"num_process": 2, "process_id": process_id, "experiment_id": "shared", "cache_dir": cache}
    combined = metrics._Combined([Accuracy(**options), MacroF1(**options)])
    predictions, references = draw(7, 5)
    combined.add_batch(predictions=predictions[process_id::2], references=references[process_id::2])
    return combined.compute()


def test_two_processes_compute_over_all_examples(tmp_path):
    # Threads stand for the processes: they meet in files and locks, as processes do.
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(add_share, (0, 1), [str(tmp_path)] * 2)
    predictions, references = draw(7, 5)
    assert second is None
    assert first["accuracy"] == pytest.approx(accuracy_score(references, predictions))
    assert first["macro_f1"] == pytest.approx(f1_score(references, predictions, average="macro"))


def test_several_processes_need_a_name():
    with pytest.raises(ValueError, match="experiment_id"):
        load_metrics(["accuracy"], num_process=2)
