"""Bootstrap intervals cover what they should and agree with SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hf_linear_attn.measure.bootstrap import (
    Interval,
    bootstrap_interval,
    bootstrap_statistic,
    paired_bootstrap_difference,
)
from hf_linear_attn.measure.metrics import macro_f1


def test_interval_is_scipys():
    scores = np.random.default_rng(0).normal(size=80)
    ours = bootstrap_interval(scores, num_resamples=4000)
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert ours.mean == pytest.approx(scores.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_coverage_is_about_the_confidence():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        interval = bootstrap_interval(rng.random(100) < 0.7, num_resamples=300, seed=trial, confidence=0.9)
        inside += not interval.excludes(0.7)
    assert 0.82 < inside / 200 < 0.96


def test_same_seed_same_interval():
    correct = np.random.default_rng(0).random(50) < 0.6
    assert bootstrap_interval(correct, seed=3) == bootstrap_interval(correct, seed=3)
    assert bootstrap_interval(correct, seed=3) != bootstrap_interval(correct, seed=4)


def test_groups_that_agree_within_widen_the_interval():
    rng = np.random.default_rng(0)
    by_group = rng.random(12) < 0.6
    correct, groups = np.repeat(by_group, 10), np.repeat([f"president {i}" for i in range(12)], 10)
    alone, grouped = bootstrap_interval(correct), bootstrap_interval(correct, groups=list(groups))
    assert grouped.mean == alone.mean
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_each_document_its_own_group_changes_nothing_much():
    correct = np.random.default_rng(0).random(100) < 0.6
    alone, grouped = bootstrap_interval(correct), bootstrap_interval(correct, groups=list(range(100)))
    assert grouped.low == pytest.approx(alone.low, abs=0.02)
    assert grouped.high == pytest.approx(alone.high, abs=0.02)


def test_paired_difference_is_narrower_than_two_intervals_suggest():
    rng = np.random.default_rng(0)
    a = rng.random(200) < 0.7
    b = np.where(rng.random(200) < 0.05, ~a, a)
    paired = paired_bootstrap_difference(a, b)
    assert paired.mean == pytest.approx(a.mean() - b.mean())
    single = bootstrap_interval(a)
    assert paired.high - paired.low < 0.7 * (single.high - single.low)


def test_no_difference_is_exactly_zero():
    a = [1, 0, 1, 1]
    assert paired_bootstrap_difference(a, a) == Interval(0.0, 0.0, 0.0)
    assert not paired_bootstrap_difference(a, a).excludes(0.0)


def test_statistic_resamples_its_arrays_together():
    labels = np.random.default_rng(0).integers(3, size=60)
    assert bootstrap_statistic(macro_f1, labels, labels, num_resamples=50) == Interval(1.0, 1.0, 1.0)
    wrong = bootstrap_statistic(macro_f1, (labels + 1) % 3, labels, num_resamples=50)
    assert wrong == Interval(0.0, 0.0, 0.0)


def test_dictionary_form():
    assert Interval(0.5, 0.25, 0.75).to_dict() == {"mean": 0.5, "low": 0.25, "high": 0.75}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "at least one document"),
        (lambda: bootstrap_interval([1, 0], groups=["x"]), "groups has 1 entries for 2 documents"),
        (lambda: bootstrap_interval([1, 0], confidence=95), "confidence must be between 0 and 1, given 95"),
        (lambda: bootstrap_interval([1, 0], num_resamples=0), "num_resamples must be at least 1, given 0"),
        (lambda: paired_bootstrap_difference([1, 0], [1]), "must score the same documents"),
        (lambda: bootstrap_statistic(macro_f1, [1, 0], [1]), "one length"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
