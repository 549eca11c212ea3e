"""Readers of aligned text: Moses pairs (two files, line by line parallel, also inside an OPUS zip) and TMX memories.

Archives and XML are read defensively: nothing is extracted to disk; paths that leave the archive, absurd compression
ratios and entities of a file's own are refused.
"""

import io
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import ParseError

from xdist import chunks, files, streams
from xdist.chunks import KEPT, Bad, Chunk, Row
from xdist.errors import Refused

MAX_ZIP_RATIO = 200


def moses(
    path: str, columns: list[str], target_path: str | None = None, languages: dict[str, str] | None = None, **_: Any
) -> Iterator[Chunk]:
    """Two files, or the two members of an OPUS zip whose names end in the languages' codes; a row's line is theirs."""
    if path.endswith(".zip"):
        sides = [_member(path, code) for code in (languages or {}).values()]
    elif target_path is None:
        raise Refused(f"{path}: a Moses pair needs `target_path`, the file with the translations")
    else:
        sides = [streams.blocks(path), streams.blocks(target_path)]
    return chunks.collect(columns, _pairs(*map(streams.lines, sides)))


def _pairs(sources: Iterator[streams.Line], targets: Iterator[streams.Line]) -> Iterator[Row | Bad]:
    while True:
        source, target = next(sources, None), next(targets, None)
        if source is None and target is None:
            return
        if source is None or target is None:
            longer, rest = (target, targets) if source is None else (source, sources)
            assert longer is not None
            yield Bad(
                longer.number, f"sides_differ_in_length: {1 + sum(1 for _ in rest):,} lines more on one side", (longer.text or "")[:KEPT]
            )
            return
        if source.text is None or target.text is None:
            yield Bad(source.number, source.reason or target.reason, (source.text or target.text or "")[:KEPT])
        else:
            yield source.number, [source.text, target.text]


def _member(path: str, code: str) -> Iterator[bytes]:
    """The file of one language inside an OPUS zip, as a stream; nothing is written to disk."""
    try:
        with files.open_input(path) as raw, zipfile.ZipFile(raw) as archive, archive.open(_chosen(path, archive, code)) as stream:
            while block := stream.read(streams.BLOCK):
                yield block
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise Refused(f"{path} is not a whole zip file: {error}") from None
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or a compression that Python does not know
        raise Refused(f"{path} cannot be unpacked: {error}") from None
    except FileNotFoundError:
        raise Refused(f"{path} does not exist; check the corpus' path and data.root") from None


def _chosen(path: str, archive: zipfile.ZipFile, code: str) -> zipfile.ZipInfo:
    for info in archive.infolist():
        if info.filename.startswith(("/", "\\")) or ".." in info.filename.replace("\\", "/").split("/"):
            raise Refused(f"{path}: member {info.filename!r} points outside the archive; such a file is not read")
        if info.file_size > MAX_ZIP_RATIO * max(info.compress_size, 1 << 16):
            raise Refused(f"{path}: member {info.filename!r} unpacks to more than {MAX_ZIP_RATIO} times its size; not read")
    found = [info for info in archive.infolist() if info.filename.endswith(f".{code}")]
    if len(found) != 1:
        listed = ", ".join(archive.namelist()[:10])
        raise Refused(f"{path}: {len(found)} members end in .{code}, one is needed; it has {listed}")
    return found[0]


def tmx(path: str, columns: list[str], languages: dict[str, str] | None = None, **_: Any) -> Iterator[Chunk]:
    """Translation memories; a unit's line is its number. Entities of its own are refused: they can read files or explode."""
    codes = [code.lower() for code in (languages or {}).values()]
    return chunks.collect(columns, _until_cut(_chosen_languages(path, codes)))


def _chosen_languages(path: str, codes: list[str]) -> Iterator[Row | Bad]:
    for number, unit in enumerate(_units(path), start=1):
        texts = [next((text for lang, text in unit if text.strip() and _same_language(lang, code)), None) for code in codes]
        if None in texts:
            yield Bad(number, f"no_{codes[texts.index(None)]}", next((text for text in texts if text), "")[:KEPT])
        else:
            yield number, [text for text in texts if text is not None]


def _until_cut(rows: Iterator[Row | Bad]) -> Iterator[Row | Bad]:
    """Rows up to where a file is cut off or malformed, and then one bad row that says so."""
    last = 0
    try:
        for row in rows:
            last = row[0]
            yield row
    except (streams.Damaged, ParseError) as error:
        yield Bad(last + 1, f"truncated_file: {error}")


def _same_language(found: str, wanted: str) -> bool:
    return found.replace("_", "-") == wanted.replace("_", "-") or found.replace("_", "-").split("-")[0] == wanted


def _units(path: str) -> Iterator[list[tuple[str, str]]]:
    """(language, text) of each unit. What was read is let go of, so that memory holds one unit."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import iterparse

    body: Any = None
    try:
        for event, element in iterparse(_Reader(streams.blocks(path)), events=("start", "end"), forbid_dtd=False):
            tag = element.tag.rpartition("}")[2]  # some tools write a default name space
            if event == "start":
                body = element if tag == "body" else body
            elif tag == "tu":
                yield [(_language(tuv), "".join(_text(tuv))) for tuv in element.iter() if tuv.tag.endswith("tuv")]
                (element if body is None else body).clear()
    except DefusedXmlException as error:
        raise Refused(
            f"{path}: the XML declares entities ({type(error).__name__}); such a file is not read. Remove its <!ENTITY …>"
        ) from None


def _language(tuv: Any) -> str:
    return str(tuv.get("{http://www.w3.org/XML/1998/namespace}lang") or tuv.get("lang") or "").lower()


def _text(tuv: Any) -> Iterator[str]:
    for child in tuv:
        if child.tag.endswith("seg"):
            yield from _running(child)


def _running(seg: Any) -> Iterator[str]:
    """The text of a segment: inline codes (bpt, ept, ph, it) are mark-up, highlighted spans (hi) are text."""
    yield seg.text or ""
    for child in seg:
        if child.tag.rpartition("}")[2] in ("hi", "sub"):
            yield from _running(child)
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
