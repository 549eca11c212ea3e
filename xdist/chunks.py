"""Rows on their way from a reader: the good ones as Arrow columns with line numbers, the bad ones apart with a reason."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from xdist.errors import Refused

CHUNK_ROWS = 20_000
CHUNK_CHARACTERS = 16 << 20
KEPT = 200  # characters of a bad row that its quarantine shows


class Bad(NamedTuple):
    """A row that could not be read: its line (from 1), the reason, the beginning of its text."""

    line: int
    reason: str
    text: str = ""


Row = tuple[int, list[str]]


@dataclass
class Chunk:
    """Rows of one file: line numbers and, per wanted column, the values (string arrays); `bad` could not be read."""

    lines: np.ndarray
    columns: dict[str, pa.Array]
    bad: list[Bad] = field(default_factory=list)

    def first(self, rows: int) -> "Chunk":
        """The first rows alone, with the bad rows up to there."""
        if rows >= len(self.lines):
            return self
        last = int(self.lines[rows - 1])
        columns = {name: values.slice(0, rows) for name, values in self.columns.items()}
        return Chunk(self.lines[:rows], columns, [bad for bad in self.bad if bad.line < last])


def chunk(columns: list[str], rows: list[Row], bad: list[Bad]) -> Chunk:
    """A chunk of rows whose values are in the order of `columns`."""
    values = [list(column) for column in zip(*(row for _, row in rows), strict=True)] or [[] for _ in columns]
    arrays = {name: pa.array(column, pa.string()) for name, column in zip(columns, values, strict=True)}
    return Chunk(np.array([line for line, _ in rows], np.int64), arrays, bad)


def collect(columns: list[str], rows: Iterable[Row | Bad]) -> Iterator[Chunk]:
    """Rows in chunks of bounded size."""
    good: list[Row] = []
    bad: list[Bad] = []
    characters = 0
    for row in rows:
        if isinstance(row, Bad):
            bad.append(row)
        else:
            good.append(row)
            characters += sum(map(len, row[1]))
        if len(good) + len(bad) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk(columns, good, bad)
            good, bad, characters = [], [], 0
    yield chunk(columns, good, bad)


def places(path: str, header: list[str], columns: list[str]) -> list[int]:
    """Where the columns stand in a header. Raises Refused for one that is not there."""
    for column in columns:
        if column not in header:
            raise missing(path, column, header)
    return [header.index(column) for column in columns]


def missing(path: str, column: str, header: Iterable[str]) -> Refused:
    """The error for a column that a file does not have."""
    return Refused(f"{path}: no column {column!r}; it has {', '.join(map(str, header))}. Set the corpus' or task's column names")
