"""Preflight: what would fail later, found in seconds and before machines are paid for. Each finding names the machine and the remedy.

MLflow's server is asked whether it is there. On a Ray that was joined, every machine says whether it has the same versions, sees
the storage and may write to it, can read the teacher, and reaches MLflow. Machines that an autoscaler starts later are not asked.
"""

import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from xdist import cluster, files
from xdist.config import Recipe
from xdist.errors import Refused
from xdist.progress import say

if TYPE_CHECKING:
    from xdist.planning import Plan

PACKAGES = ("ray", "torch", "transformers", "sentence-transformers", "pyarrow")
SCRATCH = 5e9  # bytes for copies of models and checkpoints
Finding = dict[str, Any]  # versions, problems, the file that it wrote, the digest of its teacher
SHARE = "set run.storage to what all machines share: s3://…, gs://…, a shared folder"


def check(recipe: Recipe, tracked: bool) -> None:
    """Ask every machine; about MLflow too, if the job is `tracked`. Needs a connected Ray. Raises Refused with all that was found."""
    from xdist import track

    server = track.server(track.uri_of(recipe)) if tracked else None
    if server and (away := track.unreachable(server)):
        raise Refused(f"track.uri: MLflow cannot be reached at {server}: {away}; start it, or give another")
    if not cluster.on_cluster(recipe.cluster):
        return
    folder, token = f"{recipe.folder}/preflight", secrets.token_hex(8)
    files.write(f"{folder}/driver", token.encode())
    try:
        found = cluster.on_each_node(_look, settings=recipe.model_dump(mode="json"), token=token, server=server)
        problems = list(_problems(recipe, found, _versions(), files.names(folder)))
    finally:
        files.remove(folder)
    if problems:
        raise Refused("preflight: nothing was started, since\n  " + "\n  ".join(problems))
    say(f"preflight {len(found)} machine(s) see the storage, the teacher{' and MLflow' if server else ''}, with the same versions")


def _problems(recipe: Recipe, found: list[tuple[str, Finding]], versions: dict[str, str], written: list[str]) -> Iterator[str]:
    """What machines found themselves, and what only shows in comparison; `written` are the files that the driver sees."""
    first = found[0]
    for name, looked in found:
        yield from (f"{name}: {problem}" for problem in looked["problems"])
        other = [
            f"{package} {has} (the driver {versions[package]})" for package, has in looked["versions"].items() if has != versions[package]
        ]
        if other:
            yield f"{name}: has {', '.join(other)}; install the same on all machines, by constraints.txt"
        if looked["wrote"] and looked["wrote"] not in written:
            yield f"{name}: the driver does not see what it writes to {recipe.run.storage}; {SHARE}"
        if looked["teacher"] and first[1]["teacher"] and looked["teacher"] != first[1]["teacher"]:
            yield f"{name}: its copy of {recipe.teacher.model} is another than that of {first[0]}; copy it anew"


def _versions() -> dict[str, str]:
    return {"Python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def _look(settings: dict[str, Any], token: str, server: str | None) -> Finding:
    """What one machine finds, in a process of its own."""
    from xdist import track, weights

    recipe, problems = Recipe(**settings), []
    folder, name, wrote, teacher = f"{recipe.folder}/preflight", secrets.token_hex(8), "", ""
    try:
        seen = files.read(f"{folder}/driver").decode() if files.exists(f"{folder}/driver") else ""
        if seen == token:
            files.write(f"{folder}/{name}", token.encode())
            wrote = name
        else:
            problems.append(f"does not see what the driver writes to {recipe.run.storage}; {SHARE}")
    except (OSError, Refused) as error:
        problems.append(f"cannot use storage {recipe.run.storage}: {error}; look at its rights and credentials there")
    try:
        located = weights.located(recipe.teacher)
        teacher = weights.fingerprint(recipe.teacher, located, 0).digest
    except Refused as error:
        problems.append(str(error))
    if server and (away := track.unreachable(server)):
        problems.append(f"track.uri: MLflow cannot be reached at {server}: {away}")
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < SCRATCH:
        problems.append(
            f"{free / 1e9:.1f} GB are free in {tempfile.gettempdir()}, {SCRATCH / 1e9:.0f} GB are needed; free some, or set TMPDIR"
        )
    return {"versions": _versions(), "problems": problems, "wrote": wrote, "teacher": teacher}


def room(recipe: Recipe, plan: "Plan") -> None:
    """Raises Refused where a local storage has less space than the plan needs; other storages do not tell."""
    from xdist import planning

    if not files.is_local(recipe.run.storage):
        return
    needed = planning.disk_bytes(plan)
    free = shutil.disk_usage(files.resolve(recipe.folder)[1]).free
    if needed > free:
        raise Refused(
            f"run.storage: {needed / 1e9:.1f} GB are needed in {recipe.run.storage} and {free / 1e9:.1f} GB are free; "
            "free some, or set run.storage to another disk"
        )
