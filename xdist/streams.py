"""Lines of a file on any storage, decompressed as they come; what cannot be read becomes a line with a reason.

Reads plain files and .gz, .bz2, .zst, of one or several members. Memory holds one block of a file. A stream that is cut
off or damaged gives all its whole lines first, and then says so. A storage that fails raises its own error instead: the
file is whole, and reading it again will do.
"""

import bz2
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from xdist import files
from xdist.errors import Refused

BLOCK = 1 << 18  # bytes read at a time
GATHER = 1 << 19  # bytes of whole lines handed on together
MAX_LINE = 1 << 20  # a longer line is not a sentence; it is quarantined without being held in memory


class Damaged(Exception):
    """A compressed stream is cut off or broken; everything before that place was given."""


class Line(NamedTuple):
    """One line of a text file; `text` is None where it is bad."""

    number: int
    text: str | None
    reason: str = ""


class Block(NamedTuple):
    """Whole lines, each ended by a line feed; `number` is that of the first."""

    number: int
    data: bytes


_taken = 0


def taken() -> int:
    """Bytes, as stored, that this process has taken from files so far: how far a task has come in its file."""
    return _taken


def _raw(path: str) -> Iterator[bytes]:
    global _taken
    fs, inner = files.resolve(path)
    try:
        with fs.open_input_stream(inner, compression=None) as stream:
            while block := stream.read(BLOCK):
                _taken += len(block)
                yield bytes(block)
    except FileNotFoundError:
        raise Refused(f"{path} does not exist; check the corpus' path and data.root") from None
    except PermissionError as error:
        raise Refused(f"{path} may not be read: {error}") from None


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


# How to decode, and how many bytes at a time: at the codec's worst ratio that gives less than 100 MB.
CODECS: dict[str, tuple[Callable[[], Any], int]] = {
    ".gz": (lambda: zlib.decompressobj(31), 1 << 14),
    ".bz2": (bz2.BZ2Decompressor, 1 << 6),
    ".zst": (_zstd, 1 << 10),
}


def blocks(path: str) -> Iterator[bytes]:
    """A file's content, decompressed. Raises Damaged where it is cut off or broken, after all that is good."""
    codec = next((codec for ending, codec in CODECS.items() if path.endswith(ending)), None)
    return _raw(path) if codec is None else _decompressed(_raw(path), *codec)


def _decompressed(raw: Iterator[bytes], new: Callable[[], Any], step: int) -> Iterator[bytes]:
    decoder: Any = None
    for block in raw:
        for start in range(0, len(block), step):
            piece = block[start : start + step]
            while piece:
                if decoder is None or decoder.eof:  # several members may follow each other, padded with zeros
                    piece = piece if decoder is None else piece.lstrip(b"\0")
                    decoder = new() if piece else decoder
                    if not piece:
                        break
                try:
                    found = decoder.decompress(piece)
                except Exception as error:  # each library has its own class for a damaged stream
                    raise Damaged(f"damaged compressed data: {error}") from None
                if found:
                    yield found
                piece = decoder.unused_data if decoder.eof else b""
    if decoder is not None and not decoder.eof:
        raise Damaged("the compressed data is cut off")


def _gathered(stream: Iterator[bytes]) -> Iterator[bytes]:
    held: list[bytes] = []
    size = 0
    try:
        for block in stream:
            held.append(block)
            size += len(block)
            if size >= GATHER:
                yield b"".join(held)
                held, size = [], 0
    except Damaged as error:
        yield b"".join(held)
        raise error
    yield b"".join(held)


def line_blocks(stream: Iterator[bytes]) -> Iterator[Block | Line]:
    """A byte stream as blocks of whole lines, without a byte order mark. Between them, a Line for what cannot be held or
    read: an overlong line, and the place where the stream is cut off."""
    number, carry, overlong = 1, b"", False
    try:
        for block in _gathered(stream):
            end = block.rfind(b"\n") + 1
            if end:
                start = 0
                if overlong:
                    yield Line(number, None, "line_too_long")
                    start, number, overlong = block.find(b"\n") + 1, number + 1, False
                whole, carry = carry + block[start:end], b""
                if whole:
                    yield Block(number, whole.removeprefix(b"\xef\xbb\xbf") if number == 1 else whole)
                    number += whole.count(b"\n")
            carry = b"" if overlong else carry + block[end:]
            if len(carry) > MAX_LINE:
                carry, overlong = b"", True
    except Damaged as error:
        yield Line(number, None, f"truncated_file: {error}")
        return
    carry = carry.removeprefix(b"\xef\xbb\xbf") if number == 1 else carry
    if overlong:
        yield Line(number, None, "line_too_long")
    elif carry:
        yield Block(number, carry + b"\n")


def lines(stream: Iterator[bytes]) -> Iterator[Line]:
    """Lines of a byte stream. Undecodable, overlong and NUL-bearing lines come without text but with a reason; a cut-off
    stream ends in one such line, after every whole line before it."""
    for item in line_blocks(stream):
        if isinstance(item, Line):
            yield item
        else:
            yield from split(item)


def split(block: Block) -> Iterator[Line]:
    """The lines of a block."""
    for number, raw in enumerate(block.data[:-1].split(b"\n"), start=block.number):
        yield _decoded(number, raw)


def _decoded(number: int, raw: bytes) -> Line:
    if len(raw) > MAX_LINE:
        return Line(number, None, "line_too_long")
    if b"\0" in raw:
        return Line(number, None, "nul_byte")
    try:
        return Line(number, raw.removesuffix(b"\r").decode())
    except UnicodeDecodeError:
        return Line(number, None, "invalid_utf8")
