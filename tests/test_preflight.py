"""What machines find, and what only shows in comparison."""

from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRecipe

from xdist import cluster, planning, preflight
from xdist.config import Cluster, Recipe
from xdist.errors import Refused

VERSIONS = {"Python": "3.11.7", "ray": "2.60.0"}


def finding(**other: Any) -> dict[str, Any]:
    return {"versions": VERSIONS, "problems": [], "wrote": "f", "teacher": "d"} | other


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({}, None),
        ({"problems": ["no teacher"], "teacher": ""}, "b: no teacher"),
        (
            {"versions": VERSIONS | {"ray": "2.59.1"}},
            "b: has ray 2.59.1 (the driver 2.60.0); install the same on all machines, by constraints.txt",
        ),
        ({"wrote": "g"}, "b: the driver does not see what it writes to /runs; set run.storage to what all machines share"),
        ({"teacher": "e"}, "b: its copy of owner/name is another than that of a; copy it anew"),
    ],
)
def test_problems_name_the_machine_and_the_remedy(other: dict[str, Any], problem: str | None) -> None:
    recipe = Recipe(run={"storage": "/runs"}, teacher={"model": "owner/name"})  # type: ignore[arg-type]
    found = list(preflight._problems(recipe, [("a", finding()), ("b", finding(**other))], VERSIONS, ["driver", "f"]))
    assert [text[: len(problem or "")] for text in found] == ([problem] if problem else [])


@pytest.mark.parametrize(
    ("machines", "settings", "actors"),
    [
        ([{"CPU": 2}], {}, 1),
        ([{"CPU": 2}], {"workers": 2}, 2),  # two share its cores
        ([{"CPU": 2}, {"CPU": 8}, {"CPU": 8}, {}], {}, 2),  # each takes 8 cores; the head has none
        ([{"CPU": 4}] * 4, {"gpus_per_worker": 1}, 1),  # the machines are prepare's; those with a GPU are yet to come
        ([{"CPU": 4}] * 4 + [{"CPU": 8, "GPU": 4}], {}, 4),
        ([{"CPU": 2}], {"teacher_actors": 5}, 5),
    ],
)
def test_teacher_actors_go_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, machines: list[dict[str, float]], settings: dict[str, Any], actors: int
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": machine} for machine in machines])
    monkeypatch.setattr("ray.cluster_resources", lambda: {key: sum(found.get(key, 0) for found in machines) for key in ("CPU", "GPU")})
    assert cluster.teacher_actors(Cluster(address="here", **settings)) == actors


def test_a_machine_looks(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    folder = Path(recipe.folder, "preflight")
    folder.mkdir(parents=True)
    (folder / "driver").write_text("token")
    found = preflight._look(recipe.model_dump(mode="json"), "token", None)
    assert found["problems"] == []
    assert (folder / found["wrote"]).read_text() == "token"
    wrong = make_recipe(teacher={"model": str(tmp_path / "nowhere")})
    found = preflight._look(wrong.model_dump(mode="json"), "another", "http://127.0.0.1:9")
    assert ["does not see" in found["problems"][0], "no such folder" in found["problems"][1]] == [True, True]
    assert found["problems"][2].startswith("track.uri: MLflow cannot be reached at http://127.0.0.1:9")


def test_a_disk_too_small_is_refused_after_the_plan(make_recipe: MakeRecipe, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from xdist import pipeline

    monkeypatch.setattr(planning, "disk_bytes", lambda plan: 10**18)
    with pytest.raises(Refused, match=r"run\.storage: 1000000000\.0 GB are needed in .* and [\d.]+ GB are free"):
        pipeline.distill(make_recipe())


def test_a_folder_is_held_by_one_job(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "HELD_SECONDS", 1.0)
    with cluster.held("s3://bucket/run"):
        with pytest.raises(Refused, match="s3://bucket/run is held by another job"), cluster.held("s3://bucket/run"):
            pass
        with cluster.held("s3://bucket/other"):
            pass
    with cluster.held("s3://bucket/run"):
        pass
