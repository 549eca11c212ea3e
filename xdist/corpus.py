"""Prepare: parallel text of any format becomes clean groups (a source sentence with its translations), shard by shard.

    corpora ──► parts/      rows that passed every filter, bucketed by shard      one Ray task per input file
            ──► rejects/    every dropped row: corpus, file, line, language, reason, text (Parquet)
    parts   ──► corpus/     one Parquet file per shard: hash, source, languages, texts, corpora; duplicates dropped

Both passes are exact and free of coordination: a file or a shard is done when its marker exists, so a run that was
killed goes on where it stopped. Memory holds one part of one file, or one shard, per task.
"""

import collections
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from xdist import cluster, files, filters, formats, groups, streams, text
from xdist.chunks import Chunk
from xdist.config import Corpus, Data, Recipe
from xdist.errors import Refused
from xdist.progress import Progress, say

PART_ROWS = 50_000
PART_BYTES = 32 << 20
SHARD_BYTES = 8 << 20  # of input, so that a shard holds some ten thousand sentences
LEAST_SHARDS = 8  # so that several actors have work
MOST_SHARDS = 1 << 14
CLUSTER_CORES = 16  # that a cluster is taken to have at least: it may grow

Counts = dict[str, int]
Unit = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What prepare found: totals for the plan and the report. `languages`, `corpora` and `by_corpus` (and language) count pairs."""

    shards: int
    rows_read: int
    pairs: int
    sentences: int
    per_shard: list[int]
    languages: Counts
    corpora: Counts
    by_corpus: dict[str, Counts]
    digests: dict[str, str]
    rejected: Counts
    rejected_by_corpus: dict[str, Counts]


def prepare(recipe: Recipe) -> Prepared:
    """Run both passes, or what is left of them. Needs a connected Ray. Raises Refused when nothing is left of the corpora."""
    folder = recipe.folder
    marker = f"{folder}/corpus/manifest.json"
    if files.exists(marker):
        files.remove(f"{folder}/parts")
        return Prepared(**files.read_json(marker))
    units = _units(recipe)
    shards = recipe.data.shards or _shard_count(units)
    _begin(recipe, units, shards)
    settings = recipe.data.model_dump(mode="json")
    waiting = _with_shares([unit for unit in units if not files.exists(f"{folder}/parts/{unit['key']}.json")])
    if waiting:
        cluster.await_room(recipe.cluster, 1, 1, 0, "prepare")
    with Progress("read", "rows") as progress:
        for _ in cluster.stream(waiting, _prepare_file, progress, folder=folder, settings=settings, shards=shards):
            pass
    read = [files.read_json(f"{folder}/parts/{unit['key']}.json") for unit in units]
    parts = [part for summary in read for part in summary["parts"]]
    grouped: list[Any] = []
    kept = sum(summary["rows"] - sum(summary["rejected"].values()) for summary in read)
    with Progress("group", "pairs", kept) as progress:
        cores = max(cluster.cores(), CLUSTER_CORES if cluster.on_cluster(recipe.cluster) else 1)
        items = groups.items(shards, kept, cores) if parts else []
        for result in cluster.stream(items, groups.group, progress, folder=folder, parts=parts):
            grouped += result["shards"]
    prepared = _summary(recipe, shards, read, sorted(grouped, key=lambda result: result["shard"]))
    _check(recipe, prepared)
    files.write_json(marker, prepared.__dict__)
    files.remove(f"{folder}/parts")
    return prepared


def _begin(recipe: Recipe, units: list[Unit], shards: int) -> None:
    """Keys of evaluation text for the tasks; and a fresh start where the inputs are not those that parts/ was made from."""
    if recipe.data.detect_language:
        filters.detector(recipe.data)
    keys = filters.evaluation_keys(recipe)
    sizes = [_size(unit) for unit in units]
    content = json.dumps([units, sizes, shards, keys.ids]).encode() + keys.texts.tobytes()
    inputs, marker = {"digest": xxhash.xxh3_64_hexdigest(content)}, f"{recipe.folder}/parts/inputs.json"
    if files.exists(marker) and files.read_json(marker) == inputs:
        return
    if files.exists(marker):
        say("prepare   the corpora or evaluation files changed since this run began; it reads them all again")
    for name in ("parts", "corpus", "rejects"):
        files.remove(f"{recipe.folder}/{name}")
    filters.write_keys(recipe.folder, keys)
    files.write_json(marker, inputs)


def _size(unit: Unit) -> int:
    """Bytes of a unit's files, as stored; 0 where a hub does not say."""
    paths = [path for path in (unit["path"], unit["target_path"]) if path and not path.startswith("hf://")]
    return sum(files.size(path) for path in paths)


def _with_shares(units: list[Unit]) -> list[Unit]:
    """Each unit with its bytes, and the share of all that these are, for the time that is left."""
    sizes = [_size(unit) for unit in units]
    return [unit | {"size": size, "share": size / max(1, sum(sizes))} for unit, size in zip(units, sizes, strict=True)]


def _check(recipe: Recipe, prepared: Prepared) -> None:
    if not prepared.pairs:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in prepared.rejected.items()) or "no rows at all"
        raise Refused(f"no pair is left of {prepared.rows_read:,} rows read ({reasons}); {recipe.folder}/rejects/ holds each row")
    for lang in recipe.data.languages:
        if not prepared.languages.get(lang):
            say(f"prepare   no corpus has a pair in {lang}: the student will not learn it; add a corpus, or leave it out of data.languages")


def _summary(recipe: Recipe, shards: int, read: list[Any], grouped: list[Any]) -> Prepared:
    rejected: dict[str, collections.Counter[str]] = {corpus.name: collections.Counter() for corpus in recipe.data.corpora}
    for summary in read:
        rejected[summary["corpus"]].update(summary["rejected"])
    by_corpus: dict[str, collections.Counter[str]] = {}
    for result in grouped:
        for name, count in result["duplicates"].items():
            rejected[name]["duplicate"] += count
        for name, counts in result["by_corpus"].items():
            by_corpus.setdefault(name, collections.Counter()).update(counts)

    def total(key: str) -> collections.Counter[str]:
        return sum((collections.Counter(result[key]) for result in grouped), collections.Counter())

    return Prepared(
        shards=shards,
        rows_read=sum(summary["rows"] for summary in read),
        pairs=sum(result["pairs"] for result in grouped),
        sentences=sum(result["sentences"] for result in grouped),
        per_shard=[result["sentences"] for result in grouped],
        languages=dict(total("languages").most_common()),
        corpora=dict(collections.Counter({name: counts.total() for name, counts in by_corpus.items()}).most_common()),
        by_corpus={name: dict(counts) for name, counts in by_corpus.items()},
        digests={name: f"{number % 2**64:016x}" for name, number in total("digests").items()},
        rejected=dict(sum(rejected.values(), collections.Counter()).most_common()),
        rejected_by_corpus={name: dict(counts.most_common()) for name, counts in rejected.items()},
    )


# --- which files ---


def _units(recipe: Recipe) -> list[Unit]:
    """One unit of work per input file: its corpus, paths, and column or code of each language."""
    if not recipe.data.corpora:
        raise Refused("data.corpora is empty: list at least one corpus (see recipes/demo.yaml)")
    units = [unit for corpus in recipe.data.corpora for unit in _corpus_units(recipe, corpus)]
    return [unit | {"key": f"{number:05d}"} for number, unit in enumerate(units)]


def _corpus_units(recipe: Recipe, corpus: Corpus) -> Iterator[Unit]:
    found: dict[tuple[str, str | None], list[str]] = {}
    for lang in recipe.data.languages:
        if corpus.languages is None or lang in corpus.languages:
            for pair in _files(recipe, corpus, corpus.codes.get(lang, lang)):
                found.setdefault(pair, []).append(lang)
    for (path, target), langs in found.items():
        kind = formats.format_of(path, target, corpus.format)
        by_code = kind in ("tmx", "moses")
        if by_code and (corpus.where or corpus.id):
            raise Refused(f"data.corpora.{corpus.name}: `where` and `id` name columns, and {path} ({kind}) has none; leave them out")
        if len(langs) > 1 and "{lang}" not in corpus.target and not by_code:
            raise Refused(
                f"data.corpora.{corpus.name}: {path} is read for {', '.join(langs)}, but `target: {corpus.target}` is one column. "
                f"Put {{lang}} into target or path, or set languages: [{langs[0]}]"
            )
        for group in [[lang] for lang in langs] if by_code else [langs]:
            yield {"corpus": corpus.name, "path": path, "target_path": target, "format": kind, "languages": group}


def _files(recipe: Recipe, corpus: Corpus, code: str) -> list[tuple[str, str | None]]:
    """(path, target path) of each file of a corpus in one language."""
    paths = formats.expand(recipe.located(corpus.path.replace("{lang}", code)), corpus.format)
    if corpus.target_path is None:
        return [(path, None) for path in paths]
    targets = formats.expand(recipe.located(corpus.target_path.replace("{lang}", code)), corpus.format)
    if len(paths) != len(targets):
        raise Refused(f"data.corpora.{corpus.name}: path matches {len(paths)} files and target_path {len(targets)}; they go in pairs")
    return list(zip(paths, targets, strict=True))


def _shard_count(units: list[Unit]) -> int:
    """A power of two that gives shards of some ten thousand sentences; compressed text counts four times."""
    total = 0
    for path in {unit["path"] for unit in units}:
        if path.startswith("hf://"):
            total += 1 << 28  # unknown; a middling corpus
        else:
            total += files.size(path) * (4 if path.endswith((*formats.COMPRESSIONS, ".zip", ".parquet")) else 1)
    return min(MOST_SHARDS, max(LEAST_SHARDS, 1 << (total // SHARD_BYTES).bit_length()))


# --- pass one: a file's rows, filtered and bucketed ---


def _prepare_file(unit: Unit, board: cluster.RemoteBoard, folder: str, settings: dict[str, Any], shards: int) -> dict[str, Any]:
    data = Data(**settings)
    corpus = next(corpus for corpus in data.corpora if corpus.name == unit["corpus"])
    rejected: collections.Counter[str] = collections.Counter()
    rows, parts, start = 0, [], streams.taken()
    for number, (good, bad) in enumerate(_batched(_file_tables(unit, corpus, data, filters.read_keys(folder)))):
        name = f"{unit['key']}-{number:05d}"
        if len(good):
            files.write(f"{folder}/parts/{name}.arrow", _bucketed(good, shards, unit))
            parts.append(name)
        groups.write_rejects(f"{folder}/rejects/{name}.parquet", bad)
        for entry in bad["reason"].value_counts().to_pylist():
            rejected[entry["values"].split(":")[0]] += entry["counts"]
        rows += len(good) + len(bad)
        board.count(unit["key"], rows, unit["share"] * min(1, (streams.taken() - start) / max(1, unit["size"])))
    board.count(unit["key"], rows, unit["share"])
    summary = {"corpus": corpus.name, "path": unit["path"], "rows": rows, "parts": parts, "rejected": dict(rejected)}
    files.write_json(f"{folder}/parts/{unit['key']}.json", summary)
    return summary


def _batched(tables: Iterable[tuple[pa.Table, pa.Table]]) -> Iterator[tuple[pa.Table, pa.Table]]:
    """(good, bad) tables put together up to PART_ROWS or PART_BYTES."""
    held: list[tuple[pa.Table, pa.Table]] = []
    rows = size = 0
    for pair in tables:
        held.append(pair)
        rows += sum(map(len, pair))
        size += sum(table.nbytes for table in pair)
        if rows >= PART_ROWS or size >= PART_BYTES:
            yield pa.concat_tables([good for good, _ in held]), pa.concat_tables([bad for _, bad in held])
            held, rows, size = [], 0, 0
    if held:
        yield pa.concat_tables([good for good, _ in held]), pa.concat_tables([bad for _, bad in held])


def _file_tables(unit: Unit, corpus: Corpus, data: Data, keys: filters.Keys) -> Iterator[tuple[pa.Table, pa.Table]]:
    """(rows kept, rows dropped) for each chunk and language of a file."""
    codes = {lang: corpus.codes.get(lang, lang) for lang in unit["languages"]}
    by_code = unit["format"] in ("tmx", "moses")
    source = "source" if by_code else corpus.source.replace("{lang}", corpus.codes.get(data.source_language, data.source_language))
    targets = {lang: "target" if by_code else corpus.target.replace("{lang}", code) for lang, code in codes.items()}
    columns = [source, *targets.values(), *([corpus.id] if corpus.id else []), *corpus.where]
    sides = {"source": corpus.codes.get(data.source_language, data.source_language), "target": next(iter(codes.values()))}
    options = {"target_path": unit["target_path"], "languages": sides, "subset": corpus.subset, "split": corpus.split}
    left = corpus.max_rows
    for chunk in formats.read(unit["path"], unit["format"], list(dict.fromkeys(columns)), **options):
        if left is not None:
            chunk = chunk.first(left)
            left -= len(chunk.lines)
        kept = _where(chunk, corpus)
        for lang, target in targets.items():
            yield _filtered(kept, source, target, lang, unit, corpus, data, keys)
        if chunk.bad:
            lines, reasons, texts = zip(*chunk.bad, strict=True)
            language = "+".join(unit["languages"])
            yield _no_rows(), _rejects(unit, language, pa.array(lines, pa.int64()), pa.array(reasons), pa.array(texts))
        if left == 0:
            return


def _where(chunk: Chunk, corpus: Corpus) -> Chunk:
    """The rows that the corpus' `where` asks for."""
    keep = np.ones(len(chunk.lines), dtype=bool)
    for column, wanted in corpus.where.items():
        allowed = pa.array([wanted] if isinstance(wanted, str) else wanted, pa.string())
        keep &= pc.is_in(chunk.columns[column], value_set=allowed).to_numpy(zero_copy_only=False)
    if keep.all():
        return chunk
    return Chunk(chunk.lines[keep], {name: values.filter(pa.array(keep)) for name, values in chunk.columns.items()})


def _filtered(
    chunk: Chunk, source: str, target: str, lang: str, unit: Unit, corpus: Corpus, data: Data, keys: filters.Keys
) -> tuple[pa.Table, pa.Table]:
    lines = pa.array(chunk.lines)
    sides = (text.clean(chunk.columns[source]), text.clean(chunk.columns[target]))
    reason = filters.reasons(*sides, chunk.columns[corpus.id] if corpus.id else None, lang, corpus, data, keys)
    language = pa.array(np.full(len(lines), unit["languages"].index(lang), np.int16))
    table = pa.table([lines, language, *sides], names=["line", "language", "source", "target"])
    if reason.null_count == len(reason):
        return table, _rejects(unit, lang, lines[:0], reason[:0], sides[0][:0])
    dropped = pc.is_valid(reason)
    shown = groups.shown(*(side.filter(dropped) for side in sides))
    return table.filter(pc.invert(dropped)), _rejects(unit, lang, lines.filter(dropped), reason.filter(dropped), shown)


def _no_rows() -> pa.Table:
    schema = pa.schema({"line": pa.int64(), "language": pa.int16(), "source": pa.string(), "target": pa.string()})
    return schema.empty_table()


def _rejects(unit: Unit, language: str, lines: pa.Array, reasons: pa.Array, texts: pa.Array) -> pa.Table:
    same = {"corpus": unit["corpus"], "file": unit["path"], "language": language}
    columns = {name: pa.repeat(pa.scalar(value, pa.string()), len(lines)) for name, value in same.items()}
    return pa.table(columns | {"line": lines, "reason": reasons, "text": texts})


def _bucketed(table: pa.Table, shards: int, unit: Unit) -> pa.Buffer:
    """An Arrow file whose i-th record batch holds the rows of shard i, so that a shard reads its own rows alone."""
    labels = {"corpus": unit["corpus"], "file": unit["path"], "languages": json.dumps(unit["languages"])}
    hashes = np.concatenate([text.text_hashes(sources) for sources in table["source"].chunks])
    shard = (hashes % np.uint64(shards)).astype(np.min_scalar_type(shards))
    order = np.argsort(shard, kind="stable")
    table = table.append_column("hash", pa.array(hashes)).replace_schema_metadata(labels)
    table = table.take(pa.array(order)).combine_chunks()
    bounds = np.searchsorted(shard[order], np.arange(shards + 1))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        for start, end in itertools.pairwise(bounds):
            (batch,) = table.slice(start, end - start).to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
            writer.write_batch(batch)
    return sink.getvalue()
