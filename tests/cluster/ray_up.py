"""`ray up` for real: three hosts made of nothing, clusters/onprem.yaml on them, a hundred steps of the demo trained across two of
them, `ray down`.

    python tests/cluster/ray_up.py

To be run by hand, as root; needs the Debian packages openssh-server, openssh-client, rsync and iproute2, and the extra `demo`. A host
is a network namespace with an address, a sshd, a home and processes of its own: what stops Ray on one of them, as `ray down` does, sees
no process of another or of this machine. The hosts share this machine's files. All that is made here is gone at the end.
"""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import started, wait_for  # noqa: E402

BIN = Path(sys.executable).parent
CLUSTER, NETWORK, BRIDGE, PORT = "xdist-ray-up", "10.213.47", "xdist-br", 18265
HEAD, *WORKERS = HOSTS = ["xdist-head", "xdist-one", "xdist-two"]
ADDRESSES = {host: f"{NETWORK}.{number}" for number, host in enumerate(HOSTS, 10)}
ACROSS = "--cluster.workers 2 --train.micro_batches 2 --train.steps 100 --train.checkpoint_every 50 --train.evaluate_every 100"
PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "ip": "iproute2"}


def main() -> int:
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = sorted(package for command, package in PACKAGES.items() if not shutil.which(command))
    if os.geteuid() != 0 or missing:
        print(f"skipped: needs {'the packages ' + ', '.join(missing) if missing else 'root'}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is removed then, too
    scratch = Path(tempfile.mkdtemp(prefix="xup", dir="/tmp"))  # short: Ray's sockets lie in it
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        remove_hosts()  # of a run that was killed
        stack.callback(remove_hosts)
        if subprocess.run(["ip", "netns", "add", HEAD]).returncode:
            print("skipped: this root may not make network namespaces")
            return 0
        make_hosts(scratch, stack)
        up_and_down(scratch)
    say("all is removed")
    return 0


def up_and_down(scratch: Path) -> None:
    """`ray up`, a job, `ray down`, as from a laptop with a home of its own."""
    os.environ |= {"HOME": str(home(scratch, "laptop")), "TMPDIR": str(scratch / "laptop"), "RAY_AUTH_MODE": "token"}
    file, log, trained = scratch / "onprem.yaml", scratch / "job.txt", set()
    file.write_text(yaml.safe_dump(cluster_config(scratch)))
    ray("get-auth-token", "--generate")
    ray("up", "-y", "--no-config-cache", str(file))
    command = ["dashboard", "--no-config-cache", "--port", str(PORT), str(file)]
    with started([f"{BIN}/ray", *command], scratch / "tunnel.txt", ROOT) as tunnel:
        wait_for(lambda: answers("127.0.0.1", PORT), tunnel, 60)
        job = f"python jobs/distill.py recipes/demo.yaml --run.storage $XDIST_STORAGE --track.uri $MLFLOW_TRACKING_URI {ACROSS}"
        command = ["job", "submit", "--address", f"http://127.0.0.1:{PORT}", "--working-dir", ".", "--", "bash", "-c", job]
        say(f"ray {' '.join(command)}")
        with started([f"{BIN}/ray", *command], log, ROOT) as client:
            wait_for(lambda: trained.update(training()) or client.poll() is not None, client, 1800)
    print(re.sub(r"^20.*\n", "", log.read_text(), flags=re.M))  # without Ray's own lines
    assert client.returncode == 0, f"the job's exit status is {client.returncode}"
    assert trained == set(WORKERS), f"training was seen on {sorted(trained)}"
    assert (scratch / "shared" / "demo" / "student" / "model.safetensors").exists()
    assert mlflow_status() == "FINISHED"
    say(f"trained on {' and '.join(WORKERS)}; the student is there, and MLflow has the run")

    ray("down", "-y", str(file))
    assert not left(HEAD), f"still on the head: {left(HEAD)}"
    say("no Ray on the head; on the workers it ends for want of a head, which takes it about two minutes")
    deadline = time.monotonic() + 240
    while found := [name for host in WORKERS for name in left(host)]:
        assert time.monotonic() < deadline, f"still on the workers: {found}"
        time.sleep(1)
    say("no Ray on any host")


def cluster_config(scratch: Path) -> dict[str, Any]:
    """clusters/onprem.yaml for these hosts. They take this interpreter's packages instead of a download, and keep apart what
    Ray writes in /tmp; the head offers no CPU, so that the two training workers are on the two others."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "clusters" / "onprem.yaml").read_text())
    config["cluster_name"] = CLUSTER
    config["provider"] |= {"head_ip": ADDRESSES[HEAD], "worker_ips": [ADDRESSES[host] for host in WORKERS]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(scratch / "key")}
    venv, pip, *others = config["setup_commands"]
    assert "-m venv" in venv
    assert "pip install" in pip
    config["setup_commands"] = [
        f"{sys.executable} -m venv --without-pip ~/xdist-env",
        f"printf '%s\\n' {sysconfig.get_path('purelib')} ~/xdist > $(echo ~/xdist-env/lib/python3*/site-packages)/shared.pth",
        f'cd ~/xdist-env/bin; for name in ray mlflow; do sed "1s|.*|#!$PWD/python|" {BIN}/$name > $name; chmod +x $name; done',
        *(command.replace("/mnt/shared/xdist", str(scratch / "shared")) for command in others),
    ]
    for key, cpus in (("head_start_ray_commands", 0), ("worker_start_ray_commands", 1)):
        *before, start = [command for command in config[key] if not command.endswith("ray stop")]  # no Ray is there yet
        config[key] = [*before, f"{start.strip()} --num-cpus={cpus} --temp-dir=$RAY_TMPDIR/ray --object-store-memory=200000000"]
    return config


def mlflow_status() -> str:
    import mlflow

    client = mlflow.MlflowClient(f"http://{ADDRESSES[HEAD]}:5000")
    (run,) = client.search_runs([client.get_experiment_by_name("xdist").experiment_id])
    return str(run.info.status)


# --- hosts ---


def make_hosts(scratch: Path, stack: contextlib.ExitStack) -> None:
    """Give the head's namespace, which is there, and the workers' what a machine has."""
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", scratch / key], check=True)
    (scratch / "shared").mkdir()
    if not Path("/run/sshd").exists():  # an empty folder that sshd locks itself into before a login
        Path("/run/sshd").mkdir()
        stack.callback(Path("/run/sshd").rmdir)
    ip(f"link add {BRIDGE} type bridge")
    ip(f"address add {NETWORK}.1/24 dev {BRIDGE}")
    ip(f"link set {BRIDGE} up")
    for host, address in ADDRESSES.items():
        if host != HEAD:
            ip(f"netns add {host}")
        ip(f"link add {host} type veth peer name eth0 netns {host}")
        ip(f"link set {host} master {BRIDGE} up")
        ip(f"-n {host} address add {address}/24 dev eth0")
        ip(f"-n {host} link set eth0 up")
        ip(f"-n {host} link set lo up")
        users = re.sub(r"^(root:.*:).*(:.*)$", rf"\g<1>{home(scratch, host)}\g<2>", Path("/etc/passwd").read_text(), flags=re.M)
        (scratch / host / "passwd").write_text(users)
        alone = f"ip netns exec {host} unshare --pid --fork --kill-child --mount-proc --uts sh -c".split()
        login = f"-o AuthorizedKeysFile={scratch}/key.pub -o PasswordAuthentication=no -o SetEnv=RAY_TMPDIR={scratch}/{host}"
        sshd = f"{shutil.which('sshd')} -D -e -f /dev/null -h {scratch}/host_key -o StrictModes=no -o PidFile=none {login}"
        command = [*alone, f"mount --bind {scratch}/{host}/passwd /etc/passwd && hostname {host} && exec {sshd}"]
        process = stack.enter_context(started(command, scratch / host / "sshd.txt"))
        wait_for(lambda address=address: answers(address, 22), process, 20)
        ssh = f"ssh -i {scratch}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=error root@{address}"
        found = subprocess.run([*ssh.split(), "cat /proc/1/comm; echo ~"], check=True, capture_output=True, text=True).stdout.split()
        assert found == ["sshd", str(home(scratch, host))], f"{host} has not its own processes and home: {found}"
        say(f"{host} answers at {address}")


def home(scratch: Path, host: str) -> Path:
    folder = scratch / host / "home"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".profile").write_text("PATH=$HOME/.local/bin:$PATH\n")
    (folder / ".bashrc").touch()
    return folder


def remove_hosts() -> None:
    """End and remove what bears the names of these hosts."""
    for host in HOSTS:
        while found := pids(host):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        ip(f"netns delete {host}", check=False)
        ip(f"link delete {host}", check=False)
    ip(f"link delete {BRIDGE}", check=False)
    for folder in Path("/tmp").glob(f"ray_ssh_*/{hashlib.sha256(CLUSTER.encode()).hexdigest()[:10]}"):  # Ray's ssh connections
        shutil.rmtree(folder)


def ip(arguments: str, check: bool = True) -> str:
    return subprocess.run(
        ["ip", *arguments.split()], check=check, stdout=subprocess.PIPE, stderr=None if check else subprocess.DEVNULL, text=True
    ).stdout


def pids(host: str) -> list[int]:
    return [int(pid) for pid in ip(f"netns pids {host}", check=False).split()]


def processes(host: str) -> list[str]:
    """What a host's processes call themselves; Ray's workers begin with `ray::`."""
    found = []
    for pid in pids(host):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0].split("/")[-1].strip())
    return found


def training() -> set[str]:
    return {host for host in HOSTS if any("RayTrainWorker" in name for name in processes(host))}


def left(host: str) -> list[str]:
    return [name for name in processes(host) if name in ("gcs_server", "raylet") or name.startswith("ray::")]


# --- commands ---


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def ray(*arguments: str) -> None:
    """A command of Ray's; what it says is shown where it fails."""
    say(f"ray {' '.join(arguments)}")
    done = subprocess.run([BIN / "ray", *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def answers(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
