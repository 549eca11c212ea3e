"""Readers of parallel text: every format becomes a stream of chunks of rows, bad rows apart with their line and reason.

Reads TSV, CSV, JSONL, Parquet, TMX, Moses pairs (two aligned files, also inside an OPUS zip), Hugging Face data sets and
the demo's phrase grammar; plain or .gz, .bz2, .zst; from any storage. Memory holds one block of a file at a time.
Archives and XML are read defensively: nothing is extracted to disk, entities and absurd ratios are refused.
"""

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow.fs as pafs

from xdist import files, streams
from xdist.errors import Refused

CHUNK_ROWS = 20_000
MAX_ZIP_RATIO = 200
ENDINGS = {".tsv": "tsv", ".txt": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
ENDINGS |= {".tmx": "tmx", ".zip": "moses"}
COMPRESSIONS = (".gz", ".bz2", ".zst")


class Bad(NamedTuple):
    """A row that could not be read: its line (from 1), the reason, the beginning of its text."""

    line: int
    reason: str
    text: str


@dataclass
class Chunk:
    """Rows of one file: line numbers and, per wanted column, the values; `bad` holds what could not be read."""

    lines: list[int] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)

    def first(self, rows: int) -> "Chunk":
        """The first rows alone; bad rows stay."""
        return Chunk(self.lines[:rows], {name: values[:rows] for name, values in self.columns.items()}, self.bad)


def format_of(path: str, target_path: str | None, declared: str) -> str:
    """The format of a file, by its declaration or its ending. Raises Refused for an unknown ending."""
    if declared != "auto":
        return declared
    if target_path:
        return "moses"
    if path.startswith("hf://"):
        return "hf"
    plain = path
    for ending in COMPRESSIONS:
        plain = plain.removesuffix(ending)
    for ending, name in ENDINGS.items():
        if plain.endswith(ending):
            return name
    fs, inner = files.resolve(path)
    if fs.get_file_info(inner).type == pafs.FileType.Directory:
        return "hf"
    raise Refused(f"{path}: the ending tells no format; set data.corpora.….format")


def expand(path: str, declared: str) -> list[str]:
    """Files that a path, glob or folder stands for, sorted. Raises Refused when there is none."""
    if path.startswith("hf://"):
        return [path]
    fs, inner = files.resolve(path)
    if any(sign in inner for sign in "*?["):
        found = _glob(fs, path, inner)
    else:
        info = fs.get_file_info(inner)
        if info.type == pafs.FileType.File:
            return [path]
        if info.type == pafs.FileType.NotFound:
            raise Refused(f"{path} does not exist; check the corpus' path and data.root")
        saved = {"state.json", "dataset_info.json", "dataset_dict.json"} & set(files.names(path))
        if declared == "hf" or saved:
            return [path]
        found = [f"{path}/{name}" for name in files.names(path) if not name.startswith((".", "_"))]
        found = [name for name in found if declared != "auto" or any(ending in name for ending in ENDINGS)]
    if not found:
        raise Refused(f"{path} matches no file; check the corpus' path and data.root")
    return found


def _glob(fs: pafs.FileSystem, uri: str, inner: str) -> list[str]:
    import fnmatch

    fixed = inner[: min(inner.find(sign) for sign in "*?[" if sign in inner)].rpartition("/")[0]
    prefix = uri[: len(uri) - len(inner)] if uri.endswith(inner) else ""
    found = fs.get_file_info(pafs.FileSelector(fixed, recursive=True, allow_not_found=True))
    return sorted(prefix + info.path for info in found if info.is_file and fnmatch.fnmatchcase(info.path, inner))


def read(path: str, kind: str, columns: list[str], **options: Any) -> Iterator[Chunk]:
    """Chunks of at most about CHUNK_ROWS rows with the wanted columns.

    `options`: `target_path` (moses), `languages` (moses, tmx, phrases: column → language code), `subset` and `split` (hf).
    Raises Refused for a missing column or file, and for archives or XML that could do harm.
    """
    readers: dict[str, Callable[..., Iterator[Chunk]]] = {
        "tsv": _tsv, "csv": _csv, "jsonl": _jsonl, "parquet": _parquet, "tmx": _tmx, "moses": _moses, "hf": _hf, "phrases": _phrases
    }  # fmt: skip
    return readers[kind](path, columns, **options)


class _Collector:
    """Gathers rows into chunks. The order of `columns` is the order of a row's values."""

    def __init__(self, columns: list[str]):
        self.columns = columns
        self.rows: list[list[str]] = []
        self.lines: list[int] = []
        self.bad: list[Bad] = []

    def take(self) -> Chunk:
        """What was gathered since the last call."""
        values = [list(column) for column in zip(*self.rows, strict=True)] or [[] for _ in self.columns]
        chunk = Chunk(self.lines, dict(zip(self.columns, values, strict=True)), self.bad)
        self.rows, self.lines, self.bad = [], [], []
        return chunk

    def full(self) -> bool:
        """Whether it is time to hand a chunk on."""
        return len(self.rows) + len(self.bad) >= CHUNK_ROWS


def _collect(columns: list[str], rows: Iterable[tuple[int, list[str]] | Bad]) -> Iterator[Chunk]:
    gathered = _Collector(columns)
    for row in rows:
        if isinstance(row, Bad):
            gathered.bad.append(row)
        else:
            gathered.lines.append(row[0])
            gathered.rows.append(row[1])
        if gathered.full():
            yield gathered.take()
    yield gathered.take()


def _places(path: str, header: list[str], columns: list[str]) -> list[int]:
    for column in columns:
        if column not in header:
            raise Refused(f"{path}: no column {column!r}; it has {', '.join(header)}. Set the corpus' or task's column names")
    return [header.index(column) for column in columns]


def _tsv(path: str, columns: list[str], **_: Any) -> Iterator[Chunk]:
    """Tab-separated with a header; quotes are data."""
    return _delimited(path, columns, ((line, line.text.split("\t") if line.text is not None else None) for line in streams.lines(streams.blocks(path))))


def _csv(path: str, columns: list[str], **_: Any) -> Iterator[Chunk]:
    """Comma-separated with a header, RFC 4180 quoting; a record may span lines."""
    return _delimited(path, columns, _csv_records(streams.lines(streams.blocks(path))))


def _delimited(path: str, columns: list[str], records: Iterator[tuple[streams.Line, list[str] | None]]) -> Iterator[Chunk]:
    first, header = next(records, (streams.Line(0, None, "the file is empty"), None))
    if header is None:
        raise Refused(f"{path}: the header cannot be read ({first.reason})")
    places = _places(path, header, columns)

    def rows() -> Iterator[tuple[int, list[str]] | Bad]:
        for line, fields in records:
            if fields is None:
                yield Bad(line.number, line.reason, (line.text or "")[:200])
            elif len(fields) == len(header):
                yield line.number, [fields[place] for place in places]
            elif line.text:
                yield Bad(line.number, f"{len(fields)}_fields_instead_of_{len(header)}", line.text[:200])

    return _collect(columns, rows())


def _csv_records(lines: Iterator[streams.Line], most: int = 50) -> Iterator[tuple[streams.Line, list[str] | None]]:
    """CSV records. An opening quote that is not closed within `most` lines costs its own line, not the rest of the file."""
    pending: list[streams.Line] = []
    while True:
        if pending:
            line = pending.pop(0)
        elif (line := next(lines, None)) is None:  # type: ignore[assignment]
            return
        if line.text is None:
            yield line, None
            continue
        record, taken = line.text, []
        while record.count('"') % 2 and len(taken) < most:
            following = pending.pop(0) if pending else next(lines, None)
            if following is None:
                break
            taken.append(following)
            if following.text is None:
                break
            record += "\n" + following.text
        if record.count('"') % 2:
            pending = taken + pending
            yield line._replace(reason="unbalanced_quote"), None
        else:
            yield line, next(csv.reader(io.StringIO(record, newline=""))) if record else []


def _jsonl(path: str, columns: list[str], **_: Any) -> Iterator[Chunk]:
    def rows() -> Iterator[tuple[int, list[str]] | Bad]:
        for number, text, reason in streams.lines(streams.blocks(path)):
            if text is None:
                yield Bad(number, reason, "")
            elif text.strip():
                yield _json_row(path, number, text, columns)

    return _collect(columns, rows())


def _json_row(path: str, number: int, text: str, columns: list[str]) -> tuple[int, list[str]] | Bad:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return Bad(number, "invalid_json", text[:200])
    if not isinstance(record, dict):
        return Bad(number, "not_an_object", text[:200])
    values = [_nested(record, column) for column in columns]
    missing = [column for column, value in zip(columns, values, strict=True) if value is None]
    if missing and number == 1:
        raise Refused(f"{path}: no column {missing[0]!r}; it has {', '.join(map(str, record))}. Set the corpus' or task's column names")
    if missing:
        return Bad(number, f"no_{missing[0]}", text[:200])
    texts = [str(value) for value in values]
    if any("\ud800" <= character <= "\udfff" for value in texts for character in value):
        return Bad(number, "invalid_unicode", text[:200])  # an escape such as \\ud800 names half a character
    return number, texts


def _nested(record: Any, column: str) -> Any:
    if isinstance(record, dict) and column in record:
        return record[column]
    for part in column.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _parquet(path: str, columns: list[str], **_: Any) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with files.open_input(path) as stream:
            reader = pq.ParquetFile(stream)
            tops = list(dict.fromkeys(column if column in reader.schema_arrow.names else column.split(".")[0] for column in columns))
            _places(path, reader.schema_arrow.names, tops)
            batches = (batch.to_pylist() for batch in reader.iter_batches(CHUNK_ROWS, columns=tops))
            yield from _records(path, columns, batches)
    except pa.ArrowInvalid as error:
        raise Refused(f"{path} is damaged or no Parquet file: {error}") from None


def _records(path: str, columns: list[str], batches: Iterable[list[dict[str, Any]]]) -> Iterator[Chunk]:
    number = 0
    for batch in batches:
        gathered = _Collector(columns)
        for record in batch:
            number += 1
            values = [_nested(record, column) for column in columns]
            if all(value is None for value in values):
                raise Refused(f"{path}: no column {columns[0]!r} in row {number}; it has {', '.join(record)}")
            if None in values:
                gathered.bad.append(Bad(number, f"no_{columns[values.index(None)]}", ""))
            else:
                gathered.lines.append(number)
                gathered.rows.append([str(value) for value in values])
        yield gathered.take()


def _hf(path: str, columns: list[str], subset: str | None = None, split: str = "train", **_: Any) -> Iterator[Chunk]:
    import datasets

    if path.startswith("hf://"):
        name = path.removeprefix("hf://").removeprefix("datasets/")
        data = datasets.load_dataset(name, subset, split=split, streaming=True)
    else:
        data = datasets.load_from_disk(path)
        data = data[split] if isinstance(data, datasets.DatasetDict) else data
    batches = ([dict(zip(b, row, strict=True)) for row in zip(*b.values(), strict=True)] for b in data.iter(batch_size=CHUNK_ROWS))
    return _records(path, columns, batches)


def _moses(path: str, columns: list[str], target_path: str | None = None, languages: dict[str, str] | None = None, **_: Any) -> Iterator[Chunk]:
    if path.endswith(".zip"):
        sides = [_member(path, code) for code in (languages or {}).values()]
    else:
        sides = [streams.blocks(path), streams.blocks(target_path or "")]

    def rows() -> Iterator[tuple[int, list[str]] | Bad]:
        texts_of = [streams.lines(side) for side in sides]
        while True:
            pair = [next(side, None) for side in texts_of]
            if all(line is None for line in pair):
                return
            if any(line is None for line in pair):
                longer = next(line for line in pair if line is not None)
                yield Bad(longer.number, "sides_differ_in_length", "")
                return
            texts = [line.text for line in pair if line is not None and line.text is not None]
            number = max(line.number for line in pair if line is not None)
            reason = next((line.reason for line in pair if line is not None and line.reason), "")
            yield (number, texts) if len(texts) == len(pair) else Bad(number, reason, "")

    return _collect(columns, rows())


def _member(path: str, code: str) -> Iterator[bytes]:
    """The file of one language inside an OPUS zip, as a stream; nothing is written to disk."""
    try:
        with files.open_input(path) as raw, zipfile.ZipFile(raw) as archive:
            for info in archive.infolist():
                if info.filename.startswith(("/", "\\")) or ".." in info.filename.replace("\\", "/").split("/"):
                    raise Refused(f"{path}: member {info.filename!r} points outside the archive; such a file is not read")
                if info.file_size > MAX_ZIP_RATIO * max(info.compress_size, 1 << 16):
                    raise Refused(f"{path}: member {info.filename!r} unpacks to more than {MAX_ZIP_RATIO} times its size; not read")
            found = [info for info in archive.infolist() if info.filename.endswith(f".{code}")]
            if len(found) != 1:
                listed = ", ".join(archive.namelist()[:10])
                raise Refused(f"{path}: {len(found)} members end in .{code}, one is needed; it has {listed}")
            with archive.open(found[0]) as stream:
                while block := stream.read(streams.BLOCK):
                    yield block
    except (zipfile.BadZipFile, zlib.error) as error:
        raise Refused(f"{path} is not a whole zip file: {error}") from None


def _tmx(path: str, columns: list[str], languages: dict[str, str] | None = None, **_: Any) -> Iterator[Chunk]:
    """Translation memories; a unit's line is its number. Entities of its own are refused: they can read files or explode."""
    codes = [code.lower() for code in (languages or {}).values()]

    def rows() -> Iterator[tuple[int, list[str]] | Bad]:
        for number, unit in enumerate(_units(path), start=1):
            found = {lang: text for lang, text in unit if text}
            texts = [next((text for lang, text in found.items() if _same_language(lang, code)), None) for code in codes]
            if None in texts:
                yield Bad(number, f"no_{codes[texts.index(None)]}", "")
            else:
                yield number, [text for text in texts if text is not None]

    return _collect(columns, _until_cut(rows()))


def _until_cut(rows: Iterator[tuple[int, list[str]] | Bad]) -> Iterator[tuple[int, list[str]] | Bad]:
    """Rows up to where a file is cut off or malformed, and then one bad row that says so."""
    from xml.etree.ElementTree import ParseError

    last = 0
    try:
        for row in rows:
            last = row.line if isinstance(row, Bad) else row[0]
            yield row
    except (EOFError, OSError, ParseError) as error:
        yield Bad(last + 1, f"truncated_file: {error}", "")


def _same_language(found: str, wanted: str) -> bool:
    return found == wanted or found.split("-")[0].split("_")[0] == wanted


def _units(path: str) -> Iterator[list[tuple[str, str]]]:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import iterparse

    root = None
    try:
        for event, element in iterparse(_Reader(streams.blocks(path)), events=("start", "end"), forbid_dtd=False):
            root = element if root is None else root
            if event == "end" and element.tag == "tu":
                yield [(_language(tuv), "".join(_segment_text(tuv.find("seg")))) for tuv in element.iter("tuv")]
                root.clear()
                element.clear()
            elif event == "end" and element.tag == "body":
                root.clear()
    except DefusedXmlException as error:
        raise Refused(f"{path}: the XML declares entities ({type(error).__name__}); such a file is not read. Remove its <!ENTITY …>") from None


def _language(tuv: Any) -> str:
    return str(tuv.get("{http://www.w3.org/XML/1998/namespace}lang") or tuv.get("lang") or "").lower()


def _segment_text(seg: Any) -> Iterator[str]:
    """The text of a segment: inline codes (bpt, ept, ph, it) are mark-up, highlighted spans (hi) are text."""
    if seg is None:
        return
    yield seg.text or ""
    for child in seg:
        if child.tag in ("hi", "sub"):
            yield from _segment_text(child)
        yield child.tail or ""


class _Reader(io.RawIOBase):
    """A file object over a stream of byte blocks, for parsers that want one."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, b""

    def read(self, size: int = -1) -> bytes:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._rest = block
        out, self._rest = self._rest[:size], self._rest[size:]
        return out


def _phrases(path: str, columns: list[str], **_: Any) -> Iterator[Chunk]:
    from xdist.phrases import phrases

    return _collect(columns, ((number, [row[c] for c in columns]) for number, row in enumerate(phrases(path), start=1)))
