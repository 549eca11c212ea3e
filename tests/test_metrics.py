"""Measures against scikit-learn and against loops written out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold

from xdist import metrics


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 5])
def test_head_predicts_as_logistic_regression(classes: int) -> None:
    x, y = make_blobs(300, n_features=6, centers=classes, cluster_std=4.0, random_state=0)
    labels = [f"class {number}" for number in y]
    head = metrics.fit_head(x[:200], labels[:200])
    wanted = LogisticRegression(C=metrics.REGULARISATION, max_iter=2000).fit(x[:200], labels[:200])
    predicted = [head.classes[index] for index in head.predict(x[200:])]
    assert predicted == wanted.predict(x[200:]).tolist()
    assert len(set(predicted)) == classes
    scores = x[200:] @ head.weights.T + head.bias
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, wanted.predict_proba(x[200:]), atol=1e-4)


def test_regularisation_is_the_best_of_a_loop_over_folds() -> None:
    x, y = make_blobs(200, n_features=20, centers=4, cluster_std=9.0, random_state=1)
    labels = [f"class {number}" for number in y]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    means = []
    for c in metrics.REGULARISATIONS:
        scores = []
        for train, test in StratifiedKFold(metrics.FOLDS).split(x, labels):
            head = metrics.fit_head(x[train], [labels[row] for row in train], c)
            scores.append(np.mean([head.classes[guess] == labels[row] for guess, row in zip(head.predict(x[test]), test, strict=True)]))
        means.append(np.mean(scores))
    assert len(set(means)) > 1
    assert metrics.chosen_regularisation(x, labels) == metrics.REGULARISATIONS[int(np.argmax(means))]


@pytest.mark.parametrize("labels", [["only"] * 9, ["a"] * 20 + ["b"] * 4])
def test_regularisation_is_the_default_where_folds_cannot_be_made(labels: list[str]) -> None:
    assert metrics.chosen_regularisation(unit(len(labels), 4, 0), labels) == metrics.REGULARISATION


@pytest.mark.filterwarnings("error")
def test_head_of_one_row_per_class_is_fitted_without_a_warning() -> None:
    assert len(metrics.fit_head(unit(6, 4, 0), list("abcdef")).classes) == 6


def test_head_of_a_single_class_always_says_it() -> None:
    head = metrics.fit_head(unit(3, 4, 0), ["only"] * 3)
    assert [head.classes[index] for index in head.predict(unit(5, 4, 1))] == ["only"] * 5


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, 4, 50), rng.integers(1, 6, 50)  # 0 is never predicted, 4 and 5 never true
    assert metrics.macro_f1(truth, predicted, 9) == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))


@pytest.mark.parametrize("block", [1, 3, 7, 1024])
def test_retrieved_across_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)
    a = unit(40, 6, 0)
    b = a + 0.3 * unit(40, 6, 1)  # so that some are found and some are not
    b[17] = b[5]
    wanted = [
        [max(range(40), key=lambda other: float(x[own] @ y[other])) == own for own in range(40)]
        for x, y in ((a, b), (b, a))
    ]  # fmt: skip
    found = metrics.retrieved(a, b)
    assert [side.tolist() for side in found] == wanted
    assert 10 < found[0].sum() < 40
    assert 10 < found[1].sum() < 40


def test_retrieved_of_nothing() -> None:
    assert [side.shape for side in metrics.retrieved(np.empty((0, 4), np.float32), np.empty((0, 4), np.float32))] == [(0,), (0,)]


def test_retrieved_by_hand() -> None:
    b = np.eye(3, dtype=np.float32)
    forward, backward = metrics.retrieved(b[[0, 2, 2]], b)
    assert forward.tolist() == [True, False, True]
    assert backward.tolist() == [True, False, False]  # of two equally near ones the first counts


@pytest.mark.parametrize("block", [1, 4, 1024])
def test_own_probability_is_the_softmax_of_all_cosines(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)
    queries, keys = unit(10, 4, 0), unit(10, 4, 1)
    powers = np.exp(queries @ keys.T / 0.1)
    wanted = powers.diagonal() / powers.sum(axis=1)
    np.testing.assert_allclose(metrics.own_probability(queries, keys, 0.1), wanted, rtol=1e-5)


def test_likelihood_by_hand() -> None:
    assert metrics.likelihood(np.array([1.0, 0.0]), 4) == pytest.approx(math.sqrt(0.9925 * 0.0025))
    assert metrics.likelihood(np.array([math.nan, math.nan]), 4) == pytest.approx(0.0025)  # of a student that broke


@pytest.mark.parametrize("block", [1, 4, 1024])
@pytest.mark.parametrize(("rows", "neighbours"), [(15, 4), (3, 4), (15, 1)])
def test_margin_is_the_naive_double_loop(monkeypatch: pytest.MonkeyPatch, block: int, rows: int, neighbours: int) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)
    a = np.abs(unit(rows, 5, 0))  # as in a narrow cone, where neighbourhoods are dense
    b = a + 0.35 * np.abs(unit(rows, 5, 1))
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    k = min(neighbours, rows)
    outcomes = []
    for i in range(rows):
        margins = []
        for j in range(rows):
            around_a = sorted((float(a[i] @ key) for key in b), reverse=True)[:k]
            around_b = sorted((float(b[j] @ key) for key in a), reverse=True)[:k]
            margins.append(float(a[i] @ b[j]) / ((sum(around_a) / k + sum(around_b) / k) / 2))
        outcomes.append(int(np.argmax(margins)) == i)
    assert metrics.margin_retrieved(a, b, neighbours).tolist() == outcomes


def test_margin_sees_through_a_hub() -> None:
    # Key 2 is near to everything, so that cosine picks it for query 0; over its dense neighbourhood key 0 wins.
    angle = np.deg2rad([0, 90, 50])
    queries = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    angle = np.deg2rad([-42, 135, 40])
    keys = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    assert metrics.retrieved(queries, keys)[0][0] == np.False_
    assert metrics.margin_retrieved(queries, keys, neighbours=2)[0] == np.True_


def test_bootstrap_interval_of_a_mean() -> None:
    outcomes = np.arange(400) < 300
    score = metrics.bootstrap(lambda rows: float(outcomes[rows].mean()), 400, 2000, seed=1)
    assert (score.value, score.n) == (0.75, 400)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)  # normal approximation
    assert (score.low, score.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


def test_bootstrap_repeats_for_a_seed_and_does_without_resamples() -> None:
    def statistic(rows: np.ndarray) -> float:
        return float(rows.mean())

    assert metrics.bootstrap(statistic, 50, 20, 3) == metrics.bootstrap(statistic, 50, 20, 3)
    assert metrics.bootstrap(statistic, 50, 20, 3) != metrics.bootstrap(statistic, 50, 20, 4)
    assert metrics.bootstrap(statistic, 5, 0) == metrics.Score(2.0, 2.0, 2.0, 5)


LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["d"]


@pytest.mark.parametrize("size", [1, 2, 4, 10, 40, 99, 100])
def test_few_shot_is_stratified_and_of_the_size_asked_for(size: int) -> None:
    picked = metrics.few_shot(LABELS, size, np.random.default_rng(0))
    assert len(set(picked.tolist())) == len(picked) == size
    counts = [sum(LABELS[row] == name for row in picked) for name in "abcd"]
    assert sum(count > 0 for count in counts) == min(size, 4)
    if size >= 10:
        for count, whole in zip(counts, (60, 30, 9, 1), strict=True):
            assert abs(count - size * whole / 100) <= 2


@given(labels=st.lists(st.sampled_from("abcde"), min_size=1, max_size=60), seed=st.integers(0, 99), data=st.data())
def test_few_shot_samples_are_nested(labels: list[str], seed: int, data: st.DataObject) -> None:
    sizes = sorted(data.draw(st.lists(st.integers(1, len(labels)), min_size=2, max_size=2)))
    small, large = (metrics.few_shot(labels, size, np.random.default_rng(seed)).tolist() for size in sizes)
    assert large[: len(small)] == small
    assert len(set(large)) == len(large) == sizes[1]
    assert len({labels[row] for row in small}) == min(sizes[0], len(set(labels)))  # every class once, as far as the size goes


def test_few_shot_samples_differ_between_seeds() -> None:
    one, other = (metrics.few_shot(LABELS, 7, np.random.default_rng(seed)).tolist() for seed in (5, 6))
    assert one != other
