"""Selection: scores of a student on held-out text, against direct computations."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest
from conftest import sentences
from scipy.stats import gmean
from sklearn.linear_model import LogisticRegression

from xdist import encoder, files, metrics, selection
from xdist.config import Recipe

HELD = sentences(30, seed=9)


class Student:
    """Vectors of a hash of the text; counts what it is asked to encode."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.seen += texts
        vectors = np.array([np.random.default_rng([*text.encode()]).normal(size=32) for text in texts]).reshape(-1, 32)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Translated(Student):
    """Gives a translation its source's vector, with noise of the text's own."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.source = {row[lang]: row["en"] for row in [*HELD, *sentences(480)[440:]] for lang in ("en", "es", "de")}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors = super().encode([self.source[text] for text in texts]) + self.noise * super().encode(texts)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    recipe = make_recipe()
    settings = recipe.model_dump()
    settings["evaluate"]["tasks"][1]["dev"] = "test.tsv"
    recipe = Recipe(**settings)
    rows = []
    for number, row in enumerate(HELD):
        langs = ["es", "de"][: 1 + number % 2]  # every other sentence has no German
        rows.append({"hash": number, "source": row["en"], "languages": langs, "texts": [row[lang] for lang in langs]})
    files.write_table(f"{recipe.folder}/holdout/00000.parquet", pa.Table.from_pylist(rows))
    return recipe


def test_scores_are_those_computed_directly(recipe: Recipe, teacher: str) -> None:
    frozen = encoder.load(teacher, "float32")
    selection.prepare(recipe, frozen)
    student = Student()
    verdict = selection.Judge(recipe).judge(student)  # type: ignore[arg-type]
    scores, likelihoods = verdict.accuracy, []
    assert set(scores) == {"retrieval/es", "retrieval/de", "translation/es", "translation/de", "topic/es", "topic/de"}

    rows = sentences(480)
    train, test = rows[400:440], rows[440:]
    fresh = Student()
    pools = {"retrieval/es": HELD, "retrieval/de": HELD[1::2], "translation/es": test, "translation/de": test}
    for name, pool in pools.items():
        a, b = (fresh.encode([row[lang] for row in pool]) for lang in ("en", name[-2:]))
        cosines, own = a @ b.T, np.arange(len(pool))
        assert scores[name] == pytest.approx(((cosines.argmax(1) == own).mean() + (cosines.argmax(0) == own).mean()) / 2)
        powers = np.exp(cosines / 0.05)
        chances = [powers.diagonal() / powers.sum(axis) for axis in (1, 0)]
        likelihoods.append(gmean(0.99 * np.concatenate(chances) + 0.01 / len(pool)))
    known, labels = frozen.encode([row["en"] for row in train]), [row["label"] for row in train]
    head = LogisticRegression(C=metrics.chosen_regularisation(known, labels), max_iter=2000).fit(known, labels)
    for lang in ("es", "de"):
        vectors, truth = fresh.encode([row[lang] for row in test]), [row["label"] for row in test]
        assert scores[f"topic/{lang}"] == pytest.approx((head.predict(vectors) == truth).mean())
        place = [list(head.classes_).index(label) for label in truth]
        right = head.predict_proba(vectors)[np.arange(len(test)), place]
        likelihoods.append(gmean(0.99 * right + 0.01 / len(head.classes_)))
    assert verdict.score == pytest.approx(np.mean(likelihoods), rel=1e-4)


def test_a_label_that_the_head_does_not_know_counts_as_wrong(recipe: Recipe, teacher: str) -> None:
    selection.prepare(recipe, encoder.load(teacher, "float32"))
    judge = selection.Judge(recipe)
    head, texts, truth = judge.labelled["topic/es"]
    judge.parallel.clear()
    judge.labelled = {"topic/es": (head, texts, np.full(len(truth), -1))}
    verdict = judge.judge(Student())  # type: ignore[arg-type]
    assert verdict.accuracy == {"topic/es": 0.0}
    assert verdict.score == pytest.approx(0.01 / len(head.classes))


def test_the_score_tells_apart_what_accuracy_does_not(recipe: Recipe, teacher: str) -> None:
    """Two students with the same right answers: the one that is surer of them is better."""
    selection.prepare(recipe, encoder.load(teacher, "float32"))
    judge = selection.Judge(recipe)
    judge.labelled.clear()
    clear, blurred = (judge.judge(Translated(noise)) for noise in (0.1, 0.5))  # type: ignore[arg-type]
    assert clear.accuracy == blurred.accuracy
    assert (clear.score or 0) > (blurred.score or 0)


def test_each_text_is_encoded_once(recipe: Recipe, teacher: str) -> None:
    selection.prepare(recipe, encoder.load(teacher, "float32"))
    student = Student()
    selection.Judge(recipe).judge(student)  # type: ignore[arg-type]
    assert len(student.seen) == len(set(student.seen)) > 100


def test_a_student_that_is_perfect_scores_one(recipe: Recipe) -> None:
    tasks = [task for task in recipe.evaluate.tasks if task.kind == "retrieval"]
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"tasks": tasks})})
    verdict = selection.Judge(recipe).judge(Translated())  # type: ignore[arg-type]
    assert set(verdict.accuracy.values()) == {1.0}
    assert 0.99 < (verdict.score or 0) <= 1


def test_nothing_to_judge_by(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(evaluate={"tasks": []})
    assert selection.Judge(recipe).judge(Student()) == selection.Verdict({}, None)  # type: ignore[arg-type]
