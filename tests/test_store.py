"""The embedding store: what is written comes back exactly, or is refused by name."""

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdist import files, store
from xdist.errors import Refused
from xdist.store import Fingerprint, VectorStore

PRINT = Fingerprint(model="m", weights="w", dimension=4, max_length=32, prompt="", modules="mean")


@pytest.fixture(autouse=True)
def _nothing_cached() -> None:
    store._segment.cache_clear()


def of_shard(shards: int, shard: int, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**58, count, dtype=np.uint64) // np.uint64(shards) * np.uint64(shards) + np.uint64(shard)


def vectors_of(hashes: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(hashes.astype(float) % 1000 + place) for place in range(4)], axis=1).astype(np.float16)


@pytest.fixture
def vectors(tmp_path: Path) -> VectorStore:
    return VectorStore(str(tmp_path), PRINT)


def test_written_vectors_come_back_in_the_order_asked(vectors: VectorStore) -> None:
    hashes = of_shard(4, 1, 50)
    vectors.write(4, 1, hashes[:30], vectors_of(hashes[:30]))
    assert vectors.missing(4, 1, hashes).tolist() == list(range(30, 50))
    vectors.write(4, 1, hashes[30:], vectors_of(hashes[30:]).astype(np.float32))
    assert vectors.missing(4, 1, hashes).tolist() == []
    order = np.random.default_rng(1).permutation(50)
    found = vectors.vectors(4, 1, hashes[order])
    assert found.dtype == np.float16
    assert np.array_equal(found, vectors_of(hashes[order]))
    assert vectors.vectors(4, 1, hashes[:0]).shape == (0, 4)


def test_an_empty_store_misses_everything(vectors: VectorStore) -> None:
    hashes = of_shard(4, 1, 3)
    assert vectors.missing(4, 1, hashes).tolist() == [0, 1, 2]
    with pytest.raises(Refused, match=r"3 sentences of shard 1 have no vector; run jobs/embed\.py"):
        vectors.vectors(4, 1, hashes)


@pytest.mark.parametrize(("wrote", "reads"), [(8, 2), (2, 8), (8, 8), (1, 16)])
def test_a_run_with_another_shard_count_finds_its_sentences(vectors: VectorStore, wrote: int, reads: int) -> None:
    hashes = np.unique(np.random.default_rng(0).integers(0, 2**60, 200, dtype=np.uint64))
    for shard in range(wrote):
        own = hashes[hashes % wrote == shard]
        vectors.write(wrote, shard, own, vectors_of(own))
    for shard in range(reads):
        own = hashes[hashes % reads == shard]
        assert len(vectors.segments(reads, shard)) == max(1, wrote // reads)
        assert vectors.missing(reads, shard, own).tolist() == []
        assert np.array_equal(vectors.vectors(reads, shard, own), vectors_of(own))


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**63))
def test_a_segment_overlaps_exactly_the_shards_that_can_share_its_sentences(one: int, two: int, value: int) -> None:
    name = f"{2**one}-{value % 2**one:05d}-x.arrow"
    assert store._overlaps(name, 2**two, value % 2**two)
    if two:
        other = (value + 1) % 2**two
        assert store._overlaps(name, 2**two, other) == (one == 0)


def test_written_twice_is_the_same_file(vectors: VectorStore) -> None:
    hashes = of_shard(2, 0, 5)
    for _ in range(2):
        vectors.write(2, 0, hashes, vectors_of(hashes))
    assert len(vectors.segments(2, 0)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_vectors_that_are_not_finite_as_float16_are_refused(vectors: VectorStore, bad: float) -> None:
    hashes = of_shard(2, 0, 3)
    values = np.ones((3, 4), np.float32)
    values[1, 2] = bad
    with pytest.raises(Refused, match="not finite"):
        vectors.write(2, 0, hashes, values)
    assert vectors.segments(2, 0) == []


def test_a_wrong_shape_is_refused(vectors: VectorStore) -> None:
    with pytest.raises(Refused, match=r"shape \(3, 5\), expected \(3, 4\)"):
        vectors.write(2, 0, of_shard(2, 0, 3), np.ones((3, 5)))


def test_damaged_segments_are_refused_by_name(vectors: VectorStore) -> None:
    hashes = of_shard(2, 0, 100)
    vectors.write(2, 0, hashes, vectors_of(hashes))
    (name,) = vectors.segments(2, 0)
    path = Path(vectors.folder, name)
    data = path.read_bytes()
    vector = vectors_of(hashes)[50].tobytes()
    flipped = data.replace(vector, bytes([vector[0] ^ 1]) + vector[1:])
    assert flipped != data
    for damaged in (data[:-8], data[: len(data) // 2], b"", b"nonsense", flipped):
        path.write_bytes(damaged)
        for read in (vectors.missing, vectors.vectors) if damaged != flipped else (vectors.vectors,):
            store._segment.cache_clear()
            with pytest.raises(Refused, match=rf"{name} is damaged .*delete it and run again"):
                read(2, 0, hashes)
    path.unlink()
    assert len(vectors.missing(2, 0, hashes)) == 100


def test_a_full_disk_in_the_middle_of_a_shard_loses_nothing(vectors: VectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = of_shard(2, 0, 10, seed=1), of_shard(2, 0, 10, seed=2)
    vectors.write(2, 0, first, vectors_of(first))
    before = sorted(os.listdir(vectors.folder))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refused, match="disk is full"):
        vectors.write(2, 0, second, vectors_of(second))
    assert sorted(os.listdir(vectors.folder)) == before
    monkeypatch.undo()
    store._segment.cache_clear()
    assert vectors.missing(2, 0, np.concatenate([first, second])).tolist() == list(range(10, 20))


def test_a_store_of_another_teacher_is_refused(tmp_path: Path, vectors: VectorStore) -> None:
    assert VectorStore(str(tmp_path), dataclasses.replace(PRINT, model="moved/elsewhere")).folder == vectors.folder
    changed = files.read_json(f"{vectors.folder}/fingerprint.json") | {"prompt": "query: ", "max_length": 64}
    files.write_json(f"{vectors.folder}/fingerprint.json", changed)
    with pytest.raises(Refused, match=r"differs in max_length, prompt.*Delete"):
        VectorStore(str(tmp_path), PRINT)


@pytest.mark.parametrize(
    "change", [{"weights": "x"}, {"dimension": 8}, {"max_length": 64}, {"prompt": "p"}, {"modules": "cls"}, {"normalised": False}]
)
def test_everything_that_changes_a_vector_changes_the_folder(change: dict[str, object]) -> None:
    assert dataclasses.replace(PRINT, **change).digest != PRINT.digest  # type: ignore[arg-type]
    assert len(PRINT.digest) == 16


def test_a_store_in_an_fsspec_storage() -> None:
    import uuid

    vectors, hashes = VectorStore(f"memory://{uuid.uuid4().hex}", PRINT), of_shard(2, 1, 5)
    vectors.write(2, 1, hashes, vectors_of(hashes))
    assert np.array_equal(vectors.vectors(2, 1, hashes), vectors_of(hashes))
