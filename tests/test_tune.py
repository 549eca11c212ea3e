"""A search, end to end: real Ray Tune, a real MLflow store, a tiny student."""

import contextlib
import csv
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import yaml
from conftest import started, wait_for

from xdist import files, findings, pipeline, recipes, spaces, track, trials, tune
from xdist.config import Recipe
from xdist.errors import Refused
from xdist.spaces import Space

ROOT = Path(__file__).parent.parent
MakeRecipe = Callable[..., Recipe]
SEARCH = {"train.lr": {"grid": [1e-3, 1e-5]}, "data.sample": {"grid": [0.5, 1.0]}}


def as_space(tmp_path: Path, search: dict[str, Any] = SEARCH, **keys: Any) -> str:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"search": search, **keys}))
    return str(path)


def loaded(path: str, recipe: Recipe) -> Space:
    return spaces.load(path, recipes.read_yaml(path, "space", "tune_spaces/"), recipe)


def children(search: Recipe) -> list[Any]:
    """The MLflow runs of a search's trials."""
    parent = files.read_json(f"{search.folder}/mlflow.json")["run_id"]
    client = mlflow.MlflowClient(track.uri_of(search))
    return list(client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"))


def by_settings(runs: list[Any]) -> dict[tuple[str, str], Any]:
    found = {(run.data.params["train.lr"], run.data.params["data.sample"]): run for run in runs}
    assert len(found) == len(runs)
    return found


def test_a_search_from_corpus_to_best_recipe(
    make_recipe: MakeRecipe, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, space = make_recipe(), as_space(tmp_path, fixed={"train.steps": 8, "train.evaluate_every": 4})
    pipeline.tune(recipe, space)
    search = tune.search_recipe(recipe, loaded(space, recipe))
    rows = files.read_json(f"{search.folder}/trials.json")
    settings = [(row["settings"]["train.lr"], row["settings"]["data.sample"]) for row in rows]
    assert sorted(settings) == [(1e-5, 0.5), (1e-5, 1.0), (1e-3, 0.5), (1e-3, 1.0)]
    assert all(row["steps"] == row["of"] == 8 and row["outcome"] == "finished" for row in rows)
    assert [len(row["curve"]) for row in rows] == [2] * 4
    assert rows[0]["value"] == max(row["value"] for row in rows)
    assert rows[0]["settings"]["train.lr"] == 1e-3  # a hundredth of it hardly moves a student in eight steps

    prepared = sorted(Path(search.folder, "prepared").iterdir())
    assert len(prepared) == 2  # one set of shards for each sample
    embedded = [files.read_json(f"{folder}/embed.json") for folder in prepared]
    assert sorted((found["embedded"], found["cached"]) for found in embedded) == [(0, 400), (400, 0)]

    best = recipes.load(f"{search.folder}/best.yaml")
    assert best.train.lr == 1e-3
    assert best.run.name == "tiny-grid-best"
    assert best.train.steps == recipe.train.steps == 12  # the search's own length is not the recipe's
    assert best.data.corpora == recipe.data.corpora
    with open(f"{search.folder}/trials.csv", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    assert [float(line["selection"]) for line in table] == [row["value"] for row in rows]
    assert "topic/es" in table[0]

    client = mlflow.MlflowClient(track.uri_of(search))
    parent = client.get_run(files.read_json(f"{search.folder}/mlflow.json")["run_id"])
    assert parent.info.run_name == "tiny-grid"
    assert parent.data.metrics["search/trials"] == 4
    assert parent.data.metrics["search/steps"] == 32
    described = parent.data.tags["mlflow.note.content"].splitlines()
    assert described[1].split() == ["trial", "sample", "lr", "steps", "selection", "accuracy"]
    assert [line.split()[0] for line in described[2:6]] == [row["trial"] for row in rows]
    found = by_settings(children(search))
    assert found.keys() == {(str(lr), str(sample)) for lr, sample in settings}
    for row in rows:
        run = found[str(row["settings"]["train.lr"]), str(row["settings"]["data.sample"])]
        assert run.info.status == "FINISHED"
        assert run.data.metrics["held_out/selection"] == pytest.approx(row["value"])
        assert run.data.metrics["trial/steps"] == 8

    # Once more, with numbers of one trial that MLflow did not take, and another trial that it lost: all else is done.
    first, last = rows[0], rows[-1]
    unsent = f"{search.folder}/children/{first['trial']}/unsent.json"
    files.write_json(unsent, [["train/loss", 0.25, 1_700_000_000_000, 77]])
    client.delete_run(files.read_json(f"{search.folder}/children/{last['trial']}.json")["run_id"])
    store = sorted(path.name for path in Path(recipe.run.storage, "store").rglob("*"))
    capsys.readouterr()
    pipeline.tune(recipe, space)
    assert files.read_json(f"{search.folder}/trials.json") == rows
    assert "step " not in capsys.readouterr().out.split("trial  ")[0]
    assert sorted(path.name for path in Path(recipe.run.storage, "store").rglob("*")) == store
    assert not files.exists(unsent)
    again = by_settings(children(search))
    assert again.keys() == found.keys()
    assert {run.info.status for run in again.values()} == {"FINISHED"}
    assert (
        again[str(last["settings"]["train.lr"]), str(last["settings"]["data.sample"])].data.metrics["held_out/selection"] == last["value"]
    )
    told = again[str(first["settings"]["train.lr"]), str(first["settings"]["data.sample"])]
    assert (77, 0.25) in [(point.step, point.value) for point in client.get_metric_history(told.info.run_id, "train/loss")]


def test_trials_do_without_the_teacher(make_recipe: MakeRecipe, tmp_path: Path, teacher: str, ray_cluster: None) -> None:
    copy = shutil.copytree(teacher, tmp_path / "teacher")
    recipe = make_recipe(teacher={"model": str(copy)})
    space = loaded(as_space(tmp_path, {"train.lr": {"grid": [1e-3]}}, fixed={"train.steps": 4, "train.evaluate_every": 4}), recipe)
    search = tune.search_recipe(recipe, space)
    for variant in tune.prepared_recipes(search, space):
        pipeline._make_ready(variant)
    shutil.rmtree(copy)
    with track.run(search, "tune") as parent:
        (row,) = tune.run(search, space, parent)
    assert (row["outcome"], row["steps"]) == ("finished", 4)


def test_the_records_of_a_known_objective_find_its_optimum(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without training: a trial's score is a parabola of its learning rate, and one trial is interrupted on its way."""
    recipe = make_recipe()
    file = as_space(tmp_path, {"train.lr": {"grid": [1e-5, 1e-4, 1e-3, 1e-2]}})
    space = loaded(file, recipe)
    search = tune.search_recipe(recipe, space)

    def height(lr: float, step: int) -> float:
        return 1 - (math.log10(lr) + 3) ** 2 / 10 - 0.1 / step

    class Interrupted(Exception):
        pass

    begun: list[str] = []
    interrupting = [True]

    def fit(recipe: Recipe, report: Any, meter: Any, resumed: Any) -> None:
        with resumed or contextlib.nullcontext() as folder:
            start = int(Path(folder, "step").read_text()) if folder else 0
        begun.append(f"{recipe.train.lr:g} from {start}")
        for step in range(start + 4, 13, 4):
            report(height(recipe.train.lr, step), {"x": step / 12}, step, lambda out, step=step: Path(out, "step").write_text(str(step)))
            if recipe.train.lr == 1e-4 and step == 8 and interrupting:
                interrupting.clear()
                raise Interrupted

    monkeypatch.setattr(trials.train, "fit", fit)
    monkeypatch.setattr(trials.shards, "order", lambda recipe: SimpleNamespace(total_steps=lambda: 12))
    told: list[dict[str, Any]] = []
    with track.run(search, "tune") as parent:
        for number, settings in enumerate(tune.drawn(search, space)):
            given = {"trial": {"number": number, "settings": settings}}
            with contextlib.suppress(Interrupted):
                trials.run(given, search, parent, -1.0, told.append)
            trials.run(given, search, parent, -1.0, told.append)  # again: it goes on, or only tells
    assert begun == ["1e-05 from 0", "0.0001 from 0", "0.0001 from 8", "0.001 from 0", "0.01 from 0"]
    assert [point["step"] for point in told if "again" not in point] == [4, 8, 12] * 4
    rows = trials.ranked([trials.row(record, space) for record in trials.records(search)], space)
    assert [row["settings"]["train.lr"] for row in rows] == [1e-3, 1e-4, 1e-2, 1e-5]  # 1e-4 and 1e-2 are equally far; the earlier first
    assert [row["value"] for row in rows] == pytest.approx([height(lr, 12) for lr in (1e-3, 1e-4, 1e-2, 1e-5)])
    assert all(row["outcome"] == "finished" and [step for step, _ in row["curve"]] == [4, 8, 12] for row in rows)
    assert yaml.safe_load(findings.best(recipe, search, space, rows))["train"]["lr"] == 1e-3


def test_asha_stops_the_weak_and_a_collapsed_trial_is_the_worst(make_recipe: MakeRecipe, tmp_path: Path, ray_cluster: None) -> None:
    """One after the other, best first: those behind it stop early."""
    search = {"train.lr": {"grid": [2e-3, 1e-7, 1e-8, 5.0]}}
    fixed = {"train.steps": 40, "train.evaluate_every": 4, "train.warmup_steps": 0}
    recipe = make_recipe()
    file = as_space(tmp_path, search, fixed=fixed, scheduler="asha", reduction=2, at_once=1, metric="translation/es")
    with pytest.raises(Refused, match="no metric 'translation/es'; there are selection, accuracy, retrieval/es"):
        pipeline.tune(recipe, file)
    file = as_space(tmp_path, search, fixed=fixed, scheduler="asha", reduction=2, at_once=1)
    pipeline.tune(recipe, file)
    space = loaded(file, recipe)
    rows = files.read_json(f"{tune.search_recipe(recipe, space).folder}/trials.json")
    assert rows[0]["settings"]["train.lr"] == 2e-3
    assert (rows[0]["steps"], rows[0]["outcome"]) == (40, "finished")
    weak = {row["settings"]["train.lr"]: row for row in rows[1:]}
    for lr in (1e-7, 1e-8):
        assert weak[lr]["outcome"] == "stopped early"
        assert weak[lr]["steps"] in (4, 8, 16)  # the times of comparison: the first is too early to tell for so small a difference
    assert weak[5.0]["outcome"] == "collapsed"
    spent, whole = findings.steps(rows)
    assert spent == sum(row["steps"] for row in rows)
    assert whole == 160


def test_the_median_stops_what_is_weaker_than_most(make_recipe: MakeRecipe, tmp_path: Path, ray_cluster: None) -> None:
    """One after the other: three that learn, and one that hardly moves."""
    fixed = {"train.steps": 20, "train.evaluate_every": 4, "train.warmup_steps": 0}
    search = {"train.lr": {"grid": [2e-3, 1e-3, 5e-4, 1e-8]}}
    recipe, file = make_recipe(), as_space(tmp_path, search, fixed=fixed, scheduler="median", at_once=1)
    pipeline.tune(recipe, file)
    rows = files.read_json(f"{tune.search_recipe(recipe, loaded(file, recipe)).folder}/trials.json")
    *better, weak = rows
    assert {(row["steps"], row["outcome"]) for row in better} == {(20, "finished")}
    assert (weak["settings"]["train.lr"], weak["outcome"]) == (1e-8, "stopped early")
    assert 4 <= weak["steps"] < 20


def test_optuna_draws_within_the_space(make_recipe: MakeRecipe, tmp_path: Path, ray_cluster: None) -> None:
    pytest.importorskip("optuna")
    search = {
        "train.loss.contrastive": {"choice": [0, 0.1]},
        "train.loss_temperature": {"uniform": [0.03, 0.3], "when": {"train.loss.contrastive": 0.1}},
        "train.lr": {"loguniform": [1e-5, 1e-3]},
    }
    recipe, file = make_recipe(), as_space(tmp_path, search, searcher="tpe", samples=4, fixed={"train.steps": 2, "train.evaluate_every": 2})
    pipeline.tune(recipe, file)
    rows = files.read_json(f"{tune.search_recipe(recipe, loaded(file, recipe)).folder}/trials.json")
    assert len(rows) == 4
    for row in rows:
        assert 1e-5 <= row["settings"]["train.lr"] <= 1e-3
        assert ("train.loss_temperature" in row["settings"]) == (row["settings"]["train.loss.contrastive"] == 0.1)


def test_another_space_under_the_same_name_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, fixed = make_recipe(), {"train.steps": 8, "train.evaluate_every": 4}
    space = loaded(as_space(tmp_path, fixed=fixed, minutes=3), recipe)
    search = tune.search_recipe(recipe, space)
    files.write_json(f"{search.folder}/space.json", space.model_dump(mode="json"))
    files.write_json(f"{search.folder}/mlflow.json", {"run_id": "begun"})
    pipeline._settle_space(search, loaded(as_space(tmp_path, fixed=fixed, minutes=9, at_once=1), recipe).model_dump(mode="json"))
    with pytest.raises(Refused, match="tiny-grid has begun with another space; give this one another name"):
        pipeline.tune(recipe, as_space(tmp_path, {"train.lr": {"grid": [1e-4, 1e-3]}}, fixed=fixed))


def test_trials_that_differ_in_seed_alone_are_ranked_by_their_mean() -> None:
    def row(number: int, lr: float, seed: int, value: float | None, outcome: str = "finished") -> dict[str, Any]:
        return {"trial": trials.name_of(number), "settings": {"train.lr": lr, "run.seed": seed}, "value": value, "outcome": outcome}

    rows = [
        row(0, 1, 0, 0.9),
        row(1, 1, 1, 0.1),
        row(2, 2, 0, 0.6),
        row(3, 2, 1, 0.6),
        row(4, 3, 0, 0.99, "stopped early"),
        row(5, 4, 0, None, "failed"),
    ]
    space = Space(name="s", search={"train.lr": {"grid": [1, 2, 3, 4]}})  # type: ignore[dict-item]
    found = trials.ranked(rows, space)
    assert [int(entry["trial"]) for entry in found] == [2, 3, 0, 1, 4, 5]
    assert [entry["mean"] for entry in found] == [0.6, 0.6, 0.5, 0.5, 0.99, None]
    smallest = trials.ranked(rows, space.model_copy(update={"mode": "min"}))
    assert [int(entry["trial"]) for entry in smallest] == [0, 1, 2, 3, 4, 5]


def commands(make_recipe: MakeRecipe, tmp_path: Path, space: str, name: str) -> tuple[list[str], Recipe, Path]:
    """(the command as a user gives it, the search's recipe, the log) with a storage of its own."""
    recipe = make_recipe(run={"name": name, "storage": str(tmp_path / name)})
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), space, str(path)]
    return command, tune.search_recipe(recipe, loaded(space, recipe)), tmp_path / f"{name}.log"


def to_the_end(command: list[str], log: Path) -> None:
    with started(command, log) as process:
        assert process.wait(timeout=600) == 0, log.read_text()[-3000:]


def found(search: Recipe) -> list[Any]:
    rows = files.read_json(f"{search.folder}/trials.json")
    return [(row["settings"], row["value"], row["steps"], row["outcome"], row["curve"]) for row in rows]


def test_killed_in_the_middle_it_goes_on(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Under ASHA, one trial after the other: those that ended are not run again, the one that was running continues from its
    checkpoint, later ones are stopped as if nothing had happened; all end as in a search that was left alone."""
    fixed = {"train.steps": 60, "train.evaluate_every": 10}
    search = {"train.lr": {"grid": [0.2, 1e-4, 0.3]}}  # the first and the third spoil the student; the second goes on
    space = as_space(tmp_path, search, fixed=fixed, at_once=1, scheduler="asha", reduction=2)
    command, left_alone, log = commands(make_recipe, tmp_path, space, "left_alone")
    to_the_end(command, log)

    command, killed, log = commands(make_recipe, tmp_path, space, "killed")
    notes = Path(killed.folder, "children")
    with started(command, log) as process:
        wait_for(lambda: b"1 of 3" in log.read_bytes() and b"001 lr=0.0001   step 20" in log.read_bytes(), process)
        os.kill(process.pid, signal.SIGKILL)
    assert not Path(killed.folder, "trials.json").exists()
    begun = {path.stem: path.read_text() for path in notes.glob("*.json")}
    to_the_end(command, log)
    told = log.read_text()
    assert "000 lr=0.2   step 10 " not in told, "a finished trial was run again"
    assert "001 lr=0.0001   step 10 " not in told, "a running trial began anew instead of going on"
    assert found(killed) == found(left_alone)
    assert [row[3] for row in found(killed)] == ["finished", "finished", "stopped early"]
    assert not list(Path(killed.folder, "checkpoints").glob("*"))  # nothing is left of them once the trials have ended
    assert begun.items() <= {path.stem: path.read_text() for path in notes.glob("*.json")}.items()
    assert [run.info.status for run in children(killed)] == ["FINISHED"] * 3


def test_ctrl_c_stops_a_search_that_goes_on_later(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    space = as_space(tmp_path, {"train.lr": {"grid": [1e-3, 1e-4]}}, fixed={"train.steps": 4000, "train.evaluate_every": 20}, at_once=1)
    command, search, log = commands(make_recipe, tmp_path, space, "stopped")
    with started(command, log) as process:
        wait_for(lambda: b"000 lr=0.001   step 40" in log.read_bytes(), process)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        assert process.wait(timeout=200) == 130, log.read_text()[-3000:]
    assert log.read_text().endswith("xdist: stopped; the same command continues this run\n")
    assert not Path(search.folder, "best.yaml").exists()
    record = files.read_json(f"{search.folder}/trials/000.json")
    assert record["outcome"] is None
    assert Path(search.folder, "checkpoints", "000", str(record["history"][-1]["step"]), "state.json").exists()


def test_optuna_goes_on_as_if_nothing_had_happened() -> None:
    """A known objective, one trial after the other, past the first ten, which are random: killed early, midway or late, the search draws
    what it would have drawn. Trials that had begun come first, whichever they were."""
    pytest.importorskip("optuna")
    space = Space(name="s", searcher="tpe", samples=14, search={"train.lr": {"loguniform": [1e-5, 1]}, "train.clip": {"choice": [1, 2]}})  # type: ignore[dict-item]

    def drawn(searcher: Any, count: int) -> list[dict[str, Any]]:
        found = []
        for number in range(count):
            found.append(searcher.suggest(str(number))["trial"])
            searcher.on_trial_complete(str(number), {"selection": -abs(math.log10(found[-1]["settings"]["train.lr"]) + 3)})
        return found

    whole = drawn(tune._tpe(space, 0, []), 14)
    assert len({entry["settings"]["train.lr"] for entry in whole}) == 14
    records = [{"trial": trials.name_of(entry["number"]), "asked": entry["asked"]} for entry in whole]
    for killed in (1, 5, 12):
        assert drawn(tune._tpe(space, 0, records[:killed]), 14) == whole
    again = drawn(tune._tpe(space, 0, [records[0], records[2]]), 3)  # of three at once, the second had not begun
    assert again == [whole[0], whole[2], whole[1]]
    other = drawn(tune._tpe(space, 1, []), 2)
    assert [entry["settings"] for entry in other] != [entry["settings"] for entry in whole[:2]]


def test_trials_share_out_the_machine(ray_cluster: None) -> None:
    space = Space(name="s", search={"train.lr": {"grid": [1]}})  # type: ignore[dict-item]
    recipe = Recipe()
    assert tune.share(recipe, space, 12) == (2, 1, 0)
    assert tune.share(recipe, space, 1) == (1, 2, 0)
    assert tune.share(recipe, space.model_copy(update={"at_once": 1}), 12) == (1, 2, 0)
    assert tune.share(recipe, space.model_copy(update={"at_once": 4}), 12) == (2, 1, 0)  # there are no more cores
    with pytest.raises(Refused, match="need more than the 2 of this machine"):
        tune.share(Recipe(cluster={"cpus_per_worker": 8}), space, 12)  # type: ignore[arg-type]


def test_trials_have_a_gpu_each_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two machines of 8 CPUs and 2 GPUs, as Ray describes them."""
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0, "GPU": 4.0})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}] * 2)
    space = Space(name="s", search={"train.lr": {"grid": [1]}})  # type: ignore[dict-item]
    shares = {each: tune.share(Recipe(cluster={"gpus_per_worker": each}), space, 12) for each in (None, 0.5, 0)}  # type: ignore[arg-type]
    assert shares == {None: (4, 1, 1.0), 0.5: (8, 1, 0.5), 0: (12, 1, 0.0)}

    monkeypatch.setenv("RAY_ADDRESS", "a cluster that starts machines with GPUs when they are asked for")
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0})
    asking = Recipe(cluster={"gpus_per_worker": 1})  # type: ignore[arg-type]
    assert tune.share(asking, space, 12) == (1, 1, 1.0)
    assert tune.share(asking, space.model_copy(update={"at_once": 4}), 12)[::2] == (4, 1.0)


def test_time_ends_a_search_and_more_time_goes_on(
    make_recipe: MakeRecipe, tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, fixed = make_recipe(), {"train.steps": 100_000, "train.evaluate_every": 10}

    def search(minutes: float) -> trials.Row:
        keys = {"seeds": [0, 1], "at_once": 1, "scheduler": "median", "minutes": minutes}
        file = as_space(tmp_path, {"train.lr": {"grid": [1e-3]}}, fixed=fixed, **keys)
        pipeline.tune(recipe, file)
        (row,) = files.read_json(f"{tune.search_recipe(recipe, loaded(file, recipe)).folder}/trials.json")
        return dict(row)

    with pytest.raises(Refused, match=r"space grid: minutes: 0\.01 were over before a trial was compared; allow more"):
        search(0.01)
    first = search(0.5)
    assert (first["trial"], first["settings"]["run.seed"], first["outcome"]) == ("000", 0, None)
    assert 0 < first["steps"] < 100_000
    assert re.search(r"^ +000 .* unfinished$", capsys.readouterr().out, re.M)
    second = search(0.51)
    assert second["curve"][: len(first["curve"])] == first["curve"]
    assert second["steps"] > first["steps"]


def test_what_cannot_stop_early_is_refused_before_anything_is_trained(make_recipe: MakeRecipe, tmp_path: Path, ray_cluster: None) -> None:
    recipe = make_recipe()
    file = as_space(tmp_path, {"train.lr": {"grid": [1e-3]}}, fixed={"train.steps": 6, "train.evaluate_every": 6}, scheduler="asha")
    with pytest.raises(Refused, match="trials take 6 steps and are first compared at 6"):
        pipeline.tune(recipe, file)
    file = as_space(tmp_path, {"train.lr": {"grid": [1e-3]}}, fixed={"train.steps": 6, "train.evaluate_every": 3}, scheduler="asha")
    pipeline.tune(recipe, file)  # mended, it runs under the same name
    assert "lr: 0.001" in Path(f"{recipe.folder}-grid", "best.yaml").read_text()
