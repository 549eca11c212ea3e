"""Learning curves: score = a + b · log2(n) over the number of labelled sentences n, with uncertainty. Pure.

The form is that of "languages you know"-style scaling fits: within the range that people can label, a classifier's score grows
by about the same amount each time that the labels double. Nothing is said beyond twice the largest n that was measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
BEYOND = 2.0  # how far past the measured sizes a fit is believed


@dataclass(frozen=True)
class Fit:
    """score = intercept + slope · log2(n). `covariance` is of (slope, intercept); `most` the largest n that was measured."""

    slope: float
    intercept: float
    covariance: tuple[tuple[float, float], tuple[float, float]]
    most: float

    def score(self, n: float) -> float:
        """The fitted score at n labels."""
        return self.intercept + self.slope * math.log2(n)

    @property
    def slope_interval(self) -> tuple[float, float]:
        """95 % interval of the gain per doubling."""
        spread = 1.96 * math.sqrt(self.covariance[0][0])
        return self.slope - spread, self.slope + spread

    def labels(self, score: float, seed: int = 0) -> tuple[float, float, float]:
        """(n, low, high): labels at which the curve reaches `score`, with a 95 % interval; infinite where it does not within twice
        the sizes that were measured."""
        drawn = np.random.default_rng(seed).multivariate_normal([self.slope, self.intercept], self.covariance, DRAWS)
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


def fit(sizes: Sequence[float], scores: Sequence[float]) -> Fit | None:
    """Least squares over points (n, score), one for each sample; None for fewer than three different sizes."""
    if len(set(sizes)) < 3:
        return None
    (slope, intercept), covariance = np.polyfit(np.log2(sizes), scores, 1, cov=True)
    rows = tuple(tuple(map(float, row)) for row in covariance)
    return Fit(float(slope), float(intercept), (rows[0], rows[1]), float(max(sizes)))  # type: ignore[arg-type]


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): a few samples' mean and its 95 % interval by Student's t; of one sample, that value three times."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half
