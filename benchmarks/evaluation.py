"""Retrieval among many sentences, both directions: xdist.metrics beside sentence-transformers' TranslationEvaluator on the same
vectors, by seconds and by peak resident memory of a process that does nothing else.

    python -m benchmarks.evaluation ours|peer SENTENCES     prints mean accuracy, seconds and bytes
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.commands import Watched, command
from benchmarks.machine import own_peak
from benchmarks.measure import Measure, Options, seconds

DIMENSION, NOISE = 384, 4.0  # so much noise that about half of the sentences find their translation
PEER = "TranslationEvaluator"


def measures(options: Options) -> Iterator[Measure]:
    """Seconds and gigabytes at a size that the peer can hold (it keeps all n² cosines), and at 100,000 sentences."""
    both, large = options.size(20_000, 500), options.size(100_000, 2_000)
    runs: dict[str, list[Watched]] = {"ours": [], "peer": []}
    for _ in range(options.repeats):
        for side, found in runs.items():
            found.append(command(["-m", "benchmarks.evaluation", side, str(both)]))
    accuracies = {accuracy for found in runs.values() for accuracy in _printed(found, 0)}
    note = f"mean accuracy {', '.join(f'{accuracy:.5f}' for accuracy in sorted(accuracies))}"
    alone = [command(["-m", "benchmarks.evaluation", "ours", str(large)])]
    for count, ours, peer in ((both, runs["ours"], runs["peer"]), (large, alone, [])):
        against, about = (PEER, note) if peer else ("", f"{PEER} would hold {4 * large**2 / 1e9:.0f} GB of cosines")
        yield Measure(f"retrieval, {count:,} sentences", "s", _printed(ours, 1), _printed(peer, 1), against, less=True, note=about)
        yield Measure(f"retrieval memory, {count:,} sentences", "GB", _printed(ours, 2, 1e9), _printed(peer, 2, 1e9), against, less=True)


def _printed(runs: list[Watched], place: int, unit: float = 1.0) -> list[float]:
    return [float(run.lines[-1][1].split()[place]) / unit for run in runs]


def vectors(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random unit vectors and noisy copies of them, float32 (count, DIMENSION): stand-ins for sentences and their translations."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((count, DIMENSION), dtype=np.float32)
    b = a + NOISE * rng.standard_normal((count, DIMENSION), dtype=np.float32)
    a, b = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (a, b))
    return a, b


def ours(a: np.ndarray, b: np.ndarray) -> float:
    """Mean accuracy of both directions."""
    from xdist import metrics

    return float(np.mean(metrics.retrieved(a, b)))


class Stub:
    """A model that has the vectors already: sentence s7 has the seventh of one side, t7 of the other."""

    def __init__(self, a: np.ndarray, b: np.ndarray):
        self.sides, self.model_card_data = {"s": a, "t": b}, self

    def encode(self, sentences: list[str], **_: Any) -> Any:
        """Tensors, as the evaluator wants them."""
        import torch

        return list(torch.from_numpy(self.sides[sentences[0][0]]))

    def set_evaluation_metrics(self, *_: Any) -> None:
        """Where the evaluator leaves its results; nobody reads them here."""


def peer(a: np.ndarray, b: np.ndarray) -> float:
    """The same by the peer."""
    from sentence_transformers.sentence_transformer.evaluation import TranslationEvaluator

    sources, targets = ([f"{side}{index}" for index in range(len(a))] for side in "st")
    model: Any = Stub(a, b)
    return float(TranslationEvaluator(sources, targets, write_csv=False)(model)["mean_accuracy"])


if __name__ == "__main__":
    given, found = vectors(int(sys.argv[2])), [0.0]
    side = {"ours": ours, "peer": peer}[sys.argv[1]]
    side(given[0][:64], given[1][:64])  # imports and thread pools are there when the clock starts
    spent = seconds(lambda: found.append(side(*given)))
    print(found[-1], spent, own_peak())
