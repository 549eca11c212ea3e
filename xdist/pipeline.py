"""The stages in order. Each job calls one function here; each stage does only what is not done yet.

prepare → build the student → plan → embed → tokenise → train → evaluate → report
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from xdist import cluster, corpus, files
from xdist.config import Recipe
from xdist.corpus import Prepared
from xdist.errors import Refused
from xdist.progress import duration, say
from xdist.recipes import differing

BEFORE_TRAINING = ("parts", "corpus", "rejects", "initial", "plan.json", "selection", "shards", "holdout")


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


def prepare(recipe: Recipe) -> Prepared:
    """Clean, group and shard the corpora."""
    settle(recipe)
    with cluster.connected(recipe.cluster):
        return _prepare(recipe)


def _prepare(recipe: Recipe) -> Prepared:
    prepared = corpus.prepare(recipe)
    rejected = sum(prepared.rejected.values())
    say(f"          {prepared.pairs:,} pairs, {prepared.sentences:,} unique sentences, {rejected:,} rows rejected")
    return prepared


def embed(recipe: Recipe) -> None:
    """Prepare, and embed what the store lacks."""
    from xdist import embed as embedding
    from xdist import encoder

    settle(recipe)
    with cluster.connected(recipe.cluster):
        prepared = _prepare(recipe)
        folder = encoder.located(recipe.teacher)
        dimension = encoder.load(folder, "float32", "eager", recipe.teacher.trust_remote_code).dimension
        embedded = embedding.embed(recipe, prepared, encoder.fingerprint(recipe.teacher, folder, dimension))
    say(f"          {embedded.embedded:,} sentences embedded, {embedded.cached:,} were in the store")


def distill(recipe: Recipe, plan: bool = False) -> None:
    """Everything: from corpora to report. With `plan`, stop after the plan."""
    from xdist import encoder, report, student, tasks, track
    from xdist.store import VectorStore

    started = time.monotonic()
    settle(recipe)
    tasks.check(recipe)
    folder = encoder.located(recipe.teacher)
    with cluster.connected(recipe.cluster):
        prepared = _prepare(recipe)
        settings = (recipe.train.precision, recipe.train.attention, recipe.teacher.trust_remote_code)
        teacher = encoder.load(folder, *settings, recipe.teacher.prompt)
        fingerprint = encoder.fingerprint(recipe.teacher, folder, teacher.dimension)
        initial = student.build(recipe, folder, prepared)
        if plan or not files.exists(f"{recipe.folder}/plan.json"):
            untrained = encoder.load(student.local(initial), *settings)
            _plan(recipe, prepared, teacher, untrained, VectorStore(recipe.run.storage, fingerprint))
        if plan:
            say("\nNothing was embedded or trained. Run the same command without --plan to go on.")
            return
        with track.run(recipe, "distill") as run_id:
            _embed_and_train(recipe, prepared, teacher, fingerprint, initial, run_id)
            rows = _evaluate(recipe, run_id)
            _once(recipe, "model", lambda: _log_model(recipe))
    say(report.table(recipe, rows))
    say(_next(recipe, time.monotonic() - started))


def _plan(recipe: Recipe, prepared: Prepared, teacher: Any, untrained: Any, store: Any) -> None:
    from xdist import planning

    plan = planning.make(recipe, prepared, teacher, untrained, store, cluster.at_once(recipe.cluster))
    planning.write(recipe, plan)
    planning.show(recipe, plan)


def _embed_and_train(recipe: Recipe, prepared: Prepared, teacher: Any, fingerprint: Any, initial: str, run_id: str) -> None:
    from xdist import embed as embedding
    from xdist import selection, shards, track, train

    _once(recipe, "corpora", lambda: track.log_corpora(recipe, prepared.corpora, prepared.digests))
    if not files.exists(f"{recipe.folder}/shards/manifest.json"):  # afterwards the shards hold the vectors
        _keep(recipe, embedding.embed(recipe, prepared, fingerprint))
    embedded = files.read_json(f"{recipe.folder}/embed.json")
    _once(recipe, "embed", lambda: track.log_metrics({f"embed/{key}": float(value) for key, value in embedded.items()}))
    manifest = shards.cut(recipe, prepared, fingerprint, initial)
    if not files.exists(f"{recipe.folder}/student/modules.json"):
        selection.prepare(recipe, teacher)
        best = train.train(recipe, manifest, run_id, track.uri_of(recipe))
        train.export(recipe, best)


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

    settle(recipe)
    _need_student(recipe)
    with cluster.connected(recipe.cluster), track.run(recipe, "evaluate") as run_id:
        rows = _evaluate(recipe, run_id, anew=True)
    say(report.table(recipe, rows))


def write_report(recipe: Recipe) -> None:
    """Write the report of a finished run again."""
    from xdist import track

    settle(recipe)
    _need_student(recipe)
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
    from xdist import report, track

    report.write(recipe, run_id)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("recipe.yaml", "plan.json", "report.json", "report.html"):
            path = os.path.join(scratch, name)
            with open(path, "wb") as stream:
                stream.write(files.read(f"{recipe.folder}/{name}"))
            track.log_artifacts([path])
        track.log_artifacts([files.download(f"{recipe.folder}/plots", os.path.join(scratch, "plots"))])


def _next(recipe: Recipe, seconds: float) -> str:
    from xdist import track

    lines = [
        f"Done in {duration(seconds)}. What to do next:",
        f"  look at the report      {recipe.folder}/report.html",
        f"  compare runs            mlflow ui --backend-store-uri {track.uri_of(recipe)}",
        f"  use the student         SentenceTransformer({recipe.folder + '/student'!r}).encode([…])",
        "  try another setting     the same command with --run.name other --train.lr 3e-4",
    ]
    return "\n".join(lines) + "\n"
