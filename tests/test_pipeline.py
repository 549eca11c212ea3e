"""The whole way with a tiny teacher: real Ray, a real MLflow store, real kills."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import conftest
import numpy as np
import pytest
import yaml
from conftest import LONG, MakeRecipe, all_hashes, as_file, assert_equal_weights, wait_for
from safetensors.numpy import load_file

from xdist import files, launch, pipeline, track
from xdist.config import Recipe
from xdist.errors import Refused

ROOT = Path(__file__).parent.parent


@pytest.fixture
def finished(make_recipe: MakeRecipe, ray_cluster: None, capsys: pytest.CaptureFixture[str], once: Path) -> tuple[Recipe, str]:
    """A finished run for this test alone, and what was said of it: a copy of the one that is made for all."""
    storage, said = once / "finished", once / "finished.txt"
    if not said.exists():
        pipeline.distill(make_recipe(run={"storage": str(storage)}))
        said.write_text(capsys.readouterr().out)
    recipe = make_recipe()
    shutil.copytree(storage, recipe.run.storage)
    return recipe, said.read_text()


def test_whole_way(finished: tuple[Recipe, str], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = finished
    folder = Path(recipe.folder)
    assert re.match(r"run       tiny in /.*/finished/tiny\n", out)
    assert "Plan of run tiny" in out
    assert "step     12 of 12" in out
    assert "translation" in out.split("teacher   before")[1]

    # Each English sentence is embedded once although two languages share it.
    assert files.read_json(f"{folder}/embed.json") | {"seconds": 0} == {"sentences": 400, "cached": 0, "embedded": 400, "seconds": 0}

    # The student is an ordinary sentence-transformers folder that gives unit vectors.
    from sentence_transformers import SentenceTransformer

    vectors = SentenceTransformer(str(folder / "student"), device="cpu").encode(["the patient has fever", "der patient hat fieber"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)

    # The report is self-contained and says what was measured.
    html = (folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 5
    assert 'src="http' not in html
    assert "student after" in html
    rows = files.read_json(f"{folder}/evaluation.json")
    assert {row["model"] for row in rows} == {"teacher", "before", "after"}
    assert {row["language"] for row in rows if row["task"] == "topic"} == {"en", "es", "de"}
    assert "## Results" in (folder / "student" / "README.md").read_text()

    # The same command again: nothing is done, the results are shown.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    pipeline.distill(recipe)
    assert "teacher   before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


def test_mlflow_holds_the_run(finished: tuple[Recipe, str]) -> None:
    import mlflow

    recipe, shown = finished
    uri = f"sqlite:///{recipe.run.storage}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("xdist")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    run = runs[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batch_tokens"] == "256"
    assert run.data.params["data.corpora.toy.path"] == "corpus.tsv"
    assert {"train/loss", "train/cosine", "train/lr", "train/sequences_per_second", "held_out/selection"} <= run.data.metrics.keys()
    assert "eval/translation/es/accuracy_en_to_xx" in run.data.metrics
    assert "eval/topic/de/zero_shot_accuracy/teacher" in run.data.metrics
    curve = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in curve] == [2, 4, 6, 8, 10, 12]
    assert [(entry.dataset.name, json.loads(entry.dataset.profile)) for entry in run.inputs.dataset_inputs] == [("toy", {"num_rows": 800})]
    names = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "plots", "recipe.yaml"} <= names
    table = run.data.tags["mlflow.note.content"].removeprefix("```\n").removesuffix("\n```")
    assert table in shown
    assert re.search(r"^topic +de +[\d.]+ +[\d.]+ +[\d.]+ ", table, re.M)

    # The model loads back and embeds as the student does.
    from sentence_transformers import SentenceTransformer

    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model(client.search_logged_models([experiment.experiment_id])[0].model_uri)
    texts = ["the patient has fever", "el paciente tiene tos"]
    student = SentenceTransformer(f"{recipe.folder}/student", device="cpu")
    np.testing.assert_allclose(np.asarray(model.predict(texts)), student.encode(texts), atol=1e-5)


def test_plan_stops_before_work(make_recipe: MakeRecipe, ray_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(data={"source_weight": 0.5})
    pipeline.distill(recipe, plan=True)
    out = capsys.readouterr().out
    assert "unique sentences              400" in out
    assert "already embedded                0" in out
    assert not Path(recipe.folder, "shards").exists()
    plan = files.read_json(f"{recipe.folder}/plan.json")
    assert plan["pairs"] == 800
    assert plan["training_steps"] == 12
    assert plan["embed_seconds"] > 0
    assert plan["seen"] == {"en": 200, "es": 400, "de": 400}
    assert "texts: es 40%, de 40%, en 20%" in out


def test_more_text_embeds_only_what_is_new(make_recipe: MakeRecipe, ray_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"name": "toy", "path": "corpus.tsv", "source": "en", "target": "{lang}", "max_rows": 150}
    pipeline.embed(make_recipe(data={"corpora": [small]}, run={"name": "first"}))
    assert "150 sentences embedded, 0 were in the store" in capsys.readouterr().out
    pipeline.embed(make_recipe(run={"name": "second"}, data={"shards": 8}))  # another count of shards shares the store
    assert "250 sentences embedded, 150 were in the store" in capsys.readouterr().out


def test_another_recipe_under_the_same_name_is_refused(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    pipeline.settle(recipe)
    files.write_json(f"{recipe.folder}/mlflow.json", {})
    pipeline.settle(make_recipe(cluster={"num_cpus": 1}))  # where it runs may change
    with pytest.raises(Refused, match=r"train\.lr: 0\.0005 → 0\.1"):
        pipeline.settle(make_recipe(train={"lr": 0.1}))


def test_a_recipe_mended_after_a_plan_begins_anew(make_recipe: MakeRecipe, ray_cluster: None) -> None:
    pipeline.distill(make_recipe(), plan=True)
    mended = make_recipe(train={"steps": 7}, data={"max_chars": 20})
    pipeline.distill(mended, plan=True)
    plan = files.read_json(f"{mended.folder}/plan.json")
    assert plan["training_steps"] == 7
    assert plan["pairs"] < 800
    assert yaml.safe_load(files.read(f"{mended.folder}/recipe.yaml"))["train"]["steps"] == 7


def test_evaluated_anew(finished: tuple[Recipe, str]) -> None:
    recipe, _ = finished
    rows = files.read_json(f"{recipe.folder}/evaluation.json")
    files.write_json(f"{recipe.folder}/evaluation.json", [])
    files.remove(f"{recipe.folder}/report.html")
    pipeline.evaluate(recipe)
    assert files.read_json(f"{recipe.folder}/evaluation.json") == rows
    assert "student after" in Path(recipe.folder, "report.html").read_text()


def test_killed_between_the_last_step_and_the_export(finished: tuple[Recipe, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left to train; the student is written from the checkpoint, and is the same."""
    recipe, _ = finished
    weights = Path(recipe.folder, "student", "model.safetensors")
    before = load_file(weights)
    shutil.rmtree(weights.parent)
    shutil.rmtree(Path(recipe.run.storage, "store"))  # the shards hold the vectors: nothing is embedded again
    capsys.readouterr()
    pipeline.distill(recipe)
    out = capsys.readouterr().out
    assert "  from step 12 on 1 worker(s)\n" in out
    assert not re.search(r"^(embed|  step)", out, re.M)
    after = load_file(weights)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_storage_that_moved_keeps_its_mlflow_run(finished: tuple[Recipe, str], tmp_path: Path) -> None:
    recipe, _ = finished
    moved = recipe.model_copy(update={"run": recipe.run.model_copy(update={"storage": f"{tmp_path}/moved"})})
    shutil.copytree(recipe.run.storage, moved.run.storage)
    run_id = files.read_json(f"{moved.folder}/mlflow.json")["run_id"]
    pipeline.write_report(moved)
    assert files.read_json(f"{moved.folder}/mlflow.json")["run_id"] == run_id
    assert files.read_json(f"{moved.folder}/report.json")["curves"]["train/loss"]


def test_a_run_deleted_in_mlflow_begins_a_new_one(finished: tuple[Recipe, str]) -> None:
    import mlflow

    recipe, _ = finished
    deleted = files.read_json(f"{recipe.folder}/mlflow.json")["run_id"]
    client = mlflow.MlflowClient(track.uri_of(recipe))
    client.delete_run(deleted)
    pipeline.distill(recipe)
    new = client.get_run(files.read_json(f"{recipe.folder}/mlflow.json")["run_id"])
    assert new.info.run_id != deleted
    assert [entry.dataset.name for entry in new.inputs.dataset_inputs] == [corpus.name for corpus in recipe.data.corpora]
    assert new.data.metrics["embed/embedded"] == 400


def test_more_workers_than_the_machine_has_cores_are_refused(make_recipe: MakeRecipe, ray_cluster: None) -> None:
    recipe = make_recipe(cluster={"workers": 1000}, train={"micro_batches": 1000})
    with pytest.raises(Refused, match=r"cluster\.workers: 1000 workers with 1 CPU each need more than the \d+ of this machine"):
        pipeline.distill(recipe)


def test_a_mistake_in_a_task_is_refused_before_work(make_recipe: MakeRecipe) -> None:
    task = {"name": "topic", "kind": "classification", "train": "train.tsv", "test": "test.tsv", "text": "{lang}", "label": "labell"}
    recipe = make_recipe(evaluate={"tasks": [task]})
    with pytest.raises(Refused, match="labell"):
        pipeline.distill(recipe)
    assert not Path(recipe.folder, "corpus").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_collapsed_student_stops_the_run(
    make_recipe: MakeRecipe, ray_cluster: None, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    train = {"steps": 200, "lr": 5.0, "warmup_steps": 0, "log_every": 5, "evaluate_every": 200, "checkpoint_every": 200}
    recipe = make_recipe(train=train | {"micro_batches": workers}, cluster={"workers": workers})
    with pytest.raises(Refused, match=r"collapsed at step \d+.*Lower train\.lr \(now 5\.0\)") as refused:
        pipeline.distill(recipe)
    run_id = files.read_json(f"{recipe.folder}/mlflow.json")["run_id"]
    step, cosine = track.curves(recipe, run_id, ["train/student_cosine"])["train/student_cosine"][-1]
    assert f"collapsed at step {step}: mean cosine between its vectors {cosine:.3f}" in str(refused.value)
    assert "from step" not in capsys.readouterr().out, "workers were started again"


def test_two_workers_see_every_batch_once(make_recipe: MakeRecipe, ray_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Two workers on one step's micro-batches end near the model of one worker on the same: the same sum, in another order. They are
    two of three that were asked for, so that one of them takes two micro-batches and the other takes one."""
    train = {"micro_batches": 3, "steps": 8, "log_every": 2}
    weights, curves = [], []
    names = ["train/loss", "train/student_cosine", "train/gradient_norm"]
    rates = ["train/tokens_per_second", "train/steps_per_second"]
    for name, workers in (("one", 1), ("two", [1, 3])):
        recipe = make_recipe(train=train, run={"name": name}, cluster={"workers": workers}, evaluate={"tasks": []})
        pipeline.distill(recipe)
        weights.append(load_file(f"{recipe.folder}/student/model.safetensors"))
        run_id = files.read_json(f"{recipe.folder}/mlflow.json")["run_id"]
        curves.append(track.curves(recipe, run_id, [*names, *rates]))
    for name in names:  # what is logged is the whole step's
        assert [step for step, _ in curves[1][name]] == [2, 4, 6, 8]
        assert [value for _, value in curves[1][name]] == pytest.approx([value for _, value in curves[0][name]], rel=2e-3)
    tokens = [[per / steps for (_, per), (_, steps) in zip(*(each[name] for name in rates), strict=True)] for each in curves]
    assert tokens[1] == pytest.approx(tokens[0], rel=1e-5)  # of a step, all workers together
    assert "  from step 0 on 2 worker(s)" in capsys.readouterr().out
    for key, value in weights[0].items():
        np.testing.assert_allclose(weights[1][key], value, atol=2e-4, err_msg=key)


# --- kill -9 ---


@contextlib.contextmanager
def started(recipe_file: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a user starts it."""
    command = [sys.executable, str(ROOT / "jobs" / "distill.py"), str(recipe_file)]
    with conftest.started(command, folder / f"log-{time.time_ns()}.txt", folder) as process:
        yield process


def test_ctrl_c_says_that_the_same_command_continues(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(run={"name": "run", "storage": str(tmp_path / "c")}, train={"steps": 100_000, "log_every": 10})
    with started(as_file(recipe, tmp_path / "c.yaml"), tmp_path) as process:
        (log,) = tmp_path.glob("log-*.txt")
        wait_for(lambda: b"  step     20 of" in log.read_bytes(), process)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        assert process.wait(timeout=200) == 130, log.read_text()[-3000:]
    assert log.read_text().endswith("\nxdist: stopped; the same command continues this run\n")


def read_if_there(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def run_to_the_end(recipe_file: Path, folder: Path) -> None:
    with started(recipe_file, folder) as process:
        assert process.wait(timeout=600) == 0, sorted(folder.glob("log-*.txt"))[-1].read_text()[-3000:]


def test_killed_at_any_moment_it_ends_in_the_same_model(make_recipe: MakeRecipe, tmp_path: Path, undisturbed: Path) -> None:
    killed = make_recipe(run={"name": "run", "storage": str(tmp_path / "b")}, **LONG)
    recipe_file, folder = as_file(killed, tmp_path / "b.yaml"), Path(killed.folder)
    with started(recipe_file, tmp_path) as process:  # mid-embed: some segments are written, not all
        wait_for(lambda: len(list((tmp_path / "b" / "store").glob("*/*.arrow"))) >= 2, process)
        os.kill(process.pid, signal.SIGKILL)
    held = all_hashes(tmp_path / "b" / "store")
    assert 0 < len(held) < 400
    with started(recipe_file, tmp_path) as process:  # mid-epoch: Ray Train has noted a checkpoint
        wait_for(lambda: b"checkpoint_2" in read_if_there(folder / "checkpoints" / launch.KEPT_NOTES), process)
        os.kill(process.pid, signal.SIGKILL)
    assert not (folder / "student").exists()
    (folder / "checkpoints" / launch.NOTES).write_text('{"ray_version": "2.6')  # as if it was killed while it noted another one
    half = folder / "checkpoints" / "checkpoint_2099-01-01_00-00-00.000000"  # an upload that was cut off is never resumed from
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    run_to_the_end(recipe_file, tmp_path)

    hashes = all_hashes(tmp_path / "b" / "store")
    assert len(hashes) == len(set(hashes)) == 400, "a sentence was embedded twice, or is missing"
    assert not half.exists()
    assert 1 <= len(list((folder / "checkpoints").glob("checkpoint_2*"))) <= 2, "of 12 checkpoints the newest and the best are kept"
    log = sorted(tmp_path.glob("log-*.txt"))[-1].read_text()
    assert "step     10 of 240" not in log, "training began anew instead of going on"
    assert_equal_weights(undisturbed, folder)
