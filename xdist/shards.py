"""Training shards: token ids of every text with the teacher's vector that it is to meet, and the order of reading them.

    <run>/shards/00003.safetensors   ids (flat), offsets (n + 1), group (n), language (n), corpus (n), vectors (groups, dim) float16
    <run>/shards/manifest.json       sequences and tokens of each shard by corpus and language
    <run>/holdout/00003.parquet      source sentences kept out of training, with their translations

A group's source and each of its translations is one sequence; all of them share the group's vector.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import safetensors.numpy
from tokenizers import Tokenizer

from xdist import batching, cluster, files, text
from xdist.config import Data, Recipe, Train
from xdist.corpus import Prepared
from xdist.errors import Refused
from xdist.progress import Progress
from xdist.store import Fingerprint, VectorStore

MOST_HELD_OUT = 0.05  # of a shard


@dataclass(frozen=True)
class Manifest:
    """What the training shards hold. `tokens[shard][corpus][language]` and `sequences` alike count tokens and texts; `longest`
    is the longest sequence, in tokens."""

    languages: list[str]
    corpora: list[str]
    tokens: list[dict[str, dict[str, int]]]
    sequences: list[dict[str, dict[str, int]]]
    pad: int
    longest: int

    def of_corpus(self, name: str) -> dict[str, float]:
        """Sequences of a corpus by language, over all shards."""
        shards = [shard.get(name, {}) for shard in self.sequences]
        return {lang: sum(shard.get(lang, 0) for shard in shards) for lang in {lang for shard in shards for lang in shard}}


def cut(recipe: Recipe, prepared: Prepared, fingerprint: Fingerprint, student: str) -> None:
    """Write the training shards that are missing. Needs a connected Ray, the embedded corpus and the untrained student."""
    marker = f"{recipe.folder}/shards/manifest.json"
    if files.exists(marker):
        return
    items = [{"shard": shard, "hold": _held_out(recipe, prepared, shard)} for shard in range(prepared.shards)]
    with Progress("tokenise", "sequences", prepared.pairs + prepared.sentences) as progress:
        work = cluster.stream(
            items, _cut_shard, progress, settings=recipe.model_dump(mode="json"), shards=prepared.shards,
            fingerprint=asdict(fingerprint), student=student,
        )  # fmt: skip
        results = sorted(work, key=lambda result: result["shard"])
    manifest = Manifest(
        languages=[recipe.data.source_language, *recipe.data.languages],
        corpora=[corpus.name for corpus in recipe.data.corpora],
        tokens=[result["tokens"] for result in results],
        sequences=[result["sequences"] for result in results],
        pad=results[0]["pad"],
        longest=max(result["longest"] for result in results),
    )
    files.write_json(marker, asdict(manifest))


def _held_out(recipe: Recipe, prepared: Prepared, shard: int) -> int:
    """How many sentences of a shard are held out: its share of data.holdout, as far as 5 % of it goes."""
    count = prepared.per_shard[shard]
    share = recipe.data.holdout * count / max(1, prepared.sentences)
    return min(round(share), int(count * MOST_HELD_OUT))


def _cut_shard(
    item: dict[str, Any], board: cluster.RemoteBoard, settings: dict[str, Any], shards: int, fingerprint: dict[str, Any], student: str
) -> dict[str, Any]:
    recipe = Recipe(**settings)
    shard, folder = item["shard"], recipe.folder
    tokenizer = _tokenizer(student, recipe.student.max_length)
    uri = f"{folder}/shards/{shard:05d}.safetensors"
    if not files.exists(uri):
        table = files.read_table(f"{folder}/corpus/{shard:05d}.parquet")
        held = _hold_out(table, item["hold"])
        files.write_table(f"{folder}/holdout/{shard:05d}.parquet", table.filter(pa.array(held)))
        table = table.filter(pa.array(~held & text.sampled(table["hash"].to_numpy(), recipe.data.sample)))
        tensors = _sequences(table, recipe.data, tokenizer)
        tensors["vectors"] = VectorStore(recipe.run.storage, Fingerprint(**fingerprint)).vectors(shards, shard, table["hash"].to_numpy())
        files.write(uri, safetensors.numpy.save(tensors))
    tensors = _read(uri)
    board.count(str(shard), len(tensors["group"]))
    return {"shard": shard, "pad": tokenizer.token_to_id(_pad_token(student)) or 0} | _counts(tensors, recipe.data)


def _hold_out(table: pa.Table, count: int) -> np.ndarray:
    held = np.zeros(len(table), dtype=bool)
    if count:
        held[np.argsort(text.holdout_order(table["hash"].to_numpy()), kind="stable")[:count]] = True
    return held


def _sequences(table: pa.Table, data: Data, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """All texts of the groups as flat token ids: sources first, then translations."""
    lists = table["languages"].combine_chunks() if len(table) else pa.array([], pa.list_(pa.string()))
    texts = table["source"].to_pylist() + (table["texts"].combine_chunks().flatten().to_pylist() if len(table) else [])
    sizes = np.diff(lists.offsets.to_numpy()) if len(table) else np.empty(0, np.int64)
    groups = np.arange(len(table))
    languages = [data.source_language, *data.languages]
    corpora = [corpus.name for corpus in data.corpora]
    of_translations = _indices(lists.flatten().to_pylist(), languages)
    corpus = _indices(table["corpora"].combine_chunks().flatten().to_pylist() if len(table) else [], corpora)
    firsts = corpus[np.concatenate([[0], np.cumsum(sizes)[:-1]])] if len(table) else corpus
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    small = tokenizer.get_vocab_size() <= 65536
    return {
        "ids": np.fromiter((id_ for row in ids for id_ in row), dtype=np.uint16 if small else np.int32),
        "offsets": np.concatenate([[0], np.cumsum([len(row) for row in ids], dtype=np.int64)]).astype(np.int64),
        "group": np.concatenate([groups, np.repeat(groups, sizes)]).astype(np.int32),
        "language": np.concatenate([np.zeros(len(table), np.uint8), of_translations]).astype(np.uint8),
        "corpus": np.concatenate([firsts, corpus]).astype(np.uint16),
    }


def _indices(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    place = {name: index for index, name in enumerate(known)}
    return np.fromiter((place[name] for name in names), dtype=np.int64, count=len(names))


def _counts(tensors: dict[str, np.ndarray], data: Data) -> dict[str, Any]:
    lengths = np.diff(tensors["offsets"])
    languages, corpora = [data.source_language, *data.languages], [corpus.name for corpus in data.corpora]
    out: dict[str, Any] = {"tokens": {}, "sequences": {}, "longest": int(lengths.max(initial=0))}
    for number, corpus in enumerate(corpora):
        for place, lang in enumerate(languages):
            here = (tensors["corpus"] == number) & (tensors["language"] == place)
            if here.any():
                out["tokens"].setdefault(corpus, {})[lang] = int(lengths[here].sum())
                out["sequences"].setdefault(corpus, {})[lang] = int(here.sum())
    return out


@functools.lru_cache(maxsize=2)
def _tokenizer(student: str, max_length: int) -> Tokenizer:
    """The student's tokenizer, without loading the model."""
    tokenizer = Tokenizer.from_str(files.read(f"{student}/tokenizer.json").decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def _pad_token(student: str) -> str:
    token = files.read_json(f"{student}/tokenizer_config.json").get("pad_token")
    return str(token["content"] if isinstance(token, dict) else token)


# --- reading in the order of training ---


class Batch(NamedTuple):
    """One micro-batch: token ids and mask (n or a little more, longest) int64, the teacher's vectors (n, dimension) float32.
    Rows after the nth are there to make a round number (see `batching.padded`)."""

    ids: np.ndarray
    mask: np.ndarray
    vectors: np.ndarray


def sampling_weights(data: Data, sequences: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """How often a sequence is seen per epoch, by corpus and language, from counts of the same form: corpora by their weight,
    and then languages so that their shares of what is seen follow the temperature."""
    by_corpus = {corpus.name: corpus.weight for corpus in data.corpora}
    languages = {lang for counts in sequences.values() for lang in counts}
    seen = {lang: sum(by_corpus[name] * counts.get(lang, 0) for name, counts in sequences.items()) for lang in languages}
    by_language = batching.language_weights(seen, data.temperature, data.source_language, data.source_weight)
    return {name: {lang: by_corpus[name] * by_language.get(lang, 0) for lang in counts} for name, counts in sequences.items()}


def order(recipe: Recipe) -> "Order":
    """The order of training from a recipe's shards, which are all there."""
    manifest = Manifest(**files.read_json(f"{recipe.folder}/shards/manifest.json"))
    return Order(recipe.folder, recipe.data, recipe.train, recipe.run.seed, manifest)


class Order:
    """The steps of training from any position on, for one of `world` workers. A pure function of recipe and manifest."""

    def __init__(self, folder: str, data: Data, train: Train, seed: int, manifest: Manifest):
        self.folder, self.data, self.train, self.seed, self.manifest = folder, data, train, seed, manifest
        weights = sampling_weights(data, {name: manifest.of_corpus(name) for name in manifest.corpora})
        self.weights = np.array([[weights[name].get(lang, 0.0) for lang in manifest.languages] for name in manifest.corpora])
        if not self.window_steps(list(range(len(manifest.tokens)))):
            raise Refused("there is nothing to train on: all languages or corpora are empty or have weight 0")

    def window_steps(self, shards: list[int]) -> int:
        """Steps that a window of these shards makes, from the manifest alone; none where they hold nothing to train on."""
        expected = sum(
            count * self.weights[self.manifest.corpora.index(corpus), self.manifest.languages.index(lang)]
            for shard in shards
            for corpus, counts in self.manifest.tokens[shard].items()
            for lang, count in counts.items()
        )
        return batching.window_steps(expected, self.train.batch_tokens)

    def epoch_steps(self, epoch: int) -> int:
        """Steps of one epoch."""
        return sum(self.window_steps(window) for window in self._windows(epoch))

    def total_steps(self) -> int:
        """Steps of the whole training: train.steps, or train.epochs in steps."""
        if self.train.steps:
            return self.train.steps
        whole = int(self.train.epochs)
        part = self.train.epochs - whole
        return max(1, sum(self.epoch_steps(epoch) for epoch in range(whole)) + round(part * self.epoch_steps(whole) if part else 0))

    def _windows(self, epoch: int) -> list[list[int]]:
        return batching.windows(len(self.manifest.tokens), self.data.window, self.seed, epoch)

    def batches(self, start: batching.Position, rank: int = 0, world: int = 1) -> Iterator[tuple[batching.Position, list[Batch]]]:
        """(position after the step, this rank's micro-batches) from `start` on, without end. The next window is read
        while the present one is trained on; windows before `start` are not read."""
        with ThreadPoolExecutor(1) as background:
            position = start
            upcoming = background.submit(self._window, position.epoch, position.window)
            while True:
                steps, tensors = upcoming.result()
                last = position.window + 1 == len(self._windows(position.epoch))
                following = (position.epoch + 1, 0) if last else (position.epoch, position.window + 1)
                upcoming = background.submit(self._window, *following)
                for batch in range(position.batch, len(steps)):
                    position = batching.Position(position.epoch, position.window, batch + 1, position.step + 1)
                    yield position, [self._batch(tensors, micro) for micro in steps[batch][rank::world]]
                position = batching.Position(*following, 0, position.step)

    def _window(self, epoch: int, window: int) -> tuple[list[list[np.ndarray]], dict[str, np.ndarray]]:
        """The steps of a window as indices, and the window's tensors."""
        shards = self._windows(epoch)[window]
        tensors = _joined([_read(f"{self.folder}/shards/{shard:05d}.safetensors") for shard in shards])
        lengths = np.diff(tensors["offsets"])
        drawn = batching.draw(self.weights[tensors["corpus"], tensors["language"]], self.seed, epoch, window)
        args = (self.window_steps(shards), self.train.micro_batches, self.seed, epoch, window)
        return batching.cut(drawn, lengths, *args), tensors

    def _batch(self, tensors: dict[str, np.ndarray], rows: np.ndarray) -> Batch:
        offsets = tensors["offsets"]
        found = [tensors["ids"][offsets[row] : offsets[row + 1]] for row in rows]
        ids, mask = batching.padded(found, self.manifest.pad, batching.few_shapes([*map(len, found)], self.manifest.longest))
        vectors = tensors["vectors"][tensors["group"][rows]].astype(np.float32)
        return Batch(ids, mask, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))  # float16 is not quite unit length


def _read(uri: str) -> dict[str, np.ndarray]:
    try:
        return dict(safetensors.numpy.load(files.read(uri)))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise Refused(f"{uri} is damaged ({error}); delete it and {os.path.dirname(uri)}/manifest.json, and run again") from None


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Several shards' tensors as one: offsets and groups count on."""
    tokens = np.cumsum([0] + [len(part["ids"]) for part in parts])
    groups = np.cumsum([0] + [len(part["vectors"]) for part in parts])
    joined = {name: np.concatenate([part[name] for part in parts]) for name in ("ids", "language", "corpus", "vectors")}
    joined["group"] = np.concatenate([part["group"] + start for part, start in zip(parts, groups, strict=False)])
    offsets = [part["offsets"][:-1] + start for part, start in zip(parts, tokens, strict=False)]
    joined["offsets"] = np.concatenate([*offsets, tokens[-1:]])
    return joined


def holdout(folder: str) -> list[dict[str, Any]]:
    """Held-out groups (hash, source, languages, texts), sorted by hash."""
    rows: list[dict[str, Any]] = []
    for name in files.names(f"{folder}/holdout", ".parquet"):
        rows += files.read_table(f"{folder}/holdout/{name}").to_pylist()
    return sorted(rows, key=lambda row: int(row["hash"]))
