"""Training shards: how groups become sequences, what is held out, and the order in which steps are read."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xdist import encoder, files, shards, text
from xdist.batching import Position
from xdist.config import Data, Recipe, Train
from xdist.errors import Refused
from xdist.store import Fingerprint, VectorStore

DIMENSION = 4
FINGERPRINT = Fingerprint(model="m", weights="w", dimension=DIMENSION, max_length=32, prompt="", modules="x")
Groups = list[tuple[str, list[tuple[str, str, str]]]]  # source, [(language, text, corpus)]


class Board:
    def count(self, key: str, value: int, share: float = 0.0) -> None:
        """What a RemoteBoard takes."""


def table(groups: Groups) -> pa.Table:
    return pa.table(
        {
            "hash": pa.array(text.text_hashes([source for source, _ in groups]), pa.uint64()),
            "source": [source for source, _ in groups],
            **{
                name: pa.array([[entry[place] for entry in entries] for _, entries in groups], pa.list_(pa.string()))
                for place, name in enumerate(("languages", "texts", "corpora"))
            },
        }
    )


def vector_of(value: int) -> np.ndarray:
    """A unit vector that depends on a hash alone."""
    vector = np.random.default_rng(int(value)).normal(size=DIMENSION)
    return vector / np.linalg.norm(vector)


def write(recipe: Recipe, groups: Groups, count: int = 1) -> None:
    """A prepared corpus of `count` shards, and the teacher's vectors."""
    store = VectorStore(recipe.run.storage, FINGERPRINT)
    whole = table(groups)
    place = whole["hash"].to_numpy() % np.uint64(count)
    for shard in range(count):
        part = whole.filter(pa.array(place == shard))
        files.write_table(f"{recipe.folder}/corpus/{shard:05d}.parquet", part)
        hashes = part["hash"].to_numpy()
        if len(hashes):
            store.write(count, shard, hashes, np.stack([vector_of(value) for value in hashes]).astype(np.float32))


def cut(recipe: Recipe, teacher: str, shard: int = 0, count: int = 1, hold: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    item = {"shard": shard, "hold": hold}
    result = shards._cut_shard(item, Board(), recipe.model_dump(mode="json"), count, asdict(FINGERPRINT), teacher)  # type: ignore[arg-type]
    return result, safetensors.numpy.load(files.read(f"{recipe.folder}/shards/{shard:05d}.safetensors"))


TWO = [{"name": "first", "path": "a.tsv"}, {"name": "second", "path": "b.tsv"}]
HAND: Groups = [
    ("the heart", [("de", "das herz", "second")]),
    ("the left lung", [("es", "el pulmón", "first"), ("de", "die lunge", "second"), ("es", "pulmón izquierdo", "first")]),
]


@pytest.fixture
def student(teacher: str) -> str:
    return teacher


def test_groups_become_sources_then_translations(make_recipe: Callable[..., Recipe], student: str) -> None:
    recipe = make_recipe(data={"corpora": TWO})
    write(recipe, HAND)
    result, tensors = cut(recipe, student)
    texts = ["the heart", "the left lung", "das herz", "el pulmón", "die lunge", "pulmón izquierdo"]
    wanted = encoder.load(student).tokenize(texts, recipe.student.max_length)
    ids, offsets = tensors["ids"], tensors["offsets"]
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == wanted
    assert offsets.tolist() == np.cumsum([0, *map(len, wanted)]).tolist()
    assert tensors["group"].tolist() == [0, 1, 0, 1, 1, 1]
    assert tensors["language"].tolist() == [0, 0, 2, 1, 2, 1]  # en, es, de
    assert tensors["corpus"].tolist() == [1, 0, 1, 0, 1, 0]  # a source counts for its first translation's corpus
    hashes = text.text_hashes([source for source, _ in HAND])
    np.testing.assert_allclose(tensors["vectors"], [vector_of(value) for value in hashes], atol=1e-3)
    assert tensors["vectors"].dtype == np.float16
    sizes = [len(row) for row in wanted]
    assert result["sequences"] == {"first": {"en": 1, "es": 2}, "second": {"en": 1, "de": 2}}
    assert result["tokens"] == {
        "first": {"en": sizes[1], "es": sizes[3] + sizes[5]}, "second": {"en": sizes[0], "de": sizes[2] + sizes[4]},
    }  # fmt: skip
    assert result["pad"] == 0


def test_long_texts_are_cut_off_with_their_closing_token(make_recipe: Callable[..., Recipe], student: str) -> None:
    recipe = make_recipe(data={"corpora": TWO}, student={"max_length": 8})
    write(recipe, [("the heart " * 40, [("es", "el", "first")])])
    _, tensors = cut(recipe, student)
    row = tensors["ids"][: tensors["offsets"][1]].tolist()
    assert row == encoder.load(student).tokenize(["the heart " * 40], 8)[0]
    assert (len(row), row[0], row[-1]) == (8, 2, 3)  # [CLS] … [SEP]


def test_an_empty_shard(make_recipe: Callable[..., Recipe], student: str) -> None:
    recipe = make_recipe(data={"corpora": TWO})
    write(recipe, [])
    result, tensors = cut(recipe, student)
    assert (result["tokens"], result["sequences"]) == ({}, {})
    assert tensors["offsets"].tolist() == [0]
    assert tensors["vectors"].shape == (0, DIMENSION)


def many(count: int) -> Groups:
    return [(f"heart number {i}", [("es", f"corazón {i}", "first"), ("de", f"herz {i}", "second")]) for i in range(count)]


def test_the_holdout_is_never_trained_on(make_recipe: Callable[..., Recipe], student: str) -> None:
    recipe = make_recipe(data={"corpora": TWO})
    write(recipe, many(200))
    _, tensors = cut(recipe, student, hold=30)
    held = shards.holdout(recipe.folder)
    assert [row["hash"] for row in held] == sorted(row["hash"] for row in held)
    assert len(held) == 30
    assert len(tensors["vectors"]) == 170
    ranked = sorted(text.text_hashes([source for source, _ in many(200)]), key=lambda value: text.holdout_order(np.array([value]))[0])
    assert {row["hash"] for row in held} == {int(value) for value in ranked[:30]}
    trained = {row.tobytes() for row in tensors["vectors"]}
    others = set(text.text_hashes([source for source, _ in many(200)]).tolist()) - {row["hash"] for row in held}
    assert trained == {vector_of(value).astype(np.float16).tobytes() for value in others}
    assert np.bincount(tensors["group"]).tolist() == [3] * 170  # each source left with both translations, and no other text
    assert all(row["languages"] == ["es", "de"] for row in held)


def test_the_holdout_is_at_most_five_percent_of_a_shard(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(data={"holdout": 100})
    prepared: Any = type("Prepared", (), {"per_shard": [1000, 3000, 10], "sentences": 4010})
    assert [shards._held_out(recipe, prepared, shard) for shard in range(3)] == [25, 75, 0]
    recipe = make_recipe(data={"holdout": 1000})
    assert [shards._held_out(recipe, prepared, shard) for shard in range(3)] == [50, 150, 0]


def test_samples_are_nested(make_recipe: Callable[..., Recipe], student: str) -> None:
    """A share of a tenth is contained in a share of a half, and both leave the holdout alone."""
    found, held = {}, {}
    for share in (0.1, 0.5, 1.0):
        recipe = make_recipe(run={"name": f"run{share}"}, data={"corpora": TWO, "sample": share})
        write(recipe, many(1000))
        _, tensors = cut(recipe, student, hold=50)
        found[share] = {row.tobytes() for row in tensors["vectors"]}
        held[share] = [row["hash"] for row in shards.holdout(recipe.folder)]
    assert found[0.1] < found[0.5] < found[1.0]
    assert len(found[1.0]) == 950
    assert len(found[0.5]) == pytest.approx(475, abs=60)
    assert len(found[0.1]) == pytest.approx(95, abs=30)
    assert held[0.1] == held[0.5] == held[1.0]


def test_a_shard_that_was_cut_is_not_cut_again(make_recipe: Callable[..., Recipe], student: str) -> None:
    recipe = make_recipe(data={"corpora": TWO})
    write(recipe, HAND)
    first, _ = cut(recipe, student)
    files.remove(f"{recipe.folder}/corpus/00000.parquet")
    assert cut(recipe, student)[0] == first


def test_a_damaged_shard_is_refused(make_recipe: Callable[..., Recipe], student: str) -> None:
    recipe = make_recipe(data={"corpora": TWO})
    write(recipe, HAND)
    cut(recipe, student)
    path = Path(recipe.folder) / "shards" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(Refused, match=r"00000\.safetensors is damaged.*delete it"):
        cut(recipe, student)


# --- the order of training ---


def order(folder: Path, count: int = 5, **train: Any) -> shards.Order:
    """An Order over shards of random lengths; each sequence's first token id is its own number."""
    if not (folder / "shards").exists():
        rng, start = np.random.default_rng(0), 0
        for shard in range(count):
            size = int(rng.integers(20, 60))
            lengths = rng.integers(1, 12, size)
            ids = np.concatenate([[start + number, *[7] * (length - 1)] for number, length in enumerate(lengths)])
            tensors = {
                "ids": ids.astype(np.uint16),
                "offsets": np.concatenate([[0], np.cumsum(lengths)]),
                "group": np.arange(size, dtype=np.int32) // 2,
                "language": (np.arange(size) % 2).astype(np.uint8),
                "corpus": np.zeros(size, np.uint16),
                "vectors": rng.normal(size=((size + 1) // 2, 3)).astype(np.float16),
            }
            files.write(str(folder / "shards" / f"{shard:05d}.safetensors"), safetensors.numpy.save(tensors))
            start += size
    counts: dict[str, list[dict[str, dict[str, int]]]] = {"tokens": [], "sequences": []}
    data = Data(languages=["es"], window=2, corpora=[{"name": "toy", "path": "x.tsv"}])  # type: ignore[list-item]
    for shard in range(count):
        found = shards._counts(safetensors.numpy.load(files.read(str(folder / "shards" / f"{shard:05d}.safetensors"))), data)
        for name in counts:
            counts[name].append(found[name])
    manifest = shards.Manifest(languages=["en", "es"], corpora=["toy"], pad=0, longest=11, **counts)
    return shards.Order(str(folder), data, Train(**({"batch_tokens": 64, "micro_batches": 2} | train)), 0, manifest)


def told(steps: Iterator[tuple[Position, list[shards.Batch]]], count: int) -> list[tuple[Position, list[Any]]]:
    taken = itertools.islice(steps, count)
    return [(position, [tuple(array.tolist() for array in batch) for batch in batches]) for position, batches in taken]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("order")


def test_an_epoch_shows_every_sequence_once(folder: Path) -> None:
    found = order(folder)
    steps = told(found.batches(Position()), found.epoch_steps(0))
    assert {position.epoch for position, _ in steps} == {0}
    assert [position.step for position, _ in steps] == list(range(1, len(steps) + 1))
    seen = [row[0] for _, batches in steps for ids, _, vectors in batches for row in ids[: len(vectors)]]
    total = sum(sum(part["toy"].values()) for part in found.manifest.sequences)
    assert sorted(seen) == list(range(total))
    assert told(found.batches(Position()), len(steps) + 1)[-1][0].epoch == 1


def test_a_batch_brings_each_sequence_its_groups_vector_at_unit_length(folder: Path) -> None:
    tensors = [safetensors.numpy.load(files.read(str(folder / "shards" / f"{shard:05d}.safetensors"))) for shard in range(5)]
    wanted = np.concatenate([part["vectors"][part["group"]].astype(np.float32) for part in tensors])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    lengths = np.concatenate([np.diff(part["offsets"]) for part in tensors])
    for _, batches in told(order(folder).batches(Position()), 12):
        for ids, mask, vectors in batches:
            numbers = [row[0] for row in ids[: len(vectors)]]
            np.testing.assert_allclose(vectors, wanted[numbers], atol=1e-6)
            assert [sum(row) for row in mask] == lengths[numbers].tolist() + [1] * (len(ids) - len(vectors))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 70))
def test_resume_from_any_position_gives_the_batches_that_came_next(folder: Path, done: int) -> None:
    found = order(folder)
    whole = told(found.batches(Position()), done + 6)
    start = whole[done - 1][0] if done else Position()
    assert told(order(folder).batches(start), 6) == whole[done:]


def test_resume_reads_no_earlier_window(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = order(folder)
    windows = found._windows(0)
    read: list[str] = []
    original = shards._read

    def counted(uri: str) -> dict[str, np.ndarray]:
        read.append(uri)
        return original(uri)

    monkeypatch.setattr(shards, "_read", counted)
    told(found.batches(Position(epoch=0, window=1, batch=1, step=30)), 1)
    names = [int(Path(uri).stem) for uri in read]
    assert names == [*windows[1], *windows[2]]  # its own window, and the next one ahead of time


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_union_over_workers_is_the_same(folder: Path, world: int) -> None:
    alone = told(order(folder, micro_batches=6).batches(Position()), 8)
    shared = [told(order(folder, micro_batches=6).batches(Position(), rank, world), 8) for rank in range(world)]
    for step, (position, batches) in enumerate(alone):
        assert {worker[step][0] for worker in shared} == {position}
        assert sorted(batches) == sorted(batch for worker in shared for batch in worker[step][1])


def test_steps_by_hand(folder: Path) -> None:
    found = order(folder)
    tokens = [sum(part["toy"].values()) for part in found.manifest.tokens]
    for window in found._windows(0):
        assert found.window_steps(window) == round(sum(tokens[shard] for shard in window) / 64)
    assert found.epoch_steps(3) == sum(found.window_steps(window) for window in found._windows(3))


@pytest.mark.parametrize("epochs", [0.25, 1.0, 2.5])
def test_total_steps_of_fractional_epochs(folder: Path, epochs: float) -> None:
    found = order(folder, epochs=epochs)
    each = [found.epoch_steps(epoch) for epoch in range(3)]
    wanted = {0.25: round(each[0] / 4), 1.0: each[0], 2.5: each[0] + each[1] + round(each[2] / 2)}
    assert found.total_steps() == wanted[epochs]
    assert order(folder, epochs=epochs, steps=7).total_steps() == 7


def test_weights_multiply_corpus_and_language(folder: Path) -> None:
    manifest = order(folder).manifest
    data = Data(languages=["es"], source_weight=0.5, corpora=[{"name": "toy", "path": "x.tsv", "weight": 3.0}])  # type: ignore[list-item]
    assert shards.Order(str(folder), data, Train(), 0, manifest).weights.tolist() == [[1.5, 3.0]]


def test_sampling_weights_by_hand() -> None:
    corpora = [{"name": "a", "path": "x", "weight": 2.0}, {"name": "b", "path": "x"}]
    data = Data(languages=["es", "de"], temperature=2.0, source_weight=0.3, corpora=corpora)  # type: ignore[arg-type]
    weights = shards.sampling_weights(data, {"a": {"en": 110, "es": 100, "de": 10}, "b": {"en": 100, "es": 100}})
    # By weight alone es is seen 300 times and de 20 times; their shares of these 320 are to be as √300 : √20.
    es = 320 * np.sqrt(300) / (np.sqrt(300) + np.sqrt(20)) / 300
    de = 320 * np.sqrt(20) / (np.sqrt(300) + np.sqrt(20)) / 20
    assert weights["a"] == pytest.approx({"en": 0.6, "es": 2 * es, "de": 2 * de})
    assert weights["b"] == pytest.approx({"en": 0.3, "es": es})


def test_a_window_without_text_is_passed_over(tmp_path: Path) -> None:
    found = order(tmp_path, count=4)
    manifest = asdict(found.manifest)
    empty = {"ids": np.uint16([]), "offsets": np.int64([0]), "group": np.int32([]), "language": np.uint8([]), "corpus": np.uint16([])}
    for shard in found._windows(0)[1]:
        manifest["tokens"][shard], manifest["sequences"][shard] = {}, {}
        tensors = empty | {"vectors": np.empty((0, 3), np.float16)}
        files.write(str(tmp_path / "shards" / f"{shard:05d}.safetensors"), safetensors.numpy.save(tensors))
    hollow = shards.Order(str(tmp_path), found.data, found.train, 0, shards.Manifest(**manifest))
    steps = told(hollow.batches(Position()), hollow.epoch_steps(0) + 1)
    assert [position.epoch for position, _ in steps] == [0] * hollow.epoch_steps(0) + [1]
    assert {position.window for position, _ in steps[:-1]} == {0}


@pytest.mark.parametrize("counts", [{}, {"toy": {"en": 5}}])
def test_nothing_to_train_on_is_refused(tmp_path: Path, counts: dict[str, dict[str, int]]) -> None:
    manifest = shards.Manifest(languages=["en", "es"], corpora=["toy"], tokens=[counts], sequences=[counts], pad=0, longest=5)
    data = Data(languages=["es"], source_weight=0, corpora=[{"name": "toy", "path": "x.tsv"}])  # type: ignore[list-item]
    with pytest.raises(Refused, match="nothing to train on"):
        shards.Order(str(tmp_path), data, Train(), 0, manifest)


def test_a_damaged_shard_stops_the_order(tmp_path: Path) -> None:
    found = order(tmp_path, count=2)
    files.write(str(tmp_path / "shards" / "00001.safetensors"), b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}")
    with pytest.raises(Refused, match=r"00001\.safetensors is damaged"):
        told(found.batches(Position()), 1)
