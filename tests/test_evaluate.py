"""Evaluation rows against direct computations with scikit-learn and scipy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sentences, tiny_checkpoint, write_tsv
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from xdist import evaluate, files, metrics
from xdist.config import Recipe

ROWS = sentences(160, seed=3)
TRAIN, TEST = ROWS[:100], ROWS[100:]
LANGUAGES = ("en", "es", "de")


def tasks(folder: Path, shots: list[int]) -> list[dict[str, Any]]:
    write_tsv(folder / "topic_train.tsv", TRAIN)
    write_tsv(folder / "topic_test.tsv", TEST)
    scores = [{"a": row["en"], "b": TEST[number - 1]["en"], "score": str(number % 5)} for number, row in enumerate(TEST)]
    write_tsv(folder / "sts.tsv", scores)
    topic = {"name": "topic", "kind": "classification", "train": "topic_train.tsv", "test": "topic_test.tsv", "text": "{lang}"}
    return [
        topic | {"shots": shots},
        {"name": "translation", "kind": "retrieval", "test": "topic_test.tsv", "text": "{lang}", "id": "id"},
        {"name": "alike", "kind": "sts", "languages": ["en"], "test": "sts.tsv", "text": "a", "text2": "b"},
    ]


def vectors_of(seed: int, dimension: int = 12) -> dict[str, np.ndarray]:
    """A vector for each text in every language: translations lie near each other, and labels can be told apart."""
    rng, found = np.random.default_rng(seed), {}
    for row in ROWS:
        centre = rng.normal(size=dimension) + 0.8 * (row["label"] == "heart")
        for lang in LANGUAGES:
            vector = centre + 0.7 * rng.normal(size=dimension)
            found[row[lang]] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return found


def rows_of(recipe: Recipe, vectors: dict[str, dict[str, np.ndarray]]) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    rows = [row for task in recipe.evaluate.tasks for row in evaluate._task_rows(recipe, task, vectors)]
    found = {(row["task"], row["language"], row["model"], row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    return make_recipe(evaluate={"bootstrap": 30, "tasks": tasks(tmp_path / "data", shots=[8, 40, 101])})


MODELS = {"teacher": vectors_of(1), "after": vectors_of(2)}


def stack(rows: list[dict[str, str]], lang: str, model: str) -> np.ndarray:
    return np.stack([MODELS[model][row[lang]] for row in rows])


LABELS = [[row["label"] for row in rows] for rows in (TRAIN, TEST)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("lang", LANGUAGES)
def test_zero_shot_is_the_teachers_english_head_on_each_models_vectors(recipe: Recipe, model: str, lang: str) -> None:
    known = stack(TRAIN, "en", "teacher")
    head = LogisticRegression(C=metrics.chosen_regularisation(known, LABELS[0]), max_iter=2000).fit(known, LABELS[0])
    predicted = head.predict(stack(TEST, lang, model))
    found = rows_of(recipe, MODELS)
    accuracy = found["topic", lang, model, "zero_shot_accuracy"]
    assert accuracy["value"] == pytest.approx(accuracy_score(LABELS[1], predicted))
    assert found["topic", lang, model, "zero_shot_macro_f1"]["value"] == pytest.approx(f1_score(LABELS[1], predicted, average="macro"))
    assert accuracy["n"] == len(TEST)
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert accuracy["low"] < accuracy["high"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [8, 40])
def test_few_shot_is_the_mean_over_five_heads_on_the_models_own_vectors(recipe: Recipe, model: str, size: int) -> None:
    scores = []
    for seed in range(5):
        picked = metrics.few_shot(LABELS[0], size, np.random.default_rng([recipe.run.seed, seed]))
        labels = [LABELS[0][row] for row in picked]
        head = LogisticRegression(C=metrics.REGULARISATION, max_iter=2000).fit(stack(TRAIN, "es", model)[picked], labels)
        scores.append(accuracy_score(LABELS[1], head.predict(stack(TEST, "es", model))))
    found = rows_of(recipe, MODELS)["topic", "es", model, f"few_shot_{size}_accuracy"]
    assert found["value"] == pytest.approx(np.mean(scores))
    assert len(set(scores)) > 1


def test_the_few_shot_baseline_is_a_linear_head_on_character_tfidf(recipe: Recipe) -> None:
    texts = [[row["de"] for row in rows] for rows in (TRAIN, TEST)]
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, max_features=5000).fit(texts[0])
    scores = []
    for seed in range(5):
        picked = metrics.few_shot(LABELS[0], 8, np.random.default_rng([recipe.run.seed, seed]))
        rows = vectorizer.transform([texts[0][row] for row in picked])
        head = LogisticRegression(C=metrics.REGULARISATION, max_iter=2000).fit(rows, [LABELS[0][row] for row in picked])
        scores.append(accuracy_score(LABELS[1], head.predict(vectorizer.transform(texts[1]))))
    found = rows_of(recipe, MODELS)
    assert found["topic", "de", "tfidf", "few_shot_8_accuracy"]["value"] == pytest.approx(np.mean(scores))
    assert ("topic", "de", "tfidf", "zero_shot_accuracy") not in found


def test_samples_larger_than_the_training_rows_are_left_out_aloud(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    metrics_found = {metric for _, _, _, metric in rows_of(recipe, MODELS)}
    assert {name for name in metrics_found if name.startswith("few_shot")} == {"few_shot_8_accuracy", "few_shot_40_accuracy"}
    assert "topic: only 100 training rows for es" in capsys.readouterr().out


def test_retrieval_in_both_directions(recipe: Recipe) -> None:
    found = rows_of(recipe, MODELS)
    for model in MODELS:
        cosines = stack(TEST, "en", model) @ stack(TEST, "de", model).T
        wanted = {
            "accuracy_en_to_xx": (cosines.argmax(1) == np.arange(len(TEST))).mean(),
            "accuracy_xx_to_en": (cosines.argmax(0) == np.arange(len(TEST))).mean(),
            "xsim_error": 1 - metrics.margin_retrieved(stack(TEST, "en", model), stack(TEST, "de", model)).mean(),
        }
        for metric, value in wanted.items():
            assert found["translation", "de", model, metric]["value"] == pytest.approx(value)
        assert 0.2 < wanted["accuracy_en_to_xx"] < 1
    assert not any(lang == "en" for task, lang, _, _ in found if task == "translation")


def test_sts_is_spearmans_correlation(recipe: Recipe) -> None:
    found = rows_of(recipe, MODELS)
    for model in MODELS:
        english = stack(TEST, "en", model)
        cosines = (english * np.roll(english, 1, axis=0)).sum(1)
        wanted = spearmanr(cosines, [number % 5 for number in range(len(TEST))]).statistic
        row = found["alike", "en", model, "spearman"]
        assert row["value"] == pytest.approx(wanted, abs=1e-6)
        assert row["low"] <= row["value"] <= row["high"]


def test_sts_of_a_collapsed_model_is_zero(recipe: Recipe) -> None:
    point = dict.fromkeys(MODELS["teacher"], np.full(4, 0.5, np.float32))
    row = next(evaluate._task_rows(recipe, recipe.evaluate.tasks[2], {"after": point}))
    assert (row["value"], row["low"], row["high"]) == (0.0, 0.0, 0.0)


def test_a_label_that_training_never_showed_counts_as_wrong(recipe: Recipe) -> None:
    head = metrics.Head(np.eye(2, dtype=np.float32), np.zeros(2, np.float32), ["a", "b"])
    found = dict(evaluate._scored(recipe, head, ["a", "b", "new", "new"], np.array([0, 1, 0, 1])))
    assert found["accuracy"].value == 0.5
    assert found["macro_f1"].value == pytest.approx(f1_score(["a", "b", "new", "new"], ["a", "b", "a", "b"], average="macro"))


@pytest.mark.parametrize(("shots", "wanted"), [([], {"train en"}), ([1], {"train en", "train es", "train de"})])
def test_training_rows_of_other_languages_are_read_for_few_shot_alone(
    make_recipe: Callable[..., Recipe], tmp_path: Path, shots: list[int], wanted: set[str]
) -> None:
    task = {"name": "t", "kind": "classification", "train": "train.{lang}.tsv", "test": "test.{lang}.tsv", "shots": shots}
    recipe = make_recipe(evaluate={"tasks": [task]})
    for lang in LANGUAGES if shots else ("en",):
        write_tsv(tmp_path / "data" / f"train.{lang}.tsv", [{"text": f"train {lang}", "label": "a"}])
    for lang in LANGUAGES:
        write_tsv(tmp_path / "data" / f"test.{lang}.tsv", [{"text": f"test {lang}", "label": "a"}])
    texts = evaluate._texts(recipe)
    assert set(texts) == {f"test {lang}" for lang in LANGUAGES} | wanted
    assert len(texts) == len(set(texts))


def test_of_the_labelled_rows_of_another_language_only_those_of_a_sample_are_encoded(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(evaluate={"tasks": tasks(tmp_path / "data", shots=[4, 8])})
    picked = [metrics.few_shot(LABELS[0], 8, np.random.default_rng([recipe.run.seed, seed])) for seed in range(5)]
    wanted = {TRAIN[row]["es"] for row in np.concatenate(picked)}
    assert 8 < len(wanted) < len(TRAIN)
    texts = set(evaluate._texts(recipe))
    assert texts & {row["es"] for row in TRAIN} == wanted
    assert texts >= {row["en"] for row in TRAIN} | {row["es"] for row in TEST}


def test_evaluate_on_a_cluster(ray_cluster: None, recipe: Recipe, teacher: str, tmp_path: Path) -> None:
    """End to end: texts are encoded by Ray tasks, rows are those of the three models' own vectors."""
    other = str(tiny_checkpoint(tmp_path / "other", layers=1))
    files.upload(teacher, f"{recipe.folder}/initial")
    files.upload(other, f"{recipe.folder}/student")
    rows = evaluate.evaluate(recipe)
    assert files.read_json(f"{recipe.folder}/evaluation.json") == rows
    assert evaluate.evaluate(recipe.model_copy(update={"teacher": None})) == rows  # read, not computed
    found = {(row["task"], row["language"], row["model"], row["metric"]): row["value"] for row in rows}
    texts = evaluate._texts(recipe)
    folders = {"teacher": teacher, "before": teacher, "after": other}
    vectors = {
        model: dict(zip(texts, SentenceTransformer(folder, device="cpu").encode(texts), strict=True)) for model, folder in folders.items()
    }
    wanted = rows_of(recipe, vectors)
    assert found.keys() == wanted.keys()
    for key, row in wanted.items():
        assert found[key] == pytest.approx(row["value"], abs=0.1), key  # the cluster may compute in bfloat16
    assert not (Path(recipe.folder) / "evaluation").exists()
