"""MLflow: one run per job, continued under the same id. The only module that imports mlflow.

The driver opens the run, logs parameters, data sets, artifacts and the model; training's rank 0 adds curves by run id.
"""

import contextlib
import json
import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from xdist import environ, files, recipes
from xdist.config import Recipe
from xdist.errors import Refused

LIMIT = 500  # characters of a parameter's value
NOTE, OURS, MOST_DESCRIBED = "mlflow.note.content", re.compile(r"```\n[^`]*\n```"), 4900  # a run's description: tag, form, characters
Point = tuple[str, float, int, int]  # metric, value, milliseconds, step


def uri_of(recipe: Recipe) -> str:
    """The tracking URI: the recipe's, or an SQLite file in run.storage, by absolute path."""
    if recipe.track.uri:
        return recipe.track.uri
    if not files.is_local(recipe.run.storage):
        raise Refused(f"track.uri: storage {recipe.run.storage} is no local folder, so MLflow needs a tracking server's URI here")
    return f"sqlite:///{recipe.run.storage.removeprefix('file://')}/mlflow.db"


def impatient() -> contextlib.AbstractContextManager[None]:
    """Within it a server that does not answer is given up after seconds, not minutes."""
    return environ.having({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"})


def unreachable(uri: str) -> str:
    """Why a tracking store does not answer within seconds; empty where it does."""
    import mlflow

    _settle()
    try:
        with impatient():
            mlflow.MlflowClient(uri).search_experiments(max_results=1)
        return ""
    except Exception as error:  # of many libraries
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def server(uri: str) -> str | None:
    """The tracking URI, where it is a server's."""
    return uri if uri.startswith(("http://", "https://")) else None


def view(uri: str) -> str:
    """How to look at a tracking store: a server's address as it is, otherwise the command that shows it."""
    return server(uri) or f"mlflow ui --backend-store-uri {uri}"


def _settle() -> None:
    """MLflow without its chatter; a server that refuses connections is given up after a minute (MLflow's own patience: four)."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("mlflow", "mlflow.system_metrics.system_metrics_monitor", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The specified dataset source can be interpreted")


def _experiment(client: Any, recipe: Recipe) -> str:
    found = client.get_experiment_by_name(recipe.track.experiment)
    if found:
        return str(found.experiment_id)
    artifacts = None if recipe.track.uri else f"{recipe.run.storage}/mlartifacts"
    return str(client.create_experiment(recipe.track.experiment, artifact_location=artifacts))


def _holds(client: Any, run_id: str) -> bool:
    """Whether the store has this run; one that was deleted in MLflow's pages counts as gone."""
    import mlflow

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except mlflow.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


@contextlib.contextmanager
def run(recipe: Recipe, job: str) -> Iterator[str]:
    """The MLflow run of this job for the length of the context: a new one, or the one that an earlier start of the same
    run opened. Gives its id. Raises Refused where the tracking store cannot be reached."""
    import mlflow

    _settle()
    uri, marker = uri_of(recipe), f"{recipe.folder}/mlflow.json"
    mlflow.set_tracking_uri(uri)
    run_id = files.read_json(marker)["run_id"] if files.exists(marker) else None
    try:
        client = mlflow.MlflowClient(uri)
        mlflow.set_experiment(experiment_id=_experiment(client, recipe))
        if run_id and not _holds(client, run_id):
            run_id = None
            files.remove(f"{recipe.folder}/logged")  # what another store holds, this one is to hold too
        active = mlflow.start_run(run_id=run_id, run_name=None if run_id else recipe.run.name, log_system_metrics=True)
    except Exception as error:
        raise Refused(f"track.uri: MLflow cannot be reached at {uri}: {type(error).__name__}: {error}") from None
    try:
        if not run_id:
            mlflow.set_tags({"xdist.job": job})
            flat = {key: str(value)[:LIMIT] for key, value in recipes.flatten(recipe.model_dump(mode="json"))}
            mlflow.log_params(flat)
            files.write_json(marker, {"run_id": active.info.run_id})
        yield active.info.run_id
        mlflow.end_run()
    except BaseException as error:
        with impatient(), contextlib.suppress(mlflow.MlflowException):
            mlflow.end_run("FAILED")
        if not isinstance(error, mlflow.MlflowException):
            raise
        raise Refused(
            f"track.uri: MLflow at {uri} went away, or did not take what it was given: {error}\nThe same command goes on"
        ) from None


def child(uri: str, parent: str, name: str, settings: dict[str, Any], marker: str) -> tuple[str, bool]:
    """The id of a trial's run beneath a search's, and whether it is new: the store did not have the one that `marker` names."""
    import mlflow
    from mlflow.entities import Param

    _settle()
    client = mlflow.MlflowClient(uri)
    run_id = str(files.read_json(marker)["run_id"]) if files.exists(marker) else ""
    new = not (run_id and _holds(client, run_id))
    if new:
        tags = {"mlflow.parentRunId": parent, "xdist.job": "trial"}
        run_id = str(client.create_run(client.get_run(parent).info.experiment_id, run_name=name, tags=tags).info.run_id)
        files.write_json(marker, {"run_id": run_id})
    client.log_batch(run_id, params=[Param(key, str(value)[:LIMIT]) for key, value in settings.items()])
    return run_id, new


def goes_on(uri: str, run_id: str) -> None:
    """A trial's run is RUNNING, whatever it was before."""
    import mlflow

    mlflow.MlflowClient(uri).update_run(run_id, status="RUNNING")


def ended(uri: str, run_id: str, status: str, points: Iterable[tuple[str, int, float]]) -> None:
    """End a trial's run, as FINISHED, FAILED or KILLED, with its last (metric, step, value)."""
    import mlflow

    now = int(time.time() * 1000)
    _log_batch(uri, run_id, [(name, value, now, step) for name, step, value in points])
    mlflow.MlflowClient(uri).set_terminated(run_id, status)


def log_corpora(recipe: Recipe, pairs: dict[str, int], digests: dict[str, str]) -> None:
    """The corpora as MLflow data sets: name, digest, pairs that were kept. The data itself is not loaded."""
    import mlflow
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset

    class Counted(MetaDataset):
        profile: Any = None  # abstract in MLflow's class, and left out of what it writes

        def to_dict(self) -> dict[str, str]:
            return super().to_dict() | {"profile": json.dumps(self.profile)}

    for corpus in [corpus for corpus in recipe.data.corpora if corpus.name in digests]:
        location = recipe.located(corpus.path).replace("{lang}", "*")
        try:
            source: Any = resolve_dataset_source(location)
        except mlflow.MlflowException:  # hf:// and some stores are no schemes that MLflow knows
            source = CodeDatasetSource({"location": location})
        entry = Counted(source, name=corpus.name, digest=digests[corpus.name])
        entry.profile = {"num_rows": pairs[corpus.name]}
        mlflow.log_input(entry, context="training")


def log_metrics(metrics: dict[str, float]) -> None:
    """Numbers of the whole run."""
    import mlflow

    mlflow.log_metrics(metrics)


def describe(table: str) -> None:
    """A table in plain text as the active run's description, which its page shows, in place of an earlier table; where a person wrote
    something else or more, that stays. It is cut at a line's end where some servers would not take it."""
    import mlflow

    client, run_id = mlflow.MlflowClient(), mlflow.active_run().info.run_id  # type: ignore[union-attr]
    before = client.get_run(run_id).data.tags.get(NOTE)
    if before and not OURS.fullmatch(before):
        return
    text = table.strip("\n")
    if len(text) > MOST_DESCRIBED:
        text = text[:MOST_DESCRIBED].rpartition("\n")[0] + "\n… the rest is in report.html"
    client.set_tag(run_id, NOTE, f"```\n{text}\n```")


def log_artifacts(paths: list[str]) -> None:
    """Files and folders of the run as artifacts."""
    import mlflow

    for path in paths:
        if os.path.isdir(path):
            mlflow.log_artifacts(path, os.path.basename(path))
        elif os.path.exists(path):
            mlflow.log_artifact(path)


def log_model(folder: str, example: list[str], trust_remote_code: bool = False) -> str:
    """The student as an MLflow model, with signature and example; gives its URI."""
    import mlflow
    import mlflow.sentence_transformers
    from mlflow.models import infer_signature
    from sentence_transformers import SentenceTransformer

    student = SentenceTransformer(folder, device="cpu", local_files_only=True, trust_remote_code=trust_remote_code)
    signature = infer_signature(example, student.encode(example))
    info = mlflow.sentence_transformers.log_model(
        model=student, name="student", signature=signature, input_example=example, pip_requirements=["sentence-transformers"]
    )
    return str(info.model_uri)


class Metrics:
    """Curves from training's rank 0, by run id, sent by a thread of its own so that training does not wait, not even for the import of
    MLflow.

    What cannot be sent is kept, in `folder` as well, and tried again: by this object, by the next one of the same run, or by
    `send_kept`.
    """

    def __init__(self, uri: str, run_id: str, folder: str):
        self.uri, self.run_id, self.kept = uri, run_id, f"{folder}/unsent.json"
        self.waiting: list[Point] = files.read_json(self.kept) if files.exists(self.kept) else []
        self.is_kept = bool(self.waiting)
        self.lock, self.sending, self.ended = threading.Lock(), threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Queue numbers of one step."""
        now = int(time.time() * 1000)
        with self.lock:
            self.waiting += [(name, float(value), now, step) for name, value in metrics.items()]

    def flush(self) -> None:
        """Send what waits, and end the thread."""
        self.ended.set()
        self.thread.join()

    def _follow(self) -> None:
        while not self.ended.wait(2.0):
            self.send()
        self.send()

    def send(self) -> None:
        """Send what waits now."""
        with self.sending:
            while batch := self.waiting[:1000]:
                try:
                    _log_batch(self.uri, self.run_id, batch)
                except Exception as error:  # the server is away: keep the numbers, training goes on
                    logging.getLogger(__name__).warning("MLflow did not take %d metrics: %s", len(batch), type(error).__name__)
                    self.keep()
                    return
                with self.lock:
                    self.waiting = self.waiting[len(batch) :]
            if self.is_kept:
                with contextlib.suppress(OSError, Refused):
                    files.remove(self.kept)
                    self.is_kept = False

    def keep(self) -> None:
        """Write what waits to `folder`, for the next one."""
        with self.lock:
            points = list(self.waiting)
        with contextlib.suppress(OSError, Refused):  # a storage that is away as well, or full
            if points:
                files.write_json(self.kept, points)
                self.is_kept = True


def _log_batch(uri: str, run_id: str, points: Iterable[Point]) -> None:
    import mlflow
    from mlflow.entities import Metric

    _settle()
    mlflow.MlflowClient(uri).log_batch(run_id, metrics=[Metric(*point) for point in points])


def send_kept(uri: str, run_id: str, folder: str) -> None:
    """Send the numbers of a run that MLflow did not take while it was trained. Raises Refused where it still is away."""
    if not files.exists(f"{folder}/unsent.json"):
        return
    metrics = Metrics(uri, run_id, folder)
    metrics.flush()
    if metrics.waiting:
        raise Refused(f"track.uri: MLflow at {uri} is away; its numbers are kept, run the same command when it is back")


def curves(recipe: Recipe, run_id: str, names: list[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric of a run, sorted by step; one value a step, the newest."""
    import mlflow

    client = mlflow.MlflowClient(uri_of(recipe))
    found = {}
    for name in names:
        history = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp)
        found[name] = sorted({metric.step: metric.value for metric in history}.items())
    return found


def metric_names(recipe: Recipe, run_id: str) -> list[str]:
    """Names of all metrics of a run."""
    import mlflow

    return sorted(mlflow.MlflowClient(uri_of(recipe)).get_run(run_id).data.metrics)
