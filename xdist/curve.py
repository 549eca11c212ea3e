"""Learning curves: score = a + b · log2(n) over the number of labelled sentences n, with uncertainty. Pure.

The form is that of "languages you know"-style scaling fits: within the range that people can label, a classifier's score grows
by about the same amount each time that the labels double. Nothing is said beyond twice the largest n that was measured. Intervals
are over samples of labelled sentences; the test set and the pool that samples are drawn from are what they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
BEYOND = 2.0  # how far past the measured sizes a fit is believed
LEAST = 3  # sizes of a curve, and seeds of an interval


@dataclass(frozen=True)
class Fit:
    """score = intercept + slope · log2(n), the mean of the lines of single seeds. `covariance` is that of the mean's (slope,
    intercept), from the spread over `seeds` seeds; `most` the largest n that was measured."""

    slope: float
    intercept: float
    covariance: tuple[tuple[float, float], tuple[float, float]]
    seeds: int
    most: float

    def score(self, n: float) -> float:
        """The fitted score at n labels."""
        return self.intercept + self.slope * math.log2(n)

    @property
    def slope_interval(self) -> tuple[float, float]:
        """95 % interval of the gain per doubling, by Student's t over seeds."""
        from scipy.stats import t

        half = float(t.ppf(0.975, self.seeds - 1)) * math.sqrt(self.covariance[0][0])
        return self.slope - half, self.slope + half

    def labels(self, score: float, seed: int = 0) -> tuple[float, float, float]:
        """(n, low, high): labels at which the curve reaches `score`, with a 95 % interval; infinite where it does not within twice
        the sizes that were measured."""
        rng = np.random.default_rng(seed)
        normal = rng.multivariate_normal([0.0, 0.0], self.covariance, DRAWS)
        drawn = normal / np.sqrt(rng.chisquare(self.seeds - 1, (DRAWS, 1)) / (self.seeds - 1)) + [self.slope, self.intercept]
        reached = [_labels(slope, intercept, score, self.most) for slope, intercept in drawn]
        low, high = np.quantile(reached, [0.025, 0.975], method="closest_observation")
        return _labels(self.slope, self.intercept, score, self.most), float(low), float(high)


def _labels(slope: float, intercept: float, score: float, most: float) -> float:
    if intercept >= score:  # already there with one label
        return 1.0
    if slope <= 0:
        return math.inf
    n = 2 ** min((score - intercept) / slope, 60)
    return n if n <= BEYOND * most else math.inf


def fit(curves: Mapping[int, Sequence[tuple[float, float]]]) -> Fit | None:
    """A line through the points (n, score) of each seed by least squares, and the mean of these lines: samples of one seed contain
    each other, so its points err together, and only seeds tell how much. None for fewer than three sizes or seeds."""
    if len(curves) < LEAST or any(len({n for n, _ in points}) < LEAST for points in curves.values()):
        return None
    lines = np.array([np.polyfit([math.log2(n) for n, _ in points], [score for _, score in points], 1) for points in curves.values()])
    (slope, intercept), spread = lines.mean(0), np.cov(lines.T) / len(lines)
    rows = ((float(spread[0, 0]), float(spread[0, 1])), (float(spread[1, 0]), float(spread[1, 1])))
    return Fit(float(slope), float(intercept), rows, len(lines), max(float(n) for points in curves.values() for n, _ in points))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): a few samples' mean and its 95 % interval by Student's t; of one sample, that value three times."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half
