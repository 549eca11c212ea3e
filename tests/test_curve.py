"""Learning-curve fits against curves that are known, and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from xdist import curve

SIZES = [8, 16, 32, 64, 128, 256]


def curves(*scores: list[float]) -> dict[int, list[tuple[float, float]]]:
    return {seed: list(zip(SIZES, values, strict=True)) for seed, values in enumerate(scores)}


def line(intercept: float, slope: float) -> list[float]:
    return [intercept + slope * math.log2(n) for n in SIZES]


def test_a_known_curve_is_found() -> None:
    found = curve.fit(curves(*[line(0.2, 0.05)] * 3))
    assert found is not None
    assert found.slope == pytest.approx(0.05)
    assert found.intercept == pytest.approx(0.2)
    assert found.score(100) == pytest.approx(0.2 + 0.05 * math.log2(100))
    assert found.labels(0.5) == pytest.approx((64, 64, 64), rel=1e-3)  # 0.2 + 0.05 · 6


def test_the_slope_is_that_of_one_regression_and_its_interval_students_over_seeds() -> None:
    rng = np.random.default_rng(1)
    scores = [[value + rng.normal(0, 0.02) for value in line(0.3, 0.04)] for _ in range(5)]
    found, pooled = curve.fit(curves(*scores)), stats.linregress(np.log2(SIZES * 5), np.concatenate(scores))
    assert found is not None
    assert (found.slope, found.intercept) == pytest.approx((pooled.slope, pooled.intercept))
    slopes = [stats.linregress(np.log2(SIZES), values).slope for values in scores]
    assert found.slope_interval == pytest.approx(stats.t.interval(0.95, 4, loc=np.mean(slopes), scale=stats.sem(slopes)))


def test_the_interval_of_labels_holds_the_truth_as_often_as_it_says() -> None:
    """Seeds have an error of their own at all sizes, as nested samples do."""
    rng, hits, trials = np.random.default_rng(2), 0, 300
    for _ in range(trials):
        scores = [[value + shift + rng.normal(0, 0.01) for value in line(0.3, 0.05)] for shift in rng.normal(0, 0.02, 5)]
        found = curve.fit(curves(*scores))
        assert found is not None
        _, low, high = found.labels(0.3 + 0.05 * 6)
        hits += low <= 64 <= high
    assert 0.9 <= hits / trials <= 0.99


def test_what_is_not_reached_is_infinite_and_what_needs_nothing_is_one() -> None:
    rising, falling = curve.fit(curves(*[line(0.2, 0.05)] * 3)), curve.fit(curves(*[line(0.5, -0.01)] * 3))
    assert rising is not None
    assert falling is not None
    assert rising.labels(0.649) == pytest.approx((505, 505, 505), rel=1e-3)  # not yet twice the largest size
    assert math.isinf(rising.labels(0.66)[0])
    assert rising.labels(0.1)[0] == 1
    assert math.isinf(falling.labels(0.6)[0])


def test_two_sizes_are_no_curve_and_two_seeds_no_interval() -> None:
    assert curve.fit({seed: [(8, 0.1), (16, 0.2)] for seed in range(5)}) is None
    assert curve.fit(curves(line(0, 0.1), line(0, 0.1))) is None


def test_mean_and_interval_are_students() -> None:
    values = [0.5, 0.6, 0.55, 0.7, 0.52]
    mean, low, high = curve.mean_interval(values)
    wanted = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (mean, low, high) == pytest.approx((np.mean(values), *wanted))
    assert curve.mean_interval([0.4]) == (0.4, 0.4, 0.4)
