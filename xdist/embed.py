"""Embed: each source sentence once, with the teacher, on a pool of actors.

Reads <run>/corpus/, writes missing vectors to the embedding store, shard by shard. Run again, it embeds nothing; with
more text, only sentences that the store has never seen.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xdist import cluster, files
from xdist.config import Recipe
from xdist.corpus import Prepared
from xdist.progress import Progress
from xdist.store import Fingerprint, VectorStore


@dataclass(frozen=True)
class Embedded:
    """What embed did: sentences in the corpus, those that the store held before, those embedded now, and the time."""

    sentences: int
    cached: int
    embedded: int
    seconds: float


def embed(recipe: Recipe, prepared: Prepared, fingerprint: Fingerprint) -> Embedded:
    """Embed what the store lacks. Needs a connected Ray."""
    started = time.monotonic()
    missing = missing_per_shard(recipe, prepared, VectorStore(recipe.run.storage, fingerprint))
    todo = [{"shard": shard} for shard, count in enumerate(missing) if count]
    cpus, gpus = cluster.resources(recipe.cluster)
    settings = recipe.model_dump(mode="json")
    if todo:
        cluster.await_room(recipe.cluster, 1, cpus, gpus, "embed")
        with Progress("embed", "sentences", sum(missing)) as progress:
            work = cluster.stream(
                todo,
                TeacherActor,
                progress,
                actors=cluster.teacher_actors(recipe.cluster),
                cpus=cpus,
                gpus=gpus,
                settings=settings,
                shards=prepared.shards,
                fingerprint=asdict(fingerprint),
                threads=0 if gpus else cpus,
            )
            embedded = sum(result["embedded"] for result in work)
    else:
        embedded = 0
    return Embedded(prepared.sentences, prepared.sentences - sum(missing), embedded, time.monotonic() - started)


def missing_per_shard(recipe: Recipe, prepared: Prepared, store: VectorStore) -> list[int]:
    """How many sentences of each shard the store lacks."""
    return [
        len(store.missing(prepared.shards, shard, shard_hashes(recipe.folder, shard))) if count else 0
        for shard, count in enumerate(prepared.per_shard)
    ]


def shard_hashes(folder: str, shard: int) -> np.ndarray:
    """Hashes of a shard's source sentences, uint64."""
    return np.asarray(files.read_table(f"{folder}/corpus/{shard:05d}.parquet", ["hash"])["hash"].to_numpy())


class TeacherActor:
    """Holds the teacher; embeds the sentences of a shard that the store lacks, and writes them as one segment."""

    def __init__(self, settings: dict[str, Any], shards: int, fingerprint: dict[str, Any], threads: int):
        import torch

        from xdist import finetune

        if threads:
            torch.set_num_threads(threads)
        recipe = Recipe(**settings)
        self.folder, self.shards, self.settings = recipe.folder, shards, recipe.teacher
        self.store = VectorStore(recipe.run.storage, Fingerprint(**fingerprint))
        self.teacher = finetune.load(recipe)

    def __call__(self, item: dict[str, Any], board: cluster.RemoteBoard) -> dict[str, Any]:
        """Embed one shard; a shard that another run embedded meanwhile costs nothing."""
        shard = item["shard"]
        table = files.read_table(f"{self.folder}/corpus/{shard:05d}.parquet", ["hash", "source"])
        hashes = table["hash"].to_numpy()
        missing = self.store.missing(self.shards, shard, hashes)
        if len(missing):
            texts = table["source"].take(missing).to_pylist()
            vectors = self.teacher.encode(
                texts, self.settings.batch_tokens, lambda done: board.count(str(shard), done), self.settings.max_length
            )
            self.store.write(self.shards, shard, hashes[missing], vectors)
        return {"shard": shard, "embedded": len(missing)}
