"""What the run depends on goes away: object storage by its real protocol, a real MLflow server."""

import contextlib
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import LONG, MakeRecipe, as_file, free_ports, started, wait_for

from xdist import files, recipes
from xdist.config import Recipe

ROOT = Path(__file__).parent.parent


class ObjectStore:
    """An S3 server (moto's) that can be told to be slow, and to fail requests in whose "METHOD path" it finds the pattern `failing`."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.real: Any = DomainDispatcherApplication(create_backend_app)
        self.failing: str | None = None
        self.slow = 0.0
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        self.asked.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{' copies' if 'HTTP_X_AMZ_COPY_SOURCE' in environ else ''}")
        time.sleep(self.slow)
        if self.failing is not None and re.search(self.failing, self.asked[-1]):
            self.refused.append(self.asked[-1])
            start_response("503 Slow Down" if len(self.refused) % 2 else "500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return self.real(environ, start_response)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    pytest.importorskip("moto")
    store = ObjectStore()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "planted-key-id", "AWS_SECRET_ACCESS_KEY": "planted-secret-key", "AWS_ENDPOINT_URL": store.url,
        "MLFLOW_TRACKING_USERNAME": "planted-user", "MLFLOW_TRACKING_PASSWORD": "planted-password", "HF_TOKEN": "planted-token",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"{store.url}/bucket", method="PUT"), timeout=10)
    files._backend.cache_clear()
    yield store
    files._backend.cache_clear()
    store.server.shutdown()


class Tracking:
    """An MLflow server with an artifact store of its own."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.stack = contextlib.ExitStack()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", str(self.folder / "artifacts")]
        env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = self.stack.enter_context(started([*command, *stores], self.folder / f"mlflow{time.time_ns()}.log", env=env))

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return bool(urllib.request.urlopen(f"{self.url}/health", timeout=2).status == 200)
            return False

        wait_for(answers, process, 100)

    def kill(self) -> None:
        """kill -9 of the server and its workers."""
        self.stack.close()


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[Tracking]:
    server = Tracking(tmp_path)
    server.start()
    yield server
    server.kill()


def distilled(file: Path, log: Path) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    return started([sys.executable, str(ROOT / "jobs" / "distill.py"), str(file)], log, log.parent)


def test_outages_and_a_kill_change_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, undisturbed: Path, s3: ObjectStore, mlflow_server: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything on object storage, which fails for a while and is slow for a while; the MLflow server is killed in training and after it,
    and comes back; the driver is killed -9. The student is that of a run on a local disk, and no number is missing from its curves."""
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # what waits for MLflow waits for seconds
    data = LONG["data"] | {"root": "s3://bucket/data"}
    for path in (tmp_path / "data").iterdir():
        files.write(f"s3://bucket/data/{path.name}", path.read_bytes())
    remote = make_recipe(
        run={"name": "run", "storage": "s3://bucket/runs"}, data=data, train=LONG["train"], track={"uri": mlflow_server.url}
    )
    file, log = as_file(remote, tmp_path / "remote.yaml"), tmp_path / "remote.log"
    with distilled(file, log) as process:
        wait_for(lambda: files.names(f"{remote.folder}/corpus", ".parquet"), process)
        s3.failing = ""
        wait_for(lambda: len(s3.refused) >= 3, process)
        time.sleep(2)
        s3.failing = None
        wait_for(lambda: b"  step     30 of" in log.read_bytes(), process)
        mlflow_server.kill()
        s3.slow = 0.2
        wait_for(lambda: files.exists(f"{remote.folder}/unsent.json"), process)
        wait_for(lambda: b"  step    100 of" in log.read_bytes(), process)
        process.kill()
    s3.slow = 0.0
    mlflow_server.start()
    log = tmp_path / "again.log"
    with distilled(file, log) as process:
        wait_for(lambda: b"\n  step " in log.read_bytes(), process)
        begun = len(s3.refused)
        s3.failing = "^P.*/checkpoints/"  # uploads
        wait_for(lambda: len(s3.refused) > begun, process)
        time.sleep(10)  # longer than pyarrow's own patience
        s3.failing = None
        wait_for(lambda: b"\nencode " in log.read_bytes(), process)
        mlflow_server.kill()
        assert process.wait(timeout=400) == 2, log.read_text()[-3000:]
    assert "  step      5 of" not in log.read_text(), "training began anew instead of going on"
    assert re.search(rf"^xdist: track\.uri: MLflow at {mlflow_server.url} went away.*\nThe same command goes on$", log.read_text(), re.M)
    mlflow_server.start()
    last = tmp_path / "last.log"
    with distilled(file, last) as process:
        assert process.wait(timeout=400) == 0, last.read_text()[-3000:]
    assert "  step " not in last.read_text()

    assert files.read(f"{remote.folder}/student/model.safetensors") == Path(undisturbed, "student", "model.safetensors").read_bytes()
    for name in ("report.html", "report.json", "student/README.md", "checkpoints/checkpoint_manager_snapshot.json"):
        assert files.exists(f"{remote.folder}/{name}"), name
    assert not files.exists(f"{remote.folder}/unsent.json")
    assert not Path(tmp_path, "s3:").exists()
    assert not [line for line in s3.asked if line.endswith(" copies")]  # as a rename would be made there

    client = mlflow.MlflowClient(mlflow_server.url)
    run = client.get_run(files.read_json(f"{remote.folder}/mlflow.json")["run_id"])
    steps = sorted({point.step for point in client.get_metric_history(run.info.run_id, "train/loss")})
    assert steps == list(range(5, 241, 5))
    assert run.info.status == "FINISHED"
    search = {"search": {"train.lr": {"grid": [1.0e-3, 1.0e-5]}}, "fixed": {"train.steps": 4, "train.evaluate_every": 2}}
    for space in (search, {"study": {"sizes": [8], "seeds": 2, "methods": ["student", "tfidf"]}}):
        (name,) = {"search", "study"} & space.keys()
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(space))
        command = [sys.executable, str(ROOT / "jobs" / "tune.py"), str(tmp_path / f"{name}.yaml"), str(file)]
        with started(command, tmp_path / f"{name}.log", tmp_path) as process:
            assert process.wait(timeout=400) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
        parent = files.read_json(f"s3://bucket/runs/run-{name}/mlflow.json")["run_id"]
        children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
        assert [child.info.status for child in children] == ["FINISHED"] * (2 if name == "search" else 4)
    assert recipes.load("s3://bucket/runs/run-search/best.yaml").run.name == "run-search-best"

    told = [path.read_text() for path in (tmp_path / "remote.log", log, last)] + [yaml.safe_dump(run.data.params)]
    told += [files.read(f"{remote.folder}/{name}").decode() for name in ("recipe.yaml", "report.html", "report.json")]
    assert not [text for text in told if "planted-" in text]


def test_what_is_away_at_the_start_is_refused(make_recipe: MakeRecipe, tmp_path: Path, ray_cluster: None) -> None:
    from xdist import pipeline
    from xdist.errors import Refused

    recipe: Recipe = make_recipe(track={"uri": f"http://127.0.0.1:{free_ports(1)[0]}"})
    with pytest.raises(Refused, match=r"track\.uri: MLflow cannot be reached at http://127\.0\.0\.1:\d+"):
        pipeline.distill(recipe)
    assert not Path(recipe.folder, "parts").exists()
