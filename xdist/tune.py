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
import logging
import math
import os
from typing import Any

import numpy as np

from xdist import cluster, files, recipes, selection, shards, spaces, track, train, trials
from xdist.config import Recipe
from xdist.errors import Refused
from xdist.progress import say
from xdist.spaces import Space, Trial
from xdist.trials import Row, label, name_of, row, sign


def search_recipe(recipe: Recipe, space: Space) -> Recipe:
    """The recipe under the search's own name and with its fixed keys: what trials vary."""
    fixed = recipes.applied(recipe, space.fixed)
    return fixed.model_copy(update={"run": recipe.run.model_copy(update={"name": f"{recipe.run.name}-{space.name}"})})


def prepared_recipes(search: Recipe, space: Space) -> list[Recipe]:
    """One recipe for each set of training shards that trials need, its folder being theirs."""
    found = spaces.preparations(space) if space.searcher == "tpe" else [spaces.preparation(trial) for trial in drawn(search, space)]
    return list({recipe.folder: recipe for recipe in (trials.trial_recipe(search, trial) for trial in found)}.values())


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
    records = trials.records(search)
    ended = {int(record["trial"]) for record in records if record["outcome"] not in (None, "failed")}
    wanted = [] if space.searcher == "tpe" else drawn(search, space)
    count = len(wanted) or space.samples
    concurrent, cpus, gpus = share(search, space, count)
    cluster.await_room(search.cluster, 1, cpus, gpus, "search")
    say(f"search    {count} trials, {concurrent} at once with {cpus} CPU, {gpus:g} GPU each; metric {space.metric}")
    settings, threads, worst = search.model_dump(mode="json"), 0 if gpus else cpus, train.WORST * sign(space)

    def trial(config: dict[str, Any]) -> None:
        import torch
        from ray import tune

        if threads:
            torch.set_num_threads(threads)
        trials.run(config, Recipe(**settings), parent, worst, tune.report)

    ended_first = sorted(range(len(wanted)), key=lambda number: number not in ended)  # so that schedulers know what was before
    files.remove(f"{search.folder}/tune")
    storage, path = files.resolve(search.folder)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": cpus, "GPU": gpus}),
        param_space={"trial": tune.grid_search([{"number": n, "settings": wanted[n]} for n in ended_first])} if wanted else None,
        tune_config=tune.TuneConfig(
            search_alg=None if wanted else _tpe(space, search.run.seed, records),
            scheduler=_scheduler(search, space),
            num_samples=1 if wanted else count,
            max_concurrent_trials=concurrent,
            time_budget_s=60 * space.minutes if space.minutes else None,
            reuse_actors=True,  # a trial's process has its libraries loaded for the next one
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=storage,
            callbacks=[_follower(search, space, count, parent)],
            failure_config=tune.FailureConfig(max_failures=3),
            verbose=0,
        ),
    )
    tuner.fit()
    rows = trials.ranked([row(record, space) for record in trials.records(search)], space)
    _end_children(search, rows, parent)
    files.write_json(f"{search.folder}/trials.json", rows)
    if not rows or rows[0]["mean"] is None:
        said = next((found["error"] for found in rows if found["error"]), "")
        if space.minutes and not said:
            raise Refused(f"space {space.name}: minutes: {space.minutes:g} were over before a trial was compared; allow more")
        raise Refused(f"no trial came to a result; the first says: {said or 'nothing'}")
    for found in rows:
        if found["outcome"]:
            files.remove(f"{search.folder}/checkpoints/{found['trial']}")
    files.remove(f"{search.folder}/tune")
    return rows


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
    """(trials at once, CPUs, GPUs of each): as many as there are GPUs, or CPUs, and as `at_once` and `count` allow; a cluster may grow
    up to `at_once`. Raises Refused where a local Ray has less than even one needs."""
    import ray

    total, settings = ray.cluster_resources(), search.cluster
    if total.get("GPU", 0) >= 1 and settings.gpus_per_worker != 0:
        room = int(total["GPU"] / (settings.gpus_per_worker or 1))
    elif settings.gpus_per_worker:
        room = 1  # machines with GPUs are yet to come
    else:
        room = int(total.get("CPU", 1)) // (settings.cpus_per_worker or 1)
    wanted = space.at_once or room
    concurrent = max(1, min(count, wanted if cluster.on_cluster(settings) else min(wanted, room)))
    return concurrent, *cluster.resources(settings.model_copy(update={"workers": (concurrent, concurrent)}))


def _scheduler(search: Recipe, space: Space) -> Any:
    from ray.tune import schedulers

    if space.scheduler == "none":
        return None
    grace = space.grace_steps or search.train.evaluate_every
    most = max(shards.order(trials.trial_recipe(search, trial)).total_steps() for trial in drawn(search, space))
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
        """Asks Optuna for settings, key by key, so that conditional keys are only asked for where they apply. Each trial has a seed of
        its own: one after the other, trials of a search that goes on are those that it would have had."""

        def __init__(self) -> None:
            super().__init__(metric=space.metric, mode=space.mode)
            direction = optuna.study.StudyDirection.MAXIMIZE if space.mode == "max" else optuna.study.StudyDirection.MINIMIZE
            self.study = optuna.create_study(direction=direction)
            self.asked: dict[str, Any] = {}
            begun = [int(record["trial"]) for record in records]
            self.numbers = [*begun, *(number for number in range(space.samples) if number not in begun)]
            for record in records:
                self.study.enqueue_trial(record["asked"])

        def suggest(self, trial_id: str) -> dict[str, Any]:
            number = self.numbers[len(self.asked)]
            self.study.sampler = optuna.samplers.TPESampler(seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
            self.asked[trial_id] = asked = self.study.ask()
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


def _follower(search: Recipe, space: Space, count: int, parent: str) -> Any:
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
            if record["outcome"] in (None, "failed"):
                record |= {"outcome": outcome, "error": error}
                files.write_json(uri, record)
            ended = [other for other in trials if other is trial or other.status in ("TERMINATED", "ERROR")]
            values = [sign(space) * (other.last_result or {}).get(space.metric, -sign(space) * math.inf) for other in ended]
            best = "   best so far" if math.isfinite(max(values)) and values[ended.index(trial)] == max(values) else ""
            say(f"{self._line(trial, result)}   {record['outcome']}, {len(ended)} of {count}{best}")
            with contextlib.suppress(Exception), track.impatient():  # MLflow may be away; when all trials have ended, they all are told
                _end_children(search, [row(record, space)], parent)

    return Follower()


def _end_children(search: Recipe, rows: list[Row], parent: str) -> None:
    """End the MLflow runs of these trials: FINISHED, FAILED, or KILLED where they are unfinished. Numbers that MLflow did not take
    when they came are sent first; a store that lost a trial is told again what it came to."""
    uri = track.uri_of(search)
    for found in rows:
        folder, settings = f"{search.folder}/children/{found['trial']}", found["settings"]
        named, searched = label(found["trial"], settings), trials.logged(trials.trial_recipe(search, settings), settings)
        run_id, new = track.child(uri, parent, named, searched, f"{folder}.json")
        track.send_kept(uri, run_id, folder)
        status = {"failed": "FAILED", "unfinished": "KILLED"}.get(found["outcome"] or "unfinished", "FINISHED")
        lost = trials.points(files.read_json(f"{search.folder}/trials/{found['trial']}.json")) if new else []
        track.ended(uri, run_id, status, [*lost, ("trial/steps", 0, float(found["steps"]))])
