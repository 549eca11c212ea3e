"""Learning-curve fits against curves that are known, and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from xdist import curve

SIZES = [8, 16, 32, 64, 128, 256]


def test_a_known_curve_is_found() -> None:
    found = curve.fit(SIZES, [0.2 + 0.05 * math.log2(n) for n in SIZES])
    assert found is not None
    assert found.slope == pytest.approx(0.05)
    assert found.intercept == pytest.approx(0.2)
    assert found.score(100) == pytest.approx(0.2 + 0.05 * math.log2(100))
    assert found.labels(0.5) == pytest.approx((64, 64, 64), rel=1e-3)  # 0.2 + 0.05 · 6


def test_slope_and_its_error_are_those_of_a_regression() -> None:
    rng = np.random.default_rng(1)
    sizes = SIZES * 5
    scores = 0.3 + 0.04 * np.log2(sizes) + rng.normal(0, 0.02, len(sizes))
    found, wanted = curve.fit(sizes, scores.tolist()), stats.linregress(np.log2(sizes), scores)
    assert found is not None
    assert found.slope == pytest.approx(wanted.slope)
    assert found.intercept == pytest.approx(wanted.intercept)
    half = 1.96 * wanted.stderr
    assert found.slope_interval == pytest.approx((wanted.slope - half, wanted.slope + half))


def test_the_interval_of_labels_holds_the_truth_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(2), 0
    for _ in range(200):
        sizes = SIZES * 5
        found = curve.fit(sizes, (0.3 + 0.05 * np.log2(sizes) + rng.normal(0, 0.02, len(sizes))).tolist())
        assert found is not None
        _, low, high = found.labels(0.3 + 0.05 * 6)
        hits += low <= 64 <= high
    assert 0.9 <= hits / 200 <= 0.99


def test_what_is_not_reached_is_infinite_and_what_needs_nothing_is_one() -> None:
    rising = curve.fit(SIZES, [0.2 + 0.05 * math.log2(n) for n in SIZES])
    falling = curve.fit(SIZES, [0.5 - 0.01 * math.log2(n) for n in SIZES])
    assert rising is not None
    assert falling is not None
    assert rising.labels(0.649) == pytest.approx((505, 505, 505), rel=1e-3)  # not yet twice the largest size
    assert math.isinf(rising.labels(0.66)[0])
    assert rising.labels(0.1)[0] == 1
    assert math.isinf(falling.labels(0.6)[0])


def test_two_sizes_are_no_curve() -> None:
    assert curve.fit([8, 16, 8, 16], [0.1, 0.2, 0.1, 0.2]) is None


def test_mean_and_interval_are_students() -> None:
    values = [0.5, 0.6, 0.55, 0.7, 0.52]
    mean, low, high = curve.mean_interval(values)
    wanted = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (mean, low, high) == pytest.approx((np.mean(values), *wanted))
    assert curve.mean_interval([0.4]) == (0.4, 0.4, 0.4)
