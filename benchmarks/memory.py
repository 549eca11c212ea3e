"""Does memory grow with the corpus? Prepare and embed generated corpora of 200,000 and 2,000,000 pairs with a stub-sized
teacher, and compare the peak memory of all processes together (proportional set size, so shared pages count once).

    python benchmarks/memory.py [FOLDER]        about five minutes and 1.5 GB of disk on two cores
"""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def corpus(folder: Path, pairs: int, files: int = 4) -> None:
    """Random sentences of 5 to 25 syllable words and their mirror images, as TSV.gz."""
    rng = random.Random(0)
    words = ["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(20_000)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        with gzip.open(folder / f"part{number}.tsv.gz", "wt", compresslevel=1, encoding="utf-8") as stream:
            stream.write("source\ttarget\n")
            for _ in range(pairs // files):
                picked = rng.choices(words, k=rng.randint(5, 25))
                stream.write(f"{' '.join(picked)}\t{' '.join(word[::-1] for word in picked)}\n")


def peak(command: list[str]) -> tuple[float, float]:
    """(peak bytes of the command and all its descendants, seconds)."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    highest, started, ended = [0.0], time.monotonic(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            total = 0
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    total += one.memory_full_info().pss
                except psutil.Error:
                    continue
            highest[0] = max(highest[0], total)

    thread = threading.Thread(target=watch)
    thread.start()
    code = process.wait()
    ended.set()
    thread.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return highest[0], time.monotonic() - started


def main(folder: Path) -> None:
    """Measure both sizes and print the ratio."""
    from conftest import tiny_checkpoint

    os.environ["RAY_AUTH_MODE"] = "disabled"
    teacher = tiny_checkpoint(folder / "teacher", layers=1)
    results = {}
    for pairs in (200_000, 2_000_000):
        corpus(folder / f"text{pairs}", pairs)
        recipe = {
            "run": {"name": f"memory{pairs}", "storage": str(folder / "runs")},
            "data": {"root": str(folder), "languages": ["xx"], "corpora": [{"name": "generated", "path": f"text{pairs}"}]},
            "teacher": {"model": str(teacher), "max_length": 32},
            "cluster": {"num_cpus": 2, "cpus_per_worker": 1},
        }
        path = folder / f"{pairs}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        bytes_, seconds = peak([sys.executable, "jobs/embed.py", str(path)])
        results[pairs] = bytes_
        print(f"{pairs:>9,} pairs   peak {bytes_ / 1e9:.2f} GB   {seconds:.0f} s", flush=True)
    print(json.dumps({"ratio": round(results[2_000_000] / results[200_000], 3)}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
