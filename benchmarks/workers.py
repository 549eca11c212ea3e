"""Two workers beside one, a core each: training the same steps, and embedding the same sentences."""

from collections.abc import Iterator
from functools import partial

from benchmarks import ready
from benchmarks.machine import machine
from benchmarks.measure import Measure, Options, in_turns
from benchmarks.overhead import embed_rate, embed_run, train_rate


def measures(options: Options) -> Iterator[Measure]:
    """Tokens and sentences per second; nothing on a machine with one core."""
    if machine()["cores"] < 2:
        return
    train = {"steps": options.size(100, 6), "log_every": options.size(10, 2), "micro_batches": 2}
    runs = {
        count: ready.recipe(
            options, "workers", train=train, cluster={"num_cpus": 2, "workers": count, "cpus_per_worker": 1, "gpus_per_worker": 0}
        )
        for count in (1, 2)
    }
    ready.make(runs[1])
    found = in_turns({str(count): partial(train_rate, recipe) for count, recipe in runs.items()}, options.repeats)
    yield Measure("training, 2 workers", "tokens/s", found["2"], found["1"], "1 worker")
    recipe, prepared, fingerprint = embed_run(options)
    sides = {str(count): partial(embed_rate, recipe, prepared, fingerprint, count) for count in (1, 2)}
    found = in_turns(sides, options.repeats)
    yield Measure("embedding, 2 actors", "sentences/s", found["2"], found["1"], "1 actor")
