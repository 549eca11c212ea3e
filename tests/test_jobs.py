"""`ray job submit` against a Ray head of this file's own: followed, refused, stopped, its head killed, submitted again."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import conftest
import psutil
import pytest
from conftest import MakeRecipe, as_file, assert_equal_weights, free_ports, steps, wait_for
from test_pipeline import read_if_there

from xdist import launch
from xdist.config import Recipe

pytest.importorskip("aiohttp_cors", reason="Ray has no job server here: pip install -e '.[cluster]'")

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


class Head:
    """`ray start --head` with a home, a token and ports of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ports = dict(
            zip(("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port"), free_ports(4), strict=True)
        )
        self.address = f"http://127.0.0.1:{self.ports['dashboard-port']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
        self.env = kept | {"HOME": str(folder), "RAY_AUTH_MODE": "token", "PATH": f"{BIN}:{os.environ['PATH']}"}
        subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=self.env, check=True, capture_output=True)
        self.token = (folder / ".ray" / "auth_token").read_text()

    def start(self) -> None:
        ports = [f"--{name}={port}" for name, port in self.ports.items()]
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--temp-dir={self.folder}/t"]
        options = ["--dashboard-host=127.0.0.1", "--disable-usage-stats", "--object-store-memory=200000000"]
        with open(self.folder / "head.log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, *options, *ports], env=self.env, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            wait_for(lambda: self.answer(self.token) == 200, self.process, seconds=90)
        except AssertionError as error:
            raise AssertionError(f"the head did not come up: {(self.folder / 'head.log').read_text()[-3000:]}") from error

    def answer(self, token: str) -> int:
        """HTTP status of the job server."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as found:
                return int(found.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def kill(self) -> None:
        """kill -9 of the whole head: its process group, and what Ray began in other groups."""
        if self.process.poll() is not None:
            return
        family = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)

    def submit(self, *entrypoint: str, name: str) -> list[str]:
        """The command line of docs/scaling.md."""
        options = f"--address {self.address} --submission-id {name} --working-dir".split()
        return [f"{BIN}/ray", "job", "submit", *options, str(ROOT), "--", *entrypoint]

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="xj", dir="/tmp"))  # short: Ray's sockets lie in it
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        found = Head(folder)
        stack.callback(found.kill)
        found.start()
        yield found


def test_without_the_token_it_is_refused(head: Head) -> None:
    assert (head.answer(""), head.answer("0" * 64)) == (401, 403)
    refused = head.run(*head.submit("true", name="refused"), RAY_AUTH_MODE="disabled")
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stdout


def test_a_mistake_fails_the_job_and_is_told(head: Head, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    corpus = {"name": "toy", "path": "corpus.tsv", "source": "english", "target": "{lang}"}
    recipe_file = as_file(make_recipe(data={"corpora": [corpus]}), tmp_path / "mistake.yaml")
    both = f"python -c 'import xdist; print(xdist.__file__)' && python jobs/distill.py {recipe_file}"
    failed = head.run(*head.submit("bash", "-c", both, name="mistake"))
    assert failed.returncode != 0
    assert re.search(r"^xdist: .*no column 'english'; it has ", failed.stdout, re.M), failed.stdout
    assert "Job 'mistake' failed" in failed.stdout
    assert re.search(r"^\S+/working_dir_files/\S+/xdist/__init__.py$", failed.stdout, re.M), "the job ran other code than was submitted"


@contextlib.contextmanager
def submitted(head: Head, recipe_file: Path, name: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A job that is followed: the client, and what it shows."""
    log = recipe_file.parent / f"{name}.txt"
    environment = {name: value for name, value in head.env.items() if name in ("HOME", "RAY_AUTH_MODE")}
    command = ["env", *(f"{key}={value}" for key, value in environment.items())]
    with conftest.started([*command, *head.submit("python", "jobs/distill.py", str(recipe_file), name=name)], log) as process:
        yield process, log


def noted(recipe: Recipe) -> int:
    """The step of the newest checkpoint that is noted, whenever the job is killed; 0 before there is one."""
    folder = Path(recipe.folder, "checkpoints")
    names = re.findall(rb"checkpoint_2[\d._-]+", read_if_there(folder / launch.KEPT_NOTES))
    states = [read_if_there(folder / name.decode() / "state.json") for name in names]
    return max((json.loads(state)["position"]["step"] for state in states if state), default=0)


def test_stopped_and_its_head_killed_it_ends_in_the_same_student(head: Head, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train = {"steps": 800, "checkpoint_every": 50, "evaluate_every": 400, "log_every": 10}
    alone, disturbed = (make_recipe(run={"name": name}, train=train, evaluate={"tasks": []}) for name in ("alone", "disturbed"))

    with submitted(head, as_file(alone, tmp_path / "alone.yaml"), "alone") as (process, log):
        wait_for(lambda: len(steps(log)) > 2, process)  # lines arrive while it runs
        assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
    assert steps(log)[0] == 10
    assert "Job 'alone' succeeded" in log.read_text()

    recipe_file = as_file(disturbed, tmp_path / "disturbed.yaml")
    with submitted(head, recipe_file, "stopped") as (process, log):
        wait_for(lambda: noted(disturbed) > 0, process)
        stop = head.run(f"{BIN}/ray", "job", "stop", "--address", head.address, "stopped")
        assert stop.returncode == 0, stop.stdout
        process.wait(timeout=60)
    assert "xdist: stopped; the same command continues this run" in log.read_text()
    assert "Job 'stopped' was stopped" in log.read_text()
    first = noted(disturbed)
    assert 0 < first < 800

    with submitted(head, recipe_file, "killed") as (process, log):
        wait_for(lambda: bool(steps(log)) and noted(disturbed) > first, process)
        head.kill()
        assert process.wait(timeout=60) != 0
    assert steps(log)[0] > first, "training began anew after `ray job stop`"
    second = noted(disturbed)
    assert first < second < 800
    assert not Path(disturbed.folder, "student").exists()

    head.start()
    with submitted(head, recipe_file, "continued") as (process, log):
        assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
    assert steps(log)[0] > second, "training began anew after the head was killed"
    assert_equal_weights(Path(alone.folder), Path(disturbed.folder))


def test_every_command_is_a_job(head: Head, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """embed, evaluate and tune beside distill: one after the other on the same run, each a job of its own."""
    recipe = make_recipe(run={"name": "whole"})
    recipe_file, space = str(as_file(recipe, tmp_path / "whole.yaml")), tmp_path / "two.yaml"
    space.write_text("search: {train.lr: {grid: [1.0e-3, 1.0e-4]}}\nfixed: {train.steps: 4, train.evaluate_every: 2}\n", encoding="utf-8")
    said = {}
    for job, given in {"embed": [], "distill": [], "evaluate": [], "tune": [str(space)]}.items():
        found = head.run(*head.submit("python", f"jobs/{job}.py", *given, recipe_file, name=f"every-{job}"))
        assert found.returncode == 0, found.stdout[-3000:]
        said[job] = found.stdout
    assert re.search(r"^embed +400 sentences", said["embed"], re.M), said["embed"]
    assert not re.search(r"^embed +400 sentences", said["distill"], re.M), "the teacher worked again"
    for job in ("distill", "evaluate"):
        assert re.search(r"^topic +de +\d", said[job], re.M), said[job]
    best = Path(recipe.run.storage, "whole-two", "best.yaml")
    assert best.exists(), said["tune"]


# --- what travels ---


def package(folder: Path, target: Path) -> list[str]:
    """Names in the zip file that Ray makes of a working directory."""
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, create_package

    target.unlink(missing_ok=True)
    create_package(str(folder), target, include_gitignore=True, include_parent_dir=False)
    assert target.stat().st_size < GCS_STORAGE_MAX_SIZE == 512 * 1024**2
    with zipfile.ZipFile(target) as archive:
        return sorted(name for name in archive.namelist() if not name.endswith("/"))


def test_code_and_the_demos_corpus_travel_and_nothing_else(tmp_path: Path) -> None:
    names = package(ROOT, tmp_path / "first.zip")
    for folder, pattern in (("xdist", "*.py"), ("jobs", "*.py"), ("recipes", "*.yaml"), ("recipes/demo", "*"), ("tune_spaces", "*.yaml")):
        wanted = {f"{folder}/{path.name}" for path in (ROOT / folder).glob(pattern) if path.is_file()}
        assert wanted
        assert wanted <= set(names)
    assert (tmp_path / "first.zip").stat().st_size < 5e6

    checkout = tmp_path / "checkout"
    with zipfile.ZipFile(tmp_path / "first.zip") as archive:
        archive.extractall(checkout)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, checkout)
    for name in (
        ".venv/lib/python3.11/site-packages/torch.py", ".git/objects/0a", "runs/store/f/0.arrow", "runs/demo/student/model.safetensors",
        "runs/mlflow.db", "mlruns/0/meta.yaml", "mlflow.db", "xdist/__pycache__/job.pyc", ".mypy_cache/a", ".hypothesis/a", "dist/a.whl",
    ):  # fmt: skip
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"left here")
    assert package(checkout, tmp_path / "second.zip") == names
