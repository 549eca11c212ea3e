"""Commands: when each of their lines came, and the peak memory of all their processes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from benchmarks.machine import ROOT
from xdist.cluster import WORKERS

LOOK_EVERY = 0.25  # seconds between looks at memory

# The memory and kernel settings that xdist gives its own workers: its side of a measure that runs outside of one gets them too.
SETTINGS = {name: WORKERS[name] for name in ("GLIBC_TUNABLES", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")}


@dataclass(frozen=True)
class Watched:
    """A command that ended: its seconds, the peak bytes of all its processes, and its lines with the seconds at which they came."""

    seconds: float
    peak: float
    lines: list[tuple[float, str]]

    def first(self, *beginnings: str) -> float:
        """Seconds to the first line that begins so, spaces left aside."""
        return next(at for at, line in self.lines if line.strip().startswith(beginnings))


def command(arguments: Sequence[str], until: str | None = None, plain: bool = False) -> Watched:
    """Run Python with these arguments in the project's folder; with `until`, interrupt it at the first line that begins so; `plain`,
    without our SETTINGS, as a peer's user would.
    Memory is the proportional set size, in which a shared page counts once, looked at every LOOK_EVERY."""
    started, lines, highest, ended = time.monotonic(), [], [0.0], threading.Event()
    env = {name: value for name, value in os.environ.items() if not plain or SETTINGS.get(name) != value}
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    watcher = threading.Thread(target=_watch_memory, args=(process.pid, highest, ended))
    watcher.start()
    try:
        for line in process.stdout or ():
            lines.append((time.monotonic() - started, line.rstrip("\n")))
            if until and line.strip().startswith(until):
                process.send_signal(signal.SIGINT)
                until, stopped = None, True
                break
        else:
            stopped = False
        process.communicate(timeout=120 if stopped else None)
    finally:
        ended.set()
        watcher.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode and not stopped:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n" + "\n".join(line for _, line in lines[-20:]))
    return Watched(time.monotonic() - started, highest[0], lines)


def _watch_memory(pid: int, highest: list[float], ended: threading.Event) -> None:
    while True:
        total = 0.0
        with contextlib.suppress(psutil.Error):
            for one in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += one.memory_full_info().pss
        highest[0] = max(highest[0], total)
        if ended.wait(LOOK_EVERY):
            return
