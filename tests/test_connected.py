"""A job that joins no cluster, looked at where its work begins."""

import json
import subprocess
import sys
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRecipe, as_file

PROGRAM = """
import contextlib, json, os, psutil, sys
from xdist import corpus, pipeline, recipes

def looked_at(recipe):
    import ray
    worker, places, job = ray.get(ray.remote(ray.util.get_node_ip_address).remote()), [], psutil.Process()
    for process in [job, *job.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            places += [found.laddr.ip for found in process.net_connections("inet") if found.status == "LISTEN"]
    inherited = [name for name in os.environ if name == "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
    print(json.dumps({"worker": worker, "places": places, "modules": sorted(sys.modules), "inherited": inherited}))
    raise KeyboardInterrupt

corpus.prepare = looked_at
with contextlib.suppress(KeyboardInterrupt):
    pipeline.distill(recipes.load(sys.argv[1]))
"""


@pytest.fixture
def job(make_recipe: MakeRecipe, tmp_path: Path) -> dict[str, Any]:
    """What a job is when it begins to read the corpora."""
    file = as_file(make_recipe(), tmp_path / "recipe.yaml")
    done = subprocess.run([sys.executable, "-c", PROGRAM, file], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_nothing_listens_where_other_machines_reach_it_and_torch_is_not_waited_for(job: dict[str, Any]) -> None:
    found = [ip_address(place) for place in job["places"]]
    assert len(found) > 3
    assert all((ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip).is_loopback for ip in found), job["places"]
    assert job["worker"] == "127.0.0.1"
    assert not job["inherited"]
    assert "ray" in job["modules"]
    assert not {"torch", "transformers", "sentence_transformers"} & set(job["modules"])
