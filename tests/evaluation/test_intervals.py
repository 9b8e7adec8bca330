"""Intervals, differences and corrections equal those of SciPy and of the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from thresher.evaluation.intervals import Mean, holm, t_distribution, t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30])
@pytest.mark.parametrize("t", [-3.0, -0.5, 0.0, 0.1, 1.0, 2.5, 40.0])
def test_the_distribution_is_students(degrees: int, t: float) -> None:
    assert t_distribution(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)


@pytest.mark.parametrize("degrees", [1, 2, 4, 29])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.9995])
def test_the_quantile_is_students(degrees: int, probability: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-12)


def test_a_mean_has_the_interval_and_the_p_value_of_a_t_test() -> None:
    values = [1.0, 1.5, 0.2, 2.2]
    mean, test = Mean.of(values), stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(0.95)
    assert (mean.low, mean.high, mean.p) == pytest.approx((low, high, test.pvalue))
    assert mean.deviation == pytest.approx(np.std(values, ddof=1))


def test_one_seed_has_no_interval_and_neither_have_equal_seeds_which_show_nothing() -> None:
    one = Mean.of([3.0])
    assert one.mean == 3.0
    assert math.isnan(one.half)
    assert math.isnan(one.p)
    for values in ([2.0, 2.0], [0.0, 0.0], [0.3 - 0.1, 0.2, 0.7 - 0.5]):  # the last differ in their last bits
        same = Mean.of(values)
        assert same.mean == pytest.approx(values[0])
        assert math.isnan(same.half)
        assert (same.deviation, same.p) == (0.0, 1.0)


def test_holm_multiplies_the_smallest_by_their_number() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.5, math.nan, 0.9])
    assert adjusted[0] == 1.0
    assert math.isnan(adjusted[1])
    assert holm([]) == []
