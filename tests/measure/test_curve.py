"""A power law is found again from points on it, and what it says beyond them is what it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hf_linear_attn.measure.curve import fit_power_law


def test_a_power_law_is_found_again() -> None:
    tokens = [100.0, 200.0, 400.0, 800.0]
    law = fit_power_law(tokens, [3 * n**-0.4 for n in tokens])
    assert law is not None
    assert (law.factor, law.exponent, law.error) == (pytest.approx(3), pytest.approx(0.4), pytest.approx(0, abs=1e-9))
    assert law.at(80_000) == pytest.approx(3 * 80_000**-0.4)
    assert law.tokens_for(law.at(12_345)) == pytest.approx(12_345)


def test_noise_gives_the_error_of_a_regression() -> None:
    draw = np.random.default_rng(0)
    tokens = np.arange(1, 30) * 512.0
    losses = tokens**-0.3 * np.exp(0.1 * draw.standard_normal(29))
    law = fit_power_law(list(tokens), list(losses))
    other = stats.linregress(np.log(tokens), np.log(losses))
    assert law is not None
    assert (law.exponent, law.error) == (pytest.approx(-other.slope), pytest.approx(other.stderr))
    assert abs(law.exponent - 0.3) < 3 * law.error


def test_what_does_not_fall_never_arrives_and_little_is_no_curve() -> None:
    rising = fit_power_law([1, 2, 4], [1.0, 1.1, 1.3])
    assert rising is not None
    assert math.isinf(rising.tokens_for(0.5))
    assert fit_power_law([1, 2], [1.0, 0.5]) is None
    assert fit_power_law([1, 2, 4], [1.0, 0.5, 0.0]) is None
