"""Readers of records with named fields: JSONL, Parquet, Hugging Face data sets, and the demo's phrase grammar.

A dot in a column's name enters a nested field (translation.en). A missing or null value is an empty text, so that one
absent translation does not cost the others; a column that no record of the first chunk has is refused.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from xdist import chunks, files, streams
from xdist.chunks import CHUNK_ROWS, KEPT, Bad, Chunk, Row
from xdist.errors import Refused

Record = dict[str, Any]


def jsonl(path: str, columns: list[str], **_: Any) -> Iterator[Chunk]:
    """One JSON object per line."""
    return _collected(
        path, columns, (_json(line) for line in streams.lines(streams.blocks(path)) if line.text is None or line.text.strip())
    )


def _json(line: streams.Line) -> tuple[int, Record] | Bad:
    if line.text is None:
        return Bad(line.number, line.reason)
    try:
        record = json.loads(line.text)
    except (ValueError, RecursionError):
        return Bad(line.number, "invalid_json", line.text[:KEPT])
    return (line.number, record) if isinstance(record, dict) else Bad(line.number, "not_an_object", line.text[:KEPT])


def parquet(path: str, columns: list[str], **_: Any) -> Iterator[Chunk]:
    """A Parquet file; only the wanted columns are read, a batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with files.open_input(path) as stream:
            reader = pq.ParquetFile(stream)
            names = reader.schema_arrow.names
            tops = list(dict.fromkeys(column if column in names else column.split(".")[0] for column in columns))
            chunks.places(path, names, tops)
            rows = (row for batch in reader.iter_batches(CHUNK_ROWS, columns=tops) for row in batch.to_pylist())
            yield from _collected(path, columns, enumerate(rows, start=1))
    except FileNotFoundError:
        raise Refused(f"{path} does not exist; check the corpus' path and data.root") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise Refused(f"{path} is damaged or no Parquet file: {error}") from None


def hugging_face(path: str, columns: list[str], subset: str | None = None, split: str = "train", **_: Any) -> Iterator[Chunk]:
    """A data set of the hub (hf://owner/name, streamed) or a folder that save_to_disk wrote."""
    import datasets

    try:
        if path.startswith("hf://"):
            data = datasets.load_dataset(path.removeprefix("hf://").removeprefix("datasets/"), subset, split=split, streaming=True)
        else:
            data = datasets.load_from_disk(path)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise Refused(f"{path} cannot be read as a Hugging Face data set: {error}") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise Refused(f"{path}: no split {split!r}; it has {', '.join(data)}. Set the corpus' split")
        data = data[split]
    batches = ((list(batch), zip(*batch.values(), strict=True)) for batch in data.iter(batch_size=1000))
    rows = (dict(zip(names, row, strict=True)) for names, values in batches for row in values)
    return _collected(path, columns, enumerate(rows, start=1))


def grammar(path: str, columns: list[str], **_: Any) -> Iterator[Chunk]:
    """Phrases that a grammar composes (see xdist/phrases.py); a column is a language."""
    from xdist.phrases import phrases

    def numbered() -> Iterator[tuple[int, Record]]:
        try:
            yield from enumerate(phrases(path), start=1)
        except ValueError as error:
            raise Refused(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None

    return _collected(path, columns, numbered())


def _collected(path: str, columns: list[str], records: Iterable[tuple[int, Record] | Bad]) -> Iterator[Chunk]:
    """Chunks of records. Raises Refused when the first chunk has records, and none of them has one of the columns."""
    absent: set[str] = set(columns)
    keys: dict[str, None] = {}
    seen: Callable[[str], None] = absent.discard

    def rows() -> Iterator[Row | Bad]:
        for item in records:
            yield item if isinstance(item, Bad) else _row(*item, columns, seen)
            if absent and not isinstance(item, Bad):
                keys.update(dict.fromkeys(item[1]))

    for number, chunk in enumerate(chunks.collect(columns, rows())):
        if number == 0 and absent and keys:
            raise chunks.missing(path, next(column for column in columns if column in absent), keys)
        yield chunk


def _row(number: int, record: Record, columns: list[str], seen: Callable[[str], None]) -> Row | Bad:
    values = []
    for column in columns:
        found, value = _nested(record, column)
        if found:
            seen(column)
        if isinstance(value, (dict, list, bytes)):
            return Bad(number, f"not_text_in_{column}", str(value)[:KEPT].encode(errors="replace").decode())
        values.append("" if value is None else str(value))
    try:
        "".join(values).encode()
    except UnicodeEncodeError:  # an escape such as \ud800 names half a character
        return Bad(number, "invalid_unicode", " ".join(values)[:KEPT].encode(errors="replace").decode())
    return number, values


def _nested(record: Any, column: str) -> tuple[bool, Any]:
    """Whether a record has the column, and its value."""
    if column in record:
        return True, record[column]
    for part in column.split("."):
        if not isinstance(record, dict) or part not in record:
            return False, None
        record = record[part]
    return True, record
