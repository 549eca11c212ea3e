"""Which files a corpus stands for, of which format they are, and the one way to read them all.

Reads TSV, CSV, JSONL, Parquet, TMX, Moses pairs, Hugging Face data sets and the demo's phrase grammar; plain or .gz, .bz2,
.zst; from any storage. Every reader gives a stream of chunks of rows, bad rows apart with their line and reason, and
holds one block of a file in memory.
"""

import fnmatch
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.fs as pafs

from xdist import aligned, delimited, files, records
from xdist.chunks import Chunk
from xdist.errors import Refused

ENDINGS = {".tsv": "tsv", ".txt": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
ENDINGS |= {".tmx": "tmx", ".zip": "moses"}
COMPRESSIONS = (".gz", ".bz2", ".zst")
SAVED = {"state.json", "dataset_info.json", "dataset_dict.json"}  # what save_to_disk of a data set leaves
READERS: dict[str, Callable[..., Iterator[Chunk]]] = {
    "tsv": delimited.tsv,
    "csv": delimited.comma,
    "jsonl": records.jsonl,
    "parquet": records.parquet,
    "hf": records.hugging_face,
    "phrases": records.grammar,
    "moses": aligned.moses,
    "tmx": aligned.tmx,
}


def format_of(path: str, target_path: str | None, declared: str) -> str:
    """The format of a file, by its declaration or its ending. Raises Refused for an unknown ending."""
    if declared != "auto":
        return declared
    if target_path:
        return "moses"
    if path.startswith("hf://"):
        return "hf"
    if name := _by_ending(path):
        return name
    fs, inner = files.resolve(path)
    if fs.get_file_info(inner).type == pafs.FileType.Directory:
        return "hf"
    raise Refused(f"{path}: the ending tells no format; set the corpus' format")


def _by_ending(path: str) -> str | None:
    plain = path
    for ending in COMPRESSIONS:
        plain = plain.removesuffix(ending)
    return next((name for ending, name in ENDINGS.items() if plain.endswith(ending)), None)


def expand(path: str, declared: str) -> list[str]:
    """Files that a path, glob or folder stands for, sorted. Raises Refused when there is none."""
    if path.startswith("hf://"):
        return [path]
    fs, inner = files.resolve(path)
    info = fs.get_file_info(inner)
    if info.type == pafs.FileType.File:
        return [path]
    if any(sign in inner for sign in "*?["):
        found = _glob(fs, path, inner)
    elif info.type == pafs.FileType.NotFound:
        raise Refused(f"{path} does not exist; check the corpus' path and data.root")
    else:
        inside = files.names(path)
        if declared == "hf" or SAVED & set(inside):
            return [path]
        found = [f"{path}/{name}" for name in inside if not name.startswith((".", "_")) and (declared != "auto" or _by_ending(name))]
    if not found:
        raise Refused(f"{path} matches no file; check the corpus' path and data.root")
    return found


def _glob(fs: pafs.FileSystem, uri: str, inner: str) -> list[str]:
    """Files that match; a star stays within one folder's level, two stars cross levels."""
    fixed = inner[: min(inner.find(sign) for sign in "*?[" if sign in inner)].rpartition("/")[0]
    prefix = uri[: len(uri) - len(inner)] if uri.endswith(inner) else ""
    found = fs.get_file_info(pafs.FileSelector(fixed, recursive=True, allow_not_found=True))
    paths = [info.path for info in found if info.is_file and ("**" in inner or info.path.count("/") == inner.count("/"))]
    return sorted(prefix + path for path in paths if fnmatch.fnmatchcase(path, inner))


def read(path: str, kind: str, columns: list[str], **options: Any) -> Iterator[Chunk]:
    """Chunks of rows with the wanted columns.

    `options`: `target_path` (moses), `languages` (moses, tmx: column → language code), `subset` and `split` (hf).
    Raises Refused for a missing column or file, and for archives or XML that could do harm.
    """
    return READERS[kind](path, columns, **options)
