"""How long a user waits: seconds from the command to the first line of progress and to the first training step of the demo, on an
empty storage with libraries and models read from the disk, on an empty storage once they are in memory, and when a run goes on."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from benchmarks import ready
from benchmarks.commands import Watched, command
from benchmarks.measure import Measure, Options

FIRST = {"cold": "read", "warm": "read", "continued": "train"}  # how the first line begins that tells of work
NOTES = {"cold": "empty storage, files out of memory", "warm": "empty storage", "continued": "stopped at its first step"}


def measures(options: Options) -> Iterator[Measure]:
    """Seconds."""
    runs: dict[str, list[Watched]] = {name: [] for name in FIRST}
    for _ in range(min(2, options.repeats)):
        for name, found in runs.items():
            found.append(_run(options, name))
    for name, found in runs.items():
        yield Measure(f"first progress, {name}", "s", [run.first(FIRST[name]) for run in found], less=True, note=NOTES[name])
    for name, found in runs.items():
        yield Measure(f"first training step, {name}", "s", [run.first("step ") for run in found], less=True, note=NOTES[name])


def _run(options: Options, name: str) -> Watched:
    """The demo until its first training step."""
    storage = options.folder / "start"
    if name != "continued":
        shutil.rmtree(storage, ignore_errors=True)
    if name == "cold":
        _forget(Path(sysconfig.get_path("purelib")))
    given = ["--run.storage", str(storage), "--train.log_every", "1", "--teacher.model", options.model]
    recipe = ready.written(ready.recipe(options, "start"), options) if options.quick else "recipes/demo.yaml"
    return command(["jobs/distill.py", recipe, *given], until="step ")


def _forget(folder: Path) -> None:
    """Have the operating system drop the files of a folder from memory, as far as it can and no process uses them."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            with open(path, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
