"""Tune: a recipe's training, many times over with other settings, with Ray Tune.

Reads a recipe and a space. In the search's folder, <storage>/<run>-<space>/, it writes

    prepared/<digest>/      corpus, untrained student and training shards, shared by all trials that need the same
    trials/<trial>.json     settings, every measure that was taken, and what became of it; children/ names its MLflow run
    checkpoints/<trial>/    where an unfinished trial stands
    trials.json best.yaml   all trials, best first; the best settings as a recipe

The teacher works before the trials and never in them: they read its vectors from the shards.

A search that was killed goes on by the records in trials/, not by Tune's own state, which lags behind and forgets what its
schedulers knew: every start is a new Tune run in which each trial first tells the measures that it took before.
"""

import contextlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import xxhash

from xdist import cluster, files, recipes, selection, shards, spaces, track, train
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
    found = spaces.preparations(space) if space.searcher == "tpe" else [spaces.preparation(trial) for trial in drawn(search, space)]
    return list({recipe.folder: recipe for recipe in (trial_recipe(search, trial) for trial in found)}.values())


def drawn(search: Recipe, space: Space) -> list[Trial]:
    """The trials of a space with searcher random; of another, a sample of what it may draw."""
    return spaces.trials(space, search.run.seed)


def run(search: Recipe, space: Space, parent: str) -> list[Row]:
    """Run what is left of a search whose training shards are there, below the MLflow run `parent`. Gives one row a trial, best
    first. Needs a connected Ray. Raises Refused where no trial came to a result."""
    from ray import tune

    if not search.cluster.verbose:
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's tables, which verbose=0 leaves on
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune takes Ctrl-C for the end of the search; here it is the usual exception
    records = _records(search)
    ended = {int(record["trial"]) for record in records if record["outcome"] not in (None, "failed")}
    trials = [] if space.searcher == "tpe" else drawn(search, space)
    count = len(trials) or space.samples
    concurrent, cpus, gpus = share(search, space, count)
    say(f"search    {count} trials, {concurrent} at once with {cpus} CPU, {gpus:g} GPU each; metric {space.metric}")
    settings, threads, worst = search.model_dump(mode="json"), 0 if gpus else cpus, train.WORST * sign(space)

    def trial(config: dict[str, Any]) -> None:
        _trial(config, settings, parent, threads, worst)

    ended_first = sorted(range(len(trials)), key=lambda number: number not in ended)  # so that schedulers know what was before
    files.remove(f"{search.folder}/tune")
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": cpus, "GPU": gpus}),
        param_space={"trial": tune.grid_search([{"number": n, "settings": trials[n]} for n in ended_first])} if trials else None,
        tune_config=tune.TuneConfig(
            search_alg=None if trials else _tpe(space, search.run.seed, records),
            scheduler=_scheduler(search, space),
            num_samples=1 if trials else count,
            max_concurrent_trials=concurrent,
            time_budget_s=60 * space.minutes if space.minutes else None,
            reuse_actors=True,  # a trial's process has its libraries loaded for the next one
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=search.folder,
            callbacks=[_follower(search, space, count)],
            failure_config=tune.FailureConfig(max_failures=3),
            verbose=0,
        ),
    )
    tuner.fit()
    rows = ranked([_row(record, space) for record in _records(search)], space)
    _end_children(search, rows)
    files.write_json(f"{search.folder}/trials.json", rows)
    if not rows or rows[0]["mean"] is None:
        raise Refused(f"no trial came to a result; the first says: {rows[0]['error'] if rows else 'nothing'}")
    for row in rows:
        if row["outcome"]:
            files.remove(f"{search.folder}/checkpoints/{row['trial']}")
    files.remove(f"{search.folder}/tune")
    return rows


def _records(search: Recipe) -> list[dict[str, Any]]:
    """The records of all trials that have begun."""
    folder = f"{search.folder}/trials"
    return [files.read_json(f"{folder}/{name}") for name in files.names(folder, ".json")]


def check(search: Recipe, space: Space) -> None:
    """Raises Refused for a search that could not be run, now that its training shards are there."""
    names(search, space)
    _scheduler(search, space)
    if space.searcher == "tpe":
        _tpe(space, 0, [])


def names(search: Recipe, space: Space) -> list[str]:
    """What trials are measured by: what all of them have. Raises Refused where the space's metric is none of these."""
    found = [selection.Judge(recipe).names for recipe in prepared_recipes(search, space)]
    common = [name for name in found[0] if all(name in other for other in found)]
    if not common:
        raise Refused(f"space {space.name}: trials have nothing to be compared by; set data.holdout, or give an evaluation task a dev set")
    if space.metric not in (known := ["selection", "accuracy", *common]):
        raise Refused(f"space {space.name}: no metric {space.metric!r}; there are {', '.join(known)}")
    return known


def share(search: Recipe, space: Space, count: int) -> tuple[int, int, float]:
    """(trials at once, CPUs, GPUs of each): as many as there are GPUs, or CPUs, and as `at_once` and `count` allow. Raises Refused
    where a local Ray has less than even one needs."""
    import ray

    total, settings = ray.cluster_resources(), search.cluster
    if total.get("GPU", 0) >= 1 and settings.gpus_per_worker != 0:
        room = int(total["GPU"] / (settings.gpus_per_worker or 1))
    else:
        room = int(total.get("CPU", 1)) // (settings.cpus_per_worker or 1)
    concurrent = max(1, min(count, space.at_once or room))
    return concurrent, *cluster.resources(settings.model_copy(update={"workers": concurrent}))


def _scheduler(search: Recipe, space: Space) -> Any:
    from ray.tune import schedulers

    if space.scheduler == "none":
        return None
    grace = space.grace_steps or search.train.evaluate_every
    most = max(shards.order(trial_recipe(search, trial)).total_steps() for trial in drawn(search, space))
    if grace >= most:
        raise Refused(
            f"space {space.name}: trials take {most} steps and are first compared at {grace}, so none can be stopped early; set "
            "train.evaluate_every (in `fixed`) or grace_steps to less, or scheduler: none"
        )
    common: dict[str, Any] = {"time_attr": "step", "metric": space.metric, "mode": space.mode, "grace_period": grace}
    if space.scheduler == "asha":
        return schedulers.ASHAScheduler(max_t=most, reduction_factor=space.reduction, **common)
    return schedulers.MedianStoppingRule(**common)


def _tpe(space: Space, seed: int, records: list[dict[str, Any]]) -> Any:
    """Optuna's TPE over the space: trials that have begun come first, with the settings that they had."""
    try:
        import optuna
    except ImportError:
        raise Refused(f"space {space.name}: searcher tpe needs Optuna: pip install 'xdist-ray[optuna]', or searcher: random") from None
    from ray.tune.search import Searcher

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    class Tpe(Searcher):
        """Asks Optuna for settings, key by key, so that conditional keys are only asked for where they apply."""

        def __init__(self) -> None:
            super().__init__(metric=space.metric, mode=space.mode)
            direction = optuna.study.StudyDirection.MAXIMIZE if space.mode == "max" else optuna.study.StudyDirection.MINIMIZE
            self.study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
            self.asked: dict[str, Any] = {}
            begun = [int(record["trial"]) for record in records]
            self.numbers = [*begun, *(number for number in range(space.samples) if number not in begun)]
            for record in records:
                self.study.enqueue_trial(record["asked"])

        def suggest(self, trial_id: str) -> dict[str, Any]:
            number, asked = self.numbers[len(self.asked)], self.study.ask()
            self.asked[trial_id] = asked
            settings: Trial = {}
            for key, knob in sorted(space.search.items(), key=lambda entry: bool(entry[1].when)):
                if key in spaces.conditioned(space, settings | {key: None}):
                    settings[key] = _asked(asked, key, knob)
            return {"trial": {"number": number, "settings": settings, "asked": dict(asked.params)}}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            value = (result or {}).get(space.metric)
            failed = error or value is None
            self.study.tell(self.asked[trial_id], None if failed else value, optuna.trial.TrialState.FAIL if failed else None)

        def save(self, checkpoint_path: str) -> None:
            """Nothing: a search goes on by its trials' records."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing, as `save`."""

    return Tpe()


def _asked(asked: Any, key: str, knob: spaces.Knob) -> Any:
    if knob.values is not None:  # Optuna's categories are numbers and texts; ours may be lists and mappings
        return knob.values[asked.suggest_categorical(key, list(range(len(knob.values))))]
    if knob.randint:
        return asked.suggest_int(key, *knob.randint)
    low, high = knob.loguniform or knob.uniform or (0.0, 1.0)
    return asked.suggest_float(key, low, high, log=knob.loguniform is not None)


# --- in a trial's process ---


def _trial(config: dict[str, Any], settings: dict[str, Any], parent: str, threads: int, worst: float) -> None:
    """Train with one set of settings, telling Tune the measures at each evaluation, those of an earlier start first; a student that
    collapses has the worst ones."""
    import torch
    from ray import tune

    if threads:
        torch.set_num_threads(threads)
    search, trial, name = Recipe(**settings), config["trial"]["settings"], name_of(config["trial"]["number"])
    uri = f"{search.folder}/trials/{name}.json"
    record = {"trial": name, **config["trial"], "history": [], "outcome": None, "error": ""}
    if files.exists(uri):
        record = files.read_json(uri)
    if record["outcome"] == "failed":
        record |= {"outcome": None, "error": ""}
    for point in record["history"]:
        tune.report(point | {"again": True})
    if record["outcome"]:
        return
    recipe = trial_recipe(search, trial)
    tracking, marker = track.uri_of(search), f"{search.folder}/children/{name}.json"
    metrics = track.Metrics(tracking, track.child(tracking, parent, label(name, trial), logged(recipe, trial), marker))
    total, started = shards.order(recipe).total_steps(), time.monotonic()
    before = record["history"][-1] if record["history"] else {"step": 0, "seconds": 0.0}

    def report(score: float, accuracy: dict[str, float], step: int, save: Callable[[str], None]) -> None:
        metrics.send()  # a trial that is stopped early ends here
        seconds = before["seconds"] + time.monotonic() - started
        found = {"selection": score, "accuracy": _mean(accuracy), **accuracy, "step": step, "of": total, "seconds": seconds}
        record["history"].append(found)
        record["outcome"] = "finished" if step == total else None
        _keep(f"{search.folder}/checkpoints/{name}", uri, record, save)
        tune.report(found)

    try:
        resumed = _folder(f"{search.folder}/checkpoints/{name}/{before['step']}") if before["step"] else None
        train.fit(recipe, report, train.Meter(None, metrics), resumed)
    except Collapsed as error:
        metrics.flush()
        lost = dict.fromkeys(["selection", "accuracy", *selection.Judge(recipe).names], worst)
        record["history"].append(lost | {"step": total, "of": total, "seconds": before["seconds"] + time.monotonic() - started})
        files.write_json(uri, record | {"outcome": "collapsed", "error": str(error)})
        tune.report(record["history"][-1])


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


# --- in the driver ---


def _follower(search: Recipe, space: Space, count: int) -> Any:
    from ray.tune import Callback

    class Follower(Callback):
        """Says what trials do, notes what becomes of them, and ends their MLflow runs."""

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
            if result["step"] < result["of"] and "again" not in result:
                say(self._line(trial, result))

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(trials, trial, "stopped early", "")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._end(trials, trial, "failed", str(trial.get_error()).strip().splitlines()[-1])

        def _line(self, trial: Any, result: dict[str, Any]) -> str:
            found = trial.config["trial"]
            value = result.get(space.metric, math.nan)
            return f"  {label(name_of(found['number']), found['settings'])}   step {result.get('step', 0):,}   {space.metric} {value:.3f}"

        def _end(self, trials: list[Any], trial: Any, outcome: str, error: str) -> None:
            result, name = trial.last_result or {}, name_of(trial.config["trial"]["number"])
            uri = f"{search.folder}/trials/{name}.json"
            record = files.read_json(uri) if files.exists(uri) else {"trial": name, **trial.config["trial"], "history": [], "outcome": None}
            if record["outcome"] and "again" in result:
                return  # it had ended before this start
            if record["outcome"] is None:
                record |= {"outcome": outcome, "error": error}
                files.write_json(uri, record)
            ended = [other for other in trials if other is trial or other.status in ("TERMINATED", "ERROR")]
            values = [sign(space) * (other.last_result or {}).get(space.metric, -sign(space) * math.inf) for other in ended]
            best = "   best so far" if math.isfinite(max(values)) and values[ended.index(trial)] == max(values) else ""
            say(f"{self._line(trial, result)}   {record['outcome']}, {len(ended)} of {count}{best}")
            with contextlib.suppress(Exception):  # where MLflow is away for a while; when all trials have ended, they all are ended
                _end_children(search, [_row(record, space)])

    return Follower()


def _end_children(search: Recipe, rows: list[Row]) -> None:
    """End the MLflow runs of these trials: FINISHED, FAILED, or KILLED where they are unfinished."""
    for row in rows:
        marker = f"{search.folder}/children/{row['trial']}.json"
        if files.exists(marker):
            status = {"failed": "FAILED", "unfinished": "KILLED"}.get(row["outcome"] or "unfinished", "FINISHED")
            track.ended(track.uri_of(search), files.read_json(marker)["run_id"], status, [("trial/steps", 0, float(row["steps"]))])


def sign(space: Space) -> int:
    """1 where a larger metric is better, else -1."""
    return 1 if space.mode == "max" else -1


def _row(record: dict[str, Any], space: Space) -> Row:
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
        "measures": {name: value for name, value in last.items() if name not in ("step", "of", "seconds")} if counted else {},
        "curve": [[point["step"], point[space.metric]] for point in history] if counted else [],
    }


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
