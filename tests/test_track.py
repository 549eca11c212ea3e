"""What MLflow is told: of corpora wherever they lie, of trials, and how a run ended."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from xdist import track
from xdist.config import Recipe
from xdist.errors import Refused


@pytest.fixture
def run(tmp_path: Path) -> Iterator[str]:
    """The id of a finished run that logged three corpora, in an MLflow of its own."""
    before = mlflow.get_tracking_uri()
    corpora = [
        {"name": "local", "path": "pairs.{lang}.tsv"},
        {"name": "hub", "path": "hf://owner/name"},
        {"name": "store", "path": "memory://bucket/pairs.tsv"},
        {"name": "empty", "path": "nothing.tsv"},
    ]
    recipe = Recipe(run={"storage": str(tmp_path)}, data={"root": "/data", "corpora": corpora})  # type: ignore[arg-type]
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("here", f"file://{tmp_path}/artifacts"))
    with mlflow.start_run() as active:
        track.log_corpora(recipe, {"local": 3, "hub": 5, "store": 7}, {"local": "a", "hub": "b", "store": "c"})
    yield active.info.run_id
    mlflow.set_tracking_uri(before)


def test_corpora_of_any_place_are_logged_with_digest_and_rows(run: str) -> None:
    found = {entry.dataset.name: entry.dataset for entry in mlflow.get_run(run).inputs.dataset_inputs}
    assert {name: (entry.digest, json.loads(entry.profile)["num_rows"]) for name, entry in found.items()} == {
        "local": ("a", 3),
        "hub": ("b", 5),
        "store": ("c", 7),
    }
    assert "/data/pairs.*.tsv" in found["local"].source
    assert "hf://owner/name" in found["hub"].source
    assert "memory://bucket/pairs.tsv" in found["store"].source


def test_a_child_is_opened_once_and_told_the_rest(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow goes away between a child's birth and its parameters; the store loses the child later."""
    uri, marker, settings = f"sqlite:///{tmp_path}/mlflow.db", f"{tmp_path}/child.json", {"train.lr": 0.1, "train.steps": 5}
    client = mlflow.MlflowClient(uri)

    def away(*_: object, **__: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as outage:
        outage.setattr(mlflow.MlflowClient, "log_batch", away)
        with pytest.raises(ConnectionError):
            track.child(uri, run, "000", settings, marker)
    child, new = track.child(uri, run, "000", settings, marker)
    assert not new
    assert client.get_run(child).data.params == {"train.lr": "0.1", "train.steps": "5"}
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == run
    client.delete_run(child)
    other, new = track.child(uri, run, "000", settings, marker)
    assert new
    assert other != child


def test_a_description_is_the_newest_table_unless_a_person_wrote_it(run: str) -> None:
    def described(table: str) -> str:
        with mlflow.start_run(run_id=run):
            track.describe(table)
        return str(mlflow.get_run(run).data.tags["mlflow.note.content"])

    assert described("\n  task  after\n  a     71.2\n") == "```\n  task  after\n  a     71.2\n```"
    lines = [f"line {number:04}" for number in range(1000)]
    cut = described("\n".join(lines)).splitlines()
    assert len("\n".join(cut)) <= 5000  # the least that servers take
    assert (cut[0], cut[-2:]) == ("```", ["… the rest is in report.html", "```"])
    assert cut[1:-2] == lines[: len(cut) - 3]
    assert len(cut) > 400
    for of_a_person in ("the best of March", "```\na table\n```\nthe best of March", "```\na\n```\nand\n```\nb\n```"):
        mlflow.MlflowClient().set_tag(run, "mlflow.note.content", of_a_person)
        assert described("another table") == of_a_person


def test_a_server_is_looked_at_where_it_is() -> None:
    assert track.view("http://mlflow:5000") == "http://mlflow:5000"
    assert track.view("sqlite:////runs/mlflow.db") == "mlflow ui --backend-store-uri sqlite:////runs/mlflow.db"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Refused("mend it"), mlflow.MlflowException("away"), None])
def test_a_run_ends_as_its_job_does(tmp_path: Path, error: BaseException | None) -> None:
    """With what the job raised, but for MLflow's own errors, which say what the user can do."""
    recipe = Recipe(run={"name": "r", "storage": str(tmp_path)})  # type: ignore[arg-type]
    raised = Refused if isinstance(error, mlflow.MlflowException) else type(error)
    with pytest.raises(raised) if error else contextlib.nullcontext() as caught, track.run(recipe, "distill") as run_id:  # type: ignore[arg-type]
        if error:
            raise error
    assert mlflow.MlflowClient(track.uri_of(recipe)).get_run(run_id).info.status == ("FAILED" if error else "FINISHED")
    assert mlflow.active_run() is None
    if isinstance(error, mlflow.MlflowException):
        assert "went away" in str(caught.value)
    with track.run(recipe, "distill") as again:  # the same run, whatever it ended as
        assert again == run_id
