"""Trials: one training of a search in a process of its own, the record that it keeps, and what all of them came to.

<search>/trials/<trial>.json     settings, every measure that was taken, and what became of it
<search>/checkpoints/<trial>/    where an unfinished trial stands, one folder named by its step
<search>/children/<trial>.json   its MLflow run
"""

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import xxhash

from xdist import files, recipes, selection, shards, spaces, track, train
from xdist.config import Recipe
from xdist.errors import Collapsed, Refused
from xdist.spaces import Space, Trial

Row = dict[str, Any]


def trial_recipe(search: Recipe, trial: Trial) -> Recipe:
    """A trial's recipe. Its folder is that of its training shards; it saves a checkpoint whenever it is compared."""
    found = recipes.applied(search, trial)
    digest = xxhash.xxh3_64_hexdigest(json.dumps(spaces.preparation(trial), sort_keys=True, default=str).encode())
    run = found.run.model_copy(update={"name": f"{search.run.name}/prepared/{digest}"})
    train_ = found.train.model_copy(update={"checkpoint_every": found.train.evaluate_every})
    return found.model_copy(update={"run": run, "train": train_, "track": found.track.model_copy(update={"uri": track.uri_of(search)})})


def run(config: dict[str, Any], search: Recipe, parent: str, worst: float, tell: Callable[[dict[str, Any]], None]) -> None:
    """Train with one set of settings, telling the measures at each evaluation, those of an earlier start first; a student that
    collapses has the `worst` ones."""
    trial, name = config["trial"]["settings"], name_of(config["trial"]["number"])
    uri = f"{search.folder}/trials/{name}.json"
    record = {"trial": name, **config["trial"], "history": [], "outcome": None, "error": ""}
    if files.exists(uri):
        record = files.read_json(uri)
    if record["outcome"] == "failed":
        record |= {"outcome": None, "error": ""}
    for point in record["history"]:
        tell(point | {"again": True})
    if record["outcome"]:
        return
    recipe = trial_recipe(search, trial)
    tracking, marker = track.uri_of(search), f"{search.folder}/children/{name}.json"
    child, new = _child(search, tracking, parent, label(name, trial), logged(recipe, trial), marker)
    metrics = track.Metrics(tracking, child, f"{search.folder}/children/{name}")
    for key, step, value in points(record) if new else ():  # the store has lost what it was told
        metrics.log({key: value}, step)
    total, started = shards.order(recipe).total_steps(), time.monotonic()
    before = record["history"][-1] if record["history"] else {"step": 0, "seconds": 0.0}

    def report(score: float, accuracy: dict[str, float], step: int, save: Callable[[str], None]) -> None:
        metrics.send()  # a trial that is stopped early ends here
        seconds = before["seconds"] + time.monotonic() - started
        found = {"selection": score, "accuracy": _mean(accuracy), **accuracy, "step": step, "of": total, "seconds": seconds}
        record["history"].append(found)
        record["outcome"] = "finished" if step == total else None
        _keep(f"{search.folder}/checkpoints/{name}", uri, record, save)
        tell(found)

    try:
        resumed = _folder(f"{search.folder}/checkpoints/{name}/{before['step']}") if before["step"] else None
        train.fit(recipe, report, train.Meter(None, metrics), resumed)
    except Collapsed as error:
        metrics.flush()
        lost = dict.fromkeys(["selection", "accuracy", *selection.Judge(recipe).names], worst)
        record["history"].append(lost | {"step": total, "of": total, "seconds": before["seconds"] + time.monotonic() - started})
        files.write_json(uri, record | {"outcome": "collapsed", "error": str(error)})
        tell(record["history"][-1])


def _child(search: Recipe, tracking: str, *arguments: Any) -> tuple[str, bool]:
    """The trial's MLflow run, and whether it is new; where MLflow is away, it is waited for as long as machines are."""
    deadline = time.monotonic() + 60 * search.cluster.wait_minutes
    while True:
        try:
            child, new = track.child(tracking, *arguments)
            track.goes_on(tracking, child)
            return child, new
        except Exception:  # of many libraries
            if not (away := track.unreachable(tracking)):
                raise
            if time.monotonic() > deadline:
                raise Refused(f"track.uri: MLflow is away, and cluster.wait_minutes have passed: {away}") from None
            time.sleep(5)


def _keep(checkpoints: str, uri: str, record: dict[str, Any], save: Callable[[str], None]) -> None:
    """Keep a checkpoint, of a trial that has not ended, and the record that names it; then drop the checkpoint before."""
    steps = [point["step"] for point in record["history"]]
    if not record["outcome"]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = os.path.join(scratch, "checkpoint")
            os.mkdir(folder)
            save(folder)
            files.upload(folder, f"{checkpoints}/{steps[-1]}")
    files.write_json(uri, record)
    if len(steps) > 1:
        files.remove(f"{checkpoints}/{steps[-2]}")


@contextlib.contextmanager
def _folder(uri: str) -> Iterator[str]:
    """A folder of the storage as a local one."""
    with tempfile.TemporaryDirectory() as scratch:
        yield files.download(uri, scratch)


def _mean(accuracy: dict[str, float]) -> float:
    return sum(accuracy.values()) / len(accuracy) if accuracy else math.nan


def name_of(number: int) -> str:
    """A trial's name in its search."""
    return f"{number:03d}"


def label(name: str, trial: Trial) -> str:
    """A trial's name and what was searched, in short."""
    return " ".join([name, *(f"{key.split('.')[-1]}={shown(value)}" for key, value in trial.items())])


def shown(value: Any) -> str:
    """A value of a trial in short."""
    if isinstance(value, dict):
        return "+".join(f"{key}:{shown(inside)}" for key, inside in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def logged(recipe: Recipe, trial: Trial) -> dict[str, Any]:
    """What MLflow is told of a trial: the searched keys, with the value that the recipe understood."""
    flat = dict(recipes.flatten(recipe.model_dump(mode="json")))
    return {key: flat.get(key, value) for key, value in trial.items()} | {"run.seed": recipe.run.seed}


def records(search: Recipe) -> list[dict[str, Any]]:
    """The records of all trials that have begun."""
    folder = f"{search.folder}/trials"
    return [files.read_json(f"{folder}/{name}") for name in files.names(folder, ".json")]


def sign(space: Space) -> int:
    """1 where a larger metric is better, else -1."""
    return 1 if space.mode == "max" else -1


def row(record: dict[str, Any], space: Space) -> Row:
    """What one trial came to; `value` is None where it never was compared or has failed, `curve` its (step, value) points."""
    history = record["history"]
    last = history[-1] if history else {}
    counted = record["outcome"] not in ("failed", "collapsed")
    return {
        "trial": record["trial"],
        "settings": record["settings"],
        "value": last.get(space.metric) if counted else None,
        "steps": last.get("step", 0),
        "of": last.get("of", 0),
        "outcome": record["outcome"],
        "error": record.get("error", ""),
        "seconds": last.get("seconds", 0.0),
        "measures": _measures(last) if counted else {},
        "curve": [[point["step"], point[space.metric]] for point in history] if counted else [],
    }


def _measures(point: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in point.items() if name not in ("step", "of", "seconds")}


def points(record: dict[str, Any]) -> list[tuple[str, int, float]]:
    """What MLflow is told of a trial's evaluations: (metric, step, value)."""
    history = record["history"][:-1] if record["outcome"] == "collapsed" else record["history"]
    return [
        (f"held_out/{name}", point["step"], value) for point in history for name, value in _measures(point).items() if name != "accuracy"
    ]


def ranked(rows: list[Row], space: Space) -> list[Row]:
    """Rows best first: finished trials before those that were stopped early, those without a result last; trials that differ in seed
    alone are ranked by their mean, which is kept as `mean`."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        same = {key: value for key, value in row["settings"].items() if key != "run.seed"}
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(row)
    for group in groups.values():
        values = [row["value"] for row in group]
        mean = None if None in values else sum(values) / len(values)
        whole = all(row["outcome"] == "finished" for row in group)
        for row in group:
            row["mean"], row["whole"] = mean, whole
    return sorted(rows, key=lambda row: (row["mean"] is None, not row["whole"], -sign(space) * (row["mean"] or 0.0), row["trial"]))
