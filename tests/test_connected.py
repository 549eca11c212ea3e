"""A job that joins no cluster, looked at where its work begins."""

import json
import os
import subprocess
import sys
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRecipe, as_file

from xdist import cluster

PROGRAM = """
import contextlib, json, os, psutil, sys
from xdist import cluster, corpus, pipeline, recipes

NAMES = [*cluster.WORKERS, *cluster.ALONE, cluster.ONE_MACHINE]

def looked_at(recipe):
    import ray
    worker, places, job = ray.get(ray.remote(ray.util.get_node_ip_address).remote()), [], psutil.Process()
    given = ray.get(ray.remote(lambda: {name: os.environ.get(name) for name in NAMES}).remote())
    for process in [job, *job.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            places += [found.laddr.ip for found in process.net_connections("inet") if found.status == "LISTEN"]
    kept = {name: os.environ.get(name) for name in NAMES}
    print(json.dumps({"worker": worker, "places": places, "modules": sorted(sys.modules), "given": given, "kept": kept}))
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
    assert job["kept"][cluster.ONE_MACHINE] is None
    assert "ray" in job["modules"]
    assert not {"torch", "transformers", "sentence_transformers"} & set(job["modules"])
    for name, value in (cluster.WORKERS | cluster.ALONE).items():
        assert job["given"][name] == value, name
        assert job["kept"][name] == os.environ.get(name), name
