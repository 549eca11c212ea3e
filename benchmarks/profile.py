"""Where the time goes: shares of the kinds of operations in encoding and in a training step, as a table in Markdown.

python -m benchmarks.profile
"""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import ready, texts
from benchmarks.__main__ import ENVIRONMENT, HERE
from benchmarks.commands import SETTINGS
from benchmarks.machine import ROOT
from benchmarks.measure import Options
from xdist import encoder, shards, train, weights
from xdist.batching import Position

KINDS = {
    "matrix products of the layers, with bias, GELU and residual where they are fused": ("addmm", "mm", "_linear_pointwise"),
    "products of attention": ("bmm", "baddbmm"),
    "softmax": ("_softmax", "_softmax_backward_data"),
    "layer norm": ("native_layer_norm", "native_layer_norm_backward"),
    "GELU": ("gelu", "gelu_backward"),
    "copies: heads split and joined, weights and logits converted": ("copy_", "cat"),
    "optimiser": ("_fused_adamw_", "_foreach_norm", "linalg_vector_norm"),
    "token table": ("index_select", "embedding_dense_backward", "index_add_"),
}
REST = "everything else"


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Per cent of the time that each kind of operation takes, where each operation's own time counts."""
    from torch.profiler import ProfilerActivity, profile

    work()  # kernels are compiled, caches filled
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    taken = dict.fromkeys([*KINDS, REST], 0.0)
    for event in found.key_averages():
        taken[kind_of.get(event.key.rpartition("::")[2], REST)] += event.self_cpu_time_total
    whole = sum(taken.values())
    return {kind: 100 * time / whole for kind, time in taken.items()}


def table(sides: dict[str, dict[str, float]]) -> str:
    """The kinds by their largest share."""
    lines = ["| operation | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    kinds = [kind for kind in KINDS if any(round(side[kind]) for side in sides.values())]
    for kind in [*sorted(kinds, key=lambda kind: -max(side[kind] for side in sides.values())), REST]:
        lines.append(f"| {kind} | " + " | ".join(f"{side[kind]:.0f} %" for side in sides.values()) + " |")
    return "\n".join(lines)


def _measured(folder: Path) -> str:
    options = Options(folder)
    recipe = ready.recipe(options, "profile", train={"steps": 12})
    ready.make(recipe)
    teacher = encoder.load(weights.located(recipe.teacher))
    some = texts.clinical(lambda rows: [len(row) for row in teacher.tokenize(rows)], 300)
    student = encoder.load(f"{recipe.folder}/initial", recipe.train.precision, recipe.train.attention)
    train.freeze_unused(student)
    optimizer = train.make_optimizer(student, recipe)
    steps = [step for _, step in itertools.islice(shards.order(recipe).batches(Position()), recipe.train.steps)]

    def trained() -> None:
        for step in steps:
            train.step(student, student, optimizer, step, recipe.train, 1e-3, 1, False)

    return table({"encoding": shares(lambda: teacher.encode(some)), "a training step": shares(trained)})


if __name__ == "__main__":
    if HERE not in os.environ:
        sys.exit(subprocess.run([sys.executable, "-m", "benchmarks.profile"], cwd=ROOT, env=os.environ | ENVIRONMENT | SETTINGS).returncode)
    with tempfile.TemporaryDirectory() as scratch:
        print(_measured(Path(scratch)))
