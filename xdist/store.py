"""The embedding store: teacher vectors keyed by text hash, under a fingerprint of everything that changes a vector.

    <storage>/store/<fingerprint>/fingerprint.json
    <storage>/store/<fingerprint>/<shards>-<shard>-<digest>.arrow      hash: uint64, vector: float16[dimension]

A segment holds vectors of sentences of one shard (hash mod shards = shard). Shard counts are powers of two, so a run
with another count finds its sentences in the segments whose residue agrees. A segment's name ends in a digest of its
hashes: written twice, it is the same file. Segments are only ever added, so any number of runs may share a store.
"""

import functools
import json
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import xxhash

from xdist import files
from xdist.errors import Refused


@dataclass(frozen=True)
class Fingerprint:
    """Everything that changes a teacher's vector. Arithmetic is left out: bfloat16 and float32 agree to a cosine of 0.999,
    and a laptop and a GPU box should share a store."""

    model: str
    weights: str
    dimension: int
    max_length: int
    prompt: str
    modules: str
    normalised: bool = True

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits. The model's name or path does not count: the weights' digest does."""
        identity = {key: value for key, value in asdict(self).items() if key != "model"}
        return xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())


class VectorStore:
    """Vectors of one teacher. Reading and writing need no lock: segments are immutable."""

    def __init__(self, storage: str, fingerprint: Fingerprint):
        self.folder = f"{storage}/store/{fingerprint.digest}"
        self.dimension = fingerprint.dimension
        marker = f"{self.folder}/fingerprint.json"
        if not files.exists(marker):
            files.write_json(marker, asdict(fingerprint))
            return
        found = files.read_json(marker)
        differences = [k for k, v in asdict(fingerprint).items() if k != "model" and found.get(k) != v]
        if differences:
            raise Refused(
                f"{marker} describes another teacher (differs in {', '.join(differences)}): the folder was moved or edited. "
                f"Delete {self.folder}, or set run.storage to another place"
            )

    def segments(self, shards: int, shard: int) -> list[str]:
        """Files that may hold sentences of this shard."""
        return [name for name in files.names(self.folder, ".arrow") if _overlaps(name, shards, shard)]

    def missing(self, shards: int, shard: int, hashes: np.ndarray) -> np.ndarray:
        """Indices into `hashes` (uint64, all of this shard) that the store does not hold."""
        held = [_hashes(f"{self.folder}/{name}") for name in self.segments(shards, shard)]
        return np.flatnonzero(~np.isin(hashes, np.concatenate(held))) if held else np.arange(len(hashes))

    def write(self, shards: int, shard: int, hashes: np.ndarray, vectors: np.ndarray) -> None:
        """Add vectors (n, dimension) of sentences of this shard as one segment. Raises Refused for NaN or a wrong shape."""
        if vectors.shape != (len(hashes), self.dimension):
            raise Refused(f"{self.folder}: vectors of shape {vectors.shape}, expected ({len(hashes)}, {self.dimension})")
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is refused here
            half = np.ascontiguousarray(vectors, dtype=np.float16)
        if not np.isfinite(half).all():
            raise Refused("the teacher gave vectors that are not finite; set train.precision: float32, or look at the teacher's weights")
        vector = pa.FixedSizeListArray.from_arrays(pa.array(half.reshape(-1)), self.dimension)
        table = pa.table({"hash": hashes, "vector": vector}).replace_schema_metadata({"content": _content(hashes, half)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        digest = xxhash.xxh3_64_hexdigest(hashes.tobytes())
        files.write(f"{self.folder}/{shards}-{shard:05d}-{digest}.arrow", sink.getvalue())

    def vectors(self, shards: int, shard: int, hashes: np.ndarray) -> np.ndarray:
        """Vectors of `hashes` in their order, float16 (n, dimension). Raises Refused when one is not in the store."""
        out = np.empty((len(hashes), self.dimension), dtype=np.float16)
        todo = np.ones(len(hashes), dtype=bool)
        for name in self.segments(shards, shard):
            held, vectors = self._read(name)
            order = np.argsort(held)
            place = np.searchsorted(held, hashes, sorter=order).clip(max=max(len(held) - 1, 0))
            found = todo & (held[order[place]] == hashes) if len(held) else np.zeros_like(todo)
            out[found] = vectors[order[place[found]]]
            todo &= ~found
        if todo.any():
            raise Refused(f"{self.folder}: {int(todo.sum())} sentences of shard {shard} have no vector; run jobs/embed.py again")
        return out

    def _read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return _segment(f"{self.folder}/{name}", self.dimension)


def _hashes(uri: str) -> np.ndarray:
    """A segment's hashes; its vectors are not read."""
    try:
        with files.open_input(uri) as stream:
            table = pa.ipc.open_file(stream, options=pa.ipc.IpcReadOptions(included_fields=[0])).read_all()
        return np.asarray(table["hash"].to_numpy())
    except (ValueError, KeyError, OSError) as error:  # ArrowInvalid is a ValueError
        raise _damaged(uri, error) from None


def _damaged(uri: str, error: Exception) -> Refused:
    return Refused(f"{uri} is damaged ({error}); delete it and run again: only its sentences are embedded again")


@functools.lru_cache(maxsize=8)
def _segment(uri: str, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        with files.open_input(uri) as stream:
            table = pa.ipc.open_file(stream).read_all().combine_chunks()
        hashes = table["hash"].to_numpy()
        flat = table["vector"].chunk(0).flatten().to_numpy(zero_copy_only=False) if len(table) else np.empty(0, np.float16)
        vectors = flat.reshape(-1, dimension)
        if (table.schema.metadata or {}).get(b"content") != _content(hashes, vectors).encode():
            raise ValueError("its content is not what was written")
    except (ValueError, KeyError, OSError) as error:  # ArrowInvalid is a ValueError
        raise _damaged(uri, error) from None
    return hashes, vectors


def _content(hashes: np.ndarray, vectors: np.ndarray) -> str:
    """Digest of a segment's content: a disk or network that changes a bit is noticed when the segment is read."""
    digest = xxhash.xxh3_64(hashes.tobytes())
    digest.update(vectors.tobytes())
    return digest.hexdigest()


def _overlaps(name: str, shards: int, shard: int) -> bool:
    """Whether a segment can share sentences with a shard: residues agree modulo the smaller, dividing, shard count."""
    other_shards, other = (int(part) for part in name.split("-")[:2])
    common = min(shards, other_shards)
    return other % common == shard % common
