"""The cluster files: what the installed Ray and this project say of them. Nothing is started."""

import copy
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from xdist import recipes
from xdist.config import Recipe
from xdist.errors import Refused

ROOT = Path(__file__).parent.parent
AWS, GCP, ONPREM, RAYJOB = "cluster.yaml", "clusters/gcp.yaml", "clusters/onprem.yaml", "clusters/kuberay-rayjob.yaml"
RAY_UP = [AWS, GCP, ONPREM]
COMMANDS = [
    "initialization_commands",
    *(f"{kind}_{key}" for key in ("setup_commands", "start_ray_commands") for kind in ("head", "worker")),
]
TOKEN = "~/.ray/auth_token"
Config = dict[str, Any]


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def load(path: str) -> Config:
    return dict(yaml.safe_load(text(path)))


def accepted(config: Config) -> Config:
    """The config as `ray up` completes it. Raises where Ray refuses it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    found = prepare_config(copy.deepcopy(config))
    validate_config(found)
    return dict(found)


def commands(config: Config) -> list[str]:
    """Every shell command that Ray runs on a machine."""
    found = accepted(config)
    return [command for key in COMMANDS for command in found[key]]


def test_no_cluster_file_is_left_out() -> None:
    assert sorted([*RAY_UP, RAYJOB]) == sorted(["cluster.yaml", *(f"clusters/{path.name}" for path in (ROOT / "clusters").iterdir())])


# --- what Ray says ---


@pytest.mark.parametrize("path", RAY_UP)
def test_ray_accepts_it(path: str) -> None:
    config = accepted(load(path))
    types = config["available_node_types"]
    assert config["max_workers"] > 0
    assert config["head_node_type"] in types
    for entry in types.values():
        assert 0 <= entry["min_workers"] <= entry["max_workers"] <= config["max_workers"]
    workers = [entry for name, entry in types.items() if name != config["head_node_type"] or path == ONPREM]
    assert any(entry["max_workers"] for entry in workers)


@pytest.mark.parametrize("path", RAY_UP)
@pytest.mark.parametrize(
    "change", [{"idle_timeout": 5}, {"docker": {"imagee": "x"}}, {"auth": {"ssh_key": "x"}}, {"max_workers": -1}], ids=str
)
def test_ray_refuses_a_mistake(path: str, change: Config) -> None:
    with pytest.raises(Exception, match=r"Additional properties are not allowed|less than the minimum"):
        accepted(load(path) | change)


@pytest.mark.parametrize("path", [AWS, GCP])
@pytest.mark.parametrize("change", [{"max_worker": 3}, {"min_workers": 99}, {"resources": {"GPU": "one"}}], ids=str)
def test_ray_refuses_a_mistake_in_a_node_type(path: str, change: Config) -> None:
    config = load(path)
    config["available_node_types"]["gpu_spot"] |= change
    with pytest.raises(Exception, match=r"Additional properties are not allowed|smaller than the sum|is not of type 'integer'"):
        accepted(config)


def test_onprem_has_no_node_types() -> None:
    assert "available_node_types" not in load(ONPREM)
    with pytest.raises(Exception, match="not supported for on-premise"):
        accepted(load(ONPREM) | {"available_node_types": {"gpu": {"resources": {}, "node_config": {}}}})


@pytest.mark.parametrize("path", [AWS, GCP])
def test_no_task_lands_on_the_head(path: str) -> None:
    config = accepted(load(path))
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0


@pytest.mark.parametrize("path", [AWS, GCP])
def test_spot_comes_first_and_on_demand_when_there_is_none(path: str) -> None:
    """Asked of Ray's own scheduler. On AWS it learns a machine's resources from AWS; here they are those of ④."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = accepted(load(path))
    learned = {"gpu_spot": {"CPU": 4, "GPU": 1}, "gpu_on_demand": {"CPU": 4, "GPU": 1}, "cpu": {"CPU": 16}}
    types = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=entry["min_workers"],
            max_worker_nodes=entry["max_workers"] + (name == config["head_node_type"]),
            priority=entry.get("priority", 0),
            resources=entry["resources"] or learned[name],
        )
        for name, entry in config["available_node_types"].items()
    }

    def started(count: int, need: dict[str, float], **known: dict[str, float]) -> dict[str, int]:
        request: Any = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=config["max_workers"] + 1,
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(need)] * count),
            **known,
        )
        return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(request).to_launch}

    assert started(3, {"CPU": 1, "GPU": 1}) == {"gpu_spot": 3}
    assert started(3, {"CPU": 1, "GPU": 1}, recoverable_resource_availabilities={"gpu_spot": 0.0}) == {"gpu_on_demand": 3}
    assert started(20, {"CPU": 1}) == {"cpu": 2}


# --- what machines run ---


@pytest.mark.parametrize("path", RAY_UP)
def test_commands_are_shell(path: str) -> None:
    found = commands(load(path))
    assert len(found) > 5
    for command in found:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}: {checked.stderr}"


@pytest.mark.parametrize("path", RAY_UP)
def test_what_is_mounted_is_there(path: str) -> None:
    mounts = load(path)["file_mounts"]
    assert mounts.pop(TOKEN) == TOKEN
    for target, source in mounts.items():
        assert (ROOT / source).exists()
        assert target == f"~/xdist/{source}"
    assert {"constraints.txt", "pyproject.toml", "xdist"} <= set(mounts.values())


@pytest.mark.parametrize("path", [*RAY_UP, RAYJOB])
def test_the_project_is_installed_pinned_and_whole(path: str) -> None:
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    (command,) = re.findall(r"^(?:#   RUN| +- ) ?(.*pip install .*)$", text(path), re.M)
    assert re.search(r"-c (~/xdist/)?constraints\.txt", command)
    (asked,) = re.findall(r"\[([a-z,]+)\]", command)
    assert set(asked.split(",")) <= extras.keys()
    assert "cluster" in asked.split(",")
    assert "index" not in command  # the usual wheel of torch for Linux is the CUDA build


@pytest.mark.parametrize("path", [AWS, GCP, RAYJOB])
def test_machines_have_the_ray_and_python_of_the_project(path: str) -> None:
    (version,) = re.findall(r"^ray==(.+)$", text("constraints.txt"), re.M)
    assert set(re.findall(r"rayproject/ray:(\S+)", text(path))) == {f"{version}-py311-gpu"}
    if path == RAYJOB:
        assert load(path)["spec"]["rayClusterSpec"]["rayVersion"] == version


@pytest.mark.parametrize("path", RAY_UP)
def test_nothing_is_open_to_the_world(path: str) -> None:
    assert "0.0.0.0" not in text(path)
    assert "security_group" not in text(path)
    assert "RAY_AUTH_MODE=token" in " ".join([*load(path).get("docker", {}).get("run_options", []), *commands(load(path))])
    (head,) = [command for command in commands(load(path)) if "ray start --head" in command]
    assert "--dashboard-host=127.0.0.1" in head
    (server,) = [command for command in commands(load(path)) if "mlflow server" in command]
    assert re.search(r"--host (\$NODE_IP|\"\$\(hostname -I )", server)


SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|hf_[A-Za-z0-9]{20}|://[^/\s]*:[^/@\s]+@|\b[0-9a-f]{40,}\b"
    r"|(?i:secret_access_key|password|auth_token|api_key)['\"]?\s*[=:]\s*['\"]?[^\s~'\"]{6}"
)


@pytest.mark.parametrize("path", [*RAY_UP, RAYJOB, "docs/scaling.md"])
def test_no_secret_is_written_down(path: str) -> None:
    assert not SECRETS.search(text(path))


@pytest.mark.parametrize(
    "line",
    ["AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI", "key: AKIAIOSFODNN7EXAMPLE", "http://me:secret@mlflow:5000", f"RAY_AUTH_TOKEN: {'0a' * 32}"],
)
def test_a_secret_would_be_seen(line: str) -> None:
    assert SECRETS.search(line)


def test_five_lines_are_to_be_changed() -> None:
    assert sorted(re.findall(r"# ([①-⑳]) change:", text(AWS))) == list("①②③④⑤")


# --- the commands of this project ---


def written(path: str) -> Iterator[tuple[str, list[str]]]:
    """(job, arguments) of each `python jobs/….py` that a file tells to run."""
    lines = re.sub(r"\\\n\s*", "", load(path)["spec"]["entrypoint"] if path == RAYJOB else text(path))
    for job, arguments in re.findall(r"python jobs/(\w+)\.py +([^'`#\n]+)", lines):
        yield job, shlex.split(arguments)


def parsed(arguments: list[str]) -> Recipe:
    return recipes.parse(arguments, "", {"plan": "as jobs/distill.py has it"})[0]


@pytest.mark.parametrize("path", [RAYJOB, "docs/scaling.md", "README.md"])
def test_commands_of_this_project_parse(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = list(written(path))
    assert found
    for job, arguments in found:
        assert (ROOT / "jobs" / f"{job}.py").exists()
        mine = [word.replace("recipes/mine.yaml", "recipes/demo.yaml") for word in arguments if not word.startswith("tune_spaces/")]
        if mine == ["--help"]:
            continue
        assert parsed(mine).cluster.workers[0] >= 1


@pytest.mark.parametrize("argument", ["--cluster.worker", "--train.micro_batch", "--run.store"])
def test_a_renamed_key_would_be_seen(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (_, arguments), *_ = written(RAYJOB)
    with pytest.raises((SystemExit, Refused)):
        parsed([*arguments, argument, "2"])


def test_rayjob_asks_for_what_its_pods_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ((_, arguments),) = written(RAYJOB)
    asked = parsed(arguments)
    (gpu,) = [group for group in load(RAYJOB)["spec"]["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "gpu"]
    assert asked.cluster.gpus_per_worker == 1
    assert asked.cluster.workers[1] <= gpu["maxReplicas"]
    assert (asked.cluster.teacher_actors or 99) <= gpu["maxReplicas"]
    assert asked.run.storage.startswith("s3://")
    assert asked.track.uri


# --- the RayJob, by the field names of KubeRay's ray.io/v1 and Kubernetes ---

ANY = None  # free content
CONTAINER = {"name": ANY, "image": ANY, "env": [{"name": ANY, "value": ANY, "valueFrom": {"secretKeyRef": {"name": ANY, "key": ANY}}}]} | {
    "envFrom": [{"secretRef": {"name": ANY, "optional": ANY}}],
    "resources": {"requests": ANY, "limits": ANY},
}
POD = {
    "metadata": {"labels": ANY, "annotations": ANY},
    "spec": {
        "containers": [CONTAINER],
        "nodeSelector": ANY,
        "serviceAccountName": ANY,
        "tolerations": [{"key": ANY, "operator": ANY, "value": ANY, "effect": ANY}],
    },
}
HEAD_GROUP = {"serviceType": ANY, "rayStartParams": ANY, "template": POD}
WORKER_GROUP = {"groupName": ANY, "replicas": ANY, "minReplicas": ANY, "maxReplicas": ANY, "rayStartParams": ANY, "template": POD}
CLUSTER_SPEC = {
    "rayVersion": ANY,
    "authOptions": {"mode": ANY, "secretName": ANY},
    "enableInTreeAutoscaling": ANY,
    "autoscalerOptions": {"idleTimeoutSeconds": ANY, "upscalingMode": ANY, "version": ANY, "resources": {"requests": ANY, "limits": ANY}},
    "headGroupSpec": HEAD_GROUP,
    "workerGroupSpecs": [WORKER_GROUP],
}
JOB_SPEC = {
    "entrypoint": ANY,
    "runtimeEnvYAML": ANY,
    "submissionMode": ANY,
    "backoffLimit": ANY,
    "activeDeadlineSeconds": ANY,
    "shutdownAfterJobFinishes": ANY,
    "ttlSecondsAfterFinished": ANY,
    "rayClusterSpec": CLUSTER_SPEC,
}
JOB = {"apiVersion": ANY, "kind": ANY, "metadata": {"name": ANY, "namespace": ANY, "labels": ANY}, "spec": JOB_SPEC}


def unknown(node: Any, known: Any, place: str = "") -> Iterator[str]:
    """Places of fields that Kubernetes would not know."""
    if known is ANY:
        return
    if isinstance(known, list):
        for number, entry in enumerate(node):
            yield from unknown(entry, known[0], f"{place}[{number}]")
        return
    for key, value in node.items():
        if key not in known:
            yield f"{place}.{key}"
        else:
            yield from unknown(value, known[key], f"{place}.{key}")


def test_rayjob_has_known_fields_alone() -> None:
    job = load(RAYJOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert not list(unknown(job, JOB))


@pytest.mark.parametrize(
    "place", ["", "spec", "spec.rayClusterSpec", "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.headGroupSpec.template.spec"]
)
def test_an_unknown_field_of_the_rayjob_would_be_seen(place: str) -> None:
    job = node = load(RAYJOB)
    for key in filter(None, place.split(".")):
        node = node[key]
    node["replica"] = 3
    assert list(unknown(job, JOB)) == [f".{place}.replica".replace("..", ".")]


def test_ray_reads_the_rayjobs_groups() -> None:
    """The autoscaler's own reading of the custom resource: what each group's pods offer."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = {"metadata": {"name": "xdist", "namespace": "default"}, "spec": load(RAYJOB)["spec"]["rayClusterSpec"]}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert {name: (entry["resources"]["CPU"], entry["resources"].get("GPU", 0)) for name, entry in types.items()} == {
        "headgroup": (0, 0),
        "gpu": (8, 1),
        "cpu": (8, 0),
    }
    assert all(0 <= entry["min_workers"] <= entry["max_workers"] for entry in types.values())


def test_pods_get_secrets_by_reference() -> None:
    spec = load(RAYJOB)["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "xdist", "optional": True}}]
        assert {entry["name"] for entry in container.get("env", []) if "value" in entry} <= {"OMP_NUM_THREADS"}
