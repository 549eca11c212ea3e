"""The Ray of a job that joins no cluster."""

import json
import subprocess
import sys
from ipaddress import IPv6Address, ip_address

PROGRAM = """
import json, psutil
from xdist import cluster
from xdist.config import Cluster

with cluster.connected(Cluster(num_cpus=1)):
    import ray
    worker = ray.get(ray.remote(lambda: ray.util.get_node_ip_address()).remote())
    job = psutil.Process()
    places = [c.laddr.ip for p in [job, *job.children(recursive=True)] for c in p.net_connections("inet") if c.status == "LISTEN"]
print(json.dumps([worker, places]))
"""


def test_nothing_listens_where_other_machines_reach_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    worker, places = json.loads(done.stdout.splitlines()[-1])
    found = [ip_address(place) for place in places]
    assert len(found) > 3
    assert all((ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip).is_loopback for ip in found), places
    assert worker == "127.0.0.1"
