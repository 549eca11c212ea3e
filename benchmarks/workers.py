"""Twice the cores and twice the workers: the same training steps by two workers on two cores and by one on one core, and the same
sentences by as many teachers. Ray's own processes keep to these cores too, as they would on machines of that size."""

import os
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import ready
from benchmarks.machine import machine
from benchmarks.measure import Measure, Options, in_turns
from benchmarks.overhead import embed_rate, embed_run, train_rate


def measures(options: Options) -> Iterator[Measure]:
    """Tokens and sentences per second; nothing where there is one core, or where processes cannot be kept to some of them."""
    if machine()["cores"] < 2 or not hasattr(os, "sched_setaffinity"):
        return
    train = {"steps": options.size(100, 6), "log_every": options.size(10, 2), "micro_batches": 2}
    runs = {
        count: ready.recipe(
            options, "workers", train=train, cluster={"num_cpus": 2, "workers": count, "cpus_per_worker": 1, "gpus_per_worker": 0}
        )
        for count in (1, 2)
    }
    ready.make(runs[1])
    found = in_turns(
        {str(count): partial(_on_cores, count, partial(train_rate, recipe)) for count, recipe in runs.items()}, options.repeats
    )
    yield Measure("training, 2 workers", "tokens/s", found["2"], found["1"], "1 worker, 1 core")
    recipe, prepared, fingerprint = embed_run(options)
    sides = {str(count): partial(_on_cores, count, partial(embed_rate, recipe, prepared, fingerprint, count)) for count in (1, 2)}
    found = in_turns(sides, options.repeats)
    yield Measure("embedding, 2 actors", "sentences/s", found["2"], found["1"], "1 actor, 1 core")


def _on_cores(count: int, work: Callable[[], float]) -> float:
    """What work gives while this thread, and every process that it starts, keeps to so many cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        return work()
    finally:
        os.sched_setaffinity(0, before)
