"""Measures of sentence vectors. Pure numpy; vectors are unit length, float32, shape (n, dimension).

Every measure comes as one outcome per item, so that the same function gives its bootstrap confidence interval.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import softmax
from threadpoolctl import threadpool_limits

REGULARISATION = 10.0  # scikit-learn's C where labels are few: unit vectors need a weaker penalty than its default
REGULARISATIONS = (1.0, 3.0, 10.0, 30.0)
FOLDS = 5
BLOCK = 1024


@dataclass(frozen=True)
class Score:
    """A measure with its 95 % bootstrap confidence interval; n items."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, resamples: int, seed: int = 0) -> Score:
    """`statistic` of item indices, on all n items and on resamples with replacement (percentile interval)."""
    value = statistic(np.arange(n))
    if not resamples:
        return Score(value, value, value, n)
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, n, n)) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return Score(float(value), float(low), float(high), n)


def retrieved(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether an item of `a` is nearest to the item of `b` at its own index, and an item of `b` to that of `a`: bool, shape (n,)
    each. Both come from one pass over the n² cosines, a block of rows of `a` at a time; of equal cosines the first counts."""
    n = len(a)
    forward, backward, best = np.empty(n, np.int64), np.zeros(n, np.int64), np.full(n, -np.inf, np.float32)
    for start in range(0, n, BLOCK):
        cosines = a[start : start + BLOCK] @ b.T
        forward[start : start + BLOCK] = cosines.argmax(axis=1)
        row = cosines.argmax(axis=0)
        highest = cosines[row, np.arange(n)]
        nearer = highest > best
        backward[nearer], best[nearer] = start + row[nearer], highest[nearer]
    own = np.arange(n)
    return forward == own, backward == own


def own_probability(queries: np.ndarray, keys: np.ndarray, temperature: float) -> np.ndarray:
    """Probability, shape (n,), that the softmax of a query's cosines / temperature over all keys gives its own key."""
    found = []
    for start in range(0, len(queries), BLOCK):
        logits = queries[start : start + BLOCK] @ keys.T / temperature
        found.append(softmax(logits, axis=1)[np.arange(len(logits)), start + np.arange(len(logits))])
    return np.concatenate(found)


def likelihood(probabilities: np.ndarray, choices: int) -> float:
    """Geometric mean of the probabilities given to what is right among `choices`, in (0, 1]: exp(-log loss). One part in a
    hundred is spread evenly, so that no single item, held impossible, decides."""
    return float(np.exp(np.log(0.99 * np.nan_to_num(probabilities) + 0.01 / choices).mean()))


def margin_retrieved(queries: np.ndarray, keys: np.ndarray, neighbours: int = 4) -> np.ndarray:
    """As the first of `retrieved`, by margin: cosine over the mean cosine to the nearest neighbours of both sides (Artetxe & Schwenk
    2019, 1811.01136). The error rate of this is xsim."""
    k = min(neighbours, len(keys))
    around_queries, around_keys = _neighbourhood(queries, keys, k), _neighbourhood(keys, queries, k)
    out = np.empty(len(queries), dtype=bool)
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, start + BLOCK)
        margin = queries[rows] @ keys.T / ((around_queries[rows, None] + around_keys[None, :]) / 2)
        out[rows] = np.argmax(margin, axis=1) == np.arange(start, start + len(margin))
    return out


def _neighbourhood(queries: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    """Mean cosine of each query to its k nearest keys, shape (n,)."""
    out = np.empty(len(queries), dtype=np.float32)
    for start in range(0, len(queries), BLOCK):
        cosines = queries[start : start + BLOCK] @ keys.T
        out[start : start + BLOCK] = np.partition(cosines, -k, axis=1)[:, -k:].mean(1)
    return np.maximum(out, 1e-6)


@dataclass(frozen=True)
class Head:
    """A linear classifier on frozen vectors."""

    weights: np.ndarray
    bias: np.ndarray
    classes: list[str]

    def predict(self, vectors: Any) -> np.ndarray:
        """Class index of each row, dense or sparse, shape (n,)."""
        return np.argmax(vectors @ self.weights.T + self.bias, axis=1)

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """Of each class, shape (n, classes)."""
        return np.asarray(softmax(vectors @ self.weights.T + self.bias, axis=1))


def chosen_regularisation(vectors: np.ndarray, labels: list[str]) -> float:
    """scikit-learn's C with the best accuracy in stratified cross-validation on these rows; REGULARISATION where a class
    has too few rows for it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    if len(set(labels)) == 1 or min(Counter(labels).values()) < FOLDS:
        return REGULARISATION
    search = GridSearchCV(LogisticRegression(max_iter=500, tol=1e-3), {"C": REGULARISATIONS}, cv=FOLDS, refit=False).fit(vectors, labels)
    return float(search.best_params_["C"])


def fit_chosen_head(vectors: np.ndarray, labels: list[str]) -> Head:
    """`fit_head` with the regularisation that these rows choose: for heads that many rows are there to fit."""
    with threadpool_limits(1):  # of so small products a second thread makes the whole slower
        return fit_head(vectors, labels, chosen_regularisation(vectors, labels))


def fit_head(vectors: Any, labels: list[str], c: float = REGULARISATION) -> Head:
    """Multinomial logistic regression (scikit-learn, L2) on dense or sparse rows; where there is one class alone, a head that
    always says it."""
    from sklearn.linear_model import LogisticRegression

    if len(set(labels)) == 1:
        return Head(np.zeros((1, vectors.shape[1]), np.float32), np.zeros(1, np.float32), [labels[0]])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)  # a few-shot sample has hardly more rows
        model = LogisticRegression(C=c, max_iter=2000).fit(vectors, labels)
    weights, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return Head(weights.astype(np.float32), bias.astype(np.float32), [str(name) for name in model.classes_])


def macro_f1(truth: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """Mean F1 over the classes that occur in truth or prediction."""
    table = np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    sizes = table.sum(0) + table.sum(1)
    return float(np.mean(2 * table.diagonal()[sizes > 0] / sizes[sizes > 0]))


def character_tfidf(train: list[str], test: list[str]) -> tuple[Any, Any]:
    """TF-IDF of the 5,000 most frequent character n-grams, as sparse rows for training and test texts: what a linear classifier
    does without any encoder, and without knowing the language."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, max_features=5000, dtype=np.float32)
    return vectorizer.fit_transform(train), vectorizer.transform(test)


def few_shot(labels: list[str], size: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of a class-stratified sample of `size` rows: every class once, as far as size goes, then in proportion.

    Samples drawn with equal generators are nested: a smaller one is the beginning of a larger one.
    """
    inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(inverse[shuffled], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each row within its class
    due = np.where(place > 0, (place + rng.random(len(labels))) / np.repeat(counts, counts), -rng.random(len(labels)))
    return by_class[np.argsort(due, kind="stable")[:size]]
