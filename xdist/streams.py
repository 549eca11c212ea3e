"""Lines of a file on any storage, decompressed as they come; what cannot be read becomes a line with a reason.

Memory holds one block of a file. A stream that is cut off or damaged gives all its whole lines first, and then says so.
"""

import bz2
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from xdist import files
from xdist.errors import Refused

BLOCK = 1 << 18  # bytes read at a time
MAX_LINE = 1 << 20  # a longer line is not a sentence; it is quarantined without being held in memory


class Line(NamedTuple):
    """One line of a text file; `text` is None where it is bad."""

    number: int
    text: str | None
    reason: str = ""


def _raw(path: str) -> Iterator[bytes]:
    fs, inner = files.resolve(path)
    try:
        with fs.open_input_stream(inner, compression=None) as stream:
            while block := stream.read(BLOCK):
                yield bytes(block)
    except FileNotFoundError:
        raise Refused(f"{path} does not exist; check the corpus' path and data.root") from None


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def blocks(path: str) -> Iterator[bytes]:
    """A file's content, decompressed. Raises EOFError or OSError where it is cut off or damaged, after all that is good."""
    decoders: dict[str, Callable[[], Any]] = {".gz": lambda: zlib.decompressobj(31), ".bz2": bz2.BZ2Decompressor, ".zst": _zstd}
    new = next((make for ending, make in decoders.items() if path.endswith(ending)), None)
    if new is None:
        yield from _raw(path)
        return
    decoder, used = new(), False
    for block in _raw(path):
        while block:  # several compressed members may follow each other in one file
            if decoder.eof:
                decoder = new()
            used = True
            try:
                yield decoder.decompress(block)
            except Exception as error:  # each library has its own class for a damaged stream
                raise OSError(f"damaged compressed data: {error}") from None
            block = decoder.unused_data if decoder.eof else b""
    if used and not decoder.eof:
        raise EOFError("the compressed data is cut off")


def lines(stream: Iterator[bytes]) -> Iterator[Line]:
    """Lines of a byte stream. Undecodable, overlong and NUL-bearing lines come without text but with a reason; a cut-off
    stream ends in one such line, after every whole line before it."""
    number, carry, overlong = 0, b"", False
    try:
        for block in stream:
            *whole, carry = (carry + block).split(b"\n")
            for raw in whole:
                number += 1
                yield Line(number, None, "line_too_long") if overlong else _decoded(number, raw)
                overlong = False
            if len(carry) > MAX_LINE:
                carry, overlong = b"", True
    except (EOFError, OSError) as error:
        yield Line(number + 1, None, f"truncated_file: {error}")
        return
    if carry or overlong:
        yield Line(number + 1, None, "line_too_long") if overlong else _decoded(number + 1, carry)


def _decoded(number: int, raw: bytes) -> Line:
    if len(raw) > MAX_LINE:
        return Line(number, None, "line_too_long")
    if b"\0" in raw:
        return Line(number, None, "nul_byte")
    try:
        return Line(number, raw.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        return Line(number, None, "invalid_utf8")


