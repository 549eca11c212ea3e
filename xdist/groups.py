"""Prepare's second pass: a shard's rows become groups, a source sentence with its translations; duplicates are dropped.

Reads parts/ (see xdist/corpus.py). Writes corpus/<shard>.parquet (hash, source, languages, texts, corpora) and, for exact
duplicates, rejects/duplicates-<shard>.parquet. The first of equal pairs is kept, in the order of corpora, files and lines.
"""

import collections
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xdist import cluster, files, text

SHOWN = 500  # characters of a rejected row that are kept
ITEM_SHARDS = 16
ITEM_PAIRS = 400_000


def write_rejects(uri: str, bad: pa.Table) -> None:
    """Rejected rows as a Parquet file; none where there are none."""
    if len(bad):
        files.write_table(uri, bad.select(["corpus", "file", "line", "language", "reason", "text"]))


def shown(source: pa.Array, target: pa.Array) -> pa.Array:
    """Both sides as the one text that a rejects file shows."""
    return pc.utf8_slice_codeunits(pc.binary_join_element_wise(source, target, " ⇥ "), 0, SHOWN)


def items(shards: int, pairs: int, cores: int) -> list[dict[str, Any]]:
    """Items of work: several shards together where there are many to a core, since each item opens every part, and Ray takes longer to
    start one than a shard takes. They are in memory together: no more than ITEM_PAIRS or ITEM_SHARDS, though one at least."""
    count = max(1, min(ITEM_SHARDS, shards // (4 * cores), ITEM_PAIRS * shards // max(1, pairs)))
    return [{"shards": list(range(first, min(first + count, shards)))} for first in range(0, shards, count)]


def group(item: dict[str, Any], board: cluster.RemoteBoard, folder: str, parts: list[str]) -> dict[str, Any]:
    """Group the shards of an item that are not done yet; their counts."""
    waiting = [shard for shard in item["shards"] if not files.exists(_uri(folder, shard))]
    rows = dict(zip(waiting, _shard_rows(folder, parts, waiting), strict=True))
    done = []
    for shard in item["shards"]:
        table = _group_shard(folder, shard, rows.pop(shard)) if shard in rows else files.read_table(_uri(folder, shard))
        done.append(_counts(folder, shard, table))
        board.count(str(item["shards"][0]), sum(result["pairs"] + sum(result["duplicates"].values()) for result in done))
    return {"shards": done}


def _uri(folder: str, shard: int) -> str:
    return f"{folder}/corpus/{shard:05d}.parquet"


def _group_shard(folder: str, shard: int, rows: pa.Table) -> pa.Table:
    """Write one shard, and give it; its Parquet file, written last, is the marker that it is done."""
    rows = rows.take(pc.sort_indices(rows, [(name, "ascending") for name in ("hash", "language", "target")]))  # a stable sort
    first = _first_of_run(rows)
    again = rows.filter(pa.array(~first))
    again = again.append_column("reason", pa.repeat(pa.scalar("duplicate"), len(again)))
    again = again.append_column("text", shown(again["source"], again["target"]))
    write_rejects(f"{folder}/rejects/duplicates-{shard:05d}.parquet", again)
    files.write_json(f"{folder}/parts/duplicates-{shard:05d}.json", collections.Counter(again["corpus"].to_pylist()))
    table = _grouped(rows.filter(pa.array(first)))
    files.write_table(_uri(folder, shard), table)
    return table


def _counts(folder: str, shard: int, table: pa.Table) -> dict[str, Any]:
    pairs = pa.table({name: table[name].combine_chunks().flatten() for name in ("corpora", "languages")})
    by_corpus: dict[str, collections.Counter[str]] = {}
    for entry in pairs.group_by(["corpora", "languages"], use_threads=False).aggregate([([], "count_all")]).to_pylist():
        by_corpus.setdefault(entry["corpora"], collections.Counter())[entry["languages"]] = entry["count_all"]
    return {
        "shard": shard,
        "sentences": len(table),
        "pairs": len(pairs),
        "languages": sum(by_corpus.values(), collections.Counter()),
        "by_corpus": by_corpus,
        "digests": _digests(table),
        "duplicates": files.read_json(f"{folder}/parts/duplicates-{shard:05d}.json"),
    }


def _digests(table: pa.Table) -> dict[str, int]:
    """For each corpus a number of its pairs that depends neither on their order nor on the shards they are in."""
    sizes = pc.list_value_length(table["texts"]).to_numpy()
    corpora = table["corpora"].combine_chunks().flatten().dictionary_encode()
    pairs = np.repeat(table["hash"].to_numpy(), sizes) * np.uint64(31)
    pairs ^= text.text_hashes(table["texts"].combine_chunks().flatten())
    places = corpora.indices.to_numpy()
    return {name: int(pairs[places == place].sum()) for place, name in enumerate(corpora.dictionary.to_pylist())}


def _shard_rows(folder: str, parts: list[str], shards: list[int]) -> list[pa.Table]:
    """Rows of each shard, in the order of the corpora, files and lines."""
    found: list[list[pa.Table]] = [[] for _ in shards]
    for part in parts if shards else ():
        with files.open_input(f"{folder}/parts/{part}.arrow") as stream:
            reader = pa.ipc.open_file(stream)
            labels = {name.decode(): value.decode() for name, value in reader.schema.metadata.items()}
            for tables, shard in zip(found, shards, strict=True):
                table = pa.Table.from_batches([reader.get_batch(shard)]).replace_schema_metadata(None)
                table = table.set_column(1, "language", pa.array(json.loads(labels["languages"])).take(table["language"]))
                for name in ("corpus", "file"):
                    table = table.append_column(name, pa.repeat(pa.scalar(labels[name]), len(table)))
                tables.append(table)
    return [pa.concat_tables(tables).combine_chunks() for tables in found]


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
