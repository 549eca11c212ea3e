"""The low-resource study: its fits against scikit-learn on the same samples, and end to end on a tiny finished run."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml
from conftest import tiny_checkpoint
from scipy import stats
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from xdist import files, fits, metrics, pipeline, recipes, selection, study, study_report, tasks, track
from xdist.config import Recipe
from xdist.errors import Refused

MakeRecipe = Callable[..., Recipe]
STUDY = {"sizes": [4, 8, 16, 30, 500, "all"], "seeds": 3, "c": [0.5, 20]}


def as_file(tmp_path: Path, **keys: Any) -> str:
    path = tmp_path / "few.yaml"
    path.write_text(yaml.safe_dump({"study": STUDY | keys}))
    return str(path)


def load(path: str, recipe: Recipe) -> study.Study:
    return study.load(path, recipes.read_yaml(path, "space", "tune_spaces/"), recipe)


@pytest.fixture
def finished(make_recipe: MakeRecipe, teacher: str, tmp_path: Path) -> Recipe:
    """As good as a finished run: the teacher is its student before, another random encoder its student after."""
    recipe = make_recipe()
    other = str(tiny_checkpoint(tmp_path / "other", layers=1))
    files.upload(teacher, f"{recipe.folder}/initial")
    files.upload(other, f"{recipe.folder}/student")
    return recipe


def test_every_fit_is_scikit_learns_on_the_same_sample(finished: Recipe, teacher: str, tmp_path: Path, ray_cluster: None) -> None:
    path = as_file(tmp_path, checkpoints={"mine": teacher})
    pipeline.tune(finished, path)
    folder = f"{finished.folder}-few"
    with open(f"{folder}/results.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    keys = [(row["task"], row["language"], row["method"], row["size"], row["seed"], row["c"]) for row in rows]
    assert len(keys) == len(set(keys))
    # 5 methods × 2 languages × (3 seeds × 4 sizes, and all 40 rows once) × 2 values of C; zero-shot: 3 methods × 2, and English
    assert len(rows) == 5 * 2 * (3 * 4 + 1) * 2 + 3 * 2 + 1

    (task,) = [task for task in finished.evaluate.tasks if task.kind == "classification"]
    for lang in ("es", "de"):
        train, test = (tasks.read(finished, task, split, lang) for split in ("train", "test"))
        for method, checkpoint in (("student", f"{finished.folder}/student"), ("before", teacher), ("mine", teacher)):
            model = SentenceTransformer(checkpoint, device="cpu")
            x, y = model.encode(train["text"]), model.encode(test["text"])
            for size, seed, c in ((8, 2, "20.0"), (40, 0, "0.5")):
                picked = metrics.few_shot(train["label"], size, np.random.default_rng([finished.run.seed, seed]))
                head = LogisticRegression(C=float(c), max_iter=2000).fit(x[picked], [train["label"][row] for row in picked])
                row = rows[keys.index(("topic", lang, method, str(size), str(seed), c))]
                assert float(row["accuracy"]) == pytest.approx(
                    accuracy_score(test["label"], head.predict(y)), abs=0.051
                )  # bfloat16: 2 of 40
                assert float(row["macro_f1"]) == pytest.approx(f1_score(test["label"], head.predict(y), average="macro"), abs=0.06)
    mine, before = ([row["accuracy"] for row in rows if row["method"] == name and row["size"] != "0"] for name in ("mine", "before"))
    assert mine == before, "the same checkpoint twice, under two names"

    english = selection.read_head(f"{folder}/heads/topic.npz")
    source = tasks.read(finished, task, "test", "en")
    wanted = np.array(english.classes)[english.predict(SentenceTransformer(teacher, device="cpu").encode(source["text"]))]
    row = rows[keys.index(("topic", "en", "teacher", "0", "0", "0.0"))]
    assert float(row["accuracy"]) == pytest.approx(accuracy_score(source["label"], wanted), abs=0.051)

    page = Path(folder, "report.html").read_text()
    assert "student before distillation" in page
    assert "mine" in page
    assert {path.name for path in Path(folder, "plots").iterdir()} == {
        f"study_{measure}.{kind}" for measure in ("accuracy", "macro_f1") for kind in ("png", "svg")
    }
    in_mlflow(finished, folder, rows)


def in_mlflow(recipe: Recipe, folder: str, rows: list[dict[str, str]]) -> None:
    """A child for each unit, whose metric over labels is the mean of the chosen fits."""
    parent = files.read_json(f"{folder}/mlflow.json")["run_id"]
    client = mlflow.MlflowClient(track.uri_of(recipe))
    children = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(children) == 10
    (child,) = [c for c in children if (c.data.params["method"], c.data.params["language"]) == ("before", "de")]
    found = {metric.step: metric.value for metric in client.get_metric_history(child.info.run_id, "study/accuracy")}
    mine = [row for row in rows if (row["method"], row["language"], row["chosen"]) == ("before", "de", "True")]
    wanted = {int(row["size"]): np.mean([float(r["accuracy"]) for r in mine if r["size"] == row["size"]]) for row in mine}
    assert found == pytest.approx(wanted)
    assert sorted(found) == [0, 4, 8, 16, 30, 40]
    german = client.get_run(parent).data.tags["mlflow.note.content"].split("\n  de ")[1:]
    (line,) = [line.partition("\n")[0] for line in german if "before" in line.partition("\n")[0]]
    assert line.split()[-6:] == [f"{100 * wanted[size]:.1f}" for size in sorted(wanted)]


def test_full_fine_tuning_on_the_same_samples(finished: Recipe, tmp_path: Path, ray_cluster: None) -> None:
    """At a learning rate of next to nothing it is the head on the frozen vectors; at a real one it is not, and what the dev set
    prefers counts. A unit that is lost is fitted again, to the same numbers."""
    tuning = {"methods": ["student"], "sizes": [30], "seeds": 2, "lr": [1e-12, 2e-3], "epochs": 10}
    path = as_file(tmp_path, methods=["student", "tfidf"], c=[0.5, 10, 20], finetune=tuning)
    pipeline.tune(finished, path)
    folder = Path(f"{finished.folder}-few")
    for lang in ("es", "de"):
        heads = files.read_json(f"{folder}/units/topic-{lang}-student.json")
        tuned = files.read_json(f"{folder}/units/topic-{lang}-student-tuned-30.json")
        assert [(row["size"], row["seed"], row["lr"]) for row in tuned] == [(30, seed, lr) for seed in (0, 1) for lr in (1e-12, 2e-3)]
        for row in tuned[::2]:
            (head,) = [each for each in heads if (each["size"], each["seed"], each["c"]) == (30, row["seed"], 10)]
            for measure in ("accuracy", "macro_f1", "dev"):
                assert row[measure] == pytest.approx(head[measure], abs=0.026)  # 1 of 40
        dev = [np.mean([row["dev"] for row in tuned[place::2]]) for place in (0, 1)]
        assert [row["chosen"] for row in tuned] == [dev[0] >= dev[1], dev[1] > dev[0]] * 2
        assert [row["accuracy"] for row in tuned[1::2]] != [row["accuracy"] for row in tuned[::2]]
    assert "distilled student, fine-tuned" in (folder / "report.html").read_text()
    child = files.read_json(f"{folder}/children/topic-es-student-tuned.json")["run_id"]
    metrics_there = mlflow.MlflowClient(track.uri_of(finished)).get_run(child).data.metrics
    assert metrics_there["study/lr"] in tuning["lr"]  # type: ignore[operator]

    results = (folder / "results.csv").read_text()
    (folder / "units" / "topic-de-student-tuned-30.json").unlink()
    pipeline.tune(finished, path)
    assert (folder / "results.csv").read_text() == results


def test_a_study_goes_on_where_it_was_and_refuses_another_student(finished: Recipe, tmp_path: Path, ray_cluster: None) -> None:
    path = as_file(tmp_path, methods=["student", "tfidf"])
    pipeline.tune(finished, path)
    folder = Path(f"{finished.folder}-few")
    kept = {unit.name: unit.stat().st_mtime_ns for unit in (folder / "units").iterdir()}
    assert sorted(kept) == [
        "topic-de-student.json",
        "topic-de-tfidf.json",
        "topic-en-teacher.json",
        "topic-es-student.json",
        "topic-es-tfidf.json",
    ]
    (folder / "units" / "topic-de-student.json").unlink()
    results = (folder / "results.csv").read_text()
    pipeline.tune(finished, path)
    assert (folder / "results.csv").read_text() == results
    again = {unit.name: unit.stat().st_mtime_ns for unit in (folder / "units").iterdir()}
    assert {name for name in again if again[name] != kept[name]} == {"topic-de-student.json"}
    files.upload(f"{finished.folder}/initial", f"{finished.folder}/student")
    with pytest.raises(Refused, match="tiny-few has begun with another space"):
        pipeline.tune(finished, path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": ["topik"]}, "no classification task 'topik' in the recipe; did you mean topic"),
        ({"languages": ["fr"]}, "languages: 'fr' is none of data.languages"),
        ({"methods": ["magic"]}, "methods"),
        ({"methods": []}, "nothing to compare"),
        ({"sizes": [0]}, "sizes"),
        ({"c": [1, 1]}, "c: a value is listed twice"),
        ({"checkpoints": {"student": "x"}}, "'student' is taken"),
        ({"checkpoints": {"a/b": "x"}}, "no plain word"),
        ({"seedz": 1}, "unknown key; did you mean seeds"),
        ({"finetune": {"methods": ["tfidf"]}}, "finetune.methods: 'tfidf' is no encoder of this study"),
        ({"finetune": {"methods": ["studnet"]}}, "'studnet' is no encoder of this study; did you mean student"),
        ({"finetune": {"lr": [1e-4, 1e-4]}}, "finetune.lr: a value is listed twice"),
        ({"finetune": {"epochz": 1}}, "finetune.epochz: unknown key; did you mean finetune.epochs"),
        ({"checkpoints": {"a-tuned-8": "x"}}, "'a-tuned-8' is taken"),
        ({"checkpoints": {"after": "x"}}, "'after' is taken"),
        ({"checkpoints": {"task-topic": "x"}}, "'task-topic' is taken"),
    ],
)
def test_impossible_studies_are_refused(make_recipe: MakeRecipe, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        load(as_file(tmp_path, **keys), make_recipe())
    assert "few.yaml" in str(refused.value)


def test_a_study_and_a_search_in_one_file_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("study: {}\nsearch: {train.lr: {grid: [1]}}\n")
    with pytest.raises(Refused, match="search: a file with `study` has no search"):
        pipeline.tune(make_recipe(), str(path))


def test_a_study_that_is_a_list_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("study: [8, 16]\n")
    with pytest.raises(Refused, match="study: expected keys with values"):
        pipeline.tune(make_recipe(), str(path))


def test_sizes_that_no_task_suffices_for_are_refused(finished: Recipe, tmp_path: Path, ray_cluster: None) -> None:
    with pytest.raises(Refused, match="topic has fewer rows in es than the smallest of `sizes`"):
        pipeline.tune(finished, as_file(tmp_path, sizes=[64, 128]))


def test_a_study_needs_a_finished_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"has no student in .* yet; run jobs/distill\.py first"):
        pipeline.tune(recipe := make_recipe(), as_file(tmp_path))
    assert not Path(recipe.folder).exists()


def some(method: str, sizes: dict[int, list[float]], **keys: Any) -> list[dict[str, Any]]:
    unit = {"task": "t", "language": "es", "method": method, "c": 1.0, "chosen": True} | keys
    return [unit | {"size": size, "seed": seed, "accuracy": value} for size, values in sizes.items() for seed, value in enumerate(values)]


def test_summary_of_known_curves() -> None:
    """`before` follows 0.2 + 0.05 · log2(n) exactly; the student's zero-shot 0.45 lies at n = 32 on it."""
    curve = {n: [0.2 + 0.05 * math.log2(n)] * 3 for n in (4, 8, 16)} | {64: [0.5]}  # all rows: one sample, which every seed has
    rows = [
        *some("teacher", {0: [0.5]}, language="en"),
        *some("student", {0: [0.45], 4: [0.5, 0.6], 8: [0.6, 0.7], 16: [0.7, 0.8]}),  # two seeds: no curve
        *some("before", {0: [0.3], **curve}),
        *some("before", {4: [0.9]}, c=9.0, chosen=False),  # a value of C that was not chosen does not count
    ]
    student, before = study.summary(Recipe(), rows)
    assert before["goals"] == {"teacher_on_source": 0.5, "student_zero_shot": 0.45}
    assert before["labels"]["student_zero_shot"] == pytest.approx((32, 32, 32), rel=1e-3)
    assert before["labels"]["teacher_on_source"] == pytest.approx((64, 64, 64), rel=1e-3)
    assert before["measured"] == {"teacher_on_source": 64, "student_zero_shot": 64}
    assert before["fit"]["slope"] == pytest.approx(0.05)
    assert student["zero_shot"] == 0.45
    assert "fit" not in student
    point = student["points"][0]
    low, high = stats.t.interval(0.95, 1, loc=0.55, scale=stats.sem([0.5, 0.6]))
    assert (point["size"], point["mean"], point["low"], point["high"]) == pytest.approx((4, 0.55, low, high))
    text = study_report.saved([student, before])
    assert text == [
        "the undistilled student needs 64 labels to reach the distilled one's 45.0 without any (fitted: 32, 95 % interval 32 to 32)"
    ]
    unreached = [row | {"accuracy": min(row["accuracy"], 0.4)} if row["method"] == "before" else row for row in rows]
    text = study_report.saved(study.summary(Recipe(), unreached))
    assert text[0].startswith("the undistilled student does not reach the distilled one's 45.0 without labels, even with 64")


def test_the_best_c_on_the_dev_set_is_chosen_by_its_mean() -> None:
    rows: list[dict[str, Any]] = [{"c": c, "dev": dev} for c, dev in ((1, 0.9), (1, 0.1), (10, 0.6), (10, 0.6), (100, 0.2), (100, 0.3))]
    assert [row["c"] for row in fits.chosen(rows, "c", [1, 10, 100]) if row["chosen"]] == [10, 10]
    assert [row["c"] for row in fits.chosen([{"c": c} for c in (100, 1, 10)], "c", [100, 1, 10]) if row["chosen"]] == [10]
