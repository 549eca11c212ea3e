"""How fast xdist is, beside what its users have. Both sides of a measure take turns in one run; medians and best values are kept.

    python -m benchmarks                            all of them (make bench)
    python -m benchmarks embedding training         some of them (make bench BENCH="embedding training")
    python -m benchmarks --quick                    a trial of the code at tiny sizes; keeps no results

Writes benchmarks/results.json, where a measure replaces the one of its name, and from it the table and plot of docs/performance.md.
"""

import argparse
import datetime
import importlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.commands import SETTINGS
from benchmarks.machine import ROOT, machine, versions
from benchmarks.measure import MODEL, Options

NAMES = ("embedding", "training", "streaming", "overhead", "workers", "start", "evaluation")
RESULTS, PAGE = ROOT / "benchmarks" / "results.json", ROOT / "docs" / "performance.md"
HERE = "XDIST_BENCHMARK"  # set in the process that measures

LIKE_WORKERS = ("training", "overhead")  # these measure training and encoding outside of a worker, with the SETTINGS of one
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "RAY_AUTH_MODE": "disabled", "RAY_BACKEND_LOG_LEVEL": "fatal", HERE: "1",
}  # fmt: skip


def main() -> int:
    """Each benchmark in a process of its own; 1 where one of them failed."""
    arguments = _arguments()
    if HERE in os.environ:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # so that commands heed it that are started in the background
        _measure(arguments)
        return 0
    from benchmarks import results

    command = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
    without = [argument for argument in command if argument not in NAMES]
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or (Path(scratch) / "results.json" if arguments.quick else RESULTS)
        failed = []
        for name in arguments.names or NAMES:
            print(f"{name} …", flush=True)
            env = os.environ | ENVIRONMENT | (SETTINGS if name in LIKE_WORKERS else {})
            if subprocess.run([*without, name, "--out", str(out)], cwd=ROOT, env=env).returncode:
                failed.append(name)
        entries = results.merge(out, [])
        print("\n" + results.table(entries))
        if out == RESULTS and entries:
            results.document(PAGE, entries)
    print(f"\nfailed: {', '.join(failed)}" if failed else "")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; all when none is given")
    parser.add_argument("--repeats", type=int, default=None, help="turns of each side (3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one turn: to see whether the code works")
    parser.add_argument(
        "--large",
        action="store_true",
        help="streaming: 10,000,000 pairs too, which takes long and some 7 GB in the temporary folder (TMPDIR)",
    )
    parser.add_argument("--model", default=MODEL, help="teacher, as in a recipe's teacher.model")
    parser.add_argument(
        "--out", type=lambda path: Path(path).resolve(), default=None, help="results elsewhere; docs/performance.md is then left alone"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return arguments


def _measure(arguments: argparse.Namespace) -> None:
    from benchmarks import results

    (name,) = arguments.names
    facts = {
        "machine": machine(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks {name}" + (" --large" if arguments.large else ""),
    }
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            Path(folder), arguments.model, arguments.repeats or (1 if arguments.quick else 3), arguments.quick, arguments.large
        )
        for measure in importlib.import_module(f"benchmarks.{name}").measures(options):
            found = results.entry(measure, facts)
            results.merge(arguments.out, [found])
            print("  " + "  ".join(results.row(found)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
