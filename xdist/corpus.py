"""Prepare: parallel text of any format becomes clean groups (a source sentence with its translations), shard by shard.

    corpora ──► parts/      rows that passed every filter, bucketed by shard      one Ray task per input file
            ──► rejects/    every dropped row: corpus, file, line, language, reason, text (Parquet)
    parts   ──► corpus/     one Parquet file per shard: hash, source, languages, texts, corpora; duplicates dropped

Both passes are exact and free of coordination: a file or a shard is done when its marker exists, so a run that was
killed goes on where it stopped. Memory holds one part of one file, or one shard, per task.
"""

import collections
import functools
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xdist import cluster, files, formats, tasks, text
from xdist.config import Corpus, Data, Recipe
from xdist.errors import Refused
from xdist.progress import Progress

PART_ROWS = 200_000
SHARD_BYTES = 2 << 20  # of input, so that a shard holds some ten thousand sentences
FIELDS = ("source", "target", "id")

Counts = dict[str, int]


@dataclass(frozen=True)
class Prepared:
    """What prepare found: totals for the plan and the report. `rows` counts pairs."""

    shards: int
    rows_read: int
    pairs: int
    sentences: int
    per_shard: list[int]
    languages: Counts
    corpora: Counts
    rejected: Counts
    rejected_by_corpus: dict[str, Counts]
    source_characters: int
    target_characters: int


def prepare(recipe: Recipe) -> Prepared:
    """Run both passes, or what is left of them. Needs a connected Ray. Raises Refused when nothing is left of the corpora."""
    folder = recipe.folder
    marker = f"{folder}/corpus/manifest.json"
    if files.exists(marker):
        return Prepared(**files.read_json(marker))
    units = _units(recipe)
    shards = recipe.data.shards or _shard_count(units)
    _write_evaluation_keys(recipe)
    settings = recipe.data.model_dump(mode="json")
    waiting = [unit for unit in units if not files.exists(f"{folder}/parts/{unit['key']}.json")]
    with Progress("read", "rows") as progress:
        for _ in cluster.stream(waiting, _prepare_file, progress, folder=folder, settings=settings, shards=shards):
            pass
    read = [files.read_json(f"{folder}/parts/{unit['key']}.json") for unit in units]
    parts = [part for summary in read for part in summary["parts"]]
    with Progress("group", "sentences") as progress:
        items = [{"shard": shard} for shard in range(shards)]
        grouped = list(cluster.stream(items, _group_shard, progress, folder=folder, parts=parts, shards=shards))
    prepared = _summary(recipe, shards, read, sorted(grouped, key=lambda result: result["shard"]))
    if not prepared.pairs:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in prepared.rejected.items()) or "no rows at all"
        raise Refused(f"no pair is left of {prepared.rows_read:,} rows read ({reasons}); {folder}/rejects/ holds each row")
    files.write_json(marker, prepared.__dict__)
    files.remove(f"{folder}/parts")
    return prepared


def _summary(recipe: Recipe, shards: int, read: list[Any], grouped: list[Any]) -> Prepared:
    by_corpus: dict[str, collections.Counter[str]] = {corpus.name: collections.Counter() for corpus in recipe.data.corpora}
    for summary in read:
        by_corpus[summary["corpus"]].update(summary["rejected"])
    for result in grouped:
        for name, count in result["duplicates"].items():
            by_corpus[name]["duplicate"] += count

    def total(key: str) -> collections.Counter[str]:
        return sum((collections.Counter(result[key]) for result in grouped), collections.Counter())

    return Prepared(
        shards=shards,
        rows_read=sum(summary["rows"] for summary in read),
        pairs=sum(result["pairs"] for result in grouped),
        sentences=sum(result["sentences"] for result in grouped),
        per_shard=[result["sentences"] for result in grouped],
        languages=dict(total("languages").most_common()),
        corpora=dict(total("corpora").most_common()),
        rejected=dict(sum(by_corpus.values(), collections.Counter()).most_common()),
        rejected_by_corpus={name: dict(counts.most_common()) for name, counts in by_corpus.items()},
        source_characters=sum(result["source_characters"] for result in grouped),
        target_characters=sum(result["target_characters"] for result in grouped),
    )


# --- which files ---


def _units(recipe: Recipe) -> list[dict[str, Any]]:
    """One unit of work per input file: its corpus, paths, and column or code of each language."""
    if not recipe.data.corpora:
        raise Refused("data.corpora is empty: list at least one corpus (see recipes/demo.yaml)")
    units = [unit for corpus in recipe.data.corpora for unit in _corpus_units(recipe, corpus)]
    return [unit | {"key": f"{number:05d}"} for number, unit in enumerate(units)]


def _corpus_units(recipe: Recipe, corpus: Corpus) -> Iterator[dict[str, Any]]:
    wanted = [lang for lang in recipe.data.languages if corpus.languages is None or lang in corpus.languages]
    wide = "{lang}" in corpus.target
    found: dict[tuple[str, str | None], list[str]] = {}
    for lang in wanted:
        code = corpus.codes.get(lang, lang)
        paths = formats.expand(recipe.located(corpus.path.replace("{lang}", code)), corpus.format)
        target = recipe.located(corpus.target_path.replace("{lang}", code)) if corpus.target_path else None
        if target is not None:
            formats.expand(target, corpus.format)
        for path in paths:
            found.setdefault((path, target), []).append(lang)
    for (path, target), langs in found.items():
        kind = formats.format_of(path, target, corpus.format)
        by_code = kind in ("tmx", "moses")
        if len(langs) > 1 and not wide and not by_code:
            raise Refused(
                f"data.corpora.{corpus.name}: {path} is read for {', '.join(langs)}, but `target: {corpus.target}` is one column. "
                f"Put {{lang}} into target or path, or set languages: [{langs[0]}]"
            )
        for group in [[lang] for lang in langs] if by_code else [langs]:
            yield {"corpus": corpus.name, "path": path, "target_path": target, "format": kind, "languages": group}


def _shard_count(units: list[dict[str, Any]]) -> int:
    """A power of two that gives shards of some ten thousand sentences; compressed text counts four times."""
    total = 0
    for path in {unit["path"] for unit in units}:
        if path.startswith("hf://"):
            total += 1 << 28  # unknown; a middling corpus
        else:
            total += files.size(path) * (4 if path.endswith((*formats.COMPRESSIONS, ".zip", ".parquet")) else 1)
    return 1 << max(0, min(14, total // SHARD_BYTES).bit_length())


# --- evaluation text is kept out ---


def _write_evaluation_keys(recipe: Recipe) -> None:
    """Match keys of all evaluation texts, and ids by task, where the tasks of `_prepare_file` find them."""
    keys: list[np.ndarray] = [np.empty(0, np.uint64)]
    ids: dict[str, set[str]] = {}
    for task, rows in tasks.held_out(recipe) if recipe.evaluate.decontaminate else ():
        keys += [text.match_keys(text.clean(pa.array(rows[role], pa.string()))) for role in ("text", "text2") if role in rows]
        ids.setdefault(task.name, set()).update(rows.get("id", ()))
    buffer = io.BytesIO()
    np.save(buffer, np.unique(np.concatenate(keys)))
    files.write(f"{recipe.folder}/parts/evaluation_texts.npy", buffer.getvalue())
    files.write_json(f"{recipe.folder}/parts/evaluation_ids.json", {name: sorted(found) for name, found in ids.items()})


@functools.lru_cache(maxsize=2)
def _evaluation_keys(folder: str) -> tuple[np.ndarray, dict[str, list[str]]]:
    texts = np.load(io.BytesIO(files.read(f"{folder}/parts/evaluation_texts.npy")), allow_pickle=False)
    return texts, files.read_json(f"{folder}/parts/evaluation_ids.json")


# --- pass one: a file's rows, filtered and bucketed ---


def _prepare_file(unit: dict[str, Any], board: cluster.RemoteBoard, folder: str, settings: dict[str, Any], shards: int) -> dict[str, Any]:
    data = Data(**settings)
    corpus = next(corpus for corpus in data.corpora if corpus.name == unit["corpus"])
    rejected: collections.Counter[str] = collections.Counter()
    rows, parts = 0, []
    for number, tables in enumerate(_batched(_file_tables(unit, corpus, data, folder), PART_ROWS)):
        table = pa.concat_tables(tables)
        bad = table.filter(pc.is_valid(table["reason"]))
        good = table.filter(pc.is_null(table["reason"]))
        name = f"{unit['key']}-{number:05d}"
        if len(good):
            files.write(f"{folder}/parts/{name}.arrow", _bucketed(good, shards))
            parts.append(name)
        _write_rejects(f"{folder}/rejects/{name}.parquet", bad)
        for reason in bad["reason"].to_pylist():
            rejected[reason.split(":")[0]] += 1
        rows += len(table)
        board.count(unit["key"], rows)
    summary = {"corpus": corpus.name, "path": unit["path"], "rows": rows, "parts": parts, "rejected": dict(rejected)}
    files.write_json(f"{folder}/parts/{unit['key']}.json", summary)
    return summary


def _write_rejects(uri: str, bad: pa.Table) -> None:
    if len(bad):
        columns = {name: bad[name] for name in ("corpus", "file", "line", "language", "reason")}
        joined = pc.binary_join_element_wise(bad["source"], bad["target"], " ⇥ ", null_handling="skip")
        files.write_table(uri, pa.table({**columns, "text": pc.utf8_slice_codeunits(joined, 0, 500)}))


def _batched(tables: Iterable[pa.Table], rows: int) -> Iterator[list[pa.Table]]:
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= rows:
            yield held
            held = []
    if held:
        yield held


def _file_tables(unit: dict[str, Any], corpus: Corpus, data: Data, folder: str) -> Iterator[pa.Table]:
    """Tables of (corpus, file, line, language, source, target, hash, reason) for each chunk and language of a file."""
    codes = {lang: corpus.codes.get(lang, lang) for lang in unit["languages"]}
    by_code = unit["format"] in ("tmx", "moses")
    source = "source" if by_code else corpus.source.replace("{lang}", data.source_language)
    targets = {lang: "target" if by_code else corpus.target.replace("{lang}", code) for lang, code in codes.items()}
    columns = [source, *targets.values()] + ([] if by_code else [*([corpus.id] if corpus.id else []), *corpus.where])
    sides = {"source": data.source_language, "target": next(iter(codes.values()))}
    options = {"target_path": unit["target_path"], "languages": sides, "subset": corpus.subset, "split": corpus.split}
    left = corpus.max_rows
    for chunk in formats.read(unit["path"], unit["format"], list(dict.fromkeys(columns)), **options):
        if left is not None:
            chunk = chunk.first(left)
            left -= len(chunk.lines)
        keep = _where(chunk, corpus)
        for lang, target in targets.items():
            if keep.any():
                lines = np.asarray(chunk.lines)[keep]
                sides_ = [pa.array(chunk.columns[name], pa.string()).filter(pa.array(keep)) for name in (source, target)]
                ids = [value for value, kept in zip(chunk.columns[corpus.id], keep, strict=True) if kept] if corpus.id in chunk.columns else None
                yield _filtered(lang, lines, *sides_, ids, corpus, unit["path"], data, folder)
        if chunk.bad:
            yield _bad_rows(chunk, corpus, unit)
        if left == 0:
            return


def _where(chunk: formats.Chunk, corpus: Corpus) -> np.ndarray:
    keep = np.ones(len(chunk.lines), dtype=bool)
    for column, wanted in corpus.where.items():
        allowed = {wanted} if isinstance(wanted, str) else set(wanted)
        keep &= np.fromiter((value in allowed for value in chunk.columns[column]), dtype=bool, count=len(keep))
    return keep


def _filtered(
    lang: str, lines: np.ndarray, source: pa.Array, target: pa.Array, ids: list[str] | None, corpus: Corpus, path: str, data: Data, folder: str
) -> pa.Table:
    source, target = text.clean(source), text.clean(target)
    reasons = np.full(len(lines), None, dtype=object)
    for reason, failed in _filters(source, target, ids, lang, corpus, data, folder):
        hit = np.flatnonzero(np.equal(reasons, None))
        reasons[hit[failed(hit)]] = reason
    return pa.table(
        {
            "corpus": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(lines), np.int8)), [corpus.name]).cast(pa.string()),
            "file": pa.array([path] * len(lines), pa.string()),
            "line": pa.array(lines, pa.int64()),
            "language": pa.array([lang] * len(lines), pa.string()),
            "source": source,
            "target": target,
            "hash": pa.array(text.text_hashes(source.to_pylist()), pa.uint64()),
            "reason": pa.array(reasons, pa.string()),
        }
    )


Failed = Callable[[np.ndarray], np.ndarray]


def _filters(
    source: pa.Array, target: pa.Array, ids: list[str] | None, lang: str, corpus: Corpus, data: Data, folder: str
) -> Iterator[tuple[str, Failed]]:
    """(reason, which of the given row indices fail), in the order in which a row's one reason is decided."""
    lengths = [pc.utf8_length(side).to_numpy() for side in (source, target)]
    shorter, longer = np.minimum(*lengths), np.maximum(*lengths)
    yield "empty", lambda rows: shorter[rows] == 0
    yield "identical", lambda rows: pc.equal(source, target).to_numpy(zero_copy_only=False)[rows]
    yield "too_short", lambda rows: shorter[rows] < data.min_chars
    yield "too_long", lambda rows: longer[rows] > data.max_chars
    yield "length_ratio", lambda rows: (longer[rows] + 8) > data.max_length_ratio * (shorter[rows] + 8)
    texts, task_ids = _evaluation_keys(folder)
    if ids is not None and corpus.shares_ids_with:
        kept_out = {name for task in corpus.shares_ids_with for name in task_ids.get(task, [])}
        yield "evaluation_id", lambda rows: np.fromiter((ids[row] in kept_out for row in rows), dtype=bool, count=len(rows))
    if len(texts):
        for side in (source, target):
            keys = text.match_keys(side)
            yield "evaluation_text", lambda rows, keys=keys: np.isin(keys[rows], texts)
    if data.detect_language:
        for side, expected in ((source, data.source_language), (target, lang)):
            yield (
                "wrong_language",
                lambda rows, side=side, expected=expected: _foreign(side.take(rows).to_pylist(), expected, data),
            )


def _foreign(texts: list[str], expected: str, data: Data) -> np.ndarray:
    """Which texts are in another language of the recipe. Short texts are let through: they cannot be told apart."""
    names = [language.iso_code_639_1.name.lower() if language else "" for language in _detector(data).detect_languages_in_parallel_of(texts)]
    return np.array([len(text) >= 20 and name not in ("", expected.split("-")[0]) for text, name in zip(texts, names, strict=True)], dtype=bool)


@functools.lru_cache(maxsize=1)
def _detector_of(languages: tuple[str, ...]) -> Any:
    try:
        from lingua import IsoCode639_1, LanguageDetectorBuilder
    except ImportError:
        raise Refused("data.detect_language needs lingua; install it with: pip install 'xdist-ray[langid]'") from None
    try:
        codes = [getattr(IsoCode639_1, language.split("-")[0].upper()) for language in languages]
    except AttributeError as error:
        raise Refused(f"data.detect_language: lingua does not know this language ({error}); turn it off") from None
    return LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()


def _detector(data: Data) -> Any:
    return _detector_of((data.source_language, *data.languages))


def _bad_rows(chunk: formats.Chunk, corpus: Corpus, unit: dict[str, Any]) -> pa.Table:
    count = len(chunk.bad)
    return pa.table(
        {
            "corpus": [corpus.name] * count,
            "file": [unit["path"]] * count,
            "line": pa.array([bad.line for bad in chunk.bad], pa.int64()),
            "language": ["+".join(unit["languages"])] * count,
            "source": [bad.text for bad in chunk.bad],
            "target": pa.nulls(count, pa.string()),
            "hash": pa.array(np.zeros(count, np.uint64)),
            "reason": [bad.reason for bad in chunk.bad],
        }
    )


def _bucketed(table: pa.Table, shards: int) -> pa.Buffer:
    """An Arrow file whose i-th record batch holds the rows of shard i, so that a shard reads its own rows alone."""
    table = table.drop_columns(["reason"])
    shard = table["hash"].to_numpy() % np.uint64(shards)
    order = np.argsort(shard, kind="stable")
    table = table.take(pa.array(order)).combine_chunks()
    bounds = np.searchsorted(shard[order], np.arange(shards + 1, dtype=np.uint64))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            batches = table.slice(start, end - start).to_batches()
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema))
    return sink.getvalue()


# --- pass two: a shard's groups ---


def _group_shard(item: dict[str, Any], board: cluster.RemoteBoard, folder: str, parts: list[str], shards: int) -> dict[str, Any]:
    shard = item["shard"]
    uri = f"{folder}/corpus/{shard:05d}.parquet"
    if not files.exists(uri):
        rows = _shard_rows(folder, parts, shard)
        rows = rows.sort_by([(name, "ascending") for name in ("hash", "language", "target", "corpus", "file", "line")])
        first = _first_of_run(rows)
        duplicates = rows.filter(pa.array(~first))
        _write_rejects(
            f"{folder}/rejects/duplicates-{shard:05d}.parquet",
            duplicates.append_column("reason", pa.array(["duplicate"] * len(duplicates), pa.string())),
        )
        counts = collections.Counter(duplicates["corpus"].to_pylist())
        table = _grouped(rows.filter(pa.array(first)))
        files.write_json(f"{folder}/parts/duplicates-{shard:05d}.json", counts)
        files.write_table(uri, table)
    table = files.read_table(uri)
    board.count(str(shard), len(table))
    languages, corpora = (collections.Counter(table[name].combine_chunks().flatten().to_pylist()) for name in ("languages", "corpora"))
    return {
        "shard": shard,
        "sentences": len(table),
        "pairs": sum(languages.values()),
        "languages": languages,
        "corpora": corpora,
        "duplicates": files.read_json(f"{folder}/parts/duplicates-{shard:05d}.json"),
        "source_characters": pc.sum(pc.utf8_length(table["source"])).as_py() or 0,
        "target_characters": pc.sum(pc.utf8_length(table["texts"].combine_chunks().flatten())).as_py() or 0,
    }


def _shard_rows(folder: str, parts: list[str], shard: int) -> pa.Table:
    batches = []
    for part in parts:
        with files.open_input(f"{folder}/parts/{part}.arrow") as stream:
            batches.append(pa.ipc.open_file(stream).get_batch(shard))
    return pa.Table.from_batches(batches).combine_chunks()


def _first_of_run(rows: pa.Table) -> np.ndarray:
    """Mask of the first of each run of equal (hash, language, target) in sorted rows."""
    first = np.ones(len(rows), dtype=bool)
    if len(rows) > 1:
        same = [pc.equal(rows[name][1:], rows[name][:-1]).to_numpy() for name in ("hash", "language", "target")]
        first[1:] = ~(same[0] & same[1] & same[2])
    return first


def _grouped(rows: pa.Table) -> pa.Table:
    hashes = rows["hash"].to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else np.empty(0, np.int64)
    offsets = pa.array(np.concatenate([starts, [len(hashes)]]), pa.int32())

    def lists(name: str) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, rows[name].combine_chunks())

    return pa.table(
        {
            "hash": pa.array(hashes[starts], pa.uint64()),
            "source": rows["source"].take(pa.array(starts)),
            "languages": lists("language"),
            "texts": lists("target"),
            "corpora": lists("corpus"),
        }
    )
