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
from xdist import corpus, pipeline, recipes

def looked_at(recipe):
    import ray
    worker, places, job = ray.get(ray.remote(ray.util.get_node_ip_address).remote()), [], psutil.Process()
    given = ray.get(ray.remote(lambda: dict(os.environ)).remote())
    for process in [job, *job.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            places += [found.laddr.ip for found in process.net_connections("inet") if found.status == "LISTEN"]
    found = {"worker": worker, "places": places, "modules": sorted(sys.modules), "given": given, "kept": dict(os.environ)}
    print(json.dumps(found))
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


def test_what_listens_what_was_imported_and_which_variables_are_set(job: dict[str, Any]) -> None:
    found = [ip_address(place) for place in job["places"]]
    assert len(found) > 3
    assert all((ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip).is_loopback for ip in found), job["places"]
    assert job["worker"] == "127.0.0.1"
    assert "ray" in job["modules"]
    assert not {"torch", "transformers", "sentence_transformers"} & set(job["modules"])
    settings = cluster.WORKERS | cluster.ALONE
    assert {name: job["given"].get(name) for name in settings} == settings
    assert {name: job["kept"].get(name) for name in settings} == {name: os.environ.get(name) for name in settings}
    assert job["kept"].get(cluster.ONE_MACHINE) == os.environ.get(cluster.ONE_MACHINE)
