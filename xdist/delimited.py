"""Readers of lines with fields: TSV, where quotes are data, and CSV with RFC 4180 quoting. Plain or compressed.

TSV is the hot path of prepare: a block of clean lines is parsed by Arrow in one go, and only a block that holds anything
odd (a wrong field count, NUL, invalid UTF-8, a bare carriage return) is read line by line. Both give the same rows
(but line by line, invalid UTF-8 in a column that nobody reads is noticed as well).
"""

import collections
import csv
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from xdist import chunks, streams
from xdist.chunks import KEPT, Bad, Chunk, Row
from xdist.errors import Refused

MOST_LINES = 50  # of one CSV record: a quote that is still open then was never meant to be one


class _Header(NamedTuple):
    names: list[str]
    columns: list[str]
    places: list[int]


def tsv(path: str, columns: list[str], **_: Any) -> Iterator[Chunk]:
    """Tab-separated with a header; quotes are data."""
    header = None
    for item in streams.line_blocks(streams.blocks(path)):
        if header is None:
            first = item if isinstance(item, streams.Line) else next(streams.split(item))
            header = _header(path, first, None if first.text is None else first.text.split("\t"), columns)
            if isinstance(item, streams.Line):
                continue
            item = streams.Block(2, item.data[item.data.index(b"\n") + 1 :])
        if isinstance(item, streams.Line):
            yield chunks.chunk(columns, [], [Bad(item.number, item.reason)])
        elif item.data:
            yield _parsed(item, header) or _by_line(item, header)
    if header is None:
        raise Refused(f"{path}: the header cannot be read (the file is empty)")


def _header(path: str, line: streams.Line, names: list[str] | None, columns: list[str]) -> _Header:
    if names is None:
        raise Refused(f"{path}: the header cannot be read ({line.reason})")
    return _Header(names, columns, chunks.places(path, names, columns))


def _parsed(block: streams.Block, header: _Header) -> Chunk | None:
    """A block parsed by Arrow; None where it is not plainly clean."""
    data = block.data.replace(b"\r\n", b"\n") if b"\r" in block.data else block.data
    if len(header.names) < 2 or data.startswith(b"\n") or b"\n\n" in data or b"\0" in data or b"\r" in data or len(data) > streams.MAX_LINE:
        return None
    numbered = [str(place) for place in range(len(header.names))]
    wanted = {numbered[place]: pa.string() for place in header.places}
    try:
        table = pacsv.read_csv(
            pa.BufferReader(data),
            read_options=pacsv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=numbered),
            parse_options=pacsv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            convert_options=pacsv.ConvertOptions(column_types=wanted, include_columns=list(wanted), strings_can_be_null=False),
        )
    except pa.ArrowInvalid:
        return None
    arrays = {name: table[numbered[place]].combine_chunks() for name, place in zip(header.columns, header.places, strict=True)}
    return Chunk(np.arange(block.number, block.number + len(table), dtype=np.int64), arrays)


def _by_line(block: streams.Block, header: _Header) -> Chunk:
    rows = (_row(line, None if line.text is None else line.text.split("\t"), header) for line in streams.split(block))
    found = [row for row in rows if row is not None]
    return chunks.chunk(header.columns, [row for row in found if not isinstance(row, Bad)], [row for row in found if isinstance(row, Bad)])


def _row(line: streams.Line, fields: list[str] | None, header: _Header) -> Row | Bad | None:
    """A row, a bad row, or nothing for an empty line."""
    if fields is None:
        return Bad(line.number, line.reason, (line.text or "")[:KEPT])
    if len(fields) == len(header.names):
        return line.number, [fields[place] for place in header.places]
    if not line.text:
        return None
    return Bad(line.number, f"{len(fields)}_fields_instead_of_{len(header.names)}", line.text[:KEPT])


def comma(path: str, columns: list[str], **_: Any) -> Iterator[Chunk]:
    """Comma-separated with a header, RFC 4180 quoting; a record may span lines."""
    records = _records(streams.lines(streams.blocks(path)))
    line, names = next(records, (streams.Line(0, None, "the file is empty"), None))
    header = _header(path, line, names, columns)
    return chunks.collect(columns, (row for line, fields in records if (row := _row(line, fields, header)) is not None))


def _records(lines: Iterator[streams.Line]) -> Iterator[tuple[streams.Line, list[str] | None]]:
    """(first line, fields) of each record. A quote that opens and does not lead to a record of the header's width costs
    its own line; the lines after it are read anew."""
    waiting: collections.deque[streams.Line] = collections.deque()
    width, doubtful = None, 0
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        if line.text is None:
            yield line, None
            continue
        taken = [line]
        fields, is_open = _fields(line.text)
        while is_open and len(taken) < MOST_LINES and (more := waiting.popleft() if waiting else next(lines, None)) is not None:
            taken.append(more)
            if more.text is None:
                break
            if '"' in more.text:
                fields, is_open = _fields("\n".join(part.text or "" for part in taken))
        tail = line.number < doubtful and len(taken) == 1 and line.text.count('"') % 2  # maybe of the record set apart
        if fields is None or is_open or tail or (len(taken) > 1 and len(fields) != width):
            waiting.extendleft(reversed(taken[1:]))
            doubtful = line.number + MOST_LINES
            reason = "field_too_long" if len(line.text) > csv.field_size_limit() else "unbalanced_quote"
            yield line._replace(reason=reason), None
        else:
            width = width or len(fields)
            yield line, fields


def _fields(text: str) -> tuple[list[str] | None, bool]:
    """Fields of one record, or None where it is malformed; and whether a quote is still open at its end."""
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        return None, "unexpected end of data" in str(error)
    return (records[0] if records else [""]) if len(records) < 2 else None, False
