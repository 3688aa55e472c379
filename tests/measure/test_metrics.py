"""The bundled metrics give scikit-learn's numbers, offline, alone and combined, in one process and in two."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from hf_linear_attn.measure import metrics
from hf_linear_attn.measure.metrics import BUNDLED_METRICS, Accuracy, MacroF1, load_metrics


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


def test_unknown_metric_lists_the_bundled_ones(monkeypatch):
    def unreachable(name, **options):
        raise FileNotFoundError("Couldn't find a module script")

    monkeypatch.setattr(metrics.evaluate, "load", unreachable)
    with pytest.raises(ValueError, match=r"'acuracy' is not bundled.*Bundled: accuracy, macro_f1, perplexity"):
        load_metrics(["accuracy", "acuracy"])
    with pytest.raises(ValueError, match="No metric was named"):
        load_metrics([])


def test_other_names_go_to_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(metrics.evaluate, "load", lambda name, **options: asked.append(name) or Accuracy(**options))
    load_metrics(["accuracy", "org/theirs"])
    assert asked == ["org/theirs"]


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
