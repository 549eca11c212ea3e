"""What MLflow is told about the corpora, wherever they lie."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from xdist import track
from xdist.config import Recipe


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


def test_a_server_is_looked_at_where_it_is() -> None:
    assert track.view("http://mlflow:5000") == "http://mlflow:5000"
    assert track.view("sqlite:////runs/mlflow.db") == "mlflow ui --backend-store-uri sqlite:////runs/mlflow.db"
