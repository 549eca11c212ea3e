"""Ray's price: training inside TorchTrainer beside the bare loop, embedding inside Ray Data beside the bare encoder. The bare ones
run in processes of their own, so that both sides start with empty caches.

    python -m benchmarks.overhead RECIPE     the bare encoder on a prepared run's English sentences: sentences/s
"""

import contextlib
import io
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

from benchmarks import ready, texts
from benchmarks.commands import command
from benchmarks.measure import Measure, Options, in_turns, seconds
from xdist import cluster, corpus, embed, encoder, files, launch, recipes, track, weights
from xdist.config import Recipe
from xdist.corpus import Prepared
from xdist.progress import Progress
from xdist.store import Fingerprint

RATE = re.compile(r"([\d,]+) tokens/s")


def measures(options: Options) -> Iterator[Measure]:
    """Tokens per second of training, sentences per second of embedding, both in steady state."""
    recipe = ready.recipe(options, "overhead", train={"steps": options.size(150, 6), "log_every": options.size(10, 2)})
    ready.make(recipe)
    bare = ["-m", "benchmarks.training", ready.written(recipe, options)]
    found = in_turns({"ray": lambda: train_rate(recipe), "bare": lambda: printed(bare)}, options.repeats)
    yield Measure("training inside Ray", "tokens/s", found["ray"], found["bare"], "the bare loop")
    recipe, prepared, fingerprint = embed_run(options)
    bare = ["-m", "benchmarks.overhead", ready.written(recipe, options)]
    sides = {"ray": lambda: embed_rate(recipe, prepared, fingerprint), "bare": lambda: printed(bare)}
    found = in_turns(sides, options.repeats)
    yield Measure("embedding inside Ray", "sentences/s", found["ray"], found["bare"], "the bare encoder")


def printed(arguments: list[str]) -> float:
    """The number that a command prints last."""
    return float(command(arguments).lines[-1][1])


def train_rate(recipe: Recipe) -> float:
    """Tokens per second of a training in Ray Train, from its own lines, without the first of them."""
    files.remove(f"{recipe.folder}/checkpoints")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), cluster.connected(recipe.cluster), track.run(recipe, "benchmark") as run_id:
        launch.train(recipe, run_id, track.uri_of(recipe))
    return steady(out.getvalue())


def steady(lines: str) -> float:
    """The mean rate of lines of equal work but the first, in which kernels are compiled."""
    rates = [float(found.replace(",", "")) for found in RATE.findall(lines)]
    return statistics.harmonic_mean(rates[1:])


def embed_run(options: Options) -> tuple[Recipe, Prepared, Fingerprint]:
    """A run of many English sentences (their translations are only there to make pairs), prepared."""
    rows = [f"{text}\t{text[::-1]}" for text in texts.many(options.size(20_000, 400))]
    path = options.folder / "many.tsv"
    path.write_text("\n".join(["source\ttarget", *rows]) + "\n", encoding="utf-8")
    data = {"root": str(options.folder), "languages": ["xx"], "corpora": [{"name": "many", "path": path.name}], "shards": 8}
    recipe = ready.recipe(options, "embedding", data=data)
    with cluster.connected(recipe.cluster):
        prepared = corpus.prepare(recipe)
    folder = weights.located(recipe.teacher)
    return recipe, prepared, weights.fingerprint(recipe.teacher, folder, encoder.load(folder).dimension)


class Seen(Progress):
    """Progress that keeps when how much was done."""

    def __init__(self, total: int):
        super().__init__("embed", "sentences", total)
        self.seen: list[tuple[float, int]] = []

    def update(self, done: int, share: float = 0.0) -> None:
        """Keep what is new, and show nothing."""
        if done and (not self.seen or done > self.seen[-1][1]):
            self.seen.append((time.monotonic(), done))

    def rate(self) -> float:
        """Per second, from the first progress to the last."""
        (start, first), (end, last) = self.seen[0], self.seen[-1]
        return (last - first) / (end - start)


def embed_rate(recipe: Recipe, prepared: Prepared, fingerprint: Fingerprint, actors: int = 0) -> float:
    """Sentences per second of the embed stage on an empty store; `actors` of one core each, or as many as the stage takes."""
    files.remove(f"{recipe.run.storage}/store")
    progress = Seen(prepared.sentences)
    with cluster.connected(recipe.cluster):
        cpus, gpus = (1, 0.0) if actors else cluster.resources(recipe.cluster)
        work = cluster.stream(
            [{"shard": shard} for shard in range(prepared.shards)], embed.TeacherActor, progress,
            actors=actors or cluster.teacher_actors(recipe.cluster), cpus=cpus, gpus=gpus, settings=recipe.model_dump(mode="json"),
            shards=prepared.shards, fingerprint=asdict(fingerprint), threads=0 if gpus else cpus,
        )  # fmt: skip
        assert sum(result["embedded"] for result in work) == prepared.sentences
    return progress.rate()


def _bare(recipe: Recipe) -> float:
    names = files.names(f"{recipe.folder}/corpus", ".parquet")
    found = [text for name in names for text in files.read_table(f"{recipe.folder}/corpus/{name}", ["source"])["source"].to_pylist()]
    teacher = encoder.load(weights.located(recipe.teacher))
    teacher.encode(found[:256])
    return len(found) / seconds(lambda: teacher.encode(found, max_length=recipe.teacher.max_length))


if __name__ == "__main__":
    print(_bare(recipes.load(sys.argv[1])))
