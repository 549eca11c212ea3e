"""Tune: a recipe's training, many times over with other settings, with Ray Tune.

Reads a recipe and a space. In the search's folder, <storage>/<run>-<space>/, it writes

    prepared/<digest>/    corpus, untrained student and training shards, shared by all trials that need the same
    trials/ children/     Ray Tune's state; the MLflow run of each trial
    checkpoints/<trial>/  where a trial stands: newest.json names the checkpoint, and holds the measures taken there
    trials.json best.yaml what every trial came to; the best settings as a recipe

The teacher works before the trials and never in them: they read its vectors from the shards. A search that was killed at any
moment goes on: trials that ended are kept, the others continue from their checkpoints.
"""

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import xxhash

from xdist import files, recipes, selection, shards, spaces, track, train
from xdist.config import Recipe
from xdist.errors import Collapsed, Refused
from xdist.progress import say
from xdist.spaces import Space, Trial

Row = dict[str, Any]


def search_recipe(recipe: Recipe, space: Space) -> Recipe:
    """The recipe under the search's own name and with its fixed keys: what trials vary."""
    fixed = spaces.applied(recipe, space.fixed)
    return fixed.model_copy(update={"run": recipe.run.model_copy(update={"name": f"{recipe.run.name}-{space.name}"})})


def trial_recipe(search: Recipe, trial: Trial) -> Recipe:
    """A trial's recipe. Its folder is that of its training shards; it saves a checkpoint whenever it is compared."""
    found = spaces.applied(search, trial)
    digest = xxhash.xxh3_64_hexdigest(json.dumps(spaces.preparation(trial), sort_keys=True, default=str).encode())
    run = found.run.model_copy(update={"name": f"{search.run.name}/prepared/{digest}"})
    train_ = found.train.model_copy(update={"checkpoint_every": found.train.evaluate_every})
    return found.model_copy(update={"run": run, "train": train_, "track": found.track.model_copy(update={"uri": track.uri_of(search)})})


def prepared_recipes(search: Recipe, space: Space) -> list[Recipe]:
    """One recipe for each set of training shards that trials need, its folder being theirs."""
    found = spaces.preparations(space) if space.searcher == "tpe" else [spaces.preparation(trial) for trial in spaces.trials(space)]
    return list({recipe.folder: recipe for recipe in (trial_recipe(search, trial) for trial in found)}.values())


def run(search: Recipe, space: Space, parent: str) -> list[Row]:
    """Run what is left of a search whose training shards are there, below the MLflow run `parent`. Gives one row a trial, best
    first. Needs a connected Ray. Raises Refused where no trial came to an end."""
    from ray import tune

    if not search.cluster.verbose:
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's tables, which verbose=0 leaves on
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")  # how far Tune's record of finished trials may lag behind
    measures = names(search, space)
    trials = None if space.searcher == "tpe" else spaces.trials(space)
    count = space.samples if trials is None else len(trials)
    concurrent, resources = share(search, space, count)
    each = f"{resources['CPU']:g} CPU, {resources['GPU']:g} GPU each"
    say(f"search    {count} trials, {concurrent} at once with {each}; metric {space.metric}")
    path, settings = f"{search.folder}/trials", search.model_dump(mode="json")
    threads = 0 if resources["GPU"] else int(resources["CPU"])

    def trial(config: Trial) -> None:
        _trial(config, settings, parent, threads, worst=train.WORST * sign(space))

    trainable = tune.with_resources(trial, resources)
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"settings": tune.grid_search(trials)} if trials is not None else None,
            tune_config=tune.TuneConfig(
                search_alg=_tpe(search, space) if trials is None else None,
                scheduler=_scheduler(search, space),
                num_samples=count if trials is None else 1,
                max_concurrent_trials=concurrent,
                time_budget_s=60 * space.minutes if space.minutes else None,
                reuse_actors=True,  # a trial's process has its libraries loaded for the next one
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=search.folder,
                callbacks=[_follower(search, space, count)],
                verbose=0,
            ),
        )
    results: Any = tuner.fit()
    rows = ranked([_row(result, space, measures) for result in results], space)
    files.write_json(f"{search.folder}/trials.json", rows)
    files.remove(f"{search.folder}/checkpoints")
    if not rows or rows[0]["mean"] is None:
        raise Refused(f"no trial came to a result; the first says: {rows[0]['error'] if rows else 'nothing'}")
    return rows


def names(search: Recipe, space: Space) -> list[str]:
    """What trials are measured by. Raises Refused where the space's metric is none of these."""
    found: dict[str, None] = {"selection": None, "accuracy": None}
    for recipe in prepared_recipes(search, space):
        found |= dict.fromkeys(selection.Judge(recipe).names)
    if space.metric not in found:
        raise Refused(f"space {space.name}: no metric {space.metric!r}; there are {', '.join(found)}")
    return list(found)


def share(search: Recipe, space: Space, count: int) -> tuple[int, dict[str, float]]:
    """(trials at once, resources of each): a GPU each where there are any, otherwise the cluster's CPUs shared out."""
    import ray

    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 1)), total.get("GPU", 0)
    if gpus >= 1 and search.cluster.gpus_per_worker != 0:
        each = search.cluster.gpus_per_worker or 1.0
        cores = search.cluster.cpus_per_worker or 1
        concurrent = max(1, min(count, int(gpus / each), cpus // cores, space.at_once or count))
        return concurrent, {"CPU": cores, "GPU": each}
    concurrent = max(1, min(count, cpus // (search.cluster.cpus_per_worker or 1), space.at_once or count))
    return concurrent, {"CPU": search.cluster.cpus_per_worker or max(1, cpus // concurrent), "GPU": 0}


def _scheduler(search: Recipe, space: Space) -> Any:
    from ray.tune import schedulers

    grace = space.grace_steps or search.train.evaluate_every
    common: dict[str, Any] = {"time_attr": "step", "metric": space.metric, "mode": space.mode, "grace_period": grace}
    if space.scheduler == "asha":
        most = max(shards.order(recipe).total_steps() for recipe in prepared_recipes(search, space))
        return schedulers.ASHAScheduler(max_t=most, reduction_factor=space.reduction, **common)
    if space.scheduler == "median":
        return schedulers.MedianStoppingRule(**common)
    return None


def _tpe(search: Recipe, space: Space) -> Any:
    try:
        import optuna  # noqa: F401  (OptunaSearch alone says so late, and not what to do)
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise Refused(f"space {space.name}: searcher tpe needs Optuna: pip install 'xdist-ray[optuna]', or searcher: random") from None
    return OptunaSearch(_Suggested(space), metric=space.metric, mode=space.mode, seed=search.run.seed)


class _Suggested:
    """Optuna's side of a space, key by key, so that conditional keys are only asked for where they apply."""

    def __init__(self, space: Space):
        self.space = space

    def __call__(self, trial: Any) -> dict[str, Any]:
        drawn: Trial = {}
        for key, knob in sorted(self.space.search.items(), key=lambda entry: bool(entry[1].when)):
            if key in spaces.conditioned(self.space, drawn | {key: None}):
                drawn[key] = self._one(trial, key, knob)
        return {"settings": drawn}

    def _one(self, trial: Any, key: str, knob: spaces.Knob) -> Any:
        if knob.values is not None:  # Optuna's categories are numbers and texts; ours may be lists and mappings
            return knob.values[trial.suggest_categorical(key, list(range(len(knob.values))))]
        if knob.randint:
            return trial.suggest_int(key, *knob.randint)
        low, high = knob.loguniform or knob.uniform or (0.0, 1.0)
        return trial.suggest_float(key, low, high, log=knob.loguniform is not None)


# --- in a trial's process ---


def _trial(config: Trial, settings: dict[str, Any], parent: str, threads: int, worst: float) -> None:
    """Train with one set of settings, telling Tune the measures at each evaluation; a student that collapses has the worst ones."""
    import torch
    from ray import tune

    if threads:
        torch.set_num_threads(threads)
    search = Recipe(**settings)
    recipe = trial_recipe(search, config["settings"])
    name = name_of(tune.get_context().get_trial_id())
    marker, uri = f"{search.folder}/children/{name}.json", track.uri_of(search)
    run_id = track.child(uri, parent, label(name, config["settings"]), logged(recipe, config["settings"]), marker)
    metrics = track.Metrics(uri, run_id)
    total = shards.order(recipe).total_steps()

    standing = f"{search.folder}/checkpoints/{name}"
    newest = files.read_json(f"{standing}/newest.json") if files.exists(f"{standing}/newest.json") else None
    if newest and newest["step"] == total:  # killed when it had ended, before Tune took note
        tune.report(newest)
        return

    def report(score: float, accuracy: dict[str, float], step: int, save: Callable[[str], None]) -> None:
        metrics.send()  # a trial that is stopped early ends here
        found = {"selection": score, "accuracy": _mean(accuracy), **accuracy, "step": step, "of": total}
        _keep(standing, found, save)
        tune.report(found)

    try:
        train.fit(recipe, report, train.Meter(None, metrics), _folder(f"{standing}/{newest['step']}") if newest else None)
    except Collapsed as error:
        metrics.flush()
        lost = dict.fromkeys(["selection", "accuracy", *selection.Judge(recipe).names], worst)
        tune.report(lost | {"step": total, "of": total, "collapsed": str(error)})


def _keep(standing: str, found: dict[str, Any], save: Callable[[str], None]) -> None:
    """Keep a checkpoint in place of the one before; of a trial that has ended, its measures alone. Tune's own checkpoints would not
    do: its record of where a trial stands lags behind, and after a kill names one that is gone."""
    before = files.read_json(f"{standing}/newest.json")["step"] if files.exists(f"{standing}/newest.json") else None
    if found["step"] < found["of"]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = os.path.join(scratch, "checkpoint")
            os.mkdir(folder)
            save(folder)
            files.upload(folder, f"{standing}/{found['step']}")
    files.write_json(f"{standing}/newest.json", found)
    if before is not None:
        files.remove(f"{standing}/{before}")


@contextlib.contextmanager
def _folder(uri: str) -> Iterator[str]:
    """A folder of the storage as a local one."""
    with tempfile.TemporaryDirectory() as scratch:
        yield files.download(uri, scratch)


def _mean(accuracy: dict[str, float]) -> float:
    return sum(accuracy.values()) / len(accuracy) if accuracy else math.nan


def name_of(trial_id: str) -> str:
    """A trial's number in its search, from Tune's name for it: 003. Optuna gives eight letters and digits instead."""
    last = trial_id.rsplit("_", 1)[-1]
    return last.lstrip("0").zfill(3) if "_" in trial_id else last


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


# --- in the driver ---


def _follower(search: Recipe, space: Space, count: int) -> Any:
    from ray.tune import Callback

    class Follower(Callback):
        """Says what trials do, and ends their MLflow runs."""

        def __init__(self) -> None:
            self.uri, self.folder, self.metric, self.sign = track.uri_of(search), search.folder, space.metric, sign(space)

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
            if result["step"] < result["of"]:
                say(self._line(trial, result))

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(trials, trial, "FINISHED", outcome(trial.last_result or {}))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(trials, trial, "FAILED", "failed")

        def _line(self, trial: Any, result: dict[str, Any]) -> str:
            name = label(name_of(trial.trial_id), trial.config["settings"])
            return f"  {name}   step {result.get('step', 0):,}   {self.metric} {result.get(self.metric, math.nan):.3f}"

        def _end(self, trials: list[Any], trial: Any, status: str, word: str) -> None:
            result = trial.last_result or {}
            ended = [other for other in trials if other is trial or other.status in ("TERMINATED", "ERROR")]
            values = [self.sign * (other.last_result or {}).get(self.metric, -self.sign * math.inf) for other in ended]
            best = "   best so far" if math.isfinite(max(values)) and values[ended.index(trial)] == max(values) else ""
            say(f"{self._line(trial, result)}   {word}, {len(ended)} of {count}{best}")
            marker = f"{self.folder}/children/{name_of(trial.trial_id)}.json"
            if files.exists(marker):
                track.ended(self.uri, files.read_json(marker)["run_id"], status, [("trial/steps", 0, float(result.get("step", 0)))])

    return Follower()


def sign(space: Space) -> int:
    """1 where a larger metric is better, else -1."""
    return 1 if space.mode == "max" else -1


def outcome(result: dict[str, Any]) -> str:
    """What became of a trial that ended, by its last measures."""
    if "collapsed" in result:
        return "collapsed"
    return "finished" if result.get("step") == result.get("of") else "stopped early"


def _row(result: Any, space: Space, names: list[str]) -> Row:
    """What one trial came to; `value` is None where it never was compared, `curve` its (step, value) points."""
    found = result.metrics or {}
    frame = result.metrics_dataframe
    curve = [] if frame is None or space.metric not in frame else frame[["step", space.metric]].dropna().values.tolist()
    word = "failed" if result.error else outcome(found)
    return {
        "trial": name_of(found["trial_id"]) if "trial_id" in found else "",
        "settings": (result.config or found.get("config") or {}).get("settings", {}),
        "value": found.get(space.metric) if word in ("finished", "stopped early") else None,
        "steps": found.get("step", 0),
        "of": found.get("of", 0),
        "outcome": word,
        "error": str(result.error).strip().splitlines()[-1] if result.error else found.get("collapsed", ""),
        "seconds": found.get("time_total_s", 0.0),
        "measures": {name: found[name] for name in names if name in found},
        "curve": curve,
    }


def ranked(rows: list[Row], space: Space) -> list[Row]:
    """Rows best first: finished trials before those that were stopped early; trials that differ in seed alone are ranked by
    their mean, which is kept as `mean`."""
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
    return sorted(rows, key=lambda row: (not row["whole"], row["mean"] is None, -sign(space) * (row["mean"] or 0.0), row["trial"]))
