"""The stages in order. Each job calls one function here; each stage does only what is not done yet.

prepare → build the student → plan → embed → tokenise → train → evaluate → report
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from xdist import cluster, corpus, files, weights
from xdist.config import Recipe
from xdist.corpus import Prepared
from xdist.errors import Refused
from xdist.progress import next_steps, say
from xdist.recipes import differing

BEFORE_TRAINING = ("parts", "corpus", "rejects", "initial", "plan.json", "selection", "shards", "holdout", "prepared")
EFFORT = ("minutes", "at_once")  # of a space: how long and on how much it is searched, not what


def settle(recipe: Recipe) -> None:
    """Claim the run's folder for this recipe, or continue in it. Where another recipe claimed it but got no further than a
    plan, the run begins anew; after that, raises Refused."""
    import yaml

    files.hold(f"{recipe.folder}/lock")
    uri = f"{recipe.folder}/recipe.yaml"
    settings = recipe.model_dump(mode="json")
    differences = differing(yaml.safe_load(files.read(uri)), settings) if files.exists(uri) else []
    if differences and files.exists(f"{recipe.folder}/mlflow.json"):
        listed = "\n  ".join(differences)
        raise Refused(
            f"run {recipe.run.name} exists in {recipe.run.storage} with another recipe:\n  {listed}\n"
            f"Give this one another name (--run.name …), or delete {recipe.folder}"
        )
    if differences:
        say(f"prepare   the recipe of run {recipe.run.name} changed before anything was trained; it begins anew")
        for name in BEFORE_TRAINING:
            files.remove(f"{recipe.folder}/{name}")
    if differences or not files.exists(uri):
        files.write(uri, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode())


@contextlib.contextmanager
def _at_work(recipe: Recipe, tracked: bool = True, encodes: bool = True) -> Iterator[None]:
    """Ray for the length of the context, with the run's folder kept to this job and all machines looked at: `tracked` if the job writes
    to MLflow, and if it `encodes` there must be room for a worker."""
    from xdist import preflight

    say(f"run       {recipe.run.name} in {recipe.folder}")
    with cluster.connected(recipe.cluster), contextlib.ExitStack() as stack:
        if not files.is_local(recipe.run.storage):  # where it is, `settle` holds a lock
            stack.enter_context(cluster.held(recipe.folder))
        if encodes:
            cluster.resources(recipe.cluster)
        preflight.check(recipe, tracked)
        yield


def prepare(recipe: Recipe) -> Prepared:
    """Clean, group and shard the corpora."""
    settle(recipe)
    with _at_work(recipe, tracked=False, encodes=False):
        return _prepare(recipe)


def _prepare(recipe: Recipe) -> Prepared:
    prepared = corpus.prepare(recipe)
    rejected = sum(prepared.rejected.values())
    say(f"          {prepared.pairs:,} pairs, {prepared.sentences:,} unique sentences, {rejected:,} rows rejected")
    return prepared


def _teacher(recipe: Recipe) -> tuple[str, Any, Any]:
    """The teacher, which is fine-tuned first where the recipe asks for that: its folder here, the encoder, its fingerprint."""
    from xdist import finetune

    finetune.finetune(recipe)
    folder = finetune.teacher_folder(recipe)
    teacher = finetune.load(recipe, folder)
    return folder, teacher, weights.fingerprint(recipe.teacher, folder, teacher.dimension)


def embed(recipe: Recipe) -> None:
    """Prepare, and embed what the store lacks."""
    from xdist import embed as embedding

    settle(recipe)
    with _at_work(recipe, tracked=False):
        prepared = _prepare(recipe)
        embedded = embedding.embed(recipe, prepared, _teacher(recipe)[2])
    say(f"          {embedded.embedded:,} sentences embedded, {embedded.cached:,} were in the store")


def distill(recipe: Recipe, plan: bool = False) -> None:
    """Everything: from corpora to report. With `plan`, stop after the plan."""
    started = time.monotonic()
    settle(recipe)
    _check(recipe)
    with _at_work(recipe):
        prepared = _prepare(recipe)
        from xdist import report, student, track  # torch comes with them: the first progress has not waited for it
        from xdist.store import VectorStore

        folder, teacher, fingerprint = _teacher(recipe)
        initial = student.build(recipe, folder, prepared)
        if plan or not files.exists(f"{recipe.folder}/plan.json"):
            _plan(recipe, prepared, teacher, VectorStore(recipe.run.storage, fingerprint))
        if plan:
            say("\nNo sentence was embedded and no student trained. Run the same command without --plan to go on.")
            return
        with track.run(recipe, "distill") as run_id:
            _embed_and_train(recipe, prepared, teacher, fingerprint, initial, run_id)
            rows = _evaluate(recipe, run_id)
            _once(recipe, "model", lambda: _log_model(recipe))
    say(report.table(recipe, rows))
    say(next_steps(time.monotonic() - started, _next(recipe)))


def _check(recipe: Recipe) -> None:
    """Raises Refused where evaluation files, the teacher or the student's checkpoint cannot be read, before anything is done."""
    from xdist import tasks

    tasks.check(recipe)
    weights.of_student(recipe, weights.located(recipe.teacher))


def _plan(recipe: Recipe, prepared: Prepared, teacher: Any, store: Any) -> None:
    from xdist import planning, preflight

    plan = planning.make(recipe, prepared, teacher, store)
    planning.write(recipe, plan)
    planning.show(recipe, plan)
    preflight.room(recipe, plan)


def _embed_and_train(recipe: Recipe, prepared: Prepared, teacher: Any, fingerprint: Any, initial: str, run_id: str) -> None:
    from xdist import launch, selection, track, train

    _once(recipe, "corpora", lambda: track.log_corpora(recipe, prepared.corpora, prepared.digests))
    embedded = _cut(recipe, prepared, fingerprint, initial)
    _once(recipe, "embed", lambda: track.log_metrics({f"embed/{key}": float(value) for key, value in embedded.items()}))
    if not files.exists(f"{recipe.folder}/student/modules.json"):
        selection.prepare(recipe, teacher)
        best = launch.train(recipe, run_id, track.uri_of(recipe))
        track.send_kept(track.uri_of(recipe), run_id, recipe.folder)
        train.export(recipe, best)


def _cut(recipe: Recipe, prepared: Prepared, fingerprint: Any, initial: str) -> dict[str, float]:
    """Embed what the store lacks and cut the training shards; gives the counts of the first time."""
    from xdist import embed as embedding
    from xdist import shards

    if not files.exists(f"{recipe.folder}/shards/manifest.json"):  # afterwards the shards hold the vectors
        _keep(recipe, embedding.embed(recipe, prepared, fingerprint))
    shards.cut(recipe, prepared, fingerprint, initial)
    return dict(files.read_json(f"{recipe.folder}/embed.json"))


def tune(recipe: Recipe, space: str) -> None:
    """Search the recipe's settings over the space in this file, or run the study that it describes."""
    from xdist import recipes

    settings = recipes.read_yaml(space, "space", "tune_spaces/")
    if "study" in settings:
        _study(recipe, space, settings)
    else:
        _search(recipe, space, settings)


def _study(recipe: Recipe, path: str, settings: dict[str, Any]) -> None:
    from xdist import fits, study, study_report, track

    started = time.monotonic()
    wanted = study.load(path, settings, recipe)
    _need_student(recipe)
    settle(recipe)
    named = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": f"{recipe.run.name}-{wanted.name}"})})
    files.hold(f"{named.folder}/lock")
    students = {name: f"{recipe.run.storage}/{name}/student/model.safetensors" for name in (recipe.run.name, *wanted.task_runs.values())}
    _settle_space(named, wanted.model_dump(mode="json") | {"students": {name: files.digest(uri) for name, uri in students.items()}})
    with _at_work(named), track.run(named, "study") as run_id:
        rows = fits.run(recipe, wanted, named.folder)
        found = study_report.write(recipe, wanted, named.folder, rows)
        for unit in study.units(recipe, wanted):
            name = "-".join(unit.values())
            _once(named, name, lambda unit=unit, name=name: _log_unit(named, run_id, unit, name, found))  # type: ignore[misc]
        table = study_report.table(found["accuracy"])
        _log_results(named, table, ("space.json", "summary.json", "results.csv", "report.html"))
    say(table)
    say(next_steps(time.monotonic() - started, study_report.next_steps(named.folder, track.view(track.uri_of(named)))))


def _log_unit(named: Recipe, parent: str, unit: dict[str, str], name: str, found: dict[str, Any]) -> None:
    from xdist import study_report, track

    uri = track.uri_of(named)
    run_id, _ = track.child(uri, parent, name, unit, f"{named.folder}/children/{name}.json")
    track.ended(uri, run_id, "FINISHED", study_report.points(found, unit))


def _search(recipe: Recipe, path: str, settings: dict[str, Any]) -> None:
    from xdist import findings, spaces, track
    from xdist import tune as searching

    started = time.monotonic()
    wanted = spaces.load(path, settings, recipe)
    search = searching.search_recipe(recipe, wanted)
    settle(search)
    _settle_space(search, wanted.model_dump(mode="json"))
    variants = searching.prepared_recipes(search, wanted)
    for variant in variants:
        _check(variant)
    with _at_work(search):
        for variant in variants:
            _make_ready(variant)
        searching.check(search, wanted)
        with track.run(search, "tune") as run_id:
            rows = searching.run(search, wanted, run_id)
            findings.write(recipe, search, wanted, rows)
            track.log_metrics(findings.as_metrics(wanted, rows))
            table = findings.table(wanted, rows)
            _log_results(search, table, ("recipe.yaml", "space.json", "trials.json", "trials.csv", "best.yaml", "report.html"))
    say(table)
    say(next_steps(time.monotonic() - started, findings.next_steps(search, track.view(track.uri_of(search)))))


def _settle_space(search: Recipe, space: dict[str, Any]) -> None:
    uri = f"{search.folder}/space.json"
    before = files.read_json(uri) if files.exists(uri) else space
    if before | dict.fromkeys(EFFORT) != space | dict.fromkeys(EFFORT) and files.exists(f"{search.folder}/mlflow.json"):
        raise Refused(f"{search.run.name} has begun with another space; give this one another name (name: …), or delete {search.folder}")
    files.write_json(uri, space)


def _make_ready(recipe: Recipe) -> None:
    """All that training reads: clean corpus, untrained student, shards with the teacher's vectors, heads to select by."""
    from xdist import selection, student

    prepared = _prepare(recipe)
    folder, teacher, fingerprint = _teacher(recipe)
    embedded = _cut(recipe, prepared, fingerprint, student.build(recipe, folder, prepared))
    say(f"          {embedded['embedded']:,} sentences embedded, {embedded['cached']:,} were in the store")
    selection.prepare(recipe, teacher)


def _evaluate(recipe: Recipe, run_id: str, anew: bool = False) -> list[dict[str, Any]]:
    from xdist import evaluate as evaluation
    from xdist import report, track

    rows = evaluation.evaluate(recipe, anew)
    track.log_metrics(report.as_metrics(rows))
    _report(recipe, run_id)
    return rows


def evaluate(recipe: Recipe) -> None:
    """Measure a trained run anew, and write its report."""
    from xdist import report, track

    _need_student(recipe)
    settle(recipe)
    with _at_work(recipe), track.run(recipe, "evaluate") as run_id:
        rows = _evaluate(recipe, run_id, anew=True)
    say(report.table(recipe, rows))


def write_report(recipe: Recipe) -> None:
    """Write the report of a finished run again."""
    from xdist import track

    _need_student(recipe)
    settle(recipe)
    if not files.exists(f"{recipe.folder}/evaluation.json"):
        raise Refused(f"run {recipe.run.name} has not been evaluated yet; run jobs/evaluate.py first")
    with track.run(recipe, "report") as run_id:
        _report(recipe, run_id)
    say(f"report    {recipe.folder}/report.html")


def _need_student(recipe: Recipe) -> None:
    if not files.exists(f"{recipe.folder}/student/modules.json"):
        raise Refused(f"run {recipe.run.name} has no student in {recipe.folder} yet; run jobs/distill.py first")


def _once(recipe: Recipe, name: str, work: Callable[[], object]) -> None:
    """Do what must not be done twice in one MLflow run's life."""
    marker = f"{recipe.folder}/logged/{name}.json"
    if not files.exists(marker):
        work()
        files.write_json(marker, {"at": time.time()})


def _keep(recipe: Recipe, embedded: Any) -> None:
    """What the first pass over the corpus embedded stays on record; a continued run finds it all in the store."""
    marker = f"{recipe.folder}/embed.json"
    if not files.exists(marker):
        files.write_json(marker, asdict(embedded))


def _log_model(recipe: Recipe) -> None:
    from xdist import track

    with tempfile.TemporaryDirectory() as scratch:
        student = files.download(f"{recipe.folder}/student", os.path.join(scratch, "student"))
        example = ["The patient has pneumonia.", "Der Patient hat eine Lungenentzündung."]
        track.log_model(student, example, recipe.teacher.trust_remote_code)


def _report(recipe: Recipe, run_id: str) -> None:
    """Write the report, and keep it in MLflow."""
    from xdist import report

    found = report.write(recipe, run_id)
    table = report.table(recipe, found["evaluation"])
    _log_results(recipe, table, ("recipe.yaml", "plan.json", "report.json", "report.html"))


def _log_results(recipe: Recipe, table: str, names: tuple[str, ...]) -> None:
    """Keep the table of results, files of the run's folder, and its plots, in MLflow."""
    from xdist import track

    track.describe(table)
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            path = os.path.join(scratch, name)
            with open(path, "wb") as stream:
                stream.write(files.read(f"{recipe.folder}/{name}"))
            track.log_artifacts([path])
        track.log_artifacts([files.download(f"{recipe.folder}/plots", os.path.join(scratch, "plots"))])


def _next(recipe: Recipe) -> dict[str, str]:
    from xdist import track

    return {
        "look at the report": f"{recipe.folder}/report.html",
        "compare runs": track.view(track.uri_of(recipe)),
        "use the student": f"SentenceTransformer({recipe.folder + '/student'!r}).encode([…])",
        "try another setting": "the same command with --run.name other --train.lr 3e-4",
    }
