"""Ray: connecting, sharing out resources, and running units of work over Ray Data.

Every data stage is the same shape: a list of small descriptions of work (a file, a shard) goes in, Ray Data streams them
through tasks or actors that read and write storage themselves, and small summaries come out. Text and vectors do not
travel through it.
"""

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from xdist import environ
from xdist.config import Cluster
from xdist.errors import Refused
from xdist.progress import Progress, say

Item = dict[str, Any]

WORKERS = {
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # numbers that it does not take are kept, so there is no need to wait for minutes
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",  # kernels compiled for one shape of batch are still there when it comes again
    # Activations on huge pages that stay with the process: otherwise a step has the kernel clear its memory anew.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:"
    "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=17179869184",
}

ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # nobody announces that a machine of one's own will be taken away

SHOW_EVERY = 0.5  # seconds between looks at how far the work is, and between what it says of that
HELD_SECONDS = 20.0  # for which a job waits for a folder that another one holds: of a killed job, Ray ends the actors that soon


@contextlib.contextmanager
def connected(settings: Cluster) -> Iterator[None]:
    """Ray for the length of the context: the cluster at `address`, the job's own, or a local one that ends with us and listens on
    127.0.0.1 alone."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        address = _address(settings)
        with contextlib.nullcontext() if address else _of_one_machine():
            _start(settings, address, stack)
        yield


def _of_one_machine() -> contextlib.AbstractContextManager[None]:
    """Within it Ray is imported and started as on systems where it supports no clusters, and listens on 127.0.0.1 alone. It reads a
    variable for that when it is first imported: a process that had imported it before is not changed, and a value of the user's own
    stands. Ray's processes inherit what workers need: with a runtime environment instead, workers that it starts in advance would be of
    no use."""
    return environ.having(_environment() | ALONE | {ONE_MACHINE: os.environ.get(ONE_MACHINE, "0")})


def _start(settings: Cluster, address: str | None, stack: contextlib.ExitStack) -> None:
    """Connect, unless this process already is; the stack ends what is started here."""
    if not settings.verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # read once, when ray is imported
    # How soon Ray Train sees that a worker died or uploaded a checkpoint: every two seconds by its default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # How long it waits for workers on machines that it thinks are there, and that may have gone: a minute by its default.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    import ray
    import ray.data

    if ray.is_initialized():
        return
    _quiet(settings.verbose)
    local: dict[str, Any] = {} if address else {"num_cpus": settings.num_cpus, "include_dashboard": False}
    with contextlib.nullcontext() if settings.verbose else _stderr_closed():
        try:
            ray.init(
                address=address or "local",  # not any Ray that happens to run here
                log_to_driver=settings.verbose,
                logging_level=logging.INFO if settings.verbose else logging.ERROR,
                runtime_env={"env_vars": _environment()} if address else None,
                **local,
            )
        except ConnectionError as error:
            raise Refused(f"cluster.address: no Ray answers at {address}: {error}") from None
    stack.callback(ray.shutdown)
    _quiet(settings.verbose)  # Ray Data sets its own levels when it is imported
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = settings.verbose
    context.print_on_execution_start = False


def _environment() -> dict[str, str]:
    """Variables that workers need: quiet libraries, and hub settings of the driver."""
    passed = {name: value for name, value in os.environ.items() if name in ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE")}
    return passed | WORKERS


def _quiet(verbose: bool) -> None:
    if not verbose:
        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module="ray")


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """Ray's native code announces its log level on file descriptor 2, past Python's logging; errors still raise."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def resources(settings: Cluster) -> tuple[int, float]:
    """(CPUs, GPUs) of a training worker or teacher actor, from the settings or from what the cluster's machines have. Raises
    Refused where a local Ray has less; a cluster may still grow."""
    import ray

    total = ray.cluster_resources()
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")] or [total]
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) >= 1 else 0.0
    cpus = settings.cpus_per_worker
    if cpus is None:
        largest = int(max(machine.get("CPU", 1) for machine in machines))
        cpus = 1 if gpus else max(1, largest // -(-settings.workers[1] // len(machines)))
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        if not _address(settings) and settings.workers[0] * each > total.get(name, 0):
            raise Refused(
                f"cluster.workers: {settings.workers[0]} workers with {each:g} {name} each need more than the {total.get(name, 0):g} of "
                f"this machine; lower cluster.workers or cluster.{name.lower()}s_per_worker"
            )
    return cpus, gpus


@contextlib.contextmanager
def held(name: str) -> Iterator[None]:
    """Keep a name to this job for the length of the context, among all jobs of the Ray that it runs on. Raises Refused where another
    job holds it; what a killed job held is free within seconds."""
    import ray

    deadline = time.monotonic() + HELD_SECONDS
    while True:
        try:
            holder: Any = ray.remote(Board).options(name=name, namespace="xdist", **_as_long_as_the_driver()).remote()
            break
        except ValueError:  # the name is taken
            if time.monotonic() > deadline:
                raise Refused(
                    f"{name} is held by another job on this Ray that works in this folder; wait for it, or end it (ray job stop)"
                ) from None
            time.sleep(0.5)
    try:
        yield
    finally:
        ray.kill(holder)


def await_room(settings: Cluster, count: int, cpus: float, gpus: float, purpose: str) -> None:
    """On a cluster, have the machines for `count` processes started and wait for them, saying so. Raises Refused when
    cluster.wait_minutes have passed."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    if not _address(settings):
        return
    each = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    asked = f"{count} × " + ", ".join(f"{value:g} {name}" for name, value in each.items())
    group = placement_group([each] * count)
    started, said = time.monotonic(), -math.inf
    try:
        while not group.wait(2):
            now, total = time.monotonic(), ray.cluster_resources()
            there = ", ".join(f"{total.get(name, 0):g} {name}" for name in each)
            if now - said > 60 and now - started > 4:
                say(f"{purpose:<9} waits for machines: it asks for {asked}; the cluster has {there}")
                said = now
            if now - started > 60 * settings.wait_minutes:
                raise Refused(
                    f"cluster.wait_minutes: {settings.wait_minutes:g} minutes did not bring what {purpose} asks for, {asked}; the cluster "
                    f"has {there}, part of it perhaps in use. Ask for less (cluster.workers, cluster.gpus_per_worker) or add machines"
                )
    finally:
        remove_placement_group(group)


def on_each_node(work: Callable[..., Item], **arguments: Any) -> list[tuple[str, Item]]:
    """Run `work(**arguments)` in a process of each machine: (the machine's address and name, the result), the driver's machine first.
    Raises Refused where one cannot start a process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task, here = ray.remote(num_cpus=0, max_retries=1)(work), ray.get_runtime_context().get_node_id()
    asked, found = [], []
    for node in sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
        asked.append((name, task.options(scheduling_strategy=there).remote(**arguments)))
    for name, reference in asked:
        try:
            found.append((name, ray.get(reference, timeout=300)))
        except ray.exceptions.RayError as error:
            raise Refused(f"machine {name} cannot start a process of this job: {str(error).strip().splitlines()[-1]}") from None
    return found


def on_cluster(settings: Cluster) -> bool:
    """Whether the work runs on a Ray that was joined, not on one of our own."""
    return _address(settings) is not None


def at_once(settings: Cluster) -> tuple[int, int]:
    """(teacher actors, training workers) that add speed: on a cluster all that are asked for, some of which may be yet to come; on
    one machine without GPUs they share its cores."""
    import ray

    if _address(settings):
        return teacher_actors(settings), settings.workers[1]
    parts = int(ray.cluster_resources().get("GPU", 0)) or sum(node["Alive"] for node in ray.nodes())
    return min(teacher_actors(settings), parts), min(settings.workers[1], parts)


def cores() -> int:
    """CPUs of the whole cluster: how many one-core actors add speed."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _address(settings: Cluster) -> str | None:
    """The running Ray to use; None where one of our own is started."""
    return settings.address or os.environ.get("RAY_ADDRESS")


def teacher_actors(settings: Cluster) -> int:
    """How many teacher actors to start, now that there is room for one: one per GPU; without GPUs one per machine that has room, or as
    many as training workers if these are more."""
    import ray

    (cpus, gpus), total = resources(settings), int(ray.cluster_resources().get("GPU", 0))
    machines = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= cpus)
    return settings.teacher_actors or (max(1, total) if gpus else max(machines, settings.workers[1]))


def _as_long_as_the_driver() -> dict[str, Any]:
    """Options of an actor that is to live as long as the driver: on its machine, or elsewhere if it is lost there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1}


class Board:
    """An actor that work reports to while it runs; the driver reads it for progress. One serves all stages of a job, which follow each
    other by number: what an earlier one's work still says is dropped."""

    def __init__(self) -> None:
        self._begin(0)

    def _begin(self, stage: int) -> None:
        self.stage = stage
        self.counts: dict[str, tuple[int, float]] = {}
        self.lines: list[dict[str, Any]] = []

    def _is_on(self, stage: int) -> bool:
        if stage > self.stage:
            self._begin(stage)
        return stage == self.stage

    def count(self, stage: int, key: str, value: int, share: float) -> None:
        """Set how much one unit of work has done so far, and what share of the whole stage that is."""
        if self._is_on(stage):
            self.counts[key] = value, share

    def post(self, stage: int, line: dict[str, Any]) -> None:
        """Add a line for the driver."""
        if self._is_on(stage):
            self.lines.append(line)

    def read(self, stage: int) -> tuple[int, float, list[dict[str, Any]]] | None:
        """The sums of all counts and shares of a stage, and its lines since the last call; nothing once another has begun."""
        if not self._is_on(stage):
            return None
        lines, self.lines = self.lines, []
        return sum(value for value, _ in self.counts.values()), sum(share for _, share in self.counts.values()), lines


class RemoteBoard:
    """A stage's side of the Board, for its work: calls that return at once. A count waits until the last that was sent is SHOW_EVERY
    old: each call is a task of Ray's, of which its head keeps a record."""

    def __init__(self, handle: Any, stage: int):
        self.handle, self.stage = handle, stage
        self.waiting: tuple[str, int, float] | None = None
        self.last, self.sent = None, -math.inf

    def count(self, key: str, value: int, share: float = 0.0) -> None:
        """Set how much this unit of work has done so far, and what share of the whole stage that is."""
        if self.waiting and self.waiting[0] != key:
            self._send()
        self.waiting = key, value, share
        if time.monotonic() - self.sent >= SHOW_EVERY:
            self._send()

    def _send(self) -> None:
        if self.waiting:
            self.last, self.sent = self.handle.count.remote(self.stage, *self.waiting), time.monotonic()
            self.waiting = None

    def arrived(self) -> None:
        """Wait until the last count is there, so that it is when the work's result is."""
        import ray

        self._send()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self.last, timeout=10) if self.last else None

    def post(self, line: dict[str, Any]) -> None:
        """Add a line for the driver."""
        self.handle.post.remote(self.stage, line)


_stages = itertools.count(1)


@functools.cache
def _board(head: str, job: str) -> Any:
    """The Board of this job on the Ray with this head. It lives as long as this handle, which must be the one of its creation."""
    import ray

    return ray.remote(Board).options(**_as_long_as_the_driver()).remote()


@contextlib.contextmanager
def watched(handle: Callable[[int, float, list[dict[str, Any]]], None]) -> Iterator[RemoteBoard]:
    """A stage's board, whose content goes to `handle` from a thread of the driver until the context ends."""
    import ray

    here = ray.get_runtime_context()
    board, stage = _board(here.gcs_address, here.get_job_id()), next(_stages)
    ended = threading.Event()

    def read() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            if found := ray.get(board.read.remote(stage), timeout=30):
                handle(*found)

    def follow() -> None:
        while not ended.wait(SHOW_EVERY):
            read()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield RemoteBoard(board, stage)
    finally:
        ended.set()
        thread.join(timeout=31)
        read()


def stream(
    items: list[Item], work: Callable[..., Any], progress: Progress, *, actors: int = 0, cpus: float = 1, gpus: float = 0, **arguments: Any
) -> Iterator[Item]:
    """Run `work(item, board, **arguments) -> dict` for each item over Ray Data, yielding results as they come.

    With `actors` > 0, `work` is a class built once per actor with `arguments` and called with (item, board).
    `board.count(key, n)`, with a share of the whole where nobody knows the total, from within drives `progress`. A task that
    fails because its process or node died is run again.
    """
    import ray

    if not items:
        return
    data: Any = ray.data.from_items([{"item": json.dumps(item)} for item in items], override_num_blocks=len(items))
    data.context.execution_no_progress_timeout_s = -1  # Ray Data would end a run in which one file takes more than half an hour
    with watched(lambda done, share, _: progress.update(done, share)) as board:
        if actors:
            mapped = data.map_batches(
                _Actor,
                fn_constructor_kwargs={"make": work, "board": board, "arguments": arguments},
                compute=ray.data.ActorPoolStrategy(size=min(actors, len(items))),
                batch_size=1,
                num_cpus=cpus,
                num_gpus=gpus,
            )
        else:
            mapped = data.map_batches(
                _task, fn_kwargs={"work": work, "board": board, "arguments": arguments}, batch_size=1, num_cpus=cpus, num_gpus=gpus
            )
        for row in mapped.iter_rows():
            result = json.loads(row["result"])
            if "refused" in result:
                raise Refused(result["refused"])
            yield result


def _task(batch: dict[str, Any], work: Callable[..., Item], board: RemoteBoard, arguments: dict[str, Any]) -> dict[str, list[str]]:
    return {"result": [_answer(work, item, board, **arguments) for item in batch["item"]]}


def _answer(work: Callable[..., Item], item: str, board: RemoteBoard, **arguments: Any) -> str:
    """The result as JSON. A Refused travels as a result too: of an error's cause, Ray Data keeps only the text."""
    try:
        result = work(json.loads(item), board, **arguments)
        board.arrived()
        return json.dumps(result)
    except Refused as error:
        return json.dumps({"refused": str(error)})


class _Actor:
    def __init__(self, make: Callable[..., Any], board: RemoteBoard, arguments: dict[str, Any]):
        self.board = board
        try:
            self.work = make(**arguments)
        except Refused as error:
            message = str(error)
            self.work = lambda item, board: {"refused": message}

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"result": [_answer(self.work, item, self.board) for item in batch["item"]]}
