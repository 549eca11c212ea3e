"""On several nodes, parts of which die: real raylets, real kills. After each, the run ends as one that was left alone."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MakeRecipe, all_hashes, as_file, assert_equal_weights, started, steps, wait_for

from xdist import files, track
from xdist.config import Recipe

ROOT = Path(__file__).parent.parent


class Nodes:
    """A Ray cluster of a head without CPUs, where drivers run, and nodes of one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes: list[Any] = []

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def remove(self, place: int) -> None:
        """As a machine that loses its power."""
        self.cluster.remove_node(self.nodes.pop(place), allow_graceful=False)

    def workers(self, place: int, kind: str) -> list[psutil.Process]:
        """Worker processes of a node."""
        raylet = psutil.Process(self.nodes[place].all_processes["raylet"][0].process.pid)
        return [child for child in raylet.children(recursive=True) if child.cmdline() and child.cmdline()[0].startswith(f"ray::{kind}")]

    def kill_worker(self, place: int, kind: str) -> None:
        """kill -9 a worker process of a node."""
        (worker,) = self.workers(place, kind)
        os.kill(worker.pid, signal.SIGKILL)

    def warn(self, place: int, seconds: int) -> None:
        """Tell that a node will be taken away, as a provider of spot machines does."""
        command = ["ray", "drain-node", "--address", self.cluster.address, "--node-id", self.nodes[place].node_id, "--reason"]
        reason = ["DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run([Path(sys.executable).parent / command[0], *command[1:], *reason], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    try:
        found.add()
        found.add()
        yield found
    finally:
        found.cluster.shutdown()


class Job:
    """The command as a user gives it on the head, and what it says."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path):
        self.process, self.log = process, log

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object]) -> float:
        """Wait until something is so; gives the seconds that it took."""
        try:
            return wait_for(condition, self.process, 300)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.said()[-3000:]}") from None

    def steps(self) -> list[int]:
        return steps(self.log)

    def trains_again(self, losses: int) -> bool:
        """Whether a step was shown after the start of the workers that followed so many losses."""
        return len(self.starts()) == losses and self.said().rfind("\n  step ") > self.said().rfind("\n  from step ")

    def starts(self) -> list[tuple[int, int]]:
        """(step, workers) of each start of the workers, but for a first one of a fixed number."""
        found = re.findall(r"^  from step ([\d,]+) on (\d+) worker", self.said(), re.M)
        return [(int(step.replace(",", "")), int(workers)) for step, workers in found]

    def ends(self) -> None:
        assert self.process.wait(timeout=400) == 0, self.said()[-3000:]


@contextlib.contextmanager
def on(nodes: Nodes, recipe: Recipe, folder: Path, prelude: str = "") -> Iterator[Job]:
    file, log = as_file(recipe, folder / f"{recipe.run.name}.yaml"), folder / f"{recipe.run.name}.log"
    code = f"from xdist import launch, pipeline, recipes; {prelude}pipeline.distill(recipes.load({str(file)!r}))"
    with started(
        [sys.executable, "-c", code], log, folder, {"RAY_ADDRESS": nodes.cluster.address, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    ) as process:
        yield Job(process, log)


def loss_curve(recipe: Recipe) -> dict[int, float]:
    """Loss by step, as MLflow has it."""
    run_id = files.read_json(f"{recipe.folder}/mlflow.json")["run_id"]
    return dict(track.curves(recipe, run_id, ["train/loss"])["train/loss"])


TRAIN = {"steps": 400, "checkpoint_every": 20, "evaluate_every": 200, "log_every": 5, "micro_batches": 2}
DATA = {"shards": 32, "window": 4}


def test_actors_workers_and_nodes_die(nodes: Nodes, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A teacher actor in the middle of its work, a node in the middle of embed, a training worker and then a whole node in the
    middle of an epoch: nothing is embedded twice or missing, no batch is repeated or skipped."""
    cluster = {"workers": 2, "num_cpus": None}
    with on(nodes, make_recipe(run={"name": "alone"}, train=TRAIN, data=DATA, cluster=cluster), tmp_path) as job:
        job.ends()
    assert "preflight 3 machine(s)" in job.said()

    recipe = make_recipe(run={"name": "killed", "storage": str(tmp_path / "killed")}, train=TRAIN, data=DATA, cluster=cluster)
    store = Path(recipe.run.storage, "store")
    with on(nodes, recipe, tmp_path, "launch.RETRIES = 1; ") as job:  # so that the second loss is more than Ray Train would take
        job.wait_for(lambda: len(list(store.glob("*/*.arrow"))) >= 2)
        assert [len(nodes.workers(place, "MapWorker")) for place in (0, 1)] == [1, 1], "the teacher is not on every node"
        nodes.kill_worker(0, "MapWorker")
        begun = len(list(store.glob("*/*.arrow")))
        job.wait_for(lambda: len(list(store.glob("*/*.arrow"))) >= begun + 2)
        nodes.remove(1)
        nodes.add()
        assert len(list(store.glob("*/*.arrow"))) < 32, "embed had ended before"

        job.wait_for(lambda: job.steps() and job.steps()[-1] >= 50)
        nodes.kill_worker(0, "RayTrainWorker")
        of_worker = job.wait_for(lambda: job.trains_again(1))
        job.wait_for(lambda: job.steps()[-1] > 100)
        nodes.remove(0)
        nodes.add()
        of_node = job.wait_for(lambda: job.trains_again(2))
        job.ends()
    print(f"from a kill to the next step that is shown: {of_worker:.0f} s for a worker, {of_node:.0f} s for a node")
    assert [workers for _, workers in job.starts()] == [2, 2]
    (after_worker, _), (after_node, _) = job.starts()
    assert after_worker >= 50 - 2 * TRAIN["checkpoint_every"]  # shown when they were killed, less what was being uploaded
    assert after_node >= 100 - 2 * TRAIN["checkpoint_every"]
    hashes = all_hashes(store)
    assert len(hashes) == len(set(hashes)) == 400, "a sentence was embedded twice, or is missing"
    assert_equal_weights(tmp_path / "runs" / "alone", Path(recipe.folder))


def test_training_shrinks_and_grows(nodes: Nodes, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A node is announced to go: a checkpoint is written in time, and one worker goes on alone, until another node comes. The loss
    curve and the student are those of one worker which was left alone: of two numbers every order gives the same sum."""
    train = TRAIN | {"steps": 3000, "checkpoint_every": 3000, "evaluate_every": 3000}
    alone = make_recipe(run={"name": "alone"}, train=train, cluster={"num_cpus": None})
    with on(nodes, alone, tmp_path) as job:
        job.ends()
    recipe = make_recipe(train=train, cluster={"workers": [1, 2], "num_cpus": None})
    with on(nodes, recipe, tmp_path, "launch.RESIZE_EVERY = 3.0; ") as job:
        job.wait_for(lambda: job.steps() and job.steps()[-1] >= 50)
        nodes.warn(0, 6)
        gone = time.monotonic() + 6
        job.wait_for(lambda: time.monotonic() > gone)
        nodes.remove(0)
        job.wait_for(lambda: len(job.starts()) == 2)
        nodes.add()
        job.wait_for(lambda: len(job.starts()) == 3)
        job.ends()
    assert [workers for _, workers in job.starts()] == [2, 1, 2]
    assert 50 <= job.starts()[1][0] < 3000, "no checkpoint was written when the node was announced to go"
    assert job.steps()[-1] == 3000
    assert loss_curve(recipe) == loss_curve(alone)
    assert loss_curve(recipe).keys() == set(range(5, 3001, 5))
    assert_equal_weights(tmp_path / "runs" / "alone", Path(recipe.folder))


def test_what_would_fail_later_is_refused_at_once(nodes: Nodes, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Storage that only the driver sees; machines that never come."""
    tracked = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    alone = make_recipe(run={"storage": "memory://runs"}, track=tracked, cluster={"num_cpus": None})
    with on(nodes, alone, tmp_path) as job:
        assert job.process.wait(timeout=200) == 1
    assert len(re.findall(r"^  \S+ \(\S+\): does not see what the driver writes to memory://runs; set run\.storage", job.said(), re.M)) == 3
    greedy = make_recipe(cluster={"num_cpus": None, "gpus_per_worker": 1, "wait_minutes": 0.1})
    with on(nodes, greedy, tmp_path) as job:
        assert job.process.wait(timeout=200) == 1
    assert "plan      waits for machines: it asks for 1 × 1 CPU, 1 GPU; the cluster has 2 CPU, 0 GPU" in job.said()
    assert "cluster.wait_minutes: 0.1 minutes did not bring what plan asks for, 1 × 1 CPU, 1 GPU" in job.said()
