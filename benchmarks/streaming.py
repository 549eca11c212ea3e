"""Streaming: how fast generated TSV.gz is prepared, with all filters but language identification, and the peak memory of all
processes together while it is prepared and embedded with a stub-sized teacher."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from benchmarks import ready, texts
from benchmarks.commands import Watched, command
from benchmarks.machine import machine
from benchmarks.measure import Measure, Options

STAGE = re.compile(r"^(?:read|group)\s+([\d,]+) \w+\s+([\d,]+)/s\s+in ")


def measures(options: Options) -> Iterator[Measure]:
    """Pairs/s and bytes at 100,000 and 1,000,000 pairs; with --large at 10,000,000 too."""
    teacher = ready.stub_teacher(options)
    sizes = [2_000, 4_000] if options.quick else [100_000, 1_000_000] + ([10_000_000] if options.large else [])
    first: list[float] = []
    for pairs in sizes:
        texts.generated(options.folder / f"text{pairs}", pairs)
        recipe = _recipe(options.folder, pairs, teacher)
        prepared, embedded = (command([f"jobs/{job}.py", recipe]) for job in ("prepare", "embed"))
        rate, peak = pairs / stage_seconds(prepared), max(prepared.peak, embedded.peak) / 1e9
        yield Measure(f"prepare {pairs:,} pairs", "pairs/s", [rate], note=f"{rate / machine()['cores']:,.0f} a core, once Ray runs")
        yield Measure(f"peak memory, {pairs:,} pairs", "GB", [peak], first, f"{sizes[0]:,} pairs" if first else "", less=True)
        first = first or [peak]


def stage_seconds(run: Watched) -> float:
    """Seconds of both passes of prepare, from the last lines of their progress: rows ÷ rows/s."""
    found = [match.groups() for _, line in run.lines if (match := STAGE.match(line))]
    counts = [[float(number.replace(",", "")) for number in pair] for pair in found]
    return sum(done / rate for done, rate in counts)


def _recipe(folder: Path, pairs: int, teacher: str) -> str:
    settings = {
        "run": {"name": f"streaming{pairs}", "storage": str(folder / "runs")},
        "data": {"root": str(folder), "languages": ["xx"], "corpora": [{"name": "generated", "path": f"text{pairs}"}]},
        "teacher": {"model": teacher, "max_length": 32},
        "cluster": {"cpus_per_worker": 1},
    }
    path = folder / f"streaming{pairs}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)
